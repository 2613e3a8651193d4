"""Rewards against several references, from a real model: the mean of those against each alone, wherever it is asked."""

import json

import numpy as np
import pytest
from ranks import run_ranks
from servers import ITEM, serving, trained_checkpoint

from megatron_polar import cli
from megatron_polar.data.references import mean_over_references
from megatron_polar.score.requests import ScoreRequest, for_references
from megatron_polar.score.scorer import load_scorer
from megatron_polar.serve.client import RewardClient, RewardItem

REFERENCES = ("li mo love1 ra", "zo ba love2", "nu nu nu nu nu nu si to")
PROMPTS = [f"ba ke {'li ' * k}" for k in range(6)]
OUTPUTS = ("li mo love1", "zo zo love2 ve", "", "ra ke")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, trajectory_corpus) -> str:
    return trained_checkpoint(trajectory_corpus, tmp_path_factory.mktemp("references") / "run")


def _twins(directory: str) -> tuple[list, list, int, int]:
    """Fast: all references in one call. Slow: one reference and one output a call, each encoded anew."""
    scorer = load_scorer(directory, device_kind="cpu")
    encoded = []
    encode = scorer.tokenizer.encode
    scorer.tokenizer.encode = lambda text: encoded.append(text) or encode(text)
    requests = [for_references(prompt, REFERENCES, OUTPUTS, wrapper="sft") for prompt in PROMPTS]
    rows = iter(scorer.score([each for request in requests for each in request]))
    fast = [mean_over_references([next(rows) for _ in request]) for request in requests]
    num_fast = len(encoded)
    slow = []
    for prompt in PROMPTS:
        alone = [[scorer.score([ScoreRequest(prompt, r, (o,), "sft")])[0][0] for o in OUTPUTS] for r in REFERENCES]
        slow.append(np.mean(np.asarray(alone, dtype=np.float64), axis=0).tolist())
    return fast, slow, num_fast, len(encoded) - num_fast


def test_the_reward_is_the_mean_of_those_against_each_reference_alone(checkpoint):
    fast, slow, num_fast, num_slow = run_ranks(_twins, 1, checkpoint)[0]
    # fp32: the same arithmetic in rows of other lengths, rewards up to 2 in size.
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-6)
    assert np.ptp(fast) > 0.1
    assert num_fast == len(PROMPTS) * (1 + len(REFERENCES) + len(OUTPUTS)), (
        "outputs are encoded once for all references"
    )
    assert num_fast < num_slow / 3


def _command(arguments: list[str]) -> int:
    return cli.main(arguments)


def test_score_writes_means_and_on_request_the_rewards_against_each(checkpoint, tmp_path, capfd):
    lines = [
        {"prompt": "ba", "references": [*REFERENCES, REFERENCES[0]], "outputs": list(OUTPUTS), "wrapper": "sft"},
        {"prompt": "ke", "references": list(REFERENCES), "output": "ra", "wrapper": "sft"},
        {"prompt": "ke", "reference": REFERENCES[1], "output": "ra", "wrapper": "sft"},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["score", "--checkpoint", checkpoint, "--device", "cpu", "--input", str(source), "--output"]
    assert run_ranks(_command, 1, [*arguments, str(tmp_path / "each.jsonl"), "--per-reference"]) == [0]
    assert "1 references were there twice in their line" in capfd.readouterr().err
    assert run_ranks(_command, 2, [*arguments, str(tmp_path / "means.jsonl")]) == [0, 0]
    each, means = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("each.jsonl", "means.jsonl")
    )
    assert [len(line["per_reference"]) for line in each] == [3, 3, 1]
    assert each[0]["rewards"] == mean_over_references(each[0]["per_reference"])
    assert each[1]["reward"] == pytest.approx(np.mean(each[1]["per_reference"]), abs=1e-12)
    assert [each[2]["reward"]] == each[2]["per_reference"]
    assert each[2]["reward"] == pytest.approx(each[1]["per_reference"][1], abs=1e-6)
    assert means[0]["rewards"] == pytest.approx(each[0]["rewards"], abs=1e-6)  # two ranks share the references
    for found, given in zip(means, lines, strict=True):
        assert {key: value for key, value in found.items() if key not in ("reward", "rewards")} == given


