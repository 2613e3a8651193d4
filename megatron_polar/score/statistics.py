"""Figures of an evaluation: accuracies with intervals, macro average, and what text alone explains. Pure numpy.

The unit is the ordered pair: two candidates of one item with different levels. A pair is right when the better one has
the higher reward, and half right when the rewards are equal. Lengths are characters: the same for every tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_polar.score.resampling import REPLICATES, draws
from megatron_polar.score.suites import EvaluationItem

Z_95 = 1.959963984540054
LENGTH_MATCH = 0.1  # lengths are matched when they differ by at most this share of the longer one
_NO_VARIANCE = 1e-12  # what is left of rounding


@dataclass(frozen=True)
class Accuracy:
    """A share of right pairs (ties count 1/2) with its 95 % Wilson interval; None where there is no pair."""

    accuracy: float | None
    low: float | None
    high: float | None
    num_pairs: int
    num_items: int
    num_ties: int


@dataclass(frozen=True)
class Statistics:
    """All figures of one evaluation; docs/evaluation.md defines them one by one."""

    micro: Accuracy
    macro_accuracy: float
    macro_low: float
    macro_high: float
    categories: dict[str, Accuracy]
    tie_rate: float
    length_matched: Accuracy
    better_is_shorter: Accuracy
    better_is_longer_share: float
    length_only_accuracy: float
    length_only_accuracy_when_matched: float | None
    word_overlap_accuracy: float
    mean_margin: float
    reward_best_mean: float
    reward_best_std: float
    reward_worst_mean: float
    reward_worst_std: float


@dataclass(frozen=True)
class Pairs:
    """The ordered pairs of all items; every array is [p], one entry per pair."""

    item: np.ndarray  # index of the item
    prompt: np.ndarray  # index of the item's prompt: items of one prompt are not independent
    margin: np.ndarray  # reward of the better candidate minus that of the worse
    better_length: np.ndarray  # characters
    worse_length: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """1 for a right pair, 1/2 for a tie, 0 for a wrong one."""
        return pair_score(self.margin)


def compute_statistics(
    items: Sequence[EvaluationItem], rewards: Sequence[Sequence[float]], *, seed: int = 0
) -> Statistics:
    """Compute all figures from the rewards, one list per item in the order of its candidates.

    Raises ValueError for rewards that do not fit the items or are not finite, and for items without an ordered pair.
    """
    pairs = ordered_pairs(items, rewards)
    names = sorted({item.category for item in items})
    category = np.array([names.index(item.category) for item in items])[pairs.item]
    matched = np.abs(pairs.better_length - pairs.worse_length) <= LENGTH_MATCH * np.maximum(
        pairs.better_length, pairs.worse_length
    )
    categories = {name: measure_accuracy(pairs, category == index) for index, name in enumerate(names)}
    categories = {name: accuracy for name, accuracy in categories.items() if accuracy.num_pairs}
    macro_low, macro_high = _macro_interval(pairs, category, seed=seed)
    length_score = pair_score(pairs.better_length - pairs.worse_length)
    overlap = ordered_pairs(items, [word_overlap(item) for item in items])
    best, worst = _best_and_worst(items, rewards)
    return Statistics(
        micro=measure_accuracy(pairs),
        macro_accuracy=float(np.mean([accuracy.accuracy for accuracy in categories.values()])),
        macro_low=macro_low,
        macro_high=macro_high,
        categories=categories,
        tie_rate=float(np.mean(pairs.margin == 0)),
        length_matched=measure_accuracy(pairs, matched),
        better_is_shorter=measure_accuracy(pairs, pairs.better_length < pairs.worse_length),
        better_is_longer_share=float(np.mean(pairs.better_length > pairs.worse_length)),
        length_only_accuracy=float(np.mean(length_score)),
        length_only_accuracy_when_matched=float(np.mean(length_score[matched])) if matched.any() else None,
        word_overlap_accuracy=float(np.mean(overlap.score)),
        mean_margin=float(np.mean(pairs.margin)),
        reward_best_mean=float(np.mean(best)),
        reward_best_std=float(np.std(best)),
        reward_worst_mean=float(np.mean(worst)),
        reward_worst_std=float(np.std(worst)),
    )


def ordered_pairs(items: Sequence[EvaluationItem], rewards: Sequence[Sequence[float]]) -> Pairs:
    """List every pair of candidates with different levels: K(K-1)/2 of an item whose K levels all differ."""
    if len(items) != len(rewards):
        raise ValueError(f"{len(rewards)} lists of rewards for {len(items)} items")
    rows: list[tuple[int, float, int, int]] = []
    for index, (item, row) in enumerate(zip(items, rewards, strict=True)):
        if not len(row) == len(item.levels) == len(item.candidates):
            raise ValueError(f"{item.identifier}: {len(row)} rewards for {len(item.candidates)} candidates")
        if not np.isfinite(row).all():
            raise ValueError(f"{item.identifier}: rewards {list(row)} are not all finite; the checkpoint is damaged")
        for better, better_level in enumerate(item.levels):
            for worse, worse_level in enumerate(item.levels):
                if better_level < worse_level:
                    lengths = len(item.candidates[better]), len(item.candidates[worse])
                    rows.append((index, float(row[better]) - float(row[worse]), *lengths))
    if not rows:
        raise ValueError("no item has two candidates with different levels, so there is nothing to measure")
    item_index, margin, better_length, worse_length = zip(*rows, strict=True)
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(item.prompt for item in items))}
    prompt_index = np.array([prompts[items[i].prompt] for i in item_index])
    return Pairs(np.array(item_index), prompt_index, np.array(margin), np.array(better_length), np.array(worse_length))


def word_overlap(item: EvaluationItem) -> list[float]:
    """Rate candidates by the words they share with the reference, the mean over several: what can be had without
    learning."""
    shares = [[shared_words(reference, candidate) for reference in item.references] for candidate in item.candidates]
    return [sum(row) / len(row) for row in shares]


def shared_words(reference: str, candidate: str) -> float:
    """Words that both texts have, as a share of those that either has (Jaccard): 0 to 1."""
    ours, theirs = set(candidate.split()), set(reference.split())
    return len(ours & theirs) / max(1, len(ours | theirs))


def wilson_interval(accuracy: float, count: float, *, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of a share observed in `count` independent trials (E. B. Wilson, 1927).

    Unlike accuracy +- z * standard error it stays within 0..1 and does not collapse at 0 and 1.
    """
    if count <= 0:
        raise ValueError("an interval needs at least one trial")
    scale = 1 + z**2 / count
    centre = (accuracy + z**2 / (2 * count)) / scale
    half = z * np.sqrt(accuracy * (1 - accuracy) / count + z**2 / (4 * count**2)) / scale
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def pair_score(difference: np.ndarray) -> np.ndarray:
    """1 for a positive difference, 1/2 for none, 0 for a negative one."""
    return 0.5 * (1 + np.sign(difference))


