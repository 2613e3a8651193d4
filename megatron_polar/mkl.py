"""Exactness on a CPU: torch's element-wise functions come from oneMKL, whose first call of each has a race.

oneMKL looks for a function's kernel when it is first called. Where several threads do that at once, one of them may
compute its part of that one tensor with the kernel of low accuracy (pytorch/pytorch#188792; torch 2.10 to 2.13, oneMKL
2024.2). On two cores, half of a process's first `cos` was wrong in the fourth digit in 1 of 250 processes.
"""

import torch

_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "sin", "tan", "tanh"),
    *("erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "sqrt"),
)


def find_kernels() -> None:
    """Call each of the functions once, on one number and so on one thread: afterwards they are exact on all. Costs
    nothing to speak of, and does nothing where torch was built without oneMKL."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for name in _FUNCTIONS:
            getattr(torch, name)(number)
