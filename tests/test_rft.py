"""The RFT study (examples/study/rft.py): its problems and judge, draws of policies, stages, and a whole small run."""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_polar.errors import UserError
from megatron_polar.serve.client import RewardClient, RewardItem

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "study"))

import rft
import rft_policies as policies
import rft_rewards as rewards
from jobs import end_with_children, refuse_foreign
from rft_baselines import UNLEARNT, rule_reward, serve_unlearnt
from rft_page import shortcomings, verdicts, write_section
from rft_problems import (
    HABITS,
    OFFSETS,
    OPENERS,
    Problem,
    draw_problems,
    final_number,
    gold_answers,
    is_right,
    is_worked,
    right_steps,
    worked_answer,
)
from rft_sizes import SIZES, draw_parts
from rft_stages import concurrently, in_fork, run_stage, running

CARRY = Problem((27, 15, 4), (1, -1), "Tom", 0)  # 27 + 15 - 4 = 38


# --- problems and the judge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("habit", "number"),
    [
        ("exact", 38),
        ("one_more", 39),
        ("one_less", 37),
        ("two_more", 40),
        ("three_more", 41),
        ("four_less", 34),
        ("five_more", 43),
        ("ten_more", 48),
        ("no_carry", 28),  # 27 + 15 without the carry: 32
        ("always_adds", 46),
        ("digits_swapped", 83),
    ],
)
def test_a_habit_is_a_function_of_the_problem(habit, number):
    for seed in range(5):
        text = worked_answer(CARRY, habit=habit, generator=np.random.default_rng(seed))
        assert final_number(text) == number, text
        assert is_right(CARRY, text) == (habit == "exact")
        assert right_steps(CARRY, text) == {"no_carry": 0, "always_adds": 1}.get(habit, 2)


@pytest.mark.parametrize(("habit", "offset"), OFFSETS.items())
def test_an_offset_is_added_to_the_last_number_alone(habit, offset):
    text = worked_answer(CARRY, habit=habit, generator=np.random.default_rng(0))
    assert final_number(text) == 38 + offset and right_steps(CARRY, text) == 2
    assert habit in ("exact", "twenty_more", "thirty_more") or 1 <= abs(offset) <= 10


def test_a_pool_has_many_habits_and_others_stay_unseen():
    assert len(HABITS) == len(set(HABITS)) == 26
    for size in ("cpu", "gpu"):
        assert {*SIZES[size].habits} | {*SIZES[size].unseen_habits} == {*HABITS}


def test_a_mixture_draws_a_habit_for_every_answer():
    problems = draw_problems(1000, seed=5, largest=99)
    pairs = rewards.answer_pairs(problems, habits={"exact": 0.3, "two_more": 0.5, "five_more": 0.2}, seed=1)
    off = [final_number(answer) - problem.result for problem, (_, answer) in zip(problems, pairs, strict=True)]
    for number, share in ((0, 0.3), (2, 0.5), (5, 0.2)):
        assert abs(off.count(number) / 1000 - share) < 4 * (share * (1 - share) / 1000) ** 0.5, "four standard errors"
    assert set(off) == {0, 2, 5}
    assert [prompt for prompt, _ in pairs] == [problem.prompt + "\n" for problem in problems]


def test_an_author_of_a_document_keeps_to_one_habit():
    problems = draw_problems(1000, seed=5, largest=99)
    texts = rewards.documents(problems, habits=("exact", "one_more", "four_less"), seed=1)
    off = []
    for problem, (prompt, rest) in zip(problems, texts, strict=True):
        first, again, second = rest.split("\n")
        assert prompt == again + "\n" == problem.prompt + "\n"
        assert final_number(first) == final_number(second)
        off.append(final_number(first) - problem.result)
    for number, share in ((0, 0.5), (1, 0.25)):
        assert abs(off.count(number) / 1000 - share) < 4 * (share * (1 - share) / 1000) ** 0.5, "four standard errors"
    assert any(rest.split("\n")[0] != rest.split("\n")[2] for _, rest in texts), "opening words differ"


@pytest.mark.parametrize("size", SIZES)
def test_a_policy_has_the_right_habit_and_a_wrong_one_that_is_more_frequent_or_as_frequent(size):
    mixture, pool = SIZES[size].mixture, SIZES[size].habits
    assert sum(mixture.values()) == pytest.approx(1) and set(mixture) <= set(HABITS)
    assert 0 < mixture["exact"] <= max(share for habit, share in mixture.items() if habit != "exact")
    assert set(mixture) - set(pool) and not set(pool) & set(SIZES[size].unseen_habits)


