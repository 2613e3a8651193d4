"""Faults while training: bad steps, signals, full disks, spoilt replicas; and sums in an order that layouts keep."""

import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import faults_training
import numpy as np
import orjson
import pytest
import torch
from ranks import run_ranks
from tiny_runs import STEPS, change, checkpoint_of, metric_rows, tiny_config, training_refusal

from megatron_polar import faults
from megatron_polar.config.schema import FaultsSection
from megatron_polar.errors import (
    BAD_STEPS,
    CANNOT_SAVE,
    FENCED,
    REPLICAS_DIFFER,
    STALLED,
    STOPPED,
    RunStopped,
    UserError,
)
from megatron_polar.manifest import encode_manifest
from megatron_polar.train.checkpoint_files import find_checkpoint, list_steps, verify_checkpoint
from megatron_polar.train.guard import GOOD, NOT_FINITE, SPIKE, StepGuard, Verdict
from megatron_polar.train.journal import goodput_table, read_events
from megatron_polar.train.lock import TAKE_OVER
from megatron_polar.train.replay import replay_step
from megatron_polar.train.run import train


def train_with(config, fault: str = "") -> tuple[int, str]:
    """Train on this rank with a planned fault; returns exit status and message."""
    faults.plan(fault)
    try:
        train(config)
    except RunStopped as stop:
        return stop.status, str(stop)
    return 0, ""


def shards(checkpoint: Path) -> dict[str, str]:
    files = orjson.loads((checkpoint / "manifest.json").read_bytes())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith((".distcp", "common.pt"))}


# --- fault points ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["nowhere", "after_shard:x", "after_shard=explode", "after_shard:0x1"])
def test_a_fault_that_does_not_exist_is_refused(text):
    with pytest.raises(UserError, match="POLAR_FAULT"):
        faults.plan(text)
    faults.plan("")


def test_a_fault_happens_once_at_its_turn_and_on_its_rank(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    faults.plan("gradient:2@1=nan,before_save@0=enospc")
    assert [faults.point("gradient") for _ in range(4)] == [None, "nan", None, None]
    assert faults.point("before_save") is None
    faults.plan("before_save@1=enospc")
    with pytest.raises(OSError, match="No space left"):
        faults.point("before_save")
    faults.plan("")


# --- bad steps -------------------------------------------------------------------------------------------------------


def test_a_nan_on_one_rank_of_four_is_skipped_by_all_with_unchanged_weights(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__save_interval=1, train__num_steps=4)
    outcomes = run_ranks(train_with, 4, config, "gradient:3@2=nan")
    assert outcomes == [(0, "")] * 4
    before, after = (saved_state(checkpoint_of(tmp_path / "run", step)) for step in (2, 3))
    assert before.keys() == after.keys()
    for name in before:  # weights, both moments and the optimizer's own count of steps
        assert np.array_equal(before[name], after[name]), name
    later = saved_state(checkpoint_of(tmp_path / "run", 4))
    assert any(not np.array_equal(after[name], later[name]) for name in after)
    (event,) = [event for event in read_events(tmp_path / "run") if event["event"] == "bad_step"]
    assert event["step"] == 3
    assert event["ranks"][0]["rank"] == 2
    assert event["ranks"][0]["what"] == "gradient"
    assert set(event["ranks"][0]["samples"]) <= set(range(16, 24))
    assert "nan" in event["reason"]
    row = metric_rows(tmp_path / "run")[-1]
    assert (row["reliability/skipped_steps"], row["reliability/nan_steps"]) == (1, 1)


def test_a_nan_loss_names_rank_micro_batch_and_comparisons(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=3)
    run_ranks(train_with, 2, config, "loss:2@1=nan")
    (event,) = [event for event in read_events(tmp_path / "run") if event["event"] == "bad_step"]
    (suspect,) = event["ranks"]
    assert suspect["rank"] == 1
    assert suspect["what"].startswith("loss of micro-batch")
    shown = capfd.readouterr().err
    assert f"iteration {event['step']}: skipped, weights unchanged" in shown
    assert f"comparisons {suspect['samples'][0]}" in shown


def saved_state(checkpoint: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, optimizer included, and the optimizer's count of steps."""
    return run_ranks(_saved_state, 1, checkpoint)[0]


def _saved_state(checkpoint: Path) -> dict[str, np.ndarray]:
    from megatron.core import dist_checkpointing

    from megatron_polar.config.schema import ParallelSection
    from megatron_polar.parallel import topology as ranks
    from megatron_polar.parallel.device import select_device

    ranks.initialize(ParallelSection(), device=select_device("cpu", local_rank=0))
    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint))
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    optimizer = common["optimizer"]
    groups = optimizer.get("optimizer", optimizer)["param_groups"]
    steps = {f"steps of group {i}": np.array(group.get("step", -1)) for i, group in enumerate(groups)}
    return {name: tensor.numpy() for name, tensor in tensors.items() if torch.is_tensor(tensor)} | steps


