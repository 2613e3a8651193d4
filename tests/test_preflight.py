"""The preflight of a job: a bad node is named, a mistake of the user is not blamed on nodes, and nothing hangs."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from ranks import run_ranks

from megatron_polar.cli import main
from megatron_polar.config.load import load_config
from megatron_polar.errors import DONE, PREFLIGHT_FAILED, STALLED, USER_ERROR, UserError
from megatron_polar.launch import all_reduce
from megatron_polar.launch.all_reduce import Measurement, rounds_of_a_ring
from megatron_polar.launch.node import describe_node, query_gpus
from megatron_polar.launch.report import (
    Failure,
    Gpu,
    Place,
    place_of_this,
    read_evidence,
)

ALL_STAGES = ("meeting", "node", "all", "done")


# --- What a node says of itself ---------------------------------------------------------------------------------------


def test_the_place_of_a_task_comes_from_slurm_or_torchrun():
    assert place_of_this({"SLURMD_NODENAME": "n1"}) == Place("n1", 0, 1, 0, 1)
    job = {"RANK": "9", "WORLD_SIZE": "12", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}
    slurm = {"SLURMD_NODENAME": "n2", "SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_NODEID": "1"}
    assert place_of_this({**job, **slurm}) == Place("n2", 9, 12, 1, 4)
    assert place_of_this({**job, **slurm, "LOCAL_WORLD_SIZE": "6"}).num_local_ranks == 6
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        place_of_this({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="srun started 2 tasks"):
        place_of_this({"SLURM_STEP_NUM_TASKS": "2"})


H100 = "{index}, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 345, 1980, {ecc}, {errors}"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a script that stands for nvidia-smi first on PATH."""

    def make(script: str) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return make


def answering(rows: list[str], *, reasons: list[str], known_field: str) -> str:
    known = "index,name,driver_version,memory.total,clocks.sm,clocks.max.sm,*"
    return f"""case "$1" in
--query-gpu={known}) printf '%s\\n' {" ".join(f"'{row}'" for row in rows)};;
--query-gpu=index,{known_field}) printf '%s\\n' {" ".join(f"'{row}'" for row in reasons)};;
*) echo 'Field "x" is not a valid field to query.'; exit 2;;
esac"""


@pytest.mark.parametrize("field", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_gpus_are_read_from_nvidia_smi_of_old_and_new_drivers(nvidia_smi, field):
    rows = [H100.format(index=0, ecc="Enabled", errors=0), H100.format(index=1, ecc="[N/A]", errors="[N/A]")]
    nvidia_smi(answering(rows, reasons=["0, 0x0000000000000001", "1, 0x0000000000000048"], known_field=field))
    found, error = query_gpus()
    assert error == ""
    assert found[0] == Gpu(0, "NVIDIA H100 80GB HBM3", "550.54.15", 81559, 345, 1980, "Enabled", 0)
    assert (found[1].ecc_mode, found[1].uncorrected_errors) == (None, None)
    assert found[1].throttle_reasons == ("hw_slowdown", "hw_thermal_slowdown")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Unable to determine the device handle for GPU0000:5D:00.0: Unknown Error'; exit 255", "status 255"),
        (f"echo '{H100.format(index=0, ecc='Enabled', errors=0)}'; echo 'GPU is lost'", "GPU is lost"),
        ("exec sleep 5", "did not answer within 0.3 s"),
    ],
)
def test_a_failing_nvidia_smi_is_a_reason(nvidia_smi, script, reason):
    nvidia_smi(script)
    found, error = query_gpus(timeout_seconds=0.3)
    assert found == ()
    assert reason in error


CONFIG = """
run: {{directory: {directory}/run}}
model: {{preset: polar_1_8b}}
data: {{train: [{{path: {dataset}}}]}}
train: {{global_batch_size: 8, num_steps: 5}}
optimizer: {{lr: 1e-4}}
"""


@pytest.fixture
def config_path(tmp_path, trajectory_corpus) -> Path:
    """The YAML of a run whose dataset is there."""
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(directory=tmp_path, dataset=trajectory_corpus))
    return path


