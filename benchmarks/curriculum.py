"""Uniform contrasts against contrasts by difficulty, at equal steps: accuracy on held-out prompts, for policies seen in
training and for unseen ones.

Policies, model and training are those of the quickstart, but every prompt is answered by several policies: with its two
there is one pair per prompt and nothing to choose. One process, one thread. Finished parts are kept in --work, and a
second start goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from arguments import positive

QUICKSTART = Path(__file__).resolve().parents[1] / "examples/quickstart"
SHARP = ("interval=10", "half_life=8", "temperature=0.5", "prior_comparisons=2.0", "floor=0.2")
VARIANTS = {
    "uniform": (),
    "by difficulty": ("data.contrast=by_difficulty", *(f"data.curriculum.{text}" for text in ("interval=10",))),
    "by difficulty, sharp": ("data.contrast=by_difficulty", *(f"data.curriculum.{text}" for text in SHARP)),
}


def main() -> None:
    """Make the data, train and evaluate every variant with every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/curriculum"))
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--prompts", type=positive, default=3000)
    parser.add_argument("--policies-per-prompt", type=positive, default=8)
    parser.add_argument("--held-out", type=positive, default=1500, help="held-out prompts, for each kind of policies")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    make_data(options)
    results = {
        variant: [measure(variant, seed=seed, options=options) for seed in range(options.seeds)] for variant in VARIANTS
    }
    print_table(results, options)


def polar(*words: object, done: Path) -> None:
    """Run a command of the program, unless the file that it writes last is there."""
    if not done.exists():
        command = [sys.executable, "-m", "megatron_polar", *map(str, words)]
        subprocess.run(command, check=True, stdout=sys.stderr)


def make_data(options: argparse.Namespace) -> None:
    """Trajectories for training, and of seen and unseen policies on other prompts; tokenizer and dataset."""
    data, pool, unseen = options.work / "data", QUICKSTART / "pool.yaml", QUICKSTART / "unseen_pool.yaml"
    sizes = ("--num-prompts", options.prompts, "--policies-per-prompt", options.policies_per_prompt)
    held_out = ("--prompt-split", "heldout", "--num-prompts", options.held_out, "--policies-per-prompt", 2)
    for name, policies, how in (("train", pool, sizes), ("heldout", pool, held_out), ("unseen", unseen, held_out)):
        text = data / "text" / name
        polar("sample", "--pool", policies, "--output", text, *how, done=text / "manifest.json")
    model = data / "tokenizer.model"
    polar("train-tokenizer", data / "text/train", "--output", model, "--vocab-size", 1024, done=model)
    dataset = data / "train"
    polar("preprocess", data / "text/train", "--output", dataset, "--tokenizer", model, done=dataset / "manifest.json")


def measure(variant: str, *, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one variant with one seed; accuracies on both sets, CPU seconds of the training command."""
    name, data = variant.replace(", ", "-").replace(" ", "-"), options.work / "data"
    run = options.work / f"{name}-{seed}"
    before = os.times()
    polar(
        *("train", QUICKSTART / "pretrain.yaml", f"run.directory={run}", f"run.seed={1000 + seed}"),
        *(f"data.train=[{{path: {data / 'train'}}}]", "data.validation=[]", f"train.num_steps={options.steps}"),
        *("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false", "logging.tensorboard=false"),
        *(f"checkpoint.save_interval={options.steps}", *VARIANTS[variant]),
        done=run / "report.html",
    )
    after = os.times()
    seconds, found = run / "seconds.json", {}
    if not seconds.exists():
        spent = sum(b - a for a, b in zip(before[2:4], after[2:4], strict=True))
        seconds.write_text(json.dumps(spent))
    for kind in ("heldout", "unseen"):
        output = options.work / f"{name}-{seed}-{kind}"
        where = ("--data", data / "text" / kind, "--output", output)
        polar("evaluate", "--checkpoint", run, "--suite", "policies", *where, done=output / "summary.json")
        found[kind] = json.loads((output / "summary.json").read_text())["accuracy"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found |= {"train": statistics.fmean(row["rm/accuracy"] for row in rows[-5:] if "rm/accuracy" in row)}
    return found | {"seconds": json.loads(seconds.read_text())}


def print_table(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Means over seeds with the standard deviation, and the differences to uniform of the same seed."""
    print(
        "| contrasts | seen policies | unseen policies | difference, seen | difference, unseen | in training | CPU, s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for variant, runs in results.items():
        cells = [_spread([run[kind] for run in runs]) for kind in ("heldout", "unseen")]
        for kind in ("heldout", "unseen"):
            pairs = zip(runs, results["uniform"], strict=True)
            differences = [run[kind] - base[kind] for run, base in pairs]
            cells.append("" if variant == "uniform" else _spread(differences, sign="+"))
        cells += [_spread([run["train"] for run in runs]), f"{statistics.fmean(run['seconds'] for run in runs):.0f}"]
        print(f"| {variant} | " + " | ".join(cells) + " |", flush=True)
    print(
        f"\n{options.seeds} seeds, {options.steps} steps of 64 comparisons, {options.prompts} prompts answered by "
        f"{options.policies_per_prompt} of 64 policies; {options.held_out} held-out comparisons each; mean ± standard "
        f"deviation over seeds; {time.strftime('%Y-%m-%d')}."
    )


def _spread(values: list[float], *, sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):{sign}.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    main()
