"""RunConfig → Run: everything that a run is made of, before its first step."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

import megatron_polar
from megatron_polar import log
from megatron_polar.config.presets import architecture_of
from megatron_polar.config.schema import CurriculumSection, DataSection, DatasetSource, RunConfig
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.loader import row_shape
from megatron_polar.data.pair_counts import PAIRS
from megatron_polar.data.steps import RowShape
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.errors import UserError, naming
from megatron_polar.model.build import BuiltModel, build_model
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.agreement import agree_on, check_in_parts, raise_everywhere
from megatron_polar.parallel.device import Device, check_cpu_can_train, make_deterministic, select_device
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.gradients import GradientReduction
from megatron_polar.train.guard import StepGuard
from megatron_polar.train.optimizer import (
    MegatronOptimizer,
    OptimizerParamScheduler,
    build_optimizer,
    build_schedule,
)
from megatron_polar.train.policy_pairs import PolicyPairs

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Training and held-out comparisons, the shape of their rows, and the tokenizer that travels with checkpoints."""

    train: ComparisonDataset
    validation: ComparisonDataset | None
    shape: RowShape
    tokenizer_directory: Path
    vocab_size: int

    def verify(self, *, how: str, after_each: Callable[[], None]) -> None:
        """Hash all tokens before the first step, each rank its share (`data.verify: full`). Collective.

        Raises UserError on every rank, naming the damaged file, or RunStopped, naming a machine that reads wrongly.
        """
        if how != "full":
            return

        def check(part: int, of: int) -> None:
            for dataset in filter(None, (self.train, self.validation)):
                for corpus in dataset.corpora:
                    corpus.verify_tokens(part, of, after_each=after_each)

        check_in_parts("the datasets", check)


@dataclass(frozen=True)
class Run:
    """Everything that a run is made of."""

    config: RunConfig
    device: Device
    topology: Topology
    data: Data
    model: BuiltModel
    reduction: GradientReduction
    guard: StepGuard
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    num_steps: int
    pairs: PolicyPairs

    @property
    def directory(self) -> Path:
        return Path(self.config.run.directory)

    @property
    def environment(self) -> dict:
        """Versions, machine, and what the data and the embedding were, for `environment.json`."""
        held_out = self.data.validation.corpora if self.data.validation else []
        return {
            "megatron_polar": megatron_polar.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": self.device.name,
            "world_size": self.topology.world_size,
            "embedding_rows": self.model.vocab_size,
            "tokenizer": self.data.train.corpora[0].manifest["tokenizer"]["fingerprint"],
            "train_data": [corpus.fingerprint for corpus in self.data.train.corpora],
            "validation_data": [corpus.fingerprint for corpus in held_out],
        }


def join_ranks(config: RunConfig) -> tuple[Device, Topology]:
    """Choose this rank's device and meet the other ranks. Raises UserError."""
    refuse_planted_outputs(Path(config.run.directory))
    device = select_device(config.run.device, local_rank=ranks.local_rank())
    check_cpu_can_train(device)
    if config.run.deterministic:
        make_deterministic(device)
    topology = ranks.initialize(config.parallel, device=device)
    ranks.seed_ranks(topology, seed=config.run.seed)
    return device, topology


def build_run(config: RunConfig, device: Device, topology: Topology) -> Run:
    """Open the data, build model, optimizer and schedule. Collective; raises UserError."""
    data = _on_all_ranks(open_data, config, topology=topology)
    num_steps = count_steps(config, data=data)
    model = _on_all_ranks(build_model, config, topology=topology, device=device, vocab_size=data.vocab_size)
    agree_on("model.transformer_impl", model.transformer_impl)
    reduction = GradientReduction(model, device=device)
    optimizer = build_optimizer(config.optimizer, model=model, reduction=reduction)
    schedule = build_schedule(config.optimizer, optimizer=optimizer, num_steps=num_steps)
    guard = StepGuard(config.faults)
    is_drawing = config.data.contrast == "by_difficulty"
    policies = data.train.policies
    pairs = PolicyPairs(config.data.curriculum, is_drawing=is_drawing, policies=policies, topology=topology)
    return Run(config, device, topology, data, model, reduction, guard, optimizer, schedule, num_steps, pairs)


_OUTPUTS = ("checkpoints", "tensorboard", "stacks", "lock", "metrics.jsonl", "events.jsonl", "status.json")
_OUTPUTS += ("config.yaml", "environment.json", "bad_steps.json", "report.html", PAIRS, "checkpoints/latest")


def refuse_planted_outputs(directory: Path) -> None:
    """Raise UserError where a file or directory that a run writes to is a link, which may lead anywhere, or a pipe.

    The run directory itself may be a link.
    """
    for path in [*(directory / name for name in _OUTPUTS), *directory.glob("stacks/*")]:
        if os.path.lexists(path) and (path.is_symlink() or not (path.is_file() or path.is_dir())):
            kind = "a link, and could lead anywhere" if path.is_symlink() else "neither a file nor a directory"
            raise UserError(f"{path}: is {kind}; remove it (run.directory itself may be a link)")


