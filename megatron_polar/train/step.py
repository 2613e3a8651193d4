"""One optimizer step over megatron-core's pipeline schedules: from micro-batches to the loss, the gradient and the
update."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_polar import faults
from megatron_polar.data.packing import MicroBatch
from megatron_polar.data.steps import Step
from megatron_polar.model.build import BuiltModel
from megatron_polar.model.row_layout import RowLayout, make_row_layout
from megatron_polar.parallel.device import Device
from megatron_polar.parallel.readback import read_back
from megatron_polar.parallel.topology import Topology
from megatron_polar.parallel.transfer import move
from megatron_polar.train.gradients import (
    GradientReduction,
    accumulate_in_order,
    clip_and_update,
    measure_gradients,
)
from megatron_polar.train.guard import StepGuard
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
    """`sums`: objective.SUMS over all pairs of the step, the same on every rank, fp64. `grad_norm`: before clipping.

    `skipped` says why the update was not made (None: it was), `suspects` which ranks and comparisons are to blame as
    far as that can be seen, `busy_seconds` how long this rank worked before it had to wait for other replicas.
    `half_wins`: objective.RankingLoss.half_wins of this rank's pairs, int8, in the order of its micro-batches; nothing
    where the pipeline's last stage is elsewhere, and where nobody asked.
    """

    sums: dict[str, float]
    grad_norm: float
    skipped: str | None = None
    suspects: list[dict] = field(default_factory=list)
    busy_seconds: float = 0.0
    half_wins: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int8))


def to_device(batch: MicroBatch, *, model: BuiltModel, device: Device, topology: Topology) -> DeviceBatch:
    """Move a micro-batch to the device and keep this context-parallel rank's part of the tokens. The host waits for
    nothing."""
    there = batch.on_device or {}
    tokens, winners, losers = (
        there[name] if name in there else torch.from_numpy(getattr(batch, name))
        for name in ("tokens", "winners", "losers")
    )
    ranks = topology.cp_size * (topology.tp_size if model.transformer_config.sequence_parallel else 1)
    layout = make_row_layout(
        batch,
        device=torch.device("cpu"),
        cp_rank=topology.cp_rank,
        cp_size=topology.cp_size,
        spread_over=ranks * model.reward_rows_multiple if model.reward_rows else None,
    )
    tokens = tokens.chunk(topology.cp_size, dim=1)[topology.cp_rank].contiguous()
    return move(DeviceBatch(tokens, layout, winners, losers), device)


def moved_when_asked(
    micro_batches: Sequence[MicroBatch], move_one: Callable[[MicroBatch], DeviceBatch], *, num_chunks: int
) -> list[Iterator[DeviceBatch]]:
    """For each chunk of an interleaved pipeline all micro-batches, each moved once, when the first chunk asks for it:
    by then the device has the ones before it to compute. None is kept that all chunks have been given."""
    moved, waiting = map(move_one, micro_batches), [deque() for _ in range(num_chunks)]

    def of_chunk(own: deque[DeviceBatch]) -> Iterator[DeviceBatch]:
        for _ in micro_batches:
            if not own:
                batch = next(moved)
                for chunk in waiting:
                    chunk.append(batch)
                del batch
            yield own.popleft()

    return [of_chunk(own) for own in waiting]


def train_step(
    model: BuiltModel,
    *,
    optimizer: MegatronOptimizer,
    step: Step,
    reduction: GradientReduction,
    guard: StepGuard,
    topology: Topology,
    device: Device,
    in_order: bool = False,
    with_outcomes: bool = False,
) -> StepResult:
    """Forward and backward over all micro-batches, one update. The gradient is that of the mean over all pairs.

    A step that `guard` refuses leaves weights and optimizer as they were, on all ranks alike. `in_order` is
    `train.canonical_reduction`; `with_outcomes` asks for `StepResult.half_wins`.
    """
    reduction.start()
    outcomes: list[torch.Tensor] | None = [] if with_outcomes else None
    local = compute_gradients(
        model,
        optimizer=optimizer,
        step=step,
        reduction=reduction,
        topology=topology,
        device=device,
        in_order=in_order,
        outcomes=outcomes,
    )
    sums = local if in_order else reduce_sums(local, topology=topology, device=device)
    figures = dict(zip(SUMS, read_back(sums.sum(0)).tolist(), strict=True))
    grad_norm = measure_gradients(optimizer)
    loss = figures["loss"] / max(figures["pairs"], 1.0)
    verdict = guard.judge(loss=loss, grad_norm=grad_norm, are_finite=reduction.own_gradients_are_finite is not False)
    skipped = guard.agree(verdict, device=device)
    suspects = []
    if skipped is None:
        clip_and_update(optimizer, grad_norm=grad_norm)
    else:
        suspects = name_suspects(step, local=None if in_order else local, reduction=reduction, topology=topology)
    device.synchronize()
    half_wins = torch.cat(outcomes or [torch.zeros(0, dtype=torch.int8)]).cpu().numpy()
    return StepResult(figures, grad_norm, skipped, suspects, reduction.busy_seconds, half_wins)


def compute_gradients(
    model: BuiltModel,
    *,
    optimizer: MegatronOptimizer,
    step: Step,
    reduction: GradientReduction,
    topology: Topology,
    device: Device,
    in_order: bool = False,
    outcomes: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Gradients of one step, reduced and divided by the global number of pairs; no update.

    Returns objective.SUMS [m, len(SUMS)] of this rank's micro-batches (zeros where the pipeline's last stage is
    elsewhere), or [1, len(SUMS)] over all ranks with `in_order`. `outcomes` is given the half wins of each micro-batch.
    """
    for chunk in model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    run = partial(run_schedule, model, topology=topology, device=device, forward_only=False, outcomes=outcomes)
    if not in_order:
        return run(step.micro_batches)
    return accumulate_in_order(
        model,
        micro_batches=step.micro_batches,
        num_rounds=step.num_rounds,
        run=lambda batch: reduce_over_stages(run([batch]), topology=topology)[0],
        num_sums=len(SUMS),
        reduction=reduction,
        topology=topology,
    )[None]