def always_nan(config) -> tuple[int, str]:
    """Every loss from the second step on is not a number."""
    passed = [0]

    def spoiled(name: str) -> str | None:
        passed[0] += name == "loss"
        return "nan" if name == "loss" and passed[0] > 3 else None

    faults.point = spoiled
    return train_with(config)


def test_too_many_bad_steps_stop_with_a_report_and_a_command_that_replays(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        train__num_steps=20,
        data__max_tokens_per_micro_batch=4000,
        faults__max_consecutive_bad_steps=2,
    )
    (status, message) = run_ranks(always_nan, 1, config)[0]
    assert status == BAD_STEPS
    assert "3 steps in a row were skipped" in message
    report = orjson.loads((tmp_path / "run" / "bad_steps.json").read_bytes())
    assert [event["step"] for event in report["steps"]] == [4, 5, 6]
    assert report["replay"] in message
    assert report["replay"].endswith(f"train {tmp_path / 'run'}/config.yaml --replay-step 4")
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", 6)
    assert orjson.loads((tmp_path / "run" / "status.json").read_bytes())["exit_status"] == BAD_STEPS
    capfd.readouterr()
    assert run_ranks(replay_step_4, 1, config, "")[0] == 0  # nothing is wrong with the data
    assert "does not fail by itself" in capfd.readouterr().err
    assert run_ranks(replay_step_4, 1, config, "loss=nan")[0] == 1
    assert "BAD rank 0 micro-batch 0" in capfd.readouterr().err


def replay_step_4(config, fault: str) -> int:
    faults.plan(fault)
    return replay_step(config, step=4)


def test_spikes_are_skipped_and_a_nan_does_not_poison_the_statistics():
    generator = np.random.default_rng(3)
    guard = StepGuard(FaultsSection(spike_sigmas=6.0, spike_window=64))
    losses = generator.normal(0.6, 0.02, 200)
    assert not any(guard.judge(loss=loss, grad_norm=1.0 + 0.1 * loss).code for loss in losses)
    for _ in range(5):
        assert guard.judge(loss=math.nan, grad_norm=1.0).code == NOT_FINITE
        assert guard.judge(loss=0.6, grad_norm=math.inf).code == NOT_FINITE
    assert guard.judge(loss=0.61, grad_norm=1.06).code == GOOD  # as before: no NaN has got into the window
    spikes = [guard.judge(loss=3.0, grad_norm=1.06), guard.judge(loss=0.6, grad_norm=50.0)]
    assert [spike.code for spike in spikes] == [SPIKE, SPIKE]
    assert spikes[0].reason.startswith("loss 3 is above")
    assert spikes[1].reason.startswith("grad_norm 50 is above")
    assert guard.judge(loss=0.6, grad_norm=1.06).code == GOOD


def test_one_rank_that_finds_a_step_bad_makes_all_ranks_count_it():
    assert run_ranks(_count_verdicts, 2) == [(2, 1, 0), (2, 1, 0)]


def _count_verdicts() -> tuple[int, int, int]:
    from megatron_polar.config.schema import ParallelSection
    from megatron_polar.parallel import topology as ranks
    from megatron_polar.parallel.device import select_device

    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(ParallelSection(), device=device)
    guard = StepGuard(FaultsSection())
    codes = [(GOOD, NOT_FINITE), (SPIKE, GOOD), (GOOD, GOOD)]
    reasons = [guard.agree(Verdict(step[topology.rank], "mine"), device=device) for step in codes]
    assert reasons[2] is None
    assert all(reasons[:2])
    return guard.skipped, guard.nonfinite, guard.in_a_row


