"""Ranks that are stopped, killed, hung or slowed: how soon their job ends, whom it names, and what it leaves behind.

Each job runs under a supervisor, a forked process that the kernel hands every orphan of the job to (a subreaper). So
nothing that outlives its rank is missed: loader workers and checkpoint writers included. The supervisor plays the worst
launcher: it ends nobody, and waits until the job has ended by itself.
"""

import ctypes
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import conftest
import orjson
import psutil
import torch
import torch.distributed as dist
from ranks import become_rank, free_port
from tiny_runs import tiny_config

from megatron_polar import faults
from megatron_polar.config.schema import RunConfig
from megatron_polar.errors import STALLED, USER_ERROR, RunStopped, UserError
from megatron_polar.train import run as run_module
from megatron_polar.train.journal import read_events
from megatron_polar.train.watchdog import Watchdog

_FORK = multiprocessing.get_context("fork")
_PR_SET_CHILD_SUBREAPER = 36
TIMEOUT_SECONDS = 3.0


# --- One job ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `seconds`: from the fault until its last process had ended (None: no fault happened, or it
    never ended); `named`: the ranks that its verdicts name; `orphans`: processes left 2 s after all ranks had ended."""

    seconds: float | None
    exit_codes: list[int | None]
    named: list[int]
    orphans: int
    output: list[str] = field(repr=False)
    """What each rank wrote to stderr."""

    @property
    def verdicts(self) -> list[str]:
        """The lines that say why the job ended."""
        return [line for text in self.output for line in text.splitlines() if "ends the job: " in line]


def run_job(
    body: Callable, world_size: int, *arguments, fault: str = "", orphan_seconds: float = 2.0, patience: float = 60.0
) -> Outcome:
    """Call `body(*arguments)` on every rank of a job with a planned fault, and wait `patience` seconds for its end."""
    with tempfile.TemporaryDirectory(prefix="polar-job-") as name:
        directory = Path(name)
        supervisor = _FORK.Process(
            target=_supervise,
            args=(directory, body, arguments, world_size, free_port(), fault),
            kwargs={"orphan_seconds": orphan_seconds, "patience": patience},
        )
        supervisor.start()
        supervisor.join()
        found = orjson.loads((directory / "outcome.json").read_bytes())
        output = [(directory / f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
    named = sorted({rank for text in output for rank in _named_in(text)})
    return Outcome(**found, named=named, output=output)


def _named_in(text: str) -> set[int]:
    """The ranks that verdicts name, which stand before their host and process; a rank that says `rank 1 ends the job`
    names itself only as the messenger."""
    lines = [line.partition("ends the job: ")[2] for line in text.splitlines()]
    return {int(rank) for line in lines for rank in re.findall(r"rank (\d+) \(", line)}


def _supervise(
    directory: Path, body, arguments, world_size: int, port: int, fault: str, *, orphan_seconds: float, patience: float
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    logs = [directory / f"{rank}.log" for rank in range(world_size)]
    ranks = []
    for rank, log in enumerate(logs):
        log.touch()
        ranks.append(_FORK.Process(target=_rank, args=(log, body, arguments, rank, world_size, port, fault)))
        ranks[-1].start()
    started = time.monotonic()
    fault_at = ended_at = None
    while time.monotonic() - started < patience:
        if fault_at is None and any(b"POLAR_FAULT" in log.read_bytes() for log in logs):
            fault_at = time.monotonic()
        if not any(rank.is_alive() for rank in ranks) and not _living_descendants():
            ended_at = time.monotonic()
            break
        if not any(rank.is_alive() for rank in ranks):
            ended_at = ended_at or time.monotonic()
            if time.monotonic() - ended_at > orphan_seconds:
                break
        time.sleep(0.01)
    exit_codes = [rank.exitcode for rank in ranks]
    if ended_at is not None:
        time.sleep(max(0.0, ended_at + orphan_seconds - time.monotonic()))
    left = _living_descendants()
    for process in left:
        process.kill()
    seconds = ended_at - fault_at if ended_at is not None and fault_at is not None else None
    found = {"seconds": seconds, "exit_codes": exit_codes, "orphans": len(left)}
    (directory / "outcome.json").write_bytes(orjson.dumps(found))
    os._exit(0)


def _living_descendants() -> list[psutil.Process]:
    living = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
        except psutil.NoSuchProcess:
            continue
    return living


def _rank(log: Path, body, arguments, rank: int, world_size: int, port: int, fault: str) -> None:
    """One rank; leaves as an interpreter does, which waits for helper processes that are not daemons."""
    become_rank(rank, world_size, port)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faults.plan(fault)
    try:
        body(*arguments)
    except RunStopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


# --- Ways to hang that no fault point knows --------------------------------------------------------------------------


def _at(name: str, nth: int, rank: int, act: Callable[[], None]) -> None:
    """Plan `act` for the nth passing of a fault point on one rank; forked ranks only."""
    passed = 0
    usual = faults.point

    def point(passing: str) -> str | None:
        nonlocal passed
        if passing == name and int(os.environ["RANK"]) == rank:
            passed += 1
            if passed == nth:
                print(f"POLAR_FAULT: {act.__name__} at {name}, passing {nth}", file=sys.stderr, flush=True)
                act()
        return usual(passing)

    faults.point = point


def keep_the_lock() -> None:
    """Work in C without ever letting go of Python's lock: a regular expression that takes years."""
    re.match(r"(a+)+$", 60 * "a" + "b")


