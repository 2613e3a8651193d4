"""Micro-batches hold every comparison once, in rows whose segments say exactly which tokens see which."""

import dataclasses

import numpy as np
import pytest

from megatron_polar.config.presets import PRESETS, architecture_of
from megatron_polar.config.schema import ModelSection
from megatron_polar.data.balancing import step_costs
from megatron_polar.data.packing import (
    attended_pairs,
    build_micro_batch,
    join_rewards,
    physical_tokens,
    split_candidates,
)
from megatron_polar.data.template import TokenizedComparison

LAYOUTS = ["shared_prefix", "packed", "padded"]
REWARD, PAD = 7, 3  # no other token of the tests has these ids
SHAPE = PRESETS["nano"]


def comparison(generator, *, candidates: int, longest: int = 30, levels=None) -> TokenizedComparison:
    def tokens(low: int) -> np.ndarray:
        return generator.integers(10, 500, generator.integers(low, longest)).astype(np.int32)

    tails = tuple(np.concatenate([tokens(0), np.array([REWARD], dtype=np.int32)]) for _ in range(candidates))
    return TokenizedComparison(tokens(1), tails, levels or (0,) + (1,) * (candidates - 1), 0)


def batch_of(seed: int = 0, *, count: int = 6) -> list[TokenizedComparison]:
    generator = np.random.default_rng(seed)
    return [comparison(generator, candidates=int(generator.integers(2, 6))) for _ in range(count)]


def build(comparisons, layout, multiple=16):
    return build_micro_batch(comparisons, layout=layout, pad_id=PAD, pad_to_multiple=multiple)


