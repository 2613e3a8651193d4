"""RunConfig + Topology → TransformerConfig → wrapped model chunks. The only constructor of TransformerConfig."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_polar.config.presets import Architecture, architecture_of, padded_vocab_size
from megatron_polar.config.schema import RunConfig, TrainSection
from megatron_polar.errors import UserError
from megatron_polar.model.attention import SharedPrefixAttention, attention_class
from megatron_polar.model.gradient_fusion import (
    GradientFusion,
    fuse_transformer_engine_layers,
    resolve_gradient_fusion,
)
from megatron_polar.model.initialization import initialize_weights
from megatron_polar.model.layer_spec import block_spec, resolve_transformer_impl
from megatron_polar.model.reward_model import RewardModel, head_dtype
from megatron_polar.parallel.device import Device
from megatron_polar.parallel.topology import Topology

_FP8_ROWS = 128
"""More than any recipe needs, and still next to nothing beside a row."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class BuiltModel:
    """Model chunks of this rank (one without interleaving) and what was chosen where the configuration says auto.

    `chunks` are what the schedules run (wrapped); `cores` the RewardModels inside them.
    """

    chunks: list[MegatronModule]
    transformer_config: TransformerConfig
    architecture: Architecture
    vocab_size: int
    transformer_impl: str
    attention: str
    reward_rows: bool
    """Whether the last layer computes the reward rows only (reward_rows.py)."""
    gradient_fusion: GradientFusion

    @property
    def reward_rows_multiple(self) -> int:
        """Reward rows on a rank are a multiple of this: of what FP8 GEMMs need, where the last layer has some."""
        config = self.transformer_config
        ends_in_bf16 = config.first_last_layers_bf16 and config.num_layers_at_end_in_bf16 > 0
        return _FP8_ROWS if config.fp8 and not ends_in_bf16 else 1

    @property
    def cores(self) -> list[RewardModel]:
        return [unwrap_model(chunk) for chunk in self.chunks]


def build_model(
    config: RunConfig,
    *,
    topology: Topology,
    device: Device,
    vocab_size: int,
    for_training: bool = True,
    dtype: torch.dtype | None = None,
) -> BuiltModel:
    """Build this rank's chunks with random weights (the same in every layout), wrapped for data parallelism if
    training.

    `vocab_size` is the tokenizer's; `dtype` overrides `train.precision` (fp64 in tests).
    """
    architecture = architecture_of(config.model)
    rows = _embedding_rows(config, topology=topology, vocab_size=vocab_size)
    dtype = dtype or _DTYPES[config.train.precision]
    _check_memory(architecture.num_parameters(rows), topology=topology, device=device, dtype=dtype)
    impl = resolve_transformer_impl(config.model.transformer_impl, device_kind=device.kind)
    attention = attention_class(
        config.model.attention, dtype=dtype, have_transformer_engine=impl == "transformer_engine"
    )
    _check_kernels(config.train, transformer_impl=impl)
    fusion = resolve_gradient_fusion(
        config.train.gradient_accumulation_fusion,
        for_training=for_training,
        device_kind=device.kind,
        transformer_impl=impl,
    )
    transformer_config = make_transformer_config(
        config,
        architecture=architecture,
        topology=topology,
        device=device,
        dtype=dtype,
        transformer_impl=impl,
        fuse_gradients=fusion.megatron,
        keep_weights_in_fp8=config.train.fp8_param_gather and for_training,
    )
    chunks, reward_rows = [], config.model.last_layer == "reward_rows"
    for vp_stage in [None] if topology.vpp_size is None else range(topology.vpp_size):
        model = _make_chunk(
            config,
            transformer_config=transformer_config,
            topology=topology,
            device=device,
            vocab_size=rows,
            transformer_impl=impl,
            attention=attention,
            vp_stage=vp_stage,
        )
        if fusion.transformer_engine:
            fuse_transformer_engine_layers(model)
        chunks.append(_wrap(model, config=config, transformer_config=transformer_config, for_training=for_training))
    return BuiltModel(chunks, transformer_config, architecture, rows, impl, attention.__name__, reward_rows, fusion)


