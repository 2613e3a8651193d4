"""Loaders: torch's and DALI's, with and without worker processes. How long the training process waits for a step, and
the CPU time that a step costs in all processes together.

Steps of the length mix of layouts.py from a dataset that is made for it. `waiting` is what is left of making a step
while training takes `--step-seconds` (asleep here): the share of a step's time that no worker hides.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from arguments import not_negative, positive
from machine import cpu_name

from megatron_polar.config.presets import PRESETS
from megatron_polar.config.schema import DataSection, DatasetSource
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.corpus import preprocess
from megatron_polar.data.loader import load_steps
from megatron_polar.data.steps import RowShape, StepDataset
from megatron_polar.data.tokenizer_training import train_tokenizer


def main() -> None:
    """Measure all loaders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--global-batch-size", type=positive, default=256)
    parser.add_argument("--ranks", type=positive, default=16, help="data-parallel; one of them is played")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--workers", type=not_negative, nargs="+", default=[0, 1, 2])
    parser.add_argument("--step-seconds", type=float, default=0.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        corpus = make_corpus(Path(directory))
        print("| loader | workers | waiting, ms | share of the step | CPU ms a step, all processes |")
        print("|---|---:|---:|---:|---:|")
        for loader in ("torch", "dali") if find_spec("nvidia.dali") else ("torch",):
            for workers in options.workers:
                print(measure(corpus, options, loader=loader, workers=workers), flush=True)
    dali = f", nvidia-dali {version('nvidia-dali-cuda130')}" if find_spec("nvidia.dali") else ""
    print(
        f"\n{options.global_batch_size} comparisons a step over {options.ranks} data-parallel ranks, rows of 16384 "
        f"tokens, {options.steps} steps of {options.step_seconds} s; medians; torch {version('torch')}{dali}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores of {cpu_name()}."
    )


def make_corpus(directory: Path) -> Path:
    """A dataset of 600 prompts with three policies' answers, in the benchmarks' lengths."""
    generator = np.random.default_rng(0)
    words = [f"w{number}" for number in range(300)]

    def text(count: int) -> str:
        return " ".join(generator.choice(words, max(1, int(count / 3.5))))  # so many tokens a word

    def answer() -> int:
        return int(np.clip(np.exp(np.log(400) - 0.32 + 0.8 * generator.standard_normal()), 8, 4000))

    source = directory / "input.jsonl"
    with source.open("w") as file:
        for _ in range(600):
            items = [{"policy": name, "text": " " + text(answer())} for name in ("a", "a", "b", "c")]
            file.write(json.dumps({"prompt": text(int(generator.integers(50, 601))), "trajectories": items}) + "\n")
    tokenizer = train_tokenizer([" ".join(words)] * 20, vocab_size=275, output=directory / "t.model")
    preprocess([source], output=directory / "dataset", tokenizer_path=tokenizer)
    return directory / "dataset"


def measure(corpus: Path, options: argparse.Namespace, *, loader: str, workers: int) -> str:
    """One row of the table."""
    comparisons = ComparisonDataset(
        [DatasetSource(str(corpus))], seed=1, candidates_per_comparison=2, max_sequence_length=16384
    )
    shape = RowShape(
        layout="shared_prefix", max_tokens=16384, pad_to_multiple=16, num_ranks=options.ranks,
        micro_batches_multiple_of=1, architecture=PRESETS["polar_7b"],
    )  # fmt: skip
    dataset = StepDataset(comparisons, global_batch_size=options.global_batch_size, rank=0, shape=shape)
    data = DataSection(train=(), num_workers=workers, loader=loader, prefetch_factor=2)
    before, waits = cpu_seconds(), []
    start = time.monotonic()
    for _ in load_steps(dataset, start=0, stop=options.steps, data=data):
        waits.append(time.monotonic() - start)
        time.sleep(options.step_seconds)
        start = time.monotonic()
    spent = (cpu_seconds() - before) / options.steps
    wait = statistics.median(waits[2:])  # the first ones wait for the workers to start
    share = wait / (wait + options.step_seconds)
    return f"| {loader} | {workers} | {1e3 * wait:.1f} | {share:.1%} | {1e3 * spent:.0f} |"


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    sys.exit(main())
