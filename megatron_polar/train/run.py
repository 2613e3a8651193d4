"""train(config): build, resume, loop. Reads as the table of contents of a run."""

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import orjson

from megatron_polar import faults, log
from megatron_polar.config.load import dump_config, load_saved_config
from megatron_polar.config.schema import RunConfig
from megatron_polar.data.loader import load_steps
from megatron_polar.data.pair_counts import PAIRS
from megatron_polar.data.steps import Step, StepDataset
from megatron_polar.errors import CANNOT_SAVE, STOPPED, RunStopped, UserError
from megatron_polar.manifest import write_durably
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.build import Run, build_run, describe_run, join_ranks, warn_of_no_choice
from megatron_polar.train.checkpoint import Checkpointer, SaveReport
from megatron_polar.train.checkpoint_files import TrainingState
from megatron_polar.train.ending import written_down
from megatron_polar.train.evaluation import evaluate_held_out
from megatron_polar.train.guard import check_replicas, flip_a_bit
from megatron_polar.train.journal import BAD_STEPS_FILE, Journal, last_sign_of_life
from megatron_polar.train.lock import RunLock, lock_run
from megatron_polar.train.metrics import Metrics, StepTimer, peak_tflops
from megatron_polar.train.optimizer import current_learning_rate
from megatron_polar.train.resume import on_first_rank, optimizer_kind, start_or_resume, warn_of_a_stranger
from megatron_polar.train.signals import StopSignals
from megatron_polar.train.state_dict import layout_of
from megatron_polar.train.step import StepResult, train_step
from megatron_polar.train.stragglers import Stragglers
from megatron_polar.train.watchdog import Watchdog


@dataclass
class Training:
    """A run under way: what it is made of, who watches and writes, and how far it is."""

    run: Run
    signals: StopSignals
    metrics: Metrics
    journal: Journal
    checkpointer: Checkpointer
    watchdog: Watchdog
    stragglers: Stragglers
    lock: RunLock
    done: int
    """Finished steps, skipped ones included."""
    saved: int
    """Finished steps of the newest checkpoint."""


def train(config: RunConfig) -> dict[str, float]:
    """Train to the last step of `config`, resuming where the run directory stands. Returns the last row of metrics.

    Raises RunStopped when the run ends before that: asked to by a signal, or because it cannot go on.
    """
    directory = Path(config.run.directory)
    with StopSignals() as signals:
        device, topology = join_ranks(config)
        with (
            _watchdog(config, topology) as watchdog,
            lock_run(directory, topology=topology) as lock,
            written_down(lock, topology=topology, watchdog=watchdog) as journal,
        ):
            run = build_run(config, device, topology)
            signals.wait_for_step()
            faults.point("start")
            training = _open(run, signals=signals, watchdog=watchdog, journal=journal, lock=lock)
            _train(training)
            return training.metrics.last_row


def _train(training: Training) -> None:
    run, watchdog = training.run, training.watchdog
    try:
        with (
            ExitStack() as at_last,
            run.pairs.handing_over() as tables,
            log.Progress("training", total=run.num_steps, unit="steps", quiet=not log.on_terminal()) as bar,
        ):
            dataset = StepDataset(
                run.data.train,
                global_batch_size=run.config.train.global_batch_size,
                rank=run.topology.dp_rank,
                shape=run.data.shape,
                tables=tables,
            )
            bar.advance(training.done)
            _stop_if_asked(training)
            timer = StepTimer()
            watchdog.enter("data", training.done + 1)
            gpu = run.device.torch_device.index
            steps = load_steps(dataset, start=training.done, stop=run.num_steps, data=run.config.data, gpu=gpu)
            at_last.callback(steps.close)  # when the tables are gone: a worker may wait for one that will never come
            for step in steps:
                _one_step(training, step, timer=timer)
                _after_step(training)
                _stop_if_asked(training)
                bar.advance()
                timer.lap()
                watchdog.enter("data", training.done + 1)
                faults.point("data")
        watchdog.enter("save", training.done)
        training.checkpointer.finish()
        _check_last_save(training)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted after step {training.done}; {_what_is_saved(training)}") from None
    training.metrics.close()


def _what_is_saved(training: Training) -> str:
    """And what the same command does next."""
    if not training.saved:
        return "no step is saved: start the same command again to start over"
    return f"step {training.saved} is saved: start the same command again to go on from there"


def _check_last_save(training: Training) -> None:
    """A run whose last weights are nowhere is not done."""
    if training.saved != training.done:
        training.metrics.close()
        raise RunStopped(
            f"all {training.done} steps are done, but the last checkpoint could not be written (step {training.saved} "
            f"is saved); make room and start the same command again",
            status=CANNOT_SAVE,
        )


