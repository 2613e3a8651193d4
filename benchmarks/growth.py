"""How the cost of a step grows: with K, with the length of answers and with layers, on one rank.

Each row changes one thing of a small model and a small batch and says by how much time grew, beside the growth of the
FLOPs that config/presets.py counts.
"""

import argparse
import dataclasses
import os
import statistics
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import torch
from trainer import Trainer, conditions, constant_rate

from megatron_polar.config.schema import DataSection, DatasetSource, ModelSection, RunConfig, RunSection, TrainSection
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
    "K": [Case(candidates=k) for k in (2, 4, 8, 16)],
    "K, packed": [Case(candidates=k, layout="packed") for k in (2, 4, 8, 16)],
    "answer tokens": [Case(answer=n) for n in (100, 200, 400, 800)],
    "layers": [Case(layers=n) for n in (2, 4, 8, 16)],
}


def main() -> None:
    """Measure all cases in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--comparisons", type=int, default=4, help="of a step")
    parser.add_argument("--hidden-size", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(dict.fromkeys(case for column in VARIED.values() for case in column))
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    flops, place = {}, None
    for _ in range(options.repeats):
        for case in cases:
            trainer = Trainer(make_config(case, options), vocab_size=VOCAB_SIZE, place=place)
            comparisons = draw(case, options.comparisons)
            trainer.step(comparisons)  # a warm-up: the optimizer makes its state
            seconds[case].append(trainer.step(comparisons)[2])
            flops[case], place = flops_of(case, trainer, options.comparisons), trainer.place
    median = {case: statistics.median(found) for case, found in seconds.items()}
    print("| varied | value | s/step | over the first | FLOPs over the first |")
    print("|---|---:|---:|---:|---:|")
    for name, column in VARIED.items():
        field = {"K": "candidates", "K, packed": "candidates", "answer tokens": "answer", "layers": "layers"}[name]
        for case in column:
            time, work = median[case] / median[column[0]], flops[case] / flops[column[0]]
            print(f"| {name} | {getattr(case, field)} | {median[case]:.2f} | {time:.2f}x | {work:.2f}x |")
    print(
        f"\n{options.comparisons} comparisons a step, hidden {options.hidden_size}, prompts of 150 tokens, else K = 2, "
        f"answers of 200, 4 layers; medians of {options.repeats} repeats in turn; {conditions(place[0])}."
    )
    torch.distributed.destroy_process_group()


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


def flops_of(case: Case, trainer: Trainer, count: int) -> int:
    """Of one step's forward passes."""
    from megatron_polar.data.packing import comparison_flops

    architecture = trainer.model.architecture
    return sum(comparison_flops(c, layout=case.layout, architecture=architecture) for c in draw(case, count))


if __name__ == "__main__":
    sys.exit(main())
