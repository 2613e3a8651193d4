"""The figures of an evaluation, against values worked out by hand and against plain counting."""

import math
import random
from dataclasses import replace

import pytest

from megatron_polar.score.statistics import compute_statistics, ordered_pairs, wilson_interval, word_overlap
from megatron_polar.score.suites import EvaluationItem


def item(lengths: tuple[int, ...], *, category: str = "a", levels: tuple[int, ...] | None = None, name: str = "i"):
    candidates = tuple(chr(ord("a") + index) * length for index, length in enumerate(lengths))
    levels = levels if levels is not None else tuple(range(len(lengths)))
    return EvaluationItem(name, "prompt", "reference", candidates, levels, category, "sft")


def test_accuracy_counts_ties_as_one_half_and_reports_them():
    items = [item((1, 2))] * 4
    figures = compute_statistics(items, [[1, 0], [2, 2], [0, 1], [3, -1]])
    assert figures.micro.accuracy == (1 + 0.5 + 0 + 1) / 4
    assert (figures.micro.num_pairs, figures.micro.num_items, figures.micro.num_ties) == (4, 4, 1)
    assert figures.tie_rate == 0.25
    assert figures.mean_margin == (1 + 0 - 1 + 4) / 4
    assert (figures.reward_best_mean, figures.reward_worst_mean) == (1.5, 0.5)
    assert figures.reward_best_std == pytest.approx(math.sqrt((0.25 + 0.25 + 2.25 + 2.25) / 4))


def test_a_constant_scorer_has_accuracy_one_half():
    figures = compute_statistics([item((3, 9))] * 7, [[0.25, 0.25]] * 7)
    assert (figures.micro.accuracy, figures.macro_accuracy, figures.tie_rate) == (0.5, 0.5, 1.0)
    assert (figures.macro_low, figures.macro_high) == (0.5, 0.5)


def test_micro_weighs_pairs_and_macro_weighs_categories():
    items = [item((1, 2), category="large")] * 8 + [item((1, 2), category="small")] * 2
    figures = compute_statistics(items, [[1, 0]] * 8 + [[0, 1]] * 2)
    assert figures.micro.accuracy == 0.8
    assert figures.macro_accuracy == 0.5
    assert {name: entry.accuracy for name, entry in figures.categories.items()} == {"large": 1.0, "small": 0.0}


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # The worked examples of Newcombe (Statistics in Medicine 17, 1998, table I, method 3), to their four decimals.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(right, count, low, high):
    assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(1 - right / count, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_holds_exactly_the_shares_a_score_test_does_not_reject():
    # Defining property: at both ends |p - p0| equals z standard errors *of p0*.
    p, n = 0.37, 57
    for end in wilson_interval(p, n):
        assert abs(p - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / n), rel=1e-9)


def of_prompt(prompt: str, *, category: str = "c") -> EvaluationItem:
    return EvaluationItem(prompt, prompt, "r", ("better", "worse"), (0, 1), category, "sft")


def test_macro_interval_is_seeded_and_covers_what_binomial_spread_says():
    draw = random.Random(3)
    items = [of_prompt(f"{c} {n}", category=c) for c in ("a", "b") for n in range(333)]
    rewards = [[1, 0] if draw.random() < 0.7 else [0, 1] for _ in items]
    figures = compute_statistics(items, rewards, seed=5)
    again, other = compute_statistics(items, rewards, seed=5), compute_statistics(items, rewards, seed=6)
    assert (figures.macro_low, figures.macro_high) == (again.macro_low, again.macro_high)
    assert (figures.macro_low, figures.macro_high) != (other.macro_low, other.macro_high)
    variances = [entry.accuracy * (1 - entry.accuracy) / 333 for entry in figures.categories.values()]
    half = 1.96 * math.sqrt(sum(variances)) / 2
    # 2,000 replicates place a 2.5 % quantile to about 5 % of the half width; 15 % is three times that.
    assert figures.macro_high - figures.macro_accuracy == pytest.approx(half, rel=0.15)
    assert figures.macro_accuracy - figures.macro_low == pytest.approx(half, rel=0.15)


def test_length_figures_equal_plain_counting():
    # better length, worse length: longer, shorter, equal, 10 % apart (matched), 11 % apart (not matched)
    items = [item(lengths) for lengths in ((30, 10), (10, 30), (20, 20), (100, 90), (89, 100))]
    figures = compute_statistics(items, [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])
    assert figures.better_is_longer_share == 2 / 5
    assert figures.length_only_accuracy == (1 + 0 + 0.5 + 1 + 0) / 5
    assert (figures.length_matched.num_pairs, figures.length_matched.accuracy) == (2, 0.5)
    assert figures.length_only_accuracy_when_matched == 0.75
    assert (figures.better_is_shorter.num_pairs, figures.better_is_shorter.accuracy) == (2, 0.5)


def test_word_overlap_baseline_is_independent_of_the_rewards():
    texts = [("one two three", ("two three", "five two")), ("a b", ("c", "d")), ("a b", ("c", "a"))]
    items = [EvaluationItem("i", "p", reference, both, (0, 1), "a", "sft") for reference, both in texts]
    assert word_overlap(items[0]) == [2 / 3, 1 / 4]  # repeated words count once: 2 of 3, 1 of {one two three five}
    for rewards in ([[1, 0]] * 3, [[0, 1]] * 3):
        assert compute_statistics(items, rewards).word_overlap_accuracy == (1 + 0.5 + 0) / 3


