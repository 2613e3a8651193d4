"""What several references gain: the same items with 1, 2, 4, ... references, and paired differences. Pure numpy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_polar.data.references import mean_over_references
from megatron_polar.errors import UserError
from megatron_polar.score.more_references import with_references
from megatron_polar.score.resampling import bootstrap_intervals, weighted_mean
from megatron_polar.score.statistics import compute_statistics, ordered_pairs
from megatron_polar.score.suites import EvaluationItem

EachReward = Sequence[Sequence[float]]
"""Rewards of an item's candidates against each of its references: [reference][candidate]."""

_COPIED = ("macro_accuracy", "mean_margin", "word_overlap_accuracy")


def check_counts(counts: Sequence[int]) -> tuple[int, ...]:
    """The numbers of references to compare, ascending. Raises UserError for none, repeated ones and below 1."""
    if not counts or len(set(counts)) < len(counts) or min(counts) < 1:
        raise UserError(f"--references {' '.join(map(str, counts))}: give distinct whole numbers of 1 or more")
    return tuple(sorted(counts))


def compare_reference_counts(
    items: Sequence[EvaluationItem], rewards: Sequence[EachReward], *, counts: Sequence[int], seed: int
) -> dict[str, Any]:
    """Measure the same items with the first n of their references for each n of `counts`.

    Keys of the result: `by_count`, the accuracy for each n with its Wilson interval; `single`, the mean accuracy of the
    references each alone, which depends less on which one happens to be the first; `differences`, accuracy of the
    larger number minus that of the smaller one over the same pairs, `against` 0 meaning `single`, with 95 % bootstrap
    intervals (prompts drawn anew, seeded); `disagreement`, the share of pairs that single references order differently.
    """
    scores: dict[int, np.ndarray] = {}
    by_count = []
    for count in counts:
        fewer = with_references(items, count)
        means = [mean_over_references(rows[:count]) for rows in rewards]
        statistics = compute_statistics(fewer, means, seed=seed)
        pairs = ordered_pairs(fewer, means)
        scores[count] = pairs.score
        micro = {name: getattr(statistics.micro, name) for name in ("accuracy", "low", "high", "num_pairs", "num_ties")}
        by_count.append({"references": count, **micro, **{name: getattr(statistics, name) for name in _COPIED}})
    most = max(counts)
    each = np.stack([ordered_pairs(items, [rows[place] for rows in rewards]).score for place in range(most)])
    scores[0] = each.mean(axis=0)
    low, high = bootstrap_interval(scores[0], pairs.prompt, seed=seed)
    single = {"references_each_alone": most, "accuracy": float(scores[0].mean()), "low": low, "high": high}
    compared = [(more, fewer) for more in counts for fewer in (0, *counts) if fewer < more and more > 1]
    differences = []
    for more, fewer in compared:
        difference = scores[more] - scores[fewer]
        low, high = bootstrap_interval(difference, pairs.prompt, seed=seed)
        found = {"difference": float(difference.mean()), "low": low, "high": high}
        differences.append({"references": more, "against": fewer, **found})
    return {
        "counts": list(counts),
        "by_count": by_count,
        "single": single,
        "differences": differences,
        "disagreement": float(np.mean(each.min(axis=0) != each.max(axis=0))),
    }


def bootstrap_interval(values: np.ndarray, prompt: np.ndarray, *, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` [p] when the prompts `prompt` [p] that they belong to are drawn
    anew: values of one prompt are not independent."""
    _, cluster = np.unique(prompt, return_inverse=True)
    found = bootstrap_intervals(lambda weights: {"mean": weighted_mean(values, weights)}, cluster, seed=seed)["mean"]
    assert found is not None  # every replicate draws prompts that have values
    return found