def test_a_line_with_odd_references_is_refused_before_any_model_is_loaded(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    for given, part in (
        ({"references": []}, "'references' is an empty list"),
        ({"references": ["a"], "reference": "a"}, "'references' is there beside 'reference'"),
        ({"references": ["a", 3]}, "references[1]=3"),
    ):
        source.write_text(json.dumps({"prompt": "p", "output": "o"} | given) + "\n")
        arguments = ["--checkpoint", str(tmp_path), "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
        assert cli.main(["score", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {source}:1: ")
        assert part in error


def test_the_server_and_its_client_average_alike(checkpoint, tmp_path):
    single = {key: value for key, value in ITEM.items() if key != "reference"}
    with serving(checkpoint, "--max-items", "12", directory=tmp_path) as server, server.client() as client:

        def ask(path: str, **body):
            reply = client.post(path, json=body)
            return reply.status_code, reply.json()

        _, plain = ask("/v1/score", items=[ITEM | {"reference": r} for r in REFERENCES])
        items = [single | {"references": [*REFERENCES, REFERENCES[0]]}, ITEM]
        status, found = ask("/v1/score", items=items, per_reference=True)
        assert status == 200
        np.testing.assert_allclose(found["per_reference"][0], plain["rewards"], atol=1e-6)
        assert found["rewards"][0] == mean_over_references(found["per_reference"][0])
        assert found["per_reference"][1] == [found["rewards"][1]]
        assert found["duplicate_references"] == [1, 0]
        assert found["truncated"] == [[False] * 3] * 2
        assert "per_reference" not in ask("/v1/score", items=items)[1]
        assert set(plain) == {"model", "rewards", "truncated"}
        long = single | {"references": ["li", "li " * 500]}
        assert ask("/v1/score", items=[long])[1]["truncated"] == [[True] * 3]

        queries = {"query": ["ba kera"] * 2, "prompts": ["ba ke"] * 2, "labels": [list(REFERENCES), REFERENCES[0]]}
        _, asked = ask("/get_reward", **queries)
        alone = [
            ask("/get_reward", query=["ba kera"], prompts=["ba ke"], labels=[r])[1]["rewards"][0] for r in REFERENCES
        ]
        np.testing.assert_allclose(asked["rewards"], [np.mean(alone), alone[0]], atol=1e-6)

        for body, part in (
            ({"items": [ITEM | {"references": ["a"]}]}, "items[0].references is there beside 'reference'"),
            ({"items": [single]}, "items[0].reference is missing"),
            ({"items": [single | {"references": []}]}, "items[0].references is an empty list"),
            ({"items": [single | {"references": ["a", {}]}]}, "items[0].references[1]: "),
            ({"items": [ITEM], "per_reference": 1}, "per_reference is a number"),
            ({"items": [single | {"references": list("abcde")}]}, "15 outputs, each counted once for each reference"),
        ):
            status, reply = ask("/v1/score", **body)
            assert status == 422
            assert part in reply["error"]["message"]
        for label, part in (([], "one reference or more"), (["a", 3], "strings alone"), (["a", ""], "is empty")):
            status, reply = ask("/get_reward", query=["ab"], prompts=["a"], labels=[label])
            assert status == 422
            assert part in reply["error"]["message"]

        with RewardClient(server.url, engine="megatron-polar") as rewards:
            given = [RewardItem("ba ke", list(REFERENCES), output, "sft") for output in ITEM["outputs"]]
            np.testing.assert_allclose(rewards.score(given), found["rewards"][0], atol=1e-6)
