"""The server's queue: what comes together is scored together, within the budget, and given back in order."""

import asyncio
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_polar.data.template import TokenizedComparison
from megatron_polar.errors import UserError
from megatron_polar.serve.batching import Batcher, QueueFull
from megatron_polar.serve.limits import Limits
from megatron_polar.serve.metrics import Metrics


def comparison(prefix: int, *candidates: int) -> TokenizedComparison:
    tokens = tuple(np.full(length, 9, dtype=np.int32) for length in candidates)
    return TokenizedComparison(np.zeros(prefix, dtype=np.int32), tokens, (0,) * len(candidates), 0)


class Recorder:
    """Rewards a candidate with its length, and remembers which batches there were."""

    def __init__(self):
        self.batches: list[list[int]] = []

    def __call__(self, comparisons):
        self.batches.append([len(c.prefix) for c in comparisons])
        time.sleep(0.05)
        return [[float(len(candidate)) for candidate in c.candidates] for c in comparisons]


def run_batcher(scenario, *, score, **options):
    """Run the coroutine function `scenario(batcher)` beside a batcher's loop."""

    async def main():
        with ThreadPoolExecutor(1) as executor:
            settings = {"max_tokens": 100, "wait": 0.02, "max_queue": 100} | options
            batcher = Batcher(score, executor=executor, metrics=Metrics(), **settings)
            loop = asyncio.ensure_future(batcher.run())
            try:
                return await asyncio.wait_for(scenario(batcher), timeout=20)
            finally:
                loop.cancel()

    return asyncio.run(main())


def test_requests_that_come_together_are_scored_together_up_to_the_budget():
    recorder = Recorder()

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.score([comparison(20 + k, 5, 6)]) for k in range(6)))

    rewards = run_batcher(scenario, score=recorder)
    assert rewards == [[[5.0, 6.0]]] * 6
    assert recorder.batches == [[20, 21, 22], [23, 24], [25]]


def test_a_lone_request_waits_for_others_and_a_full_batch_does_not():
    recorder = Recorder()

    async def seconds(batcher, *candidates):
        start = time.monotonic()
        await batcher.score([comparison(10, *candidates)])
        return time.monotonic() - start

    assert run_batcher(lambda batcher: seconds(batcher, 5), score=recorder, wait=0.3) >= 0.3
    assert run_batcher(lambda batcher: seconds(batcher, 60, 30), score=recorder, wait=60.0) < 20
    assert run_batcher(lambda batcher: seconds(batcher, 5), score=recorder, wait=0.0) < 20


def test_many_candidates_are_split_by_the_budget_and_put_together_again():
    recorder = Recorder()

    async def scenario(batcher):
        return await batcher.score([comparison(50, *range(1, 31)), comparison(3, 2)])

    assert run_batcher(scenario, score=recorder) == [[float(k) for k in range(1, 31)], [2.0]]
    assert len(recorder.batches) > 9, "30 candidates of up to 30 tokens behind a prefix of 50"


def test_the_queue_takes_one_request_of_any_size_and_then_has_a_limit():
    async def scenario(batcher):
        first = asyncio.ensure_future(batcher.score([comparison(90, *[5] * 20)]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as caught:
            await batcher.score([comparison(10, 5)])
        assert caught.value.retry_after >= 1
        first.cancel()
        await asyncio.wait([first])
        return await batcher.score([comparison(10, 5)])

    assert run_batcher(scenario, score=Recorder(), max_queue=4) == [[5.0]]


def test_what_a_failed_forward_pass_has_made_is_let_go_of():
    """Else one that ran out of memory leaves less of it to the next, which is the same batch in parts."""
    alive: weakref.WeakSet = weakref.WeakSet()
    seen = []

    class Activations:
        pass

    def score(comparisons):
        made = Activations()
        alive.add(made)
        seen.append(len(alive))
        if any(len(c.prefix) == 20 for c in comparisons):
            raise MemoryError("out of memory")
        return [[1.0 for _ in c.candidates] for c in comparisons]

    async def scenario(batcher):
        for _ in range(4):
            calls = [batcher.score([comparison(length, 5)]) for length in (20, 20, 21)]
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert [isinstance(one, MemoryError) for one in found] == [True, True, False]

    gc.collect()
    gc.disable()  # cycles would be found now and then, and who knows when
    try:
        run_batcher(scenario, score=score)
    finally:
        gc.enable()
    assert max(seen) == 1 and len(seen) == 4 * 4


def test_limits_must_be_positive():
    with pytest.raises(UserError, match="--max-body-bytes -1 must be 1 or more"):
        Limits(max_body_bytes=-1)
    assert Limits(batch_wait_ms=0).max_batch_tokens == 0
