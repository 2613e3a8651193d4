"""Comparisons per second of the padded, packed and shared-prefix layouts, in one run: forward and backward of the
reward model on this machine, in process CPU time.

Prompts are uniform in 50..600 tokens, reference and candidates log-normal with mean 400 (sigma 0.8, at most 4096);
`--lengths paper` takes prompts of 1..1024 and answers of mean 1126, which is what the paper's pre-training data have
together (that prompts are uniform is assumed). All layouts get the same comparisons; every repeat interleaves them, so
that a noisy machine hits all alike. Rates are over all repeats together, ratios are those of the rates, and beside them
stands the range over the repeats.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: CPU time of one thread is what repeats


import numpy as np
import torch
from arguments import positive
from machine import cpu_name
from trainer import clock

from megatron_polar.config.schema import (
    DataSection,
    DatasetSource,
    ModelSection,
    OptimizerSection,
    RunConfig,
    RunSection,
    TrainSection,
)
from megatron_polar.data.balancing import plan_step
from megatron_polar.data.packing import build_micro_batch
from megatron_polar.data.template import TokenizedComparison
from megatron_polar.model.build import BuiltModel, build_model
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import Device, select_device
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.objective import ranking_loss
from megatron_polar.train.step import to_device

LAYOUTS = ("padded", "packed", "shared_prefix")
VOCAB_SIZE = 2048


@dataclass(frozen=True)
class LengthMix:
    """Tokens: prompts uniform from `shortest` to `longest`, answers log-normal with this mean."""

    shortest: int
    longest: int
    answer: float


MIXES = {"mixed": LengthMix(50, 600, 400.0), "paper": LengthMix(1, 1024, 1126.0)}


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=positive, nargs="+", default=[2, 4, 8], metavar="K")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--comparisons", type=positive, default=2, help="comparisons per repeat")
    parser.add_argument("--layers", type=positive, default=1, help="layers of the model")
    parser.add_argument("--lengths", choices=tuple(MIXES), default="mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = select_device("auto", local_rank=0)
    config = make_config(options.layers)
    topology = ranks.initialize(config.parallel, device=device)
    ranks.seed_ranks(topology, seed=0)
    model = build_model(config, topology=topology, device=device, vocab_size=VOCAB_SIZE, for_training=False)
    figures = {k: measure(k, options, model=model, topology=topology, device=device) for k in options.candidates}
    result = summarise(figures, model=model, device=device, options=options)
    print_table(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def make_config(num_layers: int) -> RunConfig:
    """Layers of POLAR-1.8B's proportions at half its width (head dimension 128, ffn 4 x hidden).

    The width matters: attention's share of the work, where sharing saves less, falls with it. It is 4-7 % in a 1.8B or
    7B model, and 30 % was measured at hidden 512. All layers cost the same, so a few stand for many; therefore the last
    one computes all rows here (last_layer.py measures what it saves). fp32 on the CPU, bf16 on a GPU.
    """
    shape = {"hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 8, "num_query_groups": 4}
    return RunConfig(
        run=RunSection(directory="unused"),
        model=ModelSection(num_layers=num_layers, **shape, reward_head_init_std=0.02, last_layer="all_rows"),
        data=DataSection(train=(DatasetSource("unused"),)),
        train=TrainSection(global_batch_size=1, num_steps=1, precision="bf16" if torch.cuda.is_available() else "fp32"),
        optimizer=OptimizerSection(lr=1.0),
    )


def draw(
    num_candidates: int, *, count: int, generator: np.random.Generator, mix: LengthMix = MIXES["mixed"]
) -> list[TokenizedComparison]:
    """Comparisons of a length mix; prefix = prompt + reference + separator + prompt.

    The draw is stratified: of n lengths, one falls into each n-th part of the distribution, in random order. So a few
    comparisons already have the mix's mean and spread, which a few independent draws from a log-normal have not.
    """

    def levels_of(n: int) -> np.ndarray:
        return (generator.permutation(n) + generator.random(n)) / n

    def answers(n: int) -> list[int]:
        normal = statistics.NormalDist()
        lengths = [np.exp(np.log(mix.answer) - 0.8**2 / 2 + 0.8 * normal.inv_cdf(u)) for u in levels_of(n)]
        return [int(np.clip(length, 8, 4096)) for length in lengths]

    def tokens(length: int) -> np.ndarray:
        return generator.integers(5, VOCAB_SIZE, length).astype(np.int32)

    levels = (0,) + (1,) * (num_candidates - 1)
    prompts = [mix.shortest + int((mix.longest - mix.shortest + 1) * u) for u in levels_of(count)]
    references, candidates = answers(count), iter(answers(count * num_candidates))
    return [
        TokenizedComparison(
            tokens(2 * prompt + reference + 2), tuple(tokens(next(candidates) + 1) for _ in levels), levels, 0
        )
        for prompt, reference in zip(prompts, references, strict=True)
    ]


def measure(
    k: int, options: argparse.Namespace, *, model: BuiltModel, topology: Topology, device: Device
) -> list[dict]:
    """CPU (or device) seconds of forward and backward per layout, for each repeat."""
    generator = np.random.default_rng([options.seed, k])
    rows = []
    for repeat in range(options.repeats):
        comparisons = draw(k, count=options.comparisons, generator=generator, mix=MIXES[options.lengths])
        row = {"comparisons": len(comparisons)}
        order = LAYOUTS[repeat % 3 :] + LAYOUTS[: repeat % 3]
        if repeat == 0:  # warm-up, not counted
            run(
                lay_out(comparisons[:1], layout="shared_prefix", model=model),
                model=model,
                topology=topology,
                device=device,
            )
        for layout in order:
            batches = lay_out(comparisons, layout=layout, model=model)
            start = clock(device)
            loss = run(batches, model=model, topology=topology, device=device)
            row[layout] = {
                "seconds": clock(device) - start,
                "tokens": sum(b.tokens.size for b in batches),
                "loss": loss,
            }
        losses = [row[layout]["loss"] for layout in LAYOUTS]
        assert np.allclose(losses, losses[0], rtol=1e-3), f"the layouts disagree: {losses}"
        rows.append(row)
    return rows


def lay_out(comparisons, *, layout: str, model: BuiltModel):
    """One rank's micro-batches; 16,384 tokens at most, as every trainer would cut them."""
    plan = plan_step(comparisons, num_ranks=1, max_tokens=16384, layout=layout, architecture=model.architecture)
    return [
        build_micro_batch([comparisons[i] for i in part], layout=layout, pad_id=0, pad_to_multiple=16)
        for part in plan[0]
    ]


