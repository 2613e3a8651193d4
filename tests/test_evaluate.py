"""evaluate: what it writes, and that its label-swap self-check passes for scorers of text and fails for others."""

import dataclasses
import errno
import json

import pytest

from megatron_polar.errors import UserError
from megatron_polar.manifest import HashedFile
from megatron_polar.scaling.items import read_items
from megatron_polar.score.evaluate import evaluate, exit_status, swap_labels
from megatron_polar.score.report import read_rewards
from megatron_polar.score.requests import ScoreRequest
from megatron_polar.score.suites import EvaluationItem


class WordOverlap:
    """Rewards the share of words that an output has in common with the reference: a scorer of text, if a poor one."""

    def __init__(self):
        self.requests: list[ScoreRequest] = []

    def score(self, requests):
        self.requests += requests
        return [[self._rate(request.reference, output) for output in request.outputs] for request in requests]

    @staticmethod
    def _rate(reference: str, output: str) -> float:
        words, others = set(reference.split()), set(output.split())
        return len(words & others) / max(1, len(words | others))


class PrefersTheFirst(WordOverlap):
    """What a bug in packing would look like: the reward depends on where an output stands."""

    def score(self, requests):
        return [[-float(index) for index in range(len(request.outputs))] for request in requests]


class Drifts(WordOverlap):
    """Adds to later outputs what a change of batch adds in bf16: next to nothing, but enough to break a tie."""

    def score(self, requests):
        return [[reward + 0.001 * index for index, reward in enumerate(row)] for row in super().score(requests)]


ITEMS = [
    EvaluationItem("f:1", "Name fruit.", "apples and pears", ("apples and plums", "stones"), (0, 1), "food", "sft"),
    EvaluationItem("f:2", "Name stones.", "marble or slate", ("granite", "marble or chalk"), (0, 1), "earth", "sft"),
    EvaluationItem(
        "f:3", "Say it.", "one two three", ("one two three", "one two", "one"), (0, 1, 2), "food", "pretrain"
    ),
]


def test_summary_and_rewards_say_what_the_scorer_said(tmp_path, capfd):
    scorer = WordOverlap()
    summary = evaluate(scorer, ITEMS, output=tmp_path / "new", suite="preferences")
    # f:1 right, f:2 wrong, f:3 three right pairs
    assert summary["accuracy"] == pytest.approx(4 / 5)
    assert summary["macro_accuracy"] == pytest.approx((1 + 0) / 2)
    assert summary["swapped_accuracy"] == pytest.approx(1 / 5)
    assert (summary["swap_check"], exit_status(summary)) == ("passed", 0)
    assert summary["swap_largest_reward_difference"] == 0
    assert summary["items_with_reference_among_candidates"] == 1
    assert "1 of 3 items have their reference among the candidates" in capfd.readouterr().err
    assert {name: entry["num_pairs"] for name, entry in summary["categories"].items()} == {"food": 4, "earth": 1}
    assert json.loads((tmp_path / "new" / "summary.json").read_text()) == summary
    lines = [json.loads(line) for line in (tmp_path / "new" / "rewards.jsonl").read_text().splitlines()]
    assert [line["identifier"] for line in lines] == ["f:1", "f:2", "f:3"]
    assert lines[2] == {"identifier": "f:3", "category": "food", "levels": [0, 1, 2], "rewards": [1.0, 2 / 3, 1 / 3]}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["rewards.jsonl", "summary.json"]
    assert scorer.requests[2] == ScoreRequest(
        "Say it.", "one two three", ("one two three", "one two", "one"), "pretrain"
    )


@pytest.mark.parametrize("items_per_request", [1, 2, 100])
def test_figures_do_not_depend_on_the_size_of_requests(tmp_path, items_per_request):
    summary = evaluate(WordOverlap(), ITEMS, output=tmp_path, suite="s", items_per_request=items_per_request)
    assert (summary["accuracy"], summary["swapped_accuracy"]) == (pytest.approx(0.8), pytest.approx(0.2))


