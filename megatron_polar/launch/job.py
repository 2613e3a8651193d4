"""What a Slurm job asks about its run, before and after the ranks have run: `python -m megatron_polar.launch.job`.

The job script (slurm/common.sh) does what these answers say; here is the reasoning, where it can be tested. No torch.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from megatron_polar.config.load import load_config
from megatron_polar.errors import (
    BAD_STEPS,
    CANNOT_SAVE,
    DONE,
    FAILED,
    FENCED,
    INTERRUPTED,
    MACHINE_DIFFERS,
    NO_PROGRESS,
    STOPPED,
    USER_ERROR,
    UserError,
)

JOBS, BAD_NODES = "jobs.jsonl", "bad_nodes"
_TRIES = 3
"""Starts from the same checkpoint without a newer one after them: a third would be followed by a fourth."""
_MEND_FIRST = {USER_ERROR, BAD_STEPS, CANNOT_SAVE, INTERRUPTED}
"""How a run ends that would end in the same way again, or whose user has ended it."""


@dataclass(frozen=True)
class Decision:
    """What to do now, as the job's exit status: DONE, STOPPED (go on: requeue), or the one to end with; why; and the
    node without which to go on."""

    status: int
    reason: str
    bad_node: str | None = None


def begin(run_directory: Path) -> None:
    """Append a line to `jobs.jsonl`: which job starts ranks, where, and from which step."""
    row = {
        "time": time.time(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "series": _series(),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "saved_step": saved_step(run_directory),
    }
    with (run_directory / JOBS).open("ab") as file:
        file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


def _series() -> str:
    """What belongs together: the restarts of a job, or the jobs of a chain."""
    return os.environ.get("POLAR_CHAIN") or os.environ.get("SLURM_JOB_ID", "")


def saved_step(run_directory: Path) -> int:
    """The newest checkpoint by its name; 0 where there is none."""
    names = [path.name for path in (run_directory / "checkpoints").glob("step_*")]
    return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=0)


def decide(run_directory: Path, *, since: float, logs: Path, asked: str, restart: int, max_restarts: int) -> Decision:
    """What to do after the ranks have ended.

    `since`: when the job began, in seconds since 1970; `logs`: where its tasks have left how they ended; `asked`: the
    signal that the job script has got, if any.
    """
    status = _read_status(run_directory, since=since)
    state, code, reason = status.get("state"), status.get("exit_status"), str(status.get("reason") or "")
    if code is None and state != "done":
        code, reason = _first_exit(logs)
    step, bad_node = saved_step(run_directory), _bad_node(status)
    if state == "done":
        return Decision(DONE, f"step {status.get('step')}")
    if code == FENCED:
        return Decision(FENCED, reason)
    if code in _MEND_FIRST:
        return Decision(code, reason)
    if asked == "TERM":
        return Decision(STOPPED, f"ended by SIGTERM (scancel or preemption); step {step} is saved")
    if _has_stood_still(run_directory, step=step):
        tried = f"{_TRIES} starts in a row have not got beyond the checkpoint of step {step}"
        return Decision(NO_PROGRESS, f"{tried}; the last: {reason}", bad_node)
    if restart >= max_restarts:
        return Decision(NO_PROGRESS, f"restarted {restart} times, as often as POLAR_MAX_RESTARTS allows", bad_node)
    return Decision(STOPPED, f"{reason}; going on from step {step}", bad_node)


def _bad_node(status: dict) -> str | None:
    """The node that the run has found to compute or read otherwise than the others, if it could tell which."""
    node = status.get("machine") if status.get("exit_status") == MACHINE_DIFFERS else None
    return node if isinstance(node, str) and node.split() == [node] else None


def _read_status(run_directory: Path, *, since: float) -> dict:
    """`status.json`, if this job has written it."""
    try:
        status = orjson.loads((run_directory / "status.json").read_bytes())
        is_ours = status["time"] >= since and status["job"] == os.environ.get("SLURM_JOB_ID", "")
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return {}
    return status if is_ours else {}


def _first_exit(logs: Path) -> tuple[int | None, str]:
    """Exit status of the task that failed first, as slurm/task.sh has noted it, and the last line of its log."""
    exits = []
    for path in logs.glob("exit-*"):
        words = path.read_text().split()
        if len(words) == 3:  # else its task was killed as it wrote
            exits.append((float(words[0]), int(words[1]), words[2], path.name.removeprefix("exit-")))
    if not exits:
        return None, "the ranks ended without a word"
    _, code, node, rank = min(exits)
    log = logs / f"rank-{rank}.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return code, f"rank {rank} on {node} ended with status {code}" + (f": {lines[-1]}" if lines else "")


def _has_stood_still(run_directory: Path, *, step: int) -> bool:
    try:
        rows = [orjson.loads(line) for line in (run_directory / JOBS).read_bytes().splitlines()]
        started_from = [row["saved_step"] for row in rows if row["series"] == _series()][-_TRIES:]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return False
    return started_from == [step] * _TRIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one question; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m megatron_polar.launch.job", description=__doc__)
    questions = parser.add_subparsers(required=True, dest="question")
    question = questions.add_parser("run-directory")
    question.add_argument("config", type=Path)
    question.add_argument("overrides", nargs="*")
    question = questions.add_parser("begin")
    question.add_argument("run_directory", type=Path)
    question = questions.add_parser("after")
    question.add_argument("run_directory", type=Path)
    question.add_argument("--since", type=float, required=True)
    question.add_argument("--logs", type=Path, required=True)
    question.add_argument("--asked", default="")
    question.add_argument("--restart", type=int, default=0)
    question.add_argument("--max-restarts", type=int, required=True)
    options = parser.parse_args(arguments)
    try:
        if options.question == "run-directory":
            print(Path(load_config(options.config, options.overrides).run.directory).resolve())
            return DONE
        if options.question == "begin":
            begin(options.run_directory)
            return DONE
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR if isinstance(error, UserError) else FAILED
    asked_for = {name: vars(options)[name] for name in ("since", "logs", "asked", "restart", "max_restarts")}
    decision = decide(options.run_directory, **asked_for)
    if decision.bad_node:
        with (options.run_directory / BAD_NODES).open("a") as file:
            file.write(f"{decision.bad_node}\n")
    print(decision.reason)
    return decision.status


if __name__ == "__main__":
    sys.exit(main())
