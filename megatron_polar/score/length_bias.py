"""How much of the rewards is length, beside how much of the known order is, and beside scorers that learnt nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_polar.score.resampling import bootstrap_intervals, cluster_index, weighted_mean
from megatron_polar.score.statistics import Accuracy, measure_accuracy, ordered_pairs, word_overlap
from megatron_polar.score.suites import EvaluationItem


@dataclass(frozen=True)
class Correlation:
    """Mean over items of Spearman's correlation within an item, with a 95 % interval from whole prompts drawn anew.

    Items in which one side does not vary have none. With two candidates an item's correlation is 1 or -1, and the mean
    is the share of items in which both sides agree minus the share in which they do not.
    """

    correlation: float | None
    low: float | None
    high: float | None
    num_items: int


@dataclass(frozen=True)
class LengthBias:
    """Lengths are characters. Accuracies are shares of right pairs with Wilson's interval, as everywhere."""

    reward_and_length: Correlation
    quality_and_length: Correlation  # the same of the order that is known: what a model without bias would show
    better_is_shorter: Accuracy
    better_is_longer: Accuracy
    prefer_longer: Accuracy  # baselines
    prefer_word_overlap: Accuracy | None  # None where no item has a reference


def length_bias(items: Sequence[EvaluationItem], rewards: Sequence[Sequence[float]], *, seed: int = 0) -> LengthBias:
    """Measure length against the rewards, one list per item in the order of its candidates."""
    pairs = ordered_pairs(items, rewards)
    everything = np.ones(len(pairs.item), dtype=bool)
    lengths = [[len(candidate) for candidate in item.candidates] for item in items]
    quality = [[-level for level in item.levels] for item in items]
    overlap = [word_overlap(item) for item in items] if any(item.reference for item in items) else None
    return LengthBias(
        reward_and_length=_correlation(items, rewards, lengths, seed=seed),
        quality_and_length=_correlation(items, quality, lengths, seed=seed),
        better_is_shorter=measure_accuracy(pairs, pairs.better_length < pairs.worse_length),
        better_is_longer=measure_accuracy(pairs, pairs.better_length > pairs.worse_length),
        prefer_longer=measure_accuracy(ordered_pairs(items, lengths), everything),
        prefer_word_overlap=None if overlap is None else measure_accuracy(ordered_pairs(items, overlap), everything),
    )


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation (1904), equal values having their mean rank; NaN where one side is constant."""
    ranks = [_mean_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    one, other = (values - values.mean() for values in ranks)
    scale = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / scale) if scale > 0 else float("nan")


def _correlation(
    items: Sequence[EvaluationItem], first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], *, seed: int
) -> Correlation:
    values = np.array([spearman(a, b) for a, b in zip(first, second, strict=True)])
    present = ~np.isnan(values)
    if not present.any():
        return Correlation(None, None, None, 0)
    values = values[present]
    cluster = cluster_index([item.prompt for item, kept in zip(items, present, strict=True) if kept])
    intervals = bootstrap_intervals(lambda weights: {"mean": weighted_mean(values, weights)}, cluster, seed=seed)
    return Correlation(float(values.mean()), *(intervals["mean"] or (None, None)), len(values))


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    below = (values[None, :] < values[:, None]).sum(axis=1)  # items are small: K^2 comparisons beat sorting
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    return below + (equal + 1) / 2
