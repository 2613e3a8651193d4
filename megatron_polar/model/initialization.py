"""Weights from whole tensors, in every parallel layout: given ones, or random ones that depend on seed and name."""

import hashlib
import math
from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_polar.config.presets import Architecture
from megatron_polar.model.fp8_weights import assign, is_fp8_weight
from megatron_polar.model.reward_model import RewardModel

MakeTensor = Callable[[str, int | None, tuple[int, ...], torch.device], torch.Tensor]
_SCALED_BY_DEPTH = ("linear_proj.weight", "linear_fc2.weight")  # they write into the residual stream


@torch.no_grad()
def initialize_weights(
    model: RewardModel, *, seed: int, architecture: Architecture, reward_head_std: float, metadata: dict
) -> None:
    """Fill every parameter of a chunk: normal(0, std), residual outputs divided by sqrt(2 layers), norms 1, biases 0.

    A tensor is drawn whole from a generator keyed by the seed and its global name and layer.
    """

    def draw(name: str, layer: int | None, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        if "norm" in name:
            return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, device=device)
        if name.endswith("bias"):
            return torch.zeros(shape, device=device)
        std = architecture.init_method_std
        if name.endswith("output_layer.weight"):
            std = reward_head_std
        elif name.endswith(_SCALED_BY_DEPTH):
            std /= math.sqrt(2 * architecture.num_layers)
        place = () if layer is None else (layer,)
        key = hashlib.sha256(f"{seed} {name} {place}".encode()).digest()
        generator = torch.Generator(device=device).manual_seed(int.from_bytes(key[:8], "little", signed=True))
        return torch.empty(shape, dtype=torch.float32, device=device).normal_(0.0, std, generator=generator)

    fill_weights(model, make=draw, metadata=metadata)


@torch.no_grad()
def fill_weights(model: RewardModel, *, make: MakeTensor, metadata: dict) -> None:
    """Fill every parameter of a chunk with this rank's part of what `make(name, layer, shape, device)` gives: a tensor
    of one layer, or of none, whole.

    The checkpoint's own description of shards says which part that is. One full tensor exists at a time.
    """
    for entry in model.sharded_state_dict(metadata=metadata).values():
        weight = getattr(entry, "data", None)
        in_fp8 = isinstance(weight, torch.Tensor) and is_fp8_weight(weight)
        if in_fp8:  # the parts below would be copies
            entry.data = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        shards = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for shard in shards:
            if isinstance(shard, ShardedTensor):
                prepended = shard.prepend_axis_num  # layers of one name are stacked along a leading axis
                shape, offset = shard.global_shape[prepended:], shard.global_offset[prepended:]
                layer = shard.global_offset[0] if prepended else None
                full = make(shard.key, layer, tuple(shape), shard.data.device)
                window = tuple(slice(start, start + size) for start, size in zip(offset, shard.data.shape, strict=True))
                shard.data.copy_(full[window])
        if in_fp8:
            assign(weight, entry.data)
