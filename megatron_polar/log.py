"""Console output: one line per message, a bar on a terminal, plain lines with an ETA everywhere else."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_PLAIN_INTERVAL_SECONDS = 10.0
_LEAST_SHARE_FOR_ETA = 0.03
"""Of the work: before that an ETA tells more of how the work began than of what is left."""


def is_first_rank() -> bool:
    """Whether this process is the one that talks: rank 0 of a launched job, or any process on its own."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def info(message: str) -> None:
    """Print one line to stderr, on the first rank only."""
    if is_first_rank():
        _say(message)


def warn(message: str) -> None:
    """Print one warning line to stderr, on every rank that has something to warn about."""
    _say(f"warning: {message}")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a log on a full disk must not end the run
        print(line, file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether a person is watching: stderr is a terminal and no batch system runs us."""
    return sys.stderr.isatty() and "SLURM_JOB_ID" not in os.environ


def format_seconds(seconds: float) -> str:
    """Render a duration in seconds as `1:02:03`, or `2:03` below one hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Progress:
    """How far a task of `total` units is: a rich bar on a terminal, else one plain line every ten seconds.

    Use as a context manager; call `advance(n)` as work gets done. Ranks other than the first stay silent, and all with
    `quiet` (for a loop that prints lines of its own).
    """

    def __init__(self, description: str, *, total: int | None, unit: str = "items", quiet: bool = False):
        self.description, self.total, self.unit, self.quiet = description, total, unit, quiet
        self.done = 0
        self._bar = None

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        if is_first_rank() and not self.quiet and on_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total)
        return self

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif is_first_rank() and not self.quiet and time.monotonic() - self._last_line >= _PLAIN_INTERVAL_SECONDS:
            self._last_line = time.monotonic()
            info(self._line())

    def _line(self) -> str:
        elapsed = time.monotonic() - self._start
        of_total = f"/{self.total}" if self.total else ""
        eta = ""
        if self.total and self.done >= _LEAST_SHARE_FOR_ETA * self.total:
            eta = f", ETA {format_seconds(elapsed / self.done * (self.total - self.done))}"
        return f"{self.description}: {self.done}{of_total} {self.unit}, {format_seconds(elapsed)} elapsed{eta}"

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()


def progress(
    items: Iterable[Item], description: str, *, total: int | None = None, unit: str = "items"
) -> Iterator[Item]:
    """Yield `items` while showing progress; `total` defaults to their length where they have one."""
    total = total if total is not None else (len(items) if hasattr(items, "__len__") else None)
    with Progress(description, total=total, unit=unit) as bar:
        for item in items:
            yield item
            bar.advance()
