"""Benchmarks measure what they say."""

import argparse
import asyncio
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_polar.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


SMALL = {
    "balance.py": (["--batches", "1"], "| 4096 | 512 | 2 |"),
    "fit_known_laws.py": (["--studies", "3", "--joint-studies", "2", "--replicates", "10"], "| 100x | 2% |"),
    "fp8_twins.py": (
        ["--variants", "bf16", "fp32", "--steps", "4", "--batch", "2", "--held-out", "3", "--seeds", "0", "1"],
        "| bf16, another seed |",
    ),
    "growth.py": (
        ["--repeats", "1", "--comparisons", "1", "--hidden-size", "128", "--ranks", "1", "2"],
        "| ranks | 2 |",
    ),
    "last_layer.py": (["--layers", "1", "--repeats", "1"], "| polar_72b | 80 |"),
    "loaders.py": (["--steps", "3", "--step-seconds", "0.05", "--workers", "0"], "| dali | 0 |"),
    "plan.py": ([], "| 16B | 192 | TP4 PP1 |"),
    "sampling.py": (
        ["--requests", "100", "--kills", "1", "--delay", "0.02", "--compared", "50", "--rounds", "1"],
        "| 100 |",
    ),
    "throughput.py": (
        ["--preset", "nano", "--row-tokens", "2048", "--rows", "1", "--steps", "1"],
        "| fp32 | 4 | packed |",
    ),
    "trl_reward_trainer.py": (
        [
            "--steps",
            "2",
            "--global-batch-size",
            "1",
            "--hidden-size",
            "128",
            "--repeats",
            "1",
            "--trl-batch-sizes",
            "1",
        ],
        "| TRL, 1 pairs a forward pass |",
    ),
}


WITH_CURVES = ("trl_reward_trainer.py", "fp8_twins.py")
"""They write their table and a picture to files."""


@pytest.mark.parametrize("script", SMALL)
def test_a_benchmark_runs_to_its_table(script, tmp_path):
    """In small: what is measured is not looked at, but for TRL's losses."""
    options, row = SMALL[script]
    if script in WITH_CURVES:
        options = [*options, "--output", str(tmp_path / "table.md")]
    command = [sys.executable, BENCHMARKS / script, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(row)]
    if script.startswith("trl"):
        assert float(line.split("|")[-2]) < 1e-5, "both trainers take the same steps"
    if script in WITH_CURVES:
        assert "<svg" in (tmp_path / "table.svg").read_text()
        assert line in (tmp_path / "table.md").read_text()


