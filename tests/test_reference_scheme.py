"""Reference schemes: each suite offers some and says so, and every output of an evaluation names the one in use."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from published_files import write_lines

from megatron_polar.errors import UserError
from megatron_polar.score.evaluate import evaluate
from megatron_polar.score.reference_scheme import (
    OFFERED,
    is_same_text,
    meaning,
    read_reference_answers,
    resolve_scheme,
)
from megatron_polar.score.report import evaluation_report
from megatron_polar.score.suites import SUITES, load_suite


class Lengths:
    def score(self, requests):
        return [[float(len(output)) for output in request.outputs] for request in requests]


def group(prompt: str, policies: dict[str, int]) -> dict:
    trajectories = [{"policy": p, "text": f"{p} on {prompt}, {i}"} for p, n in policies.items() for i in range(n)]
    return {"prompt": prompt, "trajectories": trajectories}


def policy_of(text: str) -> str:
    return text.split(" on ", maxsplit=1)[0]


# --- what is offered


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_a_default_and_refuses_in_one_line_what_it_cannot_offer(suite):
    assert resolve_scheme(suite, None) == OFFERED[suite][0]
    for scheme in ("gold", "policy:x", "leave-one-out", "none"):
        if re.sub(":.*", ":NAME", scheme) in OFFERED[suite]:
            assert resolve_scheme(suite, scheme) == scheme
            continue
        with pytest.raises(UserError) as caught:
            resolve_scheme(suite, scheme)
        message = str(caught.value)
        assert message.startswith(f"suite {suite!r} has no references for the scheme {scheme!r}; it offers ")
        assert all(offered in message for offered in OFFERED[suite]) and "\n" not in message


@pytest.mark.parametrize(
    ("suite", "scheme", "has_answers", "complaint"),
    [
        ("rmb", "golden", False, "reference scheme 'golden' is unknown; use gold, policy:NAME, leave-one-out or none"),
        ("rmb", "policy:", False, "reference scheme 'policy:' is unknown"),
        ("rmb", None, True, "reference answers are given and no scheme for them"),
        ("rmb", "none", True, "reference answers are for the schemes gold and policy:NAME, and 'none' takes none"),
        ("rm-bench", "leave-one-out", True, "reference answers are for the schemes gold and policy:NAME"),
        ("policies", "policy:a", True, "the references of the suite 'policies' are its own"),
    ],
)
def test_schemes_that_make_no_sense_are_refused(suite, scheme, has_answers, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        resolve_scheme(suite, scheme, has_answers=has_answers)


def test_answers_of_the_user_serve_any_suite_but_policies():
    for suite in SUITES:
        if suite != "policies":
            assert resolve_scheme(suite, "gold", has_answers=True) == "gold"
            assert resolve_scheme(suite, "policy:x", has_answers=True) == "policy:x"


def test_every_scheme_has_a_meaning():
    assert all(meaning(scheme) for scheme in ("gold", "policy:x", "leave-one-out", "none", "as given"))
    assert meaning("policy:a") == meaning("policy:b")


# --- what they do


def test_preferences_without_references_are_the_same_items_with_empty_ones(tmp_path):
    rows = [{"prompt": f"p{n}", "reference": "r", "chosen": "good", "rejected": "bad"} for n in range(5)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    gold, none = (load_suite("preferences", path, reference_scheme=scheme) for scheme in (None, "none"))
    assert {item.reference for item in gold} == {"r"} and {item.reference for item in none} == {""}
    assert [item.candidates for item in none] == [item.candidates for item in gold]


def test_policies_by_one_named_policy_and_without_references(tmp_path):
    rows = [group(f"p{number}", {"a": 2, "b": 3, "c": 1}) for number in range(40)]
    path = write_lines(tmp_path / "t.jsonl", rows)
    named = load_suite("policies", path, reference_scheme="policy:b", comparisons_per_group=4)
    assert {policy_of(item.reference) for item in named} == {item.reference_label for item in named} == {"b"}
    assert all(policy_of(item.candidates[0]) == "b" and item.labels[0] == "b" for item in named)
    assert Counter(item.labels[1] for item in named) == {"a": 80, "c": 80}
    none = load_suite("policies", path, reference_scheme="none")
    default = load_suite("policies", path)
    assert [item.candidates for item in none] == [item.candidates for item in default]
    assert {item.reference for item in none} == {""}
    assert [item.reference_label for item in none] == [policy_of(item.reference) for item in default]
    for missing in ("c", "z"):  # c has no second trajectory to be the reference
        with pytest.raises(UserError, match=f"'policy:{missing}'; .*; its policies are a, b, c"):
            load_suite("policies", path, reference_scheme=f"policy:{missing}")


def gsm8k(tmp_path: Path) -> Path:
    def solution(text: str, right: bool) -> dict:
        return {"is_correct": right, "solution": text}

    rows = [
        {"question": f"q{n}", "ground_truth": f"truth {n}", "m1": solution(f"m1 {n}", True)}
        | {"m2": solution(f"m2 {n}", n % 2 == 0), "m3": solution(f"m3 {n}", False)}
        for n in range(10)
    ]
    return write_lines(tmp_path / "solutions.jsonl", rows)


def test_gsm8k_takes_the_truth_another_right_solution_or_a_named_one(tmp_path):
    path = gsm8k(tmp_path)
    assert {item.reference.split()[0] for item in load_suite("gsm8k-all", path)} == {"truth"}
    others = load_suite("gsm8k-all", path, reference_scheme="leave-one-out")
    assert len(others) == 5  # only where two are right
    for item in others:
        assert {item.reference.split()[0], item.candidates[0].split()[0]} == {"m1", "m2"}
        assert item.candidates[1].startswith("m3")
    named = load_suite("gsm8k-all", path, reference_scheme="policy:m2")
    assert {(item.reference.split()[0], item.candidates[0].split()[0]) for item in named} == {("m2", "m1")}
    with pytest.raises(UserError, match="its policies are m1, m2, m3"):
        load_suite("gsm8k-all", path, reference_scheme="policy:m9")


def test_alpaca_eval_takes_the_best_liked_answer_or_a_named_one(tmp_path):
    for policy, preference in (("good", 1.99), ("middling", 1.9), ("poor", 1.01)):
        row = {"instruction": "Q", "output_1": "base on Q", "generator_1": "base", "output_2": f"{policy} on Q"}
        file = tmp_path / policy / "weighted_alpaca_eval_gpt4_turbo" / "annotations.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps([row | {"generator_2": policy, "preference": preference}]))
    (gold,) = load_suite("alpaca-eval", tmp_path)
    assert (gold.reference, gold.reference_label, policy_of(gold.candidates[0])) == (
        "good on Q",
        "good",
        gold.labels[0],
    )
    (named,) = load_suite("alpaca-eval", tmp_path, reference_scheme="policy:base")
    assert (named.reference, named.labels) == ("base on Q", named.labels) and "base" not in named.labels
    with pytest.raises(UserError, match=r"there are .*'middling'"):
        load_suite("alpaca-eval", tmp_path, reference_scheme="policy:gpt-9")


# --- answers of the user


def judge_file(tmp_path: Path) -> Path:
    rows = [
        {"pair_id": n, "source": "livecodebench", "question": f"q{n}", "label": "A>B"}
        | {"response_A": f"right {n}", "response_B": f"wrong {n}"}
        for n in range(4)
    ]
    return write_lines(tmp_path / "judge.jsonl", rows)


def test_answers_of_a_policy_become_references_but_never_a_candidate(tmp_path, capsys):
    trajectories = [
        [{"policy": "p", "text": "mine"}, {"policy": "p", "text": "mine too"}, {"policy": "z", "text": "other"}],
        [{"policy": "p", "text": " right 1\n"}, {"policy": "p", "text": "second"}],  # the first is a candidate
        [{"policy": "p", "text": "wrong 2"}],
    ]
    rows = [{"prompt": [{"role": "user", "content": f"q{n}"}], "trajectories": t} for n, t in enumerate(trajectories)]
    answers = write_lines(tmp_path / "answers.jsonl", rows)
    path = judge_file(tmp_path)
    items = load_suite("judgebench", path, reference_scheme="policy:p", reference_answers=answers)
    assert [(item.prompt, item.reference, item.reference_label) for item in items] == [
        ("q0", "mine", "p"),
        ("q1", "second", "p"),
    ]
    (item,) = load_suite("judgebench", path, reference_scheme="policy:p", reference_answers=answers, num_references=2)
    assert item.references == ("mine", "mine too")
    said = capsys.readouterr().err
    assert "skipped 1: item whose only reference answer is one of its candidates" in said
    assert "skipped 1: item without a reference answer for its prompt" in said
    with pytest.raises(UserError, match="no answer for the scheme 'policy:q' in it; there are answers of p, z"):
        load_suite("judgebench", path, reference_scheme="policy:q", reference_answers=answers)


def test_gold_answers_replace_the_references_of_preferences(tmp_path):
    answers = write_lines(tmp_path / "gold.jsonl", [{"prompt": "p", "reference": "better one"}])
    rows = [{"prompt": p, "reference": "r", "chosen": "good", "rejected": "bad"} for p in ("p", "q")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    (item,) = load_suite("preferences", path, reference_scheme="gold", reference_answers=answers)
    assert (item.prompt, item.reference) == ("p", "better one")


@pytest.mark.parametrize(
    ("line", "scheme"),
    [
        ({"prompt": "p"}, "gold"),
        ({"prompt": "p", "reference": 3}, "gold"),
        ({"prompt": "p", "reference": "r"}, "policy:a"),
        ({"prompt": "p", "trajectories": [{"policy": "a"}]}, "policy:a"),
        (["p"], "policy:a"),
    ],
)
def test_lines_that_are_no_answers_are_named(tmp_path, line, scheme):
    with pytest.raises(UserError, match=r"a\.jsonl:1: not a line of the form \{\"prompt\", ") as caught:
        read_reference_answers(write_lines(tmp_path / "a.jsonl", [line]), scheme)
    assert "\n" not in str(caught.value)


def test_texts_are_the_same_but_for_surrounding_space_and_empty_ones_are_no_free_win():
    assert is_same_text("a b", " a b\n") and not is_same_text("a b", "a  b") and not is_same_text("", "")


# --- every output names it


def test_summary_console_and_page_name_the_scheme(tmp_path, capsys):
    rows = [group(f"p{number}", {"a": 2, "b": 2, "<i>": 2}) for number in range(30)]
    path = write_lines(tmp_path / "t.jsonl", rows)
    items = load_suite("policies", path, reference_scheme="policy:a", comparisons_per_group=2)
    out = tmp_path / "out"
    summary = evaluate(Lengths(), items, output=out, suite="policies", reference_scheme="policy:a")
    assert "policies, reference policy:a: accuracy " in capsys.readouterr().err
    written = json.loads((out / "summary.json").read_text())
    assert (written["reference_scheme"], written["reference_scheme_meaning"]) == ("policy:a", meaning("policy:a"))
    assert written["policy_pairs"]["num_pairs"] == [[0, 0, 0], [30, 0, 30], [0, 0, 0]]
    assert written == summary
    page = evaluation_report(summary, rewards=out / "rewards.jsonl", output=out / "report.html").read_text()
    assert "reference: policy:a" in page and "the answer of one named policy" in page
    assert "&lt;i&gt;" in page and "<i>" not in page
    header, *lines = (out / "policy_pairs.csv").read_text().splitlines()
    assert header == "reference_policy,contrast_policy,num_pairs,accuracy,low,high"
    assert [line.split(",")[:3] for line in lines] == [["a", "<i>", "30"], ["a", "b", "30"]]
    first = json.loads((out / "rewards.jsonl").read_text().splitlines()[0])
    assert (first["labels"][0], first["reference_label"]) == ("a", "a")


def test_several_draws_per_prompt_are_for_policies_alone(tmp_path):
    with pytest.raises(UserError, match="in the suite 'policies' only, not in 'gsm8k'"):
        load_suite("gsm8k", tmp_path, comparisons_per_group=2)
