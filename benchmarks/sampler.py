"""`megatron-polar sample` as a process of its own, and what its journals hold: for the benchmarks of sampling."""

import os
import subprocess
import sys
from pathlib import Path

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
