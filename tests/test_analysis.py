"""Policy pairs, calibration and length bias: against plain counting, values worked out by hand, and known answers."""

import csv
import math
import random

import numpy as np
import pytest

from megatron_polar.score.analysis import analyse
from megatron_polar.score.calibration import calibration, confidences, expected_calibration_error, fit_temperature
from megatron_polar.score.length_bias import length_bias, spearman
from megatron_polar.score.policy_pairs import area_under_curve, policy_pairs, policy_pairs_csv
from megatron_polar.score.resampling import bootstrap_intervals, cluster_index, weighted_mean
from megatron_polar.score.statistics import ordered_pairs, wilson_interval
from megatron_polar.score.suites import EvaluationItem


def contrast(prompt: str, own: str, other: str, *, candidates=("same", "other"), reference="r") -> EvaluationItem:
    return EvaluationItem(
        f"{prompt}/{own}/{other}", prompt, reference, candidates, (0, 1), "policy", "sft", (own, other), own
    )


def pair(index: int, *, prompt: str | None = None, lengths=(3, 3)) -> EvaluationItem:
    candidates = ("a" * lengths[0], "b" * lengths[1])
    return EvaluationItem(f"i{index}", prompt or f"p{index}", "a b c", candidates, (0, 1), "c", "sft")


def brute_force_auc(positives, negatives) -> float:
    wins = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


# --- AUC and policies


def test_auc_equals_counting_every_pair_ties_included():
    draw = random.Random(5)
    for count in (2, 3, 17, 120):
        rewards = np.array([draw.randint(0, 9) / 2 for _ in range(count)])  # many ties
        is_positive = np.array([True, False, *(draw.random() < 0.4 for _ in range(count - 2))])
        (found,) = area_under_curve(rewards, is_positive, np.ones((1, count)))
        assert found == pytest.approx(brute_force_auc(rewards[is_positive], rewards[~is_positive]), abs=1e-12)


def test_weights_of_the_auc_count_as_copies():
    draw = random.Random(6)
    rewards = np.array([draw.randint(0, 5) for _ in range(40)], dtype=float)
    is_positive = np.array([draw.random() < 0.5 for _ in range(40)])
    weights = np.array([[draw.randint(0, 3) for _ in range(40)] for _ in range(4)])
    for found, weight in zip(area_under_curve(rewards, is_positive, weights), weights, strict=True):
        copies, kinds = np.repeat(rewards, weight), np.repeat(is_positive, weight)
        assert found == pytest.approx(brute_force_auc(copies[kinds], copies[~kinds]), abs=1e-12)
    assert np.isnan(area_under_curve(rewards, np.ones(40, dtype=bool), weights)).all()


def test_the_matrix_of_policies_equals_plain_counting():
    draw = random.Random(7)
    policies = ["a", "b", "c", "d"]
    items, rewards = [], []
    for number in range(300):
        own, other = draw.sample(policies[: 3 if number % 2 else 4], 2)
        own, other = (other, own) if own == "d" else (own, other)  # d is never the reference
        items.append(contrast(f"p{number % 60}", own, other))
        rewards.append([draw.randint(0, 4), draw.randint(0, 3)])
    found = policy_pairs(items, rewards, seed=1)
    assert found.policies == policies
    for row, own in enumerate(policies):
        for column, other in enumerate(policies):
            of = [r for i, r in zip(items, rewards, strict=True) if i.labels == (own, other)]
            right = sum(1.0 if s > o else 0.5 if s == o else 0.0 for s, o in of)
            assert found.num_pairs[row][column] == len(of)
            assert found.accuracy[row][column] == (pytest.approx(right / len(of)) if of else None)
        of_row = [r for i, r in zip(items, rewards, strict=True) if i.reference_label == own]
        assert found.by_reference[own].num_pairs == len(of_row)
        if of_row:
            expected = brute_force_auc([s for s, _ in of_row], [o for _, o in of_row])
            assert found.auc[own].auc == pytest.approx(expected)
            assert found.auc[own].low < expected < found.auc[own].high
    assert "d" not in found.auc
    assert found.macro_auc.auc == pytest.approx(np.mean([area.auc for area in found.auc.values()]))
    assert found.pooled_auc.auc == pytest.approx(brute_force_auc(*zip(*rewards, strict=True)))
    rows = list(csv.DictReader(policy_pairs_csv(found)))
    assert len(rows) == sum(count > 0 for line in found.num_pairs for count in line)
    cell = next(row for row in rows if (row["reference_policy"], row["contrast_policy"]) == ("a", "d"))
    assert (int(cell["num_pairs"]), float(cell["accuracy"])) == (found.num_pairs[0][3], found.accuracy[0][3])
    assert (float(cell["low"]), float(cell["high"])) == wilson_interval(found.accuracy[0][3], found.num_pairs[0][3])


