"""Hugging Face model directories: config.json and safetensors, read and written tensor by tensor."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_polar.config.presets import Architecture, architecture_of
from megatron_polar.config.schema import (
    DataSection,
    ModelSection,
    OptimizerSection,
    RunConfig,
    RunSection,
    TrainSection,
)
from megatron_polar.convert.families import (
    Entry,
    Family,
    entries,
    family_of,
    model_section,
    shape_of,
)
from megatron_polar.convert.tensors import join
from megatron_polar.data.template import (
    EXPORTED_RESPONSE_LENGTH,
    EXPORTED_SEQUENCE_LENGTH,
    POLAR_RESPONSE_TOKENS,
    check_exported_tokenizer,
    exported_wrapper,
)
from megatron_polar.data.tokenizer import Tokenizer
from megatron_polar.errors import UserError
from megatron_polar.manifest import sync_file

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def is_hugging_face(path: Path | str) -> bool:
    """Whether a path is a directory with a config.json: no run and no checkpoint has one."""
    return (Path(path) / "config.json").is_file()


@dataclass(frozen=True)
class HuggingFaceModel:
    """An opened model: its family, its shape in our terms, and where each tensor lies."""

    directory: Path
    config: dict[str, Any]
    family: Family
    has_head: bool
    model: ModelSection
    files: dict[str, str] = field(repr=False)

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.model)

    @property
    def max_response_length(self) -> int:
        """Tokens kept of an answer; an export of ours says so, for others it is POLAR's number."""
        return _positive_or(self.config.get(EXPORTED_RESPONSE_LENGTH), POLAR_RESPONSE_TOKENS)

    @property
    def wrapper(self) -> str:
        """What joined prompts and answers in training, if this is an export of ours that says so; else ""."""
        return exported_wrapper(self.config, where=f"{self.directory / 'config.json'}")

    def check_tokenizer(self, tokenizer: Tokenizer, *, where: Path | str, is_own: bool = True) -> None:
        """Raise UserError for a tokenizer that cannot be this model's; `is_own`: that lies beside it, and must be what
        it was exported with."""
        if is_own:
            check_exported_tokenizer(self.config, tokenizer.fingerprint, where=f"{where}")
        if tokenizer.vocab_size > self.model.vocab_size:
            raise UserError(
                f"{where}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, and the model's embedding "
                f"{self.model.vocab_size} rows; use the model's own tokenizer"
            )
        named = self.config.get("reward_token_id")
        if type(named) is int and self.has_head and named != tokenizer.reward_id:
            raise UserError(
                f"{where}: the tokenizer's reward token {tokenizer.reward_token!r} is id {tokenizer.reward_id}, and "
                f"config.json has reward_token_id {named}; use the model's own tokenizer, or name its --reward-token"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as they are stored."""
        return self.tensor(self.family.tensors["decoder.final_layernorm.weight"][0]).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor under the family's own name. Raises UserError."""
        path = self.directory / self.files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {name} cannot be read ({_one_line(error)}); fetch the file again") from None

    def read(self, entry: Entry) -> torch.Tensor:
        """One of our tensors, made of theirs. Raises UserError when a shape is not what config.json says."""
        joined = join([self.tensor(name) for name in entry.names], key=entry.key, architecture=self.architecture)
        wanted = shape_of(entry.key, self.architecture, vocab_size=self.model.vocab_size)
        if tuple(joined.shape) != wanted:
            names = ", ".join(entry.names)
            raise UserError(
                f"{self.directory}: {names}: shape {tuple(joined.shape)} does not fit config.json, which makes it "
                f"{wanted}"
                + (" (a reward head of one value)" if "output_layer" in entry.key else "; fetch the files again")
            )
        return joined


def open_model(directory: Path | str) -> HuggingFaceModel:
    """Open a model directory and check that it has all tensors of its family, and no unknown ones. Raises UserError."""
    directory = Path(directory)
    where = directory / "config.json"
    if not where.is_file():
        raise UserError(f"{directory}: no config.json here; give the directory of a Hugging Face model")
    config = _read_json(where)
    family, has_head = family_of(config, where=str(where))
    model = model_section(config, family, where=str(where))
    files = _tensor_files(directory)
    wanted = {name for entry in entries(family, architecture_of(model), with_head=has_head) for name in entry.names}
    missing = sorted(wanted - files.keys())
    if missing:
        needs = f"has no tensor {missing[0]}" + (f" and {len(missing) - 1} others" if missing[1:] else "")
        needs += f", which {config['architectures'][0]} needs"
        is_deep = any(name.startswith("score.0.") for name in files)
        remedy = "its head has several layers, POLAR's has one: take another model" if is_deep else "fetch them again"
        raise UserError(f"{directory}: {needs}; {remedy}")
    unknown = sorted(name for name in files.keys() - wanted if not name.endswith(family.ignored))
    if unknown:
        raise UserError(
            f"{directory}: has {len(unknown)} tensors that a {family.name} reward model does not have, such as "
            f"{unknown[0]}; converting without them would change its rewards"
        )
    return HuggingFaceModel(directory, config, family, has_head, model, {name: files[name] for name in wanted})


def _tensor_files(directory: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    index = directory / _INDEX
    if index.is_file():
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in files.values()
        ):
            raise UserError(f"{index}: weight_map does not map tensors to files of this directory; fetch it again")
    elif (directory / _SINGLE).is_file():
        files = dict.fromkeys(_names_in(directory / _SINGLE), _SINGLE)
    else:
        others = sorted(path.name for path in [*directory.glob("*.bin"), *directory.glob("*.pt")])
        raise UserError(
            f"{directory}: neither {_INDEX} nor {_SINGLE} here"
            + (f"; {others[0]} is a pickle, which could run code: save the model as safetensors" if others else "")
        )
    for file in sorted(set(files.values())):
        if not (directory / file).is_file():
            raise UserError(f"{directory}: {file} is missing; fetch it again")
        absent = {name for name, place in files.items() if place == file} - set(_names_in(directory / file))
        if absent:
            raise UserError(f"{directory / file}: has no tensor {min(absent)}, which {_INDEX} promises")
    return files


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({_one_line(error)}); fetch it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except (orjson.JSONDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); fetch the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; fetch the file again")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def config_of(source: HuggingFaceModel, *, run_directory: str, dtype: torch.dtype) -> RunConfig:
    """What is needed to score with a model and to start from it; of training there was none yet."""
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    otherwise = min(source.model.max_position_embeddings, DataSection(train=()).max_sequence_length)
    longest = _positive_or(source.config.get(EXPORTED_SEQUENCE_LENGTH), otherwise)
    return RunConfig(
        run=RunSection(directory=run_directory),
        model=source.model,
        data=DataSection(train=(), max_sequence_length=longest),
        train=TrainSection(global_batch_size=1, num_steps=1, precision=precision),
        optimizer=OptimizerSection(lr=1e-5),
    )


def _positive_or(value: Any, default: int) -> int:
    return value if type(value) is int and value > 0 else default


# --- Writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Shard:
    """Tensors that go into one file, and their bytes together."""

    names: list[str]
    size: int = 0


def plan_shards(sizes: Iterable[tuple[str, int]], *, max_bytes: int) -> list[Shard]:
    """Fill files with tensors (name, bytes) in their order; one that is larger than `max_bytes` gets a file alone."""
    shards: list[Shard] = []
    for name, size in sizes:
        if not shards or shards[-1].size + size > max_bytes:
            shards.append(Shard([]))
        shards[-1].names.append(name)
        shards[-1].size += size
    return shards


def write_tensors(directory: Path, tensors: Iterator[tuple[str, torch.Tensor]], *, shards: list[Shard]) -> None:
    """Write `tensors`, which come in the order of `shards`, with an index where there are several files. One shard is
    in memory at a time."""
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {}
        for name in shard.names:
            found, tensor = next(tensors)
            if found != name:
                raise ValueError(f"{found} came where {name} was planned")
            content[name] = tensor.contiguous()
        try:
            save_file(content, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{directory / file}: cannot be written ({_one_line(error)}); is there room?") from error
        (directory / file).chmod(0o644)
        sync_file(directory / file)
        weight_map |= dict.fromkeys(content, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(shard.size for shard in shards)}, "weight_map": weight_map}
        (directory / _INDEX).write_bytes(orjson.dumps(index, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
        sync_file(directory / _INDEX)
