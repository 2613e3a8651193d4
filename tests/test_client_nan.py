"""The model of our own server gives NaN for one item: the client names that item and asks no more than it needs."""

import math

import pytest
from servers import metrics_of, serving, trained_checkpoint

from megatron_polar.score.scorer import Scorer
from megatron_polar.serve.client import RewardClient, RewardError, RewardItem

ITEMS = [RewardItem(f"ba ke {k // 8}", "li mo", f"nu {'ra ' * (k % 5)}") for k in range(16)]
BAD = 13


def spoil_long_outputs() -> None:
    """Rewards of sequences above 50 tokens are NaN."""
    original = Scorer.score_tokens

    def spoiled(self, comparisons):
        return [
            [math.nan if len(c.prefix) + len(k) > 50 else reward for k, reward in zip(c.candidates, row, strict=True)]
            for c, row in zip(comparisons, original(self, comparisons), strict=True)
        ]

    Scorer.score_tokens = spoiled


@pytest.fixture(scope="module")
def server(tmp_path_factory, trajectory_corpus):
    directory = tmp_path_factory.mktemp("nan")
    checkpoint = trained_checkpoint(trajectory_corpus, directory / "run")
    with serving(checkpoint, directory=directory, prepare=spoil_long_outputs) as running:
        yield running


@pytest.mark.parametrize("engine", ["megatron-polar", "vllm"])
def test_a_reward_that_is_not_finite_is_told_by_its_item(engine, server, tokenizer_path):
    items = [RewardItem(item.prompt, item.reference, "zo " * 40) if k == BAD else item for k, item in enumerate(ITEMS)]
    options = {"tokenizer": tokenizer_path, "max_sequence_length": 256, "max_concurrency": 1, "retries": 8}
    with server.client() as http, RewardClient(server.url, engine=engine, **options) as client:
        before = num_requests(http)
        with pytest.raises(RewardError, match=r"HTTP 422.*no finite reward") as caught:
            client.score(items)
        assert caught.value.indices == (BAD,)
        assert num_requests(http) - before <= 9, "16, then two halves of each that fails; none is repeated"
        assert len(client.score(ITEMS)) == 16


def num_requests(http) -> float:
    """Requests for rewards that the server has answered."""
    found = metrics_of(http)
    return sum(value for name, value in found.items() if "requests_total{" in name and "/metrics" not in name)
