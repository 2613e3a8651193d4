"""Small policies for the RFT study: a tokenizer, Llamas fitted on (prompt, answer) pairs, and what they answer.

Everything is a Hugging Face directory, so that `convert from-hf`, `sample` and TRL take it as any other model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from base_model import build_optimizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<|reward|>", "[UNUSED_TOKEN_130]")
CLIP_NORM = 1.0
WARMUP_STEPS = 30


@dataclass(frozen=True)
class Shape:
    """Llama's shape, without grouped queries and with untied output weights."""

    hidden_size: int
    num_layers: int
    num_heads: int = 4


@dataclass(frozen=True)
class Fit:
    """AdamW on batches of pairs, the rate warmed up and then falling linearly to a tenth."""

    steps: int
    batch: int
    lr: float
    on_prompts: bool = False  # whether the prompts' tokens are learnt, too
    muon_lr: float = 0.0  # above 0: Muon at this rate for the layers' matrices, AdamW for the rest


@dataclass(frozen=True)
class Draw:
    """How answers are drawn: the paper's sampling by default; `top_k=1` is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50


def train_tokenizer(texts: Sequence[str], directory: Path) -> Path:
    """Byte-level BPE in which every digit is a token of its own, with the space before it if there is one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d|\n"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    fast.save_pretrained(directory)
    return directory


def new_model(tokenizer: Path, shape: Shape, *, seed: int, output: Path) -> Path:
    """A random Llama in a directory of its own, with the tokenizer beside it."""
    words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.hidden_size * 11 // 4,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=512,
        initializer_range=shape.hidden_size**-0.5,
        tie_word_embeddings=False,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    _save(LlamaForCausalLM(config), words, output)
    return output


def _save(model, tokenizer, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load(directory: Path, *, device: str):
    """Model and tokenizer of a directory that this study wrote."""
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, use_safetensors=True)
    return model.to(device), AutoTokenizer.from_pretrained(directory, local_files_only=True)


# --- Fitting ---------------------------------------------------------------------------------------------------------


def fit(
    start: Path,
    pairs: Sequence[tuple[str, str]],
    how: Fit,
    *,
    seed: int,
    device: str,
    outputs: dict[Path, int],
) -> dict[str, float]:
    """Fit a model on (prompt, answer) pairs; `outputs` say after which step the model goes into which directory.

    Batches are drawn without replacement, pass by pass. Returns the mean loss (nats per learnt token) of the first and
    of the last tenth of the steps, and the tokens that were seen.
    """
    model, tokenizer = load(start, device=device)
    ids, labels = encode_pairs(pairs, tokenizer, on_prompts=how.on_prompts)
    optimizers = optimizers_of(model, how)
    order = _batches(len(pairs), how.batch, seed=seed)
    losses, tokens = [], 0
    model.train()
    for step in range(how.steps):
        rows = next(order)
        longest = int((ids[rows] != tokenizer.pad_token_id).sum(1).max())
        batch, targets = ids[rows, :longest].to(device), labels[rows, :longest].to(device)
        share = min(1, (step + 1) / WARMUP_STEPS) * max(0.1, 1 - step / how.steps)
        loss = model(input_ids=batch, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        tokens += int((batch != tokenizer.pad_token_id).sum())
        for directory, last in outputs.items():
            if last == step + 1:
                _save(model, tokenizer, directory)
    tenth = max(1, how.steps // 10)
    return {
        "first_loss": float(np.mean(losses[:tenth])),
        "last_loss": float(np.mean(losses[-tenth:])),
        "tokens": tokens,
    }


def optimizers_of(model, how: Fit) -> list[tuple[torch.optim.Optimizer, float]]:
    """(optimizer, peak rate): AdamW, and Muon for the layers' matrices where it has a rate.

    Muon's update is orthogonal whatever the gradient's size, so its rate has nothing to do with AdamW's.
    """
    if not how.muon_lr:
        return [(torch.optim.AdamW(model.parameters(), lr=how.lr, weight_decay=0.01), how.lr)]
    muon, adamw = build_optimizers(model, lr=how.lr)
    return [(adamw, how.lr), (muon, how.muon_lr)]


def encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer, *, on_prompts: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [n, s], padded on the right, and labels [n, s] that are -100 where nothing is learnt."""
    halves = [(tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt, answer in pairs]
    width = 1 + max(len(prompt) + len(answer) for prompt, answer in halves)
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), width), -100)
    for row, (prompt, answer) in enumerate(halves):
        text = torch.tensor([*prompt, *answer, tokenizer.eos_token_id])
        ids[row, : len(text)] = text
        learnt = slice(0 if on_prompts else len(prompt), len(text))
        labels[row, learnt] = text[learnt]
    return ids, labels


def _batches(count: int, size: int, *, seed: int):
    """Endless batches of indices: every index once in a pass, batches across the border of two passes."""
    generator, left = np.random.default_rng(seed), np.array([], dtype=np.int64)
    while True:
        while len(left) < size:
            left = np.concatenate([left, generator.permutation(count)])
        batch, left = left[:size], left[size:]
        yield torch.from_numpy(batch)


# --- Answers ---------------------------------------------------------------------------------------------------------


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise, so that the largest logit is a draw from the softmax; every row has a generator of its own."""

    def __init__(self, seeds: Sequence[int]):
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = np.stack([generator.gumbel(size=scores.shape[1]) for generator in self._generators])
        return scores + torch.from_numpy(noise.astype(np.float32)).to(scores.device)


@torch.inference_mode()
def continue_prompts(
    model, tokenizer, prompts: Sequence[str], draw: Draw, *, seeds: Sequence[int]
) -> list[tuple[str, bool]]:
    """Continue a batch of prompts; returns (text, whether it ended by itself) for each.

    A row's draws come from its own seed, whatever it shares a batch with (but for roundings of the model).
    """
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    processors = LogitsProcessorList()
    if draw.top_k != 1:
        processors.append(TemperatureLogitsWarper(draw.temperature))
        if draw.top_k:
            processors.append(TopKLogitsWarper(draw.top_k))
        if draw.top_p < 1:
            processors.append(TopPLogitsWarper(draw.top_p))
        processors.append(_Gumbel(seeds))
    found = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=False,
        logits_processor=processors,
        max_new_tokens=draw.max_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )[:, encoded["input_ids"].shape[1] :]
    ended = (found == tokenizer.eos_token_id).any(1).tolist()
    return list(zip(tokenizer.batch_decode(found, skip_special_tokens=True), ended, strict=True))


def answers(
    directory: Path, prompts: Sequence[str], draw: Draw, *, seed: int, device: str, batch: int = 256
) -> list[str]:
    """One answer to every prompt."""
    model, tokenizer = load(directory, device=device)
    model.eval()
    texts: list[str] = []
    seeds = np.random.SeedSequence(seed).generate_state(len(prompts), np.uint64)
    for first in range(0, len(prompts), batch):
        rows = slice(first, first + batch)
        found = continue_prompts(model, tokenizer, prompts[rows], draw, seeds=seeds[rows].tolist())
        texts += [text for text, _ in found]
    return texts


def describe(directory: Path) -> dict:
    """Parameters and shape, for the report."""
    config = json.loads((directory / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, use_safetensors=True)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {"parameters": sum(p.numel() for p in model.parameters()), **{name: config[name] for name in names}}
