"""What `train.fp8` changes in a GPU's memory and time: which layers, and bytes by arithmetic, not measured on any GPU.

From Transformer Engine 2.11's Linear and LayerNormLinear under megatron-core 0.16.1, on Hopper, whose FP8 GEMMs take
both operands in one orientation only: so everything that is multiplied twice exists twice, as it is and transposed.

Bytes per weight of an FP8 layer's matrices (norms and biases stay in bf16):

| what | fp8_param_gather off | on | who keeps it |
|---|---|---|---|
| bf16 weight | 2 | 0 | DDP's param_data |
| FP8 weight | 1 | 1 | module._fp8_workspaces, kept over micro-batches and steps; or DDP's param_data in uint8 |
| its transpose, for the gradient of the input | 1 | 1 | the same tensor's _transpose, or _columnwise_data |

Gradient, fp32 weight and moments are as in bf16 (memory.py). Scales are 8 bytes a matrix, or 8 for each 128 x 128 block
(`blockwise`), and not counted. While a checkpoint is saved, fp8_param_gather takes 2 bytes a weight more, and there are
no activations then.

Bytes that an FP8 layer keeps for its backward pass, a token of this rank, in the notation of memory.py; what is not
here is as in bf16, for attention runs in bf16:

| what | bf16 | FP8 | why |
|---|---|---|---|
| output of both norms | 2eh/p | 2h/p | quantised by the norm; one orientation is kept |
| input of linear_proj, the attention's output | 0 | nd/t | a quantised copy, beside what the attention kernel keeps |
| SwiGLU's output | ef/t | f/t | quantised by linear_fc2, which does not keep the original |

`blockwise` adds a fp32 scale for each 128 of these. In the backward pass through fc1 the gradient of its output is
quantised in both orientations, 4f/t a token more.

Time: GEMMs of FP8 layers run at FP8_GEMM_SHARE of the FP8 peak. Casting reads a GEMM's input once (for current scaling
twice: its largest value comes first) and writes it in both orientations.
"""

from megatron_polar.config.presets import Architecture, architecture_of
from megatron_polar.config.schema import RunConfig

WEIGHT_BYTES = 2
"""Of a weight in FP8 and its transpose."""
FP8_GEMM_SHARE = 0.5
"""Of the dense FP8 peak. Assumed; FP8 over bf16 comes out near what torchtitan publishes (tests/test_step_time.py)."""
_CAST_BYTES = {"tensorwise": 6, "blockwise": 4, "delayed": 4}


def num_fp8_layers(config: RunConfig, *, pp: int, stage: int) -> int:
    """Layers of a pipeline stage whose GEMMs run in FP8: all but `train.fp8_bf16_layers` at each end of the model."""
    if config.train.fp8 == "off":
        return 0
    ends = 0 if config.train.fp8 == "delayed" else config.train.fp8_bf16_layers
    layers = architecture_of(config.model).num_layers
    first, count = stage * (layers // pp), layers // pp
    return max(0, min(first + count, layers - ends) - max(first, ends))


def change_of_activations(config: RunConfig, *, tp: int, shards_of_residual: int) -> float:
    """Bytes that an FP8 layer keeps for a token beyond what it would keep in bf16 (the second table; negative)."""
    a = architecture_of(config.model)
    kept = 1 + (4 / 128 if config.train.fp8 == "blockwise" else 0)
    norms = (kept - 2) * 2 * a.hidden_size / shards_of_residual
    projection = kept * a.num_attention_heads * a.kv_channels / tp
    return norms + projection + (kept - 2) * a.ffn_hidden_size / tp


def bytes_of_casts(architecture: Architecture, *, recipe: str, tp: int) -> float:
    """Read and written to quantise the inputs of a layer's four GEMMs, for a token and one pass."""
    a = architecture
    inputs = 2 * a.hidden_size + (a.num_attention_heads * a.kv_channels + a.ffn_hidden_size) / tp
    return _CAST_BYTES[recipe] * inputs
