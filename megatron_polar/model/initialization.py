"""Random weights as a pure function of (seed, parameter name): the same model in every parallel layout."""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_polar.config.presets import Architecture
from megatron_polar.model.reward_model import RewardModel

_SCALED_BY_DEPTH = ("linear_proj.weight", "linear_fc2.weight")  # they write into the residual stream


@torch.no_grad()
def initialize_weights(
    model: RewardModel, *, seed: int, architecture: Architecture, reward_head_std: float, metadata: dict
) -> None:
    """Fill every parameter of a chunk: normal(0, std), residual outputs divided by sqrt(2 layers), norms 1, biases 0.

    A tensor is drawn whole from a generator keyed by the seed and its global name and layer, and this rank keeps its
    shard; the checkpoint's own description of shards says which part that is. One full tensor exists at a time.
    """
    for entry in model.sharded_state_dict(metadata=metadata).values():
        shards = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for shard in shards:
            if isinstance(shard, ShardedTensor):
                _fill(shard, seed=seed, architecture=architecture, reward_head_std=reward_head_std)


def _fill(shard: ShardedTensor, *, seed: int, architecture: Architecture, reward_head_std: float) -> None:
    name, target, prepended = shard.key, shard.data, shard.prepend_axis_num
    layer = shard.global_offset[:prepended]  # layers of one name are stacked along leading axes
    shape, offset = shard.global_shape[prepended:], shard.global_offset[prepended:]
    if "norm" in name:
        target.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    if name.endswith("bias"):
        target.zero_()
        return
    std = architecture.init_method_std
    if name.endswith("output_layer.weight"):
        std = reward_head_std
    elif name.endswith(_SCALED_BY_DEPTH):
        std /= math.sqrt(2 * architecture.num_layers)
    key = hashlib.sha256(f"{seed} {name} {tuple(layer)}".encode()).digest()
    generator = torch.Generator(device=target.device).manual_seed(int.from_bytes(key[:8], "little", signed=True))
    full = torch.empty(shape, dtype=torch.float32, device=target.device)
    full.normal_(0.0, std, generator=generator)
    window = tuple(slice(start, start + size) for start, size in zip(offset, target.shape, strict=True))
    target.copy_(full[window])