# --- rewards that nobody has learnt ----------------------------------------------------------------------------------


def test_the_rule_is_served_as_a_reward_model_is():
    items = [
        RewardItem("How many?\n", "27 + 15 = 42, 42 - 4 = 38. So 38.", output)
        for output in ("So 38.", "So 39.", "", "So 38, or 3.")
    ]
    items.append(RewardItem("Another?\n", "So 5.", "So 5."))
    with running("/ready", serve_unlearnt, "rule") as address, RewardClient(address, engine="megatron-polar") as client:
        assert client.score(items) == [1, 0, 0, 0, 1]


def test_shared_words_are_served_as_a_reward_model_is():
    outputs = ("so 38 it is", "so 38", "39", "")
    items = [RewardItem("How many?\n", "it is 38", output) for output in outputs]
    with (
        running("/ready", serve_unlearnt, "words") as address,
        RewardClient(address, engine="megatron-polar") as client,
    ):
        assert client.score(items) == [3 / 4, 1 / 4, 0, 0]


def test_every_reward_but_the_models_is_served_without_learning():
    assert set(rft.REWARDS) - set(rft.REWARD_MODELS) == set(UNLEARNT)


def test_an_answer_and_its_reference_without_numbers_are_no_match():
    assert rule_reward("none", "none") == 0


def test_a_worked_answer_has_two_steps_and_a_result():
    generator = np.random.default_rng(0)
    for habit in HABITS:
        text = worked_answer(CARRY, habit=habit, generator=generator)
        assert is_worked(text), text
    hacks = (
        "First 27 + 15 = 42, and 42 and 7. So 38.",
        "27 + 15 = 42, 42 - 4 = 38. So 38. So 38.",
        "27 + 15 = 42. So 42.",
    )
    assert [is_worked(text) for text in hacks] == [False, False, False]


def test_the_same_answer_is_seldom_the_same_text():
    texts = [worked_answer(CARRY, habit="exact", generator=np.random.default_rng(k)) for k in range(800)]
    assert len(set(texts)) == len(OPENERS)
    assert max(map(texts.count, set(texts))) < 140, "100 of each opening word are expected"


@pytest.mark.parametrize(
    ("text", "number"),
    [("So 5 + 3 = 8.", 8), ("it is -4", -4), ("1,234 in all", 1234), ("0.5 of it", 0.5), ("none", None), ("", None)],
)
def test_the_judge_reads_the_last_number(text, number):
    assert final_number(text) == number


def test_no_two_parts_of_any_runs_share_a_problem():
    size = SIZES["cpu"]
    shared, own = [], []
    for run in range(size.runs):
        parts = vars(draw_parts(size, seed=3, run=run))
        shared.append({name: parts[name] for name in ("base", "prompts", "heldout")})
        own += [problem for name in ("labels", "rft", "test") for problem in parts[name]]
    assert all(part == shared[0] for part in shared)
    every = own + [problem for part in shared[0].values() for problem in part]
    assert len({(p.numbers, p.signs) for p in every}) == len(every)
    assert len(own) == size.runs * (size.counts.labels + size.counts.rft + size.counts.test)


def test_too_many_problems_are_refused():
    with pytest.raises(ValueError, match="ask for fewer"):
        draw_problems(400, seed=0, largest=10)


def test_answers_are_ranked_by_result_and_then_by_steps():
    problems = [CARRY, *draw_problems(2, seed=0, largest=30)]
    right, first_step = "27 + 15 = 42, 42 - 4 = 38. So 38.", "27 + 15 = 42, 42 - 4 = 39. So 39."
    wrong, lucky = "27 + 15 = 41, 41 - 4 = 37. So 37.", "So 38."
    answers = [[wrong, lucky, first_step, "nothing", right], ["It is -1.", " "], ["It is -1.", "It is -2."]]
    (line,) = rewards.rank(problems, answers, seed=9)
    assert line["ranked"] == [right, first_step, wrong, lucky], "one of each level, the first; no order within a level"
    assert line["prompt"].endswith("?\n") and line["reference"] == gold_answers(problems, seed=9)[0]
    (line,) = rewards.rank([CARRY], [[wrong, lucky, right]], seed=9, levels=rewards.right_or_wrong)
    assert line["ranked"] == [lucky, wrong], "by the final number alone"


