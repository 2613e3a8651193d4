"""Where a run starts: from its newest checkpoint, from another run's weights, or from nothing."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_polar import log
from megatron_polar.config.load import load_saved_config
from megatron_polar.config.presets import architecture_of
from megatron_polar.config.schema import RunConfig
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.errors import CANNOT_SAVE, RunStopped, UserError, describe_os_error, naming
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.build import Run
from megatron_polar.train.checkpoint import Found, agree_on_checkpoint
from megatron_polar.train.checkpoint_files import read_state, remove_remains, set_aside_newer
from megatron_polar.train.journal import EVENTS, read_events, read_rows
from megatron_polar.train.state_dict import load_training, load_weights
from megatron_polar.train.watchdog import Watchdog

T = TypeVar("T")

_MAKE_COMPARISONS = (
    "run.seed ",
    "data.candidates_per_comparison ",
    "data.max_sequence_length ",
    "data.contrast ",
)
"""What decides, besides the datasets and the seed, which comparisons there are and in which order."""


@dataclass(frozen=True)
class Start:
    """Finished steps, where the weights come from, and the new names of damaged checkpoints with what is wrong."""

    step: int
    origin: str
    damaged: dict[str, str]


_HEAD_APART = ", head apart"
"""Before the reward head had a group of its own, bf16 runs saved optimizer state under other weights' names."""


def optimizer_kind(config: RunConfig) -> str:
    """What `TrainingState.optimizer` says of a configuration."""
    return ("distributed" if config.optimizer.use_distributed_optimizer else "replicated") + _HEAD_APART


def start_or_resume(run: Run, *, watchdog: Watchdog) -> Start:
    """Resume, start from a checkpoint's weights, or start afresh. Collective; raises UserError."""
    config = run.config
    found = agree_on_checkpoint(run.directory, topology=run.topology, required=False, after_each=watchdog.progress)
    if found is not None:
        checkpoint = found.path
        if not config.checkpoint.resume:
            raise UserError(
                f"{run.directory} has checkpoints and checkpoint.resume=false; choose another run.directory, or resume"
            )
        check_same_run(checkpoint, run=run)
        state = load_training(
            checkpoint, model=run.model, optimizer=run.optimizer, topology=run.topology, after_each=watchdog.progress
        )
        run.guard.restore(state.guard)
        run.pairs.restore(checkpoint, step=state.step)
        damaged = on_first_rank(run.topology, partial(_tidy, run.directory, found=found)) or {}
        rest = "" if state.step < run.num_steps else "; all steps are done, nothing is left to train"
        log.info(f"resumed from {checkpoint} at step {state.step}{rest}")
        changed = changed_settings(load_saved_config(checkpoint / "config.yaml"), config)
        if changed:
            log.info(f"other settings than the checkpoint was trained with: {', '.join(changed)}")
        return Start(state.step, checkpoint.name, damaged)
    _refuse_lost_checkpoints(run.directory)
    if config.train.init_from is not None:
        with naming("train.init_from"):
            source = agree_on_checkpoint(config.train.init_from, topology=run.topology, after_each=watchdog.progress)
        checkpoint = source.path
        _check_same_function(checkpoint, run=run, what=f"train.init_from={checkpoint}")
        _check_same_tokenizer(checkpoint, run=run)
        with naming("train.init_from"):
            load_weights(checkpoint, model=run.model, optimizer=run.optimizer, after_each=watchdog.progress)
        log.info(f"starting at step 0 from the weights of {checkpoint}")
        return Start(0, f"weights of {checkpoint}", {})
    log.info(f"no checkpoint in {run.directory}: starting at step 0 from random weights")
    return Start(0, "random weights", {})


def changed_settings(saved: RunConfig, now: RunConfig) -> list[str]:
    """What decides how a run trains and differs, a phrase for each; ranks, files and reports are left out."""
    found = []
    for section in ("run", "model", "data", "train", "optimizer"):
        before, after = (dataclasses.asdict(getattr(config, section)) for config in (saved, now))
        for key, value in after.items():
            if before[key] != value and key not in ("directory", "device", "train", "validation", "init_from"):
                found.append(f"{section}.{key} {before[key]} before and {value} now")
    return found


def _refuse_lost_checkpoints(run_directory: Path) -> None:
    """A run whose checkpoints have vanished would start over, and cut its metrics to nothing."""
    saves = [event for event in read_events(run_directory) if event["event"] == "save"]
    saved = [event["step"] for event in saves if event.get("problem", "?") is None and "step" in event]
    if saved:
        raise UserError(
            f"{run_directory}: {EVENTS} tells of a checkpoint of step {max(saved)}, and there is none; bring back its "
            f"checkpoints directory, or choose another run.directory to start again"
        )


def _tidy(run_directory: Path, *, found: Found) -> dict[str, str]:
    remove_remains(run_directory)  # first: it may make the room that the rest needs
    renamed = set_aside_newer(found.path, damaged=found.damaged)
    return {name: found.damaged[path] for path, name in renamed.items()}


