"""torch's first call of a function on several threads: what `mkl.find_kernels` is for."""

import subprocess
import sys

from ranks import run_ranks
from torch.overrides import TorchFunctionMode

STORM = """
import os
import torch
from megatron_polar.mkl import find_kernels

ARGUMENTS = {"cos": 150.0, "sin": 150.0, "exp": 3.0, "tanh": 3.0, "erf": 3.0}
numbers = {name: torch.linspace(-most, most, 19456) for name, most in ARGUMENTS.items()}


def first_calls_are_exact():
    find_kernels()
    torch.set_num_threads(2)
    return all(torch.equal(getattr(torch, name)(x), getattr(torch, name)(x)) for name, x in numbers.items())


wrong = 0
for _ in range(60):  # eight at a time on fewer cores, so that threads wait in the midst of things
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            os._exit(not first_calls_are_exact())
        children.append(child)
    wrong += sum(os.waitpid(child, 0)[1] != 0 for child in children)
print(wrong)
"""


def test_first_calls_on_several_threads_are_exact():
    """Without `find_kernels` one to five of these 480 processes are wrong."""
    done = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


class SingleCalls(TorchFunctionMode):
    """Names of the functions that were called on one number."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if args and getattr(args[0], "shape", None) == (1,):
            self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))


def calls_of_select_device() -> set[str]:
    from megatron_polar.parallel.device import select_device

    with SingleCalls() as calls:
        select_device("cpu", local_rank=0)
    return calls.names


def test_every_program_on_a_cpu_finds_the_kernels_first():
    (names,) = run_ranks(calls_of_select_device, 1)
    assert {"cos", "sin", "exp", "log", "sqrt", "tanh", "erf"} <= names
