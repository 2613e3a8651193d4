"""The client against our own server and a real model: whatever the engine's shape, the rewards are the scorer's."""

import pytest
from ranks import run_ranks
from servers import serving
from tiny_runs import STEPS, checkpoint_of, run_training, tiny_config

from megatron_polar.score.requests import ScoreRequest
from megatron_polar.score.scorer import load_scorer
from megatron_polar.serve.client import RewardClient, RewardError, RewardItem

LONG = " ".join(["ba ke li mo nu"] * 60)
ITEMS = [RewardItem(f"ba ke {i // 3}", f"li mo {i // 3}", f"nu ra love{i}") for i in range(40)]
ITEMS += [RewardItem("ba", "", ""), RewardItem("", "ke", "li"), RewardItem("ba", "ke", "li", "sft")]
ITEMS += [RewardItem(LONG, LONG, LONG), RewardItem("ba <|reward|> ke", "[UNUSED_TOKEN_130]", "<|reward|>")]
OWN = "pretrain"
"""The wrapper that the model was trained with."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path_factory.mktemp("client") / "run",
        optimizer__lr=1e-2,
        checkpoint__save_interval=STEPS,
    )
    run_training(config)
    return config.run.directory


@pytest.fixture(scope="module")
def wanted(trained) -> list[float]:
    return run_ranks(_scorers_rewards, 1, trained)[0]


def _scorers_rewards(directory: str) -> list[float]:
    """Each item by itself."""
    scorer = load_scorer(directory, device_kind="cpu")
    requests = [ScoreRequest(item.prompt, item.reference, (item.output,), item.wrapper or OWN) for item in ITEMS]
    return [rewards[0] for rewards in scorer.score(requests)]


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """A server that wants a token."""
    directory = tmp_path_factory.mktemp("server")
    (directory / "token").write_text("a-token\n")
    with serving(trained, "--token-file", directory / "token", directory=directory) as server:
        yield server


def client_of(server, trained, engine: str, **options) -> RewardClient:
    tokenizer = checkpoint_of(trained, STEPS) / "tokenizer"
    defaults = {"tokenizer": tokenizer, "max_sequence_length": 256, "api_key_file": server.log.parent / "token"}
    if engine != "megatron-polar":  # our own server knows it
        defaults["wrapper"] = OWN
    return RewardClient(server.url, engine=engine, **defaults | options)


@pytest.mark.parametrize(
    ("engine", "layout"),
    [
        ("vllm", "internlm2"),
        ("vllm", "sequence-classification"),
        ("sglang", "internlm2"),
        ("megatron-polar", "internlm2"),
    ],
)
def test_rewards_of_every_shape_are_the_scorers(engine, layout, server, trained, wanted):
    with client_of(server, trained, engine, layout=layout) as client:
        # The same fp32 arithmetic in rows of other lengths.
        assert client.score(ITEMS) == pytest.approx(wanted, abs=1e-5)
        assert client.num_truncated == 1
    assert max(wanted) - min(wanted) > 0.1


def test_rewards_of_lmdeploys_shape_are_the_scorers(trained, wanted, tmp_path):
    with serving(trained, "--pooling-shape", "lmdeploy", directory=tmp_path) as server:
        client = client_of(server, trained, "lmdeploy", api_key_file=None)
        with client:
            assert client.score(ITEMS) == pytest.approx(wanted, abs=1e-5)


def test_the_published_text_gets_the_same_rewards_where_its_quirks_play_no_part(server, trained, wanted):
    plain = [index for index, item in enumerate(ITEMS[:43]) if item.output]
    with client_of(server, trained, "vllm", compat="official") as client:
        found = client.score([ITEMS[index] for index in plain])
    assert found == pytest.approx([wanted[index] for index in plain], abs=1e-5)


def test_a_wrong_token_is_refused_with_what_to_do(server, trained, tmp_path):
    (tmp_path / "token").write_text("another-token")
    with (
        client_of(server, trained, "megatron-polar", api_key_file=tmp_path / "token") as client,
        pytest.raises(RewardError, match=r"HTTP 401.*API key") as caught,
    ):
        client.score(ITEMS[:1])
    assert "another-token" not in str(caught.value)
