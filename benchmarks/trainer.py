"""What the benchmarks share: a trainer of a rank without a run directory, and the facts to print below a table."""

import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import torch
from machine import cpu_name

from megatron_polar.config.schema import DataSection, FaultsSection, OptimizerSection, RunConfig
from megatron_polar.data.loader import row_shape
from megatron_polar.data.steps import Rows, Step, lay_out
from megatron_polar.data.template import TokenizedComparison
from megatron_polar.model.build import build_model
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import Device, select_device
from megatron_polar.train.gradients import GradientReduction
from megatron_polar.train.guard import StepGuard
from megatron_polar.train.optimizer import build_optimizer, build_schedule
from megatron_polar.train.step import StepResult, compute_rewards, train_step


class Trainer:
    """The real step on synthetic comparisons: packing, schedule, loss, clipping, AdamW at a constant rate. A second
    trainer of a process takes the first one's `place`."""

    def __init__(self, config: RunConfig, *, vocab_size: int, num_steps: int = 1000, place=None):
        self.config = config
        if place is None:
            device = select_device("auto", local_rank=0)
            place = device, ranks.initialize(config.parallel, device=device)
            ranks.seed_ranks(place[1], seed=config.run.seed)
        self.place = self.device, self.topology = place
        self.model = build_model(config, topology=self.topology, device=self.device, vocab_size=vocab_size)
        self._num_steps, self._number, self._guard = num_steps, 0, StepGuard(FaultsSection())
        self._ready = False

    def take(self, data: DataSection) -> None:
        """Lay rows out by this section from now on."""
        self.config = replace(self.config, data=data)
        self._shape = row_shape(data, topology=self.topology, architecture=self.model.architecture)

    def rewards(self, comparisons: Sequence[TokenizedComparison]) -> list[np.ndarray]:
        """Rewards of each comparison's candidates, without training; after the first step."""
        rows = lay_out(comparisons, shape=self._shape, rank=self.topology.dp_rank, pad_id=0)
        place = {"topology": self.topology, "device": self.device}
        found: dict[int, np.ndarray] = {}
        scored = compute_rewards(self.model, micro_batches=rows.micro_batches, **place)
        for batch, members, values in zip(rows.micro_batches, rows.members, scored, strict=True):
            parts = values.split(batch.candidate_counts.tolist())
            found |= {member: part.cpu().double().numpy() for member, part in zip(members, parts, strict=True)}
        return [found[number] for number in range(len(comparisons))]

    def step(self, comparisons: Sequence[TokenizedComparison]) -> tuple[StepResult, Rows, float]:
        """One optimizer step; seconds are CPU time of this process on the CPU, wall time on a GPU."""
        if not self._ready:  # as late as this, so that weights may be loaded before
            self._reduction = GradientReduction(self.model, device=self.device)
            self._optimizer = build_optimizer(self.config.optimizer, model=self.model, reduction=self._reduction)
            self._schedule = build_schedule(self.config.optimizer, optimizer=self._optimizer, num_steps=self._num_steps)
            self.take(self.config.data)
            self._ready = True
        start = clock(self.device)
        rows = lay_out(comparisons, shape=self._shape, rank=self.topology.dp_rank, pad_id=0)
        step = Step(
            self._number,
            rows.micro_batches,
            rows.members,
            len(comparisons),
            0,
            rows.imbalance,
            rows.num_rounds,
            rows.work,
        )
        result = train_step(
            self.model, optimizer=self._optimizer, step=step, reduction=self._reduction, guard=self._guard,
            topology=self.topology, device=self.device,
        )  # fmt: skip
        self._schedule.step(increment=1)
        self._number += 1
        return result, rows, clock(self.device) - start


def clock(device: Device) -> float:
    """Process CPU time on the CPU; wall time behind a synchronised GPU."""
    device.synchronize()
    return time.process_time() if device.kind == "cpu" else time.perf_counter()


def constant_rate(lr: float, **changes) -> OptimizerSection:
    """An optimizer whose rate does not change."""
    return OptimizerSection(lr=lr, lr_decay_style="constant", warmup_fraction=0.0, **changes)


def conditions(device: Device, *packages: str) -> str:
    """Hardware, clock and versions, in one sentence."""
    names = ("torch", "megatron-core", *packages)
    where = device.name if device.kind == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
    kind = "process CPU time" if device.kind == "cpu" else "wall time"
    return f"{where}; {kind}; {', '.join(f'{n} {version(n)}' for n in names)}, Python {platform.python_version()}"
