"""Shared-prefix core attention: Transformer Engine (GPU), torch SDPA (CPU) and a dense mask (oracle), one signature.

A packed row is cut into segments (data/packing.py). A segment's queries are its own tokens; its keys and values are
those of its shared prefix, if it has one, followed by its own, and the causal mask is aligned bottom-right. The K/V
rows of all segments are gathered into one sequence, so that a single variable-length attention call serves the whole
row; only (K-1) x prefix rows of K and V are duplicated, and neither queries nor anything outside attention.

Inside megatron-core a packed row travels as an ordinary [s, b=1, n, d] tensor (`qkv_format` stays "sbhd"): RoPE then
takes one frequency per token, fused and unfused, under context parallelism too, and only this module knows about
segments.

Shapes: s tokens of a row on this rank, t tokens of the whole row, u gathered K/V rows, b rows, n query heads, g K/V
heads, d head dim (heads are those of this tensor-parallel rank).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_polar.errors import UserError
from megatron_polar.model.row_layout import RowLayout


class _GatherRows(torch.autograd.Function):
    """x[rows] whose gradient sums the copies of a row in fp32 and in a fixed order: exact in bf16, and deterministic
    (index_add in one go would use atomics on a GPU and round at every addition)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layout: RowLayout) -> torch.Tensor:
        ctx.layout, ctx.num_rows = layout, x.size(0)
        return x.index_select(0, layout.kv_rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        accumulate = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros((ctx.num_rows, *gradient.shape[1:]), dtype=accumulate)
        for source, copy in ctx.layout.kv_copies:
            total[source] += gradient.index_select(0, copy).to(
                accumulate
            )  # sources are distinct within one copy number
        return total.to(gradient.dtype), None


class SharedPrefixAttention(MegatronModule):
    """Core attention of a layer spec; subclasses supply the kernels. Returns [s, b, n*d].

    With context parallelism the tokens of a row are spread over ranks; an all-to-all brings all tokens of a share of
    the heads together, so that prefixes stay shared (Transformer Engine's own context parallelism refuses bottom-right
    masks).
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None,
        softmax_scale: float | None,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config)
        self.cp_group = pg_collection.cp
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.dropout = config.attention_dropout
        self.layer_number = layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: RowLayout,
    ) -> torch.Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] → [s, b, n*d]. The masks are in `packed_seq_params`."""
        s, b = query.shape[:2]
        query, key, value = (self._tokens_together(x) for x in (query, key, value))
        if packed_seq_params.kv_lengths is not None:
            context = self._single_queries(query, key, value, packed_seq_params)
        elif not packed_seq_params.segments:
            context = self.padded(query, key, value)
        else:
            query, key, value = query[:, 0], key[:, 0], value[:, 0]
            if packed_seq_params.kv_rows is not None:
                key, value = (_GatherRows.apply(x, packed_seq_params) for x in (key, value))
            context = self.packed(query, key, value, packed_seq_params).unsqueeze(1)
        return self._heads_together(context).reshape(s, b, -1)

    def padded(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention of every row: [t, b, n, d] and [t, b, g, d] → [t, b, n, d]."""
        raise NotImplementedError

    def packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout) -> torch.Tensor:
        """Bottom-right causal attention of every segment: [t, n, d] and [u, g, d] → [t, n, d]."""
        raise NotImplementedError

    def _single_queries(self, query, key, value, layout: RowLayout) -> torch.Tensor:
        """Queries of a few tokens of padded rows (row_layout.py), [r, 1, n, d], over whole rows, [t, b, g, d]."""
        key, value = (x.index_select(1, layout.batch_rows).permute(1, 2, 0, 3) for x in (key, value))
        mask = torch.arange(key.size(2), device=key.device) < layout.kv_lengths[:, None]
        dropout = self.dropout if self.training else 0.0
        with self._random_numbers_of_its_own(dropout):
            context = F.scaled_dot_product_attention(
                query.transpose(1, 2), key, value, mask[:, None, None], dropout, scale=self.scale, enable_gqa=True
            )
        return context.transpose(1, 2)

    def _random_numbers_of_its_own(self, dropout: float) -> AbstractContextManager:
        """Tensor-parallel ranks hold different heads: these must not draw the same dropout mask.

        With sequence parallelism megatron-core's TransformerBlock has seen to that already. To fork a second time
        within would go wrong where activations are recomputed, outside of that first fork: other masks would be drawn.
        """
        return get_cuda_rng_tracker().fork() if dropout and not self.config.sequence_parallel else nullcontext()

    def _tokens_together(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, n, d] of all heads → [t, b, n/cp, d]."""
        cp = self.cp_group.size()
        if cp == 1:
            return x
        s, b, n, d = x.shape
        heads_first = x.reshape(s, b, cp, n // cp, d).movedim(2, 0)
        return all_to_all(self.cp_group, heads_first.reshape(cp * s, b, n // cp, d))

    def _heads_together(self, x: torch.Tensor) -> torch.Tensor:
        """[t, b, n/cp, d] → [s, b, n, d]."""
        cp = self.cp_group.size()
        if cp == 1:
            return x
        t, b, n, d = x.shape
        received = all_to_all(self.cp_group, x).reshape(cp, t // cp, b, n, d)
        return received.movedim(0, 2).reshape(t // cp, b, cp * n, d)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Attention has no weights."""
        return {}


class SdpaAttention(SharedPrefixAttention):
    """torch scaled_dot_product_attention, one call a segment."""

    def padded(self, query, key, value):
        """See SharedPrefixAttention.padded."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        with self._random_numbers_of_its_own(dropout):
            context = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, dropout_p=dropout, scale=self.scale, enable_gqa=True
            )
        return context.permute(2, 0, 1, 3)

    def packed(self, query, key, value, layout):
        """See SharedPrefixAttention.packed."""
        # Segments tile the rows. One split has one backward; a slice a segment would each write a whole row's gradient.
        q_lengths, kv_lengths = zip(*layout.segments, strict=True)
        pieces = []
        for segment in zip(query.split(q_lengths), key.split(kv_lengths), value.split(kv_lengths), strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in segment)
            length, kv_length = q.size(2), k.size(2)
            # SDPA's is_causal is aligned top-left: right only where queries and keys are equally many.
            mask = None if length == kv_length else _bottom_right_mask(length, kv_length, query.device)
            piece = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
            )
            pieces.append(piece[0].transpose(0, 1))
        return torch.cat(pieces)


class DenseAttention(SharedPrefixAttention):
    """The slow twin: explicit scores and one boolean mask over the whole row. For tests."""

    def padded(self, query, key, value):
        """See SharedPrefixAttention.padded."""
        mask = _bottom_right_mask(query.size(0), key.size(0), query.device)
        return torch.stack(
            [self._attend(*(x[:, i] for x in (query, key, value)), mask) for i in range(query.size(1))], 1
        )

    def packed(self, query, key, value, layout):
        """See SharedPrefixAttention.packed."""
        mask = torch.zeros(query.size(0), key.size(0), dtype=torch.bool, device=query.device)
        start = kv_start = 0
        for length, kv_length in layout.segments:
            block = _bottom_right_mask(length, kv_length, query.device)
            mask[start : start + length, kv_start : kv_start + kv_length] = block
            start, kv_start = start + length, kv_start + kv_length
        return self._attend(query, key, value, mask)

    def _attend(self, query, key, value, mask):
        repeats = query.size(1) // key.size(1)
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = torch.einsum("qnd,knd->nqk", query, key) * self.scale
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("nqk,knd->qnd", weights, value)


class TeAttention(SharedPrefixAttention):
    """Transformer Engine's DotProductAttention: `thd` with the mask padding_causal_bottom_right (cuDNN or
    FlashAttention)."""

    def __init__(self, *, config: TransformerConfig, pg_collection: ProcessGroupCollection, **keywords):
        super().__init__(config=config, pg_collection=pg_collection, **keywords)
        from transformer_engine.pytorch import DotProductAttention

        # Heads of this rank inside attention: split over tensor- and then over context-parallel ranks.
        ranks = config.tensor_model_parallel_size * config.context_parallel_size
        # TE decides about kernels from its own view of the world, so it is told of no parallelism at all.
        self.kernel = DotProductAttention(
            num_attention_heads=config.num_attention_heads // ranks,
            kv_channels=config.kv_channels,
            num_gqa_groups=config.num_query_groups // ranks,
            attention_dropout=self.dropout,
            # Told "self", TE's unfused kernel takes the query lengths for the K/V lengths as well, and masks wrongly.
            attention_type="cross",
            get_rng_state_tracker=get_cuda_rng_tracker,
            sequence_parallel=config.sequence_parallel,  # of random numbers only: see _random_numbers_of_its_own
            attn_mask_type="padding_causal_bottom_right",
            qkv_format="thd",
            softmax_scale=self.scale,
            layer_number=self.layer_number,
        )

    def padded(self, query, key, value):
        """See SharedPrefixAttention.padded."""
        context = self.kernel(
            *(x.contiguous() for x in (query, key, value)), qkv_format="sbhd", attn_mask_type="causal"
        )
        return context.unflatten(-1, query.shape[-2:])

    def packed(self, query, key, value, layout):
        """See SharedPrefixAttention.packed. Lengths are passed as Python ints: TE would else wait for the GPU."""
        context = self.kernel(
            *(x.contiguous() for x in (query, key, value)),
            cu_seqlens_q=layout.cu_seqlens_q,
            cu_seqlens_kv=layout.cu_seqlens_kv,
            max_seqlen_q=layout.max_seqlen_q,
            max_seqlen_kv=layout.max_seqlen_kv,
        )
        return context.unflatten(-1, query.shape[-2:]) if context.dim() == 2 else context


def _bottom_right_mask(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """True where attention is allowed: the last query sees every key, each earlier one a key less."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


ATTENTION_CLASSES = {"sdpa": SdpaAttention, "dense": DenseAttention, "te": TeAttention}


def attention_class(name: str, *, dtype: torch.dtype, have_transformer_engine: bool) -> type[SharedPrefixAttention]:
    """Resolve `model.attention`. Raises UserError where the kernels asked for are missing.

    `auto` takes Transformer Engine for 16-bit types only: its fused kernels know no others.
    """
    if name == "auto":
        name = "te" if have_transformer_engine and dtype.itemsize == 2 else "sdpa"
    if name == "te" and not have_transformer_engine:
        raise UserError(
            "model.attention=te needs Transformer Engine's layers, and this run has megatron-core's local ones: on a "
            "GPU machine install requirements-gpu.txt and set model.transformer_impl=auto, or set model.attention=auto"
        )
    return ATTENTION_CLASSES[name]
