"""A limit on every wait of the preflight: a process that hangs, or is told to stop, says in what, and ends."""

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from typing import Protocol

from megatron_polar.errors import STALLED

_SECONDS_TO_WRITE = 4.0
"""For what is written at the end: the file system or the store may be what hangs."""
_SECONDS_FOR_PYTHON = 10.0
"""After which a process ends that never lets go of Python's lock, as a driver call may do."""


class GiveUp(Protocol):
    def __call__(self, waited_for: str, *, is_told: bool) -> None:
        """Write down what the process waited for; `is_told`: somebody wanted it to stop before its time was up."""


class Deadline:
    """Ends this process with STALLED when one phase takes longer than `seconds`, or at SIGTERM; a context manager.

    `name` is what its message calls the process; `give_up` runs in a thread of its own and gets a few seconds. SIGTERM
    is what srun sends to all when one has failed: the main thread is in a collective then and cannot answer, so a
    thread does. A process that is stuck in a C call with Python's lock held is ended by faulthandler's thread instead,
    with its stack and status 1.
    """

    def __init__(self, seconds: float, *, name: str, give_up: GiveUp):
        self.seconds, self.name, self._give_up = seconds, name, give_up
        self._phase, self._since = "the start", time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> "Deadline":
        self.phase(self._phase)
        self._signals, writer = os.pipe()
        os.set_blocking(writer, False)
        self._handles = (self._signals, writer)
        self._before = signal.signal(signal.SIGTERM, lambda number, frame: None), signal.set_wakeup_fd(writer)
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        handler, descriptor = self._before
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        for handle in self._handles:
            os.close(handle)

    def phase(self, waits_for: str) -> None:
        """The process begins to wait for something else; the clock starts anew."""
        self._phase, self._since = waits_for, time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + _SECONDS_FOR_PYTHON, exit=True, file=2)

    def _watch(self) -> None:
        while not self._ended.is_set():
            has_signal, _, _ = select.select([self._signals], [], [], min(0.1, self.seconds / 5))
            phase = self._phase
            if has_signal and signal.SIGTERM in os.read(self._signals, 64):
                self._end(phase, f"was told to stop while it waited for {phase}", is_told=True)
            elif time.monotonic() - self._since > self.seconds:
                self._end(phase, f"gave up after {self.seconds:g} s of waiting for {phase}", is_told=False)

    def _end(self, phase: str, why: str, *, is_told: bool) -> None:
        remedy = "see the table of `megatron-polar preflight --judge`, or raise --timeout-seconds"
        print(f"error: {self.name}: preflight {why}; {remedy}", file=sys.stderr, flush=True)
        writer = threading.Thread(target=self._give_up, args=(phase,), kwargs={"is_told": is_told}, daemon=True)
        writer.start()
        writer.join(_SECONDS_TO_WRITE)
        os._exit(STALLED)
