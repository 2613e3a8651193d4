"""Importers, on small files in the publishers' formats and, where they are at hand, on the publishers' own."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from published_files import published, write_json, write_lines

from megatron_polar.data import public
from megatron_polar.data.records import Preference, TrajectoryGroup, parse_record
from megatron_polar.errors import UserError

REPOSITORY = Path(__file__).parent.parent


def parsed(records):
    return [parse_record(json.dumps(r), source="import", line_number=i) for i, r in enumerate(records, start=1)]


# --- AlpacaEval


def outputs(policy: str, answers: dict[str, str]) -> list[dict]:
    return [
        {"dataset": "koala", "instruction": instruction, "output": output, "generator": policy}
        for instruction, output in answers.items()
    ]


def run_results(root: Path, run: dict[str, dict[str, str]]) -> Path:
    for policy, answers in run.items():
        write_json(root / policy / "model_outputs.json", outputs(policy, answers))
    return root


def test_two_sampling_runs_merge_into_groups_with_same_policy_pairs(tmp_path):
    first = run_results(tmp_path / "1", {"m1": {"Q": "a", "R": "x"}, "m2": {"Q": "b", "R": "y"}})
    second = run_results(tmp_path / "2", {"m1": {"Q": "a2", "R": "x"}})
    skipped = Counter()
    records = list(public.alpaca_eval_trajectories([first, second], skipped=skipped))
    assert [record["prompt"] for record in records] == ["Q"]  # m1 gave R the same text twice
    (group,) = parsed(records)
    assert isinstance(group, TrajectoryGroup)
    assert [(t.policy, t.text) for t in group.trajectories] == [("m1", "a"), ("m2", "b"), ("m1", "a2")]
    assert skipped == {
        "trajectory repeated by its own policy": 1,
        "instruction without a same-policy pair and another policy": 1,
    }


def test_one_run_alone_is_refused_unless_single_trajectories_are_allowed(tmp_path):
    results = run_results(tmp_path / "1", {"m1": {"Q": "a"}, "m2": {"Q": "b"}})
    with pytest.raises(UserError, match="no policy answers an instruction twice"):
        list(public.alpaca_eval_trajectories([results], skipped=Counter()))
    (record,) = public.alpaca_eval_trajectories([results], allow_single=True, skipped=Counter())
    assert [t["policy"] for t in record["trajectories"]] == ["m1", "m2"]


def annotate(root: Path, policy: str, preferences: dict[str, float | None], baseline: str = "base") -> None:
    rows = [
        {"instruction": q, "output_1": f"base on {q}", "generator_1": baseline, "dataset": "koala"}
        | {"output_2": f"{policy} on {q}", "generator_2": policy, "annotator": "a", "preference": preference}
        for q, preference in preferences.items()
    ]
    write_json(root / policy / public.ALPACA_EVAL_ANNOTATOR / "annotations.json", rows)


def test_annotations_become_preferences_with_the_best_answer_as_reference(tmp_path):
    annotate(tmp_path, "good", {"Q": 1.99, "R": 1.4})
    annotate(tmp_path, "middling", {"Q": 1.9, "R": 1.45})
    annotate(tmp_path, "poor", {"Q": 1.01, "R": None})
    skipped = Counter()
    records = list(public.alpaca_eval_preferences(tmp_path, pairs_per_prompt=9, skipped=skipped))
    # R: the baseline (1.5) is the best, and the other two are 0.05 apart.
    assert {record["reference"] for record in records} == {"good on Q"}
    pairs = {(record["chosen"], record["rejected"]): record["meta"]["margin"] for record in records}
    assert pairs == {
        ("middling on Q", "base on Q"): 0.4,
        ("middling on Q", "poor on Q"): 0.89,
        ("base on Q", "poor on Q"): 0.49,
    }
    assert skipped == {"annotation without a preference": 1, "instruction without a pair of the margin asked for": 1}
    assert all(isinstance(record, Preference) for record in parsed(records))


def test_a_preference_of_0_is_a_draw_and_what_is_no_preference_is_left_out(tmp_path):
    for policy, preference in {"draw": 0, "loses": 1, "wins": 2, "nan": float("nan"), "true": True, "far": 3}.items():
        annotate(tmp_path, policy, {"Q": preference})
    skipped = Counter()
    records = list(public.alpaca_eval_preferences(tmp_path, pairs_per_prompt=9, skipped=skipped))
    pairs = {(record["chosen"], record["rejected"]) for record in records}
    assert pairs == {("base on Q", "loses on Q"), ("draw on Q", "loses on Q")}
    assert skipped == {"annotation without a preference": 3}


def test_a_named_reference_policy_is_never_one_of_the_pair(tmp_path):
    annotate(tmp_path, "good", {"Q": 1.99})
    annotate(tmp_path, "poor", {"Q": 1.01})
    (record,) = public.alpaca_eval_preferences(tmp_path, reference_policy="base", pairs_per_prompt=9, skipped=Counter())
    assert (record["reference"], record["chosen"], record["rejected"]) == ("base on Q", "good on Q", "poor on Q")
    with pytest.raises(UserError, match="no annotations of --reference-policy 'gpt-9'"):
        list(public.alpaca_eval_preferences(tmp_path, reference_policy="gpt-9", skipped=Counter()))


def test_preferences_against_different_baselines_are_refused(tmp_path):
    annotate(tmp_path, "good", {"Q": 1.9})
    annotate(tmp_path, "poor", {"Q": 1.1}, baseline="another")
    with pytest.raises(UserError, match=r"poor.*annotations.json: entry 0: generator_1 is 'another'"):
        list(public.alpaca_eval_preferences(tmp_path, skipped=Counter()))


def test_published_alpaca_eval_outputs_are_read_completely():
    results = published("alpaca_eval/train/results")
    records = list(public.alpaca_eval_trajectories([results], allow_single=True, skipped=Counter()))
    assert (len(records), {len(record["trajectories"]) for record in records}) == (544, {39, 40})
    assert {record["meta"]["dataset"] for record in records} == {
        "selfinstruct", "oasst", "koala", "helpful_base", "vicuna",
    }  # fmt: skip
    with pytest.raises(UserError, match="no policy answers an instruction twice"):
        list(public.alpaca_eval_trajectories([results, results], skipped=Counter()))  # the same run twice adds nothing


# --- GSM8K


def gsm8k_row(question: str, right: list[bool]) -> dict:
    models = {f"m{i}": {"is_correct": r, "solution": f"{i}: <<1+1=2>>2 {question}"} for i, r in enumerate(right)}
    return {"question": question, "ground_truth": f"truth of {question}"} | models


def test_gsm8k_pairs_are_a_right_and_a_wrong_solution_beside_the_truth(tmp_path):
    rows = [gsm8k_row("A?", [True, False, False, True]), gsm8k_row("B?", [True] * 4), gsm8k_row("C?", [False] * 4)]
    path = write_lines(tmp_path / "solutions.jsonl", rows)
    skipped = Counter()
    (record,) = public.gsm8k_preferences(path, skipped=skipped)
    assert skipped == {"problem without both a right and a wrong solution": 2}
    assert record["reference"] == "truth of A?"
    assert record["chosen"] in {"0: <<1+1=2>>2 A?", "3: <<1+1=2>>2 A?"}  # the calculator's marks stay
    assert record["rejected"] in {"1: <<1+1=2>>2 A?", "2: <<1+1=2>>2 A?"}
    assert record["meta"]["category"] == "2 of 4 models right"
    everything = list(public.gsm8k_preferences(path, pairs_per_problem=99, skipped=Counter()))
    assert len({(r["chosen"], r["rejected"]) for r in everything}) == 4
    assert everything[0] == record  # asking for more keeps the first


def test_gsm8k_draws_depend_on_the_seed_and_on_nothing_else_in_the_file(tmp_path):
    rows = [gsm8k_row(f"problem {i}", [True, True, False, False]) for i in range(50)]
    forward = write_lines(tmp_path / "a.jsonl", rows)
    backward = write_lines(tmp_path / "b.jsonl", rows[::-1])
    first = list(public.gsm8k_preferences(forward, skipped=Counter()))
    assert first == list(public.gsm8k_preferences(backward, skipped=Counter()))[::-1]
    assert first != list(public.gsm8k_preferences(forward, seed=1, skipped=Counter()))


def test_gsm8k_splits_share_no_problem_and_cover_all_whatever_the_seed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [gsm8k_row(f"problem {i}", [True, False]) for i in range(300)])
    train, heldout, everything = (
        {r["prompt"] for r in public.gsm8k_preferences(path, split=split, seed=seed, skipped=Counter())}
        for seed, split in enumerate(("train", "heldout", "all"))
    )
    assert not train & heldout
    assert train | heldout == everything
    assert 30 <= len(heldout) <= 90  # 20 % of 300, plus or minus more than four standard deviations


def test_published_gsm8k_solutions_give_one_pair_per_problem_that_has_one():
    path = published("gsm8k/example_model_solutions.jsonl")
    counts = {s: len(list(public.gsm8k_preferences(path, split=s, skipped=Counter()))) for s in ("train", "heldout")}
    assert counts == {"train": 459, "heldout": 102}
    pairs = list(public.gsm8k_preferences(path, pairs_per_problem=4, skipped=Counter()))
    # 229, 180 and 152 problems have 1, 2 and 3 right solutions of 4; three pairs hold a text twice.
    assert len(pairs) == 229 * 3 + 180 * 4 + 152 * 3 - 3


# --- RMB


def answer(name: str, text: str | None = None) -> dict:
    return {"llm_name": name, "answer": text if text is not None else f"answer of {name}"}


def rmb_tree(root: Path, *, pairwise: list, best_of: list, category: str = "Helpfulness/Chat/Discussion") -> Path:
    conversation = [{"content": "Hello", "language": "English", "role": "user"}]
    pairs = [
        {"pair_uid": str(i), "conversation_input": conversation, "chosen": answer(*c), "reject": answer(*r)}
        for i, (c, r) in enumerate(pairwise)
    ]
    tuples = [
        {
            "bon_uid": str(i),
            "conversation_input": conversation,
            "bon_best": answer(b),
            "loser_list": list(map(answer, ls)),
        }
        for i, (b, ls) in enumerate(best_of)
    ]
    write_json(root / "RMB_dataset" / "Pairwise_set" / f"{category}.json", pairs)
    write_json(root / "RMB_dataset" / "BoN_set" / f"{category}.json", tuples)
    return root


def rmb_trios(root: Path, trios_per_conversation: int | None = None) -> list[tuple[str, str, str]]:
    records = public.rmb_preferences(root, trios_per_conversation=trios_per_conversation, skipped=Counter())
    short = [
        tuple(record[key].removeprefix("answer of ") for key in ("reference", "chosen", "rejected"))
        for record in records
    ]
    return short


def test_rmb_joins_best_of_n_with_pairwise_judgements_of_its_losers(tmp_path):
    root = rmb_tree(tmp_path, pairwise=[(("b",), ("c",))], best_of=[("a", ["b", "c", "d"])])
    (record,) = public.rmb_preferences(root, skipped=Counter())
    assert rmb_trios(root) == [("a", "b", "c")]  # nothing is known of d beside b and c
    assert record["meta"] == {
        "category": "Helpfulness/Chat",
        "subcategory": "Discussion",
        "judged_directly": True,
        "reference_policy": "a",
        "chosen_policy": "b",
        "rejected_policy": "c",
        "answers_below_reference": 3,
    }
    assert record["prompt"] == [{"role": "user", "content": "Hello"}]
    assert isinstance(parsed([record])[0], Preference)


def test_rmb_losers_alone_have_no_order(tmp_path):
    skipped = Counter()
    root = rmb_tree(tmp_path, pairwise=[], best_of=[("a", ["b", "c"])])
    assert not list(public.rmb_preferences(root, skipped=skipped))
    assert skipped == {"conversation whose judgements rank no three answers": 1}


def test_rmb_takes_only_answers_that_nothing_beats_as_reference(tmp_path):
    chain = [(("a",), ("b",)), (("b",), ("c",)), (("c",), ("d",)), (("x",), ("c",))]
    root = rmb_tree(tmp_path, pairwise=chain, best_of=[])
    assert set(rmb_trios(root)) == {("a", "b", "c"), ("a", "c", "d"), ("x", "c", "d")}
    assert rmb_trios(root, 1)[0][0] == "a"  # it is above three answers, x above two


def test_rmb_leaves_out_equal_and_empty_answers_and_contradictions(tmp_path):
    pairwise = [(("a",), ("b",)), (("b",), ("c",)), (("b", "same"), ("d", "same")), (("a",), ("e", " "))]
    skipped = Counter()
    root = rmb_tree(tmp_path / "1", pairwise=pairwise, best_of=[])
    list(public.rmb_preferences(root, skipped=skipped))
    assert skipped == {"judgement between equal or empty answers": 2}
    circle = [(("a",), ("b",)), (("b",), ("c",)), (("c",), ("b",))]
    assert rmb_trios(rmb_tree(tmp_path / "2", pairwise=circle, best_of=[])) == []


def test_rmb_judgements_of_different_goals_are_not_joined(tmp_path):
    root = rmb_tree(tmp_path, pairwise=[], best_of=[("a", ["b", "c"])], category="Harmlessness/S1")
    root = rmb_tree(root, pairwise=[(("b",), ("c",))], best_of=[], category="Helpfulness/Chat/Discussion")
    assert rmb_trios(root) == []


def test_rmb_folder_without_both_sets_is_an_error(tmp_path):
    (tmp_path / "BoN_set").mkdir()
    with pytest.raises(UserError, match="no folder Pairwise_set"):
        list(public.rmb_preferences(tmp_path, skipped=Counter()))


RMB_COUNTS = {
    "Harmlessness": 357,
    "Helpfulness/Brainstorming": 6,
    "Helpfulness/Chat": 27,
    "Helpfulness/Classification": 5,
    "Helpfulness/Closed QA": 47,
    "Helpfulness/Code": 77,
    "Helpfulness/Generation": 19,
    "Helpfulness/Open QA": 58,
    "Helpfulness/Reasoning": 68,
    "Helpfulness/Rewrite": 26,
    "Helpfulness/Role Playing": 12,
    "Helpfulness/Summarization": 21,
    "Helpfulness/Translation": 56,
}


def test_published_rmb_gives_one_trio_for_every_conversation_that_ranks_three_answers():
    root = published("rmb")
    records = list(public.rmb_preferences(root, skipped=Counter()))
    assert Counter(record["meta"]["category"] for record in records) == RMB_COUNTS
    judged = rmb_judgements_as_published(root)
    for record in records:
        reference, chosen, rejected = record["reference"], record["chosen"], record["rejected"]
        key = json.dumps([record["prompt"], record["meta"]["category"]])
        assert (chosen, rejected) in judged[key]
        assert record["meta"]["judged_directly"] == ({(reference, chosen), (reference, rejected)} <= judged[key])
    assert len(list(public.rmb_preferences(root, trios_per_conversation=None, skipped=Counter()))) == 2596


def rmb_judgements_as_published(root: Path) -> dict[str, set[tuple[str, str]]]:
    """Collect (better, worse) texts per conversation and category, read apart from the importer."""
    judged: dict[str, set[tuple[str, str]]] = {}
    for path in root.glob("RMB_dataset/*_set/**/*.json"):
        category = "/".join(path.relative_to(root).parts[2:-1])
        for row in json.loads(path.read_text(encoding="utf-8")):
            prompt = [{"role": turn["role"], "content": turn["content"]} for turn in row["conversation_input"]]
            best = row["chosen"] if "chosen" in row else row["bon_best"]
            pairs = {(best["answer"], loser["answer"]) for loser in row.get("loser_list", [row.get("reject")])}
            judged.setdefault(json.dumps([prompt, category]), set()).update(pairs)
    return judged


def test_published_rmb_loser_lists_carry_no_order():
    # Where the pairwise set judges two losers of one list, the earlier one is the better in half of the cases.
    root = published("rmb")
    judged, earlier = rmb_judgements_as_published(root), Counter()
    for path in root.glob("RMB_dataset/BoN_set/**/*.json"):
        category = "/".join(path.relative_to(root).parts[2:-1])
        for row in json.loads(path.read_text(encoding="utf-8")):
            prompt = [{"role": turn["role"], "content": turn["content"]} for turn in row["conversation_input"]]
            pairs = judged[json.dumps([prompt, category])]
            texts = [loser["answer"] for loser in row["loser_list"]]
            for i, first in enumerate(texts):
                for second in texts[i + 1 :]:
                    earlier[True] += (first, second) in pairs
                    earlier[False] += (second, first) in pairs
    assert earlier.total() > 300
    assert abs(earlier[True] / earlier.total() - 0.5) < 0.05


# --- HH-RLHF

HH_START = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Name a fruit\n\nAssistant: "


def test_hh_rlhf_takes_the_common_turns_as_prompt_and_references_from_another_file(tmp_path):
    rows = [
        {"chosen": HH_START + "Apple.", "rejected": HH_START + "Stone."},
        {"chosen": HH_START + "same", "rejected": HH_START + "same"},
        {"chosen": HH_START + "Pear.", "rejected": "\n\nHuman: Other\n\nAssistant: Stone."},
        {"chosen": "\n\nHuman: No reference\n\nAssistant: a", "rejected": "\n\nHuman: No reference\n\nAssistant: b"},
        {"chosen": HH_START + "A pear, say.", "rejected": HH_START + "Stone."},
    ]
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    prompt = [{"role": "user", "content": "Hi there\nHello."}, {"role": "user", "content": "Name a fruit"}]
    references = write_lines(tmp_path / "references.jsonl", [{"prompt": prompt, "reference": "A pear, say."}])
    skipped = Counter()
    (record,) = public.hh_rlhf_preferences(path, references=references, skipped=skipped)
    assert record["prompt"] == [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Name a fruit"},
    ]
    assert (record["reference"], record["chosen"], record["rejected"]) == ("A pear, say.", "Apple.", "Stone.")
    assert skipped == {
        "equal transcripts": 1,
        "transcripts that differ in more than their last assistant turn": 1,
        "prompt without a reference": 1,
        "answer with the text of its reference": 1,
    }
    without = list(public.hh_rlhf_preferences(path, references=None, skipped=Counter()))
    assert [(r["reference"], r["meta"]["reference"]) for r in without] == [("", "none")] * 3
    assert all(isinstance(record, Preference) for record in parsed(without))


def test_hh_rlhf_without_a_usable_pair_or_in_another_format_is_an_error(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"chosen": HH_START + "x", "rejected": HH_START + "y"}])
    references = write_lines(tmp_path / "references.jsonl", [{"prompt": "unrelated", "reference": "r"}])
    with pytest.raises(UserError, match=r"no pair could be used \(prompt without a reference: 1"):
        list(public.hh_rlhf_preferences(path, references=references, skipped=Counter()))
    other = write_lines(tmp_path / "b.jsonl", [{"chosen": "no turns", "rejected": "at all"}])
    with pytest.raises(UserError, match=r"b\.jsonl:1: .*does not start with"):
        list(public.hh_rlhf_preferences(other, references=None, skipped=Counter()))


# --- all of them


def test_unusable_files_are_named_with_their_place(tmp_path):
    bad = write_lines(tmp_path / "bad.jsonl", [gsm8k_row("A?", [True, False])])
    with bad.open("a") as stream:
        stream.write('{"question": "B?"\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: not valid JSON"):
        list(public.gsm8k_preferences(bad, skipped=Counter()))
    wrong = write_lines(tmp_path / "wrong.jsonl", [{"question": "A?"}])
    with pytest.raises(UserError, match=r"wrong\.jsonl:1: no key 'ground_truth'"):
        list(public.gsm8k_preferences(wrong, skipped=Counter()))
    (tmp_path / "results" / "m").mkdir(parents=True)
    (tmp_path / "results" / "m" / "model_outputs.json").write_text('[\n{"instruction":')
    with pytest.raises(UserError, match=r"model_outputs\.json:2: not valid JSON"):
        list(public.alpaca_eval_trajectories([tmp_path / "results"], skipped=Counter()))


def test_a_failed_import_leaves_nothing_and_a_repeated_one_the_same_bytes(tmp_path):
    def broken():
        yield {"prompt": "p"}
        raise UserError("line 2 is bad")

    with pytest.raises(UserError):
        public.write_records(broken(), output=tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())
    rows = [{"prompt": "größer", "reference": "\ud83d half a pair"}]
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        assert public.write_records(rows, output=tmp_path / "new" / name) == 1
    packed = (tmp_path / "new" / "a.jsonl.gz").read_bytes()
    assert packed == (tmp_path / "new" / "b.jsonl.gz").read_bytes()
    assert packed[4:8] == bytes(4)  # gzip's time stamp: without one, tomorrow's file is the same too
    assert json.loads(gzip.decompress(packed))["prompt"] == "größer"


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    program = [sys.executable, str(REPOSITORY / "tools" / name), *arguments]
    return subprocess.run(program, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)}, check=False)


def test_import_commands_write_records_and_report_user_errors_in_one_line(tmp_path):
    solutions = write_lines(tmp_path / "s.jsonl", [gsm8k_row(f"{i}?", [True, False]) for i in range(20)])
    rmb = rmb_tree(tmp_path / "rmb", pairwise=[(("b",), ("c",))], best_of=[("a", ["b", "c"])])
    transcripts = write_lines(tmp_path / "hh.jsonl", [{"chosen": HH_START + "x", "rejected": HH_START + "y"}])
    results = run_results(tmp_path / "1", {"m1": {"Q": "a"}, "m2": {"Q": "b"}})
    more = run_results(tmp_path / "2", {"m1": {"Q": "a2"}})
    annotate(tmp_path / "3", "good", {"Q": 1.99})
    annotate(tmp_path / "3", "poor", {"Q": 1.01})
    commands = {
        "gsm8k": ["--input", str(solutions), "--split", "all"],
        "rmb": ["--input", str(rmb)],
        "hh_rlhf": ["--input", str(transcripts), "--no-reference"],
        "alpaca_eval": ["--results", str(results), "--results", str(more)],
    }
    for name, arguments in commands.items():
        output = tmp_path / f"{name}.jsonl"
        done = run_tool(f"import_{name}.py", *arguments, "--output", str(output))
        assert done.returncode == 0, done.stderr
        lines = output.read_text().splitlines()
        assert len(lines) == (20 if name == "gsm8k" else 1)
        assert f"{len(lines)} records" in done.stderr
        parsed(map(json.loads, lines))
    output = tmp_path / "preferences.jsonl"
    done = run_tool("import_alpaca_eval.py", "--preferences", "--results", str(tmp_path / "3"), "--output", str(output))
    assert (done.returncode, len(output.read_text().splitlines())) == (0, 1), done.stderr
    failed = run_tool("import_alpaca_eval.py", "--results", str(results), "--output", str(tmp_path / "no.jsonl"))
    assert (failed.returncode, failed.stdout, (tmp_path / "no.jsonl").exists()) == (2, "", False)
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("place", ["old.jsonl", "file/out.jsonl"])
def test_an_import_of_nothing_or_to_nowhere_leaves_what_was_there(tmp_path, place):
    solutions = write_lines(tmp_path / "s.jsonl", [gsm8k_row("1?", [True, False])])
    for name in ("old.jsonl", "file"):
        (tmp_path / name).write_text("what was there\n")
    pairs = "0" if place == "old.jsonl" else "1"
    command = ["--input", str(solutions), "--split", "all", "--pairs-per-problem", pairs]
    failed = run_tool("import_gsm8k.py", *command, "--output", str(tmp_path / place))
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1), failed.stderr
    assert failed.stderr.startswith("error: ") and str(tmp_path / place.split("/")[0]) in failed.stderr
    assert [(tmp_path / name).read_text() for name in ("old.jsonl", "file")] == ["what was there\n"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old.jsonl", "s.jsonl"]
