"""Sums and counts → rates and means → console, TensorBoard and metrics.jsonl. The first rank writes, others only
compute.

Names follow Megatron-LM's log line and scalars, and `rm/...`, `tokens/...`, `data/...` for what a reward model adds.
"""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import orjson

from megatron_polar import log
from megatron_polar.config.presets import Architecture
from megatron_polar.data.steps import Step, StepWork
from megatron_polar.manifest import write_durably
from megatron_polar.train.journal import LineFile, productive_seconds, read_rows
from megatron_polar.train.objective import SUMS
from megatron_polar.train.step import StepResult

_ETA_WINDOW = 50

# Dense bf16 peak of one device in TFLOP/s (NVIDIA's data sheets, without sparsity), by the name that torch gives it.
_PEAK_TFLOPS = {
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
    "NVIDIA GH200 480GB": 989.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
}


def peak_tflops(device_name: str, override: float | None) -> float | None:
    """Peak of one device for MFU: the configured one, else by the device's name, else unknown."""
    return override if override is not None else _PEAK_TFLOPS.get(device_name)


def rates(sums: dict[str, float], *, prefix: str = "rm/") -> dict[str, float]:
    """Means over pairs from objective.SUMS."""
    pairs = sums["pairs"] or 1.0
    mean = {name: sums[name] / pairs for name in ("loss", "margin", "reward_chosen", "reward_rejected")}
    centre = (mean["reward_chosen"] + mean["reward_rejected"]) / 2
    mean["reward_std"] = (
        math.sqrt(max(sums["reward_squared"] / (2 * pairs) - centre**2, 0.0)) if math.isfinite(pairs) else math.nan
    )
    return {f"{prefix}accuracy": sums["correct"] / pairs} | {f"{prefix}{name}": value for name, value in mean.items()}


class _Noted(NamedTuple):
    """What a row needs of a step, whose micro-batches may be on the GPU and are not kept."""

    work: StepWork
    num_comparisons: int
    imbalance: float
    num_micro_batches: int
    prompt_tokens_cut: int

    @classmethod
    def of(cls, step: Step) -> "_Noted":
        return cls(step.work, step.num_comparisons, step.imbalance, len(step.micro_batches), step.prompt_tokens_cut)


