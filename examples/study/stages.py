"""The stages of the study as jobs: what each command reads, writes and depends on.

policies  inputs from public data, trajectories sampled, tokenizer, datasets, held-out comparisons
base      small causal language models of every size, brought in with `convert from-hf --head init`
pretrain  POLAR pre-training from base and from random weights, over sizes, K and data; evaluations
finetune  GSM8K solutions and AlpacaEval preferences, with and without pre-training and references; zero-shot figures
report    study.json, study.md and its figures
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jobs import HERE, PROGRAM, Job
from sizes import FineTuning, Shape, Size

STAGES = ("policies", "base", "pretrain", "finetune", "report")
CONFIG = "train.yaml"
MAX_BAD_FRACTION = "0.1"  # groups whose policies all said the same
ARMS = {
    "pretrained_reference": ("pretrained", "reference"),
    "reference_longer_base": ("longer", "reference"),
    "reference_only": ("base", "reference"),
    "neither": ("base", "none"),
}
"""Where fine-tuning starts, and whether reference texts are given; what should be better comes first."""
BASE, RANDOM = "base", "random"
LONGER = "longer"
"""A base model of the main shape that has read as many tokens more as pre-training does."""
_START_SECONDS = 4.0  # of a command that needs torch


@dataclass(frozen=True)
class PretrainRun:
    """One run of POLAR pre-training; share: of the size's steps."""

    shape: str
    start: str
    candidates: int
    share: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.start}-k{self.candidates}-d{self.share:g}-seed{self.seed}"

    @property
    def setting(self) -> str:
        """What figures call it and its other seeds."""
        return f"{self.shape}/{self.start}/{self.candidates}/{self.share}"


