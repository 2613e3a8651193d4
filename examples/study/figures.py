"""From what the runs have left to the figures of study.json: pooled accuracies, losses, the power law, differences."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats
from stages import ARMS, BASE, LONGER, RANDOM, TASKS, FineTuningRun, PretrainRun, Study

from megatron_polar.config.presets import Architecture
from megatron_polar.data.lines import read_jsonl
from megatron_polar.score.statistics import pair_score, word_overlap
from megatron_polar.score.suites import load_suite

REPLICATES = 4000
LEVEL = 0.95
PAPER_LAW = {"coefficient": 0.9, "exponent": 0.0425, "r2": 0.9886}
"""L(N) = 0.9 N^-0.0425, five sizes of 50M to 1B (arXiv 2507.05197, section 4.4)."""
RFT = "rft"
"""Below the study's directory: what the study of reinforcement fine-tuning (rft.py --output RUN/rft) has written."""
MIN_SIZES = 3
PRETRAIN_SETS = ("seen", "unseen", "real")
BASELINES = ("word_overlap", "longer")
"""What learns nothing: the one that shares more words with the reference, the longer one."""


@dataclass(frozen=True)
class Scored:
    """Margins (reward of the better less that of the worse) [i] of one evaluation; prompts and categories [i], and the
    margins [i] of each baseline."""

    margins: np.ndarray
    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    baselines: dict[str, np.ndarray]

    @property
    def scores(self) -> np.ndarray:
        """1 for a right pair, 1/2 for a tie, 0 for a wrong one."""
        return pair_score(self.margins)

    def baseline(self, name: str) -> "Scored":
        """What a baseline says of the same pairs."""
        return replace(self, margins=self.baselines[name])


def read_scored(directory: Path, *, suite: str, data: Path, limit: int | None = None) -> Scored:
    """The rewards of an evaluation, joined with the prompts of its data (pairs of one prompt are not independent)."""
    texts = _texts(suite, data, limit)
    lines = [json.loads(line) for _, line in read_jsonl(directory / "rewards.jsonl")]
    margins = np.array([line["rewards"][0] - line["rewards"][1] for line in lines])
    prompts, *without_learning = zip(*(texts[line["identifier"]] for line in lines), strict=True)
    baselines = dict(zip(BASELINES, map(np.array, without_learning), strict=True))
    return Scored(margins, prompts, tuple(line["category"] for line in lines), baselines)


@cache
def _texts(suite: str, data: Path, limit: int | None) -> dict[str, tuple[str, float, int]]:
    """Of every item the prompt, and each baseline's margin of the first candidate over the second."""
    found = {}
    for item in load_suite(suite, data, limit=limit):
        (better, worse), (first, second) = word_overlap(item)[:2], item.candidates[:2]
        found[item.identifier] = item.prompt, better - worse, len(first) - len(second)
    return found


def beside_baselines(found: Sequence[Scored]) -> dict:
    """Accuracy of each baseline, one evaluation a seed, and under `over` by how much the model exceeds it."""
    beside = {name: [one.baseline(name) for one in found] for name in BASELINES}
    accuracies = {name: float(np.mean(np.concatenate([one.scores for one in ones]))) for name, ones in beside.items()}
    return accuracies | {"over": {name: difference(found, ones) for name, ones in beside.items()}}


def pooled(values: Sequence[np.ndarray], prompts: Sequence[Sequence[str]], *, seed: int = 0) -> dict:
    """Mean of all values and its 95 % interval by a bootstrap over prompts; one entry of both lists for each seed.

    `ci95_seeds`: the interval of the mean over seeds (Student's t), what other seeds would change; None for one.
    """
    names = sorted({prompt for found in prompts for prompt in found})
    place = {name: index for index, name in enumerate(names)}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for found, texts in zip(values, prompts, strict=True):
        where = [place[text] for text in texts]
        np.add.at(sums, where, found)
        np.add.at(counts, where, 1)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=REPLICATES)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    each = [float(np.mean(found)) for found in values]
    mean = float(sums.sum() / counts.sum())
    between = over_seeds(each)
    return {
        "mean": mean,
        "ci95": [float(low), float(high)],
        "each_seed": each,
        "ci95_seeds": between and [max(0.0, between[0]), min(1.0, between[1])],
        "num_prompts": len(names),
        "num_pairs": int(counts.sum()),
    }