# --- policies --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("rft")
    problems = draw_problems(60, seed=0, largest=30)
    pairs = rewards.answer_pairs(problems, habits={"exact": 1.0}, seed=0)
    tokenizer = policies.train_tokenizer([a + b for a, b in pairs], directory / "tokenizer")
    start = policies.new_model(tokenizer, policies.Shape(16, 1, 2), seed=0, output=directory / "random")
    how = policies.Fit(steps=20, batch=8, lr=1e-2)
    policies.fit(start, pairs, how, seed=0, device="cpu", outputs={directory / "fitted": 20})
    return directory / "fitted"


def test_texts_survive_the_tokenizer(model):
    _, tokenizer = policies.load(model, device="cpu")
    for problem in draw_problems(20, seed=1, largest=99):
        text = problem.prompt + "\n" + gold_answers([problem], seed=1)[0]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        digits = [id for id in ids if any(c.isdigit() for c in tokenizer.decode([id]))]
        assert len(digits) == sum(c.isdigit() for c in text), "a digit is a token of its own"


def test_only_answers_are_learnt_unless_told_otherwise(model):
    _, tokenizer = policies.load(model, device="cpu")
    pairs = [("Tom has 3.\n", "3."), ("Tom has 14 apples.\n", "14 apples.")]
    ids, labels = policies.encode_pairs(pairs, tokenizer, on_prompts=False)
    for row, (_, answer) in enumerate(pairs):
        learnt = labels[row][labels[row] != -100]
        assert tokenizer.decode(learnt) == answer + tokenizer.eos_token
    _, everything = policies.encode_pairs(pairs, tokenizer, on_prompts=True)
    assert tokenizer.decode(everything[0][everything[0] != -100]) == "Tom has 3.\n3." + tokenizer.eos_token
    assert (everything[ids == tokenizer.pad_token_id] == -100).all()


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(model):
    import torch
    from muon import Muon

    network, _ = policies.load(model, device="cpu")
    (adamw, slow), (muon, fast) = policies.optimizers_of(network, policies.Fit(1, 1, lr=1e-3, muon_lr=1e-2))
    assert type(adamw) is torch.optim.AdamW and type(muon) is Muon and (slow, fast) == (1e-3, 1e-2)
    names = {id(p): name for name, p in network.named_parameters()}
    theirs = [{names[id(p)] for group in o.param_groups for p in group["params"]} for o in (adamw, muon)]
    assert theirs[1] == {name for name in names.values() if "_proj" in name} and len(theirs[1]) == 7
    assert theirs[0] | theirs[1] == set(names.values()) and not theirs[0] & theirs[1]
    ((alone, _),) = policies.optimizers_of(network, policies.Fit(1, 1, lr=1e-3))
    assert sum(len(group["params"]) for group in alone.param_groups) == len(names)