@dataclass(frozen=True)
class FineTuningRun:
    """One fine-tuning of the main shape: a task of `TASKS`, an arm of `ARMS`."""

    task: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.arm}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """A size of the study, where the public data are, and where everything is written."""

    size: Size
    data: Path
    run: Path
    docs: Path
    digests: tuple[tuple[str, str], ...]
    """Name and SHA-256 of every public file."""
    done: frozenset[str] | None = None
    """For a report on what there is: the jobs whose outputs count. None: every job."""

    @cached_property
    def jobs(self) -> dict[str, Job]:
        """All jobs, in an order in which needs come first."""
        parts = (self._policies(), self._base(), self._pretrain(), self._finetune(), self._report())
        return {job.name: job for part in parts for job in part}

    def has(self, *names: str) -> bool:
        """Whether the outputs of these jobs can be reported."""
        return self.done is None or self.done.issuperset(names)

    # --- which runs there are ----------------------------------------------------------------------------------------

    @cached_property
    def pretrain_runs(self) -> list[PretrainRun]:
        """The runs without repetition: the main one, scaling, random start, data, K."""
        size, main, many, share = self.size, self.size.main_shape, self.size.main_candidates, self.size.sweep_share
        runs = [PretrainRun(main, BASE, many, 1.0, seed) for seed in _seeds(size.main_seeds)]
        for start, shapes in ((BASE, size.base_seeds), (RANDOM, size.random_seeds)):
            runs += [PretrainRun(s, start, many, share, seed) for s, n in shapes.items() for seed in _seeds(n)]
        ablation = _seeds(size.ablation_seeds)
        runs += [PretrainRun(main, BASE, many, part, seed) for part in size.data_shares for seed in ablation]
        runs += [PretrainRun(main, BASE, k, share, seed) for k in size.candidates for seed in ablation]
        return list(dict.fromkeys(runs))

    @cached_property
    def finetune_runs(self) -> list[FineTuningRun]:
        """Every task, arm and seed."""
        seeds = _seeds(self.size.finetune_seeds)
        return [FineTuningRun(task, arm, seed) for seed in seeds for task in TASKS for arm in ARMS]

    def pretrained(self, seed: int) -> str:
        """The pre-trained run that fine-tuning with this seed starts from."""
        size, main = self.size, self.size.main_shape
        return PretrainRun(main, BASE, size.main_candidates, 1.0, (seed - 1) % size.main_seeds + 1).name

    def fold(self, seed: int) -> int:
        """The fold of GSM8K that fine-tuning with this seed holds out."""
        return (seed - 1) % self.size.gsm8k_folds

    # --- policies ----------------------------------------------------------------------------------------------------

    def _policies(self) -> Iterator[Job]:
        run, size, cut = self.run, self.size, self.size.max_response_length
        inputs, tokenizer = run / "inputs", str(run / "tokenizer.model")
        words = ("sources.py", "--data", str(self.data), "--output", str(inputs), "--size", size.name)
        knobs = tuple((name, str(getattr(size, name))) for name in OF_INPUTS)
        yield Job("policies", "inputs", words, inputs, seconds=40, reads=(*self.digests, *knobs))
        for task in ("alpaca", "gsm8k"):
            for part, pool, prompts in SAMPLED:
                output = run / "sampled" / f"{task}-{part}"
                words = (PROGRAM, "sample", "--pool", str(inputs / f"{task}_{pool}.yaml"), "--schedule", "all")
                words += ("--prompts", str(inputs / "prompts" / f"{task}_{prompts}.jsonl"), "--wrapper", "sft")
                words += ("--output", str(output))
                yield Job("policies", f"sampled-{task}-{part}", words, output, ("inputs",), seconds=40)
        train = [str(run / "sampled" / f"{task}-train") for task in ("alpaca", "gsm8k")]
        sampled = ("sampled-alpaca-train", "sampled-gsm8k-train")
        words = (PROGRAM, "train-tokenizer", *train, "--output", tokenizer, "--vocab-size", str(size.vocab_size))
        yield Job("policies", "tokenizer", words, run / "tokenizer.model", sampled, seconds=30)
        for part in ("seen", "unseen"):
            words = (
                "texts.py",
                "heldout",
                "--sampled",
                *(str(run / f"sampled/{t}-{part}") for t in ("alpaca", "gsm8k")),
            )
            words += ("--per-prompt", str(size.heldout_per_prompt), "--output", str(run / f"heldout/{part}.jsonl"))
            needs = (f"sampled-alpaca-{part}", f"sampled-gsm8k-{part}")
            yield Job("policies", f"heldout-{part}", words, run / f"heldout/{part}.jsonl", needs, seconds=5)
        words = (
            "texts.py",
            "real",
            "--sampled",
            str(run / "sampled/alpaca-unseen"),
            "--answers",
            str(inputs / "answers"),
        )
        words += ("--per-prompt", str(size.heldout_per_prompt), "--max-words", str(size.alpaca_max_words))
        words += ("--output", str(run / "heldout/real.jsonl"))
        yield Job("policies", "heldout-real", words, run / "heldout/real.jsonl", ("sampled-alpaca-unseen",), seconds=5)
        for task in ("alpaca", "gsm8k"):
            yield self._preprocess(f"datasets/{task}", run / f"sampled/{task}-train", f"sampled-{task}-train", cut=cut)
        yield self._preprocess("datasets/seen", run / "heldout/seen.jsonl", "heldout-seen", cut=cut)

    def _preprocess(self, name: str, source: Path, needs: str, *, cut: int, stage: str = "policies") -> Job:
        output = self.run / name
        words = (
            PROGRAM,
            "preprocess",
            str(source),
            "--output",
            str(output),
            "--tokenizer",
            f"{self.run}/tokenizer.model",
        )
        words += ("--max-bad-fraction", MAX_BAD_FRACTION, "--max-response-length", str(cut))
        return Job(stage, name.replace("/", "-"), words, output, (needs, "tokenizer"), seconds=20)

    # --- base models -------------------------------------------------------------------------------------------------

    def _base(self) -> Iterator[Job]:
        run, size, text = self.run, self.size, self.run / "base.jsonl"
        sampled = tuple(f"sampled-{task}-train" for task in ("alpaca", "gsm8k"))
        words = (
            "texts.py",
            "base",
            "--sampled",
            *(str(run / "sampled" / name.removeprefix("sampled-")) for name in sampled),
        )
        words += ("--answers", str(run / "inputs/answers"), "--max-words", str(size.gsm8k_answer_words))
        yield Job("base", "base-text", (*words, "--output", str(text)), text, sampled, seconds=20)
        longer = size.base_tokens + round(self._pretraining_tokens(size.main_candidates, size.num_steps))
        models = {name: (shape, size.base_tokens) for name, shape in size.shapes.items()}
        for name, (shape, tokens) in (models | {LONGER: (size.shapes[size.main_shape], longer)}).items():
            output = run / "base" / name
            words = ("base_model.py", str(text), "--tokenizer", str(run / "tokenizer.model"), "--output", str(output))
            words += ("--hidden-size", str(shape.hidden_size), "--num-layers", str(shape.num_layers))
            words += ("--ffn-hidden-size", str(shape.ffn_hidden_size), "--num-heads", str(shape.num_heads))
            words += ("--num-query-groups", str(shape.num_query_groups), "--num-tokens", str(tokens))
            words += ("--context", str(size.base_context), "--batch-tokens", str(size.base_batch_tokens))
            words += ("--lr", f"{size.base_lr:.2e}", "--device", size.device)
            seconds = self._seconds(shape, tokens, head=True)
            needs = ("base-text", "tokenizer")
            yield Job("base", f"base-{name}", words, output, needs, seconds=seconds, reads=_hashes("muon.py"))
            words = (PROGRAM, "convert", "from-hf", "--model", str(output), "--output", str(run / "start" / name))
            yield Job("base", f"start-{name}", (*words, "--head", "init"), run / "start" / name, (f"base-{name}",))

    def _seconds(self, shape: Shape, tokens: float, *, head: bool = False) -> float:
        """A guess: six operations a weight and token, at the speed of a core (or GPU) of this size."""
        hidden = shape.hidden_size
        heads = 2 + 2 * shape.num_query_groups / shape.num_heads
        weights = shape.num_layers * hidden * (heads * hidden + 3 * shape.ffn_hidden_size)
        weights += head * hidden * self.size.vocab_size
        return _START_SECONDS + 6 * weights * tokens / self.size.flops_per_second

    # --- pre-training ------------------------------------------------------------------------------------------------

    def _pretrain(self) -> Iterator[Job]:
        for one in self.pretrain_runs:
            yield self._pretrain_job(one)
            for part in ("seen", "unseen", "real"):
                suite = "preferences" if part == "real" else "policies"
                yield self._evaluate("pretrain", one.name, part, suite=suite, data=self.run / f"heldout/{part}.jsonl")

    def _pretrain_job(self, one: PretrainRun) -> Job:
        size, run, shape = self.size, self.run, self.size.shapes[one.shape]
        steps = max(1, round(one.share * size.num_steps))
        sources = ", ".join(f"{{path: {run}/datasets/{task}, weight: 0.5}}" for task in ("alpaca", "gsm8k"))
        words = (
            PROGRAM,
            "train",
            f"examples/study/{CONFIG}",
            f"run.directory={run}/pretrain/{one.name}",
            f"run.seed={one.seed}",
        )
        words += (f"run.device={size.device}", *_model_words(shape), f"data.train=[{sources}]")
        words += (
            f"data.validation=[{{path: {run}/datasets/seen}}]",
            f"data.candidates_per_comparison={one.candidates}",
        )
        words += (
            f"data.max_sequence_length={size.max_sequence_length}",
            *self._row_words(),
            f"train.num_steps={steps}",
        )
        words += (f"train.global_batch_size={size.global_batch_size}", f"optimizer.lr={shape.lr:.2e}")
        words += (
            f"evaluation.interval={max(1, steps // 10)}",
            f"evaluation.num_comparisons={size.validation_comparisons}",
        )
        needs = ("datasets-alpaca", "datasets-gsm8k", "datasets-seen")
        if one.start == BASE:
            words, needs = (*words, f"train.init_from={run}/start/{one.shape}"), (*needs, f"start-{one.shape}")
        seconds = self._seconds(shape, self._pretraining_tokens(one.candidates, steps))
        output, name = run / "pretrain" / one.name, f"pretrain/{one.name}"
        return Job("pretrain", name, words, output, needs, seconds=1.2 * seconds, reads=_hashes(CONFIG))

    def _row_words(self) -> tuple[str, ...]:
        size = self.size
        return f"data.max_tokens_per_micro_batch={size.max_tokens_per_micro_batch}", f"train.precision={size.precision}"

    def _pretraining_tokens(self, candidates: int, steps: int) -> float:
        """A guess of the tokens of so many steps, prefixes shared: within a tenth of what they have at CPU size."""
        answer = 0.6 * (self.size.alpaca_max_words + self.size.gsm8k_answer_words)
        return steps * self.size.global_batch_size * (100 + (1 + candidates) * answer)

    def _evaluate(self, stage: str, run_name: str, what: str, *, suite: str, data: Path, needs: tuple[str, ...] = (),
                  limit: int | None = None, seconds: float = 20.0) -> Job:  # fmt: skip
        """Accuracy of a run of `stage` on one set."""
        output = self.run / "evaluate" / stage / run_name / what
        words = (PROGRAM, "evaluate", "--checkpoint", str(self.run / stage / run_name), "--suite", suite)
        words += ("--data", str(data), "--output", str(output), "--device", self.size.device)
        words += ("--limit", str(limit)) if limit else ()
        return Job(
            stage, f"evaluate/{stage}/{run_name}/{what}", words, output, (f"{stage}/{run_name}", *needs), seconds
        )

    # --- fine-tuning -------------------------------------------------------------------------------------------------

    def _finetune(self) -> Iterator[Job]:
        folder, size = self.run / "inputs/finetune", self.size
        for task, settings in self.tasks.items():
            names = [f"fold{fold}_train" for fold in range(size.gsm8k_folds)] if task == "gsm8k" else ["train"]
            for scheme in dict.fromkeys(scheme for _, scheme in ARMS.values()):
                for name in names:
                    source = folder / task / scheme / f"{name}.jsonl"
                    where = f"datasets/{task}-{scheme}-{name}"
                    yield self._preprocess(where, source, "inputs", stage="finetune", cut=settings.max_response_length)
        for seed in _seeds(size.main_seeds):  # what pre-training alone knows
            name, zero_shot = self.pretrained(seed), folder / "alpaca_eval/reference/heldout.jsonl"
            sets = {"rmb": ("rmb", self.data / "rmb/RMB_dataset", size.rmb_limit)}
            sets["gsm8k"] = ("preferences", folder / "gsm8k/reference/all.jsonl", None)
            sets["alpaca_eval"] = ("preferences", zero_shot, size.preference_limit)
            for what, (suite, data, limit) in sets.items():
                job = self._evaluate(
                    "pretrain", name, what, suite=suite, data=data, needs=("inputs",), limit=limit, seconds=60
                )
                yield _in_stage("finetune", job)
        for one in self.finetune_runs:
            scheme, fold = ARMS[one.arm][1], f"fold{self.fold(one.seed)}_" if one.task == "gsm8k" else ""
            yield self._finetune_job(one, dataset=f"datasets/{one.task}-{scheme}-{fold}train")
            data = folder / one.task / scheme / f"{fold}heldout.jsonl"
            yield self._evaluate("finetune", one.name, "heldout", suite="preferences", data=data, seconds=60)

    @property
    def tasks(self) -> dict[str, FineTuning]:
        """Settings of each task."""
        return {"gsm8k": self.size.gsm8k, "alpaca_eval": self.size.alpaca}

    def _finetune_job(self, one: FineTuningRun, *, dataset: str) -> Job:
        size, run, settings = self.size, self.run, self.tasks[one.task]
        shape = size.shapes[size.main_shape]
        where = {BASE: f"start/{size.main_shape}", LONGER: f"start/{LONGER}"}
        where |= {"pretrained": f"pretrain/{self.pretrained(one.seed)}"}
        start = where[ARMS[one.arm][0]]
        needs = start.replace("start/", "start-")
        words = (
            PROGRAM,
            "train",
            f"examples/study/{CONFIG}",
            f"run.directory={run}/finetune/{one.name}",
            f"run.seed={one.seed}",
        )
        words += (f"run.device={size.device}", *_model_words(shape), f"data.train=[{{path: {run}/{dataset}}}]")
        words += (f"data.max_sequence_length={settings.max_sequence_length}", *self._row_words())
        words += ("train.num_steps=null", f"train.num_epochs={settings.num_epochs}")
        words += (f"train.global_batch_size={size.finetune_batch_size}", f"optimizer.lr={settings.lr:.2e}")
        words += ("optimizer.weight_decay=0.1", f"train.init_from={run}/{start}")
        needs = (needs, dataset.replace("/", "-"))
        tokens = settings.num_epochs * (1200 * 700 if one.task == "gsm8k" else 8000 * 500)
        return Job(
            "finetune",
            f"finetune/{one.name}",
            words,
            run / "finetune" / one.name,
            needs,
            1.2 * self._seconds(shape, tokens),
            reads=_hashes(CONFIG),
        )

    # --- report ------------------------------------------------------------------------------------------------------

    def _report(self) -> Iterator[Job]:
        words = ("report.py", "--run", str(self.run), "--docs", str(self.docs))
        needs = tuple(job.name for part in (self._pretrain(), self._finetune()) for job in part)
        rft = self.run / "rft" / "rft.json"  # made by hand: rft.py --output RUN/rft
        reads = (("rft", hashlib.sha256(rft.read_bytes()).hexdigest()),) if rft.is_file() else ()
        reads += _hashes("figures.py", "charts.py", "page.py", "shortcomings.py", "verdicts.py")
        yield Job("report", "report", words, self.run / "report", needs, seconds=20, reads=reads)


