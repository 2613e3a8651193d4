"""The report's section on pairs of policies: who is told from whom, and how often (`pairs.json` of a run)."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_polar.data.pair_counts import PairCounts, add_counts, error_rates, read_pairs, split_keys
from megatron_polar.score.page import Section, heat_map_figure, share, table

_PRIOR_COMPARISONS = 8.0
_MOST_POLICIES = 200
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
    shown = order[:_MOST_POLICIES]
    caption = (
        "Share of comparisons in the right order; 0.5 is chance, empty: not compared lately. Row: "
        "policy of the reference; column: the other policy. The hardest policies come first."
    )
    if len(order) > len(shown):
        caption += f" The {len(shown)} hardest of {len(order)} policies."
    figure = heat_map_figure(
        _matrix(counts, shown, num_policies=len(policies)),
        labels=[policies[number] for number in shown],
        title="Accuracy by pair of policies",
        x_label="other policy",
        y_label="policy of the reference",
        caption=caption,
    )
    note = (
        f"{len(counts):,} ordered pairs of {len(order):,} policies, {counts.comparisons.sum():,.0f} comparisons of the "
        "last periods (older ones count less). Estimates add "
        f"{_PRIOR_COMPARISONS:g} comparisons, half of them wrong, to each: few outcomes alone make no pair hard."
    )
    columns = ("policy", "estimated accuracy", "comparisons")
    by_policy = [(policies[n], 1 - float(difficulty[n]), int(comparisons[n])) for n in order]
    body = (
        f"<p>{html.escape(note)}</p>\n{figure}"
        + _pair_table(counts, policies)
        + table(columns, by_policy[:_MOST_ROWS], caption="The hardest policies, on either side.", write_number=share)
    )
    return Section("Pairs of policies", body)


def _by_difficulty(counts: PairCounts, *, num_policies: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Policies that were compared, the hardest first; error rate [policies] on either side, and comparisons."""
    won, lost = np.zeros(num_policies), np.zeros(num_policies)
    for side in split_keys(counts.keys):
        np.add.at(won, side, counts.won)
        np.add.at(lost, side, counts.lost)
    difficulty = (lost + _PRIOR_COMPARISONS) / (won + lost + 2 * _PRIOR_COMPARISONS)
    order = np.argsort(-difficulty, kind="stable")
    return order[(won + lost)[order] > 0], difficulty, (won + lost) / 2


def _matrix(counts: PairCounts, shown: np.ndarray, *, num_policies: int) -> np.ndarray:
    """Accuracies [shown, shown], NaN where a pair was not compared."""
    places = np.full(num_policies, -1)
    places[shown] = np.arange(len(shown))
    rows, columns = (places[side] for side in split_keys(counts.keys))
    inside = (rows >= 0) & (columns >= 0)
    matrix = np.full((len(shown), len(shown)), np.nan)
    matrix[rows[inside], columns[inside]] = (counts.won / (counts.won + counts.lost))[inside]
    return matrix


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
