"""What ranks tell each other while they train: that they live, where they stand, and why the job has to end."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

SHOW_STACK = signal.SIGUSR2
"""While a watchdog is at work, this signal writes the main thread's stack to the log."""
_SECONDS_TO_END_ITSELF = 1.0
_SECONDS_FOR_A_STACK = 0.3

PHASES = ("start", "load", "data", "step", "evaluation", "save")
"""In the order in which a rank passes them; of two ranks in one step the earlier phase is the one that is behind."""


# --- Processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A rank's process. `started` (clock ticks after boot) tells it from a later one that got the same number,
    `machine` says where the number means anything: the boot and the process namespace."""

    rank: int
    host: str
    pid: int
    started: int
    machine: str

    @classmethod
    def of_this(cls, rank: int) -> "Process":
        """The calling process."""
        pid = os.getpid()
        return cls(rank, socket.gethostname(), pid, _look_up(pid)[1], _machine())

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def is_here(self) -> bool:
        """Whether this process could see and signal it."""
        return self.machine == _machine()

    @property
    def state(self) -> str:
        """The kernel's letter for it: T stopped, Z ended but not waited for, "" gone; "?" where that cannot be seen."""
        try:
            state, started = _look_up(self.pid) if self.is_here else ("?", self.started)
        except PermissionError:
            return "?"
        return state if started == self.started else ""

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended."""
        return self.state in ("", "Z", "X")


def _look_up(pid: int) -> tuple[str, int]:
    """State and start of a process, as the kernel counts; psutil adds the time of boot, which moves when a clock is
    set."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    fields = stat.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = socket.gethostname()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def kill_all(processes: Sequence[Process]) -> None:
    """End those of the processes that are on this machine, and not this one.

    One whose watchdog is alive ends by itself and gets the time for it. One that never lets go of Python's lock shows
    its stack first.
    """
    others = [process for process in processes if process.is_here and process.pid != os.getpid()]

    def cannot_show_more() -> bool:
        return all(process.is_gone or process.state == "T" for process in others)

    wait_until(cannot_show_more, _SECONDS_TO_END_ITSELF)
    for number in (SHOW_STACK, signal.SIGKILL):
        for process in others:
            if not process.is_gone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        if number == SHOW_STACK:
            wait_until(cannot_show_more, _SECONDS_FOR_A_STACK)


def wait_until(is_so: Callable[[], bool], seconds: float, *, pause: float = 0.02) -> None:
    """Ask again and again, for so long at most."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not is_so():
        time.sleep(pause)


# --- Messages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beat:
    """A sign of life. `left`: the rank has come to its end, `still`: seconds since its main thread last got on,
    `waits` and `at`: whether that thread waits for other ranks, and where it stands."""

    number: int
    process: Process
    phase: str
    step: int
    left: bool = False
    still: float = 0.0
    waits: bool = False
    at: str = ""

    @property
    def place(self) -> tuple[int, int]:
        """How far the rank is."""
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}" + (f", at {self.at}" if self.at else "")


@dataclass(frozen=True)
class Verdict:
    """Why the job ends, and by whose fault. `is_patient`: a rank has ended with an error, and the others may be about
    to raise the same one."""

    message: str
    processes: list[Process]
    is_patient: bool = False


def read_beat(data: bytes) -> Beat:
    """What `orjson.dumps` has made of a beat."""
    fields = orjson.loads(data)
    return Beat(**fields | {"process": Process(**fields["process"])})


def read_verdict(data: bytes) -> Verdict:
    """What `orjson.dumps` has made of a verdict."""
    fields = orjson.loads(data)
    return Verdict(**fields | {"processes": [Process(**process) for process in fields["processes"]]})


def find_hung(beats: Sequence[Beat | None], *, before: Sequence[Beat | None], seconds: float) -> list[int] | None:
    """Ranks for which the others wait in a job that stands still: of those that do not wait themselves the ones that
    are furthest behind. Empty: all are alike. None: the job does not stand still.

    `beats` are all ranks' newest, `before` those of about a second ago. A rank that has got on in the last `seconds`,
    or has left since, keeps a job moving; of one that does not beat nothing is known, and it is left to the rank that
    listens to it.
    """
    running = {}
    for rank, (beat, old) in enumerate(zip(beats, before, strict=True)):
        if beat is None or old is None or beat.left != old.left:
            return None
        if not beat.left:
            if beat.number == old.number or beat.still < seconds:
                return None
            running[rank] = beat
    if not running:
        return None
    busy = {rank: beat for rank, beat in running.items() if not beat.waits} or running
    last = min(beat.place for beat in busy.values())
    hung = [rank for rank, beat in busy.items() if beat.place == last]
    return hung if len(hung) < len(running) or len(running) == 1 else []
