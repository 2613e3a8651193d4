"""Tiny random models of every family in Hugging Face's formats, and InternLM2 once more, from its definition."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_polar.data.tokenizer import load_tokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}

# name: (class, changes to the configuration)
TRANSFORMERS_MODELS = {
    "llama": ("LlamaForSequenceClassification", {}),
    "llama, heads of their own size": ("LlamaForSequenceClassification", {"head_dim": 16}),
    "llama 3.1": ("LlamaForSequenceClassification", {"rope_parameters": LLAMA3_ROPE}),
    "llama, one key/value head": ("LlamaForSequenceClassification", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2ForSequenceClassification", {}),
    "qwen3": ("Qwen3ForSequenceClassification", {"head_dim": 8}),
    "llama language model": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama language model, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2 language model, tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3 language model": ("Qwen3ForCausalLM", {"head_dim": 8}),
}
INTERNLM2_MODELS = ("internlm2", "internlm2 language model")
REWARD_MODELS = [
    "internlm2",
    *(name for name, (kind, _) in TRANSFORMERS_MODELS.items() if kind.endswith("SequenceClassification")),
]
ALL_MODELS = [*TRANSFORMERS_MODELS, *INTERNLM2_MODELS]


def make_model(
    name: str,
    directory: Path,
    *,
    tokenizer_path: Path,
    dtype=torch.float32,
    shard: str = "20KB",
    seed: int = 0,
    std: float = 0.3,
    **shape,
) -> Path:
    """Write a model of `ALL_MODELS` with the tests' tokenizer; `shape` is of transformers' models alone."""
    directory.mkdir(parents=True)
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.save(directory)
    if name in INTERNLM2_MODELS:
        _write_internlm2(
            directory, vocab_size=tokenizer.vocab_size, has_head="language" not in name, dtype=dtype, seed=seed
        )
        return directory
    import transformers

    kind, changes = TRANSFORMERS_MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind.split("For")[0] + "Config")(
        vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id, num_labels=1, **{**SHAPE, **changes, **shape}
    )
    model = getattr(transformers, kind)(config)
    for parameter in model.parameters():  # their own start has norms of one and biases of zero
        torch.nn.init.normal_(parameter, std=std)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _write_internlm2(directory: Path, *, vocab_size: int, has_head: bool, dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, heads, groups = 32, 48, 4, 2
    shapes = {"model.tok_embeddings.weight": (vocab_size, hidden), "model.norm.weight": (hidden,)}
    for i in range(SHAPE["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes[f"{layer}attention.wqkv.weight"] = ((heads + 2 * groups) * hidden // heads, hidden)
        shapes[f"{layer}attention.wo.weight"] = (hidden, hidden)
        shapes[f"{layer}feed_forward.w1.weight"] = shapes[f"{layer}feed_forward.w3.weight"] = (inner, hidden)
        shapes[f"{layer}feed_forward.w2.weight"] = (hidden, inner)
        shapes[f"{layer}attention_norm.weight"] = shapes[f"{layer}ffn_norm.weight"] = (hidden,)
    shapes["v_head.weight" if has_head else "output.weight"] = (1 if has_head else vocab_size, hidden)
    tensors = {name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["InternLM2ForRewardModel" if has_head else "InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "bias": False,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **SHAPE,
    }
    (directory / "config.json").write_text(json.dumps(config))


def internlm2_reward(tensors: dict[str, torch.Tensor], ids: list[int], *, theta: float, eps: float = 1e-5) -> float:
    """The reward of one sequence, in float64 and with loops where a definition has indices; no code is shared with the
    package. Layout of wqkv: for each key/value head its query heads, then the key, then the value."""
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    heads, groups = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    size = w["model.norm.weight"].size // heads
    x = w["model.tok_embeddings.weight"][ids]

    def norm(values, weight):
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + eps) * weight

    def turn(vectors):
        out = np.empty_like(vectors)
        for position, vector in enumerate(vectors):
            for i in range(size // 2):
                angle = position * theta ** (-2 * i / size)
                a, b = vector[i], vector[i + size // 2]
                out[position, i] = a * np.cos(angle) - b * np.sin(angle)
                out[position, i + size // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    for layer in range(SHAPE["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        y = norm(x, w[p + "attention_norm.weight"])
        qkv = (y @ w[p + "attention.wqkv.weight"].T).reshape(len(ids), groups, heads // groups + 2, size)
        outputs = []
        for head in range(heads):
            group, place = divmod(head, heads // groups)
            q, k, v = turn(qkv[:, group, place]), turn(qkv[:, group, -2]), qkv[:, group, -1]
            rows = []
            for i in range(len(ids)):
                logits = q[i] @ k[: i + 1].T / np.sqrt(size)
                weights = np.exp(logits - logits.max())
                rows.append(weights / weights.sum() @ v[: i + 1])
            outputs.append(np.stack(rows))
        x = x + np.concatenate(outputs, axis=-1) @ w[p + "attention.wo.weight"].T
        y = norm(x, w[p + "ffn_norm.weight"])
        gate, up = y @ w[p + "feed_forward.w1.weight"].T, y @ w[p + "feed_forward.w3.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "feed_forward.w2.weight"].T
    return float((norm(x, w["model.norm.weight"])[-1] @ w["v_head.weight"].T)[0])
