"""Benchmarks measure what they say."""

import argparse
import asyncio
import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


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
