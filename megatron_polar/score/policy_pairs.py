"""Policy discrimination: which policies a reward model tells apart, pair by pair, and by one threshold for all prompts.

An item of the suite "policies" compares a second trajectory of the reference's policy with one of another policy.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_polar.score.resampling import bootstrap_intervals, cluster_index
from megatron_polar.score.statistics import Accuracy, measure_accuracy, ordered_pairs, wilson_interval
from megatron_polar.score.suites import EvaluationItem


@dataclass(frozen=True)
class Auc:
    """Area under the ROC curve with its 95 % bootstrap interval; None where one side is missing."""

    auc: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PolicyPairs:
    """All figures by the policy of the reference (rows) and the policy it is contrasted with (columns)."""

    policies: list[str]  # p of them, in the order of rows and columns
    accuracy: list[list[float | None]]  # [p, p], ties count 1/2; None where no pair was compared
    num_pairs: list[list[int]]  # [p, p]
    by_reference: dict[str, Accuracy]
    by_contrast: dict[str, Accuracy]
    auc: dict[str, Auc]  # by the policy of the reference
    macro_auc: Auc  # mean over the policies of references
    pooled_auc: Auc  # all rewards of same-policy candidates against all of others


def policy_pairs(
    items: Sequence[EvaluationItem], rewards: Sequence[Sequence[float]], *, seed: int = 0
) -> PolicyPairs | None:
    """Accuracy of every pair of policies and AUC of every reference's policy; None for items of another kind.

    The accuracy compares two candidates of one prompt and reference. The AUC is the probability that a same-policy
    reward is above an other-policy reward where both are drawn from all prompts, equal ones counting 1/2: whether one
    threshold would do. Intervals of the AUC draw whole prompts anew.
    """
    if not items or not all(map(_is_discrimination, items)):
        return None
    pairs = ordered_pairs(items, rewards)
    names, places = np.unique(np.array([_policies(item) for item in items])[pairs.item], return_inverse=True)
    policies, (rows, columns) = names.tolist(), places.reshape(-1, 2).T
    right, num_pairs = np.zeros((len(policies), len(policies))), np.zeros((len(policies), len(policies)), dtype=int)
    np.add.at(right, (rows, columns), pairs.score)
    np.add.at(num_pairs, (rows, columns), 1)
    auc, macro, pooled = _areas(items, rewards, seed=seed)
    return PolicyPairs(
        policies=policies,
        accuracy=[
            [float(share / count) if count else None for share, count in zip(*line, strict=True)]
            for line in zip(right, num_pairs, strict=True)
        ],
        num_pairs=num_pairs.tolist(),
        by_reference={name: measure_accuracy(pairs, rows == place) for place, name in enumerate(policies)},
        by_contrast={name: measure_accuracy(pairs, columns == place) for place, name in enumerate(policies)},
        auc=auc,
        macro_auc=macro,
        pooled_auc=pooled,
    )


def policy_pairs_csv(pairs: PolicyPairs) -> Iterator[str]:
    """Lines of a CSV file: a header, and a line per pair of policies that was compared."""
    yield _csv_line(["reference_policy", "contrast_policy", "num_pairs", "accuracy", "low", "high"])
    for row, accuracies, counts in zip(pairs.policies, pairs.accuracy, pairs.num_pairs, strict=True):
        for column, accuracy, count in zip(pairs.policies, accuracies, counts, strict=True):
            if accuracy is not None:
                yield _csv_line([row, column, count, accuracy, *wilson_interval(accuracy, count)])


def area_under_curve(rewards: np.ndarray, is_positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """P[a positive's reward > a negative's], ties 1/2, for each row of weights [r, n] -> [r]; NaN where undefined.

    Mann and Whitney's U over the number of pairs (1947), by sorting once; weights say how often each reward occurs.
    """
    order = np.argsort(rewards, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(rewards[order]) > 0])  # of groups of equal rewards
    positive = np.add.reduceat(weights[:, order] * is_positive[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * ~is_positive[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    with np.errstate(invalid="ignore"):
        wins = (positive * (below + 0.5 * negative)).sum(axis=1)
        return wins / (positive.sum(axis=1) * negative.sum(axis=1))


def _areas(
    items: Sequence[EvaluationItem], rewards: Sequence[Sequence[float]], *, seed: int
) -> tuple[dict[str, Auc], Auc, Auc]:
    reward = np.array([value for row in rewards for value in row], dtype=np.float64)
    is_same = np.array([label == item.reference_label for item in items for label in item.labels])
    policy = np.array([item.reference_label for item in items for _ in item.labels])
    cluster = cluster_index([item.prompt for item in items for _ in item.labels])
    chosen = {name: np.flatnonzero(policy == name) for name in sorted(set(policy.tolist()))}

    def areas(weights: np.ndarray) -> dict[str, np.ndarray]:  # names of policies could be "macro": so they are indexed
        found = [area_under_curve(reward[at], is_same[at], weights[:, at]) for at in chosen.values()]
        present = np.sum(~np.isnan(found), axis=0)
        macro = np.where(present > 0, np.nansum(found, axis=0) / np.maximum(present, 1), np.nan)
        values = {str(number): value for number, value in enumerate(found)}
        return values | {"macro": macro, "pooled": area_under_curve(reward, is_same, weights)}

    intervals = bootstrap_intervals(areas, cluster, seed=seed)
    point = {name: _auc(float(value[0]), intervals[name]) for name, value in areas(np.ones((1, len(reward)))).items()}
    by_policy = {name: point[str(number)] for number, name in enumerate(chosen)}
    return by_policy, point["macro"], point["pooled"]


def _auc(value: float, interval: tuple[float, float] | None) -> Auc:
    return Auc(None if np.isnan(value) else value, *(interval or (None, None)))


def _is_discrimination(item: EvaluationItem) -> bool:
    if len(item.labels) != 2 or len(set(item.levels)) != 2 or len(item.levels) != 2:
        return False
    same, other = _policies(item)
    return same == item.reference_label != other and bool(same and other)


def _policies(item: EvaluationItem) -> tuple[str, str]:
    """The policies of the better candidate and of the worse one."""
    return item.labels if item.levels[0] < item.levels[1] else item.labels[::-1]


def _csv_line(cells: Sequence[str | int | float]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(cells)
    return stream.getvalue()
