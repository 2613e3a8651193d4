"""Guards of a run's state: steps that must not change the weights, and replicas that must not differ.

Every rank should come to the same verdict, because each judges figures that are the same on all of them; they agree all
the same before anyone acts.
"""

import math
import operator
import statistics
from collections import Counter, deque
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_polar import faults
from megatron_polar.config.schema import FaultsSection
from megatron_polar.errors import BAD_STEPS, MACHINE_DIFFERS, RunStopped, UserError
from megatron_polar.model.build import BuiltModel
from megatron_polar.model.fp8_weights import is_fp8_weight, plain
from megatron_polar.parallel.agreement import machines_of_ranks
from megatron_polar.parallel.device import Device
from megatron_polar.parallel.readback import read_back
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.gradients import gather_updated_weights

_SHAPE = ("loss", "grad_norm")


GOOD, SPIKE, NOT_FINITE = 0, 1, 2


@dataclass(frozen=True)
class Verdict:
    """One rank's opinion of a step: GOOD, SPIKE or NOT_FINITE, and the reason in words."""

    code: int
    reason: str


class StepGuard:
    """Judges every step before its update: is it finite, and is it like the steps before it?

    What it remembers travels with the checkpoint, so that a resumed run judges as the uninterrupted one.
    """

    def __init__(self, section: FaultsSection):
        self.section = section
        self.skipped = self.nonfinite = self.in_a_row = 0
        self._recent = {name: deque(maxlen=section.spike_window) for name in _SHAPE}

    def judge(self, *, loss: float, grad_norm: float, are_finite: bool = True) -> "Verdict":
        """Whether the step must not be taken, and why. `loss` is the mean over pairs.

        `are_finite`: this rank's own gradients. The norm does not show all of them: weights that tensor-parallel ranks
        all have are counted on the first of these alone.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        reasons = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not reasons and not are_finite:
            reasons = ["a gradient of this rank is not finite"]
        if reasons:
            return Verdict(NOT_FINITE, ", ".join(reasons))
        reasons = [reason for name in _SHAPE if (reason := self._spike(name, values[name]))]
        return Verdict(SPIKE if reasons else GOOD, ", ".join(reasons))

    def agree(self, verdict: "Verdict", *, device: Device) -> str | None:
        """Count the step as the worst verdict of any rank: replicas must never part. Returns why it is skipped, or
        None. Collective."""
        worst = torch.tensor([verdict.code], dtype=torch.int, device=device.torch_device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        code = int(read_back(worst))
        self.skipped += code != GOOD
        self.nonfinite += code == NOT_FINITE
        self.in_a_row = self.in_a_row + 1 if code != GOOD else 0
        if code == GOOD:
            return None
        return verdict.reason or "another rank finds its loss or gradient norm bad"

    def _spike(self, name: str, value: float) -> str | None:
        """Compare with the recent steps, and remember the value. Only finite values come here: one NaN in the window
        would make every comparison false for as long as it stays."""
        recent, sigmas = self._recent[name], self.section.spike_sigmas
        if not sigmas:
            return None
        limit = math.inf
        if len(recent) >= max(2, self.section.spike_window // 2):
            mean, deviation = statistics.fmean(recent), statistics.pstdev(recent)
            limit = mean + sigmas * deviation
        recent.append(min(value, limit))  # a spike widens the window no further than it has to
        if value <= limit:
            return None
        return f"{name} {value:.4g} is above {limit:.4g}, {sigmas:g} sigmas over the mean of {len(recent)} steps"

    def check_limit(self, *, step: int, remedy: str) -> None:
        """Raise RunStopped when more than `faults.max_consecutive_bad_steps` steps in a row were skipped."""
        limit = self.section.max_consecutive_bad_steps
        if self.in_a_row > limit:
            raise RunStopped(
                f"iteration {step}: {self.in_a_row} steps in a row were skipped, more than "
                f"faults.max_consecutive_bad_steps={limit}; {remedy}",
                status=BAD_STEPS,
            )

    def state(self) -> dict:
        """What a checkpoint keeps."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"skipped": self.skipped, "nonfinite": self.nonfinite, "in_a_row": self.in_a_row, "recent": recent}

    def restore(self, state: dict) -> None:
        """Continue from a checkpoint's `state`. Raises UserError when it is none."""
        try:
            for name in ("skipped", "nonfinite", "in_a_row"):
                setattr(self, name, operator.index(state.get(name, 0)))
            for name in _SHAPE:
                self._recent[name].clear()
                self._recent[name].extend(map(float, state.get("recent", {}).get(name, ())))
        except (TypeError, ValueError, AttributeError):
            raise UserError(f"state.json of the checkpoint: guard is {state!r:.60}; use another checkpoint") from None