def over_seeds(each: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean of what seeds have each, by Student's t; None for one seed."""
    if len(each) < 2:
        return None
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(each) - 1) * np.std(each, ddof=1)) / len(each) ** 0.5
    return [float(np.mean(each)) - half, float(np.mean(each)) + half]


def bt_loss(scored: Scored) -> float:
    """Bradley-Terry loss, the paper's validation loss: mean of -log sigmoid(margin)."""
    return float(np.mean(np.logaddexp(0.0, -scored.margins)))


# --- pre-training ----------------------------------------------------------------------------------------------------


def num_parameters(study: Study, shape: str) -> dict[str, int]:
    """Weights of a reward model of this shape: all, and without the embedding."""
    s = study.size.shapes[shape]
    sizes = (
        s.num_layers,
        s.hidden_size,
        s.ffn_hidden_size,
        s.num_heads,
        s.num_query_groups,
        s.hidden_size // s.num_heads,
    )
    every = Architecture(*sizes).num_parameters(study.size.vocab_size)
    return {"all": every, "without_embedding": every - study.size.vocab_size * s.hidden_size}


def pretrain_group(study: Study, runs: Sequence[PretrainRun]) -> dict:
    """Figures of one setting over its seeds."""
    first, found = runs[0], {}
    for name in PRETRAIN_SETS:
        parts = [_pretrain_scored(study, run, name) for run in runs]
        found[name] = pooled([part.scores for part in parts], [part.prompts for part in parts])
        found[name]["losses"] = [bt_loss(part) for part in parts]
        found[name]["loss"] = float(np.mean(found[name]["losses"]))
        found[name] |= beside_baselines(parts)
        found[name]["categories"] = {
            category: float(np.mean(np.concatenate([p.scores[np.array(p.categories) == category] for p in parts])))
            for category in sorted(set(parts[0].categories))
        }
    steps = max(1, round(first.share * study.size.num_steps))
    return {
        "shape": first.shape,
        "start": first.start,
        "candidates": first.candidates,
        "share": first.share,
        "seeds": [run.seed for run in runs],
        "parameters": num_parameters(study, first.shape),
        "steps": steps,
        "comparisons": steps * study.size.global_batch_size,
        "seconds": [_seconds(study, f"pretrain/{run.name}") for run in runs],
        **found,
    }


def _pretrain_scored(study: Study, run: PretrainRun, name: str) -> Scored:
    suite = "preferences" if name == "real" else "policies"
    where = study.run / "evaluate/pretrain" / run.name / name
    return read_scored(where, suite=suite, data=study.run / f"heldout/{name}.jsonl")


def is_measured(study: Study, run: PretrainRun) -> bool:
    """Whether every evaluation of a run of pre-training can be reported."""
    return study.has(*(f"evaluate/pretrain/{run.name}/{name}" for name in PRETRAIN_SETS))


def pretraining(study: Study) -> dict:
    """Every setting once, with where the tables and the claims find theirs; nothing of what is not measured."""
    groups: dict[str, list[PretrainRun]] = {}
    for run in filter(partial(is_measured, study), study.pretrain_runs):
        groups.setdefault(run.setting, []).append(run)
    figures = {setting: pretrain_group(study, runs) for setting, runs in groups.items()}
    size, main, many, half = study.size, study.size.main_shape, study.size.main_candidates, study.size.sweep_share
    whole = PretrainRun(main, BASE, many, 1.0, 1).setting
    starts = {start: PretrainRun(main, start, many, half, 1).setting for start in (BASE, RANDOM)}
    tables = {
        "main": [whole],
        "start": [PretrainRun(s, start, many, half, 1).setting for s in size.shapes for start in starts],
        "candidates": [PretrainRun(main, BASE, k, half, 1).setting for k in size.candidates],
        "data": [PretrainRun(main, BASE, many, share, 1).setting for share in (*size.data_shares, 1.0)],
    }
    tables = {name: [key for key in keys if key in figures] for name, keys in tables.items()}
    curves = {
        name: [learning_curve(study.run / "pretrain" / run.name) for run in groups.get(setting, ())]
        for name, setting in {"all": whole, **starts}.items()
    }
    claims = {"main": whole, **starts}
    return {"settings": figures, "tables": tables, "claims": claims, "curves": curves}


