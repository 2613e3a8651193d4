"""Reinforcement fine-tuning in small: a tiny policy, GRPO with TRL, and reward models that compare with a reference.

    python examples/study/rft.py [--size smoke|cpu|gpu] [--output DIR] [--seed 0] [--jobs 2]

The task is arithmetic with checkable answers. A policy that can do its sums, and mostly has bad habits, is to be led to
the right one by GRPO on rewards of `megatron-polar serve`, for three reward models: pre-trained on a pool of policies
and fine-tuned on labelled answers; fine-tuned on the same labels only; pre-trained only. References are right answers
to the training problems. The rule itself as reward says what GRPO could reach, counting the words that an answer shares
with its reference what it reaches without a model; SFT on the same prompts and references, with as many steps and
sequences a step, stands beside them. The rule judges: the last number of an answer to a problem that nobody was trained
on.

DIR, by default runs/study/SIZE/rft, gets rft.json, rft.svg and rft.md. The next report of the study that is in
runs/study/SIZE takes them up as a part of its page. Stages are kept: after an interruption the same command goes on.
"""

import argparse
import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import rft_policy_training as training
import rft_rewards as rewards
import torch
from jobs import checked_out, end_with_children
from rft_page import DIFFERENCES, POLICIES, REWARD_MODELS, REWARDS, draw_rewards, write_section
from rft_sizes import SIZES, Size, draw_parts
from rft_stages import concurrently, run_stage
from scipy import stats

from megatron_polar.errors import INTERRUPTED, USER_ERROR, UserError
from megatron_polar.manifest import write_durably
from megatron_polar.outputs import check_output_directory

WARM = ("megatron_polar.train.run", "megatron_polar.score.scorer", "megatron_polar.serve.server", "datasets", "trl")
PACKAGES = ("torch", "megatron-core", "transformers", "trl", "numpy")


def run(directory: Path | str, *, size: str = "cpu", seed: int = 0, jobs: int = 1, runs: int | None = None) -> dict:
    """The whole study below `directory`, as far as it is not there yet; returns what rft.json holds (plain JSON).

    `jobs` runs go on at the same time, in a process each; `runs` are as many as the size has, or fewer.
    Raises UserError when a stage fails, with its log's end.
    """
    if size not in SIZES:
        raise UserError(f"--size {size!r} does not exist; use one of {', '.join(SIZES)}")
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: give 1 or more")
    num_runs = SIZES[size].runs if runs is None else runs
    if not 1 <= num_runs <= SIZES[size].runs:
        raise UserError(f"--runs {num_runs}: size {size} has 1 to {SIZES[size].runs}")
    directory, settings, started = Path(directory), SIZES[size], time.monotonic()
    check_output_directory(directory)
    resumed = any(directory.glob("*/done/*.json"))
    _prepare_to_fork()
    shared = run_shared_stages(directory / "shared", settings, seed=seed)
    concurrently(
        [(run_stages_of, directory / f"run-{index}", settings, seed, index) for index in range(num_runs)], jobs
    )
    every = [run_stages_of(directory / f"run-{index}", settings, seed, index) for index in range(num_runs)]
    found = summarise(every) | {
        "size": size,
        "seed": seed,
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "sha256": {"problems": problems_hash(settings, seed=seed)} | written_hashes(directory),
        "command": f"python examples/study/rft.py --size {size} --seed {seed}"
        + ("" if runs is None else f" --runs {runs}"),
        "shared": shared,
        "runs": every,
        "seconds": time.monotonic() - started,
        "resumed": resumed,
        "cpu_seconds": cpu_seconds(directory),
        "commit": checked_out(),
        "machine": {"processor": processor(), "device": settings.device, "jobs": jobs},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
    }
    write_durably(directory / "rft.json", json.dumps(found, indent=1).encode() + b"\n")
    write_durably(directory / "rft.md", write_section(found).encode())
    draw_rewards(found, directory / "rft.svg")
    return found


