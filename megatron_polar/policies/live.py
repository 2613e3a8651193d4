"""How far each policy is: bars on a terminal, plain lines with an ETA everywhere else."""

import time
from collections.abc import Sequence

from megatron_polar.log import format_seconds, info, is_first_rank, on_terminal

_LEAST_SHARE_FOR_ETA = 0.03
_MOST_POLICIES = 12  # shown at once, those with most work left
_SECONDS_PER_POLICY = 2.0  # between two reports, and 10 s at least


class LiveProgress:
    """Requests done and retried for each policy; a report now and then names those that take longest.

    `begun` says how many of `totals` were there before: they count as done and not for the speed.
    """

    def __init__(self, names: Sequence[str], *, totals: Sequence[int], begun: Sequence[int]):
        self._names, self._totals = list(names), list(totals)
        self._begun, self._done, self._retried = list(begun), list(begun), [0] * len(totals)
        self._failed = [0] * len(totals)
        self._interval = max(10.0, _SECONDS_PER_POLICY * min(len(names), _MOST_POLICIES))
        self._bars = None

    def __enter__(self) -> "LiveProgress":
        self._start = self._last_report = time.monotonic()
        if is_first_rank() and on_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bars = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
            self._tasks = [
                self._bars.add_task(name, total=total, completed=done, visible=number < _MOST_POLICIES)
                for number, (name, total, done) in enumerate(zip(self._names, self._totals, self._done, strict=True))
            ]
        return self

    def __exit__(self, *exception) -> None:
        if self._bars is not None:
            self._bars.stop()

    def count(self, policy: int, *, retries: int, is_failed: bool) -> None:
        """One more request of a policy is finished."""
        self._done[policy] += 1
        self._retried[policy] += retries
        self._failed[policy] += is_failed
        if self._bars is not None:
            self._bars.update(self._tasks[policy], completed=self._done[policy])
        elif time.monotonic() - self._last_report >= self._interval:
            self._last_report = time.monotonic()
            for line in self.lines(self._last_report - self._start):
                info(line)

    def lines(self, elapsed: float) -> list[str]:
        """A line for all and one for each policy that is not done, those with most requests left first."""
        rest = [total - done for total, done in zip(self._totals, self._done, strict=True)]
        slowest = sorted((number for number, left in enumerate(rest) if left), key=lambda number: -rest[number])
        shown = slowest[:_MOST_POLICIES]
        of_all = self._line(range(len(rest)), elapsed)
        lines = [f"sample: {of_all}, {format_seconds(elapsed)} elapsed"]
        lines += [f"  {self._names[number]}: {self._line([number], elapsed)}" for number in shown]
        if len(slowest) > len(shown):
            lines.append(f"  and {len(slowest) - len(shown)} more policies")
        return lines

    def _line(self, policies: Sequence[int], elapsed: float) -> str:
        done, total, begun, retried, failed = (
            sum(counts[number] for number in policies)
            for counts in (self._done, self._totals, self._begun, self._retried, self._failed)
        )
        line = f"{done}/{total} requests"
        line += f", {retried} retries" * (retried > 0) + f", {failed} failed" * (failed > 0)
        fresh, left = done - begun, total - done
        if left and fresh and fresh >= _LEAST_SHARE_FOR_ETA * (fresh + left):
            line += f", ETA {format_seconds(elapsed / fresh * left)}"
        return line