def _make_chunk(
    config: RunConfig,
    *,
    transformer_config: TransformerConfig,
    topology: Topology,
    device: Device,
    vocab_size: int,
    transformer_impl: str,
    attention: type[SharedPrefixAttention],
    vp_stage: int | None,
) -> RewardModel:
    """One pipeline chunk of this rank on its device, with random weights."""
    architecture = architecture_of(config.model)
    is_last = topology.is_last_stage and vp_stage in (None, (topology.vpp_size or 1) - 1)
    model = RewardModel(
        transformer_config,
        groups=topology.groups,
        transformer_layer_spec=block_spec(
            transformer_config,
            transformer_impl=transformer_impl,
            attention=attention,
            vp_stage=vp_stage,
            reward_rows=config.model.last_layer == "reward_rows" and is_last,
        ),
        vocab_size=vocab_size,
        max_sequence_length=config.data.max_sequence_length,
        pre_process=topology.is_first_stage and vp_stage in (None, 0),
        post_process=is_last,
        share_embeddings_and_output_weights=False,
        rotary_base=architecture.rotary_base,
        rope_scaling=architecture.rope_scaling_factor is not None,
        rope_scaling_factor=architecture.rope_scaling_factor or 1.0,
        vp_stage=vp_stage,
    )
    model.to(device.torch_device)
    initialize_weights(
        model,
        seed=config.run.seed,
        architecture=architecture,
        reward_head_std=config.model.reward_head_init_std,
        metadata={"dp_cp_group": topology.groups.dp_cp},
    )
    return model


def _check_kernels(train: TrainSection, *, transformer_impl: str) -> None:
    if train.fp8 != "off" and transformer_impl != "transformer_engine":
        raise UserError(
            f"train.fp8={train.fp8} needs Transformer Engine's layers, and this run has megatron-core's local ones, "
            f"which would ignore it; install requirements-gpu.txt on a Hopper machine, or set train.fp8=off"
        )


def _check_memory(num_parameters: int, *, topology: Topology, device: Device, dtype: torch.dtype) -> None:
    """Refuse a model whose weights alone exceed the memory; a mistyped size would otherwise fill it for minutes."""
    needed, available = num_parameters * dtype.itemsize / (topology.tp_size * topology.pp_size), device.total_memory()
    if needed > available:
        raise UserError(
            f"the model section describes {num_parameters:.3g} parameters: {needed / 2**30:.3g} GiB of weights on each "
            f"of {topology.tp_size * topology.pp_size} ranks, and {device.name} has {available / 2**30:.3g} GiB; check "
            f"its sizes and the tokenizer's vocabulary, or split it over more ranks (parallel section)"
        )


def _embedding_rows(config: RunConfig, *, topology: Topology, vocab_size: int) -> int:
    if config.model.vocab_size is not None:
        if config.model.vocab_size < vocab_size:
            raise UserError(
                f"model.vocab_size={config.model.vocab_size} is below the tokenizer's vocabulary of {vocab_size}; "
                f"leave it out, or set at least {vocab_size}"
            )
        vocab_size = config.model.vocab_size
    rows = padded_vocab_size(vocab_size, multiple=config.model.make_vocab_size_divisible_by)
    if rows % topology.tp_size:
        raise UserError(
            f"parallel.tensor_model_parallel_size={topology.tp_size} does not divide the padded vocabulary of {rows} "
            f"rows; set model.make_vocab_size_divisible_by to a multiple of it"
        )
    return rows


