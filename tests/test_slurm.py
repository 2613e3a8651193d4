"""The job scripts on a real Slurm: slurmctld, munge and a slurmd for every emulated node (slurm_cluster.py)."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
import slurm_cluster
from conftest import write_trajectories
from slurm_cluster import Cluster
from tiny_runs import metric_rows, run_training

from megatron_polar.config.load import load_config
from megatron_polar.data.preprocess import preprocess
from megatron_polar.errors import FENCED, NO_PROGRESS, STOPPED
from megatron_polar.train.checkpoint_files import find_checkpoint
from megatron_polar.train.journal import read_events

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=f"no Slurm: {slurm_cluster.missing()}"),
]
PYTHON = sys.executable
CONFIG = "examples/pretrain_7b.yaml"
REPOSITORY = Path(__file__).parent.parent
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
SLOWLY = "before_update=slow,after_update=slow,step_end=slow,gradient=slow"
"""Steps of a quarter of a second."""
NANO = [
    "model.preset=null",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.rotary_base=10000",
    "model.transformer_impl=auto",
    "data.validation=[]",
    "data.max_sequence_length=512",
    "data.max_tokens_per_micro_batch=512",
    "data.num_workers=0",
    "train.global_batch_size=8",
    "train.num_epochs=null",
    "train.init_from=null",
    "train.precision=fp32",
    "train.recompute=none",
    "run.device=cpu",
    "optimizer.lr=1e-3",
    "checkpoint.async_save=false",
    "logging.interval=1",
    "evaluation.interval=0",
]


@pytest.fixture
def cluster(request, tmp_path_factory):
    """As many nodes as the test's mark `nodes` says, else two."""
    mark = request.node.get_closest_marker("nodes")
    with Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=mark.args[0] if mark else 2) as cluster:
        cluster.environment |= {"POLAR_HOME": str(REPOSITORY), "POLAR_PREFLIGHT": "off", "POLAR_MIN_FREE_GB": "0"}
        cluster.environment |= {"POLAR_SITE": "/dev/null", "POLAR_PYTHON": PYTHON, "POLAR_WATCH_SECONDS": "1"}
        yield cluster


def nano(corpus: Path, run: Path, *overrides: str) -> list[str]:
    """The 7B's YAML made tiny, for as many steps as `overrides` say."""
    return [*NANO, f"data.train=[{{path: {corpus}}}]", f"run.directory={run}", *overrides]


def submit(cluster: Cluster, run: Path, overrides: list[str], *options: str, nodes: int = 2, **environment) -> str:
    options = (f"--nodes={nodes}", "--ntasks-per-node=1", f"--output={run}.log", *options)
    return cluster.submit(*options, "slurm/pretrain_7b.sh", *overrides, **environment)


def shards(run: Path) -> dict[str, str]:
    """SHA-256 of what the newest checkpoint holds."""
    files = orjson.loads((find_checkpoint(run) / "manifest.json").read_bytes())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


def wait_for_step(run: Path, step: int, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not (run / "metrics.jsonl").exists() or (metric_rows(run)[-1:] and metric_rows(run)[-1]["iteration"] < step):
        assert time.monotonic() < deadline, Path(f"{run}.log").read_text()
        time.sleep(0.1)


def log_of(run: Path) -> str:
    log = Path(f"{run}.log")
    return log.read_text() if log.exists() else ""


# --- Training --------------------------------------------------------------------------------------------------------


def test_two_jobs_on_the_same_nodes_train_side_by_side(cluster, trajectory_corpus, tmp_path):
    """Ranks, hosts and rendezvous are right, and neither meets the other's ranks."""
    shared = ("--exclusive=user", "--gpus-per-node=4", "--mem=1000")
    first, second = tmp_path / "first", tmp_path / "second"
    jobs = [
        submit(cluster, run, nano(trajectory_corpus, run, "train.num_steps=4", f"run.seed={seed}"), *shared)
        for seed, run in enumerate((first, second))
    ]
    hosts = []
    for job, run in zip(jobs, (first, second), strict=True):
        found = cluster.wait(job, *ENDS)
        assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), log_of(run)
        assert "ranks: 2 x cpu over gloo; tp=2, pp=1" in log_of(run)
        assert "done: step 4" in log_of(run)
        assert (run / "DONE").exists()
        environment = dict(line.split("=", 1) for line in read_environment(run, job))
        assert environment["MASTER_ADDR"] == "node1"
        assert environment["SLURM_JOB_NODELIST"] == "node[1-2]"
        hosts.append(environment)
        assert (run / "logs" / f"{job}.0" / "rank-1.log").exists()
    assert shards(first) != shards(second)
    # A job whose run is done ends at once.
    again = submit(cluster, first, nano(trajectory_corpus, first, "train.num_steps=4"))
    assert cluster.wait(again, *ENDS)["JobState"] == "COMPLETED"
    assert f"{first}/DONE is there" in log_of(first)