def _prepare_to_fork() -> None:
    """Import once what stages use, and keep this process to one thread: thread pools do not survive a fork."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for module in WARM:
        importlib.import_module(module)


# --- Stages ----------------------------------------------------------------------------------------------------------


def run_shared_stages(directory: Path, size: Size, *, seed: int) -> dict:
    """What all runs share: base model, pool of policies, their trajectories."""
    functions = (
        rewards.fit_base,
        rewards.fit_policies,
        rewards.sample_trajectories,
        rewards.preprocess_trajectories,
        rewards.convert_base,
    )
    return {function.__name__: run_stage(directory, function.__name__, function, size, seed) for function in functions}


def run_stages_of(directory: Path, size: Size, seed: int, index: int) -> dict:
    """One run: a policy, reward models and all that follows, each with its own seeds and problems."""

    def stage(function, *more, name: str = "") -> dict:
        return run_stage(directory, name or function.__name__, function, size, seed, index, *more)

    def improved(model: str) -> dict:
        return {f"grpo-{model}": stage(training.improve, model, name=f"grpo-{model}")}

    # The rule first: where GRPO gains nothing with a perfect reward, there is no need to wait for the reward models.
    found = {"warm_up": stage(training.warm_up), **improved("rule"), "draw_labels": stage(rewards.draw_labels)}
    found["pretrain"] = stage(rewards.pretrain)
    for start in ("pretrained", "base"):
        found[f"finetune-{start}"] = stage(rewards.finetune, start, name=f"finetune-{start}")
    found["reward_models"] = stage(rewards.evaluate_rewards, list(REWARD_MODELS))
    found["sft"] = stage(training.tune_on_references)
    for model in ("words", *REWARD_MODELS):
        found |= improved(model)
    found["judged"] = {policy: stage(training.judge, policy, name=f"judge-{policy}") for policy in POLICIES}
    return found


def problems_hash(size: Size, *, seed: int) -> str:
    """SHA-256 over all problems of all runs."""
    digest = hashlib.sha256()
    for index in range(size.runs):
        for part in vars(draw_parts(size, seed=seed, run=index)).values():
            digest.update("\n".join(problem.prompt for problem in part).encode())
    return digest.hexdigest()


def written_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 over the texts that reward models were trained on: trajectories, and labels of all runs."""
    found = {}
    for name, pattern in (("trajectories", "shared/trajectories/*/*.jsonl"), ("labels", "run-*/labels.jsonl")):
        digest = hashlib.sha256()
        for path in sorted(directory.glob(pattern)):
            digest.update(path.read_bytes())
        found[name] = digest.hexdigest()
    return found


def processor() -> str:
    """The processor's name as Linux gives it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def cpu_seconds(directory: Path) -> dict[str, float]:
    """CPU seconds by stage, over all runs."""
    total: dict[str, float] = {}
    for path in sorted(directory.glob("*/done/*.json")):
        total[path.stem] = total.get(path.stem, 0.0) + json.loads(path.read_text())["cpu_seconds"]
    return total | {"all": sum(total.values())}


# --- Figures ---------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], *, is_share: bool = False) -> dict:
    """Mean and 95 % interval of the mean over runs (Student's t), a share's cut at 0 and 1; no interval for one run."""
    mean = fmean(values)
    if len(values) < 2:
        return {"mean": mean, "ci95": None, "runs": list(values)}
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    low, high = (max(0.0, mean - half), min(1.0, mean + half)) if is_share else (mean - half, mean + half)
    return {"mean": mean, "ci95": [low, high], "runs": list(values)}


def summarise(runs: Sequence[dict]) -> dict:
    """Accuracies, rewards and differences over runs."""
    kinds = ("greedy", "sampled", "sampled_work", "sampled_characters")
    judged = {policy: {kind: [run["judged"][policy][kind] for run in runs] for kind in kinds} for policy in POLICIES}
    differences = {}
    for one, other in DIFFERENCES:
        differences[f"{one} - {other}"] = {
            kind: interval([a - b for a, b in zip(judged[one][kind], judged[other][kind], strict=True)])
            for kind in ("greedy", "sampled")
        }
    figures = ("first_reward", "last_reward", "first_length", "last_length", "first_equal", "last_equal")
    return {
        "accuracy": {
            policy: {kind: interval(values, is_share=kind != "sampled_characters") for kind, values in of.items()}
            for policy, of in judged.items()
        },
        "differences": differences,
        "reward_models": {
            model: interval([run["reward_models"][model]["accuracy"] for run in runs], is_share=True)
            for model in REWARD_MODELS
        },
        "word_overlap": interval(
            [run["reward_models"]["pretrained"]["word_overlap_accuracy"] for run in runs], is_share=True
        ),
        "grpo": {
            model: {name: interval([run[f"grpo-{model}"][name] for run in runs]) for name in figures}
            for model in REWARDS
        },
    }


# --- Command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and print its tables; returns the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", choices=tuple(SIZES), default="cpu")
    options.add_argument("--output", type=Path, help="default: runs/study/SIZE/rft")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--runs", type=int, help="do fewer runs than the size has")
    options.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    given = options.parse_args(arguments)
    try:
        output = given.output or Path("runs/study") / given.size / "rft"
        found = run(output, size=given.size, seed=given.seed, jobs=given.jobs, runs=given.runs)
        print(write_section(found))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    end_with_children()
    sys.exit(main())
