"""The job's store as a notice board for watchdogs: beats, the verdict that counts, and who has come to its end."""

import os
from collections.abc import Sequence
from datetime import timedelta

import orjson
import torch.distributed as dist

from megatron_polar.train.verdicts import Beat, Verdict, read_beat, read_verdict

_SHORTEST_TIMEOUT_SECONDS = 5.0


class NoticeBoard:
    """What one rank posts and reads. Every method asks the store, and raises RuntimeError when that is gone or has not
    answered for `timeout_seconds`. All ranks make one at the same place."""

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, timeout_seconds: float):
        self.rank, self.world_size = rank, world_size
        # A connection of its own: a main thread that waits for a key would lock this one. And keys of its own: a
        # process may run several jobs, one after the other.
        store = store.clone()
        job = (store.add("watchdog", 1) - 1) // world_size
        self._store = dist.PrefixStore(f"watchdog/{job}", store)
        self._store.set_timeout(timedelta(seconds=max(timeout_seconds, _SHORTEST_TIMEOUT_SECONDS)))

    # --- Beats ---

    def post_beat(self, beat: Beat) -> None:
        """In place of this rank's last one."""
        self._store.set(f"beat/{self.rank}", orjson.dumps(beat))

    def beat_of(self, rank: int, *, is_known: bool = False) -> Beat | None:
        """The newest; None before the first. `is_known`: there was one, which saves a request."""
        key = f"beat/{rank}"
        return read_beat(self._store.get(key)) if is_known or self._store.check([key]) else None

    def beats_of(self, ranks: Sequence[int]) -> list[Beat | None]:
        """The newest of each rank."""
        keys = [f"beat/{rank}" for rank in ranks]
        if self._store.check(keys):
            return [read_beat(data) for data in self._store.multi_get(keys)]
        return [self.beat_of(rank) for rank in ranks]

    def beats_nearby(self) -> list[Beat | None]:
        """Of the ranks on this machine at least."""
        if "LOCAL_WORLD_SIZE" not in os.environ:
            return self.beats_of(range(self.world_size))
        first = self.rank - int(os.environ["LOCAL_RANK"])  # torchrun gives a machine ranks that follow each other
        return self.beats_of(range(first, first + int(os.environ["LOCAL_WORLD_SIZE"])))

    # --- The verdict ---

    def publish(self, verdict: Verdict) -> Verdict:
        """Returns the verdict that counts, which is the first one."""
        return read_verdict(self._store.compare_set("verdict", "", orjson.dumps(verdict).decode()))

    def published(self) -> Verdict | None:
        """The verdict that counts, if there is one."""
        return read_verdict(self._store.get("verdict")) if self._store.check(["verdict"]) else None

    def is_first_to_say_it(self) -> bool:
        """Whether no other rank has asked this; for what is to be said once a job."""
        return self._store.add("said", 1) == 1

    # --- The end ---

    def count_one_that_left(self) -> None:
        """One more rank has come to its end."""
        self._store.add("left", 1)

    def num_left(self) -> int:
        """Ranks that have come to their end."""
        return self._store.add("left", 0)
