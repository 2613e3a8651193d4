"""What the model must know of a micro-batch beside its tokens: positions, segments, gathered keys, and reward rows.

*Reward rows*: of the last layer's output only the rows at the reward tokens are read, so that layer computes keys and
values of all tokens, and queries, output projection and MLP of those rows alone (reward_rows.py). They have a layout of
their own, in which the queries are the reward tokens and the keys are those of their segments.

Shapes: s tokens of a row on this rank, t tokens of the whole row, u gathered K/V rows, b rows, c rewards, r reward rows
of the whole row.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_polar.data.packing import MicroBatch


@dataclass
class RowLayout(PackedSeqParams):
    """Travels as megatron-core's `packed_seq_params`.

    `position_ids` [s] of this rank's tokens. `reward_positions` [c] in the flattened [t, b] tokens. Packed rows also
    have `segments` (number of queries, number of keys) and, where prefixes are shared, `kv_rows` [u] with `kv_copies`:
    for the n-th copy of each source row, the source rows and where their copies stand among the gathered ones.

    `reward_rows` is the last layer's layout: `tokens` [r] are its queries in the flattened [t, b] tokens, and
    `reward_positions` count in them. It has segments like any other, or, where rows are padded, each query's
    `batch_rows` and `kv_lengths` [r].
    """

    position_ids: torch.Tensor | None = None
    rotary_pos_emb: torch.Tensor | None = None
    """RoPE angles of the reward rows, [r, 1, 1, d] of this rank; the model computes them."""
    reward_positions: torch.Tensor | None = None
    segments: tuple[tuple[int, int], ...] = ()
    kv_rows: torch.Tensor | None = None
    kv_copies: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    reward_rows: "RowLayout | None" = None
    tokens: torch.Tensor | None = None
    batch_rows: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None


def make_row_layout(
    batch: MicroBatch, *, device: torch.device, cp_rank: int = 0, cp_size: int = 1, spread_over: int | None = None
) -> RowLayout:
    """Turn a micro-batch's segments into the index tensors that attention needs; done once, used by every layer.

    `spread_over`: ranks that share the reward rows between them (sequence- times context-parallel); None: the last
    layer computes all rows.
    """
    shard = {"device": device, "cp_rank": cp_rank, "cp_size": cp_size}
    layout = RowLayout(
        qkv_format="sbhd",
        position_ids=_shard(batch.position_ids[0], **shard),
        reward_positions=torch.from_numpy(batch.reward_positions).to(device),
    )
    if len(batch.segment_starts):
        kv_lengths = batch.segment_lengths + batch.prefix_lengths
        _add_segments(layout, q_lengths=batch.segment_lengths, kv_lengths=kv_lengths, device=device)
        rows, copies = _gathered_rows(batch) if batch.prefix_lengths.any() else (None, ())
        layout.kv_rows = rows.to(device) if rows is not None else None
        layout.kv_copies = tuple((source.to(device), copy.to(device)) for source, copy in copies)
    if spread_over is not None:
        build = _reward_rows if layout.segments else _reward_rows_of_padded
        layout.reward_rows = build(batch, layout, multiple=spread_over, **shard)
    return layout


def _shard(values: np.ndarray, *, device: torch.device, cp_rank: int, cp_size: int) -> torch.Tensor:
    """This context-parallel rank's part."""
    return torch.from_numpy(values).chunk(cp_size)[cp_rank].to(device)


def _add_segments(layout: RowLayout, *, q_lengths: np.ndarray, kv_lengths: np.ndarray, device: torch.device) -> None:
    for name, lengths in (("q", q_lengths), ("kv", kv_lengths)):
        ends = F.pad(torch.from_numpy(lengths).cumsum(0), (1, 0))
        setattr(layout, f"cu_seqlens_{name}", ends.to(device, torch.int32))
        setattr(layout, f"max_seqlen_{name}", int(lengths.max()))
    layout.segments = tuple(zip(q_lengths.tolist(), kv_lengths.tolist(), strict=True))


