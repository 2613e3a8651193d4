"""Speed and memory of `preprocess`: MB/s per core and tokens/s, and peak memory for an input and ten times that input.

Speed is in process CPU time (parent and workers together), so that a busy machine changes little. MB are 10^6 bytes of
JSONL text. Without --input, text is made from a seed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

from arguments import positive
from machine import cpu_name

from megatron_polar.data.corpus import preprocess
from megatron_polar.data.lines import read_jsonl
from megatron_polar.data.tokenizer_training import train_tokenizer
from megatron_polar.data.units import UNIT_BYTES

PACKAGES = ("sentencepiece", "tokenizers", "orjson", "numpy", "xxhash", "zstandard")


def make_input(path: Path, *, megabytes: float, seed: int) -> None:
    """Write groups of five trajectories of three policies over a made-up language with Zipf's word frequencies."""
    choose = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bcdfghklmnprstvz" for vowel in "aeiou"]
    words = ["".join(choose.choices(syllables, k=choose.randrange(1, 5))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]

    def text(count: int) -> str:
        return " ".join(choose.choices(words, weights, k=count)).replace(" ba ", ".\n")

    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            policies = choose.sample(range(64), k=3)
            names = [policies[0], *policies, policies[1]]
            items = [{"policy": f"policy {name}", "text": text(choose.randrange(50, 500))} for name in names]
            file.write(json.dumps({"prompt": text(choose.randrange(5, 200)), "trajectories": items}) + "\n")


def peak_megabytes(process: int) -> float:
    """Peak resident memory of a running process; rusage would count what its parent had when it was forked."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


class WorkerMemory(threading.Thread):
    """Looks at the peak memory of this process' children every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._stop_looking = 0.0, threading.Event()

    def run(self) -> None:
        while not self._stop_looking.wait(0.02):
            children = [process.pid for process in multiprocessing.active_children()]
            self.peak = max([self.peak, *map(peak_megabytes, children)])

    def stop(self) -> float:
        self._stop_looking.set()
        self.join()
        return self.peak


def measure(source: Path, *, output: Path, tokenizer: Path, workers: int, unit_bytes: int) -> dict:
    """Run preprocess here and return seconds, CPU seconds, tokens and peak memory (parent, largest worker)."""
    memory = WorkerMemory()
    memory.start()
    start = time.perf_counter()
    report = preprocess([source], output=output, tokenizer_path=tokenizer, num_workers=workers, unit_bytes=unit_bytes)
    seconds = time.perf_counter() - start
    peaks = [peak_megabytes(os.getpid()), memory.stop()]
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu_seconds = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    megabytes = sum(len(line) + 1 for _, line in read_jsonl(source)) / 1e6
    return {
        "megabytes": round(megabytes, 2),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "tokens": report.tokens,
        "megabytes_per_second_per_core": round(megabytes / cpu_seconds, 3),
        "tokens_per_second_per_core": round(report.tokens / cpu_seconds),
        "peak_parent_megabytes": round(peaks[0], 1),
        "peak_worker_megabytes": round(peaks[1], 1),
    }


def measure_in_new_process(source: Path, *, output: Path, tokenizer: Path, workers: int, unit_bytes: int) -> dict:
    """`measure` in a process of its own, whose CPU time and memory are of this run alone."""
    paths = ["--input", source, "--measure-into", output, "--tokenizer", tokenizer]
    command = [sys.executable, __file__, *paths, "--workers", workers, "--unit-bytes", unit_bytes]
    return json.loads(subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, help="a JSONL file to use instead of made-up text")
    parser.add_argument("--tokenizer", type=Path, help="default: a sentencepiece model trained on the input")
    parser.add_argument(
        "--megabytes", type=float, default=20.0, help="size of the made-up input; the other is ten times it"
    )
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--unit-bytes", type=positive, default=UNIT_BYTES, help="size of a work unit")
    parser.add_argument("--measure-into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_into:
        figures = measure(
            arguments.input,
            output=arguments.measure_into,
            tokenizer=arguments.tokenizer,
            workers=arguments.workers,
            unit_bytes=arguments.unit_bytes,
        )
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as scratch:
        figures = compare(Path(scratch), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(scratch: Path, arguments: argparse.Namespace) -> dict:
    """Measure an input and ten times that input, print a table and return the figures."""
    once, ten_times = scratch / "once.jsonl", scratch / "ten_times.jsonl"
    if arguments.input:
        once.write_bytes(b"".join(line + b"\n" for _, line in read_jsonl(arguments.input)))
    else:
        make_input(once, megabytes=arguments.megabytes, seed=arguments.seed)
    with ten_times.open("wb") as file:
        for _ in range(10):
            file.write(once.read_bytes())
    tokenizer = arguments.tokenizer
    if tokenizer is None:
        sample = (line.decode("utf-8") for _, line in read_jsonl(once))
        tokenizer = train_tokenizer(sample, vocab_size=8000, output=scratch / "t.model", max_texts=1000)
    runs = {}
    for name, source in (("x1", once), ("x10", ten_times)):
        runs[name] = measure_in_new_process(
            source,
            output=scratch / f"out-{name}",
            tokenizer=tokenizer,
            workers=arguments.workers,
            unit_bytes=arguments.unit_bytes,
        )
    peaks = ("peak_parent_megabytes", "peak_worker_megabytes")
    growth = max(runs["x10"][peak] / runs["x1"][peak] for peak in peaks if runs["x1"][peak])
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    machine = {"machine": cpu_name(), "workers": arguments.workers}
    print(
        f"{'input':>5} {'MB':>8} {'s':>7} {'MB/s/core':>10} {'tokens/s/core':>14} {'parent MB':>10} {'worker MB':>10}"
    )
    for name, run in runs.items():
        speeds = f"{run['megabytes_per_second_per_core']:>10.3f} {run['tokens_per_second_per_core']:>14,}"
        print(
            f"{name:>5} {run['megabytes']:>8.1f} {run['seconds']:>7.1f} {speeds} "
            + " ".join(f"{run[p]:>10.1f}" for p in peaks)
        )
    print(f"peak memory at ten times the input: x {growth:.2f}")
    print(", ".join(f"{name} {value}" for name, value in {**machine, **versions}.items()))
    return {"runs": runs, "peak_memory_growth": round(growth, 3), **machine, "versions": versions}


if __name__ == "__main__":
    main()