def test_two_whole_nodes_train_as_the_script_says(cluster, trajectory_corpus, tmp_path):
    """One rank for each of eight GPUs a node, TP2 x DP8; no option of the script is changed but the number of nodes."""
    run = tmp_path / "run"
    overrides = nano(trajectory_corpus, run, "train.num_steps=2")
    job = cluster.submit("--nodes=2", f"--output={run}.log", "slurm/pretrain_7b.sh", *overrides)
    assert cluster.wait(job, *ENDS, seconds=300)["JobState"] == "COMPLETED", log_of(run)
    assert "ranks: 16 x cpu over gloo; tp=2, pp=1, vpp=1, cp=1, dp=8" in log_of(run)
    logs = sorted((run / "logs" / f"{job}.0").glob("rank-*.log"))
    assert len(logs) == 15
    assert find_checkpoint(run).name == "step_00000002"


@pytest.mark.nodes(4)
def test_four_nodes_train_after_a_full_preflight(cluster, trajectory_corpus, tmp_path):
    run = tmp_path / "run"
    overrides = nano(trajectory_corpus, run, "train.num_steps=2")
    job = submit(cluster, run, overrides, nodes=4, POLAR_PREFLIGHT="full")
    assert cluster.wait(job, *ENDS, seconds=200)["JobState"] == "COMPLETED", log_of(run)
    assert "ranks: 4 x cpu over gloo; tp=2, pp=1, vpp=1, cp=1, dp=2" in log_of(run)
    for node in range(1, 5):
        assert re.search(rf"ok +node{node} ", log_of(run)), log_of(run)


def read_environment(run: Path, job: str) -> list[str]:
    return (run / "logs" / f"{job}.0" / "environment.txt").read_text().splitlines()