def test_one_threshold_may_fail_where_every_pair_is_right():
    # Each prompt has its own level of rewards: all pairs are right, and no threshold separates the kinds.
    items = [contrast(f"p{number}", "a", "b") for number in range(50)]
    found = policy_pairs(items, [[10 * n + 1.0, 10 * n] for n in range(50)])
    assert (found.accuracy[0][1], found.macro_auc.auc) == (1.0, pytest.approx(0.51))


def test_items_without_policies_of_both_kinds_have_no_matrix():
    assert policy_pairs([pair(1)], [[1.0, 0.0]]) is None
    other_reference = EvaluationItem("i", "p", "r", ("x", "y"), (0, 1), "c", "sft", ("a", "b"), "z")
    assert policy_pairs([contrast("p", "a", "b"), other_reference], [[1.0, 0.0]] * 2) is None
    assert policy_pairs([], []) is None


def test_names_of_policies_cannot_break_the_file_or_the_figures():
    items = [contrast(f"p{n}", own, other) for n in range(9) for own, other in (("macro", 'x,"y"'), ('x,"y"', "macro"))]
    found = policy_pairs(items, [[1.0, 0.0]] * 18)
    rows = list(csv.reader(policy_pairs_csv(found)))
    assert [row[:2] for row in rows[1:]] == [["macro", 'x,"y"'], ['x,"y"', "macro"]]
    assert found.auc["macro"].auc == 1.0


# --- resampling


def test_intervals_draw_whole_clusters():
    # 25 prompts of 8 equal observations: the standard error is that of 25 means, not of 200.
    draw = random.Random(9)
    means = [draw.random() for _ in range(25)]
    values, cluster = np.repeat(means, 8), cluster_index([f"p{n}" for n in range(25) for _ in range(8)])
    (low, high) = bootstrap_intervals(lambda w: {"mean": weighted_mean(values, w)}, cluster, seed=0)["mean"]
    half = 1.96 * np.std(means) / math.sqrt(25)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)  # 2,000 replicates place each end to about 5 % of it
    again = bootstrap_intervals(lambda w: {"mean": weighted_mean(values, w)}, cluster, seed=0)["mean"]
    assert again == (low, high)
    assert bootstrap_intervals(lambda w: {"none": np.full(len(w), np.nan)}, cluster, seed=0) == {"none": None}