def stop_the_workers() -> None:
    """Stop this rank's loader workers, as storage that does not answer would."""
    for child in psutil.Process().children(recursive=True):
        os.kill(child.pid, signal.SIGSTOP)


def train_keeping_the_lock(config: RunConfig) -> None:
    _at("gradient", 3, 1, keep_the_lock)
    run_module.train(config)


def train_with_stopped_workers(config: RunConfig) -> None:
    _at("data", 2, 1, stop_the_workers)
    run_module.train(config)


# --- A job without a model -------------------------------------------------------------------------------------------


def loop(directory: Path | None, timeout: float, *, steps: int = 100_000, before_end: Callable | None = None) -> None:
    """Ranks that do nothing but sum, with the phases, the fault points and the ending of a training run."""
    store, rank, world_size = join()
    with Watchdog(store, rank=rank, world_size=world_size, timeout_seconds=timeout, directory=directory) as watchdog:
        try:
            for step in range(1, steps + 1):
                watchdog.enter("data", step)
                faults.point("data")
                watchdog.enter("step", step)
                faults.point("gradient")
                dist.all_reduce(torch.ones(1))
                time.sleep(0.01)
            if before_end is not None:
                before_end(watchdog)
        except RuntimeError as error:
            culprit = watchdog.explain(error)
            if culprit is None:
                raise
            raise RunStopped(culprit, status=STALLED) from error


def join() -> tuple[dist.Store, int, int]:
    """Meet the other ranks over gloo; returns the store, this rank and how many there are."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    return store, rank, world_size


# --- Hung and dead ranks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A job of `world_size` ranks, of which `culprit` comes to grief by `fault`; `changes` are tiny_config's."""

    world_size: int
    culprit: int
    fault: str = ""
    changes: dict = field(default_factory=dict)
    body: Callable = run_module.train


CASES = {
    "stopped in a step": Case(4, 2, "gradient:3@2=stop"),
    "killed in a step": Case(4, 2, "gradient:3@2=kill"),
    "endless loop in the data": Case(2, 1, "data:2@1=hang"),
    "endless loop in a save": Case(2, 1, "before_shard:1@1=hang"),
    "endless loop in a step": Case(2, 1, "gradient:3@1=hang"),
    "rank 0 stopped, which hosts the store": Case(4, 0, "gradient:3@0=stop"),
    "rank 0 killed, which hosts the store": Case(2, 0, "gradient:3@0=kill"),
    "killed while its background writer writes": Case(
        2, 1, "in_shard:1@1=kill_parent", {"checkpoint__async_save": True}
    ),
    "endless loop in a background writer": Case(
        2, 1, "in_shard:1@1=hang", {"checkpoint__async_save": True, "checkpoint__save_interval": 1}
    ),
    "killed with loader workers": Case(2, 1, "gradient:3@1=kill", {"data__num_workers": 2}),
    "stopped with loader workers": Case(2, 1, "gradient:3@1=stop", {"data__num_workers": 2}),
    "loader workers stopped": Case(
        2, 1, body=train_with_stopped_workers, changes={"data__num_workers": 1, "data__prefetch_factor": 1}
    ),
    "Python's lock kept": Case(2, 1, body=train_keeping_the_lock),
}


