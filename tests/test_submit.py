"""slurm/launch.sh and the arrays before anything is submitted; sbatch is a stand-in that echoes. With a real Slurm:
test_slurm.py."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import chat_server
import pytest
from conftest import write_trajectories

from megatron_polar.config.load import load_config
from megatron_polar.launch import submit
from megatron_polar.launch.request import Shape, minutes_of, parse_request, shape_of
from megatron_polar.launch.submit import USAGE, main

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = """
run: {directory: runs/x}
model: {preset: nano, vocab_size: 420}
data: {train: [{path: nowhere}]}
train: {global_batch_size: 8, num_steps: 4, precision: fp32}
optimizer: {lr: 1e-3}
"""


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Run slurm/launch.sh, or another script, with a stand-in for sbatch."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def run(*words: str, script: str = "launch.sh", says: str = "echo stand-in: $@ >&2; echo 7", **environment: str):
        (programs / "sbatch").write_text(f"#!/bin/sh\n{says}\n")
        (programs / "sbatch").chmod(0o755)
        site = {"POLAR_PYTHON": sys.executable, "POLAR_SITE": "/dev/null", "PATH": f"{programs}:{os.environ['PATH']}"}
        command, variables = [REPOSITORY / "slurm" / script, *words], os.environ | site | environment
        return subprocess.run(command, env=variables, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    return run


def refusal(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    assert "stand-in: --nodes" not in done.stderr  # nothing but --test-only
    return " ".join(done.stderr.split())


# --- The command line ------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_command(launch, config):
    words = ("--dry-run", "--no-paths", "--gpus-per-node=2", "--ntasks-per-node=2", config, "run.device=cpu")
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    job = f"slurm/train.sh {config} run.device=cpu"
    assert f"would submit: sbatch --nodes=1 --gpus-per-node=2 --ntasks-per-node=2 {job}" in done.stdout
    assert "run.device=cpu, so the GPUs of the job will be idle" in done.stdout
    assert "stand-in: --test-only --nodes=1" in done.stdout


@pytest.mark.parametrize(
    ("kept_out", "options"),
    [
        ("ALL,MINE=1", []),
        ("NONE", ["--export=POLAR_CHAIN,POLAR_REQUEUE", "--get-user-env"]),
        ("NIL", ["--export=POLAR_CHAIN,POLAR_REQUEUE"]),
        ("HOME,MINE=1", ["--export=HOME,MINE=1,POLAR_CHAIN,POLAR_REQUEUE"]),
    ],
)
@pytest.mark.parametrize("by_option", [True, False])
def test_the_jobs_of_a_chain_know_of_it_where_a_site_keeps_variables_out(by_option, kept_out, options, launch, config):
    words = ["--no-paths", "--chain=2", *([f"--export={kept_out}"] if by_option else []), config, "run.device=cpu"]
    says = "echo $POLAR_CHAIN stand-in: $@ >&2"
    done = launch(*words, says=says, **({} if by_option else {"SBATCH_EXPORT": kept_out}))
    assert done.returncode == 0, done.stderr
    submitted = [line.split() for line in done.stderr.splitlines() if "stand-in: --nodes" in line]
    assert len(submitted) == 2
    for words in submitted:
        place = words.index("--no-requeue") + 1
        assert words[place : words.index("slurm/train.sh")] == options
        assert words[0].startswith("polar-")


def test_without_a_dry_run_it_submits_as_often_as_a_chain_has_jobs(launch, config):
    done = launch("--no-paths", "--chain", "3", config, "run.device=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--dependency=singleton --job-name=polar-x-") == 3
    assert "to stop with a checkpoint: touch" in done.stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--account", "foo", "CONFIG"], ("foo: no such file", "one word: --account=foo")),
        (["-A", "foo", "CONFIG"], ("foo: no such file", "one word: -Afoo)")),
        (["missing.yaml"], ("missing.yaml: no such file in", "examples/pretrain_7b.yaml")),
        (["CONFIG", "--nodes=2"], ("--nodes=2 comes after", "go before it")),
        (["CONFIG", "--dry-run"], ("--dry-run comes after",)),
        (["--nodes=2-4", "CONFIG"], ("--nodes=2-4", "one number of nodes")),
        (["--chain", "CONFIG"], ("--chain", "not a number of jobs")),
        (["--chain=0", "CONFIG"], ("--chain 0", "give 1 or more")),
        (["slurm/task.sh"], ("slurm/task.sh: is no job script", "slurm/train.sh")),
        (["slurm/preprocess.sh", "x"], ("slurm/preprocess.sh", "submits its parts itself")),
        (["slurm/train.sh"], ("the YAML: no such file",)),
        (["--gpus-per-node=h100:4", "CONFIG"], ("8 ranks for 4 GPUs", "--ntasks-per-node=4, too")),
        (["--gpus-per-node=h100", "CONFIG"], ("--gpus-per-node=h100: give a number, too, such as h100:8",)),
        (["--dry-run", "CONFIG", "model.vocab_size=421", "data.tokenizer=none"], ("2 problems", "data.tokenizer")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_named_with_its_remedy(words, parts, launch, config):
    said = refusal(launch(*(config if word == "CONFIG" else word for word in words), POLAR_RUNTIME="pyxis",
                          POLAR_CONTAINER_IMAGE="image.sqsh", POLAR_VENV=sys.prefix))  # fmt: skip
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"POLAR_LAUNCHER": "mpirun"}, "POLAR_LAUNCHER=mpirun is unknown"),
        ({"POLAR_PREFLIGHT": "on"}, "POLAR_PREFLIGHT=on is unknown"),
        ({"POLAR_RUNTIME": "docker"}, "POLAR_RUNTIME=docker is unknown"),
        ({"POLAR_SITE": "/none"}, "POLAR_SITE=/none: no such file"),
        ({"POLAR_PYTHON": "/none"}, "/none is no Python"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_wrong_setting_is_named(environment, part, launch, config):
    assert part in refusal(launch("--dry-run", config, **environment))


def test_help_says_how(launch, capsys):
    assert USAGE in launch("--help").stdout
    assert refusal(launch()).startswith("Check a job")
    assert main([]) == 2


# --- Checks ----------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_said_at_once(launch, config, monkeypatch):
    done = launch("--dry-run", config, says="echo sbatch: error: invalid partition specified: gpu >&2; exit 1")
    said = refusal(done)
    assert "data.train[0].path=nowhere: no such directory" in said
    assert "Slurm refuses it: sbatch: error: invalid partition specified: gpu (slurm/site.env sets" in said
    assert "dry run; would submit: sbatch --nodes=1" in done.stdout


@pytest.mark.skipif("+cpu" not in __import__("torch").__version__, reason="torch knows GPUs")
def test_an_environment_without_gpus_is_refused_for_a_job_with_some(launch, config):
    said = refusal(launch("--no-paths", config))
    assert "knows no GPU, and the job would train on CPUs; set POLAR_VENV" in said
    assert "run.device=cpu" in said


@pytest.mark.parametrize(
    ("installed", "impl", "runtime", "part"),
    [
        ({"torch": "2.13.0"}, "transformer_engine", "venv", "has no transformer-engine, and model.transformer_impl="),
        ({"torch": "2.13.0"}, "auto", "venv", None),
        ({"torch": "2.13.0"}, "transformer_engine", "pyxis", None),
        ({"torch": "2.11.0", "transformer-engine": "2.11.0"}, "transformer_engine", "venv", None),
        ({"torch": "2.13.0+cpu"}, "transformer_engine", "venv", "torch 2.13.0+cpu of"),
        ({}, "transformer_engine", "venv", None),
    ],
)
def test_an_environment_must_have_what_the_job_insists_on(installed, impl, runtime, part, config, monkeypatch):
    def version(distribution: str) -> str:
        if distribution not in installed:
            raise metadata.PackageNotFoundError(distribution)
        return installed[distribution]

    monkeypatch.setattr(metadata, "version", version)
    site = submit.Site("srun", runtime, ranks_per_node=None, gpu_memory_gb=80.0, cpu_partition="")
    wanted = load_config(Path(config), [f"model.transformer_impl={impl}"])
    problems = submit._environment_problems(wanted, Shape(1, num_gpus=8, num_ranks=8), site=site)
    assert len(problems) == (part is not None)
    assert (part or "") in "".join(problems)


def test_a_signal_of_the_users_own_is_left_alone(launch, config):
    words = ("--dry-run", "--no-paths", "--time=30", config, "run.device=cpu")
    assert "--signal=B:USR1@450" in launch(*words).stdout
    said = launch(*words[:2], "--signal=B:USR1@600", *words[2:]).stdout
    assert "would submit: sbatch --nodes=1 --signal=B:USR1@600 --time=30 slurm/train.sh" in said


def test_a_machine_without_a_slurm_is_told_from_a_refusal(launch, config):
    words = ("--dry-run", "--no-paths", config, "run.device=cpu")
    unreachable = launch(*words, says="echo fatal: Could not establish a configuration source >&2; exit 1")
    assert "Slurm cannot be reached from here; run this on a login node" in refusal(unreachable)
    assert "would submit" in unreachable.stdout


def test_a_yaml_finds_its_script_by_any_name(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for name in ("examples/pretrain_7b.yaml", "./examples/../examples/pretrain_7b.yaml",
                 str(REPOSITORY / "examples" / "pretrain_7b.yaml")):  # fmt: skip
        request = parse_request([name, "optimizer.lr=1e-5"])
        assert (str(request.job), request.arguments) == ("slurm/pretrain_7b.sh", ("optimizer.lr=1e-5",))
        assert shape_of(request, launcher="srun", ranks_per_node=None).num_nodes == 16


def test_torchrun_takes_the_gpus_of_a_node_and_one_task(monkeypatch, launch, config):
    monkeypatch.chdir(REPOSITORY)
    request = parse_request(["--gpus-per-node=4", config])
    assert shape_of(request, launcher="torchrun", ranks_per_node=None).num_ranks == 4
    done = launch("--dry-run", "--no-paths", "--gpus-per-node=4", config, "run.device=cpu", POLAR_LAUNCHER="torchrun")
    assert "--gpus-per-node=4 --ntasks-per-node=1 slurm/train.sh" in done.stdout
    many = launch("--gpus-per-node=4", config, POLAR_LAUNCHER="torchrun", POLAR_RANKS_PER_NODE="8")
    assert "8 ranks for 4 GPUs of a node; set POLAR_RANKS_PER_NODE=4" in refusal(many)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("10:30", 10), ("1:30:00", 90), ("2-0", 2880), ("1-12:30", 2190), ("0-1:05:59", 65), ("soon", None)],
)
def test_times_are_read_as_slurm_writes_them(text, minutes):
    assert minutes_of(text) == minutes


# --- Other jobs ------------------------------------------------------------------------------------------------------


def test_jobs_without_gpus_go_to_their_partition(launch):
    words = ("slurm/convert.sh", "from-hf", "--model", "x", "--output", "y")
    assert "--partition=cpu slurm/convert.sh from-hf" in launch("--dry-run", *words, POLAR_CPU_PARTITION="cpu").stdout
    done = launch("--partition=other", *words, POLAR_CPU_PARTITION="cpu")
    assert "stand-in: --partition=other slurm/convert.sh from-hf --model x --output y" in done.stderr
    assert "--partition" not in launch("slurm/evaluate.sh", "--suite=x", POLAR_CPU_PARTITION="cpu").stderr


def test_an_array_is_checked_before_it_is_submitted(launch, tokenizer_path, tmp_path):
    source = write_trajectories(tmp_path / "input.jsonl", num_prompts=3, seed=1)
    good = [str(source), f"--output={tmp_path}/out", f"--tokenizer={tokenizer_path}"]
    for words, part in (
        (["trajectories/", *good[1:]], "trajectories: no such file"),
        ([*good, "--tokenizr=x"], "unrecognized arguments: --tokenizr=x"),
        (good[:2], "--tokenizer"),
    ):
        assert part in refusal(launch(*words, script="preprocess.sh"))
    assert "POLAR_PARTS=x is not a number of parts" in refusal(launch(*good, script="preprocess.sh", POLAR_PARTS="x"))
    assert "--pool" in refusal(launch("--output=x", script="sample.sh"))
    for script in ("preprocess.sh", "sample.sh"):
        assert "POLAR_PARTS=32" in launch("--help", script=script).stdout
        assert launch(script=script).returncode == 2
    says = "echo partition $SBATCH_PARTITION: $@ >&2; echo 7"
    done = launch(*good, script="preprocess.sh", says=says, POLAR_PARTS="2", POLAR_CPU_PARTITION="cpu")
    assert done.returncode == 0, done.stderr
    assert "partition cpu: --parsable --array=0-1 slurm/preprocess.sh" in done.stderr
    assert "submitted: 2 parts as job 7, and job 7, which joins them" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_job_of_the_array_samples_from_servers(launch, tmp_path):
    """With the cores of its job, that only embedded policies need."""
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    srun.chmod(0o755)
    job = {"SLURMD_NODENAME": "node1", "SLURM_CPUS_PER_TASK": "16"}
    told, kept_out = {"POLAR_PARTS": "2"}, {"SLURM_ARRAY_TASK_COUNT": "2"}  # by the shell; by Slurm with --export=NONE
    with chat_server.running("a", "b") as server:
        entries = [f"- {{name: {m}, endpoint: '{server.url}', model: {m}, api: completions}}\n" for m in "ab"]
        (tmp_path / "pool.yaml").write_text("policies:\n" + "".join(entries))
        words = [f"--pool={tmp_path}/pool.yaml", f"--output={tmp_path}/out", "--num-prompts=6", "--prompts-per-shard=3"]
        for part in ({"SLURM_ARRAY_TASK_ID": "0"} | told, {"SLURM_ARRAY_TASK_ID": "1"} | kept_out, {}):
            done = launch(*words, script="sample.sh", **job, **part)
            assert done.returncode == 0, done.stderr
        assert set(server.counts()["answered"].values()) == {1} and server.counts()["seen"] == 18
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_job_script_that_is_run_in_a_shell_says_what_to_do_with_it(launch):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "POLAR"))}
    script = REPOSITORY / "slurm" / "train.sh"
    done = subprocess.run(["bash", script, "x.yaml"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "this is a job script: give it to sbatch or slurm/launch.sh" in done.stderr
