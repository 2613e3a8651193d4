"""Dynamic batching: comparisons of many requests wait a moment and are scored together, by one thread that owns the
model. The event loop stays free meanwhile."""

import asyncio
import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from megatron_polar.data.packing import join_rewards, physical_tokens, split_candidates
from megatron_polar.data.template import TokenizedComparison
from megatron_polar.serve.metrics import Metrics

ScoreTokens = Callable[[Sequence[TokenizedComparison]], list[list[float]]]


class QueueFull(Exception):
    """So many sequences wait that another request would only time out; `retry_after` is in seconds."""

    def __init__(self, waiting: int, *, retry_after: int):
        super().__init__(f"{waiting} sequences wait already")
        self.waiting, self.retry_after = waiting, retry_after


class NotFinite(Exception):
    """The model gave NaN or infinity, which is no reward."""


@dataclass(frozen=True)
class _Job:
    comparison: TokenizedComparison
    tokens: int
    since: float
    result: "asyncio.Future[list[float]]"

    @property
    def num_sequences(self) -> int:
        return len(self.comparison.candidates)


class Batcher:
    """A queue of comparisons and the loop that empties it; `run` must be a task while `score` is used.

    First come, first served. A batch holds as many comparisons as fit `max_tokens`, at least one. A request that is
    cancelled (its client left, or its time is over) leaves the queue.
    """

    def __init__(
        self, score_tokens: ScoreTokens, *, executor: Executor, max_tokens: int, wait: float, max_queue: int, metrics
    ):
        self._score_tokens, self._executor = score_tokens, executor
        self._max_tokens, self._wait, self._max_queue = max_tokens, wait, max_queue
        self._metrics: Metrics = metrics
        self._jobs: deque[_Job] = deque()
        self._num_sequences, self._num_tokens = 0, 0  # of the jobs in the queue
        self._arrived = asyncio.Event()
        self._seconds_per_sequence = 0.0
        self.failures_in_a_row, self._failed_at = 0, 0.0
        self._batch_since: float | None = None

    @property
    def seconds_in_batch(self) -> float:
        """How long the batch that is being scored has taken so far; 0 between batches."""
        return 0.0 if self._batch_since is None else time.monotonic() - self._batch_since

    @property
    def seconds_since_failure(self) -> float:
        """How long ago the last comparison failed."""
        return time.monotonic() - self._failed_at

    def check_room(self, num_sequences: int) -> None:
        """Raises QueueFull where so many more may not wait; an empty queue takes any number."""
        waiting = self._num_sequences
        if waiting and waiting + num_sequences > self._max_queue:
            raise QueueFull(waiting, retry_after=math.ceil(min(60.0, max(1.0, waiting * self._seconds_per_sequence))))

    async def score(self, comparisons: Sequence[TokenizedComparison]) -> list[list[float]]:
        """Rewards of each comparison's candidates, in order.

        Raises QueueFull, NotFinite, and what the scorer raises.
        """
        self.check_room(sum(len(comparison.candidates) for comparison in comparisons))
        parts = [
            split_candidates(comparison, max_tokens=self._max_tokens, layout="shared_prefix")
            for comparison in comparisons
        ]
        loop = asyncio.get_running_loop()
        jobs = [
            _Job(piece, physical_tokens(piece, layout="shared_prefix"), time.monotonic(), loop.create_future())
            for pieces in parts
            for piece in pieces
        ]
        self._jobs.extend(jobs)
        self._count(jobs, sign=1)
        self._arrived.set()
        try:
            rewards = await asyncio.gather(*(job.result for job in jobs))
        finally:
            self._leave(jobs)
        return join_rewards(parts, rewards)

    async def run(self) -> None:
        """Score what arrives, for ever."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._jobs:
                await self._collect()
                batch = self._take()
                if batch:
                    await self._score(batch)

    async def _collect(self) -> None:
        """Wait until the oldest comparison has waited long enough, or a batch is full."""
        while self._jobs and self._num_tokens < self._max_tokens:
            left = self._jobs[0].since + self._wait - time.monotonic()
            if left <= 0:
                return
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout=left)
            except TimeoutError:
                return
            self._arrived.clear()

    def _take(self) -> list[_Job]:
        batch: list[_Job] = []
        tokens = 0
        while self._jobs and (not batch or tokens + self._jobs[0].tokens <= self._max_tokens):
            job = self._jobs.popleft()
            batch.append(job)
            tokens += job.tokens
        self._count(batch, sign=-1)
        return batch

    async def _score(self, batch: list[_Job]) -> None:
        """Score a batch; if that fails, each comparison alone: one that cannot be scored takes no other along."""
        start = self._batch_since = time.monotonic()
        comparisons = [job.comparison for job in batch]
        try:
            rewards = await asyncio.get_running_loop().run_in_executor(self._executor, self._score_tokens, comparisons)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold what the forward pass had made, perhaps all memory
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            rewards = None
        finally:
            self._batch_since = None
        if rewards is None:  # here, where the error is gone
            for job in batch:
                await self._score([job])
            return
        self._measure(batch, seconds=time.monotonic() - start)
        for job, values in zip(batch, rewards, strict=True):
            if all(map(math.isfinite, values)):
                self.failures_in_a_row = 0
                _settle(job, rewards=values)
            else:
                self._fail(job, NotFinite("a reward is not finite"))

    def _fail(self, job: _Job, error: Exception) -> None:
        self.failures_in_a_row, self._failed_at = self.failures_in_a_row + 1, time.monotonic()
        _settle(job, error=error)

    def _measure(self, batch: list[_Job], *, seconds: float) -> None:
        num_sequences = sum(job.num_sequences for job in batch)
        latest = seconds / num_sequences
        self._seconds_per_sequence += (latest - self._seconds_per_sequence) * 0.2
        self._metrics.batch_sequences.observe(num_sequences)
        self._metrics.batch_tokens.observe(sum(job.tokens for job in batch))
        self._metrics.batch_seconds.observe(seconds)
        self._metrics.unshared_tokens.inc(sum(physical_tokens(job.comparison, layout="packed") for job in batch))

    def _count(self, jobs: Sequence[_Job], *, sign: int) -> None:
        self._num_sequences += sign * sum(job.num_sequences for job in jobs)
        self._num_tokens += sign * sum(job.tokens for job in jobs)
        self._metrics.queue_sequences.set(self._num_sequences)

    def _leave(self, jobs: list[_Job]) -> None:
        """Take what is no longer waited for out of the queue."""
        unfinished = [job for job in jobs if not job.result.done() or job.result.cancelled()]
        if not unfinished:
            return
        for job in unfinished:
            job.result.cancel()
        gone = [job for job in self._jobs if job.result.done()]
        self._jobs = deque(job for job in self._jobs if not job.result.done())
        self._count(gone, sign=-1)


def _settle(job: _Job, *, rewards: list[float] | None = None, error: Exception | None = None) -> None:
    if job.result.done():  # nobody waits for it any more
        return
    if error is not None:
        job.result.set_exception(error)
    else:
        job.result.set_result(rewards)