# --- Replicas --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deviation:
    """A weight that differs between ranks which should hold the same. `ranks` (global) are those in the minority; when
    the two sides are equal in number, all of them."""

    parameter: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        who = ", ".join(map(str, self.ranks))
        return f"{self.parameter} of rank {who}" if len(self.ranks) == 1 else f"{self.parameter} among ranks {who}"


@torch.no_grad()
def compare_replicas(model: BuiltModel, *, topology: Topology) -> list[Deviation]:
    """Weights that differ between data- (and context-) parallel replicas, bit for bit, the same list on every rank.

    A checksum per parameter (the sum of its words) notices every flipped bit; it is one pass over the weights and one
    small all_gather.
    """
    names, sums = [], []
    for number, core in enumerate(model.cores):
        for name, parameter in core.named_parameters():
            names.append(name if len(model.cores) == 1 else f"chunk {number}: {name}")
            words = torch.int16 if parameter.element_size() == 2 else torch.int32
            sums.append(plain(parameter).detach().contiguous().view(words).sum(dtype=torch.int64))
    group = topology.groups.dp_cp
    own = torch.stack(sums)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    table = read_back(torch.stack(gathered))
    ranks = dist.get_process_group_ranks(group)
    found = [
        Deviation(names[column], _minority(table[:, column].tolist(), ranks))
        for column in torch.nonzero((table != table[0]).any(dim=0)).flatten().tolist()
    ]
    anything = torch.tensor([len(found)], device=own.device)
    dist.all_reduce(anything, op=dist.ReduceOp.MAX)
    if not read_back(anything):
        return []
    everyone: list = [None] * topology.world_size
    dist.all_gather_object(everyone, found)
    return sorted({deviation for part in everyone for deviation in part}, key=lambda d: (d.ranks, d.parameter))


def _minority(values: list[int], ranks: list[int]) -> tuple[int, ...]:
    (first, most), *rest = Counter(values).most_common()
    if rest and rest[0][1] == most:
        return tuple(ranks)
    return tuple(rank for rank, value in zip(ranks, values, strict=True) if value != first)


def check_replicas(model: BuiltModel, *, topology: Topology, step: int) -> None:
    """Raise RunStopped naming rank and weight when replicas differ. Collective."""
    if topology.groups.dp_cp.size() == 1:
        return
    gather_updated_weights(model)
    found = compare_replicas(model, topology=topology)
    if found:
        shown = "; ".join(map(str, found[:3])) + ("; ..." if len(found) > 3 else "")
        machines = machines_of_ranks()
        accused = {machines[rank] for deviation in found for rank in deviation.ranks}
        machine = accused.pop() if len(accused) == 1 < len(set(machines)) else None
        raise RunStopped(
            f"iteration {step}: weights that must be equal on all replicas differ: {shown}; no checkpoint was written "
            f"of them; look at that rank's memory{f', on {machine},' if machine else ''} and start again: the run "
            "resumes from its last checkpoint",
            status=MACHINE_DIFFERS,
            machine=machine,
        )


def flip_a_bit(model: BuiltModel) -> None:
    """What fault point `step_end` does with action `flip`: one bit of one weight of this rank changes."""
    if faults.point("step_end") == "flip":
        weight = next(p for p in model.cores[0].parameters() if not is_fp8_weight(p)).detach().view(-1)
        weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)[weight.numel() // 2] ^= 1 << 10