def run(batches, *, model: BuiltModel, topology: Topology, device: Device) -> float:
    """Forward and backward of all micro-batches; returns the loss sum."""
    core, total = model.chunks[0], 0.0
    core.zero_grad(set_to_none=True)
    for batch in batches:
        moved = to_device(batch, model=model, device=device, topology=topology)
        rewards = core(moved.tokens, None, None, packed_seq_params=moved.layout)
        loss = ranking_loss(rewards, winners=moved.winners, losers=moved.losers).loss_sum
        loss.backward()
        total += loss.item()
    return total


def summarise(figures: dict[int, list[dict]], *, model: BuiltModel, device: Device, options) -> dict:
    """Rates over all repeats, the ratios that matter with their ranges, and what they were measured on."""

    def total(rows: list[dict], layout: str, what: str) -> float:
        return sum(row[layout][what] for row in rows)

    table, ratios = {}, {"shared_over_packed": {}, "shared_over_padded": {}, "packed_over_padded": {}}
    for k, rows in figures.items():
        table[str(k)] = {
            layout: {
                "comparisons_per_s": sum(r["comparisons"] for r in rows) / total(rows, layout, "seconds"),
                "physical_tokens_per_comparison": total(rows, layout, "tokens") / sum(r["comparisons"] for r in rows),
            }
            for layout in LAYOUTS
        }
        for name, fast, slow in (
            ("shared_over_packed", "shared_prefix", "packed"),
            ("shared_over_padded", "shared_prefix", "padded"),
            ("packed_over_padded", "packed", "padded"),
        ):
            each = [r[slow]["seconds"] / r[fast]["seconds"] for r in rows]
            whole = total(rows, slow, "seconds") / total(rows, fast, "seconds")
            ratios[name][str(k)] = {"ratio": whole, "least": min(each), "most": max(each)}
    return ratios | {
        "layouts": table,
        "clock": "process CPU time" if device.kind == "cpu" else "wall time",
        "repeats": options.repeats,
        "comparisons_per_repeat": options.comparisons,
        "seed": options.seed,
        "lengths": vars(MIXES[options.lengths]),
        "parameters": model.architecture.num_parameters(model.vocab_size),
        "precision": str(model.transformer_config.params_dtype).removeprefix("torch."),
        "attention": model.attention,
        "device": device.name if device.kind == "cuda" else f"{cpu_name()}, 1 thread",
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "python": platform.python_version(),
    }


def print_table(result: dict) -> None:
    """The table as Markdown, with its conditions below it."""
    print("| K | layout | comparisons/s | tokens/comparison | over padded | over packed |")
    print("|---|---|---:|---:|---:|---:|")
    for k, layouts in result["layouts"].items():
        over_padded = {"packed": result["packed_over_padded"][k], "shared_prefix": result["shared_over_padded"][k]}
        over_packed = result["shared_over_packed"][k]
        for layout, row in layouts.items():
            padded = f"{over_padded[layout]['ratio']:.2f}x" if layout in over_padded else ""
            packed = ""
            if layout == "shared_prefix":
                packed = f"**{over_packed['ratio']:.2f}x** ({over_packed['least']:.2f} to {over_packed['most']:.2f})"
            print(
                f"| {k} | {layout} | {row['comparisons_per_s']:.3f} | {row['physical_tokens_per_comparison']:.0f} "
                f"| {padded} | {packed} |"
            )
    lengths = result["lengths"]
    print(
        f"\nPrompts of {lengths['shortest']} to {lengths['longest']} tokens, answers of {lengths['answer']:.0f} on "
        f"average. Forward + backward, {result['parameters'] / 1e6:.1f}M parameters, {result['precision']}, "
        f"{result['attention']}, {result['device']}; {result['clock']}, {result['repeats']} interleaved "
        f"repeats of {result['comparisons_per_repeat']} comparisons; torch {result['torch']}, megatron-core "
        f"{result['megatron_core']}, Python {result['python']}, seed {result['seed']}."
    )


if __name__ == "__main__":
    sys.exit(main())
