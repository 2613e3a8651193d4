"""megatron-core's AdamW (with its distributed optimizer) and learning-rate schedule, from the `optimizer` section."""

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_polar.config.schema import OptimizerSection
from megatron_polar.model.build import BuiltModel
from megatron_polar.train.gradients import GradientReduction


def build_optimizer(section: OptimizerSection, *, model: BuiltModel, reduction: GradientReduction) -> MegatronOptimizer:
    """Build AdamW over the chunks and connect both to megatron-core's schedules.

    Weight decay spares norms, biases and the reward head. The head is a group of its own: in bf16 it alone is fp32, and
    where a group mixes precisions megatron-core 0.16.1's distributed optimizer saves state under other weights' names.
    """
    transformer_config = model.transformer_config
    norms = ParamWithNamePredicate(
        name="norms_and_biases", fn=lambda parameter, name: parameter.dim() == 1 or name.endswith("bias")
    )
    head = ParamWithNamePredicate(name="reward_head", fn=lambda parameter, name: name.endswith("output_layer.weight"))
    overrides = {
        ParamKey(with_name_predicate=norms): {"wd_mult": 0.0},
        # The flag means nothing by itself (the rate is the same), but groups are told apart by it when they are loaded.
        ParamKey(with_name_predicate=head): {"wd_mult": 0.0, "is_decoupled_lr": True},
    }
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            min_lr=section.lr * section.min_lr_fraction,
            weight_decay=section.weight_decay,
            adam_beta1=section.adam_beta1,
            adam_beta2=section.adam_beta2,
            adam_eps=section.adam_eps,
            clip_grad=section.clip_grad,
            bf16=transformer_config.bf16,
            params_dtype=transformer_config.params_dtype,
            use_distributed_optimizer=section.use_distributed_optimizer,
            overlap_param_gather=section.overlap_param_gather,
            fp8_recipe=transformer_config.fp8_recipe if transformer_config.fp8 else None,
        ),
        model.chunks,
        config_overrides=overrides,
        use_gloo_process_groups=False,
    )
    _check_precisions(optimizer)
    _connect(model, optimizer=optimizer, reduction=reduction, section=section)
    return optimizer


def _check_precisions(optimizer: MegatronOptimizer) -> None:
    for one in optimizer.chained_optimizers:
        groups = zip(getattr(one, "model_fp32_groups", ()), getattr(one, "model_float16_groups", ()), strict=True)
        if any(wide and narrow for wide, narrow in groups):
            raise AssertionError("a parameter group mixes precisions: its state would be saved under wrong names")


def _connect(
    model: BuiltModel, *, optimizer: MegatronOptimizer, reduction: GradientReduction, section: OptimizerSection
) -> None:
    """Tell the schedules how to scale, synchronise and finalise gradients."""
    transformer_config, chunks = model.transformer_config, model.chunks
    transformer_config.grad_scale_func = optimizer.scale_loss
    transformer_config.finalize_model_grads_func = reduction
    single = len(chunks) == 1
    if section.overlap_grad_reduce:
        no_sync, start = [c.no_sync for c in chunks], [c.start_grad_sync for c in chunks]
        transformer_config.no_sync_func = no_sync[0] if single else no_sync
        transformer_config.grad_sync_func = start[0] if single else start
    if section.overlap_param_gather:
        gather = [c.start_param_sync for c in chunks]
        transformer_config.param_sync_func = gather[0] if single else gather


def build_schedule(
    section: OptimizerSection, *, optimizer: MegatronOptimizer, num_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then `lr_decay_style` down to `min_lr_fraction`; counted in optimizer steps."""
    warmup_steps = min(round(section.warmup_fraction * num_steps), num_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.lr * section.min_lr_fraction,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )


def current_learning_rate(optimizer: MegatronOptimizer) -> float:
    """Learning rate that the next optimizer step will use."""
    return float(optimizer.param_groups[0]["lr"])