def test_a_node_describes_itself(tmp_path, config_path, trajectory_corpus, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # neither nvidia-smi nor git
    insisting = ["model.transformer_impl=transformer_engine"]
    config = load_config(config_path, [*insisting, "data.tokenizer=/gone", f"data.validation=[{{path: {tmp_path}}}]"])
    steps = []
    report = describe_node(
        config,
        place=Place("n2", 8, 16, 0, 8),
        output=tmp_path,
        wants_all_reduce=False,
        environment={"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"},
        begin=steps.append,
    )
    assert (report.gpus, report.visible_gpus, report.versions["commit"]) == ((), 4, None)
    assert (report.num_allocated_gpus, report.needs_transformer_engine) == (4, True)
    assert report.versions["torch"].startswith("2.")
    assert len(report.versions["code"]) == 12
    assert abs(report.clock_offset_seconds) < 1
    assert report.free_gb["run.directory"] > 0
    assert [state.damage for state in report.datasets] == [
        "",
        "manifest.json is missing: the directory was never finished",
    ]
    assert len(report.datasets[0].manifest_sha256) == 64
    assert report.missing_inputs == {"data.tokenizer": "/gone"}
    assert f"dataset {trajectory_corpus}" in steps


# --- Real ranks ------------------------------------------------------------------------------------------------------


def run_rank(arguments: list[str], directories: dict[str, Path] | None = None, local_ranks: int = 1) -> int:
    """The console command on one forked rank; ranks are spread over the nodes n1, n2, ..., each with its directory."""
    rank = int(os.environ["RANK"])
    node = f"n{rank // local_ranks + 1}"
    os.environ.update(SLURMD_NODENAME=node, LOCAL_RANK=str(rank % local_ranks), LOCAL_WORLD_SIZE=str(local_ranks))
    if directories:
        os.chdir(directories[node])
    return main(arguments)


@pytest.fixture
def small_data(monkeypatch):
    """A few ranks on a busy core need no 64 MiB to show that they add rightly."""
    monkeypatch.setattr(all_reduce, "_CPU_BYTES", 4 * all_reduce.MIB)


@pytest.mark.parametrize("local_ranks", [1, 2])
def test_ranks_meet_and_measure_and_their_nodes_pass(config_path, tmp_path, small_data, capsys, local_ranks):
    output = tmp_path / "preflight"
    arguments = ["preflight", str(config_path), "--output", str(output), "--timeout-seconds", "30"]
    assert run_ranks(run_rank, 2 * local_ranks, arguments, None, local_ranks) == [DONE] * 2 * local_ranks
    assert sorted(path.name for path in output.iterdir()) == ["n1.json", "n2.json"]
    assert main(["preflight", "--judge", str(output), "--nodes", "n[1-2]"]) == DONE
    assert "2 of 2 nodes are good" in capsys.readouterr().out
    first = read_evidence(output, job="").reports[0].all_reduce
    assert first.stages == ALL_STAGES
    assert first.bandwidth_gb_s > 0 < first.exchanges["n2"]
    assert (first.node_bandwidth_gb_s is None) == (local_ranks == 1)
    assert main(["preflight", "--judge", str(output), "--nodes", "2", "--min-bandwidth-gb-s", "1e6"]) != DONE


def test_a_dataset_that_differs_on_one_node_names_it(tmp_path, trajectory_corpus, ranking_corpus, capsys):
    directories = {name: tmp_path / name for name in ("n1", "n2", "n3")}
    for name, directory in directories.items():
        directory.mkdir()
        (directory / "dataset").symlink_to(ranking_corpus if name == "n2" else trajectory_corpus)
    (tmp_path / "run.yaml").write_text(CONFIG.format(directory=tmp_path, dataset="dataset"))
    output = tmp_path / "preflight"
    arguments = ["preflight", str(tmp_path / "run.yaml"), "--output", str(output), "--no-all-reduce"]
    assert run_ranks(run_rank, 3, arguments, directories) == [DONE] * 3
    assert main(["preflight", "--judge", str(output), "--nodes", "n1,n2,n3"]) == PREFLIGHT_FAILED
    assert "n2: the SHA-256 of the manifest of dataset dataset is " in capsys.readouterr().out
    assert (output / "bad_nodes").read_text() == "n2\n"


def test_one_process_judges_itself(config_path, tmp_path, small_data, capsys):
    arguments = ["preflight", str(config_path), "--output", str(tmp_path / "out"), "data.tokenizer=/gone"]
    assert run_ranks(_alone, 1, arguments) == [USER_ERROR]
    assert main([*arguments, "--no-all-reduce"]) == USER_ERROR
    assert "all nodes: data.tokenizer=/gone is not there" in capsys.readouterr().out


def _alone(arguments: list[str]) -> int:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return main(arguments)


def statuses_of(
    *ranks: dict[str, str], arguments: list[str], before=lambda: None, meanwhile=lambda pids: None
) -> list[int]:
    """Exit statuses of forked processes with these environments, of which some may be missing or hang."""
    pids = []
    for environment in ranks:
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                os.environ.update(environment, MASTER_ADDR="127.0.0.1")
                before()
                status = main(arguments)
            finally:
                os._exit(status)
        pids.append(pid)
    meanwhile(pids)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def rank_of(rank: int, node: str, local_rank: int, local_ranks: int, *, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_ranks),
        "SLURMD_NODENAME": node,
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_rank_that_never_comes_is_waited_for_so_long_and_its_node_is_named(config_path, tmp_path, capfd):
    output, port = tmp_path / "preflight", free_port()
    present = [rank_of(0, "n1", 0, 1, world_size=3, port=port), rank_of(1, "n2", 0, 2, world_size=3, port=port)]
    arguments = ["preflight", str(config_path), "--output", str(output), "--timeout-seconds", "3"]
    start = time.monotonic()
    assert statuses_of(*present, arguments=arguments) == [STALLED, STALLED]
    assert time.monotonic() - start < 15
    assert "rank 0 (n1): preflight gave up after 3 s of waiting for all 3 ranks to come" in capfd.readouterr().err
    assert main(["preflight", "--judge", str(output), "--nodes", "n1,n2"]) == PREFLIGHT_FAILED
    assert "n2: 1 of its 2 ranks came to meet the others" in capfd.readouterr().out
    assert (output / "bad_nodes").read_text() == "n2\n"
    assert main(["preflight", "--judge", str(output), "--nodes", "n1,n2,n3"]) == PREFLIGHT_FAILED


def test_a_first_rank_that_never_comes_is_named(config_path, tmp_path):
    output, port = tmp_path / "preflight", free_port()
    present = [rank_of(1, "n2", 0, 1, world_size=2, port=port)]
    arguments = ["preflight", str(config_path), "--output", str(output), "--timeout-seconds", "1"]
    assert statuses_of(*present, arguments=arguments) == [STALLED]
    assert main(["preflight", "--judge", str(output), "--nodes", "n1,n2"]) == PREFLIGHT_FAILED
    assert (output / "bad_nodes").read_text() == "n1\n"


def test_a_node_that_hangs_in_its_own_all_reduce_is_named(config_path, tmp_path, small_data):
    output, port = tmp_path / "preflight", free_port()
    ranks = [rank_of(i, f"n{i + 1}", 0, 1, world_size=2, port=port) for i in range(2)]
    arguments = ["preflight", str(config_path), "--output", str(output), "--timeout-seconds", "3"]

    def hang_on_the_second():
        if os.environ["RANK"] == "1":
            Measurement._add_in_node = lambda self: time.sleep(60)

    assert set(statuses_of(*ranks, arguments=arguments, before=hang_on_the_second)) == {STALLED}
    assert main(["preflight", "--judge", str(output), "--nodes", "n1,n2"]) == PREFLIGHT_FAILED
    assert (output / "bad_nodes").read_text() == "n2\n"


def test_a_rank_that_is_told_to_stop_writes_down_how_far_it_came(config_path, tmp_path, capfd):
    output = tmp_path / "preflight"
    rank = rank_of(0, "n1", 0, 1, world_size=2, port=free_port())
    arguments = ["preflight", str(config_path), "--output", str(output), "--timeout-seconds", "60"]

    def stop(pids: list[int]) -> None:
        deadline = time.monotonic() + 20
        while not (output / "n1.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(pids[0], signal.SIGTERM)

    assert statuses_of(rank, arguments=arguments, meanwhile=stop) == [STALLED]
    assert "rank 0 (n1): preflight was told to stop while it waited for" in capfd.readouterr().err
    evidence = read_evidence(output, job="")
    assert evidence.failures == ()
    assert evidence.reports[0].all_reduce.waited_for
    assert main(["preflight", str(config_path), "--output", str(output), "--judge", "--nodes", "2"]) == PREFLIGHT_FAILED


def test_what_hangs_on_the_node_itself_is_written_down(config_path, tmp_path, nvidia_smi):
    nvidia_smi("exec sleep 5")
    output, port = tmp_path / "preflight", free_port()
    rank = rank_of(0, "n1", 0, 1, world_size=2, port=port)
    arguments = ["preflight", str(config_path), "--output", str(output), "--timeout-seconds", "0.5"]
    assert statuses_of(rank, arguments=arguments) == [STALLED]
    (failure,) = read_evidence(output, job="").failures
    assert failure == Failure("n1", "", 0, "gave up waiting for nvidia-smi")


def test_a_rank_without_the_gpu_that_is_asked_for_fails_by_itself(config_path, tmp_path, capfd):
    output, port = tmp_path / "preflight", free_port()
    rank = rank_of(0, "n1", 0, 1, world_size=2, port=port)
    arguments = ["preflight", str(config_path), "--output", str(output), "run.device=cuda"]
    assert statuses_of(rank, arguments=arguments) == [USER_ERROR]
    assert "error: run.device=cuda, but torch sees no GPU" in capfd.readouterr().err
    assert main(["preflight", "--judge", str(output)]) == USER_ERROR
    assert "all nodes: rank 0 failed: run.device=cuda" in capfd.readouterr().out


def test_the_pairs_of_a_ring_come_once_and_no_node_has_two_partners_in_a_round():
    for count in range(8):
        rounds = rounds_of_a_ring(count)
        pairs = [frozenset(pair) for each in rounds for pair in each]
        assert len(pairs) == len(set(pairs)) == (count if count > 2 else max(0, count - 1))
        assert all(len({node for pair in each for node in pair}) == 2 * len(each) for each in rounds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preflight", "x.yaml"], "--output None"),
        (["preflight", "x.yaml", "--output", "out", "--timeout-seconds", "0"], "a limit above 0"),
        (["preflight", "--judge", "/nowhere/at/all"], "no such directory"),
    ],
)
def test_wrong_commands_are_refused_in_one_line(arguments, message, capsys):
    assert main(arguments) == USER_ERROR
    assert message in capsys.readouterr().err
