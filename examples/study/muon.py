"""Muon (Jordan and others 2024; torch.optim.Muon) that multiplies in fp32.

torch's own multiplies in bf16, which CPUs without instructions for it do ten times slower than fp32: a step of a small
model is then four fifths Muon. The update is the same but for rounding; tests/test_study.py compares them.
"""

from collections.abc import Iterable

import torch

_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's look-ahead, made orthogonal, for matrices alone; decoupled weight decay."""

    def __init__(self, weights: Iterable[torch.Tensor], *, lr: float, momentum: float, weight_decay: float):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient; those of one shape are multiplied together."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                ahead = []
                for weight in weights:
                    mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                    ahead.append(weight.grad.lerp(mean.lerp_(weight.grad, 1 - momentum), momentum))
                updates = orthogonal(torch.stack(ahead)).unbind()
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - lr * group["weight_decay"])
                    weight.add_(update, alpha=-lr * max(1.0, shape[0] / shape[1]) ** 0.5)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly the nearest orthogonal matrices of `matrices` [n, rows, columns], by five steps of Newton and Schulz."""
    wide = matrices.mT if matrices.size(-2) > matrices.size(-1) else matrices
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), wide, beta=_A)
    return wide.mT if matrices.size(-2) > matrices.size(-1) else wide
