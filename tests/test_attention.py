"""The pieces of shared-prefix attention that a whole-model test would not pin down."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_polar.data.packing import build_micro_batch
from megatron_polar.data.template import TokenizedComparison
from megatron_polar.model.attention import _bottom_right_mask, _GatherRows
from megatron_polar.model.row_layout import make_row_layout


def batch_of(num_candidates: int, *, layout: str = "shared_prefix"):
    generator = np.random.default_rng(3)
    comparisons = [
        TokenizedComparison(
            generator.integers(5, 99, prefix).astype(np.int32),
            tuple(generator.integers(5, 99, generator.integers(1, 6)).astype(np.int32) for _ in range(num_candidates)),
            (0,) + (1,) * (num_candidates - 1),
            0,
        )
        for prefix in (4, 7, 0, 1)
    ]
    return build_micro_batch(comparisons, layout=layout, pad_id=0, pad_to_multiple=16)


def test_a_segments_keys_are_its_prefix_followed_by_itself():
    batch = batch_of(3)
    layout = make_row_layout(batch, device=torch.device("cpu"))
    tokens = torch.from_numpy(batch.tokens[0])
    gathered = tokens[layout.kv_rows].split([kv for _, kv in layout.segments])
    for i, keys in enumerate(gathered):
        start, length = batch.segment_starts[i], batch.segment_lengths[i]
        prefix_start, prefix_length = batch.prefix_starts[i], batch.prefix_lengths[i]
        expected = torch.cat([tokens[prefix_start : prefix_start + prefix_length], tokens[start : start + length]])
        assert torch.equal(keys, expected)
    assert layout.cu_seqlens_q[-1] == len(tokens)
    assert layout.cu_seqlens_kv[-1] == len(layout.kv_rows)
    assert layout.max_seqlen_kv == max(len(keys) for keys in gathered)


def test_rows_without_sharing_are_not_gathered():
    assert make_row_layout(batch_of(3, layout="packed"), device=torch.device("cpu")).kv_rows is None


@pytest.mark.parametrize("num_candidates", [2, 5])
def test_gathered_gradient_is_the_sum_over_all_copies(num_candidates):
    layout = make_row_layout(batch_of(num_candidates), device=torch.device("cpu"))
    rows = int(layout.cu_seqlens_q[-1])
    x = torch.randn(rows, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _GatherRows.apply(x, layout), (x,))


def test_bf16_gradient_copies_are_summed_in_fp32():
    """K-1 copies of a prefix row, each with gradient 1 + 2^-8 in bf16's neighbourhood, must not round one by one."""
    layout = make_row_layout(batch_of(8), device=torch.device("cpu"))
    x = torch.zeros(int(layout.cu_seqlens_q[-1]), 1, 1, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.linspace(0.1, 1.7, len(layout.kv_rows)).to(torch.bfloat16)[:, None, None]
    _GatherRows.apply(x, layout).backward(gradient)
    exact = torch.zeros(x.size(0), 1, 1, dtype=torch.float64).index_add_(0, layout.kv_rows, gradient.double())
    # One rounding of the fp32 sum to bf16, and no more.
    assert torch.equal(x.grad, exact.float().to(torch.bfloat16))


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_reward_rows_are_the_reward_tokens_and_fillers_up_to_a_multiple(layout, multiple):
    batch = batch_of(3, layout=layout)
    rows = make_row_layout(batch, device=torch.device("cpu"), spread_over=multiple).reward_rows
    assert rows.tokens[rows.reward_positions].tolist() == batch.reward_positions.tolist()
    assert len(rows.tokens) % multiple == 0
    # Positions of flattened [t, b] tokens.
    assert rows.position_ids.tolist() == batch.position_ids.T.reshape(-1)[rows.tokens].tolist()
    if layout == "padded":
        assert rows.kv_lengths.tolist() == [n // batch.tokens.shape[0] + 1 for n in rows.tokens.tolist()]
        return
    queries, keys = zip(*rows.segments, strict=True)
    assert min(queries) == 1 and sum(queries) == len(rows.tokens)
    assert all(query <= key for query, key in rows.segments)  # else the mask would leave a query without keys
    assert list(keys) == (batch.segment_lengths + batch.prefix_lengths).tolist()


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_a_batch_of_padding_has_reward_rows_that_nobody_reads(layout):
    batch = build_micro_batch([], layout=layout, pad_id=0, pad_to_multiple=16)
    rows = make_row_layout(batch, device=torch.device("cpu"), spread_over=4).reward_rows
    assert (len(rows.tokens), len(rows.reward_positions)) == (4, 0)


def test_bottom_right_mask_is_not_sdpas_causal_mask():
    """The trap: is_causal with unequal lengths is aligned top-left, where a candidate would not see its own tokens."""
    assert _bottom_right_mask(2, 5, torch.device("cpu")).sum(1).tolist() == [4, 5]
    query, key, value = (torch.randn(1, 1, n, 8) for n in (2, 5, 5))
    right = F.scaled_dot_product_attention(query, key, value, attn_mask=_bottom_right_mask(2, 5, torch.device("cpu")))
    wrong = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert not torch.allclose(right, wrong)


def test_context_parallel_ranks_hold_consecutive_positions():
    batch = batch_of(2)
    parts = [make_row_layout(batch, device=torch.device("cpu"), cp_rank=r, cp_size=2).position_ids for r in range(2)]
    assert torch.equal(torch.cat(parts), torch.from_numpy(batch.position_ids[0]))
