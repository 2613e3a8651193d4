"""Does FP8 train as bf16 does? Twins that differ in precision alone, over several seeds, beside twins that differ in
their seed: loss, held-out accuracy and margin, and how far the rewards agree in rank.

A comparison's reference and first candidate come from one synthetic policy, the other candidates from others; a policy
is a distribution over the vocabulary. In training, the candidates of some comparisons change places, so that the loss
cannot fall to nothing. Every variant sees the same comparisons in the same order. Of one seed they start from the same
weights; another seed of the first variant, the reference, has others: what that changes is the floor of noise, below
which a difference says nothing. The report is written anew after every seed.

  python benchmarks/fp8_twins.py --variants bf16 tensorwise blockwise      # a GPU with Transformer Engine
  python benchmarks/fp8_twins.py --variants bf16 fp32 --preset nano        # the CPU
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import torch
from arguments import positive
from scipy import stats
from trainer import Trainer, conditions

from megatron_polar.config.presets import PRESETS
from megatron_polar.config.schema import (
    DataSection,
    DatasetSource,
    ModelSection,
    OptimizerSection,
    RunConfig,
    RunSection,
    TrainSection,
)
from megatron_polar.data.template import TokenizedComparison
from megatron_polar.errors import USER_ERROR, UserError
from megatron_polar.model.layer_spec import transformer_engine_problem

PLACE = Path(__file__).parent
RECIPES = ("tensorwise", "blockwise", "delayed")
VOCAB_SIZE, CONTROLS = 1024, 5
HELD_OUT_CANDIDATES = 4


@dataclass(frozen=True)
class Run:
    """One finished run: loss of every step, and the rewards [comparison][candidate] of the held-out comparisons."""

    variant: str
    seed: int
    losses: list[float]
    rewards: list[list[float]]
    seconds: float

    @property
    def accuracy(self) -> float:
        return float(np.mean([first > other for first, *rest in self.rewards for other in rest]))

    @property
    def margin(self) -> float:
        return float(np.mean([first - other for first, *rest in self.rewards for other in rest]))

    def final_loss(self) -> float:
        """Mean over the last tenth of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])


def main() -> int:
    """Train all twins and write the report."""
    options = parse()
    try:
        check_variants(options.variants)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    runs, wanted = [], list(itertools.product(options.seeds, options.variants))
    with ThreadPoolExecutor(options.jobs) as pool:
        for run, where in pool.map(partial(train_apart, options), *zip(*wanted, strict=True)):
            runs.append(run)
            print(f"seed {run.seed}, {run.variant}: loss {run.final_loss():.4f}, accuracy {run.accuracy:.3f}",
                  file=sys.stderr)  # fmt: skip
            if run.variant == options.variants[-1]:
                write(runs, options, where=where)
    print(options.output.read_text())
    return 0


def write(runs: list[Run], options: argparse.Namespace, *, where: str) -> None:
    """The report of the seeds so far, its picture and the runs themselves."""
    options.output.write_text(report(runs, options, where=where))
    options.output.with_suffix(".json").write_text(json.dumps([vars(run) for run in runs]) + "\n")
    draw(runs, options)


def parse() -> argparse.Namespace:
    """The command line; without a GPU the model and the data are small by default."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"bf16, fp32, {', '.join(RECIPES)}; the first is the reference"
    parser.add_argument("--variants", nargs="+", default=["bf16", "tensorwise"], metavar="VARIANT", help=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the initial weights")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="polar_1_8b" if has_gpu else "nano")
    parser.add_argument("--layers", type=positive, default=8 if has_gpu else 2)
    parser.add_argument("--steps", type=positive, default=500 if has_gpu else 60)
    parser.add_argument("--batch", type=positive, default=16, help="comparisons of a step")
    parser.add_argument("--held-out", type=positive, default=512 if has_gpu else 64)
    parser.add_argument("--answer-tokens", type=positive, default=48 if has_gpu else 24)
    parser.add_argument("--policies", type=positive, default=8)
    parser.add_argument("--swapped", type=float, default=0.1, help="share of training comparisons with wrong labels")
    parser.add_argument("--lr", type=float, default=5e-5 if has_gpu else 1e-3)
    parser.add_argument("--jobs", type=positive, default=1, help="runs side by side, all on this one GPU")
    parser.add_argument("--output", type=Path, default=PLACE / "fp8_twins.md")
    options = parser.parse_args()
    if len(set(options.seeds)) < 2:
        parser.error("--seeds: the floor of noise needs at least two different seeds")
    return options


def check_variants(variants: list[str]) -> None:
    """Raise UserError for variants that do not exist, or that this machine cannot run."""
    for variant in variants:
        if variant not in ("bf16", "fp32", *RECIPES):
            raise UserError(f"--variants: {variant!r} is none of bf16, fp32, {', '.join(RECIPES)}")
    if len(set(variants)) < max(2, len(variants)):
        raise UserError(f"--variants {' '.join(variants)}: give at least two, each once; the first is the reference")
    problem = transformer_engine_problem()
    asked = [variant for variant in variants if variant in RECIPES]
    if asked and problem:
        raise UserError(
            f"--variants {' '.join(asked)}: FP8 needs a Hopper GPU with Transformer Engine, which is not usable here "
            f"({problem}); run it there, or compare bf16 with fp32: --variants bf16 fp32"
        )


def make_config(variant: str, seed: int, options: argparse.Namespace) -> RunConfig:
    """A run of a variant; nothing but precision and seed differs between runs."""
    recipe = variant if variant in RECIPES else "off"
    return RunConfig(
        run=RunSection(directory="unused", seed=seed),
        model=ModelSection(preset=options.preset, num_layers=options.layers, reward_head_init_std=0.02),
        data=DataSection(train=(DatasetSource("unused"),), max_tokens_per_micro_batch=16384, pad_to_multiple=128),
        train=TrainSection(
            global_batch_size=options.batch,
            num_steps=options.steps,
            precision="fp32" if variant == "fp32" else "bf16",
            fp8=recipe,
            fp8_bf16_layers=0 if recipe == "delayed" else 1,
        ),
        optimizer=OptimizerSection(lr=options.lr, warmup_fraction=0.1),
    )


def train_apart(options: argparse.Namespace, seed: int, variant: str) -> tuple[Run, str]:
    """`train` in a process of its own, with which a model's memory goes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(train, options, seed, variant).result()