def _one_step(training: Training, step: Step, *, timer: StepTimer) -> None:
    """Forward, backward and update, or a step that is skipped and written down."""
    run, waited = training.run, timer.elapsed()
    training.watchdog.enter("step", step.number + 1)
    learning_rate = current_learning_rate(run.optimizer)
    result = train_step(
        run.model,
        optimizer=run.optimizer,
        step=step,
        reduction=run.reduction,
        guard=run.guard,
        topology=run.topology,
        device=run.device,
        in_order=run.config.train.canonical_reduction,
        with_outcomes=run.pairs.is_recording,
    )
    run.schedule.step(increment=1)
    training.done = training.journal.step = step.number + 1
    training.metrics.add(step, result, seconds=timer.lap(), waited_seconds=waited, learning_rate=learning_rate)
    if step.num_comparisons >= run.topology.dp_size:  # else some have nothing to do, and none can be called slow
        training.stragglers.add(result.busy_seconds, load=step.work.load)
    run.pairs.add(step, result)
    if result.skipped is not None:
        _write_down_bad_step(training, result)


def _after_step(training: Training) -> None:
    """What is due between two steps: publish, end a period, log, evaluate, compare replicas, save."""
    run, config, done = training.run, training.run.config, training.done
    flip_a_bit(run.model)
    training.checkpointer.poll()
    run.pairs.end_step(done)
    save_is_due = _due(done, config.checkpoint.save_interval, last=run.num_steps)
    if _due(done, config.logging.interval, last=run.num_steps) or save_is_due:
        # Before every save: a resumed run cuts the rows behind its checkpoint, and must find those before it.
        _write_metrics(training)
        _report_stragglers(training)
    if _due(done, config.evaluation.interval, last=run.num_steps):
        _write_pairs(training)
        if run.data.validation is not None:
            _evaluate(training)
    interval = config.faults.replica_check_interval
    if interval and done % interval == 0 and not save_is_due:
        _check_replicas(training)
    if save_is_due:
        _save(training)
    _stop_if_steps_keep_failing(training)


def _due(step: int, interval: int, *, last: int) -> bool:
    return interval > 0 and (step % interval == 0 or step == last)


# --- Starting --------------------------------------------------------------------------------------------------------


def _watchdog(config: RunConfig, topology: Topology) -> Watchdog:
    return Watchdog(
        topology.store if topology.world_size > 1 else None,
        rank=topology.rank,
        world_size=topology.world_size,
        timeout_seconds=config.faults.stall_timeout_seconds,
        directory=Path(config.run.directory),
    )


def _open(run: Run, *, signals: StopSignals, watchdog: Watchdog, journal: Journal, lock: RunLock) -> Training:
    """Resume or start; open what a run writes."""
    config = run.config
    watchdog.enter("load", 0)
    run.data.verify(how=config.data.verify, after_each=watchdog.progress)
    start = start_or_resume(run, watchdog=watchdog)
    run.schedule.step(increment=start.step)
    is_done = journal.done_at is not None and start.step >= run.num_steps
    on_first_rank(run.topology, partial(_announce, run, is_done=is_done))
    for line in describe_run(run, layout=layout_of(run.topology)):
        log.info(line)
    warn_of_no_choice(run)
    journal.step = start.step
    if run.topology.rank == 0 and start.step < run.num_steps:  # a finished run has no more to tell
        lost = last_sign_of_life(run.directory, resumed_at=start.step)
        for name, reason in start.damaged.items():
            journal.write("damaged", name=name, reason=reason)
        warn_of_a_stranger(run.directory, start=start.step)
        journal.write("start", step=start.step, origin=start.origin, world_size=run.topology.world_size, **lost)
        journal.status("running")
    metrics = Metrics(
        run.directory,
        num_steps=run.num_steps,
        world_size=run.topology.world_size,
        architecture=run.model.architecture,
        peak_tflops=peak_tflops(run.device.name, config.logging.hardware_peak_tflops),
        tensorboard=config.logging.tensorboard,
        global_batch_size=config.train.global_batch_size,
        resumed_at=start.step,
        started_at=journal.first_start,
        may_write=lock.is_ours,
    )

    def note_save(report: SaveReport) -> None:
        journal.write("save", **vars(report))
        if report.problem is None:
            training.saved = report.step
            journal.status("running")

    checkpointer = Checkpointer(
        run.directory,
        section=config.checkpoint,
        model=run.model,
        optimizer=run.optimizer,
        topology=run.topology,
        config_yaml=dump_config(config),
        tokenizer_directory=run.data.tokenizer_directory,
        lock=lock,
        on_end=note_save,
        after_each=watchdog.progress,
    )
    stragglers = Stragglers(ratio=config.faults.straggler_ratio)
    parts = (run, signals, metrics, journal, checkpointer, watchdog, stragglers, lock)
    training = Training(*parts, done=start.step, saved=start.step)
    return training


def _announce(run: Run, *, is_done: bool) -> None:
    """Write the resolved configuration, the file that rebuilds the run, and what it runs on. First rank only.

    A run that is done keeps those that it was trained with, unless it was moved.
    """
    with suppress(UserError, FileNotFoundError):
        if is_done and load_saved_config(run.directory / "config.yaml").run.directory == run.config.run.directory:
            return
    run.directory.mkdir(parents=True, exist_ok=True)
    write_durably(run.directory / "config.yaml", dump_config(run.config).encode())
    environment = orjson.dumps(run.environment | layout_of(run.topology), option=orjson.OPT_INDENT_2)
    write_durably(run.directory / "environment.json", environment)


