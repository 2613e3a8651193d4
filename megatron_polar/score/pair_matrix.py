"""The report's section on pairs of policies: who is told from whom, and how often (`pairs.json` of a run)."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_polar.data.pair_counts import PairCounts, add_counts, error_rates, read_pairs, split_keys
from megatron_polar.score.page import HeatMap, Section, heat_map, share, table

_PRIOR_COMPARISONS = 8.0
_MOST_LABELS = 64
_MOST_ROWS = 20


def pairs_section(path: Path) -> Section | None:
    """A heat map of the accuracy by policy of the reference and other policy, the hardest policies first, and tables.

    None where nothing was counted. Raises UserError where `path` is no file of counts.
    """
    policies, parts = read_pairs(path)
    counts = add_counts(parts.values())
    if not len(counts):
        return None
    order, difficulty, comparisons = _by_difficulty(counts, num_policies=len(policies))
    note = (
        f"{len(counts):,} ordered pairs of {len(order):,} policies, {counts.comparisons.sum():,.0f} comparisons of the "
        "last periods (older ones count less). Estimates add "
        f"{_PRIOR_COMPARISONS:g} comparisons, half of them wrong, to each: few outcomes alone make no pair hard."
    )
    columns = ("policy", "estimated accuracy", "comparisons")
    by_policy = [(policies[n], 1 - float(difficulty[n]), int(comparisons[n])) for n in order[:_MOST_ROWS]]
    body = (
        f"<p>{html.escape(note)}</p>\n{_heat_map(counts, policies, order)}"
        + _pair_table(counts, policies)
        + table(columns, by_policy, caption="The hardest policies, on either side.", write_number=share)
    )
    return Section("Pairs of policies", body)


def _heat_map(counts: PairCounts, policies: Sequence[str], order: np.ndarray) -> str:
    """One row and column for each policy of `order`, or for some neighbours in it together where there are many."""
    size = -(-len(order) // _MOST_LABELS)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    if size == 1:
        labels = [policies[group[0]] for group in groups]
    else:
        labels = [f"{1 + size * n} to {size * n + len(group)}" for n, group in enumerate(groups)]
    places = np.full(len(policies), -1)
    for number, group in enumerate(groups):
        places[group] = number
    won, lost = np.zeros((2, len(groups), len(groups)))
    reference, other = (places[side] for side in split_keys(counts.keys))
    np.add.at(won, (reference, other), counts.won)
    np.add.at(lost, (reference, other), counts.lost)
    total = won + lost
    with np.errstate(invalid="ignore"):
        shares = [[None if np.isnan(share) else share for share in row] for row in (won / total).tolist()]
    together = "" if size == 1 else f", {size} policies together, numbered from the hardest"
    return heat_map(
        HeatMap(labels, labels, shares, counts=np.ceil(total / 2).astype(int).tolist(), totals={}),
        caption="Accuracy by pair of policies, in percent: rows are policies of the reference, columns the others. 50 "
        f"is chance; empty: not compared lately. The hardest policies come first{together}.",
    )


def _by_difficulty(counts: PairCounts, *, num_policies: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Policies that were compared, the hardest first; error rate [policies] on either side, and comparisons."""
    won, lost = np.zeros(num_policies), np.zeros(num_policies)
    for side in split_keys(counts.keys):
        np.add.at(won, side, counts.won)
        np.add.at(lost, side, counts.lost)
    difficulty = (lost + _PRIOR_COMPARISONS) / (won + lost + 2 * _PRIOR_COMPARISONS)
    order = np.argsort(-difficulty, kind="stable")
    return order[(won + lost)[order] > 0], difficulty, (won + lost) / 2


def _pair_table(counts: PairCounts, policies: Sequence[str]) -> str:
    rates = error_rates(counts, prior_comparisons=_PRIOR_COMPARISONS)
    references, others = split_keys(counts.keys)
    rows = [
        (
            policies[references[n]],
            policies[others[n]],
            float(counts.won[n] / (counts.won[n] + counts.lost[n])),
            1 - float(rates[n]),
            int(counts.comparisons[n]),
        )
        for n in np.argsort(-rates, kind="stable")[:_MOST_ROWS]
    ]
    headers = ("policy of the reference", "other policy", "accuracy", "estimated accuracy", "comparisons")
    return table(headers, rows, caption="The hardest pairs by the estimate.", write_number=share)