def test_a_scorer_of_positions_fails_the_label_swap_check(tmp_path, capsys):
    summary = evaluate(PrefersTheFirst(), ITEMS, output=tmp_path, suite="preferences")
    assert (summary["accuracy"], summary["swapped_accuracy"]) == (1.0, 1.0)
    assert summary["swap_check"].startswith("FAILED: accuracy 1.0000 became 1.0000")
    assert exit_status(summary) == 1
    assert "warning: preferences: label-swap check FAILED" in capsys.readouterr().err


def test_numerical_noise_on_near_ties_is_no_failure_but_is_reported(tmp_path):
    tied = EvaluationItem("f:4", "p", "one two", ("one", "two"), (0, 1), "food", "sft")  # equal but for the noise
    summary = evaluate(Drifts(), [ITEMS[0], ITEMS[1], tied], output=tmp_path, suite="s")
    assert summary["accuracy"] + summary["swapped_accuracy"] != 1
    assert (summary["swap_check"], summary["swap_largest_reward_difference"] > 0) == ("passed", True)


def test_swapping_labels_twice_gives_the_item_back_and_keeps_equal_levels_equal():
    partly = EvaluationItem("f:1", "p", "r", ("a", "b", "c"), (0, 2, 2), "x", "sft")
    swapped = swap_labels(partly)
    assert (swapped.candidates, swapped.levels) == (("c", "b", "a"), (0, 0, 2))
    assert swap_labels(swapped) == partly
    named = dataclasses.replace(partly, labels=("x", "y", "z"), reference_label="x")
    assert (swap_labels(named).labels, swap_labels(swap_labels(named))) == (("z", "y", "x"), named)


def test_rewards_that_are_not_finite_stop_the_evaluation_and_leave_no_summary(tmp_path):
    class Broken(WordOverlap):
        def score(self, requests):
            return [[float("nan")] * len(request.outputs) for request in requests]

    with pytest.raises(UserError, match=r"f:1: rewards .* are not finite"):
        evaluate(Broken(), ITEMS, output=tmp_path, suite="s")
    assert not list(tmp_path.iterdir())


def test_no_items_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no items to evaluate"):
        evaluate(WordOverlap(), [], output=tmp_path, suite="rmb")


def test_losses_compare_only_where_texts_references_and_scheme_are_the_same(tmp_path):
    """Files of one name with other texts have the same identifiers: those must not vouch for them."""

    def identity(name: str, items=ITEMS, **settings) -> str:
        evaluate(WordOverlap(), items, output=tmp_path / name, suite="preferences", **settings)
        return read_items(tmp_path / name).identity

    first = identity("first")
    assert identity("again") == first
    other_text = [dataclasses.replace(ITEMS[0], candidates=("apples and plums", "pebbles")), *ITEMS[1:]]
    other_reference = [dataclasses.replace(ITEMS[0], reference="apples"), *ITEMS[1:]]
    assert first not in (identity("text", other_text), identity("reference", other_reference))
    assert identity("scheme", reference_scheme="none") != first


def test_an_evaluation_that_is_cut_off_leaves_no_older_summary_beside_its_rewards(tmp_path, monkeypatch):
    evaluate(WordOverlap(), ITEMS, output=tmp_path, suite="preferences")

    def cut(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_polar.score.evaluate.compute_statistics", cut)
    with pytest.raises(KeyboardInterrupt):
        evaluate(WordOverlap(), ITEMS[:2], output=tmp_path, suite="preferences")
    assert len((tmp_path / "rewards.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "summary.json").exists()


def test_the_page_takes_names_with_line_separators(tmp_path):
    items = [dataclasses.replace(item, category="one\u2028two\x85three") for item in ITEMS]
    evaluate(WordOverlap(), items, output=tmp_path, suite="preferences")
    assert len(read_rewards(tmp_path / "rewards.jsonl")["best answers"]) == 3


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(WordOverlap(), ITEMS, output=tmp_path, suite="preferences")
    assert not list(tmp_path.iterdir())