def test_a_level_that_has_risen_for_good_is_accepted_in_the_end():
    guard = StepGuard(FaultsSection(spike_sigmas=6.0, spike_window=32))
    generator = np.random.default_rng(4)
    for loss in generator.normal(0.5, 0.02, 64):
        guard.judge(loss=loss, grad_norm=1.0)
    refused = [guard.judge(loss=loss, grad_norm=1.0).code == SPIKE for loss in generator.normal(1.0, 0.02, 64)]
    assert refused[0]
    assert not any(refused[-16:])


def test_the_guard_judges_after_a_resume_as_if_nothing_had_happened():
    one, other = (StepGuard(FaultsSection(spike_sigmas=3.0, spike_window=16)) for _ in range(2))
    values = np.random.default_rng(5).lognormal(0, 1, 60).tolist()
    for value in values[:30]:
        one.judge(loss=value, grad_norm=value)
    other.restore(orjson.loads(orjson.dumps(one.state())))
    for value in values[30:]:
        assert one.judge(loss=value, grad_norm=value) == other.judge(loss=value, grad_norm=value)
    assert one.state() == other.state()


# --- replicas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 3])
def test_a_flipped_bit_on_one_replica_is_found_within_the_interval_with_its_rank(rank, tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        faults__replica_check_interval=2,
        optimizer__use_distributed_optimizer=False,
        checkpoint__save_interval=100,
    )
    for status, message in run_ranks(train_with, 4, config, f"step_end:3@{rank}=flip"):
        assert status == REPLICAS_DIFFER
        assert message.startswith("iteration 4: weights that must be equal on all replicas differ:")
        assert f"of rank {rank};" in message
    assert not list_steps(tmp_path / "run")  # spoilt weights are never saved


def test_no_save_evades_the_comparison_of_replicas(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        optimizer__use_distributed_optimizer=False,
        checkpoint__save_interval=100,
    )
    outcomes = run_ranks(train_with, 3, config, "step_end:3@1=flip,after_update:3@0=term")
    assert {status for status, _ in outcomes} == {REPLICAS_DIFFER}
    assert not list_steps(tmp_path / "run")