def on_first_rank(topology: Topology, function: Callable[[], T]) -> T | None:
    """Call a function on the first rank alone; what the operating system refuses it stops all ranks. Collective.

    Returns its result on the first rank, None on the others. Raises RunStopped.
    """
    problem: list[str | None] = [None]
    result = None
    if topology.rank == 0:
        try:
            result = function()
        except OSError as error:
            problem = [describe_os_error(error, otherwise="a file")]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise RunStopped(problem[0], status=CANNOT_SAVE)
    return result


_FUNCTION = ("rotary_base", "rope_scaling_factor", "layernorm_epsilon", "add_qkv_bias", "qk_layernorm")
_FUNCTION += ("num_attention_heads", "num_query_groups", "kv_channels")


def _check_same_function(checkpoint: Path, *, run: Run, what: str) -> None:
    """Shapes are compared when the weights are loaded; here is what else makes the same weights another function, and
    what a model without such weights would pass over."""
    saved, now = architecture_of(load_saved_config(checkpoint / "config.yaml").model), run.model.architecture
    for name in _FUNCTION:
        if getattr(saved, name) != getattr(now, name):
            raise UserError(
                f"{what}: was made with model.{name}={getattr(saved, name)}, and this run has "
                f"{getattr(now, name)}, which would make another model of its weights; use the model section of "
                f"{checkpoint}/config.yaml"
            )


def _check_same_tokenizer(checkpoint: Path, *, run: Run) -> None:
    """Ids of another tokenizer mean other words to these weights."""
    wanted = load_tokenizer(checkpoint / "tokenizer").fingerprint
    for corpus in run.data.train.corpora:
        made_with = corpus.manifest["tokenizer"]["fingerprint"]
        if made_with != wanted:
            raise UserError(
                f"{corpus.path}: made with tokenizer {made_with[:12]}, and train.init_from={checkpoint} was trained "
                f"with {wanted[:12]}; make the data with the checkpoint's own: megatron-polar preprocess INPUT "
                f"--output ANOTHER_DIR --tokenizer {checkpoint / 'tokenizer'}"
            )


def _on_other_data(checkpoint: Path, *, run: Run) -> str:
    """Which setting makes other comparisons of the data; where none does, the datasets are others."""
    saved, now = load_saved_config(checkpoint / "config.yaml"), run.config
    deciding = _MAKE_COMPARISONS
    if "by_difficulty" in (saved.data.contrast, now.data.contrast):
        deciding = (*deciding, "data.curriculum ")
    changed = [told for told in changed_settings(saved, now) if told.startswith(deciding)]
    if not changed:
        return "on other data: the datasets of data.train or their weights have changed"
    return f"on other comparisons: {', '.join(changed)}"


def check_same_run(checkpoint: Path, *, run: Run) -> None:
    """Raise UserError where a step of this run is not the same step of the run that wrote the checkpoint."""
    _check_same_function(checkpoint, run=run, what=str(checkpoint))
    state = read_state(checkpoint)
    consumed = state.step * run.config.train.global_batch_size
    remedy = (
        f"use {checkpoint}/config.yaml with run.directory={run.directory}, or start a new run from its weights: with "
        f"another run.directory, and train.init_from={run.directory}"
    )
    if state.data_fingerprint != run.data.train.fingerprint:
        raise UserError(f"{checkpoint}: was trained {_on_other_data(checkpoint, run=run)}; {remedy}")
    if state.precision != run.config.train.precision:
        raise UserError(
            f"{checkpoint}: was trained with train.precision={state.precision}, now {run.config.train.precision}: the "
            f"optimizer's state does not fit; {remedy}"
        )
    kind = optimizer_kind(run.config)
    if state.optimizer and not state.optimizer.endswith(_HEAD_APART):
        raise UserError(
            f"{checkpoint}: was saved by an earlier program, whose optimizer state may stand under wrong names; start "
            f"a new run from its weights with train.init_from"
        )
    if state.optimizer not in ("", kind):
        flag = "optimizer.use_distributed_optimizer"
        raise UserError(
            f"{checkpoint}: was saved by the {state.optimizer.removesuffix(_HEAD_APART)} optimizer, and {flag} now "
            f"asks for the {kind.removesuffix(_HEAD_APART)} one, whose state is another; keep {flag}, or start a new "
            f"run with train.init_from"
        )
    if state.consumed_comparisons != consumed:
        before = state.consumed_comparisons // max(state.step, 1)
        raise UserError(
            f"{checkpoint}: was trained with train.global_batch_size={before}, now "
            f"{run.config.train.global_batch_size}: step {state.step} would be another place in the data "
            f"({state.consumed_comparisons} comparisons consumed, now {consumed}); {remedy}"
        )


def warn_of_a_stranger(run_directory: Path, *, start: int) -> None:
    """A checkpoint beyond all that the run has done is another run's: metrics are written before every save."""
    rows = read_rows(run_directory)
    if rows and start > rows[-1]["iteration"]:
        log.warn(
            f"{run_directory}: resumes at step {start}, and metrics.jsonl ends at {rows[-1]['iteration']}; if the "
            f"checkpoint was copied here from another run, curves and counts of steps mean nothing"
        )
