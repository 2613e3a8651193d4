"""Checks across sections: what does not fit together is refused before a GPU hour is spent."""

import dataclasses
import math
from typing import Any

from megatron_polar.config.presets import Architecture, architecture_of
from megatron_polar.config.schema import DataSection, ParallelSection, RunConfig
from megatron_polar.errors import UserError


def validate(config: RunConfig, *, for_training: bool = True) -> None:
    """Raise UserError for values that are out of range or do not fit each other.

    Not `for_training`: data may be missing, as in a checkpoint that was converted from another format.
    """
    _check_finite(config)
    architecture = architecture_of(config.model)
    _check_ranges(config)
    check_layout(config.parallel, architecture)
    check_recompute(config)
    _check_training(config)
    if for_training and not config.data.train:
        raise UserError("data.train is empty; name at least one dataset made by `megatron-polar preprocess`")
    if for_training:
        _check_positions(config)
    for name in ("train", "validation"):
        weights = [source.weight for source in getattr(config.data, name)]
        if any(w is None for w in weights) and any(w is not None for w in weights):
            raise UserError(f"data.{name}: some sources have a weight and some do not; give all a weight, or none")
        if any(w is not None and w <= 0 for w in weights):
            raise UserError(f"data.{name}: weights {weights} must be above 0; remove a source that shall not be used")


def _check_positions(config: RunConfig) -> None:
    longest, positions = config.data.max_sequence_length, config.model.max_position_embeddings
    if positions is not None and longest > positions:
        raise UserError(
            f"data.max_sequence_length={longest} is more than model.max_position_embeddings={positions}, which is what "
            f"the model was made for; lower the first, or raise the second where it is to learn longer texts"
        )


def check_layout(parallel: ParallelSection, architecture: Architecture) -> None:
    """Raise UserError where the parallel sizes do not divide the model, or make mcore silently wrong."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, vpp = parallel.context_parallel_size, parallel.virtual_pipeline_model_parallel_size
    for name in ("num_query_groups", "num_attention_heads", "ffn_hidden_size"):
        size = getattr(architecture, name)
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size={tp} does not divide model.{name}={size}; use {_divisors(size)}"
            )
    if architecture.num_attention_heads % architecture.num_query_groups:
        raise UserError(
            f"model.num_query_groups={architecture.num_query_groups} does not divide "
            f"model.num_attention_heads={architecture.num_attention_heads}"
        )
    groups = architecture.num_query_groups // tp
    if groups % cp:
        raise UserError(
            f"parallel.context_parallel_size={cp} does not divide the {groups} key/value heads of each tensor-parallel "
            f"rank (model.num_query_groups={architecture.num_query_groups} / tensor_model_parallel_size={tp}), and "
            f"context parallelism here splits heads; use {_divisors(groups)}"
        )
    chunks = pp * (vpp or 1)
    if vpp is not None and (pp == 1 or vpp < 2):
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={vpp} needs pipeline_model_parallel_size > 1 and at least "
            f"2 chunks; set it to null for plain 1F1B"
        )
    if architecture.num_layers % chunks:
        raise UserError(
            f"model.num_layers={architecture.num_layers} cannot be split into {chunks} pipeline chunks "
            f"(pipeline_model_parallel_size={pp} x virtual_pipeline_model_parallel_size={vpp or 1}); "
            f"use a product out of {_divisors(architecture.num_layers)}"
        )
    if parallel.sequence_parallel and tp == 1:
        raise UserError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1; set it to false"
        )


def _check_finite(value: Any, key: str = "") -> None:
    """Refuse .inf and .nan in every section; what follows compares numbers, and nan passes half of all comparisons."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _check_finite(getattr(value, field.name), f"{key}.{field.name}" if key else field.name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_finite(item, f"{key}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} is no finite number; give one, or leave the key out for its default")