# --- Between steps ---------------------------------------------------------------------------------------------------


def _evaluate(training: Training) -> None:
    run, timer = training.run, StepTimer()
    training.watchdog.enter("evaluation", training.done)
    sums = evaluate_held_out(
        run.model,
        comparisons=run.data.validation,
        config=run.config,
        shape=run.data.shape,
        topology=run.topology,
        device=run.device,
        after_each=training.watchdog.progress,
    )
    training.metrics.write_validation(training.done, sums, seconds=timer.lap())


def _check_replicas(training: Training) -> None:
    try:
        check_replicas(training.run.model, topology=training.run.topology, step=training.done)
    except RunStopped:
        training.checkpointer.finish()  # what is being written in the background is of good weights
        raise


def _save(training: Training, *, blocking: bool = False) -> None:
    run, done = training.run, training.done
    training.watchdog.enter("save", done)
    if run.config.faults.replica_check_interval:
        _check_replicas(training)  # whatever the save is for: spoilt weights would look like good ones afterwards
    state = TrainingState(
        step=done,
        consumed_comparisons=done * run.config.train.global_batch_size,
        data_fingerprint=run.data.train.fingerprint,
        max_response_length=min(c.manifest["settings"]["max_response_length"] for c in run.data.train.corpora),
        layout=layout_of(run.topology),
        backend=run.device.backend,
        precision=run.config.train.precision,
        optimizer=optimizer_kind(run.config),
        guard=run.guard.state(),
        wrapper=run.data.train.wrapper,
    )
    run.pairs.gather()
    others = {PAIRS: run.pairs.encode()} if run.pairs.is_recording else {}
    training.checkpointer.save(state, others=others, blocking=blocking)


def _write_pairs(training: Training) -> None:
    run = training.run
    run.pairs.gather()
    if run.pairs.is_recording and run.topology.rank == 0 and training.lock.is_ours():
        run.pairs.write(run.directory)


def _write_metrics(training: Training) -> None:
    guard, journal = training.run.guard, training.journal
    training.run.pairs.gather()
    reliability = {
        "skipped_steps": guard.skipped,
        "nan_steps": guard.nonfinite,
        "restarts": journal.restarts,
        "last_saved_step": training.saved,
    }
    memory, pairs = training.run.device.memory_allocated(), training.run.pairs.figures()
    training.metrics.write(training.done, memory_bytes=memory, reliability=reliability, pairs=pairs)


def _report_stragglers(training: Training) -> None:
    topology = training.run.topology
    for slow in training.stragglers.report(topology, device=training.run.device.torch_device):
        training.journal.write("straggler", step=training.done, rank=slow.ranks[0], **vars(slow))
        if topology.rank == 0:
            log.warn(f"iteration {training.done}: {slow}")


def _write_down_bad_step(training: Training, result: StepResult) -> None:
    """One warning with step, reason, ranks and comparisons; the same as an event."""
    suspects = "; ".join(
        f"rank {s['rank']}: {s['what']}, comparisons {', '.join(map(str, s['samples'][:8]))}" for s in result.suspects
    )
    training.journal.write(
        "bad_step",
        step=training.done,
        reason=result.skipped,
        loss=repr(result.sums["loss"] / max(result.sums["pairs"], 1.0)),
        grad_norm=repr(result.grad_norm),
        ranks=result.suspects,
    )
    if training.run.topology.rank == 0:
        log.warn(
            f"iteration {training.done}: skipped, weights unchanged: {result.skipped}"
            + (f" ({suspects})" if suspects else "")
        )


# --- Stopping --------------------------------------------------------------------------------------------------------


def _stop_if_asked(training: Training) -> None:
    """After SIGTERM or SIGUSR1 on any rank: write a checkpoint and end with a status of its own."""
    name = training.signals.agreed(training.run.device)
    if name is None or training.done >= training.run.num_steps:
        return
    training.checkpointer.finish()
    if training.saved != training.done:
        _write_metrics(training)
        _save(training, blocking=True)
        if training.saved != training.done:
            _save(training, blocking=True)  # once more: storage may have failed for a moment
    training.metrics.close()
    raise RunStopped(
        f"stopped by {name} after step {training.done} of {training.run.num_steps}; {_what_is_saved(training)}",
        status=STOPPED if training.saved == training.done else CANNOT_SAVE,
    )


def _stop_if_steps_keep_failing(training: Training) -> None:
    run, done = training.run, training.done
    if run.guard.in_a_row <= run.config.faults.max_consecutive_bad_steps:
        return
    first = done - run.guard.in_a_row + 1
    command = f"megatron-polar train {run.directory}/config.yaml --replay-step {first}"
    training.journal.write_bad_steps(first=first, replay=command)  # whatever comes of the save
    training.checkpointer.finish()
    if training.saved != done:
        _save(training, blocking=True)  # skipped steps have changed nothing: these are the last good weights
    remedy = f"see {run.directory}/{BAD_STEPS_FILE}, and look into the first of them, with as many ranks: {command}"
    run.guard.check_limit(step=done, remedy=remedy)