def train(options: argparse.Namespace, seed: int, variant: str) -> tuple[Run, str]:
    """One run, and the conditions; the data are those of every other run."""
    torch.set_num_threads(1)
    policies = make_policies(options.policies)
    trainer = Trainer(make_config(variant, seed, options), vocab_size=VOCAB_SIZE, num_steps=options.steps)
    generator, losses, seconds = np.random.default_rng([7, 0]), [], 0.0
    for _ in range(options.steps):
        batch = draw_comparisons(
            policies, options.batch, candidates=2, options=options, generator=generator, swapped=options.swapped
        )
        result, _, elapsed = trainer.step(batch)
        losses.append(result.sums["loss"] / result.sums["pairs"])
        seconds += elapsed
    held_out = draw_comparisons(
        policies, options.held_out, candidates=HELD_OUT_CANDIDATES, options=options,
        generator=np.random.default_rng([7, 1]),
    )  # fmt: skip
    rewards = [row.tolist() for row in trainer.rewards(held_out)]
    torch.distributed.destroy_process_group()
    return Run(variant, seed, losses, rewards, seconds), conditions(trainer.device, "scipy")


# --- Data ------------------------------------------------------------------------------------------------------------


def make_policies(count: int) -> np.ndarray:
    """Distributions over the vocabulary [policy, token], each with tokens that it prefers."""
    logits = np.random.default_rng(3).normal(0, 2.0, (count, VOCAB_SIZE - CONTROLS))
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True)