def _check_ranges(config: RunConfig) -> None:
    _check_counts(config)
    _check_not_negative(config)
    fractions = {
        "model.hidden_dropout": config.model.hidden_dropout,
        "model.attention_dropout": config.model.attention_dropout,
        "optimizer.warmup_fraction": config.optimizer.warmup_fraction,
        "optimizer.min_lr_fraction": config.optimizer.min_lr_fraction,
    }
    for key, value in fractions.items():
        if not 0 <= value <= 1:
            raise UserError(f"{key}={value} must lie between 0 and 1")
    for key in ("adam_beta1", "adam_beta2"):
        value = getattr(config.optimizer, key)
        if not 0 <= value < 1:
            raise UserError(f"optimizer.{key}={value} must be at least 0 and below 1")
    above_0 = {"optimizer.lr": config.optimizer.lr, "logging.hardware_peak_tflops": config.logging.hardware_peak_tflops}
    for key, value in above_0.items():
        if value is not None and value <= 0:
            raise UserError(f"{key}={value} must be above 0")
    _check_curriculum(config.data)
    if config.data.max_sequence_length < 16:
        raise UserError(
            f"data.max_sequence_length={config.data.max_sequence_length} leaves no room for text; use 16 or more"
        )


def _check_curriculum(data: DataSection) -> None:
    section = data.curriculum
    for key, least in (("interval", 2), ("half_life", 1)):
        if getattr(section, key) < least:
            raise UserError(f"data.curriculum.{key}={getattr(section, key)} must be at least {least}")
    if not 0 <= section.floor <= 1:
        raise UserError(f"data.curriculum.floor={section.floor} must lie between 0 and 1: it is a share of the draws")
    if section.temperature < 0.05:
        raise UserError(f"data.curriculum.temperature={section.temperature} must be at least 0.05")
    if section.prior_comparisons <= 0:
        raise UserError(
            f"data.curriculum.prior_comparisons={section.prior_comparisons} must be above 0: a pair that was never "
            f"seen would have no error rate"
        )
    if data.contrast == "by_difficulty" and not section.record:
        raise UserError(
            "data.contrast=by_difficulty draws by what is counted, and data.curriculum.record=false counts nothing; "
            "set it to true"
        )


