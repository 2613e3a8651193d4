"""What a GPU machine has of what the benchmarks need: versions, and one FP8 matrix product through Transformer Engine.

Exits with 1, and says what to bring, where something is missing.
"""

import importlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from machine import cpu_name

NEEDED = ("numpy", "orjson", "psutil", "xxhash", "zstandard", "scipy", "matplotlib", "pytest", "megatron.core")
OPTIONAL = ("omegaconf", "sentencepiece", "nvidia.dali", "trl", "datasets")
NAMES = {"megatron.core": "megatron-core", "nvidia.dali": "nvidia-dali-cuda130"}


def main() -> int:
    """Print what is there; the exit status says whether it is enough."""
    problems = []
    print(f"Python {platform.python_version()}, {cpu_name()}")
    try:
        describe_gpu()
    except Exception as error:  # whatever is wrong, the rest of the list is wanted, too
        problems.append(f"torch with a GPU ({type(error).__name__}: {error})")
    missing = [name for name in NEEDED if not is_there(name)]
    for name in OPTIONAL:
        is_there(name)
    if missing:
        problems.append(f"packages: {', '.join(NAMES.get(name, name) for name in missing)} (bring wheels: --wheels)")
    if not problems:
        try:
            multiply_in_fp8()
        except Exception as error:
            problems.append(f"FP8 through Transformer Engine ({type(error).__name__}: {error})")
    for problem in problems:
        print(f"error: missing here: {' '.join(problem.split())}", file=sys.stderr)
    return 1 if problems else 0


def describe_gpu() -> None:
    """One line each for torch and for the GPU."""
    import torch  # before Transformer Engine, which takes CUDA's libraries from it

    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    found = torch.cuda.get_device_properties(0)
    print(f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}")


def is_there(name: str) -> bool:
    """Whether a module can be imported; prints its version."""
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{NAMES.get(name, name)}: not there ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        return False
    try:
        print(f"{NAMES.get(name, name)} {version(NAMES.get(name, name))}")
    except PackageNotFoundError:
        print(f"{NAMES.get(name, name)}: of unknown version")
    return True


def multiply_in_fp8() -> None:
    """Forward and backward of one linear layer."""
    import torch
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    layer = te.Linear(1024, 1024, params_dtype=torch.bfloat16, bias=False).cuda()
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    exact = x.detach().double() @ layer.weight.detach().double().t()
    with te.fp8_autocast(enabled=True):
        y = layer(x)
    y.sum().backward()
    error = float((y.double() - exact).norm() / exact.norm())
    print(f"transformer-engine {version('transformer-engine')}: FP8 product is off by {error:.1%}")
    if not error < 0.1 or not torch.isfinite(x.grad).all():
        raise ArithmeticError(f"an FP8 product is off by {error:.1%}")


if __name__ == "__main__":
    sys.exit(main())
