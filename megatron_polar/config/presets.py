"""Named architectures, and the arithmetic of their parameters and FLOPs. No torch."""

import dataclasses
import difflib
from dataclasses import dataclass

from megatron_polar.config.schema import ModelSection
from megatron_polar.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """The shape of a Llama-style decoder with a scalar reward head (RMSNorm, RoPE, GQA, SwiGLU, untied)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    rotary_base: float = 10000.0
    rope_scaling_factor: float | None = None
    layernorm_epsilon: float = 1e-5
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    init_method_std: float = 0.02
    last_layer: str = "reward_rows"
    """How much of the last layer is computed (`model.last_layer`); the weights are the same."""

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices (norms and biases excluded)."""
        projections = 2 * self.num_attention_heads + 2 * self.num_query_groups
        return self.hidden_size * (projections * self.kv_channels + 3 * self.ffn_hidden_size)

    def num_parameters(self, vocab_size: int) -> int:
        """All weights of the reward model: embedding, layers, norms, biases, head."""
        norms = self.num_layers * (2 * self.hidden_size + (2 * self.kv_channels if self.qk_layernorm else 0))
        qkv_width = (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels
        biases = self.num_layers * qkv_width if self.add_qkv_bias else 0
        ends = vocab_size * self.hidden_size + 2 * self.hidden_size  # embedding, final norm, reward head
        return self.num_layers * self.layer_parameters + norms + biases + ends

    def forward_flops(self, *, tokens: int, attended: int, rewards: int, reward_keys: int) -> int:
        """FLOPs of one forward pass: 2 per weight and token, and attention's two products over its exact causal area.

        `tokens` counts physical tokens, `attended` the query-key pairs inside the mask. The last layer has keys and
        values of all tokens and the rest of `rewards` rows only, which see `reward_keys` keys in all, unless
        `last_layer` is all_rows. The embedding is a look-up and the reward head is negligible: neither is counted. A
        training step costs three times this, without recomputation.
        """
        if self.last_layer == "all_rows":
            multiplied, pairs = self.num_layers * self.layer_parameters * tokens, self.num_layers * attended
        else:
            keys_values = 2 * self.hidden_size * self.num_query_groups * self.kv_channels
            multiplied = (self.num_layers - 1) * self.layer_parameters * tokens
            multiplied += keys_values * tokens + (self.layer_parameters - keys_values) * rewards
            pairs = (self.num_layers - 1) * attended + reward_keys
        return 2 * multiplied + 4 * self.num_attention_heads * self.kv_channels * pairs


# POLAR's shapes: polar_1_8b and polar_7b are the released models (InternLM2.5 bases); 20b is InternLM2-20B, 72b
# Qwen2.5-72B.
PRESETS: dict[str, Architecture] = {
    "nano": Architecture(2, 128, 352, 4, 2, 32, init_method_std=128**-0.5),
    "tiny": Architecture(6, 512, 1376, 8, 4, 64),
    "polar_1_8b": Architecture(24, 2048, 8192, 16, 8, 128, rotary_base=1e6),
    "polar_7b": Architecture(32, 4096, 14336, 32, 8, 128, rotary_base=5e7),
    "polar_20b": Architecture(48, 6144, 16384, 48, 8, 128, rotary_base=1e6),
    "polar_72b": Architecture(80, 8192, 29568, 64, 8, 128, rotary_base=1e6, layernorm_epsilon=1e-6, add_qkv_bias=True),
}

_REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


def architecture_of(model: ModelSection) -> Architecture:
    """Resolve the `model` section: the preset, with the fields that are set on top. Raises UserError when
    incomplete."""
    if model.preset is not None and model.preset not in PRESETS:
        near = difflib.get_close_matches(model.preset, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(PRESETS)}"
        raise UserError(f"model.preset={model.preset!r} is not a known architecture; {hint}")
    shape = dataclasses.asdict(PRESETS[model.preset]) if model.preset else {}
    names = [field.name for field in dataclasses.fields(Architecture)]
    shape |= {name: getattr(model, name) for name in names if getattr(model, name) is not None}
    for name in _REQUIRED:
        if name not in shape:
            raise UserError(f"model.{name} is missing; set it, or set model.preset to one of {', '.join(PRESETS)}")
    for name in names:
        if isinstance(shape.get(name), int) and not isinstance(shape[name], bool) and shape[name] < 1:
            raise UserError(f"model.{name}={shape[name]} must be at least 1")
        if isinstance(shape.get(name), float) and not 0 < shape[name] < float("inf"):
            raise UserError(f"model.{name}={shape[name]} must be above 0, and finite; leave it out for the default")
    if model.preset is None:
        shape.setdefault("num_query_groups", shape["num_attention_heads"])
    heads_changed = model.num_attention_heads is not None or model.hidden_size is not None
    if "kv_channels" not in shape or (heads_changed and model.kv_channels is None):
        if shape["hidden_size"] % shape["num_attention_heads"]:
            raise UserError(
                f"model.hidden_size={shape['hidden_size']} is not a multiple of model.num_attention_heads="
                f"{shape['num_attention_heads']}; change one, or set model.kv_channels"
            )
        shape["kv_channels"] = shape["hidden_size"] // shape["num_attention_heads"]
    if shape["kv_channels"] % 2:
        raise UserError(
            f"model.kv_channels={shape['kv_channels']} must be even, since RoPE turns channels in pairs; set an even "
            f"number (default: hidden_size / num_attention_heads)"
        )
    return Architecture(**shape)


def padded_vocab_size(vocab_size: int, *, multiple: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to `multiple`, the same in every layout."""
    return -(-vocab_size // multiple) * multiple