def _check_counts(config: RunConfig) -> None:
    at_least_one = {
        "train.global_batch_size": config.train.global_batch_size,
        "train.recompute_num_layers": config.train.recompute_num_layers,
        "data.max_tokens_per_micro_batch": config.data.max_tokens_per_micro_batch,
        "data.pad_to_multiple": config.data.pad_to_multiple,
        "data.prefetch_factor": config.data.prefetch_factor,
        "checkpoint.save_interval": config.checkpoint.save_interval,
        "evaluation.num_comparisons": config.evaluation.num_comparisons,
        "logging.interval": config.logging.interval,
        "parallel.tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "parallel.pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "parallel.context_parallel_size": config.parallel.context_parallel_size,
        "parallel.distributed_timeout_minutes": config.parallel.distributed_timeout_minutes,
        "model.make_vocab_size_divisible_by": config.model.make_vocab_size_divisible_by,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    if config.data.candidates_per_comparison < 2:
        raise UserError(
            f"data.candidates_per_comparison={config.data.candidates_per_comparison} must be at least 2: "
            f"a comparison ranks one candidate above another"
        )
    if config.faults.spike_window < 2:
        raise UserError(f"faults.spike_window={config.faults.spike_window} must be at least 2: one step has no spread")


def _check_not_negative(config: RunConfig) -> None:
    not_negative = {
        "run.seed": config.run.seed,
        "optimizer.adam_eps": config.optimizer.adam_eps,
        "data.num_workers": config.data.num_workers,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "checkpoint.max_failed_saves": config.checkpoint.max_failed_saves,
        "faults.max_consecutive_bad_steps": config.faults.max_consecutive_bad_steps,
        "faults.spike_sigmas": config.faults.spike_sigmas,
        "faults.replica_check_interval": config.faults.replica_check_interval,
        "faults.stall_timeout_seconds": config.faults.stall_timeout_seconds,
        "faults.straggler_ratio": config.faults.straggler_ratio,
        "evaluation.interval": config.evaluation.interval,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.clip_grad": config.optimizer.clip_grad,
        "model.reward_head_init_std": config.model.reward_head_init_std,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise UserError(f"{key}={value} must not be negative")


def check_recompute(config: RunConfig) -> None:
    """Raise UserError where blocks of recomputed layers do not fill a chunk: megatron-core's uniform recomputation runs
    past the last layer then."""
    parallel, block = config.parallel, config.train.recompute_num_layers
    chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    layers = architecture_of(config.model).num_layers // chunks
    if config.train.recompute == "full" and layers % block:
        raise UserError(
            f"train.recompute_num_layers={block} does not divide the {layers} layers of a pipeline chunk, and "
            f"megatron-core would look for layers that are not there; use {_divisors(layers)}"
        )


def _check_training(config: RunConfig) -> None:
    if (config.train.num_steps is None) == (config.train.num_epochs is None):
        raise UserError(
            f"train.num_steps={config.train.num_steps} and train.num_epochs={config.train.num_epochs}: "
            f"give exactly one of the two"
        )
    for key in ("num_steps", "num_epochs"):
        value = getattr(config.train, key)
        if value is not None and value <= 0:
            raise UserError(f"train.{key}={value} must be above 0")
    if config.optimizer.overlap_param_gather and not config.optimizer.overlap_grad_reduce:
        raise UserError("optimizer.overlap_param_gather=true needs optimizer.overlap_grad_reduce=true")
    if config.optimizer.overlap_param_gather and not config.optimizer.use_distributed_optimizer:
        raise UserError("optimizer.overlap_param_gather=true needs optimizer.use_distributed_optimizer=true")
    if config.train.precision == "bf16" and not config.optimizer.use_distributed_optimizer:
        raise UserError(
            "optimizer.use_distributed_optimizer=false with train.precision=bf16 cannot be saved: Megatron-Core's "
            "other optimizer knows no fp32 weights (the reward head) beside bf16 ones; set it to true"
        )
    _check_fp8(config)
    _check_canonical_reduction(config)
    if config.model.attention_dropout > 0 and config.model.attention == "dense":
        raise UserError(
            f"model.attention_dropout={config.model.attention_dropout} is not possible with model.attention=dense, "
            f"which drops nothing; set it to 0, or use model.attention=auto"
        )
    if config.model.attention_dropout > 0 and config.data.layout != "padded":
        raise UserError(
            f"model.attention_dropout={config.model.attention_dropout} is not possible with data.layout="
            f"{config.data.layout}: a shared prefix must see the same attention for all its candidates; "
            f"set it to 0, or use data.layout=padded"
        )


def _check_fp8(config: RunConfig) -> None:
    train = config.train
    _check_fp8_weights(config)
    if train.fp8 == "off":
        return
    if train.precision != "bf16":
        raise UserError(f"train.fp8={train.fp8} needs train.precision=bf16, not {train.precision}")
    most = architecture_of(config.model).num_layers // 2 // config.parallel.pipeline_model_parallel_size
    if train.fp8 == "delayed" and train.fp8_bf16_layers:
        rows = " and data.pad_to_multiple=128" if config.model.last_layer == "reward_rows" else ""
        raise UserError(
            f"train.fp8_bf16_layers={train.fp8_bf16_layers} is not possible with train.fp8=delayed, which keeps no "
            f"layer in bf16; set train.fp8_bf16_layers=0{rows}"
        )
    if not 0 <= train.fp8_bf16_layers <= most:
        raise UserError(
            f"train.fp8_bf16_layers={train.fp8_bf16_layers} must lie between 0 and {most} with train.fp8={train.fp8} "
            f"and these layers of a pipeline stage"
        )
    multiple, why = (128 if train.fp8 == "blockwise" else 16), f"FP8 kernels of train.fp8={train.fp8}"
    if config.model.last_layer == "reward_rows" and train.fp8_bf16_layers == 0:
        multiple, why = 128, "the reward rows of a last layer in FP8 (train.fp8_bf16_layers=0)"
    if config.data.pad_to_multiple % multiple:
        raise UserError(
            f"data.pad_to_multiple={config.data.pad_to_multiple}: {why} need rows of a multiple of {multiple} tokens; "
            f"set it to {multiple}"
        )
    _check_fp8_widths(config)


def _check_fp8_widths(config: RunConfig) -> None:
    """Transformer Engine 2.11 multiplies widths of whole 16 in FP8, and gathers blocks of 128 between TP ranks."""
    architecture, tp = architecture_of(config.model), config.parallel.tensor_model_parallel_size
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    gathered = 128 if config.train.fp8 == "blockwise" and config.parallel.sequence_parallel else 16
    widths = (
        ("model.hidden_size", architecture.hidden_size, 1, gathered),
        ("model.ffn_hidden_size", architecture.ffn_hidden_size, tp, 16),
        ("model.num_attention_heads x model.kv_channels", heads * architecture.kv_channels, tp, 16),
        ("query, key and value heads x model.kv_channels", (heads + 2 * groups) * architecture.kv_channels, tp, 16),
    )
    for key, width, ranks, multiple in widths:
        if width // ranks % multiple:
            over = f" over parallel.tensor_model_parallel_size={ranks} is {width // ranks}, which" if ranks > 1 else ""
            raise UserError(
                f"{key}={width}{over} is no multiple of {multiple}, as train.fp8={config.train.fp8} needs; "
                f"use another width{' or tensor-parallel size' if ranks > 1 else ''}, or train.fp8=off"
            )


def _check_fp8_weights(config: RunConfig) -> None:
    """What `train.fp8_param_gather` needs of Megatron-Core 0.16.1, of Transformer Engine 2.11 and of us."""
    train = config.train
    if not train.fp8_param_gather:
        return
    if train.fp8 not in ("tensorwise", "blockwise"):
        history = ": no checkpoint has the history that its scales come from, so a resume would round weights wrongly"
        why = history if train.fp8 == "delayed" else ""
        raise UserError(
            f"train.fp8_param_gather=true is not possible with train.fp8={train.fp8}{why}; use train.fp8=tensorwise or "
            f"blockwise, or set it to false"
        )
    if not config.optimizer.use_distributed_optimizer:
        raise UserError(
            "train.fp8_param_gather=true needs optimizer.use_distributed_optimizer=true: Megatron-Core's other "
            "optimizers do not know weights in FP8"
        )
    if config.model.last_layer == "reward_rows" and train.fp8_bf16_layers < 1:
        raise UserError(
            "train.fp8_param_gather=true with model.last_layer=reward_rows needs train.fp8_bf16_layers of at least 1: "
            "that layer takes its QKV weight apart, which a weight in FP8 does not allow; or use "
            "model.last_layer=all_rows"
        )


def _check_canonical_reduction(config: RunConfig) -> None:
    if not config.train.canonical_reduction:
        return
    needed = {
        "train.precision": (config.train.precision, "fp32"),
        "optimizer.use_distributed_optimizer": (config.optimizer.use_distributed_optimizer, False),
        "optimizer.overlap_grad_reduce": (config.optimizer.overlap_grad_reduce, False),
        "model.hidden_dropout": (config.model.hidden_dropout, 0.0),
        "model.attention_dropout": (config.model.attention_dropout, 0.0),
        "parallel.virtual_pipeline_model_parallel_size": (
            config.parallel.virtual_pipeline_model_parallel_size,
            None,
        ),
    }
    for key, (value, wanted) in needed.items():
        if value != wanted:
            raise UserError(
                f"train.canonical_reduction=true needs {key}={wanted}, not {value}: with it the result would depend on "
                f"the number of data-parallel ranks"
            )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0 and d <= 64)
