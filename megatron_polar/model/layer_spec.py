"""The Transformer Engine or local layer spec of megatron-core, with core attention replaced by ours."""

import copy

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_polar import log
from megatron_polar.errors import UserError
from megatron_polar.model.attention import SharedPrefixAttention
from megatron_polar.model.reward_rows import RewardRowsLayer, RewardRowsSelfAttention


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be used here, in one line; None when it can."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a half-installed Transformer Engine raises RuntimeError or FileNotFoundError as well
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None if torch.cuda.is_available() else "no GPU here"


def resolve_transformer_impl(requested: str, *, device_kind: str) -> str:
    """Resolve `model.transformer_impl` to "transformer_engine" or "local". Raises UserError for one that is missing."""
    on_gpu = device_kind == "cuda"
    problem = transformer_engine_problem() if requested != "local" and on_gpu else "no GPU here"
    if requested == "auto" and on_gpu and problem:
        log.warn(
            f"Transformer Engine is not usable here ({problem}): megatron-core's local layers instead, which are "
            f"slower, take more memory and know no FP8; model.transformer_impl=transformer_engine refuses that"
        )
    if requested == "transformer_engine" and problem:
        raise UserError(
            f"model.transformer_impl=transformer_engine, but Transformer Engine is not usable here ({problem}); "
            f"install requirements-gpu.txt on a GPU machine, or use auto"
        )
    return "local" if requested == "local" or problem else "transformer_engine"


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm; under sequence parallelism its weight's gradient is summed over tensor-parallel ranks
    (megatron-core's own wrapper of it refuses sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=config_device(config))
        self.weight.sequence_parallel = config.sequence_parallel


def config_device(config: TransformerConfig) -> torch.device | None:
    """Where parameters are created: the CPU when megatron-core initialises there, else the current device."""
    return torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()


def block_spec(
    config: TransformerConfig,
    *,
    transformer_impl: str,
    attention: type[SharedPrefixAttention],
    vp_stage: int | None,
    reward_rows: bool,
) -> TransformerBlockSubmodules:
    """Layers of this pipeline chunk and the final norm. `reward_rows`: its last layer is the model's, and computes only
    these."""
    if transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        spec: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        final_norm = TENorm
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = final_norm = RMSNorm
        if config.qk_layernorm:
            spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
            spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = attention
    layers = [spec] * get_num_layers_to_build(config, vp_stage=vp_stage)
    if reward_rows:
        layers[-1] = copy.deepcopy(spec)
        layers[-1].module = RewardRowsLayer
        layers[-1].submodules.self_attention.module = RewardRowsSelfAttention
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)
