"""Where tensors live and how ranks talk: cuda/nccl or cpu/gloo, in one object.

The only file that touches megatron-core's hard-coded "cuda": on a machine without a GPU `substitute_cuda` makes
megatron-core 0.16.1 run on the CPU unchanged. What is substituted, and why each piece is needed, stands beside it.
"""

import contextlib
import os
import time
import warnings
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.tensor_parallel import random as mcore_random
from torch.overrides import TorchFunctionMode

from megatron_polar import log, mkl
from megatron_polar.errors import UserError

_CPU = torch.device("cpu")
_DEFAULT = "default-rng"
"""megatron-core's name for the generator outside of every fork."""


@dataclass(frozen=True)
class Device:
    """One rank's device: `kind` is "cuda" or "cpu", `torch_device` where its tensors live, `backend` how ranks talk."""

    kind: Literal["cuda", "cpu"]
    torch_device: torch.device
    backend: Literal["nccl", "gloo"]
    name: str

    def synchronize(self) -> None:
        """Wait until everything queued on the device is done."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def timestamp(self) -> "float | torch.cuda.Event":
        """A moment in this device's work; compare two with `seconds_between`."""
        if self.kind == "cpu":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, first: "float | torch.cuda.Event", second: "float | torch.cuda.Event") -> float:
        """Seconds from one `timestamp` to a later one, both of which the device has passed."""
        return second - first if self.kind == "cpu" else first.elapsed_time(second) / 1000

    def total_memory(self) -> int:
        """Bytes of memory that the device has, for all its ranks together."""
        if self.kind == "cpu":
            return psutil.virtual_memory().total
        return torch.cuda.get_device_properties(self.torch_device).total_memory

    def memory_allocated(self) -> int:
        """Peak bytes allocated on the device since the last call (0 on the CPU)."""
        if self.kind == "cpu":
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


def make_deterministic(device: Device) -> None:
    """Ask torch, cuBLAS and Transformer Engine for kernels that repeat bit for bit (the CPU's always do, see mkl.py);
    call before any of them has run."""
    if device.kind == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        # NCCL chooses by measured speed between orders of summation; Megatron-LM's deterministic mode fixes one, too.
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)


def select_device(kind: Literal["auto", "cuda", "cpu"], *, local_rank: int) -> Device:
    """Choose this rank's device and make megatron-core run on it. Raises UserError when CUDA is asked for and
    missing."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device=cuda, but torch sees no GPU here; set run.device=auto, or check the driver and the torch build"
        )
    if kind == "cuda" or (kind == "auto" and torch.cuda.is_available()):
        count = torch.cuda.device_count()
        if count == 1 and "SLURM_LOCALID" in os.environ:
            local_rank = 0  # srun --gpus-per-task=1 shows every task its own GPU only
        if local_rank >= count:
            raise UserError(
                f"local rank {local_rank} finds {count} GPU(s) on this node; start at most {count} ranks here "
                f"(torchrun --nproc-per-node), or hide the GPUs (CUDA_VISIBLE_DEVICES='') to run on the CPU"
            )
        torch.cuda.set_device(local_rank)
        if not HAVE_APEX_OR_TE:
            _mend_distributed_optimizer()
        return Device("cuda", torch.device("cuda", local_rank), "nccl", torch.cuda.get_device_name(local_rank))
    if torch.cuda.is_available():
        raise UserError(
            "run.device=cpu on a machine with GPUs: hide them (CUDA_VISIBLE_DEVICES='') or set run.device=auto"
        )
    are_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if kind == "auto" and os.path.exists("/dev/nvidia0") and not are_hidden and local_rank == 0:
        log.warn(f"torch {torch.__version__} sees no GPU, and this machine has some: running on the CPU")
    mkl.find_kernels()
    substitute_cuda()
    return Device("cpu", _CPU, "gloo", "cpu")


def check_cpu_can_train(device: Device) -> None:
    """Raise UserError for training on the CPU where megatron-core has taken Transformer Engine's or Apex's optimizer.

    It does so on import wherever there is one, and its kernels are for GPUs. Scoring needs none of it.
    """
    if device.kind == "cpu" and HAVE_APEX_OR_TE:
        raise UserError(
            "training would be on the CPU, and this environment has Transformer Engine (or Apex), whose optimizer runs "
            "on GPUs alone; let a GPU be seen, or use an environment of requirements.txt alone"
        )


class _CudaToCpu(TorchFunctionMode):
    """Sends every request for a CUDA tensor to the CPU; megatron-core writes device="cuda", .cuda() and
    pin_memory=True."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers sort parameters by the *name* "torch.cuda.FloatTensor".
            return function(*args).replace("torch.", "torch.cuda.", 1)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return function(*args, **kwargs)


class _CpuRngStates(mcore_random.CudaRNGStatesTracker):
    """megatron-core's tensor-parallel RNG tracker over the CPU generator."""

    def add(self, name: str, seed: int) -> None:
        if seed in self.seeds_ or name in self.states_:
            raise RuntimeError(f"RNG state {name!r} or seed {seed} exists already")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator("cpu").manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME):
        """As on a GPU, also where one fork lies within another of the same name: the outer one goes on behind it."""
        outer, outer_name = torch.get_rng_state(), self._current_state_name
        if outer_name != _DEFAULT:
            self.states_[outer_name] = outer
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer if outer_name == _DEFAULT else self.states_[outer_name])
            self._current_state_name = outer_name


_active_mode: _CudaToCpu | None = None
_optimizer_is_mended = False


def substitute_cuda() -> None:
    """Make megatron-core 0.16.1 run on the CPU; call before any process group exists. A second call does nothing."""
    global _active_mode  # the mode is a property of the process, as torch's default device is
    if _active_mode is not None:
        return
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda device=None: None
    mcore_random._CUDA_RNG_STATE_TRACKER = _CpuRngStates()
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    # Activation recomputation saves and restores the RNG state of "the device".
    mcore_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    # The default fp8=False is tested with `is not None`: recomputing a norm without FP8 would ask for Transformer
    # Engine.
    mcore_random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    if not HAVE_APEX_OR_TE:
        _mend_distributed_optimizer()
    # A warning about CUDA_DEVICE_MAX_CONNECTIONS, which matters on GPUs only.
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    _active_mode = _CudaToCpu()
    _active_mode.__enter__()


def _mend_distributed_optimizer() -> None:
    """Two places where DistributedOptimizer expects the fused Adam of Transformer Engine or Apex.

    Without these it gets torch's AdamW, with its `step` tensors. A second call does nothing.
    """
    global _optimizer_is_mended
    if _optimizer_is_mended:
        return
    _optimizer_is_mended = True
    load_state_dict = DistributedOptimizer.load_state_dict

    def load_state_dict_with_own_steps(self, state_dict):
        # megatron-core shares one `step` tensor between all parameters, and AdamW counts it up once for each of them.
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def set_main_param_and_optimizer_states(self, model_param, tensors):
        # `step` is restored with the parameter groups; there is no such entry among the tensors.
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        for name, destination in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if name != "step" and name in tensors:
                destination.copy_(tensors[name])

    DistributedOptimizer.load_state_dict = load_state_dict_with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
