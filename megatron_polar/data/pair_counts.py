"""How often each pair of policies was ranked rightly: sparse counts in whole numbers, so that sums are exact in any
order. Pure numpy.

A pair is ordered: the policy of the reference (and of candidate 1), then the other policy. Counts are in half
comparisons: a comparison in the right order is 2 won, one in the wrong order 2 lost, a tie 1 of each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_polar.errors import UserError

MOST_PAIRS = 1 << 20
"""Pairs kept over the end of a period: 1,024 policies can all meet. Of more, those with most comparisons are kept."""
NO_PAIR = -1
"""Key of two candidates that are ranked for what they say, not for who wrote them."""
_OTHER_BITS = 32
_COLUMNS = ("reference", "other", "won", "lost")


@dataclass(frozen=True)
class PairCounts:
    """Counts of n pairs: `keys` int64 [n], ascending, each once; `won` and `lost` int64 [n], half comparisons."""

    keys: np.ndarray
    won: np.ndarray
    lost: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def comparisons(self) -> np.ndarray:
        """Comparisons of each pair, float64 [n]; whole numbers until counts were halved."""
        return (self.won + self.lost) / 2


_NOTHING = np.zeros(0, dtype=np.int64)
EMPTY = PairCounts(_NOTHING, _NOTHING, _NOTHING)


def pair_keys(reference: np.ndarray | int, other: np.ndarray | int) -> np.ndarray:
    """One int64 for each pair of policies, by their places in the table of policies (below 2^31)."""
    return (np.asarray(reference, dtype=np.int64) << _OTHER_BITS) | np.asarray(other, dtype=np.int64)


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Policies of the references, and the other policies, of `pair_keys`."""
    return keys >> _OTHER_BITS, keys & ((1 << _OTHER_BITS) - 1)


def count_pairs(keys: np.ndarray, half_wins: np.ndarray) -> PairCounts:
    """Count outcomes [m]: 2 for a comparison in the right order, 1 for a tie, 0 for the wrong order.

    Where a key is NO_PAIR the outcome is left out.
    """
    known = keys != NO_PAIR
    wins = half_wins[known].astype(np.int64)
    return _summed(keys[known], wins, 2 - wins)


def add_counts(parts: Iterable[PairCounts]) -> PairCounts:
    """The sum of counts; the order of `parts` does not matter."""
    parts = list(parts)
    columns = [np.concatenate([_NOTHING, *(getattr(p, name) for p in parts)]) for name in ("keys", "won", "lost")]
    return _summed(*columns)


def _summed(keys: np.ndarray, won: np.ndarray, lost: np.ndarray) -> PairCounts:
    unique, places = np.unique(keys, return_inverse=True)
    sums = [np.zeros(len(unique), dtype=np.int64) for _ in range(2)]
    for total, values in zip(sums, (won, lost), strict=True):
        np.add.at(total, places, values)
    return PairCounts(unique.astype(np.int64), *sums)


def halve(counts: PairCounts) -> PairCounts:
    """Half of all counts, rounded down; a pair of which nothing is left is forgotten."""
    return _something(PairCounts(counts.keys, counts.won >> 1, counts.lost >> 1))


def keep_most_compared(counts: PairCounts, limit: int = MOST_PAIRS) -> PairCounts:
    """At most `limit` pairs: those with most comparisons, of equal ones those with the smaller key."""
    if len(counts) <= limit:
        return counts
    order = np.argsort(-(counts.won + counts.lost), kind="stable")
    return _chosen(counts, np.sort(order[:limit]))


def _chosen(counts: PairCounts, which: np.ndarray) -> PairCounts:
    return PairCounts(counts.keys[which], counts.won[which], counts.lost[which])


def _something(counts: PairCounts) -> PairCounts:
    return _chosen(counts, (counts.won + counts.lost) > 0)


def error_rates(counts: PairCounts, *, prior_comparisons: float) -> np.ndarray:
    """Expected share of wrong orders, float64 [n]: the mean under a Beta prior worth `prior_comparisons` comparisons,
    half of them wrong. A pair without any has 1/2, which is chance."""
    return (counts.lost + prior_comparisons) / (counts.won + counts.lost + 2 * prior_comparisons)


# --- pairs.json ------------------------------------------------------------------------------------------------------

PAIRS = "pairs.json"
"""Name of the file in a run directory, and in every checkpoint."""
PARTS = ("older", "last", "current")
"""Parts of what was counted, by period; see train/policy_pairs.py."""
_FORMAT, _VERSION = "megatron_polar.pairs", 1


def encode_pairs(parts: Mapping[str, PairCounts], *, policies: Sequence[str], step: int) -> bytes:
    """Counts up to `step` as a file."""
    content = {"format": _FORMAT, "format_version": _VERSION, "step": step, "policies": list(policies)}
    return orjson.dumps(content | {name: plain(parts[name]) for name in PARTS})


def read_pairs(path: Path) -> tuple[tuple[str, ...], dict[str, PairCounts]]:
    """Names of policies, and counts by "older", "last" and "current". Raises UserError for anything else."""
    try:
        content = orjson.loads(path.read_bytes())
        if content["format"] != _FORMAT or content["format_version"] != _VERSION:
            raise ValueError(f"it is no {_FORMAT} of version {_VERSION}")
        policies = tuple(content["policies"])
        if not all(isinstance(name, str) for name in policies):
            raise ValueError("names of policies are texts")
        return policies, {name: from_plain(content[name], num_policies=len(policies)) for name in PARTS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(
            f"{path}: holds no counts of policy pairs ({reason}); delete it, or bring back the right one"
        ) from error


def plain(counts: PairCounts) -> dict[str, list[int]]:
    """Counts as columns of equal length, for JSON."""
    reference, other = split_keys(counts.keys)
    columns = (reference, other, counts.won, counts.lost)
    return {name: column.tolist() for name, column in zip(_COLUMNS, columns, strict=True)}


def from_plain(columns: Mapping[str, Any], *, num_policies: int) -> PairCounts:
    """The counts again. Raises ValueError for anything that `plain` does not give for so many policies."""
    if not isinstance(columns, Mapping) or set(columns) != set(_COLUMNS):
        raise ValueError(f"counts of pairs need {', '.join(_COLUMNS)}")
    lists = [columns[name] for name in _COLUMNS]
    if not all(isinstance(column, list) and all(type(entry) is int for entry in column) for column in lists):
        raise ValueError("counts of pairs are lists of whole numbers")
    if len({len(column) for column in lists}) > 1:
        raise ValueError("columns of counts differ in length")
    if any(not 0 <= entry < 2**60 for column in lists for entry in column):
        raise ValueError("counts of pairs must not be negative, nor above 2^60")
    reference, other, won, lost = (np.array(column, dtype=np.int64) for column in lists)
    if any((column >= num_policies).any() for column in (reference, other)):
        raise ValueError(f"a pair names a policy beyond the {num_policies} that there are")
    keys = pair_keys(reference, other)
    if (np.diff(keys) <= 0).any():
        raise ValueError("pairs are not in order, or one stands there twice")
    if not (won + lost).all():
        raise ValueError("a pair stands there that was never compared")
    return PairCounts(keys, won, lost)
