"""Weights that are kept in FP8 (`train.fp8_param_gather`): Transformer Engine's tensors behind plain questions.

Such a weight looks like a bf16 tensor, and most operations on it take a dequantised copy. What writes through a view
would therefore be lost without a word (blockwise scaling) or be scaled wrongly; everything of ours that reads or writes
weights asks here first.
"""

from collections.abc import Iterable

import torch
from megatron.core import fp8_utils


def is_fp8_weight(weight: torch.Tensor) -> bool:
    """Whether a weight is kept in FP8 (always False without Transformer Engine)."""
    return fp8_utils.is_float8tensor(weight)


def plain(weight: torch.Tensor) -> torch.Tensor:
    """The weight as an ordinary tensor; for one in FP8 a dequantised copy."""
    return fp8_utils.dequantize_fp8_tensor(weight) if is_fp8_weight(weight) else weight


@torch.no_grad()
def assign(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Give a weight in FP8 a value, also the one from which the optimizer makes its fp32 weight.

    Transformer Engine keeps what it initialised the weight with on the CPU until the optimizer has been made.
    """
    weight.copy_(value)
    if hasattr(weight, "get_high_precision_init_val"):
        weight._high_precision_init_val = value.detach().cpu()


def finish_gather(weights: Iterable[torch.Tensor]) -> None:
    """Renew what backward passes read of weights in FP8 (the transpose) after an all-gather that was waited for.

    megatron-core does so after a gather of its own schedule only; doing it twice changes nothing.
    """
    found = [weight for weight in weights if is_fp8_weight(weight)]
    if found:
        fp8_utils.post_all_gather_processing(found)
