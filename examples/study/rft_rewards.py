"""The reward models of the RFT study: a pool of policies with habits, their trajectories, pre-training, fine-tuning.

Each public function is a stage: it writes below `directory` and returns figures. All that a user would do by hand goes
through the same commands here: sample, preprocess, convert, train, evaluate.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import rft_policies as policies
import rft_server
from omegaconf import OmegaConf
from rft_problems import Problem, gold_answers, is_right, is_worked, right_steps, worked_answer
from rft_sizes import RewardTraining, Size, draw_parts
from rft_stages import polar, running

from megatron_polar.errors import UserError

WRAPPER = "pretrain"
"""Policies continue "question\\n", so prompts end with the newline and nothing is put between prompt and answer."""
HOT = 1.5
"""Temperature of the answers that show fine-tuning what a policy comes to when it is pushed too far."""


def prompt_of(problem: Problem) -> str:
    """What policies and reward models are given."""
    return problem.prompt + "\n"


def write_lines(path: Path, lines: Iterable[dict]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_pairs(problems: list[Problem], *, habits: Mapping[str, float], seed: int) -> list[tuple[str, str]]:
    """(prompt, answer) of somebody who draws a habit anew for every answer; `habits` gives their probabilities."""
    generator, names, shares = np.random.default_rng(seed), list(habits), list(habits.values())
    drawn = generator.choice(names, size=len(problems), p=shares)
    return [
        (prompt_of(problem), worked_answer(problem, habit=str(habit), generator=generator))
        for problem, habit in zip(problems, drawn, strict=True)
    ]


def documents(problems: list[Problem], *, habits: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """(prompt, rest) of documents in which one author answers a problem twice, in one habit, with two opening words.

    Half of the authors have no bad habit, the others one of `habits` each, equally often.
    """
    generator = np.random.default_rng(seed)
    bad = [habit for habit in habits if habit != "exact"]
    found = []
    for problem in problems:
        habit = "exact" if generator.random() < 0.5 else bad[generator.integers(len(bad))]
        first, second = (worked_answer(problem, habit=habit, generator=generator) for _ in range(2))
        found.append((prompt_of(problem), f"{first}\n{prompt_of(problem)}{second}"))
    return found


# --- Policies --------------------------------------------------------------------------------------------------------


def fit_base(directory: Path, size: Size, seed: int) -> dict:
    """The base language model, on documents in which an author answers a problem twice, and copies of it on the way.

    As in natural text, what is said once tells what will be said later, errors and all; a model that has learnt this
    finds an answer in its reference sooner.
    """
    texts = documents(draw_parts(size, seed=seed).base, habits=size.habits, seed=seed)
    tokenizer = policies.train_tokenizer([prompt + answers for prompt, answers in texts], directory / "tokenizer")
    start = policies.new_model(tokenizer, size.shape, seed=seed, output=directory / "random")
    outputs = {directory / "unfinished" / name: step for name, step in size.stages.items()}
    outputs[directory / "base"] = size.base.steps
    figures = policies.fit(start, texts, size.base, seed=seed, device=size.device, outputs=outputs)
    return {**figures, **policies.describe(start)}


def fit_policies(directory: Path, size: Size, seed: int) -> dict:
    """The pool: the base model after a few more steps on answers with one habit, and early copies of it on right ones.

    All draw opening words alike, so that wording tells nobody apart: what does is in the numbers.
    """
    problems, losses = draw_parts(size, seed=seed).base, {}
    starts = {stage: ("exact", directory / "unfinished" / stage) for stage in size.stages}
    starts |= {habit: (habit, directory / "base") for habit in size.habits + size.unseen_habits}
    for number, (name, (habit, start)) in enumerate(starts.items()):
        pairs = answer_pairs(problems, habits={habit: 1.0}, seed=seed + number)
        outputs = {directory / "policies" / name: size.habit.steps}
        figures = policies.fit(start, pairs, size.habit, seed=seed + number, device=size.device, outputs=outputs)
        losses[name] = figures["last_loss"]
    return {"last_losses": losses, "exact": _knowledge(directory / "policies" / "exact", size, seed=seed)}


def _knowledge(policy: Path, size: Size, *, seed: int) -> dict:
    """What the base model knows of sums: right answers, greedy, of the policy without a bad habit to new problems."""
    problems = draw_parts(size, seed=seed).heldout
    greedy = policies.Draw(size.draw.max_tokens, top_k=1)
    texts = policies.answers(policy, [prompt_of(p) for p in problems], greedy, seed=seed, device=size.device)
    return {"greedy": fmean(map(is_right, problems, texts)), "problems": len(problems)}


# --- Trajectories ----------------------------------------------------------------------------------------------------


def sample_trajectories(directory: Path, size: Size, seed: int) -> dict:
    """`sample` from the pool for pre-training, and from policies that it does not see for other problems."""
    parts = draw_parts(size, seed=seed)
    seen, unseen = [*size.habits, *size.stages], list(size.unseen_habits)
    served = {name: directory / "policies" / name for name in seen + unseen}
    with running("/v1/models", _serve_policies, served, size.device) as address:
        for name, problems, pool in (("train", parts.prompts, seen), ("unseen", parts.heldout, unseen)):
            prompts = write_lines(directory / f"prompts-{name}.jsonl", ({"prompt": prompt_of(p)} for p in problems))
            polar(
                *("sample", "--pool", _write_pool(directory / f"pool-{name}.yaml", pool, size, address)),
                *("--prompts", prompts, "--output", directory / "trajectories" / name, "--seed", seed),
                *("--wrapper", WRAPPER, "--policies-per-prompt", min(4, len(pool))),
            )
    counts = {}
    for name in ("train", "unseen"):
        groups = [
            line for path in sorted((directory / "trajectories" / name).glob("*.jsonl")) for line in read_lines(path)
        ]
        counts[name] = {"prompts": len(groups), "trajectories": sum(len(group["trajectories"]) for group in groups)}
    return {"policies": seen, "unseen_policies": unseen, **counts}


def _serve_policies(served: dict[str, Path], device: str, port: int) -> None:
    rft_server.serve(served, device=device, port=port)


def _write_pool(path: Path, names: list[str], size: Size, address: str) -> Path:
    """A pool of models behind one endpoint. JSON is YAML, too."""
    common = {"endpoint": f"{address}/v1", "api": "completions", "max_concurrency": 512, **vars(size.pool_draw)}
    pool = {
        "policies": [{"name": name, "model": name, **common} for name in names],
        "cleaning": {"near_duplicates": 0},  # answers that differ in one digit are not duplicates
    }
    path.write_text(json.dumps(pool, indent=1))
    return path


def preprocess_trajectories(directory: Path, size: Size, seed: int) -> dict:
    """Tokenise both sets of trajectories."""
    for name in ("train", "unseen"):
        _preprocess(directory / "trajectories" / name, directory / "data" / name, tokenizer=directory / "base")
    return {}


def _preprocess(text: Path, output: Path, *, tokenizer: Path) -> Path:
    polar("preprocess", text, "--output", output, "--tokenizer", tokenizer, "--wrapper", WRAPPER)
    return output


def convert_base(directory: Path, size: Size, seed: int) -> dict:
    """The base model as a checkpoint that reward models start from."""
    shutil.rmtree(directory / "start", ignore_errors=True)
    polar("convert", "from-hf", "--model", directory / "base", "--output", directory / "start")
    return {}


# --- Reward models ---------------------------------------------------------------------------------------------------


def pretrain(directory: Path, size: Size, seed: int, run: int) -> dict:
    """POLAR pre-training on the pool's trajectories, from the base model."""
    shared = directory.parent / "shared"
    data = {"train": shared / "data" / "train", "validation": shared / "data" / "unseen"}
    return _train(directory / "pretrained", size.pretrain, start=shared / "start", **data, size=size, seed=seed + run)


