"""The last layer, which computes only what the rewards read.

Keys and values of all tokens, but queries, output projection and MLP of the reward rows alone (row_layout.py): exact,
and 3 to 4 % fewer FLOPs at the paper's sizes. Under sequence and context parallelism the rows are spread over the ranks
as tokens are, so that everything behind attention is megatron-core's own. The weights are those of any other layer, and
checkpoints are the same.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_polar.model.row_layout import RowLayout, rows_here


class RewardRowsSelfAttention(SelfAttention):
    """Self-attention whose queries are other rows than its keys; `linear_qkv`'s weight is taken apart for it."""

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None, output_gate=False, split_qkv=True):
        """hidden_states [r, 1, h], key_value_states [s, b, h] → query [r, 1, n, d], key and value [s, b, g, d]; r and s
        under sequence parallelism of this rank before, of all its tensor-parallel ranks after."""
        self._await_weights()
        groups, dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        queries = self.num_attention_heads_per_partition // groups
        bias = self.linear_qkv.bias if self.config.add_qkv_bias else None
        # Rows of the weight: for each group its query heads, its key head, its value head.
        weight, bias = (
            None if x is None else x.view(groups, queries + 2, dim, -1) for x in (self.linear_qkv.weight, bias)
        )

        def project(x: torch.Tensor, heads: slice) -> torch.Tensor:
            own_weight = weight[:, heads].reshape(-1, x.size(-1))
            return F.linear(x, own_weight, None if bias is None else bias[:, heads].reshape(-1))

        query = project(self._input(hidden_states), slice(0, queries))
        keys_values = project(self._input(key_value_states), slice(queries, queries + 2))
        key, value = keys_values.unflatten(-1, (groups, 2, dim)).unbind(-2)
        query = query.unflatten(-1, (groups * queries, dim))
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value

    def _await_weights(self) -> None:
        """With optimizer.overlap_param_gather, Megatron-Core waits for gathered weights in a hook on the module that
        they belong to. `linear_qkv` is never called here, so its hooks are."""
        for hook in tuple(self.linear_qkv._forward_pre_hooks.values()):
            hook(self.linear_qkv, ())

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        """What `linear_qkv` multiplies: Transformer Engine's has the layer's norm inside."""
        scale = getattr(self.linear_qkv, "layer_norm_weight", None)
        if scale is not None:
            x = F.rms_norm(x, (x.size(-1),), scale, self.config.layernorm_epsilon)
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=self.pg_collection.tp)
        return copy_to_tensor_model_parallel_region(x, group=self.pg_collection.tp)


class RewardRowsLayer(TransformerLayer):
    """A layer that takes all tokens [s, b, h] and returns the reward rows [r, 1, h] (of this rank)."""

    def _forward_attention(self, hidden_states, attention_mask=None, *, rotary_pos_emb, packed_seq_params, **unused):
        rows: RowLayout = packed_seq_params.reward_rows
        residual = self._select(hidden_states, rows.tokens)
        output = self.self_attention(
            self.input_layernorm(residual),
            attention_mask=None,
            key_value_states=self.input_layernorm(hidden_states),
            rotary_pos_emb=(rows.rotary_pos_emb, rotary_pos_emb),
            packed_seq_params=rows,
        )
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            return add(output, residual, self.hidden_dropout), None

    def _select(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Rows `tokens` [r] of the whole flattened row, spread over the ranks that the tokens are spread over."""
        sp = self.pg_collection.tp if self.config.sequence_parallel else None
        cp = self.pg_collection.cp
        rows, is_here = rows_here(hidden_states, tokens, sp=sp, cp=cp)
        rows = torch.where(is_here[:, None], rows, 0)[:, None]
        for group in (cp, sp):  # each row is on one rank, so the sum is that row
            if group is not None and group.size() > 1:
                rows = reduce_scatter_to_sequence_parallel_region(rows, group=group)
        return rows