def name_suspects(
    step: Step, *, local: torch.Tensor | None, reduction: GradientReduction, topology: Topology
) -> list[dict]:
    """Ranks whose loss or own gradient is not finite, with the comparisons they had. Collective.

    `local` are this rank's sums, where they are not added up over ranks already.
    """
    mine = []
    if local is not None:
        for number in torch.nonzero(~torch.isfinite(local).all(dim=1)).flatten().tolist():
            mine.append(
                {"rank": topology.rank, "what": f"loss of micro-batch {number}", "samples": step.indices[number]}
            )
    if not mine and reduction.own_gradients_are_finite is False:
        samples = [index for part in step.indices for index in part]
        mine.append({"rank": topology.rank, "what": "gradient", "samples": samples})
    gathered: list = [None] * topology.world_size
    dist.all_gather_object(gathered, mine)
    return [suspect for part in gathered for suspect in part]


def run_schedule(
    model: BuiltModel,
    micro_batches: Sequence[MicroBatch],
    *,
    topology: Topology,
    device: Device,
    forward_only: bool,
    outcomes: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run the pipeline over this rank's micro-batches; returns their objective.SUMS [m, len(SUMS)], fp64.

    Only the last pipeline stage sees rewards; the others return zeros. `outcomes` is given the half wins [p] of each.
    """
    if forward_only and not micro_batches:  # of canonical rounds, in which each rank runs one if it has one
        return torch.zeros(0, len(SUMS), dtype=torch.float64, device=device.torch_device)
    is_counted = topology.cp_rank == 0  # context-parallel ranks all see the same pairs
    stored = _schedule(
        model,
        micro_batches,
        topology=topology,
        device=device,
        loss=partial(_loss, is_counted, outcomes),
        forward_only=forward_only,
    )
    if stored:
        return torch.stack([report["sums"] for report in stored])
    return torch.zeros(len(micro_batches), len(SUMS), dtype=torch.float64, device=device.torch_device)


def reduce_sums(sums: torch.Tensor, *, topology: Topology, device: Device) -> torch.Tensor:
    """Objective.SUMS over all micro-batches of all ranks, [1, len(SUMS)], the same everywhere."""
    total = torch.zeros(1, len(SUMS), dtype=torch.float64, device=device.torch_device)
    for part in sums:
        total += part
    dist.all_reduce(total, group=topology.groups.dp)
    return reduce_over_stages(total, topology=topology)


def reduce_over_stages(sums: torch.Tensor, *, topology: Topology) -> torch.Tensor:
    """Hand the last pipeline stage's sums to the stages before it."""
    dist.broadcast(sums, src=topology.last_stage_global_rank, group=topology.groups.pp)
    return sums


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
    move_one = partial(to_device, model=model, device=device, topology=topology)
    iterators = moved_when_asked(micro_batches, move_one, num_chunks=len(model.chunks))
    interleaved = topology.vpp_size is not None
    forward_backward = get_forward_backward_func()
    return forward_backward(
        forward_step_func=partial(_forward_step, loss),
        data_iterator=iterators if interleaved else iterators[0],
        model=model.chunks if interleaved else model.chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens.shape[1] // topology.cp_size,  # stages exchange every one's real shape
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=loss is _rewards_only,
    )


def _forward_step(loss, batches: Iterator[DeviceBatch], model: torch.nn.Module):
    """megatron-core's forward_step_func: the model's output and the function that turns it into the loss."""
    batch = next(batches)
    output = model(batch.tokens, None, None, packed_seq_params=batch.layout)
    return output, partial(loss, batch)


def _loss(is_counted: bool, outcomes: list[torch.Tensor] | None, batch: DeviceBatch, rewards: torch.Tensor):
    """Loss sum, number of pairs and report of one micro-batch; the schedule divides once by the global number of
    pairs, and comes to the micro-batches in their order."""
    if faults.point("loss") == "nan":
        rewards = rewards * float("nan")
    result = ranking_loss(rewards, winners=batch.winners, losers=batch.losers)
    if outcomes is not None:
        outcomes.append(result.half_wins)
    # Filled on the device: torch.tensor would copy the number there and wait for it.
    num_pairs = torch.full((), len(batch.winners) if is_counted else 0, dtype=torch.int, device=rewards.device)
    return result.loss_sum, num_pairs, {"sums": result.sums}


def _rewards_only(batch: DeviceBatch, rewards: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
    return rewards.float()
