"""Hung, dead and slow ranks are named, their job ends, and nothing is left of it; and nobody else is accused."""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import faults_ranks
import orjson
import pytest
import torch
import torch.distributed as dist
from faults_ranks import join, loop, run_job
from ranks import free_port, rank_environment, run_ranks

from megatron_polar import faults
from megatron_polar.config.schema import ParallelSection
from megatron_polar.errors import STALLED, STOPPED, USER_ERROR, RunStopped, UserError
from megatron_polar.parallel.device import select_device
from megatron_polar.parallel.readback import read_back
from megatron_polar.parallel.topology import initialize
from megatron_polar.train import watchdog as watchdog_module
from megatron_polar.train.stragglers import SlowRank, SlowReplica, Stragglers, by_replica, find_slow
from megatron_polar.train.verdicts import Beat, find_hung, kill_all
from megatron_polar.train.watchdog import Process, Watchdog

TIMEOUT = 1.5
LIMIT = TIMEOUT + 5  # the promise
CONTEXT = multiprocessing.get_context("fork")


# --- Processes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def child(work=lambda: time.sleep(60)):
    """A forked process that is waited for at the end, not before."""
    answers, questions = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(questions, repr(dataclasses.astuple(Process.of_this(3))).encode())
            work()
        finally:
            os._exit(0)
    yield Process(*eval(os.read(answers, 1000)))
    for handle in (answers, questions):
        os.close(handle)
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def wait_for(is_so, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_is_gone_when_it_has_ended_waited_for_or_not():
    assert not Process.of_this(0).is_gone
    with child(lambda: None) as process:
        wait_for(lambda: process.state == "Z")
        assert process.is_gone
        os.waitpid(process.pid, 0)
        assert process.is_gone


def test_another_process_with_the_same_number_is_not_the_one_that_is_meant():
    with child() as process:
        earlier = dataclasses.replace(process, started=process.started - 1)
        assert earlier.is_gone
        kill_all([earlier])
        assert not process.is_gone


def test_a_process_of_another_machine_is_neither_seen_nor_signalled():
    with child() as process:
        elsewhere = dataclasses.replace(process, machine="another/1")
        assert not elsewhere.is_gone
        kill_all([elsewhere])
        assert not process.is_gone


def test_stopped_and_busy_processes_are_killed_and_this_one_is_not():
    with child() as stopped, child(lambda: re.match(r"(a+)+$", 60 * "a" + "b")) as busy:
        os.kill(stopped.pid, signal.SIGSTOP)
        wait_for(lambda: stopped.state == "T")
        kill_all([stopped, busy, Process.of_this(0)])
        wait_for(lambda: stopped.is_gone and busy.is_gone)


# --- Whom a job waits for --------------------------------------------------------------------------------------------


def beat(rank: int, *, number: int = 9, phase: str = "step", step: int = 5, still: float = 3.0, **changes) -> Beat:
    return Beat(number, Process(rank, "host", 1, 1, "machine"), phase, step, still=still, **changes)


WAITING = beat(0, waits=True)
HUNG_RANKS = {
    "the only one that does not wait for others": ([WAITING, beat(1), WAITING], [1]),
    "the one that is behind": ([beat(0), beat(1, phase="data"), beat(2)], [1]),
    "the one in an earlier step": ([beat(0, phase="data"), beat(1, phase="data", step=4)], [1]),
    "who is ahead and works, not who is behind and waits": ([WAITING, beat(1, phase="save")], [1]),
    "the last one": ([beat(0, left=True, number=8), beat(1, left=True), beat(2)], [2]),
    "nobody where all wait": ([WAITING, WAITING], []),
    "nobody where all work": ([beat(0), beat(1)], []),
    "nobody where all have left": ([beat(0, left=True), beat(1, left=True)], None),
    "nobody while one has just left": ([dataclasses.replace(WAITING, left=True), beat(1, left=True), WAITING], None),
    "nobody while one gets on": ([WAITING, beat(1, still=0.5)], None),
    "nobody while one has not begun": ([WAITING, beat(1), None], None),
    "nobody while one is silent": ([WAITING, beat(1), beat(2, number=8)], None),
}


@pytest.mark.parametrize("name", HUNG_RANKS)
def test_a_job_waits_for(name):
    beats, hung = HUNG_RANKS[name]
    before = [found and dataclasses.replace(found, number=8) for found in beats]
    if "just left" in name:
        before[1] = dataclasses.replace(before[1], left=False)
    assert find_hung(beats, before=before, seconds=2.0) == hung


# --- Ranks that hang or die ------------------------------------------------------------------------------------------


def loop_keeping_the_lock(directory: Path, timeout: float) -> None:
    faults_ranks._at("gradient", 20, 1, faults_ranks.keep_the_lock)
    loop(directory, timeout)


HUNG = {
    "stopped": (3, 1, "gradient:20@1=stop", "is stopped"),
    "stopped_host_of_the_store": (3, 0, "gradient:20@0=stop", "the job's store has not answered"),
    "killed": (3, 1, "gradient:20@1=kill", "is dead"),
    "killed_host_of_the_store": (3, 0, "gradient:20@0=kill", "the job's store is gone"),
    "hung_in_the_data": (3, 2, "data:20@2=hang", r"hangs in step 20, phase data, at megatron_polar/faults.py:\d+ in"),
    "hung_in_a_step": (2, 0, "gradient:20@0=hang", "hangs in step 20, phase step"),
    "keeping_the_lock": (2, 1, "", "has not been heard of"),
}


@pytest.mark.parametrize("name", HUNG)
def test_a_rank_that_hangs_or_dies_is_named_and_all_end(name, tmp_path):
    world_size, culprit, fault, message = HUNG[name]
    body = loop if fault else loop_keeping_the_lock
    outcome = run_job(body, world_size, tmp_path, TIMEOUT, fault=fault, orphan_seconds=0.3)
    assert outcome.named == [culprit]
    assert any(re.search(message, verdict) for verdict in outcome.verdicts)
    if "store" not in message:  # without it every rank speaks for itself
        assert len(outcome.verdicts) == 1
    assert outcome.seconds < LIMIT
    assert outcome.orphans == 0
    codes = dict(enumerate(outcome.exit_codes))
    assert codes.pop(culprit) in (STALLED, -signal.SIGKILL)
    assert set(codes.values()) == {STALLED}
    status = orjson.loads((tmp_path / "status.json").read_bytes())
    assert (status["state"], status["exit_status"]) == ("failed", STALLED)
    assert any(status["reason"] in verdict for verdict in outcome.verdicts)
    if "killed" not in name:
        living = set(codes) | ({culprit} if "hung" in name else set())
        stacks = {path.name: path.read_text() for path in (tmp_path / "stacks").iterdir()}
        assert set(stacks) == {f"rank_{rank:05d}.txt" for rank in living}
        assert all("in loop" in text and "rank " in text.splitlines()[0] for text in stacks.values())
    if name == "keeping_the_lock":
        assert "in keep_the_lock" in outcome.output[culprit]


def test_two_stopped_ranks_of_which_one_listens_to_the_other_are_both_ended(tmp_path):
    fault = "data:20@2=stop,gradient:20@1=stop"
    outcome = run_job(loop, 4, tmp_path, TIMEOUT, fault=fault, orphan_seconds=0.3)
    assert outcome.named == [1, 2]
    assert outcome.exit_codes == [STALLED, -signal.SIGKILL, -signal.SIGKILL, STALLED]
    assert outcome.orphans == 0
    assert outcome.seconds < LIMIT


@pytest.mark.parametrize(
    "name",
    ["stopped in a step", "killed while its background writer writes", "endless loop in a background writer"],
)
def test_a_training_run_with_a_hung_or_dead_rank_ends_in_time_and_leaves_no_process(name, tmp_path, trajectory_corpus):
    found = faults_ranks.run_case(name, trajectory_corpus, tmp_path, orphan_seconds=0.5)
    assert found["named"], found["output"]
    assert found["statuses"], found["exit_codes"]
    assert found["orphans"] == 0
    assert found["seconds"] <= faults_ranks.TIMEOUT_SECONDS + 5


def stalled_alone(directory: Path) -> None:
    with Watchdog(None, rank=0, world_size=1, timeout_seconds=0.5, directory=directory) as watchdog:
        watchdog.enter("step", 4)
        for _ in range(8):
            time.sleep(0.1)
            watchdog.progress()
        watchdog.enter("save", 4)
        print("POLAR_FAULT", file=sys.stderr, flush=True)
        time.sleep(60)


def test_a_job_of_one_rank_is_ended_when_it_does_not_get_on(tmp_path):
    outcome = run_job(stalled_alone, 1, tmp_path, orphan_seconds=0.0)
    assert outcome.exit_codes == [STALLED]
    assert outcome.seconds < 5.5
    assert "hangs in step 4, phase save" in outcome.verdicts[0]
    assert "in stalled_alone" in (tmp_path / "stacks" / "rank_00000.txt").read_text()


def test_storage_that_hangs_with_the_stacks_does_not_keep_the_job(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # opening it for writing waits for ever
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank_00000.txt").symlink_to(tmp_path / "fifo")
    outcome = run_job(stalled_alone, 1, tmp_path, orphan_seconds=0.0)
    assert outcome.exit_codes == [STALLED]


def loop_like_nccl(directory: Path) -> None:
    """A job whose collectives return at once: a rank waits where it reads the sum."""

    class OnDevice:
        """Stands in for a GPU's tensor: to copy it waits, outside Python, for what it is computed from."""

        def __init__(self, sum_over_ranks: dist.Work):
            self.cpu = sum_over_ranks.wait

    store, rank, world_size = join()
    with Watchdog(store, rank=rank, world_size=world_size, timeout_seconds=TIMEOUT, directory=directory) as watchdog:
        for step in range(1, 100_000):
            watchdog.enter("step", step)
            faults.point("gradient")
            try:
                read_back(OnDevice(dist.all_reduce(torch.ones(1), async_op=True)))
            except RuntimeError:  # another rank was ended first; a run leaves its end to the watchdog, too
                time.sleep(LIMIT)
            time.sleep(0.01)


def test_a_rank_that_waits_where_it_reads_a_result_is_not_the_one_that_hangs(tmp_path):
    outcome = run_job(loop_like_nccl, 3, tmp_path, fault="gradient:20@1=hang", orphan_seconds=0.3)
    assert outcome.named == [1]
    assert outcome.exit_codes == [STALLED] * 3
    assert outcome.seconds < LIMIT


# --- Errors of ranks -------------------------------------------------------------------------------------------------


def fail_on(ranks: tuple[int, ...], directory: Path, sums: bool) -> None:
    """Raise UserError on some ranks, not quite at once; the others wait for them, in a collective or without one."""

    def end(watchdog: Watchdog) -> None:
        rank = int(os.environ["RANK"])
        time.sleep(0.2 * rank)
        if rank in ranks:
            print("POLAR_FAULT", file=sys.stderr, flush=True)
            raise UserError("data.train: is damaged")
        if sums:
            dist.barrier()
        for _ in range(600):
            time.sleep(0.1)
            watchdog.progress()

    loop(directory, TIMEOUT, steps=3, before_end=end)


def test_an_error_of_all_ranks_is_their_own_and_no_verdict(tmp_path):
    outcome = run_job(fail_on, 3, (0, 1, 2), tmp_path, True, orphan_seconds=0.0)
    assert outcome.exit_codes == [USER_ERROR] * 3
    assert not outcome.verdicts
    assert not (tmp_path / "stacks").exists()


@pytest.mark.parametrize(("rank", "sums"), [(0, True), (1, True), (1, False)])
def test_an_error_of_one_rank_ends_the_others_which_say_why(rank, sums, tmp_path):
    outcome = run_job(fail_on, 3, (rank,), tmp_path, sums, orphan_seconds=0.0)
    codes = dict(enumerate(outcome.exit_codes))
    assert codes.pop(rank) == USER_ERROR
    assert set(codes.values()) == {STALLED}
    said = "".join(text for other, text in enumerate(outcome.output) if other != rank)
    assert re.search(rf"rank {rank} \(.*\) ended with an error: data.train: is damaged", said)
    assert outcome.seconds < LIMIT


def test_other_errors_are_not_explained_by_ranks():
    watchdog = Watchdog(None, rank=0, world_size=1, timeout_seconds=0, directory=None)
    with watchdog:
        assert watchdog.explain(RuntimeError("Connection closed by peer")) is None  # there is none
    assert run_ranks(_explain_a_shape, 2) == [None, None]


def _explain_a_shape() -> str | None:
    store, rank, world_size = join()
    with Watchdog(store, rank=rank, world_size=world_size, timeout_seconds=5.0, directory=None) as watchdog:
        return watchdog.explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# --- Jobs that are well ----------------------------------------------------------------------------------------------


def stop_all(directory: Path) -> None:
    def end(watchdog: Watchdog) -> None:
        time.sleep(0.2 * int(os.environ["RANK"]))
        raise RunStopped("stopped by SIGTERM", status=STOPPED)

    loop(directory, TIMEOUT, steps=3, before_end=end)


def end_one_after_the_other(directory: Path) -> None:
    """The last rank gets on for another two time-outs when the first is done."""

    def end(watchdog: Watchdog) -> None:
        for _ in range(int(10 * TIMEOUT * int(os.environ["RANK"]))):
            time.sleep(0.1)
            watchdog.progress()

    loop(directory, TIMEOUT, steps=3, before_end=end)


def wait_for_a_slow_one(directory: Path) -> None:
    """One rank gets on slowly while the others wait for it in a collective, longer than the time-out."""

    def end(watchdog: Watchdog) -> None:
        if os.environ["RANK"] == "1":
            for _ in range(int(20 * TIMEOUT)):
                time.sleep(0.1)
                watchdog.progress()
        dist.barrier()

    loop(directory, TIMEOUT, steps=3, before_end=end)


def suspend_and_resume(directory: Path) -> None:
    """All processes of the job are stopped for longer than the time-out, as `scontrol suspend` does."""

    def end(watchdog: Watchdog) -> None:
        pids = [None] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())
        if dist.get_rank() == 0 and os.fork() == 0:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(1.5 * TIMEOUT)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            os._exit(0)
        for _ in range(100):
            watchdog.enter("step", 4)
            dist.all_reduce(torch.ones(1))
            time.sleep(0.01)

    loop(directory, TIMEOUT, steps=3, before_end=end)


def two_jobs_in_one_process(directory: Path) -> None:
    store, rank, world_size = join()
    for number in range(2):
        try:
            with Watchdog(store, rank=rank, world_size=world_size, timeout_seconds=1.0, directory=directory):
                dist.barrier()
                if number == 0:
                    raise UserError("the first job fails, the second must not hear of it")
                time.sleep(1.0)
        except UserError:
            dist.barrier()


def without_a_timeout(directory: Path) -> None:
    loop(directory, 0.0, steps=3)


def lose_the_launcher(directory: Path) -> None:
    """torchrun, which hosts the store, is killed; the ranks go on for two time-outs."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    launcher = 0
    if os.environ["RANK"] == "0" and (launcher := os.fork()) == 0:
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
        time.sleep(60)
        del store

    def end(watchdog: Watchdog) -> None:
        if launcher:
            os.kill(launcher, signal.SIGKILL)
        for _ in range(int(20 * TIMEOUT)):
            watchdog.enter("step", 4)
            dist.all_reduce(torch.ones(1))
            time.sleep(0.1)

    loop(directory, TIMEOUT, steps=3, before_end=end)


WELL = {
    "all stopped by a signal": (stop_all, 3, (), STOPPED),
    "ends at different times": (end_one_after_the_other, 3, (), 0),
    "one slow rank": (wait_for_a_slow_one, 3, (), 0),
    "suspended and resumed": (suspend_and_resume, 3, (), 0),
    "launcher killed": (lose_the_launcher, 2, (), 0),
    "two jobs": (two_jobs_in_one_process, 2, (), 0),
    "no time-out": (without_a_timeout, 2, (), 0),
}


@pytest.mark.parametrize("name", WELL)
def test_nobody_is_accused_in_a_job_that_is_well(name, tmp_path):
    body, world_size, arguments, status = WELL[name]
    outcome = run_job(body, world_size, tmp_path, *arguments, orphan_seconds=0.0)
    assert outcome.exit_codes == [status] * world_size, outcome.output
    assert not outcome.verdicts
    assert not (tmp_path / "stacks").exists()


@pytest.mark.parametrize("timeout", [0.0, 20.0])
def test_the_first_rank_beats_for_the_launcher_whatever_the_time_out(timeout, tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog_module, "_HEARTBEAT_SECONDS", 0.05)
    first = Watchdog(None, rank=0, world_size=1, timeout_seconds=timeout, directory=tmp_path)
    with first:
        first.enter("step", 3)
        wait_for((tmp_path / "heartbeat").exists)
    assert (tmp_path / "heartbeat").read_text() == "step of step 3\n"
    assert not any(thread.name.startswith("watchdog") for thread in threading.enumerate())


def test_without_a_timeout_a_dead_rank_is_named_all_the_same(tmp_path):
    outcome = run_job(loop, 2, tmp_path, 0.0, fault="gradient:5@1=kill", orphan_seconds=0.0)
    assert outcome.exit_codes == [STALLED, -signal.SIGKILL]
    assert outcome.named == [1]


SCRIPT = """
import torch.distributed as dist
from megatron_polar.train.watchdog import Watchdog
store, rank, world_size = next(dist.rendezvous("env://"))
with Watchdog(store, rank=rank, world_size=world_size, timeout_seconds=20.0, directory=None):
    pass
"""


def test_a_real_interpreter_ends_as_it_should_with_the_watchdog_behind_it():
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            env=os.environ | rank_environment(rank, 2, port),
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[1].decode() for rank in ranks] == ["", ""]
    assert [rank.returncode for rank in ranks] == [0, 0]


# --- Slow ranks ------------------------------------------------------------------------------------------------------


def test_a_rank_is_slow_when_most_of_its_steps_are():
    seconds = [[1.0] * 8, [1.1] * 8, [2.2] * 8, [1.0] * 8]
    assert find_slow(seconds, ranks=[0, 2, 4, 6], ratio=1.5) == [SlowRank(4, 2.2, 2.2)]
    assert find_slow(seconds, ranks=[0, 2, 4, 6], ratio=2.5) == []
    assert [
        slow.rank for slow in find_slow([[3.0] * 8, [4.0] * 8, *2 * [[1.0] * 8]], ranks=[0, 1, 2, 3], ratio=1.5)
    ] == [1, 0]
    held_up_now_and_then = [[1.0, 9.0, 9.0, 1.0, 9.0, 1.0, 9.0, 1.0], [1.0] * 8]
    assert find_slow(held_up_now_and_then, ranks=[0, 1], ratio=1.5) == []


@pytest.mark.parametrize("slow_rank", [None, 3, 7])
def test_a_rank_with_more_work_is_not_slow(slow_rank):
    """Eight comparisons over eight ranks, as test_loader.py's plan deals them: the last always has the heaviest."""
    loads = [0.45, 0.55, 0.7, 0.85, 0.95, 1.2, 1.6, 1.7]
    ranks = [Stragglers(ratio=1.5) for _ in loads]
    for _ in range(10):
        for rank, (stragglers, load) in enumerate(zip(ranks, loads, strict=True)):
            stragglers.add((0.02 + load) * (2.5 if rank == slow_rank else 1.0), load=load)
    found = find_slow([stragglers._seconds for stragglers in ranks], ranks=list(range(8)), ratio=1.5)
    assert [slow.rank for slow in found] == ([] if slow_rank is None else [slow_rank])


def report_stragglers() -> list:
    topology = initialize(ParallelSection(), device=select_device("cpu", local_rank=0))
    stragglers, nothing = Stragglers(ratio=1.5, fewest_steps=4), Stragglers(ratio=0)
    reports = []
    for _ in range(3):
        for _ in range(2):
            stragglers.add(0.2 if dist.get_rank() == 1 else 0.1)
            nothing.add(1.0 + dist.get_rank())
        reports.append(stragglers.report(topology))
    return [*reports, nothing.report(topology)]


def test_stragglers_are_reported_on_all_ranks_when_there_are_enough_steps():
    first, second = run_ranks(report_stragglers, 2)
    assert first == second == [[], [SlowReplica((1,), 2.0, 0.2)], [], []]


def test_slow_ranks_of_a_replica_are_named_together():
    found = [(1, SlowRank(2, 2.0, 0.2)), (0, SlowRank(1, 1.6, 0.16)), (1, SlowRank(3, 2.1, 0.21))]
    together = by_replica(found)
    assert together == [SlowReplica((3, 2), 2.1, 0.21), SlowReplica((1,), 1.6, 0.16)]
    assert str(together[0]).startswith("ranks 3, 2, which wait for each other within a step, take 2.10 times as long")
    assert str(together[1]).startswith("rank 1 takes 1.60 times as long as the others (160 ms for a step's mean work)")


def test_a_slow_rank_of_a_later_stage_is_written_down_with_those_that_wait_for_it(tmp_path, trajectory_corpus):
    parallel = {"pipeline_model_parallel_size": 2}
    (alarm,) = faults_ranks.alarms(
        trajectory_corpus,
        tmp_path,
        4,
        num_steps=10,
        slow_rank=3,
        data__max_tokens_per_micro_batch=2000,
        parallel=parallel,
    )
    assert 3 in alarm["ranks"]
    assert alarm["rank"] == alarm["ranks"][0]
    assert set(alarm["ranks"]) <= {1, 3}
    assert alarm["ratio"] > 1.5


def test_a_training_run_reports_a_rank_slowed_twofold_within_20_steps_and_no_other(tmp_path):
    found = faults_ranks.straggler_figures(tmp_path, undisturbed_steps=0, world_sizes=(2,))
    assert found["flagged"] == found["slowed"] == 1
    assert found["flagged_at_step"][0] <= 20
    assert found["false_alarms"] == 0