def test_healthy_replicas_raise_no_alarm(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", faults__replica_check_interval=1)
    assert run_ranks(train_with, 2, config, "") == [(0, "")] * 2


# --- what is written down ---


def status_of(run: Path) -> tuple[str, int, int]:
    content = orjson.loads((run / "status.json").read_bytes())
    return content["state"], content["exit_status"], content["step"]


def events_of(run: Path) -> list[str]:
    return [event["event"] for event in read_events(run)]


def test_status_says_how_a_run_ended_whichever_way(tmp_path, trajectory_corpus):
    run = tmp_path / "run"
    config = tiny_config(trajectory_corpus, run)
    faults_training.run_job(config, fault="after_save:2=kill")
    assert orjson.loads((run / "status.json").read_bytes())["state"] == "running"
    run_ranks(train_with, 1, config, "")  # finds nothing left to do
    assert status_of(run) == ("done", 0, STEPS)
    run_ranks(train_with, 1, config, "")
    assert events_of(run).count("done") == 1
    nowhere = tiny_config(tmp_path / "nowhere", run)
    assert "no such directory" in training_refusal(nowhere)
    assert status_of(run) == ("refused", 2, STEPS)
    more = change(config, train__num_steps=STEPS + 6)
    assert faults_training.run_job(more, fault="data:2=eio") == [1]
    assert status_of(run) == ("failed", 2, STEPS + 2)
    assert events_of(run)[-3:] == ["refused", "start", "failed"]


def test_a_refused_start_in_a_fresh_directory_leaves_nothing(tmp_path):
    assert "no such directory" in training_refusal(tiny_config(tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_under_another_name_is_not_trusted(tmp_path, trajectory_corpus, capfd):
    run = tmp_path / "run"
    config = tiny_config(trajectory_corpus, run)
    run_ranks(train_with, 1, config, "")
    for name in ("step_00000098", "step_00000099"):
        shutil.copytree(checkpoint_of(run, 3), run / "checkpoints" / name)
    run_ranks(train_with, 1, change(config, train__num_steps=9, checkpoint__keep=2), "")
    assert "step_00000099: skipped: holds step 3 under the name of step 99" in capfd.readouterr().err
    assert find_checkpoint(run) == checkpoint_of(run, 9)
    damaged = [event for event in read_events(run) if event["event"] == "damaged"]
    assert [event["name"][:21] for event in damaged] == ["damaged-step_00000099", "damaged-step_00000098"]


def test_a_checkpoint_of_another_run_is_said_to_be_one(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "long", train__num_steps=9)
    run_ranks(train_with, 1, config, "")
    run_ranks(train_with, 1, change(config, run__directory=str(tmp_path / "run"), train__num_steps=3), "")
    shutil.copytree(checkpoint_of(tmp_path / "long", 9), checkpoint_of(tmp_path / "run", 9))
    run_ranks(train_with, 1, change(config, run__directory=str(tmp_path / "run"), train__num_steps=12), "")
    assert "resumes at step 9, and metrics.jsonl ends at 3" in capfd.readouterr().err
    assert [event.get("lost_steps") for event in read_events(tmp_path / "run") if event["event"] == "start"][-1] == 0


def test_another_optimizer_and_a_newer_program_are_named(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    run_ranks(train_with, 1, config, "")
    message = training_refusal(change(config, optimizer__use_distributed_optimizer=False))
    assert "saved by the distributed optimizer, and optimizer.use_distributed_optimizer now asks" in message
    path = checkpoint_of(tmp_path / "run", STEPS) / "manifest.json"
    path.write_bytes(encode_manifest(orjson.loads(path.read_bytes()) | {"format_version": 99}))
    assert "has format_version=99" in training_refusal(config)
    assert checkpoint_of(tmp_path / "run", STEPS).is_dir()


def test_skipped_steps_of_an_undone_timeline_do_not_count(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__save_interval=4)
    faults_training.run_job(config, fault="gradient:3=nan,step_end:3=kill")
    run_ranks(train_with, 1, config, "gradient:3=nan")
    assert goodput_table(tmp_path / "run")["skipped_steps"] == 1


# --- signals ---------------------------------------------------------------------------------------------------------

PHASES = {
    "before_the_first_step": ("start=term", 0),
    "while_data_is_awaited": ("data:2=usr1", 3),
    "in_the_middle_of_a_step": ("gradient:3=term", 3),
    "at_the_end_of_a_step": ("after_update:4=usr1", 4),
    "during_evaluation": ("evaluation:1=term", 3),
    "while_saving": ("after_shard:1=term", 3),
}


@pytest.mark.parametrize("name", PHASES)
def test_a_signal_in_any_phase_saves_stops_with_its_own_status_and_resumes_exactly(
    name, tmp_path, trajectory_corpus, ranking_corpus
):
    from megatron_polar.config.schema import DatasetSource

    fault, step = PHASES[name]
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "stopped",
        data__validation=(DatasetSource(str(ranking_corpus)),),
        data__max_tokens_per_micro_batch=4000,
        model__hidden_dropout=0.1,
    )
    ((status, message),) = run_ranks(train_with, 1, config, fault)
    assert status == STOPPED
    assert f"after step {step} of {STEPS}" in message
    assert "start the same command again" in message
    if step:
        assert find_checkpoint(tmp_path / "stopped") == checkpoint_of(tmp_path / "stopped", step)
    recorded = orjson.loads((tmp_path / "stopped" / "status.json").read_bytes())
    assert (recorded["state"], recorded["exit_status"], recorded["step"]) == ("stopped", STOPPED, step)
    run_ranks(train_with, 1, config, "")
    run_ranks(train_with, 1, change(config, run__directory=str(tmp_path / "whole")), "")
    one, other = (shards(checkpoint_of(tmp_path / run, STEPS)) for run in ("stopped", "whole"))
    assert one == other
    curves = [
        [(row["iteration"], row["rm/loss"]) for row in metric_rows(tmp_path / run)] for run in ("stopped", "whole")
    ]
    assert curves[0] == curves[1]


def test_a_signal_while_the_run_is_built_ends_it_at_once(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    ((status, message),) = run_ranks(signal_while_building, 1, config)
    assert status == STOPPED
    assert "before the run was built" in message
    assert not (tmp_path / "run").exists()


def signal_while_building(config) -> tuple[int, str]:
    from megatron_polar.train import run

    def build_run(config, device, topology):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heard")

    run.build_run = build_run
    return train_with(config)


def test_a_rank_that_fails_while_the_run_is_built_ends_the_others(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", faults__stall_timeout_seconds=3.0)
    assert faults_training.run_job(config, world_size=2, body=fail_while_building) == [STALLED, 1]
    assert "ended with an error: no memory" in faults_training.log_of(config).read_text()


def fail_while_building(config) -> None:
    from megatron_polar.train import run

    def build_model(*arguments, topology, **options):
        if topology.rank == 1:
            raise MemoryError("no memory")
        torch.distributed.barrier()

    run.build_run.__globals__["build_model"] = build_model
    run.train(config)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    outcomes = run_ranks(train_with, 2, config, "after_update:2@1=usr1")
    assert {status for status, _ in outcomes} == {STOPPED}
    assert len({message for _, message in outcomes}) == 1
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", 2)


def test_loader_workers_leave_signals_to_their_rank(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", data__num_workers=2, train__num_steps=30)
    ((status, _),) = run_ranks(signal_the_whole_family, 1, config)
    assert status == STOPPED


def signal_the_whole_family(config) -> tuple[int, str]:
    import psutil

    def point(name: str) -> None:
        if name == "after_update":
            for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
                os.kill(process.pid, signal.SIGTERM)

    faults.point = point
    return train_with(config)


def test_what_a_killed_job_leaves_may_keep_the_lock_for_a_moment(tmp_path, trajectory_corpus):
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen(["flock", str(tmp_path / "run" / "lock"), "sleep", "1.5"])
    time.sleep(0.3)
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=1)
    assert run_ranks(train_with, 2, config, "") == [(0, "")] * 2
    holder.wait()


def test_a_second_job_in_the_same_directory_is_refused(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=1000, logging__interval=1000)
    first = faults_training.start_job(config)
    while not (tmp_path / "run" / "status.json").exists():
        time.sleep(0.02)
    message = training_refusal(config)
    first[0].kill()
    first[0].join()
    assert f"{tmp_path / 'run'}: a job is running in it (host" in message
    assert f"process {first[0].pid}" in message
    # The lock went with its holder.
    assert run_ranks(train_with, 1, change(config, train__num_steps=2), "")[0] == (0, "")


def test_a_job_that_lives_on_beside_its_successor_is_fenced(tmp_path, trajectory_corpus, monkeypatch):
    """As on a node that was cut off: it writes nothing more, and ends at its next save."""
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=4000, checkpoint__save_interval=20)
    (first,) = faults_training.start_job(config)
    lock, latest = tmp_path / "run" / "lock", tmp_path / "run" / "checkpoints" / "latest"
    while not latest.exists():
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    monkeypatch.setenv(TAKE_OVER, lock.read_text().strip())
    stop = int(latest.read_text().strip()[-8:]) + 3
    successor = change(config, train__num_steps=stop)
    assert run_ranks(train_with, 1, successor, "")[0] == (0, "")
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == FENCED
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == kept
    # Whoever names another holder than the one who is there takes nothing over.
    holder = subprocess.Popen(["flock", str(lock), "sleep", "30"])
    time.sleep(0.3)
    monkeypatch.setattr("megatron_polar.train.lock._SECONDS_FOR_REMAINS", 0.5)
    assert "a job is running in it" in training_refusal(successor)
    holder.kill()
    holder.wait()


def test_a_file_system_without_locks_is_a_warning(tmp_path, trajectory_corpus, capfd):
    assert run_ranks(train_without_locks, 1, tiny_config(trajectory_corpus, tmp_path / "run")) == [(0, "")]
    assert "cannot be locked here (Function not implemented)" in capfd.readouterr().err


def train_without_locks(config) -> tuple[int, str]:
    import errno
    import fcntl

    def flock(handle, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = flock
    return train_with(config)


def test_a_run_whose_launcher_has_died_saves_and_ends(tmp_path, trajectory_corpus, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    ((status, message),) = run_ranks(lose_the_launcher, 1, config)
    assert status == STOPPED
    assert message.startswith("stopped by SIGHUP after step 2 of")
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", 2)


def lose_the_launcher(config) -> tuple[int, str]:
    passed = [0]

    def point(name: str) -> None:
        passed[0] += name == "after_update"
        if passed[0] == 2:
            os.getppid = lambda: 1

    faults.point = point
    return train_with(config)


def test_ctrl_c_says_what_is_saved_and_leaves_a_status(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__save_interval=2)
    (said,) = run_ranks(interrupt, 1, config)
    assert said == "interrupted after step 2; step 2 is saved: start the same command again to go on from there"
    recorded = orjson.loads((tmp_path / "run" / "status.json").read_bytes())
    assert (recorded["state"], recorded["exit_status"], recorded["step"]) == ("interrupted", 130, 2)


def interrupt(config) -> str:
    passed = [0]

    def point(name: str) -> None:
        passed[0] += name == "before_update"
        if passed[0] == 3:
            raise KeyboardInterrupt

    faults.point = point
    try:
        train(config)
    except KeyboardInterrupt as interrupted:
        return str(interrupted)
    return "finished"


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "background"),
    [(p, False) for p in ("before_shard", "in_shard", "before_manifest", "before_publish")]
    + [("before_manifest", True), ("before_publish", True)],
)
def test_a_save_that_fails_is_a_warning_with_errno_and_path(point, background, tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__async_save=background)
    assert run_ranks(train_with, 1, config, f"{point}:1=enospc")[0] == (0, "")
    shown = capfd.readouterr().err
    assert "the checkpoint of step 3 could not be written: rank 0: [Errno 28] No space left on device" in shown
    assert "training goes on" in shown
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", STEPS)
    events = [event for event in read_events(tmp_path / "run") if event["event"] == "save"]
    assert [bool(event["problem"]) for event in events] == [True, False]


def test_latest_is_a_hint_whose_failure_fails_no_save(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    assert run_ranks(train_with, 1, config, "before_latest:2=enospc")[0] == (0, "")
    assert "latest: cannot be moved to step_00000006 (No space left on device)" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000003\n"
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", STEPS)


def test_a_stop_whose_save_fails_says_so_by_its_status(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    ((status, message),) = run_ranks(
        train_with, 1, config, "data:2@0=term,before_publish:1=enospc,before_publish:2=enospc"
    )
    assert status == CANNOT_SAVE
    assert "after step 3 of 6; no step is saved" in message


def test_room_taken_by_killed_saves_is_freed_before_the_next(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    faults_training.run_job(config, fault="before_publish:2=kill")
    assert len(list((tmp_path / "run" / "checkpoints").glob(".saving-*"))) == 1
    run_ranks(train_with, 1, config, "after_update:1=term")
    assert not list((tmp_path / "run" / "checkpoints").glob(".saving-*"))


def test_a_checkpoint_that_cannot_be_read_now_is_skipped_and_kept(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    run_ranks(train_with, 1, config, "")
    again = change(config, checkpoint__keep=1, checkpoint__save_interval=2, train__num_steps=5)
    assert run_ranks(train_while_the_newest_is_unreadable, 1, again) == [(0, "")]
    assert "step_00000006: skipped: cannot be read now" in capfd.readouterr().err
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*step_*"))
    assert left == ["step_00000005", "step_00000006"]  # what was just written is kept, however little is to be kept


def train_while_the_newest_is_unreadable(config) -> tuple[int, str]:
    from megatron_polar.train import checkpoint_files

    original = checkpoint_files.check_hash

    def check_hash(directory, name, entry, **options):
        if directory.name == "step_00000006":
            raise OSError(5, "Input/output error", str(directory / name))
        original(directory, name, entry, **options)

    checkpoint_files.check_hash = check_hash
    return train_with(config)


def test_resuming_in_another_precision_is_refused(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    run_ranks(train_with, 1, config, "after_update:2=term")
    message = training_refusal(change(config, train__precision="bf16"))
    assert "was trained with train.precision=fp32, now bf16" in message
    recorded = orjson.loads((tmp_path / "run" / "status.json").read_bytes())
    assert (recorded["state"], recorded["exit_status"]) == ("refused", 2)


def test_a_background_writer_works_beside_many_openmp_threads(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__async_save=True, model__hidden_size=256)
    assert run_ranks(train_on_two_threads, 1, config) == [(0, "")]
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", STEPS)


def train_on_two_threads(config) -> tuple[int, str]:
    torch.set_num_threads(2)
    return train_with(config)


@pytest.mark.parametrize("point", ["before_shard", "in_shard"])
def test_a_writer_in_the_background_reports_errno_and_path(point, tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__async_save=True)
    assert run_ranks(train_with, 1, config, f"{point}:1=enospc")[0] == (0, "")
    assert "could not be written: rank 0: [Errno 28] No space left on device" in capfd.readouterr().err
    assert not list_steps(tmp_path / "run")  # each save forks a writer, and each inherits the plan


def test_a_failed_save_on_one_rank_fails_it_on_all(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    assert run_ranks(train_with, 2, config, "in_shard:1@1=eio") == [(0, "")] * 2
    assert "step 3 could not be written: rank 1: [Errno 5] Input/output error" in capfd.readouterr().err
    assert [path.name for path in list_steps(tmp_path / "run")] == ["step_00000006"]


def disk_full_for_ever(config) -> tuple[int, str]:
    def point(name: str) -> None:
        if name == "before_manifest":
            raise OSError(28, "No space left on device", name)

    faults.point = point
    return train_with(config)


def test_too_many_failed_saves_in_a_row_stop_the_run(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus, tmp_path / "run", checkpoint__save_interval=1, checkpoint__max_failed_saves=2
    )
    ((status, message),) = run_ranks(disk_full_for_ever, 1, config)
    assert status == CANNOT_SAVE
    assert "3 saves in a row failed" in message
    assert "checkpoint.max_failed_saves=2" in message


def test_a_killed_writer_in_the_background_is_a_failed_save(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__async_save=True)
    assert run_ranks(train_with, 1, config, "in_shard:1=kill")[0] == (0, "")
    assert "the writing process died" in capfd.readouterr().err
    # The plan is inherited by every forked writer, so the second save dies as well; nothing incomplete is published.
    assert not list_steps(tmp_path / "run")


def test_keep_every_spares_its_multiples(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        checkpoint__save_interval=1,
        checkpoint__keep=1,
        checkpoint__keep_every=2,
    )
    run_ranks(train_with, 1, config, "")
    assert [path.name[-1] for path in list_steps(tmp_path / "run")] == ["6", "4", "2"]


def test_saving_in_the_background_writes_the_same_bytes(tmp_path, trajectory_corpus):
    hashes = []
    for background in (False, True):
        config = tiny_config(
            trajectory_corpus,
            tmp_path / str(background),
            checkpoint__async_save=background,
            checkpoint__save_interval=2,
            model__hidden_dropout=0.1,
        )
        run_ranks(train_with, 2, config, "")
        steps = list_steps(tmp_path / str(background))
        assert [verify_checkpoint(path) for path in steps] == [None] * 3
        hashes.append([shards(path) for path in steps])
    assert hashes[0] == hashes[1]


# --- one order of sums -----------------------------------------------------------------------------------------------


def test_canonical_reduction_is_bitwise_equal_over_data_parallel_sizes_and_a_resume(tmp_path, trajectory_corpus):
    states, losses = [], []
    for world_size in (1, 2, 4):
        config = tiny_config(
            trajectory_corpus,
            tmp_path / str(world_size),
            train__canonical_reduction=True,
            optimizer__use_distributed_optimizer=False,
            optimizer__lr=1e-2,
            train__global_batch_size=20,
        )
        if world_size == 4:  # the first half on two ranks
            run_ranks(train_with, 2, config, "after_update:3=term")
        run_ranks(train_with, world_size, config, "")
        states.append(saved_state(checkpoint_of(tmp_path / str(world_size), STEPS)))
        losses.append([row["rm/loss"] for row in metric_rows(tmp_path / str(world_size))])
    for other in states[1:]:
        assert all(np.array_equal(states[0][name], other[name]) for name in states[0])
    assert losses[0] == losses[1] == losses[2]


def test_the_usual_reduction_is_not_bitwise_equal(tmp_path, trajectory_corpus):
    """What canonical_reduction is for: without it the last bits depend on the number of ranks."""
    states = []
    for world_size in (1, 2):
        config = tiny_config(
            trajectory_corpus,
            tmp_path / str(world_size),
            optimizer__use_distributed_optimizer=False,
            optimizer__lr=1e-2,
            train__global_batch_size=20,
        )
        run_ranks(train_with, world_size, config, "")
        states.append(saved_state(checkpoint_of(tmp_path / str(world_size), STEPS)))
    assert any(not np.array_equal(states[0][name], states[1][name]) for name in states[0])