def draw_comparisons(
    policies: np.ndarray,
    count: int,
    *,
    candidates: int,
    options: argparse.Namespace,
    generator: np.random.Generator,
    swapped: float = 0.0,
) -> list[TokenizedComparison]:
    """Reference and first candidate of one policy, each other candidate of another; answers of uneven length. Of a
    share `swapped` the label says that the last candidate is the reference's."""

    def answer(policy: int) -> np.ndarray:
        length = int(options.answer_tokens * generator.uniform(0.5, 1.5))
        return CONTROLS + generator.choice(VOCAB_SIZE - CONTROLS, length, p=policies[policy])

    def prompt() -> np.ndarray:
        return generator.integers(CONTROLS, VOCAB_SIZE, options.answer_tokens // 4 + 1)

    found = []
    for _ in range(count):
        chosen = generator.choice(len(policies), candidates, replace=False)
        asked = prompt()
        prefix = np.concatenate([[1], asked, answer(chosen[0]), [2], asked]).astype(np.int32)
        answers = tuple(np.append(answer(policy), 3).astype(np.int32) for policy in chosen)
        levels = (0,) + (1,) * (candidates - 1)
        found.append(TokenizedComparison(prefix, answers, levels[::-1] if generator.random() < swapped else levels, 0))
    return found


# --- Comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """What one run has beyond another of the same comparisons; losses in percent of the other's."""

    mean_loss: float
    final_loss: float
    largest_loss: float
    accuracy: float
    margin: float
    kendall: float
    spearman: float


def compare(run: Run, other: Run) -> Difference:
    """`run` beside `other`."""
    smooth, base = smoothed(run.losses), smoothed(other.losses)
    taus = [stats.kendalltau(a, b).statistic for a, b in zip(run.rewards, other.rewards, strict=True)]
    flat = [np.concatenate([np.subtract(row, np.mean(row)) for row in one.rewards]) for one in (run, other)]
    return Difference(
        mean_loss=100 * (statistics.fmean(run.losses) / statistics.fmean(other.losses) - 1),
        final_loss=100 * (run.final_loss() / other.final_loss() - 1),
        largest_loss=100 * float(np.abs(smooth / base - 1).max()),
        accuracy=run.accuracy - other.accuracy,
        margin=run.margin - other.margin,
        kendall=float(np.nanmean(taus)),
        spearman=float(stats.spearmanr(*flat).statistic),
    )


def smoothed(losses: list[float]) -> np.ndarray:
    """Mean over a window of a twentieth of the steps."""
    window = max(1, len(losses) // 20)
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def interval(values: list[float]) -> str:
    """Mean and 95 % t interval over the values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.3f} (one pair)"
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean:+.3f} ± {half:.3f}"


def differences(runs: list[Run], variants: list[str]) -> dict[str, list[Difference]]:
    """For each variant against the reference of its seed; under "seed" the references against each other."""
    by_name = {(run.variant, run.seed): run for run in runs}
    reference, *others = variants
    seeds = sorted({run.seed for run in runs})
    found = {name: [compare(by_name[name, s], by_name[reference, s]) for s in seeds] for name in others}
    if len(seeds) > 1:  # each pair in a circle, so that no seed counts more than another
        pairs = list(itertools.pairwise([*seeds, seeds[0]])) if len(seeds) > 2 else [tuple(seeds)]
        found["seed"] = [compare(by_name[reference, a], by_name[reference, b]) for a, b in pairs]
    return found


def report(runs: list[Run], options: argparse.Namespace, *, where: str) -> str:
    """The tables as Markdown."""
    reference = options.variants[0]
    seeds = sorted({run.seed for run in runs})
    lines = [
        "# Precision twins",
        "",
        f"`python benchmarks/fp8_twins.py {' '.join(sys.argv[1:])}`: {options.steps} steps of {options.batch} "
        f"comparisons (K = 2), then {options.held_out} held-out comparisons of {HELD_OUT_CANDIDATES} candidates; seeds "
        f"{', '.join(map(str, seeds))}.",
        "",
        "| variant | final loss | accuracy | margin | seconds of training |",
        "|---|---:|---:|---:|---:|",
    ]
    for variant in options.variants:
        own = [run for run in runs if run.variant == variant]
        means = [statistics.fmean(values) for values in zip(
            *((r.final_loss(), r.accuracy, r.margin, r.seconds) for r in own), strict=True)]  # fmt: skip
        lines.append(f"| {variant} | {means[0]:.4f} | {means[1]:.4f} | {means[2]:.3f} | {means[3]:.0f} |")
    lines += [
        "",
        f"Against {reference} of the same seed: mean and 95 % t interval over seeds. The last row, {reference} against "
        f"{reference} of another seed, is the noise: the root mean square where a difference has a sign. What is no "
        f"larger than there cannot be told from chance.",
        "",
        "| against the reference | mean loss, % | final loss, % | largest deviation, % | accuracy | margin "
        "| Kendall | Spearman |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in differences(runs, options.variants).items():
        fields = {field: [getattr(one, field) for one in found] for field in Difference.__dataclass_fields__}
        signed = ("mean_loss", "final_loss", "accuracy", "margin") if name == "seed" else ()
        columns = [
            f"±{np.sqrt(np.mean(np.square(values))):.3f}" if field in signed else interval(values)
            for field, values in fields.items()
        ]
        lines.append(f"| {f'{reference}, another seed' if name == 'seed' else name} | {' | '.join(columns)} |")
    shape = f"{options.preset}, {options.layers} layers, answers of about {options.answer_tokens} tokens"
    lines += [
        "",
        "Mean loss: over all steps. Final loss: over the last tenth of them. Largest deviation: of the smoothed loss, "
        "anywhere in the run. Kendall: within a comparison, averaged; Spearman: over all held-out rewards less "
        "their comparison's mean.",
        "",
        f"{shape}, peak learning rate {options.lr:g} (a tenth of the steps "
        f"of warm-up, then cosine), {options.policies} policies, {options.swapped:.0%} of the training "
        f"labels wrong; {options.jobs} run(s) side by side; {where}. Curves: "
        f"`{options.output.with_suffix('.svg').name}`.",
        "",
    ]
    return "\n".join(lines)


def draw(runs: list[Run], options: argparse.Namespace) -> None:
    """Smoothed losses of all runs, and how far each lies from the reference of their seed."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 7), sharex=True)
    by_name = {(run.variant, run.seed): smoothed(run.losses) for run in runs}
    reference, *others = options.variants
    for number, variant in enumerate(options.variants):
        for place, run in enumerate(one for one in runs if one.variant == variant):
            style = {"color": f"C{number}", "linewidth": 1, "alpha": 0.8, "label": None if place else variant}
            above.plot(by_name[variant, run.seed], **style)
            if variant in others:
                below.plot(100 * (by_name[variant, run.seed] / by_name[reference, run.seed] - 1), **style)
    seeds = sorted({run.seed for run in runs})
    for place, (a, b) in enumerate(itertools.pairwise(seeds)):
        noise = 100 * (by_name[reference, a] / by_name[reference, b] - 1)
        label = None if place else f"{reference}, another seed"
        below.plot(noise, color="0.6", linewidth=1, linestyle=":", label=label)
    above.set(ylabel="loss, smoothed", title="The same comparisons in the same order")
    below.set(xlabel="step", ylabel=f"% beside {reference}")
    for axes in (above, below):
        axes.legend()
    figure.tight_layout()
    figure.savefig(options.output.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