def _gathered_rows(batch: MicroBatch) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The source row of every gathered K/V row, and the same inverted: copy n of which source rows stands where."""
    pieces = []
    for start, length, prefix_start, prefix_length in zip(
        batch.segment_starts, batch.segment_lengths, batch.prefix_starts, batch.prefix_lengths, strict=True
    ):
        pieces.append(torch.arange(prefix_start, prefix_start + prefix_length))
        pieces.append(torch.arange(start, start + length))
    rows = torch.cat(pieces)
    order = torch.argsort(rows, stable=True)
    sources = rows[order]
    first = torch.searchsorted(sources, sources)  # index of the first copy of the same source
    copy_number = torch.arange(len(rows)) - first
    return rows, [(sources[copy_number == n], order[copy_number == n]) for n in range(int(copy_number.max()) + 1)]


def rows_here(
    hidden: torch.Tensor, positions: torch.Tensor, *, sp: dist.ProcessGroup | None, cp: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the rows `positions` [r] of the whole flattened row that this rank's hidden states [s, b, h] hold.

    Returns rows [r, h], any row where this rank does not hold it, and whether it does [r]. `sp` is None without
    sequence parallelism.
    """
    local = hidden.flatten(0, 1)
    shard = cp.rank() * (sp.size() if sp is not None else 1) + (sp.rank() if sp is not None else 0)
    index = positions - shard * local.size(0)
    is_here = (index >= 0) & (index < local.size(0))
    return local.index_select(0, index.clamp(0, local.size(0) - 1)), is_here


# --- Reward rows -----------------------------------------------------------------------------------------------------


def _reward_rows(
    batch: MicroBatch, layout: RowLayout, *, multiple: int, device: torch.device, cp_rank: int, cp_size: int
) -> RowLayout:
    """One query for each segment, its last token: that of a candidate is its reward token. Fillers up to `multiple`
    repeat last tokens; the bottom-right mask leaves fewer keys to them, and nobody reads what they give."""
    ends = batch.segment_starts + batch.segment_lengths - 1
    kv_lengths = batch.segment_lengths + batch.prefix_lengths
    room = np.cumsum(kv_lengths - 1)  # for fillers: a segment must have as many keys as queries
    wanted = -len(ends) % multiple
    if wanted > room[-1]:
        raise ValueError(f"{wanted} filler rows do not fit into segments with {kv_lengths.sum()} keys")
    q_lengths = 1 + np.diff(np.minimum(room, wanted), prepend=0)
    tokens = np.repeat(ends, q_lengths)
    rewards = np.cumsum(q_lengths)[np.searchsorted(ends, batch.reward_positions)] - 1
    rows = RowLayout(
        qkv_format="sbhd",
        position_ids=_shard(batch.position_ids[0][tokens], device=device, cp_rank=cp_rank, cp_size=cp_size),
        reward_positions=torch.from_numpy(rewards).to(device),
        kv_rows=layout.kv_rows,
        kv_copies=layout.kv_copies,
        tokens=torch.from_numpy(tokens).to(device),
    )
    _add_segments(rows, q_lengths=q_lengths, kv_lengths=kv_lengths, device=device)
    return rows


def _reward_rows_of_padded(
    batch: MicroBatch, layout: RowLayout, *, multiple: int, device: torch.device, cp_rank: int, cp_size: int
) -> RowLayout:
    """One query for each reward; fillers are the first token of the first row."""
    num_rewards, num_rows = len(batch.reward_positions), batch.tokens.shape[0]
    fillers = np.zeros(-max(num_rewards, 1) % multiple + (num_rewards == 0), dtype=np.int64)
    tokens = np.concatenate([batch.reward_positions, fillers])
    return RowLayout(
        qkv_format="sbhd",
        position_ids=_shard(tokens // num_rows, device=device, cp_rank=cp_rank, cp_size=cp_size),
        reward_positions=torch.arange(num_rewards, device=device),
        tokens=torch.from_numpy(tokens).to(device),
        batch_rows=torch.from_numpy(tokens % num_rows).to(device),
        kv_lengths=torch.from_numpy(tokens // num_rows + 1).to(device),
    )