def _on_all_ranks(make: Callable[..., T], *arguments, **keywords) -> T:
    """What `make` returns, in which ranks wait for none; what one rank cannot make, none goes on without."""
    made = problem = None
    try:
        made = make(*arguments, **keywords)
    except UserError as error:
        problem = error
    raise_everywhere(problem)
    return made


def describe_run(run: Run, *, layout: dict[str, int]) -> list[str]:
    """What runs, in three lines for the log: model, ranks, data."""
    config, model = run.config, run.model
    parameters = model.architecture.num_parameters(model.vocab_size)
    optimizer = "distributed AdamW" if config.optimizer.use_distributed_optimizer else "AdamW"
    saves = "in the background" if config.checkpoint.async_save else "in the foreground"
    contrasts = config.data.contrast.replace("_", " ")
    return [
        f"model: {parameters / 1e6:.2f}M parameters, {config.train.precision}; layers: {model.transformer_impl}; "
        f"attention: {model.attention}; optimizer: {optimizer}; weight gradients: {model.gradient_fusion}; saves "
        f"{saves}",
        f"ranks: {run.topology.world_size} x {run.device.name} over {run.device.backend}; "
        f"{', '.join(f'{name}={size}' for name, size in layout.items())}",
        f"data: {len(run.data.train)} comparisons an epoch, contrasts {contrasts}, layout {config.data.layout}, "
        f"{config.data.num_workers} loader workers; {run.num_steps} steps of {config.train.global_batch_size} "
        f"comparisons",
    ]


def warn_of_no_choice(run: Run) -> None:
    """Say where `data.contrast: by_difficulty` has next to nothing to choose from."""
    if run.pairs.is_drawing and run.topology.rank == 0:
        choice = run.data.train.share_with_a_choice()
        if choice < 0.5:
            log.warn(
                f"data.contrast=by_difficulty chooses between the policies of a document, and {choice:.0%} of the "
                f"documents looked at have more than a comparison needs; give a prompt to more policies"
            )


def open_data(config: RunConfig, *, topology: Topology) -> Data:
    """Open the datasets, check that they were made with one tokenizer, and derive the shape of rows."""
    section = config.data
    curriculum = section.curriculum if section.contrast == "by_difficulty" else None
    with naming("data.train"):
        train_data = _comparisons(section, section.train, seed=config.run.seed, curriculum=curriculum)
    if curriculum is not None and not any(c.manifest["counts"]["trajectory_groups"] for c in train_data.corpora):
        raise UserError(
            f"data.contrast=by_difficulty chooses between policies, and {section.train[0].path} holds none, only "
            f"preferences; set it to uniform"
        )
    with naming("data.validation"):
        validation = _comparisons(section, section.validation, seed=config.run.seed + 1) if section.validation else None
    tokenizer_directory = Path(section.train[0].path) / "tokenizer"
    with naming("data.tokenizer" if section.tokenizer else "data.train"):
        origin = section.tokenizer or tokenizer_directory
        tokenizer = load_tokenizer(origin)
    for dataset in [train_data] + ([validation] if validation else []):
        for corpus in dataset.corpora:
            corpus.check_tokenizer(tokenizer, origin=origin)
    _check_lengths([train_data, *([validation] if validation else [])], section.max_sequence_length)
    shape = row_shape(
        section,
        topology=topology,
        architecture=architecture_of(config.model),
        in_turn=config.train.canonical_reduction,
    )
    return Data(train_data, validation, shape, tokenizer_directory, tokenizer.vocab_size)


def _check_lengths(datasets: Sequence[ComparisonDataset], max_sequence_length: int) -> None:
    """Two answers and the control tokens must fit, or some comparison would fail in the middle of the run."""
    corpora = [corpus for dataset in datasets for corpus in dataset.corpora]
    corpus = max(corpora, key=lambda corpus: corpus.manifest["invariants"]["longest_response"])
    longest = corpus.manifest["invariants"]["longest_response"]
    if 2 * longest + 4 > max_sequence_length:
        raise UserError(
            f"data.max_sequence_length={max_sequence_length} cannot hold two answers of {corpus.path}, whose longest "
            f"has {longest} tokens; set at least {2 * longest + 4}, or preprocess with a smaller --max-response-length"
        )


def _comparisons(
    section: DataSection, sources: Sequence[DatasetSource], *, seed: int, curriculum: CurriculumSection | None = None
) -> ComparisonDataset:
    return ComparisonDataset(
        sources,
        seed=seed,
        candidates_per_comparison=section.candidates_per_comparison,
        max_sequence_length=section.max_sequence_length,
        curriculum=curriculum,
    )


def count_steps(config: RunConfig, *, data: Data) -> int:
    """Optimizer steps of the run: `train.num_steps`, or `train.num_epochs` over the training comparisons."""
    if config.train.num_steps is not None:
        return config.train.num_steps
    steps = int(config.train.num_epochs * len(data.train) / config.train.global_batch_size)
    if steps < 1:
        raise UserError(
            f"train.num_epochs={config.train.num_epochs} over {len(data.train)} comparisons is less than one step of "
            f"train.global_batch_size={config.train.global_batch_size}; lower the batch size or add data"
        )
    return steps
