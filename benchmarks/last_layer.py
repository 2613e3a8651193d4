"""What the last layer saves by computing only the rows that rewards are read from: forward and backward, both ways in
turns on the same comparisons, beside what the FLOPs say.

The saving is that of one layer out of all, so it falls with depth: the second table is arithmetic for POLAR's sizes.
"""

import argparse
import os
import statistics
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import dataclasses

import numpy as np
import torch
from arguments import positive
from layouts import VOCAB_SIZE, draw, lay_out, make_config, run
from trainer import clock, conditions

from megatron_polar.config.presets import PRESETS, Architecture
from megatron_polar.data.balancing import step_costs
from megatron_polar.data.packing import attended_pairs, physical_tokens
from megatron_polar.model.build import build_model
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import select_device


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=positive, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=positive, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = select_device("auto", local_rank=0)
    topology = ranks.initialize(make_config(1).parallel, device=device)
    ranks.seed_ranks(topology, seed=0)
    place = {"topology": topology, "device": device}
    generator = np.random.default_rng(0)
    print("| layers | all rows, s | reward rows, s | faster by | FLOPs say |")
    print("|---:|---:|---:|---:|---:|")
    for layers in options.layers:
        models = {
            kind: build_model(_config(layers, kind), **place, vocab_size=VOCAB_SIZE, for_training=False)
            for kind in ("all_rows", "reward_rows")
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in models}
        for repeat in range(options.repeats + 1):
            comparisons = draw(2, count=1, generator=generator)
            for kind, model in sorted(models.items(), reverse=bool(repeat % 2)):
                batches = lay_out(comparisons, layout="shared_prefix", model=model)
                start = clock(device)
                run(batches, model=model, **place)
                if repeat:  # the first one is a warm-up
                    seconds[kind].append(clock(device) - start)
        ratio = statistics.median(a / b for a, b in zip(seconds["all_rows"], seconds["reward_rows"], strict=True))
        medians = [statistics.median(seconds[kind]) for kind in ("all_rows", "reward_rows")]
        expected = saved(models["reward_rows"].architecture)
        print(
            f"| {layers} | {medians[0]:.2f} | {medians[1]:.2f} | {ratio:.2f}x | {1 / (1 - expected):.2f}x |", flush=True
        )
    print(f"\nK = 2, one comparison a repeat, medians of {options.repeats}; {conditions(device)}.\n")
    print("| model | layers | FLOPs saved, K = 2 | K = 4 |")
    print("|---|---:|---:|---:|")
    for name in ("polar_1_8b", "polar_7b", "polar_20b", "polar_72b"):
        shares = " | ".join(f"{saved(PRESETS[name], k=k):.1%}" for k in (2, 4))
        print(f"| {name} | {PRESETS[name].num_layers} | {shares} |")
    torch.distributed.destroy_process_group()


def _config(layers: int, kind: str):
    config = make_config(layers)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, last_layer=kind))


def saved(architecture: Architecture, *, k: int = 2) -> float:
    """Share of all rows' FLOPs, over the length mix."""
    comparisons = draw(k, count=200, generator=np.random.default_rng(1))
    needed = sum(step_costs(comparisons, layout="shared_prefix", architecture=architecture).flops)
    pairs = sum(attended_pairs(c, layout="shared_prefix") for c in comparisons)
    tokens = sum(physical_tokens(c, layout="shared_prefix") for c in comparisons)
    every_row = architecture.forward_flops(tokens=tokens, attended=pairs, rewards=tokens, reward_keys=pairs)
    return 1 - needed / every_row


if __name__ == "__main__":
    sys.exit(main())
