"""Hung and dead ranks: noticed, named, and not allowed to keep a job waiting.

Every rank beats into the store through which the ranks found each other, and listens to one other rank's beat, its
successor in a ring: that is three small requests a rank and interval, whatever the number of ranks. Whoever comes to a
verdict publishes it; the first one counts, and all ranks end by it. Daemon threads do this, so it goes on while the
main thread waits in a collective. A rank that is stopped, or never lets go of Python's lock, falls silent and is named
for that; one that beats but does not get on is named by where it stands while the others wait for it.

Not covered: a job of one rank that never lets go of Python's lock, and a stopped rank that is alone on its machine,
which is named but has to be killed by the launcher.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import torch.distributed as dist

from megatron_polar import log
from megatron_polar.errors import STALLED
from megatron_polar.train.last_words import LastWords
from megatron_polar.train.notices import NoticeBoard
from megatron_polar.train.verdicts import SHOW_STACK, Beat, Process, Verdict, find_hung, kill_all, wait_until

_LONGEST_INTERVAL_SECONDS = 0.5
_LONGEST_GRACE_SECONDS = 10.0
"""For how long a rank may go on when another has ended with an error: most errors are raised on all ranks."""
_HEARTBEAT_SECONDS = 5.0
_SECONDS_FOR_OTHERS = 3.0
"""For how long the rank that hosts the store lets the others read why the job ends."""

_NUM_JUDGES = 2
"""Ranks that look at all others when nothing moves; if these fall silent themselves, their listeners notice."""

_SIGNS_OF_A_LOST_PEER = ("closed by peer", "connection", "timed out", "timeout", "broken pipe", "nccl", "gloo")
_WAITING = (
    "/torch/distributed/",
    "/megatron/core/distributed/",
    "/megatron/core/pipeline_parallel/",
    # NCCL's calls return at once: there a rank waits where the host reads what comes of them.
    "/megatron_polar/parallel/readback.py:",
    "/megatron/core/optimizer/clip_grads.py:",
    "/megatron/core/dist_checkpointing/strategies/async_utils.py:",
    "/torch/cuda/__init__.py:synchronize",
)
"""A main thread whose innermost Python frame (file:function) is in one of these waits for other ranks."""


class Watchdog:
    """Ends the job when a rank hangs or dies; used as a context manager around a run, on every rank.

    `store` is the job's store (None: a job of one rank, which is watched for progress only), `timeout_seconds` the
    silence or lack of progress that is borne (0: nothing is watched), `directory` the run directory, which gets the
    stacks of all threads. A rank that ends without an error waits for the others.
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
        self.exit_code = exit_code
        self.interval = min(_LONGEST_INTERVAL_SECONDS, timeout_seconds / 10)
        self._grace = min(_LONGEST_GRACE_SECONDS, timeout_seconds)
        self._me = Process.of_this(rank)
        self.words = LastWords(directory, process=self._me, exit_code=exit_code)
        # torchrun's agent hosts the store of its ranks; without it rank 0 does.
        self._launcher_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._store, self._has_lost_store = store, False
        self._board: NoticeBoard | None = None
        self._clock = 0.0
        """Seconds for which this process has been running, as fine as `interval`. It stands still while the process is
        stopped, so that a whole job that is suspended and resumed ends nobody."""
        self._place, self._moved, self._answered = ("start", 0), 0.0, 0.0
        self._number = 0
        self._host: Beat | None = None
        self._heard: tuple[Beat | None, float] = (None, 0.0)
        self._before: tuple[list[Beat | None], float] | None = None
        self._verdict: tuple[Verdict, float] | None = None
        self._error: str | None = None
        self._left = self._is_counted = self._has_said = False
        self._wake, self._said, self._others_left, self._ended = (threading.Event() for _ in range(4))
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    # --- The main thread ---

    def __enter__(self) -> "Watchdog":
        self._main_thread = threading.get_ident()
        if self._store is not None:
            sizes = {"rank": self.rank, "world_size": self.world_size}
            self._board = NoticeBoard(self._store, **sizes, timeout_seconds=self.timeout)
            self._beat()
        targets = [self._beat_for_launcher] if self.rank == 0 else []
        if self.timeout > 0:
            # Not all threads: to walk the frames of a thread that runs would crash the process now and then.
            faulthandler.register(SHOW_STACK, file=2, all_threads=False)
            targets += [self._keep_time, self._talk] if self._board is not None else [self._keep_time]
        for target in targets:
            self._threads.append(threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None:
            text = " ".join(str(error).encode(errors="replace").decode().split())
            self._error = text[:300] or kind.__name__
        self._left = True
        if self._board is not None and self.timeout > 0:
            self._wake.set()
            if error is None:
                self._others_left.wait()
            elif self._said.wait(_SECONDS_FOR_OTHERS) and self._hosts_the_store:
                self._others_left.wait(_SECONDS_FOR_OTHERS)
        elif self._board is not None:
            with contextlib.suppress(RuntimeError):
                self._say_goodbye()
        with self._lock:
            self._ended.set()
        self._wake.set()
        for thread in self._threads:  # one that is in a store call when the interpreter ends would abort it
            thread.join(_SECONDS_FOR_OTHERS)
        if self.timeout > 0:
            faulthandler.unregister(SHOW_STACK)

    def enter(self, phase: str, step: int) -> None:
        """The main thread begins a phase (one of start, load, data, step, evaluation, save) of a step."""
        self._place, self._moved = (phase, step), self._clock

    def progress(self) -> None:
        """The main thread gets on within a long phase."""
        self._moved = self._clock

    def explain(self, error: BaseException, *, wait_seconds: float = 3.0) -> str | None:
        """After a collective has failed: a sentence that names the rank which left it, or None."""
        if self._board is None or not any(sign in str(error).lower() for sign in _SIGNS_OF_A_LOST_PEER):
            return None
        found: list[Verdict | None] = [None]

        def is_found() -> bool:
            if not self._has_lost_store:
                with contextlib.suppress(RuntimeError):
                    found[0] = self._board.published() or self._find_dead()
                    return found[0] is not None
            found[0] = self._about_the_store("is gone")
            self._say(found[0])
            return True

        wait_until(is_found, wait_seconds, pause=0.1)
        self.words.finish()
        return found[0].message if found[0] is not None else None

    # --- The thread that keeps time, and notices a store that does not answer ---

    def _keep_time(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            self._clock += min(now - last, 2 * self.interval)
            last = now
            if self._board is None or self._has_lost_store:
                if not self._left and self._seconds_since(self._moved) > self.timeout:
                    self._end(Verdict(f"{self._nothing_moves}: {self._me} hangs in {self._own_beat()}", []), says=True)
            elif self._seconds_since(self._answered) > self.timeout:
                self._has_lost_store = True
                self._end(self._about_the_store(f"has not answered for {self.timeout:g} s"), says=True)

    def _beat_for_launcher(self) -> None:
        while not self._ended.wait(_HEARTBEAT_SECONDS):
            self.words.beat(*self._place)

    def _seconds_since(self, moment: float) -> float:
        """At least so many."""
        return self._clock - moment - self.interval

    # --- The thread that talks to the store ---

    def _talk(self) -> None:
        """Say that this rank is alive, listen to its successor, for verdicts, and for what a stalled job waits for."""
        pause = self.interval
        while not self._ended.is_set():
            try:
                if not self._has_lost_store:
                    self._talk_once()
                    self._answered = self._clock
            except RuntimeError:
                self._has_lost_store = True
            if self._has_lost_store:
                self._do_without_store()
            pause = min(2 * pause, self.interval) if self._left else self.interval
            if self._host is None and not self._launcher_hosts:  # once the store is silent it is too late to ask
                pause = 0.02
            if self._wake.wait(pause):
                self._wake.clear()
                pause = 0.005

    def _talk_once(self) -> None:
        if self._left:
            self._say_goodbye()
        else:
            self._beat()
        self._heed_verdict()
        self._listen()
        if self.rank < _NUM_JUDGES and self._error is None and self._seconds_since(self._moved) > self.timeout:
            self._judge()
        else:
            self._before = None

    def _do_without_store(self) -> None:
        """The store is gone, with the launcher or with rank 0. Ranks without a launcher may still come to their end."""
        if self._left:
            self._said.set()
            self._others_left.set()
        elif not self._launcher_hosts and self._seconds_since(self._answered) > self._grace:
            self._end(self._about_the_store("is gone"), says=True)

    def _beat(self) -> None:
        self._number += 1
        self._board.post_beat(self._own_beat())

    def _own_beat(self) -> Beat:
        (phase, step), still, waits, at = self._place, self._seconds_since(self._moved), False, ""
        if still > min(self.timeout / 2, 2.0):
            frame = sys._current_frames()[self._main_thread]
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            waits = any(part in f"{file}:{name}" for part in _WAITING)
            at = f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno} in {name}"
        return Beat(self._number, self._me, phase, step, self._left, still, waits, at)

    def _say_goodbye(self) -> None:
        if self._error is not None and not self._is_counted:
            self._publish(Verdict(f"{self._me} ended with an error: {self._error}", [self._me], is_patient=True))
        self._beat()
        self._count_me()
        self._said.set()
        if self._have_others_left():
            self._others_left.set()

    def _count_me(self) -> None:
        if not self._is_counted:
            self._board.count_one_that_left()
            self._is_counted = True

    def _have_others_left(self) -> bool:
        """Whether all ranks have counted themselves, or all that a verdict does not name."""
        is_final = self._verdict is not None and not self._verdict[0].is_patient
        return self._board.num_left() >= self.world_size - (len(self._verdict[0].processes) if is_final else 0)

    def _heed_verdict(self) -> None:
        if self._verdict is None and (published := self._board.published()):
            self._verdict = (published, self._clock)
            self._has_said |= not published.is_patient  # whoever has published it has said it
        if self._verdict is None or self._error is not None:
            return
        verdict, since = self._verdict
        if verdict.is_patient and (self._left or self._seconds_since(since) < self._grace):
            return
        # All write their stacks before the first one breaks a connection on which another waits; and whoever hosts the
        # store must not leave before all have read why.
        self.words.stacks(verdict.message)
        self.words.finish()
        if self._me not in verdict.processes:
            self._count_me()
        wait_until(self._have_others_left, _SECONDS_FOR_OTHERS, pause=0.1)
        self._end(verdict, says=verdict.is_patient)

    def _listen(self) -> None:
        """Notice that the successor is silent, or, on the same machine, dead."""
        if self._host is None and not self._launcher_hosts:
            self._host = self._board.beat_of(0)
        successor = (self.rank + 1) % self.world_size
        earlier, since = self._heard
        beat = self._board.beat_of(successor, is_known=earlier is not None)
        if beat != earlier:
            self._heard = (beat, self._clock)
        is_silent = beat == earlier and self._seconds_since(since) > self.timeout
        if beat is None:
            if is_silent:
                self._conclude(f"rank {successor} (of unknown host) has not begun after {self.timeout:g} s", [])
        elif not beat.left:
            if beat.process.is_gone and not self._board.beat_of(successor).left:
                self._conclude(_is_dead(beat), [beat.process])
            elif is_silent:
                # Whoever stops one process often stops several.
                stopped = [other for other in self._board.beats_nearby() if other and other.process.state == "T"]
                silent = [beat, *(other for other in stopped if other.process != beat.process)]
                heard = f"not been heard of for {self.timeout:g} s"
                parts = [
                    f"{x.process} {'is stopped' if x in stopped else f'has {heard}'}; it was last in {x}"
                    for x in silent
                ]
                self._conclude("; ".join(parts), [x.process for x in silent])

    def _judge(self) -> None:
        """This rank has not got on for the time-out: look at all ranks, twice, and say whom the job waits for."""
        if self._before is None:
            self._before = (self._board.beats_of(range(self.world_size)), self._clock)
        before, since = self._before
        if self._seconds_since(since) < max(1.0, 2 * self.interval):
            return
        beats = self._board.beats_of(range(self.world_size))
        hung = find_hung(beats, before=before, seconds=self.timeout - 3 * self.interval)
        if hung is None:
            self._before = (beats, self._clock)
            return
        who = "; ".join(f"{beats[rank].process} hangs in {beats[rank]}" for rank in hung)
        self._conclude(
            f"{self._nothing_moves}: {who or f'all ranks hang in {self._own_beat()}'}",
            [beats[rank].process for rank in hung],
        )

    @property
    def _nothing_moves(self) -> str:
        return f"nothing has moved for {self.timeout:g} s"

    # --- What the store knows ---

    def _find_dead(self) -> Verdict | None:
        dead = [beat for beat in self._board.beats_nearby() if beat and not beat.left and beat.process.is_gone]
        message = "; ".join(map(_is_dead, dead))
        return self._publish(Verdict(message, [beat.process for beat in dead])) if dead else None

    @property
    def _hosts_the_store(self) -> bool:
        return self.rank == 0 and self._board is not None and not self._launcher_hosts

    def _about_the_store(self, what: str) -> Verdict:
        """Why a job ends whose store is lost: nobody can publish anything any more."""
        if self._verdict is not None:
            return self._verdict[0]
        process = self._host.process if self._host is not None else None
        where = "the launcher" if self._launcher_hosts else str(process or "rank 0")
        state = process.state if process is not None else "?"
        how = ", which is stopped" if state == "T" else ", which is dead" if state in ("", "Z", "X") else ""
        message = f"the job's store {what}; it is with {where}{how}"
        return Verdict(message, [process] if process is not None else [])

    # --- The end ---

    def _publish(self, verdict: Verdict) -> Verdict:
        """Returns the verdict that counts, which is the first one."""
        counts = self._board.publish(verdict)
        if counts == verdict and not verdict.is_patient:
            self._say(verdict)
        return counts

    def _say(self, verdict: Verdict) -> None:
        """Warn and write it down, once a job as far as the store can see to that."""
        if self._has_said:
            return
        self._has_said = True
        with contextlib.suppress(RuntimeError):
            if not self._has_lost_store and self._board is not None and not self._board.is_first_to_say_it():
                return
        log.warn(f"rank {self.rank} ends the job: {verdict.message}")
        phase, step = self._place
        self.words.status(verdict.message, phase=phase, step=step)

    def _conclude(self, message: str, processes: list[Process]) -> None:
        self._verdict = (self._publish(Verdict(message, processes)), self._clock)
        self._heed_verdict()

    def _end(self, verdict: Verdict, *, says: bool) -> None:
        """Leave stacks, end the ranks that cannot end themselves, our own helpers, and this process."""
        with self._lock:
            if self._ended.is_set() or self._error is not None:
                return
            if says:
                self._say(verdict)
            if self._has_lost_store or self._board is None:
                self.words.stacks(verdict.message)
            kill_all(verdict.processes)
            self.words.finish()
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            os._exit(self.exit_code)


def _is_dead(beat: Beat) -> str:
    return f"{beat.process} is dead; it was last in {beat}"
