"""What a watchdog leaves in the run directory: heartbeat, and how and where a job that it ends has stopped."""

import contextlib
import faulthandler
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_polar.manifest import write_durably
from megatron_polar.train.journal import last_step, write_status
from megatron_polar.train.verdicts import Process, wait_until

HEARTBEAT = "heartbeat"
_SECONDS_TO_WRITE = 2.5
"""Enough on a machine that is busy with other things; a hung file system costs them."""


class LastWords:
    """Writes for one rank. The last words are written in threads, for which nobody waits long: storage may be what
    hangs. `directory` None: nothing is written."""

    def __init__(self, directory: Path | None, *, process: Process, exit_code: int):
        self.directory, self._process, self._exit_code = directory, process, exit_code
        self.may_write: Callable[[], bool] = lambda: True
        """Whether the run directory is still ours (lock.py)."""
        self._writers: list[threading.Thread] = []

    def beat(self, phase: str, step: int) -> None:
        """Say where this rank is: a job script ends a job whose first rank cannot even do that."""
        with contextlib.suppress(OSError):
            if self.directory is not None and self.directory.is_dir() and self.may_write():
                write_durably(self.directory / HEARTBEAT, f"{phase} of step {step}\n".encode())

    def status(self, message: str, *, phase: str, step: int) -> None:
        """In place of the journal: the first rank, which would write it, may be the one that hangs."""
        self._start(lambda directory: self._write_status(directory, message, phase=phase, step=step))

    def stacks(self, message: str) -> None:
        """Stacks of all threads of this rank."""
        self._start(lambda directory: self._write_stacks(directory, message))

    def finish(self) -> None:
        """Wait a moment for what is being written."""
        wait_until(lambda: not any(writer.is_alive() for writer in self._writers), _SECONDS_TO_WRITE)

    def _start(self, function: Callable[[Path], None]) -> None:
        def write() -> None:
            if self.may_write():
                function(self.directory)

        if self.directory is not None:
            self._writers.append(threading.Thread(target=write, daemon=True))
            self._writers[-1].start()

    def _write_status(self, directory: Path, message: str, *, phase: str, step: int) -> None:
        done = last_step(directory) if phase in ("start", "load") else step - (phase in ("data", "step"))
        status = {"state": "failed", "step": done, "exit_status": self._exit_code, "reason": message}
        with contextlib.suppress(OSError):
            write_status(directory, **status, suffix=f".{self._process.rank}.tmp")

    def _write_stacks(self, directory: Path, message: str) -> None:
        with contextlib.suppress(OSError):
            path = directory / "stacks" / f"rank_{self._process.rank:05d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a second name of somebody's file is not written through
            with path.open("x") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._process}: {message}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