class Metrics:
    """Collects steps, and writes one row per logging interval. Tokens and FLOPs are those of all data-parallel ranks,
    which every rank knows from the plan (data/steps.py). `may_write` is asked before every row."""

    def __init__(
        self,
        directory: Path,
        *,
        num_steps: int,
        world_size: int,
        architecture: Architecture,
        peak_tflops: float | None,
        tensorboard: bool,
        global_batch_size: int,
        resumed_at: int,
        started_at: float,
        may_write: Callable[[], bool] = lambda: True,
    ):
        self.num_steps, self.world_size = num_steps, world_size
        self.architecture, self.peak_tflops = architecture, peak_tflops
        self.global_batch_size = global_batch_size
        self._started_at, self._productive_seconds = started_at, 0.0
        self._times: deque[float] = deque(maxlen=_ETA_WINDOW)
        self._pending: list[tuple[_Noted, StepResult, float, float]] = []
        self._learning_rate = 0.0
        self._writer = None
        self._may_write = may_write
        self._file: LineFile | None = None
        self.last_row: dict[str, float] = {}
        if log.is_first_rank():
            path = directory / "metrics.jsonl"
            cut_rows_beyond(path, resumed_at)
            self._productive_seconds = productive_seconds(read_rows(directory))
            self._file = LineFile(path)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(directory / "tensorboard", purge_step=resumed_at + 1)

    def add(
        self, step: Step, result: StepResult, *, seconds: float, waited_seconds: float, learning_rate: float
    ) -> None:
        """Take note of one finished step; `waited_seconds` of its seconds went by before its data were there."""
        self._learning_rate = learning_rate
        self._times.append(seconds)
        self._pending.append((_Noted.of(step), result, seconds, waited_seconds))

    def write(
        self, iteration: int, *, memory_bytes: int, reliability: dict[str, float], pairs: dict[str, float]
    ) -> None:
        """Write one row over the steps since the last one, if there are any: console line, metrics.jsonl, TensorBoard.

        `reliability` holds counts over the whole run, `pairs` what is known of pairs of policies, by its full name.
        """
        if not self._pending:
            return
        row = self._summarise(iteration, memory_bytes=memory_bytes)
        row |= {f"reliability/{name}": value for name, value in reliability.items()}
        row |= pairs
        row["reliability/ettr"] = min(1.0, self._productive_seconds / max(time.time() - self._started_at, 1e-9))
        row["batch-size"] = self.global_batch_size
        row["consumed-samples"] = iteration * self.global_batch_size
        self._emit(row)
        log.info(self._line(row))

    def write_validation(self, iteration: int, sums: dict[str, float], *, seconds: float) -> None:
        """Write one row of held-out figures."""
        row = {"iteration": iteration} | rates(sums, prefix="validation/rm/") | {"validation/seconds": seconds}
        self._emit(row)
        log.info(
            f" validation at iteration {iteration} | rm loss: {row['validation/rm/loss']:.5f} | "
            f"rm accuracy: {row['validation/rm/accuracy']:.4f} | margin: {row['validation/rm/margin']:.4f} | "
            f"pairs: {int(sums['pairs'])} | {seconds:.1f} s"
        )

    def _summarise(self, iteration: int, *, memory_bytes: int) -> dict[str, float]:
        steps, results, seconds, waited_seconds = zip(*self._pending, strict=True)
        self._pending = []
        total_seconds = sum(seconds)
        self._productive_seconds += total_seconds
        taken = [result for result in results if result.skipped is None]  # a NaN would spoil the means of the others
        sums = {name: sum(result.sums[name] for result in taken) if taken else math.nan for name in SUMS}
        physical = sum(step.work.physical_tokens for step in steps)
        logical = sum(step.work.logical_tokens for step in steps)
        flops = 3 * self.architecture.forward_flops(
            tokens=physical,
            attended=sum(step.work.attended for step in steps),
            rewards=sum(step.work.rewards for step in steps),
            reward_keys=logical,
        )
        tflops = flops / total_seconds / self.world_size / 1e12
        row = {"iteration": iteration, "iteration-time": total_seconds / len(steps)} | rates(sums)
        row |= {
            "lm loss": row["rm/loss"],  # the name that Megatron-LM's dashboards look for
            "learning-rate": self._learning_rate,
            "grad-norm": results[-1].grad_norm,
            "throughput": tflops,
            "comparisons/s": sum(step.num_comparisons for step in steps) / total_seconds,
            "tokens/physical_per_s": physical / total_seconds,
            "tokens/logical_per_s": logical / total_seconds,
            "data/wait_share": sum(waited_seconds) / total_seconds,
            "data/flops_imbalance": statistics.fmean(step.imbalance for step in steps),
            "data/micro_batches": statistics.fmean(step.num_micro_batches for step in steps),
            "data/prompt_tokens_cut": statistics.fmean(step.prompt_tokens_cut for step in steps),
        }
        if self.peak_tflops is not None:
            row["mfu"] = tflops / self.peak_tflops
        if memory_bytes:
            row["memory/max_allocated_gib"] = memory_bytes / 2**30
        return row

    def _emit(self, row: dict[str, float]) -> None:
        self.last_row = self.last_row | row
        if self._file is None or not self._may_write():
            return
        self._file.append(row)
        if self._writer is not None:
            try:
                for name, value in row.items():
                    if name != "iteration":
                        self._writer.add_scalar(name, value, row["iteration"])
            except OSError as error:  # metrics.jsonl keeps everything
                log.warn(f"TensorBoard: no more events until a restart ({error.strerror or error})")
                self._writer = None

    def _line(self, row: dict[str, float]) -> str:
        eta = statistics.median(self._times) * (self.num_steps - row["iteration"])
        mfu = f" | MFU: {row['mfu']:.1%}" if "mfu" in row else ""
        return (
            f" iteration {row['iteration']:8d}/{self.num_steps:8d} | consumed samples: {row['consumed-samples']:12d} | "
            f"elapsed time per iteration (ms): {row['iteration-time'] * 1000:.1f} | "
            f"throughput per GPU (TFLOP/s/GPU): {row['throughput']:.3f}{mfu} | "
            f"learning rate: {row['learning-rate']:.6E} | "
            f"global batch size: {row['batch-size']:5d} | rm loss: {row['rm/loss']:.6E} | "
            f"rm accuracy: {row['rm/accuracy']:.4f} | grad norm: {row['grad-norm']:.3f} | "
            f"comparisons/s: {row['comparisons/s']:.1f} | waiting for data: {row['data/wait_share']:.1%} | "
            f"number of skipped iterations: {row['reliability/skipped_steps']:3d} | "
            f"number of nan iterations: {row['reliability/nan_steps']:3d} | ETA: {log.format_seconds(eta)}"
        )

    def close(self) -> None:
        """Flush and close TensorBoard's files."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None


def cut_rows_beyond(path: Path, iteration: int) -> None:
    """Drop the rows that a killed run wrote after its last checkpoint, so that curves do not double."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if orjson.loads(line)["iteration"] > iteration:
                continue
        except (orjson.JSONDecodeError, KeyError, TypeError):
            continue  # half a line, cut off by the kill
        kept.append(line + b"\n")
    write_durably(path, b"".join(kept))


class StepTimer:
    """Wall seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self._last

    def lap(self) -> float:
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        return elapsed
