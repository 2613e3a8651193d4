"""RewardModel: megatron-core's GPTModel with per-token RoPE positions and a scalar head at the reward positions.

b rows, s tokens of a row on this rank, h hidden, c candidates of the micro-batch (all of them, on every rank).
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_polar.model.layer_spec import config_device
from megatron_polar.model.row_layout import RowLayout, rows_here


class RewardHead(MegatronModule):
    """hidden → one scalar: fp32 (or wider), no bias, replicated over tensor-parallel ranks, applied to reward positions
    only.

    Tokens may be spread over sequence- and context-parallel ranks: each rank scores the reward positions that it holds
    and the scalars are summed, so that every rank returns all c rewards and no hidden state travels.
    """

    def __init__(self, config: TransformerConfig, *, groups: ProcessGroupCollection):
        super().__init__(config)
        self.groups = groups
        self.weight = torch.nn.Parameter(
            torch.zeros(1, config.hidden_size, dtype=head_dtype(config.params_dtype), device=config_device(config))
        )
        # Each sequence-parallel rank has the gradient of its own tokens only; finalize_model_grads adds them up.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: torch.Tensor, reward_positions: torch.Tensor) -> torch.Tensor:
        """hidden_states [s, b, h], reward_positions [c] in the flattened tokens of the whole row → rewards [c]."""
        sp_group = self.groups.tp if self.config.sequence_parallel else None
        rows, is_here = rows_here(hidden_states, reward_positions, sp=sp_group, cp=self.groups.cp)
        rewards = torch.where(is_here, (rows.to(self.weight.dtype) * self.weight[0]).sum(-1), 0)
        for group in (sp_group, self.groups.cp):
            if group is not None and group.size() > 1:
                # Forward: sum over ranks. Backward: every rank passes the same gradient to its own rows.
                rewards = reduce_from_tensor_model_parallel_region(rewards, group=group)
        return rewards

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """One replicated tensor."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=self.groups.dp_cp,
        )


def head_dtype(params_dtype: torch.dtype) -> torch.dtype:
    """The head computes in fp32 under bf16 weights, and in fp64 under fp64."""
    return torch.promote_types(params_dtype, torch.float32)


class RewardModel(GPTModel):
    """Scores candidates against references: tokens → rewards [c] on the last pipeline stage."""

    def __init__(self, config: TransformerConfig, *, groups: ProcessGroupCollection, **keywords):
        super().__init__(config, position_embedding_type="rope", pg_collection=groups, **keywords)
        if self.post_process:
            # GPTModel has made a vocabulary-wide output layer; it goes, and the head takes its name.
            self.output_layer = RewardHead(config, groups=groups)

    def _preprocess(
        self,
        input_ids,
        position_ids,
        decoder_input=None,
        inference_context=None,
        packed_seq_params=None,
        padding_mask=None,
    ):
        """GPTModel's, with one RoPE frequency per token: candidates continue the positions of their shared prefix."""
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=None)
        layout: RowLayout = packed_seq_params
        if layout.reward_rows is not None:
            layout.reward_rows.rotary_pos_emb = self._angles(layout.reward_rows.position_ids)
        return decoder_input, self._angles(layout.position_ids), None, None, None, padding_mask

    def _angles(self, position_ids: torch.Tensor) -> torch.Tensor:
        """position_ids [s] → [s, 1, 1, d]."""
        inverse_frequencies = self.rotary_pos_emb.inv_freq.to(position_ids.device)
        angles = torch.outer(position_ids.to(inverse_frequencies.dtype), inverse_frequencies)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]

    def _postprocess(self, hidden_states, packed_seq_params: RowLayout, **unused):
        """Rewards [c] on the last stage, hidden states before it."""
        if not self.post_process:
            return hidden_states
        layout = packed_seq_params.reward_rows or packed_seq_params
        return self.output_layer(hidden_states, layout.reward_positions)
