"""What happens to gradients between the backward pass and the update: reduction over ranks, norm, clipping.

megatron-core's schedules call `GradientReduction` when a rank's own gradients are complete. That is the one moment at
which a bad gradient can still be told from its neighbours', and a slow rank from those that wait for it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_polar import faults
from megatron_polar.data.packing import MicroBatch
from megatron_polar.model.build import BuiltModel
from megatron_polar.model.fp8_weights import finish_gather
from megatron_polar.parallel.device import Device
from megatron_polar.parallel.topology import Topology


class GradientReduction:
    """megatron-core's `finalize_model_grads_func`, with a look at this rank's own gradients before they are reduced."""

    def __init__(self, model: BuiltModel, *, device: Device):
        self._model, self._device = model, device
        # With overlap_grad_reduce most of the sum over ranks is taken before the backward pass ends.
        self._sees_own_gradients = not any(chunk.ddp_config.overlap_grad_reduce for chunk in model.chunks)
        self.started = self._ready = device.timestamp()
        self._held: Callable[[torch.Tensor], None] | None = None
        self.own_sums: list[torch.Tensor] = []
        """Sums of this rank's own gradients: finite where all of them are. Empty where they cannot be seen."""

    def start(self) -> None:
        """A step begins."""
        self.started = self._ready = self._device.timestamp()

    def __call__(self, chunks, num_pairs: torch.Tensor | None = None, **keywords) -> None:
        """Take note of this rank's gradients; then reduce them over ranks and divide by the global number of pairs."""
        self._spoil(faults.point("gradient"))
        self._ready = self._device.timestamp()
        self.own_sums = [buffer.grad_data.sum() for buffer in self.buffers] if self._sees_own_gradients else []
        if self._held is not None:
            self._held(num_pairs)
        else:
            finalize_model_grads(chunks, num_pairs, **keywords)

    @property
    def buffers(self) -> list:
        """megatron-core's gradient buffers of this rank (`grad_data`: flat, fp32)."""
        return [buffer for chunk in self._model.chunks for buffer in chunk.buffers]

    @property
    def own_gradients_are_finite(self) -> bool | None:
        """Whether this rank's gradients were finite before the reduction; None where that cannot be seen."""
        return all(bool(torch.isfinite(value)) for value in self.own_sums) if self.own_sums else None

    @property
    def busy_seconds(self) -> float:
        """From the start of the step until this rank's gradients were ready: without waiting for other replicas."""
        return self._device.seconds_between(self.started, self._ready)

    def hold(self, take: Callable[[torch.Tensor], None] | None) -> None:
        """Hand the number of pairs to `take` and leave gradients unreduced; with None, reduce again as usual."""
        self._held = take

    def _spoil(self, action: str | None) -> None:
        if action in ("nan", "inf"):
            self.buffers[0].grad_data[0] = float(action)


def accumulate_in_order(
    model: BuiltModel,
    *,
    micro_batches: Sequence[MicroBatch],
    num_rounds: int,
    run: Callable[[MicroBatch], torch.Tensor],
    num_sums: int,
    reduction: GradientReduction,
    topology: Topology,
) -> torch.Tensor:
    """The gradient of a step, added up in one order whatever the number of data-parallel ranks.

    The micro-batches of the step are dealt in turn: round r holds micro-batch r of every rank. After each round all
    ranks' gradients are gathered and added in that order, so the sum is bitwise the one that a single rank would get.
    `run` does forward and backward of one micro-batch and returns its sums [num_sums], which are added up likewise and
    returned.
    """
    group = topology.groups.dp_cp
    device = reduction.buffers[0].grad_data.device
    totals = [torch.zeros_like(buffer.grad_data) for buffer in reduction.buffers]
    sums = torch.zeros(num_sums, dtype=torch.float64, device=device)
    num_pairs = torch.zeros(1, dtype=torch.int, device=device)
    own_sums: list[torch.Tensor] = []
    reduction.hold(num_pairs.add_)
    for number in range(num_rounds):
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        own = torch.zeros_like(sums)
        if number < len(micro_batches):
            own = run(micro_batches[number])
            own_sums += reduction.own_sums
        for total, buffer in zip(totals, reduction.buffers, strict=True):
            _add_in_order(total, buffer.grad_data, group=group)
        _add_in_order(sums, own, group=topology.groups.dp)
    reduction.hold(None)
    for total, buffer in zip(totals, reduction.buffers, strict=True):
        # One rank brings the sum and the others nothing, so that the usual reduction leaves it as it is.
        buffer.grad_data.copy_(total if dist.get_rank(group) == 0 else torch.zeros_like(total))
    reduction(model.chunks, num_pairs)
    reduction.own_sums = own_sums  # the buffers of the first rank held everybody's
    return sums


def _add_in_order(total: torch.Tensor, own: torch.Tensor, *, group: dist.ProcessGroup) -> None:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    for part in parts:
        total += part


def measure_gradients(optimizer: MegatronOptimizer) -> float:
    """Hand the reduced gradients to the optimizer; returns their global norm before clipping, the same on every
    rank."""
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    return float(norm) if norm is not None else 0.0


def clip_and_update(optimizer: MegatronOptimizer, *, grad_norm: float) -> None:
    """Clip to `optimizer.clip_grad` and let the optimizer change the weights."""
    faults.point("before_update")
    for one in optimizer.chained_optimizers:
        parameters = one.get_parameters()
        if parameters and one.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=one.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    faults.point("after_update")


def gather_updated_weights(model: BuiltModel) -> None:
    """With `overlap_param_gather` other ranks' updated weights arrive only in the next forward pass: fetch them now."""
    for chunk in model.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
            finish_gather(chunk.parameters())