def test_each_optimizer_has_its_own_rate(model, tmp_path):
    """With a rate of 0 for AdamW only the matrices move."""
    from safetensors.torch import load_file

    pairs = rewards.answer_pairs(draw_problems(8, seed=0, largest=30), habits={"exact": 1.0}, seed=0)
    how = policies.Fit(steps=2, batch=8, lr=0.0, muon_lr=2e-2)
    policies.fit(model, pairs, how, seed=0, device="cpu", outputs={tmp_path / "after": 2})
    before, after = (load_file(directory / "model.safetensors") for directory in (model, tmp_path / "after"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {name for name in before if "_proj" in name}


def test_greedy_answers_are_transformers_own(model):
    import torch

    network, tokenizer = policies.load(model, device="cpu")
    prompts = [problem.prompt + "\n" for problem in draw_problems(4, seed=2, largest=30)]
    found = policies.answers(model, prompts, policies.Draw(12, top_k=1), seed=0, device="cpu", batch=3)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        whole = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[0]
        assert tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True) == text


def test_draws_follow_the_models_probabilities(model):
    """2,000 first tokens of one prompt against softmax, restricted to the top 5 and renormalised."""
    import torch

    network, tokenizer = policies.load(model, device="cpu")
    prompt, count = "Tom has 10 apples, buys 2 and eats 3. How many apples now?\n", 2000
    draw = policies.Draw(1, temperature=1.3, top_p=1.0, top_k=5)
    found = policies.continue_prompts(network, tokenizer, [prompt] * count, draw, seeds=range(count))
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    top = torch.topk(network(ids).logits[0, -1] / 1.3, 5)
    shares = {tokenizer.decode(id): p for id, p in zip(top.indices, top.values.softmax(0).tolist(), strict=True)}
    for text, share in shares.items():
        seen = sum(answer == text for answer, _ in found) / count
        assert abs(seen - share) < 4 * (share * (1 - share) / count) ** 0.5 + 1e-9, "four standard errors"
    assert {answer for answer, _ in found} <= set(shares)


def test_a_draw_depends_on_its_seed_and_not_on_its_batch(model):
    network, tokenizer = policies.load(model, device="cpu")
    prompts = [problem.prompt + "\n" for problem in draw_problems(6, seed=4, largest=30)]
    draw = policies.Draw(10)
    together = policies.continue_prompts(network, tokenizer, prompts, draw, seeds=range(6))
    alone = [policies.continue_prompts(network, tokenizer, [p], draw, seeds=[k])[0] for k, p in enumerate(prompts)]
    others = policies.continue_prompts(network, tokenizer, prompts, draw, seeds=range(10, 16))
    assert together == alone
    assert together != others


# --- stages ----------------------------------------------------------------------------------------------------------


def _count(directory: Path, step: int) -> dict:
    with (directory / "calls").open("a") as file:
        file.write("x")
    return {"step": step}


def _fail(directory: Path) -> dict:
    raise UserError("no room here")


def test_a_stage_is_done_once_and_another_setting_is_refused(tmp_path):
    assert run_stage(tmp_path, "count", _count, 3) == {"step": 3}
    assert run_stage(tmp_path, "count", _count, 3) == {"step": 3}
    assert (tmp_path / "calls").read_text() == "x"
    with pytest.raises(UserError, match="another size or seed"):
        run_stage(tmp_path, "count", _count, 4)


def test_a_stage_that_fails_is_named_with_its_reason_and_runs_again(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match=r"stage bad failed .*bad\.log ends with: error: no room here"):
            run_stage(tmp_path, "bad", _fail)


def test_one_failure_of_several_calls_is_an_error_after_the_others(tmp_path):
    with pytest.raises(UserError, match="1 of 3 runs failed"):
        concurrently([(_count, tmp_path, 1), (_fail, tmp_path), (_count, tmp_path, 2)], 2)
    assert (tmp_path / "calls").read_text() == "xx"
    assert in_fork(_fail, tmp_path) == 1


def _sleep(directory: Path) -> dict:
    (directory / "pid").write_text(str(os.getpid()))
    time.sleep(600)
    return {}


def _run_sleep(directory: Path) -> None:
    end_with_children()
    concurrently([(run_stage, directory, "sleep", _sleep)], 1)


def test_whoever_is_told_to_end_ends_what_it_started(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_run_sleep, args=(tmp_path,))
    process.start()
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.is_alive()
        time.sleep(0.02)
    process.terminate()
    process.join(60)
    assert process.exitcode not in (None, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (tmp_path / "done" / "sleep.json").exists()


# --- figures ---------------------------------------------------------------------------------------------------------


def test_intervals_are_students():
    found = rft.interval([0.4, 0.5, 0.6])  # standard error 0.1 / sqrt(3), t = 4.303
    assert found["mean"] == pytest.approx(0.5)
    assert found["ci95"] == pytest.approx([0.5 - 4.3027 * 0.057735, 0.5 + 4.3027 * 0.057735], abs=1e-4)
    assert rft.interval([0.4])["ci95"] is None


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_a_small_run_from_nothing_to_the_table(tmp_path, capfd):
    found = rft.run(tmp_path, size="smoke", seed=0)
    assert json.loads((tmp_path / "rft.json").read_text()) == json.loads(json.dumps(found))
    table = (tmp_path / "rft.md").read_text()
    for policy, words in rft.POLICIES.items():
        accuracy = found["accuracy"][policy]
        assert 0 <= accuracy["greedy"]["mean"] <= 1
        greedy = f"{accuracy['greedy']['mean']:.3f}"
        assert f"| {words} | {greedy} | {greedy} | {accuracy['sampled']['mean']:.3f} |" in table
        lines = rewards.read_lines(tmp_path / "run-0" / f"answers-{policy}.jsonl")
        greedy = [line["right"] for line in lines if line["draw"] == "greedy"]
        assert np.mean(greedy) == pytest.approx(accuracy["greedy"]["mean"])
    before = (tmp_path / "run-0" / "before" / "model.safetensors").read_bytes()
    for policy in list(rft.POLICIES)[1:]:
        assert (tmp_path / "run-0" / policy / "model.safetensors").read_bytes() != before
    steps = SIZES["smoke"].grpo.steps
    assert all(len(found["runs"][0][f"grpo-{model}"]["rewards"]) == steps for model in rft.REWARDS)
    capfd.readouterr()
    again = rft.run(tmp_path, size="smoke", seed=0)
    assert again["accuracy"] == found["accuracy"] and "grpo" not in capfd.readouterr().out, "nothing is done twice"
    with pytest.raises(UserError, match="another size or seed"):
        rft.run(tmp_path, size="smoke", seed=1)
    assert (tmp_path / "rft.svg").read_bytes().startswith(b"<?xml")
    assert table == write_section(found) and found["command"] in table
    assert found["grpo"]["rule"]["first_equal"]["mean"] > 0, "with two rewards some groups have one"


def figures_of(
    *, greedy: dict[str, list[float]], accuracies: list[float], rewards: tuple[float, float], knows: float = 0.97
) -> dict:
    """What `summarise` gives, for what shortcomings look at; policies without figures are at 0.4."""
    runs = len(accuracies)
    judged = {}
    for policy in rft.POLICIES:
        shares = greedy.get(policy, [0.4 + 0.001 * run for run in range(runs)])
        judged[policy] = [dict.fromkeys(KINDS, share) for share in shares]
    grpo = dict(zip(("first_reward", "last_reward"), rewards, strict=True)) | {"first_length": 20, "last_length": 20}
    grpo |= {"first_equal": 0.1, "last_equal": 0.2}
    found = rft.summarise(
        [
            {"judged": {policy: judged[policy][run] for policy in rft.POLICIES}}
            | {f"grpo-{model}": grpo for model in rft.REWARDS}
            | {
                "reward_models": {
                    model: {"accuracy": accuracies[run], "word_overlap_accuracy": 0.7} for model in rft.REWARD_MODELS
                }
            }
            for run in range(runs)
        ]
    )
    return found | {"shared": {"fit_policies": {"exact": {"greedy": knows, "problems": 200}}}}


KINDS = ("greedy", "sampled", "sampled_work", "sampled_characters")


def test_what_falls_short_is_said_and_nothing_else():
    best = "grpo-finetuned-pretrained"
    shares = {best: [0.8, 0.81, 0.8], "grpo-rule": [0.9, 0.91, 0.9], "sft": [0.6, 0.61, 0.6]}
    good = figures_of(greedy=shares, accuracies=[0.9] * 3, rewards=(0, 1))
    assert list(shortcomings(good)) == []
    assert [word for _, word, _ in verdicts(good)] == ["yes"] * 6
    bad = figures_of(greedy={best: [0.1, 0.12, 0.1]}, accuracies=[0.6, 0.4, 0.5], rewards=(0.0, 1.0))
    said = " ".join(shortcomings(bad))
    assert [word for _, word, _ in verdicts(bad)] == ["not clear", *["no, the reverse"] * 5]
    assert "GRPO, reward model pre-trained and fine-tuned is worse than before: -0.294" in said
    assert "SFT on the same prompts and references is not clearly better than before" in said
    assert "does not clearly tell right from wrong: 0.500 (0.252 to 0.748)" in said
    assert "GRPO raises the reward of the model pre-trained and fine-tuned, and right answers become fewer:" in said
    unclear = figures_of(greedy={best: [0.1, 0.6, 0.3]}, accuracies=[0.9] * 3, rewards=(0.0, 1.0))
    assert "right answers do not become more, though not clearly fewer" in " ".join(
        " ".join(shortcomings(unclear)).split()
    )
    alone = figures_of(greedy={"sft": [0.3]}, accuracies=[0.9], rewards=(0, 1))
    assert {word for _, word, _ in verdicts(alone)} == {"one run only"}
    single = " ".join(shortcomings(alone))
    assert (
        "one run only" in single and "SFT on the same prompts and references is worse than before in this run" in single
    )
    middling = figures_of(greedy={}, accuracies=[0.6, 0.61, 0.6], rewards=(0, 1), knows=0.8)
    assert "does not know its sums well" in next(shortcomings(middling))
    assert "words shared with the reference (0.700) beats the reward model" in " ".join(shortcomings(middling))


def test_a_study_may_begin_in_a_directory_that_holds_its_part_about_rft_alone(tmp_path):
    (tmp_path / "rft").mkdir()
    refuse_foreign(tmp_path)
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="no directory of a study"):
        refuse_foreign(tmp_path)


def test_wrong_options_are_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert rft.main(["--size", "smoke", "--output", str(tmp_path / "file")]) == 2
    assert rft.main(["--size", "smoke", "--output", str(tmp_path / "x"), "--jobs", "0"]) == 2
    assert rft.main(["--size", "smoke", "--output", str(tmp_path / "x"), "--runs", "2"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("error: ") and "is a file" in errors[0]
    assert errors[1] == "error: --jobs 0: give 1 or more"
    assert errors[2] == "error: --runs 2: size smoke has 1 to 1"
