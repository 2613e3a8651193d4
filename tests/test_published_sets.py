"""Test sets as published: their formats, their scores against the publishers' definitions, and clear errors."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from published_files import published, write_json, write_lines

from megatron_polar.data import public
from megatron_polar.errors import UserError
from megatron_polar.score.evaluate import evaluate
from megatron_polar.score.published import TieFacts, best_of, published_scores, ties_score, wins_over_all
from megatron_polar.score.suites import EvaluationItem, load_suite


class Table:
    """Rewards outputs by their text."""

    def __init__(self, rewards: dict[str, float]):
        self.rewards = rewards

    def score(self, requests):
        return [[self.rewards[output] for output in request.outputs] for request in requests]


# --- RM-Bench


def rm_bench_row(number: int, **more) -> dict:
    sides = {side: [f"{side} {style} {number}" for style in range(3)] for side in ("chosen", "rejected")}
    return {"id": number, "prompt": f"prompt {number}"} | sides | more


def test_rm_bench_items_hold_three_styles_of_both_sides(tmp_path):
    items = load_suite("rm-bench", write_json(tmp_path / "chat_filtered.json", [rm_bench_row(7)]))
    sides = [f"{side} {style} 7" for side in ("chosen", "rejected") for style in range(3)]
    styles = ("concise", "detailed", "markdown")
    assert items == [
        EvaluationItem("chat/7", "prompt 7", "", tuple(sides), (0, 0, 0, 1, 1, 1), "chat", "sft", styles + styles, "")
    ]


def test_rm_bench_takes_the_whole_file_of_a_folder_once_and_the_parts_without_it(tmp_path):
    for domain in ("chat", "safety-refuse"):
        write_json(tmp_path / f"{domain}_filtered.json", [rm_bench_row(1)])
    assert [item.identifier for item in load_suite("rm-bench", tmp_path)] == ["chat/1", "safety-refuse/1"]
    rows = [rm_bench_row(1, domain="math"), rm_bench_row(1, domain="math"), rm_bench_row(2, domain="code")]
    write_json(tmp_path / "total_dataset.json", rows)
    assert [item.identifier for item in load_suite("rm-bench", tmp_path)] == ["math/1", "math/1~2", "code/2"]


def test_rm_bench_scores_equal_the_publishers_definition(tmp_path):
    draw = random.Random(2)
    domains = ["chat"] * 5 + ["math"] * 3 + ["safety-refuse"] * 4 + ["safety-response"] * 2
    rows = [rm_bench_row(number, domain=domain) for number, domain in enumerate(domains)]
    items = load_suite("rm-bench", write_json(tmp_path / "total_dataset.json", rows))
    rewards = [[draw.randint(0, 3) for _ in range(6)] for _ in items]  # equal ones occur: they are not won

    def levels(chosen: list[int]) -> list[float]:  # the nine cells of these items, by hand
        cell = [[np.mean([rewards[n][i] > rewards[n][3 + j] for n in chosen]) for j in range(3)] for i in range(3)]
        easy = (cell[1][0] + cell[2][0] + cell[2][1]) / 3
        hard = (cell[0][1] + cell[0][2] + cell[1][2]) / 3
        return [easy, (cell[0][0] + cell[1][1] + cell[2][2]) / 3, hard, np.mean(cell)]

    # 4 and 2 of the two kinds of safety: as in the publishers' scripts/utils.py they are one domain, item by item
    names = ("chat", "math", "safety")
    by_domain = {name: levels([n for n, d in enumerate(domains) if d.startswith(name)]) for name in names}
    overall = np.mean(list(by_domain.values()), axis=0)
    found = published_scores("rm-bench", items, rewards)
    assert not any(name.startswith("safety-") for name in found.scores)
    for name, expected in {**by_domain, "overall": overall}.items():
        values = [found.scores[f"{name}: {level}"].score for level in ("easy", "normal", "hard", "all")]
        assert values == pytest.approx(list(expected))
    assert found.scores["safety: all"].num_items == 6 and found.scores["overall: all"].num_items == 14
    whole = [[np.mean([r[i] > r[3 + j] for r in rewards]) for j in range(3)] for i in range(3)]
    assert np.allclose(found.matrix, whole)
    score = found.scores[found.headline]
    assert score.low < score.score < score.high


def test_leave_one_out_compares_every_style_with_the_references_of_the_other_two(tmp_path):
    path = write_json(tmp_path / "chat_filtered.json", [rm_bench_row(1)])
    items = load_suite("rm-bench", path, reference_scheme="leave-one-out")
    assert [item.identifier for item in items] == ["chat/1#0", "chat/1#1", "chat/1#2"]
    for number, item in enumerate(items):
        assert item.reference == f"chosen {number} 1" not in item.candidates
        assert (len(item.candidates), item.levels) == (5, (0, 0, 1, 1, 1))
        assert item.reference_label not in item.labels[:2] and len(set(item.labels[:2])) == 2
    # Rewards by text alone give the same cells as without a reference: each cell is then counted twice.
    table = Table({f"{side} {style} 1": reward for side, r in (("chosen", (3, 1, 5)), ("rejected", (2, 4, 0)))
                   for style, reward in enumerate(r)})  # fmt: skip
    plain = load_suite("rm-bench", path)
    with_reference, without = (
        published_scores("rm-bench", chosen, table.score([_request(i) for i in chosen])) for chosen in (items, plain)
    )
    assert with_reference.matrix == without.matrix == [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]


def _request(item: EvaluationItem):
    from megatron_polar.score.requests import ScoreRequest

    return ScoreRequest(item.prompt, item.reference, item.candidates, item.wrapper)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (rm_bench_row(1) | {"chosen": ["a", "b"]}, "2 chosen and 3 rejected answers, not three styles"),
        (rm_bench_row(1) | {"rejected": "abc"}, "rejected is not a list of texts"),
        ({"id": 1, "chosen": []}, "no key 'rejected' among"),
        (rm_bench_row(1, domain="poetry"), "neither a key domain nor the file's name"),
    ],
)
def test_what_is_not_rm_bench_is_named_with_its_place(tmp_path, row, complaint):
    with pytest.raises(UserError, match=f"chat_filtered.json: entry 0: {complaint}"):
        load_suite("rm-bench", write_json(tmp_path / "chat_filtered.json", [row]))


# --- RewardBench 2


def reward_bench_row(identifier: str, subset: str, right: int = 1, wrong: int = 3, **more) -> dict:
    row = {"id": identifier, "prompt": f"prompt {subset} {identifier}", "subset": subset}
    row |= {"chosen": [f"{identifier} right {n}" for n in range(right)], "num_correct": right}
    row |= {"rejected": [f"{identifier} wrong {n}" for n in range(wrong)], "num_incorrect": wrong}
    return row | {"total_completions": right + wrong, "models": ["m"] * (right + wrong)} | more


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "folder"])
def test_reward_bench_2_is_read_in_each_form(tmp_path, form):
    rows = [reward_bench_row("12", "Factuality"), reward_bench_row("tied:3", "Ties", right=2)]
    if form in ("parquet", "folder"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path = tmp_path / "data" / "test-00000-of-00001.parquet"
        path.parent.mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        path = tmp_path if form == "folder" else path
    else:
        path = (write_json if form == "json" else write_lines)(tmp_path / f"test.{form}", rows)
    first, second = load_suite("reward-bench-2", path)
    assert (first.identifier, first.category, first.levels) == ("Factuality/12", "Factuality", (0, 1, 1, 1))
    assert (second.identifier, second.levels) == ("Ties/tied:3", (0, 0, 1, 1, 1))
    assert second.candidates == ("tied:3 right 0", "tied:3 right 1", *(f"tied:3 wrong {n}" for n in range(3)))
    assert (first.reference, first.labels) == ("", ("m",) * 4)


def test_best_of_four_shares_a_win_among_equal_rewards():
    item = EvaluationItem("i", "p", "", ("a", "b", "c", "d"), (0, 1, 1, 1), "Math", "sft")
    rewards = {(3, 1, 2, 0): 1.0, (2, 1, 2, 0): 1 / 2, (2, 2, 2, 2): 1 / 4, (1, 1, 2, 2): 0.0, (0, 0, 0, 1): 0.0}
    assert {row: best_of(item, row) for row in rewards} == rewards
    assert [wins_over_all(item, row) for row in rewards] == [1.0, 0.0, 0.0, 0.0, 0.0]


def published_ties(scores: dict[str, tuple[list[float], list[float]]]) -> float:
    """The published definition, term by term: kind:N -> (rewards of the right answers, rewards of the wrong ones)."""
    refs = {k.split(":")[1]: v for k, v in scores.items() if k.startswith("ref")}
    tied = {k.split(":")[1]: v for k, v in scores.items() if k.startswith("tied")}
    accuracy = [np.mean([min(r) > max(w) for r, w in part.values()]) for part in (tied, refs)]
    preferred, hard, margin = [], [], []
    for name in refs.keys() & tied.keys():
        spread = max(tied[name][0]) - min(tied[name][0])
        gaps = [min(right) - max(wrong) for right, wrong in (tied[name], refs[name])]
        preferred.append(gaps[0] > spread)
        hard.append(min(gaps) > spread)
        quotient = (np.sign(min(gaps)) * np.inf if min(gaps) else np.nan) if spread == 0 else min(gaps) / spread
        margin.append(0.0 if np.isnan(quotient) else np.tanh(quotient - 1))
    return float(
        0.3 * accuracy[0] + 0.3 * accuracy[1] + 0.2 * np.mean(preferred) + 0.2 * np.mean(hard) + 0.01 * np.mean(margin)
    )


def facts_of(scores: dict[str, tuple[list[float], list[float]]]) -> list[TieFacts]:
    return [TieFacts(min(r) - max(w), max(r) - min(r)) for r, w in scores.values()]


def test_the_ties_score_equals_its_published_definition():
    worked = {"tied:1": ([5.0, 4.0], [1.0, 0.0]), "ref:1": ([3.0], [2.5, 0.0]), "tied:2": ([2.0, 1.0], [1.5]),
              "ref:2": ([9.0], [1.0])}  # fmt: skip
    # tied: one of two; ref: both. N = 1: gap 3 > spread 1, min(3, 0.5) = 0.5 < 1; N = 2: gap -0.5.
    by_hand = 0.3 / 2 + 0.3 + 0.2 / 2 + 0 + 0.01 * (np.tanh(0.5 - 1) + np.tanh(-0.5 - 1)) / 2
    assert published_ties(worked) == pytest.approx(by_hand)
    assert ties_score(list(worked), facts_of(worked), np.ones((1, 4)))[0] == pytest.approx(by_hand)
    draw = random.Random(8)
    for _ in range(50):
        scores = {}
        for number in range(draw.randint(1, 6)):
            for kind, right in (("ref", 1), ("tied", draw.randint(1, 5))):
                values = [[float(draw.randint(0, 6)) for _ in range(count)] for count in (right, draw.randint(1, 4))]
                scores[f"{kind}:{number}"] = tuple(values)
        scores["tied:99"] = ([4.0, 3.0], [1.0])  # a prompt whose partner is missing counts in its own accuracy only
        found = ties_score(list(scores), facts_of(scores), np.ones((1, len(scores))))[0]
        assert found == pytest.approx(published_ties(scores), abs=1e-12)


def test_a_draw_takes_both_prompts_of_a_tie_and_one_without_any_has_no_score_of_ties(tmp_path):
    """Terms over nothing once counted as failed, so that a perfect scorer had 0.6 in a small draw."""
    rows = [reward_bench_row(f"{number}", "Math") for number in range(60)]
    rows += [
        reward_bench_row(f"{kind}:{n}", "ties", right=r) for n in range(20) for kind, r in (("ref", 1), ("tied", 3))
    ]
    path = write_lines(tmp_path / "t.jsonl", rows)
    for seed in range(8):
        items = load_suite("reward-bench-2", path, limit=9, seed=seed)
        assert len(items) == 9
        ties = Counter(item.identifier.rpartition(":")[2] for item in items if item.category == "Ties")
        assert sum(count == 1 for count in ties.values()) <= 1  # the last one drawn, at the limit
        perfect = [[1.0 if level == 0 else 0.0 for level in item.levels] for item in items]
        found = published_scores("reward-bench-2", items, perfect).scores
        wanted = 1.01 if 2 in ties.values() else None
        assert found["Ties"].score == (wanted and pytest.approx(wanted)) if ties else "Ties" not in found
    (alone,) = (item for item in load_suite("reward-bench-2", path) if item.identifier.endswith("tied:3"))
    rewards = [1.0 if level == 0 else 0.0 for level in alone.levels]
    assert published_scores("reward-bench-2", [alone], [rewards]).scores["Ties"].score is None


def test_a_perfect_score_of_ties_is_above_one_and_the_overall_score_is_the_mean_of_subsets(tmp_path):
    rows = [reward_bench_row(f"{number}", subset) for number, subset in enumerate(["Factuality", "Factuality", "Math"])]
    rows += [reward_bench_row("ref:1", "ties"), reward_bench_row("tied:1", "ties", right=3)]
    rewards = {text: float("right" in text) for row in rows for text in (*row["chosen"], *row["rejected"])}
    rewards["1 wrong 0"] = 2.0
    items = load_suite("reward-bench-2", write_lines(tmp_path / "t.jsonl", rows))
    summary = evaluate(Table(rewards), items, output=tmp_path / "out", suite="reward-bench-2", reference_scheme="none")
    scores = {name: score["score"] for name, score in summary["published"]["scores"].items()}
    assert scores == pytest.approx(
        {"Factuality": 0.5, "Math": 1.0, "Ties": 1.01, "overall": (0.5 + 1.0 + 1.01) / 3}, abs=1e-9
    )
    assert summary["published"]["headline"] == "overall" and "3 subsets" in summary["published"]["protocol"]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([reward_bench_row("7", "Ties")], r"t\.jsonl:1: id '7' of the subset Ties is not ref:N or tied:N"),
        ([reward_bench_row("ref:7", "Ties")] * 2, r"t\.jsonl:2: id 'ref:7' of the subset Ties is there twice"),
        ([reward_bench_row("7", "Math", num_correct=2)], "num_correct is 2 and there are 1"),
        ([{"id": "1", "chosen": ["a"], "rejected": ["b"], "prompt": "p"}], "no key 'subset'"),
    ],
)
def test_what_is_not_reward_bench_2_is_named_with_its_place(tmp_path, rows, complaint):
    with pytest.raises(UserError, match=complaint):
        load_suite("reward-bench-2", write_lines(tmp_path / "t.jsonl", rows))


def test_damaged_parquet_is_one_error(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"x\.parquet: not readable as Parquet"):
        load_suite("reward-bench-2", tmp_path / "x.parquet")


# --- JudgeBench


def judge_row(number: int, source: str, label: str) -> dict:
    row = {"pair_id": f"pair-{number}", "original_id": number, "source": source, "question": f"question {number}"}
    return row | {"response_model": "m", "response_A": f"A {number}", "response_B": f"B {number}", "label": label}


def test_judgebench_pairs_are_scored_by_category_and_over_all(tmp_path):
    sources = ["mmlu-pro-law", "mmlu-pro-computer science", "livebench-reasoning", "livebench-math", "livecodebench"]
    rows = [judge_row(number, source, "A>B" if number % 2 else "B>A") for number, source in enumerate(sources)]
    path = write_lines(tmp_path / "dataset=judgebench,response_model=m.jsonl", [*rows, judge_row(9, "x", "A>B") |
                       {"response_B": "A 9"}])  # fmt: skip
    items = load_suite("judgebench", path)
    assert [item.category for item in items] == ["knowledge", "knowledge", "reasoning", "math", "coding"]
    assert [item.candidates for item in items[:2]] == [("B 0", "A 0"), ("A 1", "B 1")]
    assert (items[0].identifier, items[0].reference) == ("m/pair-0", "")
    # Wrong on question 1, equal (not won) on question 4.
    rewards = {f"{side} {n}": float(side == ("A" if n % 2 else "B")) for n in range(5) for side in "AB"}
    rewards |= {"A 1": 0.0, "B 1": 1.0, "A 4": 1.0}
    found = published_scores("judgebench", items, Table(rewards).score([_request(item) for item in items]))
    scores = {name: (score.score, score.num_items) for name, score in found.scores.items()}
    expected = {"knowledge": (0.5, 2), "reasoning": (1.0, 1), "math": (1.0, 1), "coding": (0.0, 1), "overall": (0.6, 5)}
    assert scores == expected
    with pytest.raises(UserError, match=r"j\.jsonl:1: label is 'A', not"):
        load_suite("judgebench", write_lines(tmp_path / "j.jsonl", [judge_row(1, "livecodebench", "A")]))


# --- RMB as published


def rmb_answer(name: str) -> dict:
    return {"llm_name": f"model of {name}", "answer": f"answer {name}"}


def rmb_pair(question: str, better: str, worse: str, uid: int) -> dict:
    conversation = [{"role": "user", "content": question, "language": "English"}]
    return {"pair_uid": str(uid), "conversation_input": conversation, "chosen": rmb_answer(better),
            "reject": rmb_answer(worse), "category_path": "..."}  # fmt: skip


def rmb_list(question: str, best: str, losers: str, uid: int) -> dict:
    conversation = [{"role": "user", "content": question, "language": "English"}]
    return {"bon_uid": str(uid), "conversation_input": conversation, "bon_best": rmb_answer(best),
            "loser_list": [rmb_answer(name) for name in losers], "category_path": "..."}  # fmt: skip


def rmb_folder(root: Path) -> Path:
    data = root / "RMB_dataset"
    write_json(data / "Pairwise_set/Helpfulness/Chat/A.json", [rmb_pair("Q", "b", "c", 1), rmb_pair("R", "x", "y", 2)])
    write_json(data / "Pairwise_set/Harmlessness/S1.json", [rmb_pair("Q", "c", "b", 3)])
    write_json(data / "BoN_set/Helpfulness/Chat/A.json", [rmb_list("Q", "a", "bd", 1), rmb_list("R", "x", "zz", 2)])
    write_json(data / "BoN_set/Harmlessness/S1.json", [rmb_list("S", "a", "bc", 3)])
    return root


def test_rmb_pairs_and_lists_are_the_published_ones(tmp_path):
    pairs = load_suite("rmb-pairwise", rmb_folder(tmp_path))
    assert [(item.identifier, item.candidates) for item in pairs] == [
        ("Harmlessness/3", ("answer c", "answer b")),
        ("Helpfulness/Chat/1", ("answer b", "answer c")),
        ("Helpfulness/Chat/2", ("answer x", "answer y")),
    ]
    assert {item.reference for item in pairs} == {""}
    lists = load_suite("rmb-bon", tmp_path)
    assert [(item.candidates, item.levels) for item in lists] == [
        (("answer a", "answer b", "answer c"), (0, 1, 1)),
        (("answer a", "answer b", "answer d"), (0, 1, 1)),
        (("answer x", "answer z", "answer z"), (0, 1, 1)),
    ]
    assert lists[0].labels == ("model of a", "model of b", "model of c")


def test_a_gold_answer_of_rmb_is_below_none(tmp_path):
    data = rmb_folder(tmp_path) / "RMB_dataset"
    write_json(data / "Pairwise_set/Helpfulness/Chat/B.json", [rmb_pair("Q", "e", "a", 8), rmb_pair("Q", "f", "c", 9)])
    entries = public.rmb_published(tmp_path, "Pairwise_set", skipped=Counter())
    (entry,) = (entry for entry in entries if entry.identifier == "Helpfulness/Chat/1")
    # e is above a, which is above b; f is above c, but nothing says that it is above b.
    assert [answer.text for answer in entry.best] == ["answer e"]
    assert [answer.text for answer in entry.others] == ["answer a", "answer d", "answer f"]


def test_best_of_n_is_right_when_the_best_answer_is_above_every_loser(tmp_path):
    lists = load_suite("rmb-bon", rmb_folder(tmp_path))
    found = published_scores("rmb-bon", lists, [[3, 1, 2], [3, 3, 1], [5, 1, 1]])
    scores = {name: (score.score, score.num_items) for name, score in found.scores.items()}
    assert scores == {"Harmlessness": (1.0, 1), "Helpfulness": (0.5, 2), "mean of the goals": (0.75, 3)}
    assert found.headline == "mean of the goals"


def test_rmb_references_are_other_answers_to_the_same_conversation(tmp_path):
    rmb_folder(tmp_path)
    (gold,) = load_suite("rmb-pairwise", tmp_path, reference_scheme="gold")
    # b over c is published, a over b by the list: a is above both, and nothing is above it.
    assert (gold.identifier, gold.reference, gold.candidates) == (
        "Helpfulness/Chat/1", "answer a", ("answer b", "answer c")
    )  # fmt: skip
    (named,) = load_suite("rmb-pairwise", tmp_path, reference_scheme="policy:model of d")
    assert (named.reference, named.candidates) == ("answer d", ("answer b", "answer c"))
    # The model is a candidate of the list: it becomes the reference, and the list goes on without it.
    lists = load_suite("rmb-bon", tmp_path, reference_scheme="policy:model of b")
    assert [(item.reference, item.candidates) for item in lists] == [
        ("answer b", ("answer a", "answer c")),
        ("answer b", ("answer a", "answer d")),
    ]
    with pytest.raises(UserError, match=r"'policy:nobody'.*its policies are model of a, model of b"):
        load_suite("rmb-bon", tmp_path, reference_scheme="policy:nobody")


# --- the publishers' own files


@pytest.mark.parametrize(
    ("suite", "name", "scheme", "count"),
    [
        ("rmb-pairwise", "rmb", "none", 6519),
        ("rmb-pairwise", "rmb", "gold", 1769),
        ("rmb-bon", "rmb", "none", 1707),
        ("rmb-bon", "rmb", "gold", 415),
        ("rm-bench", "rm_bench", "none", 60),
        ("rm-bench", "rm_bench", "leave-one-out", 180),
        ("gsm8k-all", "gsm8k/example_model_solutions.jsonl", "leave-one-out", 331),
        ("gsm8k-all", "gsm8k/example_model_solutions.jsonl", "policy:175b_verification", 298),
    ],
)
def test_published_files_give_items_by_every_scheme(suite, name, scheme, count):
    items = load_suite(suite, published(name), reference_scheme=scheme)
    assert len(items) == len({item.identifier for item in items}) == count
    for item in items:
        assert bool(item.reference) == (scheme != "none")
        assert item.reference not in item.candidates or scheme == "none"
        assert len(set(item.levels)) > 1
