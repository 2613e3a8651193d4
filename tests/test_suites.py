"""Suites: the same items everywhere, the right levels and categories, and errors that say what to do."""

import gzip
import json
from collections import Counter

import pytest
from published_files import published, write_lines

from megatron_polar.errors import UserError
from megatron_polar.score.evaluate import evaluate
from megatron_polar.score.suites import EvaluationItem, load_suite


def group(prompt: str, policies: dict[str, int], **more) -> dict:
    trajectories = [{"policy": p, "text": f"{p} on {prompt}, {i}"} for p, n in policies.items() for i in range(n)]
    return {"prompt": prompt, "trajectories": trajectories} | more


def policy_of(text: str) -> str:
    return text.split(" on ", maxsplit=1)[0]


class WordOverlap:
    """Rewards the share of words that an output has in common with the reference."""

    def score(self, requests):
        def rate(reference: str, output: str) -> float:
            words, others = set(reference.split()), set(output.split())
            return len(words & others) / max(1, len(words | others))

        return [[rate(request.reference, output) for output in request.outputs] for request in requests]


# --- preferences


def test_preferences_and_rankings_become_items_best_first(tmp_path):
    rows = [
        {"prompt": "p", "reference": "r", "chosen": "good", "rejected": "bad", "meta": {"category": "chat"}},
        {"prompt": "q", "reference": "s", "ranked": ["1", "2", "3"], "wrapper": "pretrain", "dataset": "own"},
        {"prompt": [{"role": "user", "content": "x"}], "reference": "t", "chosen": "c", "rejected": "d"},
    ]
    items = load_suite("preferences", write_lines(tmp_path / "a.jsonl", rows), default_wrapper="sft")
    assert items == [
        EvaluationItem("a.jsonl:1", "p", "r", ("good", "bad"), (0, 1), "chat", "sft"),
        EvaluationItem("a.jsonl:2", "q", "s", ("1", "2", "3"), (0, 1, 2), "own", "pretrain"),
        EvaluationItem("a.jsonl:3", "x", "t", ("c", "d"), (0, 1), "preferences", "sft"),
    ]


