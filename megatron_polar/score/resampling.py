"""Cluster bootstrap: prompts are drawn anew with all that belongs to them, because answers to one prompt are alike.

A statistic is computed from weights: how often each observation's prompt was drawn. That makes 2,000 replicates of a
mean a matrix product, and lets one draw serve several statistics. B. Efron and R. Tibshirani, An Introduction to the
Bootstrap (1993), chapter 8 (the unit that is resampled) and 13 (percentile intervals).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

REPLICATES = 2000
_CHUNK = 100  # replicates at a time, to bound memory

# c clusters, n observations, r replicates
Statistic = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Weights of the observations, [r, n] -> values by name, [r]; NaN where a replicate has none."""


def cluster_index(names: Sequence[str]) -> np.ndarray:
    """Number equal names alike, in order of appearance: [n]."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int64)


def bootstrap_intervals(
    statistic: Statistic, cluster: np.ndarray, *, seed: int, replicates: int = REPLICATES
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile intervals of a statistic, by name, when clusters are drawn with replacement.

    `cluster` is the number of each observation's cluster, [n], from 0. None where fewer than half of the replicates
    have a value.
    """
    drawn: dict[str, list[np.ndarray]] = {}
    for counts in draws(int(cluster.max()) + 1, seed=seed, replicates=replicates):
        for name, values in statistic(counts[:, cluster]).items():
            drawn.setdefault(name, []).append(values)
    return {name: _percentiles(np.concatenate(values)) for name, values in drawn.items()}


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of values [n] by weights [r, n] -> [r]; NaN where all weights are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ values) / weights.sum(axis=1)


def draws(num_clusters: int, *, seed: int | Sequence[int], replicates: int = REPLICATES) -> Iterator[np.ndarray]:
    """How often each cluster is drawn, in chunks of replicates: [r, c]."""
    generator = np.random.default_rng(seed)
    for first in range(0, replicates, _CHUNK):
        size = (min(_CHUNK, replicates - first), num_clusters)
        picks = generator.integers(0, num_clusters, size=size) + np.arange(size[0])[:, None] * num_clusters
        yield np.bincount(picks.ravel(), minlength=size[0] * num_clusters).reshape(size).astype(np.float64)


def _percentiles(values: np.ndarray) -> tuple[float, float] | None:
    present = values[~np.isnan(values)]
    if 2 * len(present) < len(values):
        return None
    low, high = np.percentile(present, [2.5, 97.5])
    return float(low), float(high)