def run_case(name: str, corpus: Path, workdir: Path, *, orphan_seconds: float = 2.0) -> dict:
    """Figures of one case, and whether it ended as promised: the right rank named, all others with STALLED, no process
    left."""
    case = CASES[name]
    config = tiny_config(
        corpus,
        Path(workdir) / name.replace(" ", "_").replace("'", ""),
        train__num_steps=40,
        faults__stall_timeout_seconds=TIMEOUT_SECONDS,
        **case.changes,
    )
    outcome = run_job(case.body, case.world_size, config, fault=case.fault, orphan_seconds=orphan_seconds)
    others = [code for rank, code in enumerate(outcome.exit_codes) if rank != case.culprit]
    return {
        "seconds": outcome.seconds,
        "exit_codes": outcome.exit_codes,
        "named": outcome.named == [case.culprit],
        "statuses": set(others) == {STALLED} and outcome.exit_codes[case.culprit] in (STALLED, -signal.SIGKILL),
        "orphans": outcome.orphans,
        "verdicts": outcome.verdicts,
        "output": outcome.output,
    }


def all_cases(workdir: Path) -> dict:
    """Every case; how many named the right rank and ended with the right statuses, how many within time-out + 5 s."""
    corpus = make_corpus(Path(workdir))
    found = {name: run_case(name, corpus, workdir) for name in CASES}
    seconds = {name: figures["seconds"] for name, figures in found.items()}
    limit = TIMEOUT_SECONDS + 5
    return {
        "cases": len(found),
        "missed": {n: f["verdicts"] for n, f in found.items() if not (f["named"] and f["statuses"])},
        "named": sum(figures["named"] and figures["statuses"] for figures in found.values()),
        "within_timeout_plus_5": sum(value is not None and value <= limit for value in seconds.values()),
        "orphans": sum(figures["orphans"] for figures in found.values()),
        "worst_seconds": max((value if value is not None else math.inf) for value in seconds.values()),
        "seconds": {name: value and round(value, 2) for name, value in seconds.items()},
    }


def make_corpus(workdir: Path) -> Path:
    """A small preprocessed dataset, made once in `workdir`."""
    from megatron_polar.data.preprocess import preprocess

    output = workdir / "dataset"
    if not output.exists():
        source = conftest.write_trajectories(workdir / "input.jsonl", num_prompts=80, seed=1)
        preprocess([source], output=output, tokenizer_path=conftest.make_tokenizer(workdir))
    return output


# --- Slow ranks ------------------------------------------------------------------------------------------------------


def straggler_figures(workdir: Path, *, undisturbed_steps: int = 200, world_sizes: tuple[int, ...] = (2, 4)) -> dict:
    """Runs of 20 steps with one rank slowed twofold, and undisturbed ones; alarms count as false where they name
    another rank than the slowed one."""
    corpus = make_corpus(Path(workdir))
    found, false_alarms = [], 0
    for world_size in world_sizes:
        slow_rank = world_size - 1
        raised = alarms(corpus, workdir, world_size, num_steps=20, slow_rank=slow_rank)
        found += [alarm for alarm in raised if alarm["rank"] == slow_rank][:1]
        false_alarms += sum(alarm["rank"] != slow_rank for alarm in raised)
        if undisturbed_steps:
            false_alarms += len(alarms(corpus, workdir, world_size, num_steps=undisturbed_steps, slow_rank=None))
    return {
        "slowed": len(world_sizes),
        "flagged": len(found),
        "flagged_at_step": [alarm["step"] for alarm in found],
        "ratios": [round(alarm["ratio"], 2) for alarm in found],
        "undisturbed_steps": undisturbed_steps * len(world_sizes),
        "false_alarms": false_alarms,
    }


def alarms(
    corpus: Path, workdir: Path, world_size: int, *, num_steps: int, slow_rank: int | None, **changes
) -> list[dict]:
    """Events of stragglers in a run with one rank slowed twofold, or none; `changes` are tiny_config's."""
    directory = Path(tempfile.mkdtemp(dir=workdir))
    config = tiny_config(
        corpus,
        directory / "run",
        train__num_steps=num_steps,
        train__global_batch_size=24,
        checkpoint__save_interval=10_000,
        evaluation__interval=10_000,
        logging__interval=10,
        **changes,
    )
    outcome = run_job(_train_slowly, world_size, config, slow_rank, orphan_seconds=0.0, patience=600.0)
    assert outcome.exit_codes == [0] * world_size, outcome.output
    return [event for event in read_events(directory / "run") if event["event"] == "straggler"]


def _train_slowly(config: RunConfig, slow_rank: int | None) -> None:
    """Train; the slow rank works twice as long on each step before its gradients are ready."""
    if int(os.environ["RANK"]) == slow_rank:
        started = time.monotonic()

        def point(name: str) -> None:
            nonlocal started
            if name == "gradient":
                time.sleep(time.monotonic() - started)
            elif name == "data":
                started = time.monotonic()

        faults.point = point
    run_module.train(config)
