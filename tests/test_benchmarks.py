"""Benchmarks measure what they say."""

import argparse
import asyncio
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


SMALL = {
    "balance.py": (["--batches", "1"], "| 4096 | 512 | 2 |"),
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


@pytest.mark.parametrize("script", SMALL)
def test_a_benchmark_runs_to_its_table(script, tmp_path):
    """In small: what is measured is not looked at, but for TRL's losses."""
    options, row = SMALL[script]
    if script.startswith("trl"):
        options = [*options, "--output", str(tmp_path / "table.md")]
    command = [sys.executable, BENCHMARKS / script, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(row)]
    if script.startswith("trl"):
        assert float(line.split("|")[-2]) < 1e-5, "both trainers take the same steps"
        assert "<svg" in (tmp_path / "table.svg").read_text()


@pytest.fixture
def serving():
    spec = importlib.util.spec_from_file_location("serving_benchmark", BENCHMARKS / "serving.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