def learning_curve(run: Path) -> list[tuple[int, float]]:
    """Steps and held-out accuracy inside the training loop."""
    rows = [json.loads(line) for _, line in read_jsonl(run / "metrics.jsonl")]
    return [(r["iteration"], r["validation/rm/accuracy"]) for r in rows if "validation/rm/accuracy" in r]


def scaling(study: Study, settings: dict) -> dict | None:
    """The power law over sizes, from base models, main K, a sweep's steps: loss of seen policies on unseen prompts.

    None where too few sizes are measured for a line to say anything.
    """
    many, half = study.size.main_candidates, study.size.sweep_share
    keys = [PretrainRun(shape, BASE, many, half, 1).setting for shape in study.size.shapes]
    groups = [settings[key] for key in keys if key in settings]
    if len(groups) < MIN_SIZES:
        return None
    losses = [group["seen"]["losses"] for group in groups]
    found = {}
    for convention in ("all", "without_embedding"):
        sizes = [group["parameters"][convention] for group in groups]
        found[convention] = fit_power_law(sizes, losses) | {"sizes": sizes}
    return found["all"] | {
        "losses": losses,
        "convention": "N counts all parameters of the reward model, its embedding included; the paper does not say",
        "without_embedding": found["without_embedding"],
        "paper": PAPER_LAW,
    }


def fit_power_law(sizes: Sequence[float], losses: Sequence[Sequence[float]]) -> dict:
    """L = coefficient N^-exponent by least squares on logarithms of sizes' mean losses; Student's t for the interval.

    The seeds of a size begin from one base model, so that they are no observations of their own.
    """
    x, y = np.log(sizes), np.log([np.mean(found) for found in losses])
    line = stats.linregress(x, y)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 2) * line.stderr)
    exponent = float(-line.slope)
    return {
        "exponent": exponent,
        "ci95": [exponent - half, exponent + half],
        "r2": float(line.rvalue**2),
        "coefficient": math.exp(line.intercept),
        "num_runs": sum(map(len, losses)),
    }


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def finetuning(study: Study, task: str) -> dict | None:
    """Every arm of a task over its seeds, what pre-training adds and what the reference adds, and the baselines.

    Of the seeds that all arms are measured with; None where there are none.
    """
    arms: dict[str, list[Scored]] = {}
    seeds = [seed for seed in range(1, study.size.finetune_seeds + 1) if _has_arms(study, task, seed)]
    if not seeds:
        return None
    for arm, (_, scheme) in ARMS.items():
        for seed in seeds:
            where = study.run / "evaluate/finetune" / FineTuningRun(task, arm, seed).name / "heldout"
            name = f"fold{study.fold(seed)}_heldout" if task == "gsm8k" else "heldout"
            data = study.run / "inputs/finetune" / task / scheme / f"{name}.jsonl"
            arms.setdefault(arm, []).append(read_scored(where, suite="preferences", data=data))
    figures = {arm: pooled([s.scores for s in found], [s.prompts for s in found]) for arm, found in arms.items()}
    pairs = combinations(ARMS, 2)  # in the order of ARMS: what should be better comes first
    figures["differences"] = {f"{a} - {b}": difference(arms[a], arms[b]) for a, b in pairs}
    return figures | beside_baselines(arms["pretrained_reference"])


