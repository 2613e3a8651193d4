"""What a run reads and writes, looked at before it starts: datasets, tokenizer, checkpoint, run directory. No torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_polar.config.load import load_saved_config
from megatron_polar.config.presets import Architecture, architecture_of
from megatron_polar.config.schema import RunConfig
from megatron_polar.data.storage import read_dataset_manifest
from megatron_polar.data.tokenizer import Tokenizer, load_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.manifest import Damaged, check_sizes, read_manifest
from megatron_polar.train.checkpoint_files import FORMAT, FORMAT_VERSION, candidates


@dataclass(frozen=True)
class DatasetFacts:
    """What a dataset's manifest says. A half is prompt and answer; a sequence of a comparison has two halves."""

    key: str
    path: Path
    num_comparisons: int
    num_halves: int
    num_tokens: int
    num_preferences: int
    longest_response: int
    vocab_size: int
    tokenizer_fingerprint: str


@dataclass(frozen=True)
class Paths:
    """What was found, and one line for everything that a run would stop at."""

    train: tuple[DatasetFacts, ...] = ()
    validation: tuple[DatasetFacts, ...] = ()
    vocab_size: int | None = None
    """The tokenizer's, where a dataset or `data.tokenizer` gives one."""
    problems: tuple[str, ...] = ()

    @property
    def longest_response(self) -> int | None:
        """Tokens of the longest answer in any dataset."""
        return max((facts.longest_response for facts in self.train + self.validation), default=None)


def look_at_paths(config: RunConfig) -> Paths:
    """Read manifests and compare file sizes; no content is hashed, which is what training does before its first step.

    Raises nothing: what is wrong becomes a problem, all of them at once.
    """
    problems: list[str] = []
    found = {
        name: [
            facts
            for number, source in enumerate(getattr(config.data, name))
            if (facts := _dataset(source.path, key=f"data.{name}[{number}].path", problems=problems))
        ]
        for name in ("train", "validation")
    }
    datasets = found["train"] + found["validation"]
    _check_lengths(datasets, max_sequence_length=config.data.max_sequence_length, problems=problems)
    tokenizer = _tokenizer(config.data.tokenizer, key="data.tokenizer", problems=problems)
    _check_one_tokenizer(datasets, tokenizer=tokenizer, problems=problems)
    if config.train.init_from is not None:
        _check_checkpoint(config, datasets=datasets, problems=problems)
    _check_run_directory(Path(config.run.directory), problems=problems)
    vocab_size = tokenizer.vocab_size if tokenizer else next((facts.vocab_size for facts in datasets), None)
    return Paths(tuple(found["train"]), tuple(found["validation"]), vocab_size, tuple(problems))


def _dataset(path: str, *, key: str, problems: list[str]) -> DatasetFacts | None:
    directory = Path(path)
    if not directory.is_dir():
        problems.append(
            f"{key}={path}: no such directory, and training needs it; make it with `megatron-polar preprocess` (on a "
            f"cluster: slurm/preprocess.sh), or check the path"
        )
        return None
    try:
        manifest = read_dataset_manifest(directory)
        check_sizes(directory, manifest["files"])
    except Damaged as damage:
        problems.append(f"{key}: {path}/{damage}; restore the file or run preprocess again")
        return None
    except OSError as error:
        problems.append(f"{key}: {error.filename or path}: cannot be read ({error.strerror}); check the disk")
        return None
    counts = manifest["counts"]
    return DatasetFacts(
        key=key,
        path=directory,
        num_comparisons=manifest["invariants"]["documents"],
        num_halves=counts["halves"],
        num_tokens=counts["tokens"],
        num_preferences=counts["preferences"],
        longest_response=manifest["invariants"]["longest_response"],
        vocab_size=manifest["tokenizer"]["vocab_size"],
        tokenizer_fingerprint=manifest["tokenizer"]["fingerprint"],
    )


def _check_lengths(datasets: Sequence[DatasetFacts], *, max_sequence_length: int, problems: list[str]) -> None:
    """As train/build.py: two answers and the control tokens must fit."""
    for facts in datasets:
        needed = 2 * facts.longest_response + 4
        if needed > max_sequence_length:
            problems.append(
                f"data.max_sequence_length={max_sequence_length} cannot hold two answers of {facts.path}, whose "
                f"longest has {facts.longest_response} tokens; set at least {needed}, or preprocess with a smaller "
                f"--max-response-length"
            )


def _tokenizer(path: str | None, *, key: str, problems: list[str]) -> Tokenizer | None:
    if path is None:
        return None
    try:
        return load_tokenizer(path)
    except (UserError, OSError) as error:
        problems.append(f"{key}: {error}")
    return None


def _check_one_tokenizer(datasets: Sequence[DatasetFacts], *, tokenizer: Tokenizer | None, problems: list[str]) -> None:
    if not datasets:
        return
    wanted = tokenizer.fingerprint if tokenizer else datasets[0].tokenizer_fingerprint
    whose = "data.tokenizer" if tokenizer else str(datasets[0].path)
    for facts in datasets:
        if facts.tokenizer_fingerprint != wanted:
            problems.append(
                f"{facts.key}={facts.path}: made with tokenizer {facts.tokenizer_fingerprint[:12]}, and {whose} has "
                f"{wanted[:12]}, whose ids mean other text; run preprocess again with one tokenizer for all"
            )


def _check_checkpoint(config: RunConfig, *, datasets: Sequence[DatasetFacts], problems: list[str]) -> None:
    """As train/resume.py, without hashing: it is there, has the model's shape, and means the datasets' ids."""
    path = config.train.init_from
    try:
        checkpoint = next((found for found in candidates(path) if _is_complete(found)), None)
        if checkpoint is None:
            problems.append(f"train.init_from={path}: has no complete checkpoint; make one with `convert` or `train`")
            return
        saved = architecture_of(load_saved_config(checkpoint / "config.yaml").model)
        fingerprint = load_tokenizer(checkpoint / "tokenizer").fingerprint
    except (UserError, OSError) as error:
        problems.append(f"train.init_from: {error}")
        return
    wanted = architecture_of(config.model)
    for name in (field.name for field in fields(Architecture) if field.name not in ("init_method_std", "last_layer")):
        if getattr(saved, name) != getattr(wanted, name):
            problems.append(
                f"train.init_from={checkpoint}: was made with model.{name}={getattr(saved, name)}, and this run has "
                f"{getattr(wanted, name)}, another model; use the model section of {checkpoint}/config.yaml"
            )
    if datasets and fingerprint != datasets[0].tokenizer_fingerprint:
        problems.append(
            f"train.init_from={checkpoint}: has tokenizer {fingerprint[:12]}, and {datasets[0].path} was made with "
            f"{datasets[0].tokenizer_fingerprint[:12]}; run preprocess again with {checkpoint}/tokenizer"
        )


def _is_complete(checkpoint: Path) -> bool:
    try:
        check_sizes(checkpoint, read_manifest(checkpoint, format_name=FORMAT, format_version=FORMAT_VERSION)["files"])
    except (Damaged, OSError, KeyError, TypeError, AttributeError):
        return False
    return True


def _check_run_directory(directory: Path, *, problems: list[str]) -> None:
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is no directory" if not there.is_dir() else "is not writable by you"
        problems.append(f"run.directory={directory}: {there} {why}; choose another run.directory")
