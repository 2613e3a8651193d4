"""Held-out loss and accuracy inside the training loop, over the same comparisons every time."""

from collections.abc import Callable

import torch

from megatron_polar import faults
from megatron_polar.config.schema import RunConfig
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.steps import RowShape, build_step
from megatron_polar.model.build import BuiltModel
from megatron_polar.parallel.device import Device
from megatron_polar.parallel.readback import read_back
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.objective import SUMS
from megatron_polar.train.step import reduce_sums, run_schedule

_COMPARISONS_AT_ONCE = 256


@torch.no_grad()
def evaluate_held_out(
    model: BuiltModel,
    *,
    comparisons: ComparisonDataset,
    config: RunConfig,
    shape: RowShape,
    topology: Topology,
    device: Device,
    after_each: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Sums of the objective (objective.SUMS) over the first `evaluation.num_comparisons` held-out comparisons.

    `after_each` is called after every few hundred of them.
    """
    for chunk in model.chunks:
        chunk.eval()
    count = min(config.evaluation.num_comparisons, len(comparisons))
    total: dict[str, float] = {}
    for start in range(0, count, _COMPARISONS_AT_ONCE):
        indices = range(start, min(start + _COMPARISONS_AT_ONCE, count))
        step = build_step(comparisons, indices, number=0, rank=topology.dp_rank, shape=shape)
        faults.point("evaluation")
        own = run_schedule(model, step.micro_batches, topology=topology, device=device, forward_only=True)
        sums = read_back(reduce_sums(own, topology=topology, device=device)[0]).tolist()
        after_each()
        total = {name: total.get(name, 0.0) + value for name, value in zip(SUMS, sums, strict=True)}
    return total