def _has_arms(study: Study, task: str, seed: int) -> bool:
    return study.has(*(f"evaluate/finetune/{FineTuningRun(task, arm, seed).name}/heldout" for arm in ARMS))


def difference(first: Sequence[Scored], second: Sequence[Scored]) -> dict:
    """Accuracy of one arm less that of another on the same pairs and seeds, with its interval over prompts."""
    values = [a.scores - b.scores for a, b in zip(first, second, strict=True)]
    found = pooled(values, [one.prompts for one in first])
    each = found["each_seed"]
    return {"mean": found["mean"], "ci95": found["ci95"], "each_seed": each, "ci95_seeds": over_seeds(each)}


def zero_shot(study: Study) -> dict:
    """What the pre-trained main model says of sets that it was not fine-tuned on, over its seeds."""
    folder = study.run / "inputs/finetune"
    sets = {
        "rmb": ("rmb", study.data / "rmb/RMB_dataset", study.size.rmb_limit),
        "gsm8k": ("preferences", folder / "gsm8k/reference/all.jsonl", None),
        "alpaca_eval": ("preferences", folder / "alpaca_eval/reference/heldout.jsonl", study.size.preference_limit),
    }
    figures = {}
    for what, (suite, data, limit) in sets.items():
        names = [study.pretrained(seed) for seed in range(1, study.size.main_seeds + 1)]
        names = [name for name in names if study.has(f"evaluate/pretrain/{name}/{what}")]
        if not names:
            figures[what] = None
            continue
        where = [study.run / "evaluate/pretrain" / name / what for name in names]
        parts = [read_scored(directory, suite=suite, data=data, limit=limit) for directory in where]
        figures[what] = pooled([p.scores for p in parts], [p.prompts for p in parts])
        figures[what] |= beside_baselines(parts)
    return figures


# --- all of it -------------------------------------------------------------------------------------------------------


def collect(study: Study) -> dict:
    """All figures of the study, in the shape of docs/study.json."""
    pretrained = pretraining(study)
    rft = study.run / RFT / "rft.json"
    return {
        "finetune": {task: finetuning(study, task) for task in TASKS},
        "scaling": scaling(study, pretrained["settings"]),
        "pretraining": pretrained,
        "zero_shot": zero_shot(study),
        "rft": json.loads(rft.read_text()) if rft.is_file() else None,
        "policies": policies(study),
        "base_models": {
            s: json.loads((study.run / "base" / s / "training.json").read_text())
            for s in (*study.size.shapes, LONGER)
            if study.has(f"base-{s}")
        },
    }


def policies(study: Study) -> dict:
    """Who wrote what: numbers of policies, trajectories and prompts, from the manifests of `sample`."""
    facts = json.loads((study.run / "inputs/facts.json").read_text())
    sampled = {}
    for path in sorted((study.run / "sampled").glob("*/manifest.json")):
        manifest = json.loads(path.read_bytes())
        sampled[path.parent.name] = {
            name: manifest[name] for name in ("prompts", "trajectories", "words", "fingerprint")
        }
    training = sum(counts["trajectories"] for name, counts in sampled.items() if name.endswith("-train"))
    return facts["policies"] | {"sampled": sampled, "training_trajectories": training}


def _seconds(study: Study, job: str) -> float:
    return json.loads((study.run / "done" / f"{job}.json").read_text())["seconds"]


def commands(study: Study) -> dict[str, str]:
    """Every command that was run and counts, by its job, with the data's folder as $DATA and the study's as $RUN."""
    places: Iterable[tuple[str, str]] = (
        (str(study.data), "$DATA"),
        (str(study.run), "$RUN"),
        (str(study.docs), "$DOCS"),
    )
    found = {}
    for name, job in study.jobs.items():
        if not study.has(name) and job.stage != "report":
            continue
        shown = job.shown
        for path, variable in places:
            shown = re.sub(rf"(?<![^\s=]){re.escape(path)}(?![^\s/])", lambda _, v=variable: v, shown)
        found[name] = shown
    return found
