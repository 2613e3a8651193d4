"""Runs that end before their time: by a signal, a Ctrl-C, their launcher's death, or another job in their directory."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults_ranks
import faults_training
import orjson
import psutil
import pytest
import torch
from faults_training import shards
from ranks import run_ranks
from tiny_runs import STEPS, change, checkpoint_of, metric_rows, tiny_config, train_with, training_refusal

from megatron_polar import faults
from megatron_polar.config.load import dump_config
from megatron_polar.config.schema import CurriculumSection
from megatron_polar.errors import FENCED, STALLED, STOPPED
from megatron_polar.score.report import has_report
from megatron_polar.train.checkpoint_files import find_checkpoint
from megatron_polar.train.lock import TAKE_OVER
from megatron_polar.train.run import train

REPOSITORY = Path(__file__).resolve().parents[1]

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


def test_a_save_that_fails_for_a_moment_as_the_run_is_stopped_is_tried_again(tmp_path, trajectory_corpus, capfd):
    """Else a job at its time limit would end for good, with CANNOT_SAVE."""
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    ((status, message),) = run_ranks(train_with, 1, config, "after_update:4=usr1,in_shard:2=eio")
    assert status == STOPPED
    assert "step 4 is saved" in message
    assert "step 4 could not be written: rank 0: [Errno 5]" in capfd.readouterr().err
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", 4)


def test_a_signal_while_the_run_is_built_ends_it_at_once(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    ((status, message),) = run_ranks(signal_while_building, 1, config)
    assert status == STOPPED
    assert "before the run was built" in message
    assert not (tmp_path / "run").exists()


def test_a_signal_after_the_last_save_does_not_make_a_failure_of_a_run_that_is_done(tmp_path, trajectory_corpus):
    """It comes while the report is drawn, and again while the interpreter ends."""
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(dump_config(config))
    program = """
import atexit, os, signal, sys
from megatron_polar import cli
from megatron_polar.score import report
draw = report.training_report

def interrupted(directory):
    os.kill(os.getpid(), signal.SIGTERM)
    return draw(directory)

report.training_report = interrupted
atexit.register(os.kill, os.getpid(), signal.SIGUSR1)
sys.exit(cli.main(["train", sys.argv[1]]))
"""
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_report_of_a_run_that_is_done_is_kept_and_one_from_before_the_last_save_is_not(tmp_path):
    """It may have evaluations in it, which `train` knows nothing of."""
    saved, report = tmp_path / "checkpoints/step_00000004", tmp_path / "report.html"
    saved.mkdir(parents=True)
    assert not has_report(tmp_path)
    report.touch()
    assert has_report(tmp_path)
    os.utime(report, (time.time() - 60,) * 2)
    assert not has_report(tmp_path)


def signal_while_building(config) -> tuple[int, str]:
    from megatron_polar.train import run

    def build_run(config, device, topology):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heard")

    run.build_run = build_run
    return train_with(config)


def test_a_signal_while_one_rank_still_builds_stops_all_of_them(tmp_path, trajectory_corpus):
    """Others wait for it already; for them it is no mistake of that rank."""
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    outcomes = run_ranks(signal_first_rank_in_model, 2, config)
    assert [status for status, _ in outcomes] == [STOPPED] * 2
    assert all("stopped by SIGUSR1 before the run was built" in message for _, message in outcomes)


def signal_first_rank_in_model(config) -> tuple[int, str]:
    from megatron_polar.train import build

    make = build.build_model

    def build_model(config, *, topology, **options):
        if topology.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return make(config, topology=topology, **options)

    build.build_model = build_model
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


def test_workers_that_wait_for_a_table_of_difficulties_do_not_outlive_a_stopped_run(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        data__num_workers=2,
        data__prefetch_factor=4,
        data__contrast="by_difficulty",
        data__curriculum=CurriculumSection(interval=2),  # eight steps ahead: two periods further than what is known
        train__num_steps=30,
        checkpoint__save_interval=30,
        evaluation__interval=30,
    )
    outcome = faults_ranks.run_job(train, 1, config, fault="data:2=term", orphan_seconds=0.5, patience=30.0)
    assert outcome.exit_codes == [STOPPED], outcome.output
    assert outcome.orphans == 0
    assert outcome.seconds < 10  # torch waits 5 s for each worker that does not end by itself
    assert "Traceback" not in outcome.output[0]


def signal_the_whole_family(config) -> tuple[int, str]:
    import psutil

    def point(name: str) -> None:
        if name == "after_update":
            for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
                os.kill(process.pid, signal.SIGTERM)

    faults.point = point
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


def test_ctrl_c_before_the_first_save_promises_no_step(tmp_path, trajectory_corpus):
    (said,) = run_ranks(interrupt, 1, tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__save_interval=6))
    assert said == "interrupted after step 2; no step is saved: start the same command again to start over"


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


# --- one job in a directory ------------------------------------------------------------------------------------------


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
    (first,) = faults_training.start_job(config, fault="before_update:24=stop")
    lock, latest = tmp_path / "run" / "lock", tmp_path / "run" / "checkpoints" / "latest"
    while psutil.Process(first.pid).status() != psutil.STATUS_STOPPED:
        assert first.is_alive()
        time.sleep(0.01)
    monkeypatch.setenv(TAKE_OVER, lock.read_text().strip())
    stop = int(latest.read_text().strip()[-8:]) + 3
    successor = change(config, train__num_steps=stop)
    assert run_ranks(train_with, 1, successor, "")[0] == (0, "")
    kept = files_of(tmp_path / "run")
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == FENCED
    assert files_of(tmp_path / "run") == kept
    # Whoever names another holder than the one who is there takes nothing over.
    holder = subprocess.Popen(["flock", str(lock), "sleep", "30"])
    time.sleep(0.3)
    monkeypatch.setattr("megatron_polar.train.lock._SECONDS_FOR_REMAINS", 0.5)
    assert "a job is running in it" in training_refusal(successor)
    holder.kill()
    holder.wait()


def files_of(directory) -> dict[str, str]:
    """Name and SHA-256 of every file below."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


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