@pytest.mark.nodes(3)
def test_a_signal_and_a_crashed_node_change_nothing(cluster, trajectory_corpus, tmp_path):
    """Signal before the limit -> checkpoint -> requeue -> resume; node crash -> requeue on the spare node -> resume."""
    overrides = ["train.num_steps=60", "checkpoint.save_interval=5", "data.num_workers=1"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    job = submit(cluster, run, nano(trajectory_corpus, run, *overrides), POLAR_FAULT="after_update=slow")
    wait_for_step(run, 8)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@900 does before the time limit
    wait_for_log(run, "requeued")
    cluster.wait(job, "RUNNING")
    wait_for_step(run, saved_at_signal(run) + 8)
    cluster.crash(2)
    cluster.wait(job, "PENDING", seconds=60)
    found = cluster.wait(job, "COMPLETED", *ENDS)
    assert found["JobState"] == "COMPLETED", log_of(run)
    assert (found["Restarts"], found["NodeList"]) == ("2", "node[1,3]")
    starts = [event for event in read_events(run) if event["event"] == "start"]
    assert len(starts) == 3
    assert starts[1]["step"] == saved_at_signal(run) > 0
    assert starts[1].get("lost_steps", 0) == 0
    assert starts[2]["lost_steps"] <= 5
    assert [row["iteration"] for row in metric_rows(run)] == list(range(1, 61))
    config = load_config(REPOSITORY / "examples" / "pretrain_7b.yaml", nano(trajectory_corpus, whole, *overrides))
    run_training(config, 2)
    assert shards(run) == shards(whole)


@pytest.mark.nodes(4)
def test_a_node_whose_replica_differs_is_left_out_of_the_next_try(cluster, trajectory_corpus, tmp_path):
    """Three replicas; a bit flips in the second one's memory, and the vote of the other two names its node."""
    run = tmp_path / "run"
    overrides = ["train.num_steps=4000", "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
    overrides += ["optimizer.use_distributed_optimizer=false", "train.global_batch_size=12"]
    overrides += ["faults.replica_check_interval=1"]
    job = submit(
        cluster, run, nano(trajectory_corpus, run, *overrides), nodes=3, POLAR_FAULT=f"step_end:2@1=flip,{SLOWLY}"
    )
    wait_for_log(run, "requeued", seconds=120)
    assert re.search(r"weights that must be equal on all replicas differ: .* of rank 1; .* on node2,", log_of(run))
    assert (run / "bad_nodes").read_text() == "node2\n"
    deadline = time.monotonic() + 30
    while cluster.job(job).get("ExcNodeList") != "node2":
        assert time.monotonic() < deadline, cluster.job(job)
        time.sleep(0.2)
    cluster.run("scancel", job)


def wait_for_log(run: Path, text: str, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while text not in log_of(run):
        assert time.monotonic() < deadline, log_of(run)
        time.sleep(0.1)


def saved_at_signal(run: Path) -> int:
    (event,) = [event for event in read_events(run) if event["event"] == "stopped"]
    return event["step"]


def test_a_survivor_on_a_node_that_was_cut_off_is_fenced(cluster, trajectory_corpus, tmp_path):
    """Its job goes on elsewhere, while the ranks that nobody can reach still train."""
    overrides = ["train.num_steps=200", "checkpoint.save_interval=10", "parallel.tensor_model_parallel_size=1"]
    overrides += ["parallel.sequence_parallel=false"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    job = submit(cluster, run, nano(trajectory_corpus, run, *overrides), nodes=1, POLAR_FAULT=SLOWLY)
    wait_for_step(run, 6)
    (node,) = re.findall(r"node(\d)", cluster.job(job)["NodeList"])
    cluster.cut(int(node))
    (survivor,) = [number for number in cluster.processes_on(int(node)) if is_rank(number)]
    cluster.wait(job, "PENDING", seconds=60)
    found = cluster.wait(job, *ENDS)
    assert found["JobState"] == "COMPLETED", log_of(run)
    assert found["NodeList"] != f"node{node}"
    assert "taken over from a job that is over" in log_of(run)
    deadline = time.monotonic() + 30
    while is_rank(survivor):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "another job has taken over here" in log_of(run)
    assert [row["iteration"] for row in metric_rows(run)] == list(range(1, 201))
    assert FENCED not in {event.get("exit_status") for event in read_events(run)}
    config = load_config(REPOSITORY / "examples" / "pretrain_7b.yaml", nano(trajectory_corpus, whole, *overrides))
    run_training(config, 1)
    assert shards(run) == shards(whole)


@pytest.mark.nodes(3)
def test_a_script_that_slurm_has_lost_does_not_stop_the_job_that_goes_on_elsewhere(
    cluster, trajectory_corpus, tmp_path
):
    """Its ranks end, because those on the other node were ended; requeueing then would end the new ones."""
    overrides = ["train.num_steps=100", "checkpoint.save_interval=5"]
    run = tmp_path / "run"
    job = submit(cluster, run, nano(trajectory_corpus, run, *overrides), POLAR_FAULT=SLOWLY)
    wait_for_step(run, 6)
    assert cluster.job(job)["BatchHost"] == "node1"
    cluster.lose_daemon(1)
    cluster.wait(job, "PENDING", seconds=60)
    cluster.wait(job, "RUNNING", seconds=60)
    wait_for_log(run, "Slurm has requeued this job already", seconds=90)
    found = cluster.wait(job, *ENDS)
    assert found["JobState"] == "COMPLETED", log_of(run)
    assert (found["Restarts"], found["NodeList"]) == ("1", "node[2-3]"), log_of(run)
    assert [row["iteration"] for row in metric_rows(run)] == list(range(1, 101))


def is_rank(process: int, *, verb: str = "train") -> bool:
    command = f"{PYTHON}\0-m\0megatron_polar\0{verb}"
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().startswith(command.encode())
    except OSError:
        return False


def test_what_cannot_get_on_is_not_started_for_ever(cluster, trajectory_corpus, tmp_path):
    """Ranks that die before every first checkpoint: three starts; a user's mistake: one; and STOP and torchrun."""
    run = tmp_path / "run"
    job = submit(
        cluster, run, nano(trajectory_corpus, run, "train.num_steps=4", "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false"), nodes=1, POLAR_FAULT="before_update:2=kill"
    )  # fmt: skip
    found = cluster.wait(job, *ENDS)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", f"{NO_PROGRESS}:0"), log_of(run)
    assert "3 starts in a row have not got beyond the checkpoint of step 0" in log_of(run)
    wrong = tmp_path / "wrong"
    job = submit(cluster, wrong, nano(trajectory_corpus, wrong, "train.num_steps=4", "train.init_from=nowhere"))
    assert cluster.wait(job, *ENDS)["ExitCode"] == "2:0", log_of(wrong)
    assert "nowhere: no checkpoint here" in log_of(wrong)


@pytest.mark.parametrize("sick", ["node1", "node"])
def test_a_first_node_that_cannot_begin_is_left_out_once(sick, cluster, trajectory_corpus, tmp_path):
    """Its container does not start, or its disk is gone: the preflight, which it would start, cannot tell."""
    run, python = tmp_path / "run", tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase $SLURMD_NODENAME in {sick}*) exit 7 ;; esac\nexec {PYTHON} "$@"\n')
    python.chmod(0o755)
    job = submit(
        cluster, run, nano(trajectory_corpus, run, "train.num_steps=2", "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false"), nodes=1, POLAR_PYTHON=str(python)
    )  # fmt: skip
    found = cluster.wait(job, *ENDS)
    assert "status 7 to read the configuration on the first node: trying without it" in log_of(run)
    if sick == "node1":
        assert found["JobState"] == "COMPLETED", log_of(run)
    else:
        assert (found["JobState"], found["ExitCode"]) == ("FAILED", "7:0"), log_of(run)
        assert "as on another first node before" in log_of(run)


def test_a_stop_file_ends_a_chain_of_torchrun_jobs_with_a_checkpoint(cluster, trajectory_corpus, tmp_path):
    run = tmp_path / "run"
    overrides = nano(trajectory_corpus, run, "train.num_steps=500", "checkpoint.save_interval=1000")
    options = ("--chain", "2", "--nodes=2", "--ntasks-per-node=1", f"--output={run}.log", "slurm/pretrain_7b.sh")
    own = [name for name in cluster.environment if name.startswith(("POLAR_", "SLURM_CONF"))]
    done = cluster.run(
        "slurm/launch.sh", *options, *overrides, POLAR_LAUNCHER="torchrun", POLAR_RANKS_PER_NODE="1",
        POLAR_FAULT="after_update=slow", SBATCH_EXPORT=",".join([*own, "PATH", "POLAR_LAUNCHER", "POLAR_RANKS_PER_NODE",
        "POLAR_FAULT"]),
    )  # fmt: skip
    first, second = re.findall(r"Submitted batch job (\d+)", done.stdout)
    wait_for_step(run, 3)
    assert cluster.job(second)["JobState"] == "PENDING"
    (run / "STOP").touch()
    assert cluster.wait(first, *ENDS)["JobState"] == "COMPLETED", log_of(run)
    assert cluster.wait(second, *ENDS)["JobState"] == "CANCELLED", log_of(run)
    assert "not going on" in log_of(run)
    assert find_checkpoint(run).name == f"step_{metric_rows(run)[-1]['iteration']:08d}"


def test_a_job_that_hangs_leaves_stacks_and_is_requeued(cluster, trajectory_corpus, tmp_path):
    """The first rank is stopped, so that the watchdog inside the job cannot say anything."""
    run = tmp_path / "run"
    overrides = ["train.num_steps=30", "checkpoint.save_interval=5", "parallel.tensor_model_parallel_size=1"]
    overrides += ["parallel.sequence_parallel=false"]
    job = submit(
        cluster, run, nano(trajectory_corpus, run, *overrides), nodes=1, POLAR_FAULT=SLOWLY, POLAR_HANG_SECONDS="12"
    )  # fmt: skip
    wait_for_step(run, 6)
    (node,) = re.findall(r"node(\d)", cluster.job(job)["NodeList"])
    for process in filter(is_rank, cluster.processes_on(int(node))):
        os.kill(process, signal.SIGSTOP)
    wait_for_log(run, "no heartbeat for")
    found = cluster.wait(job, *ENDS)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    assert "asked 1 processes for their stacks" in log_of(run)
    assert [row["iteration"] for row in metric_rows(run)] == list(range(1, 31))


def test_a_signal_before_there_are_ranks_is_not_lost(cluster, trajectory_corpus, tmp_path):
    """During the preflight it requeues at once; while the step is being launched it is repeated."""
    run = tmp_path / "run"
    overrides = nano(trajectory_corpus, run, "train.num_steps=300", "checkpoint.save_interval=1000")
    job = submit(cluster, run, overrides, POLAR_FAULT="after_update=slow")
    deadline = time.monotonic() + 60
    while not (run / "jobs.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_log(run, "requeued", seconds=90)
    cluster.run("scancel", job)
    assert saved_at_signal(run) < 20 if list(run.glob("checkpoints/step_*")) else "before" in log_of(run)
    early = tmp_path / "early"
    job = submit(cluster, early, nano(trajectory_corpus, early, "train.num_steps=4"), POLAR_PREFLIGHT="full")
    wait_for_log(early, "job ")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_log(early, "requeued", seconds=90)
    assert "asked to end by SIGUSR1 before the ranks were started" in log_of(early)
    cluster.run("scancel", job)


# --- Checks before a run ---------------------------------------------------------------------------------------------


def test_preflight_names_the_node_whose_dataset_is_another(cluster, trajectory_corpus, tmp_path):
    """It is excluded, and what is left cannot hold the job."""
    corpus = tmp_path / "corpus"
    shutil.copytree(trajectory_corpus, corpus)
    spoilt = tmp_path / "manifest.json"
    spoilt.write_bytes((corpus / "manifest.json").read_bytes().replace(b'"lines":', b'"lines": '))
    cluster.on_node(2, "mount", "--bind", str(spoilt), str(corpus / "manifest.json"))
    run = tmp_path / "run"
    job = submit(cluster, run, nano(corpus, run, "train.num_steps=4"), POLAR_PREFLIGHT="full")
    wait_for_log(run, "requeued")
    assert re.search(r"node2.*manifest", log_of(run)), log_of(run)
    assert (run / "bad_nodes").read_text().split() == ["node2"]
    deadline = time.monotonic() + 30
    while cluster.job(job).get("ExcNodeList") != "node2":
        assert time.monotonic() < deadline, cluster.job(job)
        time.sleep(0.2)
    cluster.run("scancel", job)
    assert not (run / "checkpoints").exists()


@pytest.mark.nodes(3)
def test_a_node_that_stops_in_the_preflight_is_left_out_of_the_rest_of_a_chain(cluster, trajectory_corpus, tmp_path):
    run = tmp_path / "run"
    overrides = nano(trajectory_corpus, run, "train.num_steps=2")
    options = ("--chain=2", "--nodes=2", "--ntasks-per-node=1", f"--output={run}.log", "slurm/pretrain_7b.sh")
    settings = {"POLAR_PREFLIGHT": "full", "POLAR_PREFLIGHT_SECONDS": "8"}
    done = cluster.run("slurm/launch.sh", *options, *overrides, **settings)
    first, second = re.findall(r"Submitted batch job (\d+)", done.stdout)
    deadline = time.monotonic() + 60
    while not (stopped := [process for process in cluster.processes_on(2) if is_rank(process, verb="preflight")]):
        assert time.monotonic() < deadline, log_of(run)
        time.sleep(0.02)
    os.kill(stopped[0], signal.SIGSTOP)
    assert cluster.wait(first, *ENDS)["ExitCode"] == f"{STOPPED}:0", log_of(run)
    assert "not over after 16 s, ending it" in log_of(run)
    assert re.search(r"BAD +node2 ", log_of(run)), log_of(run)
    found = cluster.wait(second, *ENDS)
    assert (found["JobState"], found["NodeList"]) == ("COMPLETED", "node[1,3]"), log_of(run)
    assert find_checkpoint(run).name == "step_00000002"


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ([], ["parallel.tensor_model_parallel_size=3"], "tensor_model_parallel_size=3 does not divide"),
        ([], ["model.preset=polar_72b"], "GB"),
        ([], ["data.train=[{path: nowhere}]"], "nowhere"),
        (["--partition=none"], [], "invalid partition"),
    ],
)
def test_a_dry_run_refuses_what_would_fail(options, overrides, message, cluster, trajectory_corpus, tmp_path):
    ours = [f"data.train=[{{path: {trajectory_corpus}}}]", "data.validation=[]", "train.init_from=null"]
    ours += ["train.num_epochs=null", "train.num_steps=10"]
    ours += ["model.vocab_size=420", f"run.directory={tmp_path}/run", *overrides]
    done = cluster.run(
        "slurm/launch.sh", "--dry-run", "--nodes=2", *options, "slurm/pretrain_7b.sh", *ours, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " "), done.stderr
    assert not cluster.run("squeue", "--noheader").stdout


def test_a_dry_run_of_what_is_well_submits_nothing(cluster, trajectory_corpus, tmp_path):
    ours = nano(trajectory_corpus, tmp_path / "run", "train.num_steps=4")
    done = cluster.run("slurm/launch.sh", "--dry-run", "--nodes=2", "slurm/pretrain_7b.sh", *ours)
    assert "would submit: sbatch --nodes=2 slurm/pretrain_7b.sh model.preset=null" in done.stdout
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bad_nodes").write_text("node2\na_node_that_is_gone\n")
    options = ["--nodes=1", "--exclude=node1", "--time=10", "--chain=2"]
    done = cluster.run("slurm/launch.sh", "--dry-run", *options, "slurm/train.sh", CONFIG, *ours, check=False)
    assert "Requested node configuration is not available" in done.stderr  # of two nodes one is bad, one excluded
    done = cluster.run("slurm/launch.sh", "--dry-run", *options[2:], "slurm/train.sh", CONFIG, *ours)
    assert "would submit 2 times: sbatch --nodes=1 --time=10 --signal=B:USR1@150 --exclude=node2" in done.stdout
    assert re.search(r"--dependency=singleton --job-name=polar-run-\d+ --no-requeue slurm/train.sh", done.stdout)
    assert not cluster.run("squeue", "--noheader").stdout
    done = cluster.run("slurm/launch.sh", "--dry-run", "examples/nothing.yaml", check=False)
    assert (done.returncode, "examples/nothing.yaml: no such file" in done.stderr) == (2, True)


def test_a_job_gets_what_the_script_sets_where_a_users_environment_is_kept_out(cluster, trajectory_corpus, tmp_path):
    """Sites with SBATCH_EXPORT=NONE, or a list: srun would leave the rendezvous out as well."""
    run = tmp_path / "run"
    kept = ",".join(name for name in cluster.environment if name.startswith("POLAR_"))
    job = submit(cluster, run, nano(trajectory_corpus, run, "train.num_steps=2"), f"--export={kept}")
    assert cluster.wait(job, *ENDS)["JobState"] == "COMPLETED", log_of(run)


@pytest.mark.parametrize("chain", ["", "polar-run-1.2"])
def test_only_a_chain_cancels_what_waits_under_its_name(chain, tmp_path):
    """A site may forbid requeueing by POLAR_REQUEUE=0 for jobs that have nothing to do with each other."""
    said, stub = tmp_path / "said", tmp_path / "scancel"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    stub.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "POLAR_HOME": str(REPOSITORY), "POLAR_PYTHON": PYTHON}
    variables |= {
        "POLAR_SITE": "/dev/null",
        "POLAR_REQUEUE": "0",
        "POLAR_CHAIN": chain,
        "SLURM_JOB_NAME": "polar-train",
    }
    subprocess.run(
        ["bash", "-c", "source slurm/common.sh; polar_cancel_chain"], cwd=REPOSITORY, env=variables, check=True
    )
    assert said.exists() == bool(chain)


def test_a_task_whose_script_is_edited_in_place_runs_its_command_once(tmp_path):
    """bash reads on from where it was; an editor or scp writes into the same file."""
    script, said = tmp_path / "task.sh", tmp_path / "said"
    text = (REPOSITORY / "slurm" / "task.sh").read_text()
    script.write_text(text)
    variables = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "POLAR_LAUNCHER": "srun"}
    variables |= {"POLAR_RENDEZVOUS": "localhost 1", "POLAR_LOG_DIR": str(tmp_path), "PATH": os.environ["PATH"]}
    process = subprocess.Popen(
        ["bash", str(script), "sh", "-c", f"echo once >> {said}; sleep 1; exit 5"], env=variables
    )
    deadline = time.monotonic() + 30
    while not said.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    script.write_text(text.replace("set -uo pipefail\n", f"set -uo pipefail\n# {'a longer head ' * 20}\n"))
    assert process.wait(timeout=30) == 5
    assert said.read_text() == "once\n"
    assert (tmp_path / "exit-0").read_text().split()[1] == "5"