def load(name: str, monkeypatch):
    """A benchmark as a module; it imports its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def serving(monkeypatch):
    return load("serving", monkeypatch)


# --- Precision twins -------------------------------------------------------------------------------------------------


@pytest.fixture
def twins(monkeypatch):
    return load("fp8_twins", monkeypatch)


def run_of(twins, variant, seed, *, losses, rewards):
    return twins.Run(variant, seed, losses, rewards, 1.0)


def test_a_twin_is_compared_by_loss_accuracy_margin_and_ranks(twins):
    bf16 = run_of(twins, "bf16", 0, losses=[1.0] * 20, rewards=[[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    fp8 = run_of(twins, "fp8", 0, losses=[1.1] * 10 + [1.01] * 10, rewards=[[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    found = twins.compare(fp8, bf16)
    assert found.final_loss == pytest.approx(1)
    assert found.largest_loss == pytest.approx(10)
    assert found.accuracy == pytest.approx(-0.5)  # every pair of the second comparison is wrong
    assert found.margin == pytest.approx(-2)  # 2 in one comparison, -2 in the other
    assert found.kendall == pytest.approx(0)  # agreement of 1 and of -1
    assert found.spearman == pytest.approx(0)
    same = twins.compare(bf16, bf16)
    assert (same.final_loss, same.kendall, same.spearman) == (0, pytest.approx(1), pytest.approx(1))


def test_the_floor_of_noise_is_the_reference_against_its_other_seeds(twins):
    ranked = [[1.0, 0.0]]
    runs = [
        run_of(twins, variant, seed, losses=[loss * (1 + seed)], rewards=ranked)
        for variant, loss in (("bf16", 1.0), ("fp32", 1.1))
        for seed in (0, 1, 2)
    ]
    found = twins.differences(runs, ["bf16", "fp32"])
    assert [round(one.final_loss) for one in found["fp32"]] == [10, 10, 10]
    assert [round(one.final_loss) for one in found["seed"]] == [-50, -33, 200]
    # Half-width of a t interval of three values 1, 2, 3: 4.303 / sqrt(3).
    assert twins.interval([1.0, 2.0, 3.0]) == "+2.000 ± 2.484"


def test_what_this_machine_cannot_run_is_refused_before_anything_is_trained(twins):
    with pytest.raises(UserError, match=r"--variants tensorwise: FP8 needs a Hopper GPU .* --variants bf16 fp32"):
        twins.check_variants(["bf16", "tensorwise"])
    with pytest.raises(UserError, match="'fp9' is none of bf16, fp32, tensorwise"):
        twins.check_variants(["bf16", "fp9"])
    with pytest.raises(UserError, match="give at least two"):
        twins.check_variants(["bf16"])
    twins.check_variants(["bf16", "fp32"])


# --- The hour on a GPU -----------------------------------------------------------------------------------------------

HOUR = BENCHMARKS / "gpu_hour.sh"


def test_every_part_of_the_hour_is_a_command_that_exists():
    done = subprocess.run([HOUR, "--dry-run"], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines][:4] == ["environment", "parity", "runs", "throughput_7b"]
    assert sum(int(minutes) for _, minutes, *_ in lines) <= 60
    for *_, command in lines:
        words = command.split()
        script = ROOT / next(word for word in words if word.endswith(".py"))
        source = script.read_text()
        if script.parent == BENCHMARKS:
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in source, f"{script.name} has no {option}"
    assert not Path("gpu_hour").exists()


def test_the_hour_stops_with_what_is_missing_and_runs_no_part_twice(tmp_path):
    script = tmp_path / "python"
    answer = 'case "$*" in *gpu_environment*) exit "$ENVIRONMENT" ;; esac'
    script.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n{answer}\n')
    script.chmod(0o755)

    def run(environment: int, *options: str) -> subprocess.CompletedProcess:
        variables = {"PATH": "/usr/bin:/bin", "PYTHON": str(script), "ENVIRONMENT": str(environment)}
        command = [HOUR, "--output", str(tmp_path / "out"), *options]
        return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)

    assert run(1).returncode == 1
    assert (tmp_path / "asked").read_text().splitlines() == ["benchmarks/gpu_environment.py"]
    done = run(0, "--only", "environment", "layouts")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/layouts.done").exists()
    again = run(0, "--only", "environment", "layouts", "no_fusion")
    assert "layouts: done before" in again.stdout
    asked = (tmp_path / "asked").read_text()
    assert asked.count("layouts.py") == 1
    assert asked.count("--no-fusion") == 1
    assert (tmp_path / "out/summary.txt").read_text().count("status 0") == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [("--only nothing", "nothing is no part"), ("--minutes 0", "above 0"), ("--te none", "none: no")],
)
def test_the_hour_refuses_what_it_does_not_know(options, said, tmp_path):
    done = subprocess.run([HOUR, *options.split()], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_shellcheck_finds_nothing_in_the_hour():
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck")
    subprocess.run([checker, HOUR], check=True)


# --- Serving ---------------------------------------------------------------------------------------------------------


def test_no_prompt_is_asked_twice_of_a_server_and_all_servers_are_asked_the_same(serving, monkeypatch):
    asked = {}

    async def ask(http, server, items):
        asked.setdefault(server.name, []).append([items[0].prompt, *(item.output for item in items)])
        await asyncio.sleep(0.001)
        return [0.0] * len(items)

    monkeypatch.setattr(serving, "ask", ask)
    monkeypatch.setattr(serving, "cpu_seconds", lambda url: 0.0)
    monkeypatch.setattr(serving, "report", lambda *arguments, **keywords: "")
    servers = [serving.Server(name, "http://127.0.0.1:1", "vllm", "internlm2", None) for name in ("ours", "other")]
    options = argparse.Namespace(outputs=[1, 8], clients=[1, 8], rounds=2, seconds=0.01, seed=0)
    asyncio.run(serving.measure(servers, options))
    for found in asked.values():
        prompts = [prompt for prompt, *_ in found[2:]]  # the first two compare the servers' rewards
        assert len(set(prompts)) == len(prompts) >= 16
    ours, other = ({tuple(texts) for texts in found} for found in asked.values())
    assert len(ours & other) >= 16, "the first requests of every case and round"