def test_no_length_matched_pair_gives_none_and_no_number():
    figures = compute_statistics([item((1, 50))], [[1, 0]])
    assert (figures.length_matched.accuracy, figures.length_matched.num_pairs) == (None, 0)
    assert figures.length_only_accuracy_when_matched is None


def test_equal_levels_make_no_pair_and_rankings_make_all_pairs():
    ranked, partly = item((1, 2, 3, 4)), replace(item((1, 2, 3), levels=(0, 1, 1)), prompt="another")
    rewards = [[4, 3, 2, 1], [0, 1, -1]]
    pairs = ordered_pairs([ranked, partly], rewards)
    assert pairs.item.tolist() == [0] * 6 + [1] * 2
    assert pairs.margin.tolist() == [1, 2, 3, 1, 2, 1, -1, 1]
    figures = compute_statistics([ranked, partly], rewards)
    assert figures.micro.accuracy == 7 / 8
    # Six pairs of one ranking are not six independent trials: the interval is that of two items.
    assert (figures.micro.low, figures.micro.high) == wilson_interval(7 / 8, 2)
    assert figures.reward_best_mean == (4 + 0) / 2
    assert figures.reward_worst_mean == pytest.approx((1 + 1 - 1) / 3)


def test_accuracy_equals_brute_force_over_random_items():
    draw = random.Random(11)
    items, rewards = [], []
    for index in range(200):
        count = draw.randint(2, 5)
        levels = tuple(draw.randint(0, 3) for _ in range(count))
        items.append(item(tuple(draw.randint(1, 40) for _ in levels), levels=levels, category=str(index % 3)))
        rewards.append([draw.randint(0, 4) for _ in levels])  # integers, so that ties occur
    score, pairs, longer = 0.0, 0, 0
    for entry, row in zip(items, rewards, strict=True):
        for i, j in ((i, j) for i in range(len(row)) for j in range(len(row)) if entry.levels[i] < entry.levels[j]):
            pairs += 1
            score += 1.0 if row[i] > row[j] else 0.5 if row[i] == row[j] else 0.0
            longer += len(entry.candidates[i]) > len(entry.candidates[j])
    figures = compute_statistics(items, rewards)
    assert (figures.micro.num_pairs, figures.micro.accuracy) == (pairs, pytest.approx(score / pairs))
    assert figures.better_is_longer_share == pytest.approx(longer / pairs)
    assert sum(entry.num_pairs for entry in figures.categories.values()) == pairs


def test_rewards_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="i: 1 rewards for 2 candidates"):
        compute_statistics([item((1, 2))], [[1.0]])
    with pytest.raises(ValueError, match="not all finite"):
        compute_statistics([item((1, 2))], [[1.0, float("nan")]])
    with pytest.raises(ValueError, match="no item has two candidates with different levels"):
        compute_statistics([item((1, 2), levels=(1, 1))], [[1.0, 0.0]])
    with pytest.raises(ValueError, match="2 lists of rewards for 1 items"):
        compute_statistics([item((1, 2))], [[1.0, 0.0], [1.0, 0.0]])


def test_items_of_one_prompt_count_as_less_than_independent_trials():
    """Four prompts with five items each, all right or all wrong: four observations, not twenty."""
    items = [of_prompt(f"prompt {p}") for p in range(4) for _ in range(5)]
    rewards = [[1.0, 0.0] if item.prompt != "prompt 3" else [0.0, 1.0] for item in items]
    micro = compute_statistics(items, rewards).micro
    assert (micro.accuracy, micro.num_pairs) == (0.75, 20)
    # Of clusters of five that are alike the design effect is 5, times what few prompts and pairs are short of many
    assert (micro.low, micro.high) == pytest.approx(wilson_interval(0.75, 20 / (5 * 4 / 3 * 19 / 20)))


@pytest.mark.parametrize("right", [1.0, 0.0])
@pytest.mark.parametrize("num_prompts", [1, 20])
def test_where_prompts_do_not_differ_each_counts_as_one_trial(right, num_prompts):
    items = [of_prompt(f"prompt {p}") for p in range(num_prompts) for _ in range(10)]
    micro = compute_statistics(items, [[right, 0.5]] * len(items)).micro
    assert (micro.low, micro.high) == pytest.approx(wilson_interval(right, num_prompts))


def test_one_prompt_is_one_trial_however_its_items_fall():
    micro = compute_statistics([of_prompt("the only one")] * 50, [[1.0, 0.0], [0.0, 1.0]] * 25).micro
    assert (micro.low, micro.high) == pytest.approx(wilson_interval(0.5, 1))


def test_the_macro_interval_draws_prompts():
    """Items of a prompt agree: ten of each tell no more than one, in the macro average as in the other."""
    draw = random.Random(3)
    prompts = [(f"{c} {n}", c, draw.random() < 0.7) for c in ("a", "b") for n in range(40)]
    for_each = [(of_prompt(name, category=c), [1.0, 0.0] if good else [0.0, 1.0]) for name, c, good in prompts]
    one, ten = (compute_statistics(*zip(*for_each * times, strict=True), seed=1) for times in (1, 10))
    assert ten.macro_low == pytest.approx(one.macro_low) and ten.macro_high == pytest.approx(one.macro_high)
