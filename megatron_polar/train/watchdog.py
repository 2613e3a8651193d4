"""Hung, dead and slow ranks: noticed, named, and not allowed to keep a job waiting.

Every rank beats into the store through which the ranks found each other, and listens to one other rank's beat, its
successor in a ring: that is three small requests a rank and interval, whatever the number of ranks. Whoever has a
verdict publishes it, and all ranks end by it. A daemon thread does this, so it goes on while the main thread waits in
a collective; a rank that is stopped, or never lets go of Python's lock, falls silent and is named for that.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import orjson
import psutil
import torch
import torch.distributed as dist

from megatron_polar import log
from megatron_polar.errors import STALLED

_PHASES = ("start", "load", "data", "step", "evaluation", "save")
"""In the order in which a rank passes them; of two ranks in one step the earlier phase is the one that is behind."""

_LONGEST_INTERVAL_SECONDS = 5.0
_SIGNS_OF_A_LOST_PEER = ("closed by peer", "connection", "timed out", "timeout", "broken pipe", "nccl", "gloo")


@dataclass(frozen=True)
class Process:
    """A rank's process; `started` tells it from a later one that got the same number."""

    rank: int
    host: str
    pid: int
    started: float

    @classmethod
    def of_this(cls, rank: int) -> "Process":
        return cls(rank, socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def is_gone(self) -> bool:
        """Whether this machine knows that the process has ended; False for one on another machine."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.started or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def kill(self) -> None:
        """End the process if it is on this machine and still the one that is meant."""
        if self.is_here and self.pid != os.getpid() and not self.is_gone():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Watchdog:
    """Ends the job when a rank hangs or dies; used as a context manager around a run, on every rank.

    `store` is the job's store (None: a job of one rank, which is watched for progress only), `timeout_seconds` the
    silence or lack of progress that is borne (0: nothing is watched), `directory` the run directory, which gets the
    stacks of all threads.
    """

    def __init__(
        self,
        store: dist.Store | None,
        *,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        directory: Path | None,
        exit_code: int = STALLED,
    ):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout_seconds
        self.directory, self.exit_code = directory, exit_code
        self.interval = min(_LONGEST_INTERVAL_SECONDS, timeout_seconds / 5) or 1.0
        self._me = Process.of_this(rank)
        self._main_store = store
        self._store: dist.Store | None = None
        self._phase, self._step, self._moved = "start", 0, time.monotonic()
        self._store_answered = time.monotonic()
        self._heard: tuple[bytes, float] = (b"", time.monotonic())
        self._ended = threading.Event()

    # --- The main thread ---

    def __enter__(self) -> "Watchdog":
        if self._main_store is not None:
            # A connection of its own: a main thread that waits for a key would lock this one.
            self._store = dist.PrefixStore("watchdog", self._main_store.clone())
            self._store.set_timeout(timedelta(seconds=max(self.timeout, 5.0)))
            self._store.set(f"process/{self.rank}", orjson.dumps(asdict(self._me)))
        if self.timeout > 0:
            self._moved = self._store_answered = time.monotonic()
            targets = [self._judge, *([self._beat] if self._store is not None else [])]
            for target in targets:
                threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._ended.set()
        if self._store is not None:
            how = "done" if error is None else f"an error: {' '.join(str(error).split())[:200]}"
            with contextlib.suppress(RuntimeError):
                self._store.set(f"left/{self.rank}", how)

    def enter(self, phase: str, step: int) -> None:
        """The main thread begins a phase (one of start, load, data, step, evaluation, save) of a step."""
        self._phase, self._step, self._moved = phase, step, time.monotonic()

    def progress(self) -> None:
        """The main thread gets on within a long phase."""
        self._moved = time.monotonic()

    def explain(self, error: BaseException, *, wait_seconds: float = 3.0) -> str | None:
        """After a collective has failed: a sentence that names the rank which left it, or None."""
        if self._store is None or not any(sign in str(error).lower() for sign in _SIGNS_OF_A_LOST_PEER):
            return None
        deadline = time.monotonic() + wait_seconds
        while time.monotonic() < deadline:
            try:
                for rank in range(self.world_size):
                    if rank != self.rank and (culprit := self._what_became_of(rank)):
                        return culprit
            except RuntimeError:
                return "the store of the job, on the host of rank 0, is gone"
            time.sleep(0.1)
        return None

    # --- Threads ---

    def _beat(self) -> None:
        """Say that this rank is alive, listen to its successor and for verdicts."""
        number = 0
        while not self._ended.wait(self.interval):
            number += 1
            beat = {"number": number, "phase": self._phase, "step": self._step}
            try:
                self._store.set(f"beat/{self.rank}", orjson.dumps(beat))
                if self._store.check(["verdict"]):
                    verdict = orjson.loads(self._store.get("verdict"))
                    self._end([Process(**process) for process in verdict["processes"]], message=None)
                self._listen((self.rank + 1) % self.world_size)
                self._store_answered = time.monotonic()
            except RuntimeError:
                continue  # the store is gone: either the job ends just now, or _judge notices

    def _listen(self, successor: int) -> None:
        key = f"beat/{successor}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        if beat != self._heard[0]:
            self._heard = (beat, time.monotonic())
        left = self._how_left(successor)
        if left == "done":
            return
        silent = time.monotonic() - self._heard[1]
        process = self._process(successor)
        if process is not None and process.is_gone() and self._how_left(successor) is None:
            self._conclude([process], f"{process} is dead; it was last in {_place(beat)}")
        elif left is not None and silent > 2 * self.interval:
            self._conclude([process], f"{process} ended with {left}")
        elif silent > self.timeout:
            named = process or Process(successor, "unknown", 0, 0.0)
            self._conclude([named], f"{named} has not been heard of for {silent:.1f} s; it was last in {_place(beat)}")

    def _judge(self) -> None:
        """Notice that nothing gets on, or that the store itself does not answer."""
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            if self._store is not None and now - self._store_answered > self.timeout:
                self._end(
                    [], message=f"the store of the job, on the host of rank 0, has not answered for {self.timeout:g} s"
                )
            if now - self._moved > self.timeout:
                behind, where = self._furthest_behind()
                who = ", ".join(map(str, behind)) or "all ranks"
                verb = "hangs" if len(behind) == 1 else "hang"
                self._conclude(behind, f"nothing has moved for {self.timeout:g} s: {who} {verb} in {where}")

    def _furthest_behind(self) -> tuple[list[Process], str]:
        """Ranks that are behind the others, which wait for them; none when all are at one place."""
        own = _place(orjson.dumps({"phase": self._phase, "step": self._step}))
        if self._store is None:
            return [], own
        keys = [f"beat/{rank}" for rank in range(self.world_size)]
        beats = [orjson.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]
        places = [(beat["step"], _PHASES.index(beat["phase"])) if beat else (-1, 0) for beat in beats]
        last = min(places)
        if max(places) == last:
            return [], own
        behind = [self._process(rank) for rank, place in enumerate(places) if place == last]
        return [process for process in behind if process is not None], f"step {last[0]}, phase {_PHASES[last[1]]}"

    # --- What is known of a rank ---

    def _process(self, rank: int) -> Process | None:
        key = f"process/{rank}"
        return Process(**orjson.loads(self._store.get(key))) if self._store.check([key]) else None

    def _how_left(self, rank: int) -> str | None:
        key = f"left/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _what_became_of(self, rank: int) -> str | None:
        process, left = self._process(rank), self._how_left(rank)
        if process is None or left == "done":
            return None
        if left is not None:
            return f"{process} ended with {left}"
        return f"{process} is dead" if process.is_gone() else None

    # --- The end ---

    def _conclude(self, processes: list[Process], message: str) -> None:
        """Publish a verdict and end by it."""
        verdict = {"message": message, "processes": [asdict(process) for process in processes if process]}
        with contextlib.suppress(RuntimeError):
            self._store.set("verdict", orjson.dumps(verdict)) if self._store is not None else None
        self._end(processes, message=message)

    def _end(self, processes: list[Process], *, message: str | None) -> None:
        """Leave stacks, end the ranks that cannot end themselves, our own helpers, and this process."""
        if self._ended.is_set():
            return
        if message is not None:
            log.warn(f"rank {self.rank} ends the job: {message}")
        self._dump_stacks()
        for process in processes:
            process.kill()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        sys.stderr.flush()
        os._exit(self.exit_code)

    def _dump_stacks(self) -> None:
        if self.directory is None:
            return
        with contextlib.suppress(OSError):
            stacks = self.directory / "stacks"
            stacks.mkdir(parents=True, exist_ok=True)
            with (stacks / f"rank_{self.rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)


def _place(beat: bytes) -> str:
    if not beat:
        return "its start"
    place = orjson.loads(beat)
    return f"step {place['step']}, phase {place['phase']}"


# --- Slow ranks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlowRank:
    """A rank (global) that takes `ratio` times as long as the others for a step: `seconds`."""

    rank: int
    ratio: float
    seconds: float


class Stragglers:
    """Compares how long replicas work before they have to wait for each other; `ratio` 0 compares nothing."""

    def __init__(self, *, ratio: float, fewest_steps: int = 5):
        self.ratio, self.fewest_steps = ratio, fewest_steps
        self._seconds: list[float] = []

    def add(self, busy_seconds: float) -> None:
        """Take note of one step of this rank."""
        self._seconds.append(busy_seconds)

    def report(self, group: dist.ProcessGroup, *, device: torch.device | str = "cpu") -> list[SlowRank]:
        """Ranks of `group` that were slow since the last report, slowest first. Collective: one small all_gather."""
        if not self.ratio or len(self._seconds) < self.fewest_steps or group.size() == 1:
            return []
        own = torch.tensor([statistics.median(self._seconds)], dtype=torch.float64, device=device)
        self._seconds = []
        gathered = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(gathered, own, group=group)
        medians = [value.item() for value in gathered]
        return find_slow(medians, ranks=dist.get_process_group_ranks(group), ratio=self.ratio)


def find_slow(medians: list[float], *, ranks: list[int], ratio: float) -> list[SlowRank]:
    """Ranks whose median is more than `ratio` times the median of the others' medians, slowest first."""
    found = []
    for position, (rank, seconds) in enumerate(zip(ranks, medians, strict=True)):
        others = statistics.median(medians[:position] + medians[position + 1 :])
        if others > 0 and seconds > ratio * others:
            found.append(SlowRank(rank, seconds / others, seconds))
    return sorted(found, key=lambda slow: -slow.ratio)
