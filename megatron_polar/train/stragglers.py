"""Ranks that are slower than the others, told by how long they work before they wait."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_polar.parallel.readback import read_back
from megatron_polar.parallel.topology import Topology


@dataclass(frozen=True)
class SlowRank:
    """A rank (global) that takes `ratio` times as long as the others for a step: `seconds`, scaled down to the mean
    rank's work where it has more."""

    rank: int
    ratio: float
    seconds: float


@dataclass(frozen=True)
class SlowReplica:
    """Slow ranks of one replica of the model, slowest first, which `ratio` and `seconds` are about.

    Its tensor-, context- and pipeline-parallel ranks wait for each other within a step. So a slow one slows the others,
    and which one it is cannot be told for sure from how long they take.
    """

    ranks: tuple[int, ...]
    ratio: float
    seconds: float

    def __str__(self) -> str:
        takes = f"{self.ratio:.2f} times as long as the others ({self.seconds * 1000:.0f} ms for a step's mean work)"
        if len(self.ranks) == 1:
            return f"rank {self.ranks[0]} takes {takes}"
        return f"ranks {', '.join(map(str, self.ranks))}, which wait for each other within a step, take {takes}"


class Stragglers:
    """Compares how long replicas work before they have to wait for each other; `ratio` 0 compares nothing."""

    def __init__(self, *, ratio: float, fewest_steps: int = 10):
        self.ratio, self.fewest_steps = ratio, fewest_steps
        self._seconds: list[float] = []

    def add(self, busy_seconds: float, *, load: float = 1.0) -> None:
        """Take note of one step of this rank, whose work is `load` times the mean: with few comparisons a rank the
        heaviest has much more, and it is always the same one. Less work is not counted in a rank's favour, since some
        of the time is the same for all."""
        if self.ratio:
            self._seconds.append(busy_seconds / max(1.0, load))

    def report(self, topology: Topology, *, device: torch.device | str = "cpu") -> list[SlowReplica]:
        """Replicas that were slow since the last report, the same on every rank, slowest first. Collective: two small
        gatherings where there are enough steps."""
        group = topology.groups.dp_cp
        if len(self._seconds) < self.fewest_steps:
            return []
        own = torch.tensor(self._seconds, dtype=torch.float64, device=device)
        self._seconds = []
        if group.size() == 1:
            return []
        gathered = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(gathered, own, group=group)
        seconds = read_back(torch.stack(gathered)).tolist()
        found = find_slow(seconds, ranks=dist.get_process_group_ranks(group), ratio=self.ratio)
        everyone: list[tuple[int, SlowRank] | None] = [None] * topology.world_size
        mine = next((slow for slow in found if slow.rank == topology.rank), None)
        dist.all_gather_object(everyone, mine and (topology.dp_rank, mine))
        return by_replica([entry for entry in everyone if entry is not None])


def by_replica(found: Sequence[tuple[int, SlowRank]]) -> list[SlowReplica]:
    """Put slow ranks, each given with the number of its replica, together; the slowest replica first."""
    replicas: dict[int, list[SlowRank]] = {}
    for number, slow in found:
        replicas.setdefault(number, []).append(slow)
    together = []
    for slow in replicas.values():
        slow.sort(key=lambda one: -one.ratio)
        together.append(SlowReplica(tuple(one.rank for one in slow), slow[0].ratio, slow[0].seconds))
    return sorted(together, key=lambda replica: -replica.ratio)


def find_slow(seconds: list[list[float]], *, ranks: list[int], ratio: float) -> list[SlowRank]:
    """Ranks that took more than `ratio` times as long as the median of the others in three quarters of the steps,
    slowest first; `seconds[i]` are the steps of `ranks[i]`.

    Step by step, and not medians over the window: a busy machine holds up now this rank and now that one, and on two
    cores with a load of 30 medians of ten steps raised a false alarm in every tenth window, this in none.
    """
    found = []
    for position, (rank, own) in enumerate(zip(ranks, seconds, strict=True)):
        others = [statistics.median(step) for step in zip(*seconds[:position], *seconds[position + 1 :], strict=True)]
        ratios = sorted(mine / max(theirs, 1e-9) for mine, theirs in zip(own, others, strict=True))
        typical = ratios[len(ratios) // 4]
        if typical > ratio:
            found.append(SlowRank(rank, typical, statistics.median(own)))
    return sorted(found, key=lambda slow: -slow.ratio)
