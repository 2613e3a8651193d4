"""Whether sigmoid(reward difference) is the probability that it is read as: that the answer with more reward is better.

The loss that rewards are trained with (Bradley and Terry, 1952; POLAR's equations 7 and 8) gives the difference of two
rewards this meaning. The confidence of a pair is sigmoid(|difference|), 0.5 to 1, and its outcome whether the answer
with the higher reward is the better one (1/2 where the rewards are equal), so that nothing depends on which answer is
named first.
"""

from dataclasses import dataclass

import numpy as np

from megatron_polar.score.resampling import bootstrap_intervals, weighted_mean
from megatron_polar.score.statistics import Pairs, wilson_interval

NUM_BINS = 10
_EDGES = np.linspace(0.5, 1.0, NUM_BINS + 1)


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence lies in [low, high): their mean confidence, and how many of them are right."""

    low: float
    high: float
    num_pairs: int
    confidence: float | None
    accuracy: float | None
    accuracy_low: float | None  # Wilson's interval, pairs taken as independent
    accuracy_high: float | None


@dataclass(frozen=True)
class Fit:
    """The temperature that makes the rewards of one half of the prompts most likely, and what it does to the other."""

    temperature: float | None  # probabilities are sigmoid(difference / temperature); None: `reason` says why
    reason: str
    num_fit_pairs: int
    num_test_pairs: int
    log_loss_before: float | None
    log_loss_after: float | None
    brier_before: float | None
    brier_after: float | None
    ece_before: float | None
    ece_after: float | None


@dataclass(frozen=True)
class Calibration:
    """Errors of the probabilities, with 95 % intervals from whole prompts drawn anew; docs/evaluation.md has more."""

    ece: float
    ece_low: float | None
    ece_high: float | None
    brier: float
    brier_low: float | None
    brier_high: float | None
    log_loss: float
    mean_confidence: float
    bins: list[Bin]
    fit: Fit


def calibration(pairs: Pairs, *, seed: int = 0) -> Calibration:
    """Measure the probabilities of the ordered pairs (`statistics.ordered_pairs`)."""
    confidence, right = confidences(pairs.margin), pairs.score
    index = _bin_of(confidence)
    squared = brier_terms(pairs.margin)

    def errors(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"ece": _weighted_ece(confidence, right, index, weights), "brier": weighted_mean(squared, weights)}

    intervals = bootstrap_intervals(errors, pairs.prompt, seed=seed)
    return Calibration(
        expected_calibration_error(pairs.margin),
        *(intervals["ece"] or (None, None)),
        float(squared.mean()),
        *(intervals["brier"] or (None, None)),
        log_loss=mean_log_loss(pairs.margin),
        mean_confidence=float(confidence.mean()),
        bins=[_bin(confidence, right, index == number, number) for number in range(NUM_BINS)],
        fit=fit_temperature(pairs, seed=seed),
    )


def confidences(margin: np.ndarray) -> np.ndarray:
    """sigmoid(|margin|): the probability of the answer that the rewards prefer, [p]."""
    return 1 / (1 + np.exp(-np.abs(margin)))


def brier_terms(margin: np.ndarray) -> np.ndarray:
    """(1 - P[the better answer])^2 of each pair, [p]; 1/4 is what the constant 1/2 gets (G. W. Brier, 1950)."""
    return np.exp(-2 * np.logaddexp(0.0, margin))  # 1 - sigmoid(m) = exp(-log(1 + e^m))


def mean_log_loss(margin: np.ndarray) -> float:
    """Mean of -log sigmoid(margin): the training loss on these pairs; log 2 is chance."""
    return float(np.logaddexp(0.0, -margin).mean())


def expected_calibration_error(margin: np.ndarray) -> float:
    """Mean over pairs of |accuracy - mean confidence| of their bin: 10 bins of equal width from 0.5 to 1.

    M. P. Naeini, G. Cooper and M. Hauskrecht, AAAI 2015, over confidences instead of class probabilities.
    """
    confidence, right = confidences(margin), 0.5 * (1 + np.sign(margin))
    return float(_weighted_ece(confidence, right, _bin_of(confidence), np.ones((1, len(margin))))[0])


def fit_temperature(pairs: Pairs, *, seed: int = 0) -> Fit:
    """Fit a temperature on a seeded half of the prompts and measure it on the other half (C. Guo et al., ICML 2017)."""
    prompts = np.unique(pairs.prompt)
    first_half = np.random.default_rng(seed).permutation(prompts)[: len(prompts) // 2]
    is_fit = np.isin(pairs.prompt, first_half)
    fit, test = pairs.margin[is_fit], pairs.margin[~is_fit]
    scale, reason = (None, "one prompt cannot be split") if not len(fit) else _best_scale(fit)
    before = _losses(test)
    after = (None, None, None) if scale is None else _losses(test * scale)
    both = [value for pair in zip(before, after, strict=True) for value in pair]
    return Fit(None if scale is None else 1 / scale, reason, len(fit), len(test), *both)


def _losses(margin: np.ndarray) -> tuple[float, float, float]:
    return mean_log_loss(margin), float(brier_terms(margin).mean()), expected_calibration_error(margin)


def _best_scale(margin: np.ndarray) -> tuple[float | None, str]:
    """The scale b > 0 with the least mean of -log sigmoid(b * margin), which is convex in b; or why there is none."""
    if margin.mean() <= 0:
        return None, "the mean margin is not above 0: no scale makes these rewards better than probability 1/2"
    if (margin >= 0).all():
        return None, "every pair is right: the larger the scale, the better"

    def slope(scale: float) -> float:  # of the mean log-likelihood: falls from mean(margin) / 2 > 0 to below 0
        return float((margin * np.exp(-np.logaddexp(0.0, scale * margin))).mean())

    low, high = 0.0, 1 / float(np.abs(margin).mean())
    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2, ""


def _bin_of(confidence: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(_EDGES, confidence, side="right") - 1, 0, NUM_BINS - 1)


def _weighted_ece(confidence: np.ndarray, right: np.ndarray, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error for each row of weights [r, p] -> [r]."""
    gaps = sum(np.abs(weights[:, index == b] @ (right - confidence)[index == b]) for b in range(NUM_BINS))
    return gaps / weights.sum(axis=1)


def _bin(confidence: np.ndarray, right: np.ndarray, chosen: np.ndarray, number: int) -> Bin:
    low, high, count = float(_EDGES[number]), float(_EDGES[number + 1]), int(chosen.sum())
    if not count:
        return Bin(low, high, 0, None, None, None, None)
    accuracy = float(right[chosen].mean())
    return Bin(low, high, count, float(confidence[chosen].mean()), accuracy, *wilson_interval(accuracy, count))