def make_transformer_config(
    config: RunConfig,
    *,
    architecture: Architecture,
    topology: Topology,
    device: Device,
    dtype: torch.dtype,
    transformer_impl: str,
    fuse_gradients: bool = False,
    keep_weights_in_fp8: bool = False,
) -> TransformerConfig:
    """Translate the run's configuration into megatron-core's. `fuse_gradients` is for megatron-core's own layers
    (gradient_fusion.py)."""
    recompute = {"none": None, "selective": "selective", "full": "full"}[config.train.recompute]
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.add_qkv_bias,
        qk_layernorm=architecture.qk_layernorm,
        hidden_dropout=config.model.hidden_dropout,
        attention_dropout=config.model.attention_dropout,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Gradients are sums over pairs; finalize_model_grads divides them once by the global number of pairs.
        calculate_per_token_loss=True,
        # model/initialization.py fills the weights; megatron-core only marks which of them are tensor-parallel, on the
        # way.
        init_method=_leave_as_it_is,
        output_layer_init_method=_leave_as_it_is,
        embedding_init_method=_leave_as_it_is,
        use_cpu_initialization=device.kind == "cpu",
        init_method_std=architecture.init_method_std,
        gradient_accumulation_fusion=fuse_gradients,
        apply_rope_fusion=transformer_impl == "transformer_engine",
        bias_activation_fusion=device.kind == "cuda",
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=config.train.recompute_num_layers if recompute == "full" else None,
        deterministic_mode=config.run.deterministic and device.kind == "cuda",
        fp8_param=keep_weights_in_fp8,
        **_parallel_settings(topology, dtype=dtype, sequence_parallel=config.parallel.sequence_parallel),
        **_fp8_settings(config.train),
    )


def _parallel_settings(topology: Topology, *, dtype: torch.dtype, sequence_parallel: bool) -> dict:
    is_interleaved = topology.vpp_size is not None
    return {
        "tensor_model_parallel_size": topology.tp_size,
        "pipeline_model_parallel_size": topology.pp_size,
        "virtual_pipeline_model_parallel_size": topology.vpp_size,
        "context_parallel_size": topology.cp_size,
        "sequence_parallel": sequence_parallel,
        "pipeline_dtype": dtype if topology.pp_size > 1 else None,
        # Rows differ in length from micro-batch to micro-batch, so pipeline stages tell each other the shape first;
        # megatron-core then insists on this dispatcher even without experts.
        "variable_seq_lengths": topology.pp_size > 1,
        "moe_token_dispatcher_type": "alltoall",
        # Interleaving with batched p2p between two ranks gives silently wrong activations in megatron-core 0.16.1.
        "overlap_p2p_comm": is_interleaved,
        "batch_p2p_comm": not is_interleaved,
    }


def _fp8_settings(train: TrainSection) -> dict:
    """As Megatron's own recipes for Hopper: E4M3 throughout for blocks, wider gradients (E5M2) for whole tensors."""
    if train.fp8 == "off":
        return {}
    settings = {"fp8": "e4m3" if train.fp8 == "blockwise" else "hybrid", "fp8_recipe": train.fp8}
    if train.fp8 == "delayed":
        return settings | {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return settings | {
        "first_last_layers_bf16": train.fp8_bf16_layers > 0,
        "num_layers_at_start_in_bf16": train.fp8_bf16_layers,
        "num_layers_at_end_in_bf16": train.fp8_bf16_layers,
    }


def _leave_as_it_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _wrap(
    model: RewardModel, *, config: RunConfig, transformer_config: TransformerConfig, for_training: bool
) -> MegatronModule:
    wrapped = model
    if transformer_config.bf16:
        wrapped = Float16Module(transformer_config, model)
        if model.post_process:
            model.output_layer.to(head_dtype(transformer_config.params_dtype))
    if not for_training:
        return wrapped
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=transformer_config.bf16,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        overlap_param_gather=config.optimizer.overlap_param_gather,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        fp8_param_gather=transformer_config.fp8_param,
    )
    return DistributedDataParallel(transformer_config, ddp_config, wrapped)
