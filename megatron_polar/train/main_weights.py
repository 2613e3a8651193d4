"""The optimizer's fp32 weights and the model's: what passes between them where the model's are in FP8.

A weight in FP8 has lost most of its digits, and the optimizer has them all. Checkpoints hold the latter rounded to the
16-bit type of the model, as they do without FP8 weights: they load in either kind of run, and exports lose nothing.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer


@torch.no_grad()
def main_weights(optimizer: MegatronOptimizer, weights: Iterable[torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    """The fp32 weights that belong to 16-bit (or FP8) weights of the model, whole and rounded to 16 bits. Collective
    over data- and context-parallel ranks: `weights` are the same everywhere, in one order.

    Each rank of the distributed optimizer holds one part of a weight, so the sum over ranks is the weight, exactly.
    """
    parts = {weight: (shard, place) for weight, shard, place in _shards(optimizer)}
    group = optimizer.chained_optimizers[0].data_parallel_group
    whole = {}
    for weight in weights:
        value = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        if weight in parts:
            shard, place = parts[weight]
            value[place] = shard.to(value.dtype)
        dist.all_reduce(value, group=group)
        whole[weight] = value.view(weight.shape)
    return whole


@torch.no_grad()
def take_main_weights(optimizer: MegatronOptimizer, values: dict[torch.Tensor, torch.Tensor]) -> None:
    """Set the fp32 weights that belong to some of the model's weights to these whole values."""
    for weight, shard, place in _shards(optimizer):
        if weight in values:
            shard.copy_(values[weight].reshape(-1)[place])


def _shards(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
    """Each of the model's 16-bit weights of which this rank has a part: the part in fp32, and where it lies."""
    for one in optimizer.chained_optimizers:
        for models, shards in zip(one.model_float16_groups, one.shard_fp32_from_float16_groups, strict=True):
            for weight, shard in zip(models, shards, strict=True):
                place = one._get_model_param_range_map(weight)["param"]
                yield weight, shard, slice(place.start, place.end)