def test_identifiers_are_unique_in_a_directory_and_free_of_the_machine(tmp_path):
    row = {"prompt": "p", "reference": "r", "chosen": "good", "rejected": "bad"}
    write_lines(tmp_path / "one" / "x" / "a.jsonl", [row, row])
    (tmp_path / "one" / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    items = load_suite("preferences", tmp_path / "one")
    assert sorted(item.identifier for item in items) == ["b.jsonl.gz:1", "x/a.jsonl:1", "x/a.jsonl:2"]


def test_limit_draws_the_same_items_in_file_order_and_the_seed_changes_them(tmp_path):
    rows = [{"prompt": f"p{i}", "reference": "r", "chosen": "good", "rejected": "bad"} for i in range(300)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    everything = load_suite("preferences", path)
    drawn = load_suite("preferences", path, limit=40, seed=1)
    assert len(drawn) == 40
    assert drawn == load_suite("preferences", path, limit=40, seed=1)
    assert [everything.index(item) for item in drawn] == sorted(everything.index(item) for item in drawn)
    assert drawn != load_suite("preferences", path, limit=40, seed=2)
    assert set(drawn) < set(load_suite("preferences", path, limit=80, seed=1))
    assert load_suite("preferences", path, limit=9999) == everything


# --- policies


def test_policy_items_compare_a_second_sample_with_another_policy(tmp_path):
    rows = [group(f"p{i}", {"a": 2, "b": 2, "c": 1}, meta={"dataset": "d"} if i % 2 else {}) for i in range(120)]
    path = write_lines(tmp_path / "t.jsonl", rows)
    items = load_suite("policies", path, seed=3)
    assert items == load_suite("policies", path, seed=3)
    assert items != load_suite("policies", path, seed=4)
    assert len(items) == 120
    for item in items:
        same, other = item.candidates
        assert policy_of(item.reference) == policy_of(same) != policy_of(other)
        assert (item.reference != same, item.levels, item.wrapper) == (True, (0, 1), "sft")
    assert Counter(item.category for item in items) == {"policy": 60, "d": 60}
    pairs = Counter((policy_of(item.reference), policy_of(item.candidates[1])) for item in items)
    # c has one sample and is never the reference; the four other pairs of policies are drawn alike (30 each expected).
    assert set(pairs) == {("a", "b"), ("a", "c"), ("b", "a"), ("b", "c")}
    assert all(15 <= count <= 45 for count in pairs.values())


def test_several_comparisons_of_a_group_use_every_pair_of_policies_before_any_twice(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [group("p", {"a": 3, "b": 2, "c": 1})])
    items = load_suite("policies", path, comparisons_per_group=5)
    assert [item.identifier for item in items] == [f"t.jsonl:1#{i}" for i in range(5)]
    pairs = [(policy_of(item.reference), policy_of(item.candidates[1])) for item in items]
    assert len(set(pairs[:4])) == 4
    everything = load_suite("policies", path, comparisons_per_group=10_000)
    # a as reference: 3 * 2 ordered pairs of samples * 3 others; b: 2 * 4
    assert len(everything) == len({(i.reference, i.candidates) for i in everything}) == 6 * 3 + 2 * 4


def test_equal_texts_are_never_compared(tmp_path):
    same = [{"policy": "a", "text": "x"}, {"policy": "a", "text": "x"}, {"policy": "b", "text": "y"}]
    fine = [{"policy": "a", "text": "x"}, {"policy": "a", "text": "z"}, {"policy": "b", "text": "x"}]
    usable = [*fine, {"policy": "b", "text": "w"}]
    rows = [{"prompt": "p", "trajectories": trajectories} for trajectories in (same, fine, usable)]
    items = load_suite("policies", write_lines(tmp_path / "t.jsonl", rows), comparisons_per_group=99)
    assert {item.identifier.split("#")[0] for item in items} == {"t.jsonl:3"}
    assert all(len({item.reference, *item.candidates}) == 3 for item in items)


# --- errors


@pytest.mark.parametrize(("name", "nearest"), [("preference", "preferences"), ("policy", "policies"), ("gsm", "gsm8k")])
def test_an_unknown_suite_names_the_nearest_one(tmp_path, name, nearest):
    with pytest.raises(UserError, match=f"suite '{name}' is unknown; did you mean '{nearest}'"):
        load_suite(name, tmp_path)


def test_lines_of_the_other_kind_point_to_the_other_suite(tmp_path):
    trajectories = write_lines(tmp_path / "t.jsonl", [group("p", {"a": 2, "b": 1})])
    preferences = write_lines(tmp_path / "p.jsonl", [{"prompt": "p", "reference": "r", "chosen": "c", "rejected": "d"}])
    with pytest.raises(UserError, match=r"t\.jsonl:1: .*use --suite policies"):
        load_suite("preferences", trajectories)
    with pytest.raises(UserError, match=r"p\.jsonl:1: .*use --suite preferences"):
        load_suite("policies", preferences)


def test_nothing_to_evaluate_is_an_error(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [])
    with pytest.raises(UserError, match="no comparison for the suite 'preferences'"):
        load_suite("preferences", path)
    with pytest.raises(UserError, match="limit=0"):
        load_suite("preferences", path, limit=0)
    with pytest.raises(UserError, match="comparisons_per_group=0"):
        load_suite("policies", path, comparisons_per_group=0)
    bad = write_lines(tmp_path / "b.jsonl", [{"prompt": "p"}])
    with pytest.raises(UserError, match=r"b\.jsonl:1"):
        load_suite("preferences", bad)


# --- publishers' files


def test_gsm8k_evaluates_heldout_problems_and_on_demand_all(tmp_path):
    rows = [
        {"question": f"problem {i}", "ground_truth": "A: 2"}
        | {"m1": {"is_correct": True, "solution": f"1 + 1 = 2, {i}"}}
        | {"m2": {"is_correct": False, "solution": f"1 + 1 = 3, {i}"}}
        for i in range(100)
    ]
    path = write_lines(tmp_path / "solutions.jsonl", rows)
    everything, heldout = load_suite("gsm8k-all", path), load_suite("gsm8k", path)
    assert len(everything) == 100
    prompts = {item.prompt for item in everything}
    assert {item.prompt for item in heldout} < prompts
    assert 5 <= len(heldout) <= 40  # 20 of 100 expected
    assert {(item.reference, item.levels, item.category) for item in heldout} == {
        ("A: 2", (0, 1), "1 of 2 models right")
    }


@pytest.mark.parametrize(
    ("suite", "name", "count"),
    [
        ("gsm8k", "gsm8k/example_model_solutions.jsonl", 102),
        ("gsm8k-all", "gsm8k/example_model_solutions.jsonl", 561),
        ("rmb", "rmb/RMB_dataset", 779),
        ("preferences", "alpaca_eval/preferences_eval.jsonl.gz", 1200),
    ],
)
def test_published_data_is_evaluated_from_end_to_end(tmp_path, suite, name, count):
    items = load_suite(suite, published(name))
    assert len(items) == len({item.identifier for item in items}) == count
    summary = evaluate(WordOverlap(), items, output=tmp_path, suite=suite)
    assert (summary["num_pairs"], summary["swap_check"]) == (count, "passed")
    assert summary["swapped_accuracy"] == pytest.approx(1 - summary["accuracy"], abs=1e-12)
    assert sum(entry["num_pairs"] for entry in summary["categories"].values()) == count
    assert summary["accuracy"] == summary["word_overlap_accuracy"]  # computed apart, in statistics.py
    # Word overlap with a good answer says something about all of these sets, and never everything.
    assert 0.5 < summary["accuracy"] < 0.9
    if suite == "preferences":
        # polar_method's caveat about AlpacaEval: the longer answer wins about 82 % of the pairs
        assert 0.78 < summary["length_only_accuracy"] < 0.86
        assert abs(summary["length_only_accuracy_when_matched"] - 0.5) < 0.15


def test_published_rmb_limit_keeps_whole_items():
    drawn = load_suite("rmb", published("rmb"), limit=50, seed=7)
    assert len(drawn) == 50
    assert set(drawn) < set(load_suite("rmb", published("rmb")))