def finetune(directory: Path, size: Size, seed: int, run: int, start: str) -> dict:
    """Fine-tuning on the labels; `start` is "pretrained", or "base" for a model that was not pre-trained."""
    from_there = directory / "pretrained" if start == "pretrained" else directory.parent / "shared" / "start"
    labels = directory / "labels"
    return _train(
        directory / f"finetuned-{start}", size.finetune, start=from_there, train=labels, size=size, seed=seed + run
    )


def _train(
    output: Path,
    how: RewardTraining,
    *,
    start: Path,
    train: Path,
    validation: Path | None = None,
    size: Size,
    seed: int,
) -> dict:
    """`megatron-polar train`; returns accuracies of its first and last rows, and of the held-out comparisons."""
    (saved, *_) = sorted(start.glob("checkpoints/step_*/config.yaml"), reverse=True)
    model = OmegaConf.to_container(OmegaConf.load(saved).model)
    config = {
        "run": {"directory": str(output), "seed": seed, "device": size.device},
        "model": model,
        "data": {
            "train": [{"path": str(train)}],
            "validation": [{"path": str(validation)}] if validation else [],
            "candidates_per_comparison": 4,  # all that the pool gives for a prompt; pairs have two
            "max_sequence_length": 512,
            "max_tokens_per_micro_batch": 8192,
            "num_workers": 0,
        },
        "train": {
            "global_batch_size": how.batch,
            "num_steps": how.steps,
            "precision": "fp32",
            "init_from": str(start),
        },
        "optimizer": {"lr": how.lr, "warmup_fraction": how.warmup_fraction},
        "checkpoint": {"save_interval": how.steps},
        "evaluation": {"interval": max(1, how.steps // 4) if validation else 0, "num_comparisons": 256},
        "logging": {"interval": max(1, how.steps // 20), "tensorboard": False},
    }
    shutil.rmtree(output, ignore_errors=True)  # an interrupted stage begins anew
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    polar("train", path)
    rows = read_lines(output / "metrics.jsonl")
    accuracies = [row["rm/accuracy"] for row in rows if "rm/accuracy" in row]
    held_out = [row["validation/rm/accuracy"] for row in rows if "validation/rm/accuracy" in row]
    return {"first_accuracy": accuracies[0], "last_accuracy": accuracies[-1], "unseen_policies": held_out}


def evaluate_rewards(directory: Path, size: Size, seed: int, run: int, models: list[str]) -> dict:
    """Accuracy of each reward model on right over wrong answers of the policy to test problems."""
    found = {}
    for model in models:
        output = directory / f"evaluate-{model}"
        polar(
            *("evaluate", "--checkpoint", directory / model, "--suite", "preferences"),
            *("--data", directory / "test.jsonl", "--output", output, "--device", size.device),
        )
        summary = json.loads((output / "summary.json").read_text())
        names = ("accuracy", "low", "high", "num_pairs", "word_overlap_accuracy", "length_only_accuracy")
        found[model] = {name: summary[name] for name in names}
    return found


# --- Labels ----------------------------------------------------------------------------------------------------------


def draw_labels(directory: Path, size: Size, seed: int, run: int) -> dict:
    """Ranked answers of the policy before GRPO to fine-tune on, some of them drawn hot, so that malformed ones are
    among them; and right over wrong answers, drawn as ever, to evaluate with.
    """
    parts, shared, own = draw_parts(size, seed=seed, run=run), directory.parent / "shared", seed + 1000 * (run + 1)
    hot = dataclasses.replace(size.draw, temperature=HOT, top_p=1.0)

    def drawn(draw: policies.Draw, problems: list[Problem], count: int, seed: int) -> list[list[str]]:
        prompts = [prompt_of(problem) for problem in problems for _ in range(count)]
        texts = policies.answers(directory / "before", prompts, draw, seed=seed, device=size.device)
        return [texts[first : first + count] for first in range(0, len(texts), count)]

    labelled = drawn(size.draw, parts.labels, size.answers_per_label, own)
    heated = drawn(hot, parts.labels, 2, own + 1)
    tested = drawn(size.draw, parts.test, size.answers_per_label, own + 2)
    rankings = rank(parts.labels, [one + other for one, other in zip(labelled, heated, strict=True)], seed=own)
    pairs = rank(parts.test, tested, seed=own + 1, levels=right_or_wrong)
    for name, lines in (("labels", rankings), ("test", pairs)):
        if not lines:
            raise UserError(f"{name}: no problem has answers to rank; let the policy warm up for more steps")
        write_lines(directory / f"{name}.jsonl", lines)
    _preprocess(directory / "labels.jsonl", directory / "labels", tokenizer=shared / "base")
    return {"rankings": len(rankings), "ranked": sum(len(line["ranked"]) for line in rankings), "pairs": len(pairs)}


def right_or_wrong(problem: Problem, text: str) -> int:
    """1 or 0, by the final number alone."""
    return int(is_right(problem, text))


def partial_credit(problem: Problem, text: str) -> int:
    """Right answers first; of wrong ones those whose first step is right; last what is no worked answer at all."""
    if not is_worked(text):
        return -1
    return 2 + is_right(problem, text) if right_steps(problem, text) else int(is_right(problem, text))


def rank(
    problems: list[Problem],
    answers: list[list[str]],
    *,
    seed: int,
    levels: Callable[[Problem, str], int] = partial_credit,
) -> list[dict]:
    """A ranking for each problem whose answers are of two levels or more: the first answer of every level, best first.

    The reference is a right answer with an opening word of its own.
    """
    references, lines = gold_answers(problems, seed=seed), []
    for problem, reference, texts in zip(problems, references, answers, strict=True):
        first: dict[int, str] = {}
        for text in texts:
            if text.strip() and text != reference:
                first.setdefault(levels(problem, text), text)
        ranked = [first[level] for level in sorted(first, reverse=True)]
        if len(ranked) > 1:
            prompt = prompt_of(problem)
            lines.append({"prompt": prompt, "reference": reference, "ranked": ranked, "wrapper": WRAPPER})
    return lines
