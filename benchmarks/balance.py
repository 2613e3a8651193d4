"""How evenly a step's work is dealt to data-parallel ranks and micro-batches, and what the dealing costs.

The length mix is that of layouts.py, the work that of the shared-prefix layout. `ranks` is the heaviest rank over the
mean, which is what a step waits for; `lockstep` adds up the heaviest rank of every round of micro-batches over the
mean, which is what pipelines and sharded weights wait for. Beside ours: dealing at random and filling rows one after
the other, as a shuffled loader with packing does. Means over batches. A second table has the heaviest rank of ours with
few comparisons a rank, where nothing can make work even; `plan` counts by it (scaling/step_time.py).
"""

import argparse
import platform
import statistics
import sys
import time

import numpy as np
from arguments import positive, share
from machine import cpu_name

from megatron_polar.config.presets import PRESETS, Architecture
from megatron_polar.data.balancing import karmarkar_karp, plan_step, step_costs
from megatron_polar.data.packing import physical_tokens
from megatron_polar.data.template import TokenizedComparison

CASES = ((128, 8, 2), (128, 8, 4), (512, 64, 2), (4096, 64, 2), (4096, 512, 2))
"""Comparisons of a step, data-parallel ranks, K."""
FEW_RANKS, FEW_COMPARISONS = (2, 8, 64, 512), (1, 1.5, 2, 4, 8, 16)
MAX_TOKENS = 16384
_TOKENS = np.zeros(20_000, dtype=np.int32)


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=positive, default=10, help="steps per case")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="polar_7b")
    parser.add_argument("--mfu", type=share, default=0.45, help="assumed, for the share of the step's time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    architecture = PRESETS[options.preset]
    print(
        "| comparisons | ranks | K | random: ranks / lockstep | ours: ranks / lockstep | planning, ms | of step time |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for case in CASES:
        print(measure(case, options, architecture=architecture), flush=True)
    print(f"\n| ranks | {' | '.join(map(str, FEW_COMPARISONS))} comparisons a rank |")
    print("|---:|" + "---:|" * len(FEW_COMPARISONS))
    for ranks in FEW_RANKS:
        row = [heaviest(int(each * ranks), ranks, options, architecture=architecture) for each in FEW_COMPARISONS]
        print(f"| {ranks} | {' | '.join(f'{value:.3f}' for value in row)} |", flush=True)
    print(
        f"\n{options.preset}, rows of {MAX_TOKENS} tokens, {options.batches} batches a case, seed {options.seed}; "
        f"planning in CPU time of one process (Python {platform.python_version()}, {cpu_name()}), which loader "
        f"processes do ahead. Step time is computed, not measured: three forward passes of the mean rank at "
        f"{options.mfu:.0%} of 989 TFLOP/s."
    )


def measure(case: tuple[int, int, int], options: argparse.Namespace, *, architecture: Architecture) -> str:
    """One row of the table."""
    count, ranks, k = case
    generator = np.random.default_rng([options.seed, *case])
    random, ours, seconds, shares = [], [], [], []
    for _ in range(options.batches):
        comparisons = [draw(k, generator) for _ in range(count)]
        costs = np.array(step_costs(comparisons, layout="shared_prefix", architecture=architecture).flops)
        start = time.process_time()
        plan = plan_step(
            comparisons, num_ranks=ranks, max_tokens=MAX_TOKENS, layout="shared_prefix", architecture=architecture
        )
        seconds.append(time.process_time() - start)
        ours.append(imbalance(plan, costs))
        random.append(imbalance(dealt_at_random(comparisons, ranks, generator), costs))
        shares.append(seconds[-1] / (3 * costs.sum() / ranks / (options.mfu * 989e12)))
    cells = [
        " / ".join(f"{statistics.fmean(column):.3f}" for column in zip(*rows, strict=True)) for rows in (random, ours)
    ]
    planning = f"{1e3 * statistics.median(seconds):.1f} | {statistics.median(shares):.1%}"
    return f"| {count} | {ranks} | {k} | {cells[0]} | {cells[1]} | {planning} |"


def heaviest(count: int, ranks: int, options: argparse.Namespace, *, architecture: Architecture) -> float:
    """Work of the heaviest rank over the mean, K = 2."""
    generator, found = np.random.default_rng([options.seed, count, ranks]), []
    batches = max(options.batches, 512 // ranks)  # few ranks vary more
    for _ in range(batches):
        comparisons = [draw(2, generator) for _ in range(count)]
        costs = step_costs(comparisons, layout="shared_prefix", architecture=architecture).flops
        loads = [sum(costs[index] for index in part) for part in karmarkar_karp(costs, ranks)]
        found.append(max(loads) * ranks / sum(loads))
    return statistics.fmean(found)


def draw(k: int, generator: np.random.Generator) -> TokenizedComparison:
    """Lengths of one comparison; the tokens do not matter."""
    lengths = np.clip(np.exp(np.log(400) - 0.32 + 0.8 * generator.standard_normal(k + 1)), 8, 4096).astype(int)
    prefix = 2 * int(generator.integers(50, 601)) + lengths[0] + 2
    return TokenizedComparison(_TOKENS[:prefix], tuple(_TOKENS[: n + 1] for n in lengths[1:]), (0,) + (1,) * (k - 1), 0)


def dealt_at_random(comparisons, ranks: int, generator: np.random.Generator) -> list[list[list[int]]]:
    """A shuffled loader: as many comparisons for every rank, rows filled one after the other."""
    plan = []
    for part in np.array_split(generator.permutation(len(comparisons)), ranks):
        rows, used = [[]], 0
        for index in part:
            tokens = physical_tokens(comparisons[index], layout="shared_prefix")
            if rows[-1] and used + tokens > MAX_TOKENS:
                rows.append([])
                used = 0
            rows[-1].append(int(index))
            used += tokens
        plan.append(rows)
    return plan


def imbalance(plan: list[list[list[int]]], costs: np.ndarray) -> tuple[float, float]:
    """Heaviest rank over the mean, and the same added up over rounds of micro-batches."""
    rounds = max(map(len, plan))
    work = np.array([[costs[row].sum() for row in rows] + [0] * (rounds - len(rows)) for rows in plan], dtype=float)
    mean = work.sum() / len(plan)
    return work.sum(1).max() / mean, work.max(0).sum() / mean


if __name__ == "__main__":
    sys.exit(main())
