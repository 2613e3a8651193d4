"""One optimizer step over megatron-core's pipeline schedules: from micro-batches to the loss, the gradient and the
update."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_polar.data.packing import MicroBatch
from megatron_polar.model.attention import RowLayout, make_row_layout
from megatron_polar.model.build import BuiltModel
from megatron_polar.parallel.device import Device
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.objective import SUMS, ranking_loss


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch on this rank's device: tokens [b, s] of its context-parallel part, the row's layout, pairs [p]."""

    tokens: torch.Tensor
    layout: RowLayout
    winners: torch.Tensor
    losers: torch.Tensor


@dataclass(frozen=True)
class StepResult:
    """`sums`: objective.SUMS over all pairs of the step, the same on every rank, fp64. `grad_norm`: before clipping."""

    sums: dict[str, float]
    grad_norm: float


def to_device(batch: MicroBatch, *, device: Device, topology: Topology) -> DeviceBatch:
    """Move a micro-batch to the device and keep this context-parallel rank's part of the tokens."""
    place = device.torch_device
    tokens = torch.from_numpy(batch.tokens).chunk(topology.cp_size, dim=1)[topology.cp_rank]
    layout = make_row_layout(batch, device=place, cp_rank=topology.cp_rank, cp_size=topology.cp_size)
    winners, losers = (torch.from_numpy(x).to(place, non_blocking=True) for x in (batch.winners, batch.losers))
    return DeviceBatch(tokens.contiguous().to(place, non_blocking=True), layout, winners, losers)


def train_step(
    model: BuiltModel,
    *,
    optimizer: MegatronOptimizer,
    micro_batches: Sequence[MicroBatch],
    topology: Topology,
    device: Device,
) -> StepResult:
    """Forward and backward over all micro-batches, one update. The gradient is that of the mean over all pairs."""
    for chunk in model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = run_schedule(model, micro_batches=micro_batches, topology=topology, device=device, forward_only=False)
    _, grad_norm, _ = optimizer.step()
    return StepResult(sums=sums, grad_norm=float(grad_norm) if grad_norm is not None else 0.0)


def run_schedule(
    model: BuiltModel,
    *,
    micro_batches: Sequence[MicroBatch],
    topology: Topology,
    device: Device,
    forward_only: bool,
) -> dict[str, float]:
    """Run the pipeline over this rank's micro-batches; returns the objective's sums over all ranks."""
    is_counted = topology.cp_rank == 0  # context-parallel ranks all see the same pairs
    stored = _schedule(
        model,
        micro_batches,
        topology=topology,
        device=device,
        loss=partial(_loss, is_counted),
        forward_only=forward_only,
    )
    total = torch.zeros(len(SUMS), dtype=torch.float64, device=device.torch_device)
    for report in stored:
        total += report["sums"]
    dist.all_reduce(total, group=topology.groups.dp)
    dist.broadcast(total, src=topology.last_stage_global_rank, group=topology.groups.pp)
    return dict(zip(SUMS, total.tolist(), strict=True))


@torch.no_grad()
def compute_rewards(
    model: BuiltModel, *, micro_batches: Sequence[MicroBatch], topology: Topology, device: Device
) -> list[torch.Tensor]:
    """Rewards [c] of each of this rank's micro-batches, on every pipeline stage, without gradients or dropout."""
    for chunk in model.chunks:
        chunk.eval()
    stored = _schedule(model, micro_batches, topology=topology, device=device, loss=_rewards_only, forward_only=True)
    if topology.pp_size == 1:
        return stored
    sizes = [len(batch.reward_positions) for batch in micro_batches]
    rewards = torch.cat(stored) if topology.is_last_stage else torch.zeros(sum(sizes), device=device.torch_device)
    dist.broadcast(rewards, src=topology.last_stage_global_rank, group=topology.groups.pp)
    return list(rewards.split(sizes))


def _schedule(model, micro_batches, *, topology, device, loss, forward_only) -> list:
    batches = [to_device(batch, device=device, topology=topology) for batch in micro_batches]
    iterators = [iter(batches) for _ in model.chunks]
    interleaved = topology.vpp_size is not None
    forward_backward = get_forward_backward_func()
    return forward_backward(
        forward_step_func=partial(_forward_step, loss),
        data_iterator=iterators if interleaved else iterators[0],
        model=model.chunks if interleaved else model.chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.size(1),  # stages exchange the real shape of every micro-batch
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=loss is _rewards_only,
    )


def _forward_step(loss, batches: Iterator[DeviceBatch], model: torch.nn.Module):
    """megatron-core's forward_step_func: the model's output and the function that turns it into the loss."""
    batch = next(batches)
    output = model(batch.tokens, None, None, packed_seq_params=batch.layout)
    return output, partial(loss, batch)


def _loss(is_counted: bool, batch: DeviceBatch, rewards: torch.Tensor):
    """Loss sum, number of pairs and report of one micro-batch; the schedule divides once by the global number of
    pairs."""
    result = ranking_loss(rewards, winners=batch.winners, losers=batch.losers)
    num_pairs = torch.tensor(len(batch.winners) if is_counted else 0, dtype=torch.int, device=rewards.device)
    return result.loss_sum, num_pairs, {"sums": result.sums}


def _rewards_only(batch: DeviceBatch, rewards: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
    return rewards.float()