@pytest.mark.parametrize(("rank", "is_host"), [("0", "1"), ("3", "0")])
def test_torchrun_is_told_which_node_hosts_its_rendezvous(rank, is_host, tmp_path):
    """By itself it would not know its own host by the name of a second network."""
    variables = {"SLURM_PROCID": rank, "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4", "POLAR_LAUNCHER": "torchrun"}
    variables |= {"POLAR_RENDEZVOUS": "node1-ib0 1", "POLAR_LOG_DIR": str(tmp_path), "PATH": os.environ["PATH"]}
    program = "from torch.distributed.run import get_args_parser as parser; print(parser().parse_args(['x']).rdzv_conf)"
    command = ["bash", "slurm/task.sh", PYTHON, "-c", f"{program[:-1]}, file=open('{tmp_path}/said', 'w'))"]
    subprocess.run(command, cwd=REPOSITORY, env=variables, check=True)
    assert (tmp_path / "said").read_text() == f"is_host={is_host}\n"


@pytest.mark.nodes(64)
def test_slurm_accepts_every_script(cluster):
    for script in sorted((REPOSITORY / "slurm").glob("*.sh")):
        if "\n#SBATCH" in script.read_text():
            cluster.run("sbatch", "--test-only", str(script))


def test_shellcheck_finds_nothing():
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck")
    scripts = [*sorted((REPOSITORY / "slurm").glob("*.sh")), REPOSITORY / "slurm" / "site.env.example"]
    done = subprocess.run(
        [checker, "-x", *map(str, scripts)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# --- Arrays, other jobs, containers ----------------------------------------------------------------------------------


def test_an_array_of_parts_makes_the_bytes_of_one_process(cluster, tokenizer_path, tmp_path):
    """One element is killed as it begins: nothing waits for ever, and the same command again completes."""
    (tmp_path / "input").mkdir()
    for number in range(3):
        write_trajectories(tmp_path / "input" / f"{number}.jsonl", num_prompts=400, seed=number)
    arguments = [str(tmp_path / "input"), f"--tokenizer={tokenizer_path}"]
    preprocess([tmp_path / "input"], output=tmp_path / "whole", tokenizer_path=tokenizer_path)
    command = ["slurm/preprocess.sh", *arguments, f"--output={tmp_path}/parts"]
    _, merge = submitted(cluster, command, POLAR_PYTHON=dying_python(tmp_path))
    assert cluster.wait(merge, *ENDS)["JobState"] == "CANCELLED"
    assert not (tmp_path / "parts" / "manifest.json").exists()
    _, merge = submitted(cluster, command)
    assert cluster.wait(merge, *ENDS)["JobState"] == "COMPLETED"
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def dying_python(directory: Path) -> str:
    """A Python whose second part is killed."""
    script = directory / "python"
    script.write_text(f'#!/bin/sh\ncase "$*" in *"--part 1/3") kill -9 $$ ;; esac\nexec {PYTHON} "$@"\n')
    script.chmod(0o755)
    return str(script)


def submitted(cluster: Cluster, command: list[str], **environment: str) -> list[str]:
    environment |= {"POLAR_PARTS": "3", "SBATCH_OUTPUT": "/dev/null"}
    text = cluster.run(*command, **environment).stdout
    return re.findall(r"job (\d+)", text)


def files_of(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_container_options_reach_srun(tmp_path_factory, tmp_path):
    plugin = tmp_path / "pyxis.so"
    compiler = shutil.which("gcc")
    if compiler is None or not Path("/usr/include/slurm/spank.h").exists():
        pytest.skip("no gcc, or no slurm/spank.h (Debian: gcc libslurm-dev)")
    source = REPOSITORY / "tests" / "slurm_pyxis.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(plugin), str(source)], check=True)
    with Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=1, plugin=plugin) as cluster:
        show = tmp_path / "python3"
        show.write_text("#!/bin/sh\nenv | grep -E '^(PYXIS|FAKE)'; echo arguments: $@\n")
        show.chmod(0o755)
        environment = {"POLAR_HOME": str(REPOSITORY), "POLAR_SITE": "/dev/null", "POLAR_PYTHON": str(show)}
        environment |= {"POLAR_CONTAINER_IMAGE": "image.sqsh", "POLAR_CONTAINER_MOUNTS": "/data:/data"}
        log = tmp_path / "pyxis.log"
        script = ("slurm/convert.sh", "to-hf", "--checkpoint=x")
        job = cluster.submit(f"--output={log}", *script, POLAR_RUNTIME="pyxis", **environment)
        cluster.wait(job, *ENDS)
        lines = sorted(log.read_text().splitlines())
        (kept,) = [line for line in lines if line.startswith("PYXIS_ENVIRONMENT=")]
        assert {"NCCL_DEBUG", "OMP_NUM_THREADS", "PYTHONPATH"} <= set(kept.partition("=")[2].split(","))
        assert [line for line in lines if line != kept] == [
            "PYXIS_IMAGE=image.sqsh",
            f"PYXIS_MOUNTS={REPOSITORY}:{REPOSITORY},/data:/data",
            "PYXIS_NO_HOME=yes",
            f"PYXIS_WORKDIR={REPOSITORY}",
            "arguments: -m megatron_polar convert to-hf --checkpoint=x",
        ]
        apptainer = tmp_path / "apptainer"
        apptainer.write_text("#!/bin/sh\necho apptainer $@\n")
        apptainer.chmod(0o755)
        log = tmp_path / "apptainer.log"
        path = f"{tmp_path}:{os.environ['PATH']}"
        job = cluster.submit(f"--output={log}", *script, POLAR_RUNTIME="apptainer", PATH=path, **environment)
        cluster.wait(job, *ENDS)
        assert log.read_text().startswith(
            f"apptainer exec --nv --bind {REPOSITORY}:{REPOSITORY},/data:/data --pwd {REPOSITORY} image.sqsh {show} -m"
        )