def sequences_seen(batch, layout) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every reward, (tokens, positions) that its last token attends to, in order: what the model really reads."""
    seen = []
    if layout == "padded":
        rows = batch.tokens.shape[0]
        for flat in batch.reward_positions:
            position, row = divmod(int(flat), rows)
            seen.append((batch.tokens[row, : position + 1], batch.position_ids[row, : position + 1]))
        return seen
    segments = list(
        zip(batch.segment_starts, batch.segment_lengths, batch.prefix_starts, batch.prefix_lengths, strict=True)
    )
    for flat in batch.reward_positions:
        start, _, prefix_start, prefix_length = next(s for s in segments if s[0] <= flat < s[0] + s[1])
        rows = np.concatenate([np.arange(prefix_start, prefix_start + prefix_length), np.arange(start, flat + 1)])
        seen.append((batch.tokens[0, rows], batch.position_ids[0, rows]))
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
def test_every_reward_reads_exactly_its_own_sequence_in_every_layout(layout, seed):
    comparisons = batch_of(seed)
    wanted = [np.concatenate([c.prefix, candidate]) for c in comparisons for candidate in c.candidates]
    seen = sequences_seen(build(comparisons, layout), layout)
    assert len(seen) == len(wanted)
    for (tokens, positions), sequence in zip(seen, wanted, strict=True):
        np.testing.assert_array_equal(tokens, sequence)
        np.testing.assert_array_equal(positions, np.arange(len(sequence)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reward_positions_point_at_the_reward_tokens_and_only_there(layout):
    batch = build(batch_of(), layout)
    flat = batch.tokens.T.ravel()  # [s, b] flattened
    assert set(batch.reward_positions) == set(np.flatnonzero(flat == REWARD))
    assert len(batch.reward_positions) == batch.candidate_counts.sum()


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_segments_tile_the_row_and_prefixes_are_rows_before_them(layout, multiple):
    batch = build(batch_of(), layout, multiple)
    ends = batch.segment_starts + batch.segment_lengths
    np.testing.assert_array_equal(batch.segment_starts, np.concatenate([[0], ends[:-1]]))
    assert ends[-1] == batch.tokens.shape[1]
    assert (batch.segment_lengths > 0).all()
    assert (batch.prefix_starts + batch.prefix_lengths <= batch.segment_starts).all()
    assert (layout == "shared_prefix") == bool(batch.prefix_lengths.any())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("multiple", [1, 8, 48])
def test_row_lengths_are_multiples_and_padding_is_less_than_one_multiple(layout, multiple):
    comparisons = batch_of()
    batch = build(comparisons, layout, multiple)
    length = batch.tokens.shape[1]
    assert length % multiple == 0
    if layout != "padded":
        assert length - sum(physical_tokens(c, layout=layout) for c in comparisons) < multiple
    assert batch.tokens.shape == batch.position_ids.shape
    assert batch.tokens.dtype == batch.position_ids.dtype == np.int64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_micro_batch_is_padding_without_rewards_or_pairs(layout):
    batch = build([], layout)
    assert batch.tokens.shape == (1, 16)
    assert (batch.tokens == PAD).all()
    assert len(batch.reward_positions) == len(batch.winners) == batch.num_comparisons == batch.num_attended == 0


@pytest.mark.parametrize(
    ("levels", "pairs"),
    [
        ((0, 1), {(0, 1)}),
        ((1, 0), {(1, 0)}),
        ((0, 0), set()),
        ((0, 1, 1), {(0, 1), (0, 2)}),
        ((0, 1, 2), {(0, 1), (0, 2), (1, 2)}),
        ((2, 0, 0, 1), {(1, 0), (2, 0), (3, 0), (1, 3), (2, 3)}),
    ],
)
def test_pairs_follow_the_levels_and_ties_give_none(levels, pairs):
    generator = np.random.default_rng(1)
    first = comparison(generator, candidates=3)
    batch = build([first, comparison(generator, candidates=len(levels), levels=levels)], "shared_prefix")
    own = {(w - 3, x - 3) for w, x in zip(batch.winners.tolist(), batch.losers.tolist(), strict=True) if w >= 3}
    assert own == pairs
    assert len(batch.winners) == 2 + len(pairs)  # the first comparison's two pairs stay within it


def mask_of(batch) -> np.ndarray:
    """The dense attention mask [s, s] that the segments describe, token by token."""
    size = batch.tokens.shape[1]
    mask = np.zeros((size, size), dtype=bool)
    for start, length, prefix_start, prefix_length in zip(
        batch.segment_starts, batch.segment_lengths, batch.prefix_starts, batch.prefix_lengths, strict=True
    ):
        for query in range(start, start + length):
            mask[query, prefix_start : prefix_start + prefix_length] = True
            mask[query, start : query + 1] = True
    return mask


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
def test_attended_pairs_equal_the_masks_count(layout):
    comparisons = batch_of(4)
    batch = build(comparisons, layout)
    used = sum(physical_tokens(c, layout=layout) for c in comparisons)
    assert batch.num_attended == mask_of(batch)[:used].sum()
    assert batch.num_attended == sum(attended_pairs(c, layout=layout) for c in comparisons)


def test_attended_pairs_of_padded_rows_are_those_of_packed_ones():
    for c in batch_of(5):
        assert attended_pairs(c, layout="padded") == attended_pairs(c, layout="packed")
        assert attended_pairs(c, layout="packed") > attended_pairs(c, layout="shared_prefix")


def test_logical_tokens_are_those_without_sharing_in_every_layout():
    comparisons = batch_of(6)
    whole = sum(len(c.prefix) + len(k) for c in comparisons for k in c.candidates)
    assert {build(comparisons, layout).num_logical_tokens for layout in LAYOUTS} == {whole}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flops_of_comparisons_add_up_to_those_of_the_row(layout):
    comparisons = batch_of(7)
    batch = build(comparisons, layout, multiple=1)
    tokens = sum(physical_tokens(c, layout=layout) for c in comparisons)
    assert sum(step_costs(comparisons, layout=layout, architecture=SHAPE).flops) == SHAPE.forward_flops(
        tokens=tokens,
        attended=batch.num_attended,
        rewards=len(batch.reward_positions),
        reward_keys=batch.num_logical_tokens,
    )


# --- splitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_tokens", [1, 60, 150, 10**6])
def test_split_comparisons_fit_and_hold_every_candidate_once_in_order(layout, max_tokens):
    whole = [comparison(np.random.default_rng(seed), candidates=count) for seed, count in enumerate((1, 2, 9, 30))]
    parts = [split_candidates(c, max_tokens=max_tokens, layout=layout) for c in whole]
    for original, pieces in zip(whole, parts, strict=True):
        for piece in pieces:
            assert len(piece.candidates) == 1 or build([piece], layout, multiple=1).tokens.size <= max_tokens
            assert piece.prefix is original.prefix
        assert [candidate for piece in pieces for candidate in piece.candidates] == list(original.candidates)
        assert [level for piece in pieces for level in piece.levels] == list(original.levels)
    assert (max(map(len, parts)) == 1) == (max_tokens == 10**6)
    rewards = [[float(len(candidate)) for candidate in piece.candidates] for pieces in parts for piece in pieces]
    assert join_rewards(parts, rewards) == [[float(len(candidate)) for candidate in c.candidates] for c in whole]


def test_a_last_layer_of_all_rows_costs_what_every_token_as_a_reward_would():
    all_rows = dataclasses.replace(SHAPE, last_layer="all_rows")
    found = all_rows.forward_flops(tokens=100, attended=900, rewards=4, reward_keys=70)
    assert found == SHAPE.forward_flops(tokens=100, attended=900, rewards=100, reward_keys=900)
    assert architecture_of(ModelSection(preset="nano", last_layer="all_rows")) == all_rows
