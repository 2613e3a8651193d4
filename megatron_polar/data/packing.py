"""Comparisons → micro-batches of shared-prefix rows. Pure numpy.

A comparison is `[prefix | candidate 1 | ... | candidate K]`; positions of every candidate continue from the prefix.
Attention runs over *segments* of the row: candidate 1 rides with the prefix in one causal segment, every other
candidate is a segment of its own whose keys and values are preceded by the prefix's. The layouts `packed` (each
sequence whole, nothing shared) and `padded` (one sequence a row) describe the same rewards with more tokens; they exist
to be compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from megatron_polar.data.pair_counts import NO_PAIR, pair_keys
from megatron_polar.data.template import TokenizedComparison

Layout = Literal["shared_prefix", "packed", "padded"]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass needs. b rows of s tokens (b = 1 unless padded), c rewards, p ordered pairs, g segments.

    tokens, position_ids: int64 [b, s]. Segments (empty when padded): `segment_starts` and `segment_lengths` tile the
    row, `prefix_starts` and `prefix_lengths` name the rows of the shared prefix that precede a segment's own keys
    (length 0: none). `reward_positions` [c] index the flattened [s, b] tokens. `winners` and `losers` [p] index the c
    rewards: each pair says which candidate shall score higher, and `policy_pairs` [p] which policies they are of
    (pair_counts.pair_keys, or NO_PAIR). `candidate_counts` gives the number of rewards of each comparison.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    segment_starts: np.ndarray
    segment_lengths: np.ndarray
    prefix_starts: np.ndarray
    prefix_lengths: np.ndarray
    reward_positions: np.ndarray
    winners: np.ndarray
    losers: np.ndarray
    policy_pairs: np.ndarray
    candidate_counts: np.ndarray
    num_logical_tokens: int
    """Tokens that the comparisons would have without sharing and without padding; as many keys do the rewards see."""
    num_attended: int
    """Query-key pairs inside the attention mask, padding excluded: what attention really computes."""
    on_device: dict[str, Any] | None = None
    """Arrays that the loader has copied to the device already, by name, as torch tensors."""

    @property
    def num_comparisons(self) -> int:
        return len(self.candidate_counts)


def physical_tokens(comparison: TokenizedComparison, *, layout: Layout) -> int:
    """Tokens that the comparison occupies in a row, before any padding."""
    candidate_lengths = [len(candidate) for candidate in comparison.candidates]
    repeats = 1 if layout == "shared_prefix" else len(candidate_lengths)
    return repeats * len(comparison.prefix) + sum(candidate_lengths)


def row_tokens(comparisons: Sequence[TokenizedComparison], *, layout: Layout, pad_to_multiple: int) -> int:
    """Tokens, padding included, of the micro-batch that `build_micro_batch` makes of these."""
    if layout == "padded":
        rows = sum(len(c.candidates) for c in comparisons)
        longest = max((len(c.prefix) + max(map(len, c.candidates)) for c in comparisons), default=1)
        return max(rows, 1) * -(-longest // pad_to_multiple) * pad_to_multiple
    total = sum(physical_tokens(comparison, layout=layout) for comparison in comparisons)
    return max(-(-total // pad_to_multiple), 1) * pad_to_multiple


def split_candidates(comparison: TokenizedComparison, *, max_tokens: int, layout: Layout) -> list[TokenizedComparison]:
    """Cut a comparison into several that fit `max_tokens` each, with at least one candidate: rewards stay what they
    are, pairs of candidates do not. `join_rewards` puts the rewards together again."""
    prefix, num_candidates = len(comparison.prefix), len(comparison.candidates)
    starts, total, longest = [0], 0, 0
    for index, candidate in enumerate(comparison.candidates):
        count = index - starts[-1] + 1
        total, longest = total + len(candidate), max(longest, len(candidate))
        tokens = {
            "shared_prefix": prefix + total,
            "packed": count * prefix + total,
            "padded": count * (prefix + longest),
        }[layout]
        if count > 1 and tokens > max_tokens:
            starts.append(index)
            total = longest = len(candidate)
    if len(starts) == 1:
        return [comparison]
    return [
        replace(comparison, candidates=comparison.candidates[start:end], levels=comparison.levels[start:end])
        for start, end in zip(starts, [*starts[1:], num_candidates], strict=True)
    ]


def join_rewards(
    parts: Sequence[Sequence[TokenizedComparison]], rewards: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Rewards of each comparison's candidates, from those of all parts that it was split into."""
    left = iter(rewards)
    return [[reward for _ in pieces for reward in next(left)] for pieces in parts]


