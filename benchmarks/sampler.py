"""`megatron-polar sample` as a process of its own, what its journals hold, and the plain loops beside it."""

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import orjson

ROOT = Path(__file__).resolve().parents[1]
PER_PROMPT = 5  # two of the anchor, one each of three others


def start(pool: Path, output: Path, *options: str) -> subprocess.Popen:
    """Begin to sample, or go on."""
    command = [sys.executable, "-m", "megatron_polar", "sample", "--pool", str(pool), "--output", str(output), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def journal_lines(output: Path) -> list[dict]:
    """Every whole line of the journals, with `shard`, the number of its file."""
    return [
        {"shard": int(path.stem.rpartition("-")[2]), **orjson.loads(line)}
        for path in _journals(output)
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]


def count_journal_lines(output: Path) -> int:
    """How many lines the journals have, without reading them as JSON: to be asked again and again."""
    return sum(path.read_bytes().count(b"\n") for path in _journals(output))


def _journals(output: Path) -> list[Path]:
    return sorted((output / ".work").glob("answers-*.ndjson"))


def plain_loops(url: str, bodies: Sequence[dict], *, slots: int) -> dict[str, Callable[[], None]]:
    """The loop with one client for all requests, and with a client for each that is under way, as `sample` has."""
    return {
        "plain loop, one client": lambda: asyncio.run(_plain_loop(url, bodies, slots=slots, clients=1)),
        "plain loop, a client a slot": lambda: asyncio.run(_plain_loop(url, bodies, slots=slots, clients=slots)),
    }


async def _plain_loop(url: str, bodies: Sequence[dict], *, slots: int, clients: int) -> None:
    """What one would write in ten lines: so many workers, httpx, all answers in a list; it keeps and checks nothing."""
    limits, encryption = httpx.Limits(max_connections=None), ssl.create_default_context()  # 20 ms, so once for all
    pool = [httpx.AsyncClient(timeout=60, limits=limits, verify=encryption) for _ in range(clients)]
    waiting, texts = iter(bodies), []

    async def work(http: httpx.AsyncClient) -> None:
        for body in waiting:
            response = await http.post(f"{url}/v1/completions", json=body)
            texts.append(response.json()["choices"][0]["text"])

    await asyncio.gather(*(work(pool[slot % clients]) for slot in range(slots)))
    assert len(texts) == len(bodies)
    for http in pool:
        await http.aclose()