def _hashes(*names: str) -> tuple[tuple[str, str], ...]:
    """Of files of this folder that a command reads without a word about them."""
    return tuple((name, hashlib.sha256((HERE / name).read_bytes()).hexdigest()) for name in names)


TASKS = ("gsm8k", "alpaca_eval")
OF_INPUTS = ("alpaca_prompt_words", "gsm8k_prompt_words", "gsm8k_prompts", "gsm8k_heldout_prompts", "alpaca_fidelity")
OF_INPUTS += (
    "gsm8k_fidelity",
    "alpaca_max_words",
    "gsm8k_max_words",
    "gsm8k_answer_words",
    "gsm8k_folds",
    "gsm8k_pairs",
    "preference_limit",
)
"""Knobs of a size that sources.py reads."""
SAMPLED = (("train", "seen", "train"), ("seen", "seen", "heldout"), ("unseen", "unseen", "heldout"))
"""Part, pool and prompts of what is sampled of each kind."""


def _seeds(count: int) -> range:
    return range(1, count + 1)


def _in_stage(stage: str, job: Job) -> Job:
    return Job(stage, job.name, job.words, job.output, job.needs, job.seconds, job.reads)


def _model_words(shape: Shape) -> tuple[str, ...]:
    std = shape.hidden_size**-0.5
    return (
        f"model.num_layers={shape.num_layers}",
        f"model.hidden_size={shape.hidden_size}",
        f"model.ffn_hidden_size={shape.ffn_hidden_size}",
        f"model.num_attention_heads={shape.num_heads}",
        f"model.num_query_groups={shape.num_query_groups}",
        f"model.kv_channels={shape.hidden_size // shape.num_heads}",
        f"model.init_method_std={std:.4f}",
    )