def attended_pairs(comparison: TokenizedComparison, *, layout: Layout) -> int:
    """Query-key pairs inside the causal mask of one comparison."""
    p, repeats = len(comparison.prefix), 1 if layout == "shared_prefix" else len(comparison.candidates)
    return repeats * (p * (p + 1) // 2) + sum(p * c + c * (c + 1) // 2 for c in map(len, comparison.candidates))


def build_micro_batch(
    comparisons: Sequence[TokenizedComparison], *, layout: Layout, pad_id: int, pad_to_multiple: int
) -> MicroBatch:
    """Lay the comparisons into one micro-batch. An empty list gives a batch of padding with no rewards."""
    builder = _padded_rows if layout == "padded" else _packed_row
    arrays = builder(comparisons, share=layout == "shared_prefix", pad_id=pad_id, multiple=pad_to_multiple)
    winners, losers, policy_pairs = _ordered_pairs(comparisons)
    return MicroBatch(
        **arrays,
        winners=winners,
        losers=losers,
        policy_pairs=policy_pairs,
        candidate_counts=np.array([len(c.candidates) for c in comparisons], dtype=np.int64),
        num_logical_tokens=sum(physical_tokens(c, layout="packed") for c in comparisons),
        num_attended=sum(attended_pairs(c, layout=layout) for c in comparisons),
    )


def _ordered_pairs(comparisons: Sequence[TokenizedComparison]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Winners, losers and the keys of their policies, [p] each."""
    winners, losers, keys, base = [], [], [], 0
    for comparison in comparisons:
        levels = np.asarray(comparison.levels)
        better, worse = np.nonzero(levels[:, None] < levels[None, :])
        winners.append(better + base)
        losers.append(worse + base)
        reference, *others = comparison.policies or (NO_PAIR,)
        keys.append(pair_keys(reference, np.array(others)[worse]) if others else np.full(len(worse), NO_PAIR))
        base += len(levels)
    none = np.zeros(0, dtype=np.int64)
    return tuple(np.concatenate([none, *part]) for part in (winners, losers, keys))


def _packed_row(comparisons, *, share: bool, pad_id: int, multiple: int) -> dict[str, np.ndarray]:
    tokens, positions, segments, rewards, end = [], [], [], [], 0
    for comparison in comparisons:
        prefix, p = comparison.prefix, len(comparison.prefix)
        prefix_start = end
        for k, candidate in enumerate(comparison.candidates):
            c = len(candidate)
            if k == 0 or not share:  # the candidate rides with its own copy of the prefix
                tokens += [prefix, candidate]
                positions.append(np.arange(p + c))
                segments.append((end, p + c, 0, 0))
                end += p + c
            else:
                tokens.append(candidate)
                positions.append(np.arange(p, p + c))
                segments.append((end, c, prefix_start, p))
                end += c
            rewards.append(end - 1)
    padding = max(-end % multiple, 0 if end else multiple)
    if padding:
        tokens.append(np.full(padding, pad_id))
        positions.append(np.arange(padding))
        segments.append((end, padding, 0, 0))
    starts, lengths, prefix_starts, prefix_lengths = np.array(segments, dtype=np.int64).T
    return {
        "tokens": np.concatenate(tokens).astype(np.int64)[None],
        "position_ids": np.concatenate(positions).astype(np.int64)[None],
        "segment_starts": starts,
        "segment_lengths": lengths,
        "prefix_starts": prefix_starts,
        "prefix_lengths": prefix_lengths,
        "reward_positions": np.array(rewards, dtype=np.int64),
    }


def _padded_rows(comparisons, *, share: bool, pad_id: int, multiple: int) -> dict[str, np.ndarray]:
    sequences = [np.concatenate([c.prefix, candidate]) for c in comparisons for candidate in c.candidates]
    b, s = max(len(sequences), 1), max([len(q) for q in sequences], default=1)
    s = -(-s // multiple) * multiple
    tokens = np.full((b, s), pad_id, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    nothing = np.zeros(0, dtype=np.int64)
    return {
        "tokens": tokens,
        "position_ids": np.broadcast_to(np.arange(s), (b, s)).copy(),
        "segment_starts": nothing,
        "segment_lengths": nothing,
        "prefix_starts": nothing,
        "prefix_lengths": nothing,
        "reward_positions": np.array([(len(q) - 1) * b + row for row, q in enumerate(sequences)], dtype=np.int64),
    }