def measure_accuracy(pairs: Pairs, chosen: np.ndarray | None = None) -> Accuracy:
    """Measure the chosen pairs (all for None), with Wilson's interval for the independent trials that they are worth.

    chosen: bool [p].
    """
    chosen = np.ones(len(pairs.item), dtype=bool) if chosen is None else chosen
    num_pairs, num_items = int(chosen.sum()), len(np.unique(pairs.item[chosen]))
    if not num_pairs:
        return Accuracy(None, None, None, 0, 0, 0)
    accuracy = float(pairs.score[chosen].mean())
    low, high = wilson_interval(accuracy, _independent_trials(pairs, chosen, limit=num_items))
    return Accuracy(accuracy, low, high, num_pairs, num_items, int((pairs.margin[chosen] == 0).sum()))


def _independent_trials(pairs: Pairs, chosen: np.ndarray, *, limit: int) -> float:
    """How many independent trials would give the variance that the pairs have when whole prompts are resampled.

    Pairs of one prompt tend to be right or wrong together. With one pair a prompt this is the number of pairs; it is
    never more than the number of items. Where prompts do not differ, as when all pairs are right, nothing is known of
    that, and a prompt counts as one. Variances are those of samples: of few prompts it matters.
    """
    score = pairs.score[chosen]
    _, prompt = np.unique(pairs.prompt[chosen], return_inverse=True)
    num_pairs, num_prompts = len(score), int(prompt.max()) + 1
    residuals = np.bincount(prompt, weights=score - score.mean())
    between = np.square(residuals).sum() / num_pairs**2 * num_prompts / max(1, num_prompts - 1)
    if between < _NO_VARIANCE:
        return min(num_prompts, limit)
    return min(float(score.mean() * (1 - score.mean()) / (num_pairs - 1) / between) * num_pairs, limit)


def _macro_interval(pairs: Pairs, category: np.ndarray, *, seed: int) -> tuple[float, float]:
    """Bootstrap the macro average: prompts are drawn anew within each category; percentiles 2.5 and 97.5."""
    total, present = np.zeros(REPLICATES), np.unique(category)
    for index in present:
        _, prompt = np.unique(pairs.prompt[category == index], return_inverse=True)
        right = np.bincount(prompt, weights=pairs.score[category == index])  # [prompts]
        count = np.bincount(prompt)
        drawn = draws(len(count), seed=(seed, int(index)))
        total += np.concatenate([(times @ right) / (times @ count) for times in drawn])
    low, high = np.percentile(total / len(present), [2.5, 97.5])
    return float(low), float(high)


def _best_and_worst(
    items: Sequence[EvaluationItem], rewards: Sequence[Sequence[float]]
) -> tuple[list[float], list[float]]:
    """Collect the rewards of the candidates at the best and at the worst level of every item that has an order."""
    best, worst = [], []
    for item, row in zip(items, rewards, strict=True):
        if min(item.levels) == max(item.levels):
            continue
        best += [reward for reward, level in zip(row, item.levels, strict=True) if level == min(item.levels)]
        worst += [reward for reward, level in zip(row, item.levels, strict=True) if level == max(item.levels)]
    return best, worst