# --- calibration


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_calibration_error_of_a_worked_example():
    # Confidence 0.62, four pairs, three right: gap 0.13. Confidence 0.93, six pairs, three right: gap 0.43.
    margins = np.array([logit(0.62)] * 3 + [-logit(0.62)] + [logit(0.93)] * 3 + [-logit(0.93)] * 3)
    assert expected_calibration_error(margins) == pytest.approx((4 * 0.13 + 6 * 0.43) / 10)
    found = calibration(ordered_pairs([pair(n) for n in range(10)], [[m, 0.0] for m in margins]))
    assert found.ece == pytest.approx(0.31)
    brier = [(1 - p) ** 2 for p in (0.62, 0.62, 0.62, 0.38, 0.93, 0.93, 0.93, 0.07, 0.07, 0.07)]
    assert found.brier == pytest.approx(sum(brier) / 10)
    assert found.log_loss == pytest.approx(-np.mean(np.log([0.62] * 3 + [0.38] + [0.93] * 3 + [0.07] * 3)))
    assert [(one.low, one.high, one.num_pairs) for one in found.bins if one.num_pairs] == [
        (pytest.approx(0.6), pytest.approx(0.65), 4),
        (pytest.approx(0.9), pytest.approx(0.95), 6),
    ]
    assert (found.bins[2].confidence, found.bins[2].accuracy) == (pytest.approx(0.62), 0.75)
    assert (found.bins[2].accuracy_low, found.bins[2].accuracy_high) == wilson_interval(0.75, 4)
    assert found.ece_low <= found.ece <= found.ece_high and found.brier_low < found.brier < found.brier_high


def test_swapping_the_answers_changes_no_error_and_ties_are_half_right():
    assert confidences(np.array([0.0, 2.0, -2.0])).tolist() == [0.5, *[1 / (1 + math.exp(-2))] * 2]
    assert expected_calibration_error(np.array([0.0, 0.0])) == 0.0  # confidence 1/2, half right
    assert confidences(np.array([1e6]))[0] == 1.0
    found = calibration(ordered_pairs([pair(n) for n in range(4)], [[1e6, 0.0], [0.0, 1e6], [0.0, 0.0], [1.0, 0.0]]))
    assert math.isfinite(found.log_loss) and found.brier == pytest.approx(
        (0 + 1 + 0.25 + (1 - 1 / (1 + math.exp(-1))) ** 2) / 4
    )
    assert found.bins[-1].num_pairs == 2  # confidence 1 belongs to the last bin


def test_well_calibrated_rewards_are_found_to_be_and_a_scale_is_found_again():
    draw = random.Random(3)
    margins = []
    for _ in range(4000):
        margin = draw.gauss(0, 1.5)
        margins.append(margin if draw.random() < 1 / (1 + math.exp(-margin)) else -margin)  # right as often as said
    items = [pair(number) for number in range(4000)]
    good = calibration(ordered_pairs(items, [[m, 0.0] for m in margins]))
    assert good.ece < 0.03
    assert good.fit.temperature == pytest.approx(1.0, abs=0.15)
    sharp = calibration(ordered_pairs(items, [[3 * m, 0.0] for m in margins]))
    assert sharp.ece > 0.1
    assert sharp.fit.temperature == pytest.approx(3 * good.fit.temperature, rel=1e-6)
    assert sharp.fit.ece_after < 0.05 < sharp.fit.ece_before
    assert sharp.fit.log_loss_after < sharp.fit.log_loss_before
    assert (sharp.fit.num_fit_pairs, sharp.fit.num_test_pairs) == (2000, 2000)


def test_the_temperature_is_the_one_of_a_worked_example_and_is_fitted_apart():
    # Three of four pairs right at margin 1 in either half: the best probability is 3/4, so 1 / temperature = ln 3.
    items = [pair(4 * number + k, prompt=f"p{number}") for number in range(10) for k in range(4)]
    pairs = ordered_pairs(items, [[1.0, 0.0] if n % 4 else [0.0, 1.0] for n in range(40)])
    fit = fit_temperature(pairs)
    assert fit.temperature == pytest.approx(1 / math.log(3), rel=1e-9)
    assert (fit.num_fit_pairs, fit.num_test_pairs) == (20, 20)  # whole prompts
    assert fit.ece_after == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ([[1.0, 0.0]] * 6, "every pair is right"),
        ([[0.0, 1.0]] * 6, "the mean margin is not above 0"),
        ([[0.0, 0.0]] * 6, "the mean margin is not above 0"),
    ],
)
def test_where_no_temperature_is_best_the_reason_is_said(rewards, reason):
    fit = fit_temperature(ordered_pairs([pair(n) for n in range(6)], rewards))
    assert fit.temperature is None and fit.reason.startswith(reason)
    assert fit.log_loss_before is not None and fit.log_loss_after is None


