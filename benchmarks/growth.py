"""How the cost of a step grows: with K, with the length of answers, with layers, and with data-parallel ranks.

Each row changes one thing of a small model and a small batch and says by how much time grew, beside the growth of the
FLOPs that config/presets.py counts. Ranks each get the same work, so that a rank's time should stay what it is; their
seconds are the mean over the ranks, each a process on this machine. About seven minutes on two idle cores.
"""

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import torch
from arguments import positive
from trainer import Trainer, conditions, constant_rate

from megatron_polar.config.schema import DataSection, DatasetSource, ModelSection, RunConfig, RunSection, TrainSection
from megatron_polar.data.balancing import step_costs
from megatron_polar.data.template import TokenizedComparison

VOCAB_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of the work. Lengths are tokens."""

    candidates: int = 2
    answer: int = 200
    prompt: int = 150
    layers: int = 4
    layout: str = "shared_prefix"


VARIED = {
    "K": ("candidates", [Case(candidates=k) for k in (2, 4, 8)]),
    "K, packed": ("candidates", [Case(candidates=k, layout="packed") for k in (2, 4, 8)]),
    "answer tokens": ("answer", [Case(answer=n) for n in (100, 200, 400, 800)]),
    "layers": ("layers", [Case(layers=n) for n in (2, 4, 8, 16)]),
}


def main() -> None:
    """Measure all cases in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--comparisons", type=positive, default=2, help="of a step, on each rank")
    parser.add_argument("--hidden-size", type=positive, default=384)
    parser.add_argument("--ranks", type=positive, nargs="*", default=[1, 2, 4], help="data-parallel, on the CPU")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.as_rank:
        print(json.dumps(Measurement(options).of(Case(), repeats=options.repeats)))
        torch.distributed.destroy_process_group()
        return
    measurement = Measurement(options)
    cases = list(dict.fromkeys(case for _, column in VARIED.values() for case in column))
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for _ in range(options.repeats):
        for case in cases:
            seconds[case] += measurement.of(case, repeats=1)
    place = measurement.place
    torch.distributed.destroy_process_group()
    print("| varied | value | s/step | over the first | FLOPs over the first |")
    print("|---|---:|---:|---:|---:|")
    for name, (field, column) in VARIED.items():
        print_rows(name, [(getattr(case, field), seconds[case], measurement.flops[case]) for case in column])
    if place[0].kind == "cpu" and options.ranks:
        print_rows("ranks", [(number, of_ranks(number, options), 1) for number in options.ranks])
    print(
        f"\n{options.comparisons} comparisons a step, hidden {options.hidden_size}, prompts of 150 tokens, else K = 2, "
        f"answers of 200, 4 layers, one rank; medians of {options.repeats} repeats in turn; {conditions(place[0])}."
    )


def print_rows(name: str, column: list[tuple[int, list[float], int]]) -> None:
    """Value, seconds of every repeat and FLOPs of the cases of one column."""
    first = statistics.median(column[0][1]), column[0][2]
    for value, found, flops in column:
        time = statistics.median(found)
        print(f"| {name} | {value} | {time:.2f} | {time / first[0]:.2f}x | {flops / first[1]:.2f}x |", flush=True)


class Measurement:
    """Seconds of a step of any case, in this process."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.place, self.flops = options, None, {}

    def of(self, case: Case, *, repeats: int) -> list[float]:
        """Of `repeats` steps, after one of a single comparison that is not timed: the optimizer makes its state."""
        trainer = Trainer(make_config(case, self.options), vocab_size=VOCAB_SIZE, place=self.place)
        self.place = trainer.place
        own = draw(case, self.options.comparisons)
        self.flops[case] = flops_of(case, trainer, own)
        ranks = trainer.topology.dp_size
        trainer.step(own[:1] * ranks)
        return [trainer.step(own * ranks)[2] for _ in range(repeats)]


def of_ranks(number: int, options: argparse.Namespace) -> list[float]:
    """Mean CPU seconds of the ranks in every step of the first case, each rank with as much work as one alone has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--as-rank", "--repeats", str(options.repeats)]
    command += ["--comparisons", str(options.comparisons), "--hidden-size", str(options.hidden_size)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    processes = [
        subprocess.Popen(
            command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(number)
    ]  # fmt: skip
    said = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a rank of {number} failed:\n{said[0][1][-3000:]}")
    return [statistics.mean(step) for step in zip(*(json.loads(out.splitlines()[-1]) for out, _ in said), strict=True)]


def make_config(case: Case, options: argparse.Namespace) -> RunConfig:
    """fp32 on the CPU, bf16 on a GPU."""
    heads = options.hidden_size // 64
    model = ModelSection(
        num_layers=case.layers, hidden_size=options.hidden_size, ffn_hidden_size=4 * options.hidden_size,
        num_attention_heads=heads, num_query_groups=heads // 2, reward_head_init_std=0.02,
    )  # fmt: skip
    return RunConfig(
        run=RunSection(directory="unused"),
        model=model,
        data=DataSection(train=(DatasetSource("unused"),), layout=case.layout, max_tokens_per_micro_batch=16384),
        train=TrainSection(global_batch_size=1, num_steps=1, precision="bf16" if torch.cuda.is_available() else "fp32"),
        optimizer=constant_rate(1e-4),
    )


def draw(case: Case, count: int) -> list[TokenizedComparison]:
    """Comparisons of equal lengths."""
    generator = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return generator.integers(5, VOCAB_SIZE, length).astype(np.int32)

    levels = (0,) + (1,) * (case.candidates - 1)
    prefix = 2 * case.prompt + case.answer + 2
    return [
        TokenizedComparison(tokens(prefix), tuple(tokens(case.answer + 1) for _ in levels), levels, 0)
        for _ in range(count)
    ]


def flops_of(case: Case, trainer: Trainer, comparisons: list[TokenizedComparison]) -> int:
    """Of one step's forward passes."""
    return sum(step_costs(comparisons, layout=case.layout, architecture=trainer.model.architecture).flops)


if __name__ == "__main__":
    sys.exit(main())
