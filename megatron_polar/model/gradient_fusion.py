"""Weight gradients added to the fp32 buffer inside the GEMM that computes them, instead of by a kernel of its own.

Two libraries have such a GEMM. Transformer Engine's layers do it by themselves (`fuse_wgrad_accumulation`).
megatron-core's own linear layers do it with Apex's `fused_weight_gradient_mlp_cuda`, and refuse to be made without it:
GPTModel's output layer, which the reward head replaces, is one of these in every model. So with Transformer Engine and
no Apex the flag of TransformerConfig stays off, and Transformer Engine's layers are told afterwards.
"""

from dataclasses import dataclass
from typing import Literal

from megatron.core.tensor_parallel import layers
from torch import nn

from megatron_polar.errors import UserError


@dataclass(frozen=True)
class GradientFusion:
    """Which layers add up weight gradients inside their GEMMs, and why, for the log."""

    megatron: bool
    transformer_engine: bool
    reason: str

    def __str__(self) -> str:
        return f"{'fused' if self.megatron or self.transformer_engine else 'not fused'} ({self.reason})"


def has_apex_kernel() -> bool:
    """Whether Apex's kernel could be imported, as megatron-core's own layers see it."""
    return layers._grad_accum_fusion_available


def resolve_gradient_fusion(
    requested: Literal["auto", True, False], *, for_training: bool, device_kind: str, transformer_impl: str
) -> GradientFusion:
    """Resolve `train.gradient_accumulation_fusion`. Raises UserError where it is asked for and nothing has it.

    Not `for_training`: off, because only data-parallel wrapping makes the buffer that is added to.
    """
    if not for_training:
        return GradientFusion(False, False, "no training")
    if requested is False:
        return GradientFusion(False, False, "train.gradient_accumulation_fusion=false")
    is_gpu, has_engine = device_kind == "cuda", transformer_impl == "transformer_engine"
    if is_gpu and has_apex_kernel():
        return GradientFusion(True, has_engine, "Apex's kernel")
    if is_gpu and has_engine:
        return GradientFusion(False, True, "by Transformer Engine's layers; no Apex")
    missing = "neither Transformer Engine's layers nor Apex's kernel" if is_gpu else "no GPU"
    if requested is True:
        raise UserError(
            f"train.gradient_accumulation_fusion=true, and there is {missing} here: it needs a GPU with Transformer "
            f"Engine's layers (requirements-gpu.txt) or Apex's fused_weight_gradient_mlp_cuda; set it to auto or false"
        )
    return GradientFusion(False, False, missing)


def fuse_transformer_engine_layers(model: nn.Module) -> None:
    """Turn fusion on in Transformer Engine's linear layers, which TransformerConfig has told that it is off."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
