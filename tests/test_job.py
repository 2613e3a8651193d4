"""What a Slurm job decides after its ranks have ended (launch/job.py); the scripts themselves are in test_slurm.py."""

import os
import time
from pathlib import Path

import orjson
import pytest

from megatron_polar.errors import (
    BAD_STEPS,
    CANNOT_SAVE,
    DONE,
    FAILED,
    FENCED,
    MACHINE_DIFFERS,
    NO_PROGRESS,
    STALLED,
    STOPPED,
    USER_ERROR,
)
from megatron_polar.launch.job import Decision, begin, decide, main, saved_step


def decide_after(run: Path, *, asked: str = "", restart: int = 0, since: float = 0.0) -> Decision:
    return decide(run, since=since, logs=run / "logs", asked=asked, restart=restart, max_restarts=3)


def write_status(run: Path, *, state: str, code: int | None, reason: str = "why") -> None:
    content = {"state": state, "exit_status": code, "reason": reason, "step": 7, "time": time.time()}
    content["job"] = os.environ.get("SLURM_JOB_ID", "")
    (run / "status.json").write_bytes(orjson.dumps(content))


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("done", DONE, DONE),
        ("stopped", STOPPED, STOPPED),
        ("failed", STALLED, STOPPED),
        ("failed", FAILED, STOPPED),
        ("stopped", MACHINE_DIFFERS, STOPPED),
        ("running", None, STOPPED),
        ("refused", USER_ERROR, USER_ERROR),
        ("stopped", BAD_STEPS, BAD_STEPS),
        ("stopped", CANNOT_SAVE, CANNOT_SAVE),
        ("stopped", FENCED, FENCED),
    ],
)
def test_how_it_ended_decides(state, code, expected, tmp_path):
    write_status(tmp_path, state=state, code=code)
    assert decide_after(tmp_path).status == expected


def write_accusation(run: Path, *, code: int, machine: object) -> None:
    write_status(run, state="stopped", code=code)
    status = orjson.loads((run / "status.json").read_bytes())
    (run / "status.json").write_bytes(orjson.dumps(status | {"machine": machine}))


def test_a_machine_that_is_to_blame_is_left_out_of_the_next_try(tmp_path):
    write_accusation(tmp_path, code=MACHINE_DIFFERS, machine="node7")
    (tmp_path / "bad_nodes").write_text("node3\n")
    arguments = ["after", str(tmp_path), "--since", "0", "--logs", str(tmp_path), "--max-restarts", "3"]
    assert main(arguments) == STOPPED
    assert (tmp_path / "bad_nodes").read_text() == "node3\nnode7\n"


@pytest.mark.parametrize(("code", "machine"), [(STALLED, "node7"), (MACHINE_DIFFERS, None), (MACHINE_DIFFERS, "a b")])
def test_nothing_else_is_left_out(code, machine, tmp_path):
    write_accusation(tmp_path, code=code, machine=machine)
    assert decide_after(tmp_path).bad_node is None


def test_a_status_of_an_earlier_job_says_nothing(tmp_path):
    write_status(tmp_path, state="done", code=DONE)
    assert decide_after(tmp_path, since=time.time() + 1) == Decision(
        STOPPED, "the ranks ended without a word; going on from step 0"
    )


def test_the_first_task_that_failed_gives_status_and_reason(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "exit-0").write_text("20.5 143 node1\n")
    (logs / "exit-11").write_text("20.25 2 node2\n")
    (logs / "rank-11.log").write_text("starting\nerror: nowhere: no checkpoint here\n\n")
    assert decide_after(tmp_path) == Decision(
        USER_ERROR, "rank 11 on node2 ended with status 2: error: nowhere: no checkpoint here"
    )


def test_three_starts_from_one_checkpoint_are_enough(tmp_path, monkeypatch):
    write_status(tmp_path, state="failed", code=STALLED, reason="rank 3 hangs")
    for restart in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert decide_after(tmp_path).status == STOPPED
        begin(tmp_path)
    decision = decide_after(tmp_path)
    assert decision.status == NO_PROGRESS
    assert decision.reason.endswith("the checkpoint of step 0; the last: rank 3 hangs")
    (tmp_path / "checkpoints" / "step_00000040").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".saving-step_00000060-1").mkdir()
    assert saved_step(tmp_path) == 40
    assert decide_after(tmp_path).status == STOPPED


def test_restarts_are_counted_and_scancel_is_obeyed(tmp_path):
    write_status(tmp_path, state="stopped", code=STOPPED)
    assert decide_after(tmp_path, restart=2).status == STOPPED
    assert decide_after(tmp_path, restart=3).status == NO_PROGRESS
    assert "scancel" in decide_after(tmp_path, asked="TERM").reason


def test_the_run_directory_is_told_without_torch(tmp_path, capsys):
    config = Path(__file__).parent.parent / "examples" / "pretrain_7b.yaml"
    assert main(["run-directory", str(config), f"run.directory={tmp_path}/x"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/x\n"
    assert main(["run-directory", "nowhere.yaml"]) == USER_ERROR
    assert "nowhere.yaml" in capsys.readouterr().err