def test_one_prompt_cannot_be_split():
    fit = fit_temperature(ordered_pairs([pair(n, prompt="p") for n in range(6)], [[1.0, 0.0]] * 6))
    assert (fit.temperature, fit.reason) == (None, "one prompt cannot be split")


# --- length


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2], [5, 4], -1.0),
        # The textbook formula 1 - 6 sum d^2 / (n (n^2 - 1)) without ties: d = 1, 1, 1, 1, 0.
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),
        # Ties: Pearson's r of the ranks 1.5, 1.5, 3, 4 and 1, 2, 3, 4.
        ([7, 7, 9, 99], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
    ],
)
def test_spearman_equals_values_worked_out_by_hand(first, second, expected):
    assert spearman(first, second) == pytest.approx(expected)
    assert math.isnan(spearman([1, 1], [1, 2]))


def test_length_bias_tells_a_model_that_counts_from_one_that_knows():
    draw = random.Random(4)
    items = [pair(n, lengths=(draw.randint(1, 40), draw.randint(1, 40))) for n in range(200)]
    counting = length_bias(items, [[len(c) for c in item.candidates] for item in items])
    knowing = length_bias(items, [[1.0, 0.0]] * 200)
    different = sum(len(i.candidates[0]) != len(i.candidates[1]) for i in items)
    longer = sum(len(i.candidates[0]) > len(i.candidates[1]) for i in items)
    assert counting.reward_and_length.correlation == pytest.approx(1.0)
    assert counting.reward_and_length.num_items == different
    assert (counting.better_is_longer.accuracy, counting.better_is_shorter.accuracy) == (1.0, 0.0)
    assert (counting.better_is_longer.num_pairs, counting.better_is_shorter.num_pairs) == (longer, different - longer)
    # With two candidates: the share that agrees minus the share that does not.
    assert knowing.reward_and_length.correlation == pytest.approx((2 * longer - different) / different)
    assert knowing.reward_and_length == knowing.quality_and_length == counting.quality_and_length
    assert knowing.prefer_longer.accuracy == pytest.approx((longer + (200 - different) / 2) / 200)
    assert knowing.prefer_longer == counting.prefer_longer
    low, high = knowing.reward_and_length.low, knowing.reward_and_length.high
    assert low < knowing.reward_and_length.correlation < high


def test_equal_lengths_or_rewards_have_no_correlation_and_no_reference_no_overlap():
    item = EvaluationItem("i", "p", "", ("ab", "cd"), (0, 1), "c", "sft")
    found = length_bias([item], [[1.0, 0.0]])
    assert (found.reward_and_length.correlation, found.reward_and_length.num_items) == (None, 0)
    assert found.prefer_word_overlap is None


# --- the whole


def test_free_wins_are_counted_apart():
    free = EvaluationItem("a", "p", "ref ", ("ref", "x"), (0, 1), "c", "sft")
    lost = EvaluationItem("b", "q", "ref", ("x", "y", "ref"), (0, 1, 2), "c", "sft")
    found = analyse([free, lost, pair(1)], [[1, 0], [3, 4, 9], [1, 0]], suite="preferences", scheme="gold").figures
    assert (found["reference_scheme"], "ground truth" in found["reference_scheme_meaning"]) == ("gold", True)
    assert (found["free_wins"]["num_candidates"], found["free_wins"]["num_pairs"]) == (2, 3)
    without = found["free_wins"]["without"]
    assert (without["num_pairs"], without["accuracy"]) == (2, 0.5)  # x over y, wrong, and the last item, right
    assert found["published"] is None and found["policy_pairs"] is None
    empty = EvaluationItem("a", "p", "", ("", "x"), (0, 1), "c", "sft")
    assert analyse([empty], [[1, 0]], suite="s", scheme="none").figures["free_wins"]["num_candidates"] == 0
