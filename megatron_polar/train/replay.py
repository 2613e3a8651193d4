"""Run one step again, micro-batch by micro-batch, to see which comparisons make it fail. Changes nothing."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_polar import log
from megatron_polar.config.schema import RunConfig
from megatron_polar.data.curriculum import DifficultyTables
from megatron_polar.data.steps import StepDataset
from megatron_polar.errors import DONE, FAILED, UserError
from megatron_polar.train.build import Run, build_run, join_ranks
from megatron_polar.train.checkpoint_files import (
    TrainingState,
    find_checkpoint,
    list_steps,
    read_state,
    verify_checkpoint,
)
from megatron_polar.train.gradients import gather_updated_weights
from megatron_polar.train.objective import SUMS
from megatron_polar.train.resume import check_same_run
from megatron_polar.train.state_dict import load_training
from megatron_polar.train.step import run_schedule


@dataclass(frozen=True)
class ReplayedBatch:
    """One micro-batch of one rank: mean loss over its pairs (None where no rewards are seen), and whether this rank's
    gradients of it are finite."""

    rank: int
    micro_batch: int
    samples: list[int]
    loss: float | None
    gradients_are_finite: bool

    @property
    def is_bad(self) -> bool:
        return not self.gradients_are_finite or not math.isfinite(self.loss or 0.0)


def replay_step(config: RunConfig, *, step: int) -> int:
    """Repeat the forward and backward pass of `step` with the newest checkpoint before it; returns the exit status: 1
    when a loss or a gradient is not finite.

    Raises UserError when no checkpoint from before the end of that step is left.
    """
    # Overlapping would mix gradients of ranks before they can be looked at.
    optimizer = dataclasses.replace(config.optimizer, overlap_grad_reduce=False, overlap_param_gather=False)
    alone = dataclasses.replace(config, optimizer=optimizer)
    if config.parallel.virtual_pipeline_model_parallel_size:  # whose schedule cannot run one micro-batch
        plain = dataclasses.replace(config.parallel, virtual_pipeline_model_parallel_size=None)
        alone = dataclasses.replace(alone, parallel=plain)
    run = build_run(alone, *join_ranks(alone))
    if not 1 <= step <= run.num_steps:
        raise UserError(f"--replay-step {step}: this run has steps 1 to {run.num_steps}")
    checkpoint = _checkpoint_for(run, step=step)
    check_same_run(checkpoint, run=run)
    load_training(checkpoint, model=run.model, optimizer=run.optimizer, topology=run.topology)
    gather_updated_weights(run.model)
    start = read_state(checkpoint).step
    run.pairs.restore(checkpoint, step=start)
    log.info(f"replaying iteration {step} with the weights of {checkpoint} ({_distance(start, step)})")
    gathered: list = [None] * run.topology.world_size
    with run.pairs.handing_over() as tables:
        if tables is not None and not tables.has(step - 1):
            raise UserError(
                f"--replay-step {step}: the newest checkpoint before it, of step {start}, is more than a period of "
                f"data.curriculum.interval={config.data.curriculum.interval} steps older, and which policies met in "
                f"the step depends on what was counted since; set checkpoint.save_interval to the interval or less"
            )
        dist.all_gather_object(gathered, _replay(run, config=config, step=step, tables=tables))
    found = [batch for part in gathered for batch in part]
    for batch in found:
        verdict = "BAD" if batch.is_bad else "ok"
        gradients = "finite" if batch.gradients_are_finite else "not finite"
        samples = ", ".join(map(str, batch.samples))
        log.info(
            f"  {verdict:3s} rank {batch.rank} micro-batch {batch.micro_batch}: loss "
            f"{'not here' if batch.loss is None else f'{batch.loss:.6g}'}, gradients {gradients}; comparisons {samples}"
        )
    bad = sum(batch.is_bad for batch in found)
    log.info(f"{bad} of {len(found)} micro-batches are bad" + ("" if bad else ": the step does not fail by itself"))
    return FAILED if bad else DONE


def _checkpoint_for(run: Run, *, step: int):
    """The newest checkpoint whose weights the step may have seen: from before it, or from skipped steps after it."""
    known = list_steps(run.directory)
    states = {path: state for path in known if (state := _state_if_readable(path)) is not None}
    later = [path for path, state in states.items() if state.guard.get("in_a_row", 0) > state.step - step >= 0]
    for path in [*later, *(path for path, state in states.items() if state.step < step)]:
        if verify_checkpoint(path) is None:
            return path
    if known:
        find_checkpoint(run.directory)  # says what is wrong with them
    raise UserError(f"{run.directory}: no checkpoint from before iteration {step} is left to replay it with")


def _state_if_readable(checkpoint: Path) -> TrainingState | None:
    try:
        return read_state(checkpoint)
    except UserError:
        return None


def _distance(start: int, step: int) -> str:
    if start >= step:
        return "the steps since then were skipped, so these are the weights that it saw"
    if start == step - 1:
        return "the weights that it saw"
    return f"{step - 1 - start} steps older than those that it saw"


def _replay(run: Run, *, config: RunConfig, step: int, tables: DifficultyTables | None) -> list[ReplayedBatch]:
    interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
    multiple = config.parallel.pipeline_model_parallel_size if interleaved else 1
    dataset = StepDataset(
        run.data.train,
        global_batch_size=run.config.train.global_batch_size,
        rank=run.topology.dp_rank,
        shape=dataclasses.replace(run.data.shape, micro_batches_multiple_of=multiple),  # packed as the step was
        tables=tables,
    )
    prepared = dataset[step - 1]
    rounds = torch.tensor([len(prepared.micro_batches)], device=run.device.torch_device)
    dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
    found = []
    run.reduction.hold(lambda num_pairs: None)
    for number in range(int(rounds)):
        for chunk in run.model.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        if number < len(prepared.micro_batches):
            sums = run_schedule(
                run.model,
                [prepared.micro_batches[number]],
                topology=run.topology,
                device=run.device,
                forward_only=False,
            )[0].tolist()
            figures = dict(zip(SUMS, sums, strict=True))
            loss = figures["loss"] / figures["pairs"] if figures["pairs"] else None
            finite = bool(run.reduction.own_gradients_are_finite)
            found.append(ReplayedBatch(run.topology.rank, number, prepared.indices[number], loss, finite))
    run.reduction.hold(None)
    return found
