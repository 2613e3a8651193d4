"""`convert from-hf` and `convert to-hf`: Hugging Face directories ↔ checkpoints, one tensor in memory at a time."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files as package_files
from pathlib import Path

import orjson
import torch

from megatron_polar import log
from megatron_polar.config.load import dump_config, load_saved_config
from megatron_polar.config.presets import Architecture, architecture_of, padded_vocab_size
from megatron_polar.config.schema import RunConfig
from megatron_polar.convert.families import (
    EMBEDDING,
    HEAD,
    Entry,
    Layout,
    entries,
    export_config,
    export_family,
    shape_of,
)
from megatron_polar.convert.hugging_face import HuggingFaceModel, config_of, open_model, plan_shards, write_tensors
from megatron_polar.convert.megatron import SavedTensors, TensorWriter
from megatron_polar.convert.tensors import padded, separate
from megatron_polar.convert.tokenizer import export_tokenizer, warn_of_another_tokenizer
from megatron_polar.data.template import (
    EXPORTED_RESPONSE_LENGTH,
    EXPORTED_SEQUENCE_LENGTH,
    EXPORTED_TOKENIZER,
    EXPORTED_WRAPPER,
)
from megatron_polar.data.tokenizer import Tokenizer, load_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.manifest import HashedFile
from megatron_polar.train.checkpoint_files import (
    TrainingState,
    encode_state,
    find_checkpoint,
    has_checkpoints,
    publish,
    read_state,
    remove_remains,
    saving_directory,
    sync_tree,
)
from megatron_polar.train.shard_files import refusing_what_is_wrong

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TORCH_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


# --- From Hugging Face -----------------------------------------------------------------------------------------------


def from_hf(
    model: Path,
    *,
    output: Path,
    head: str | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    separator_token: str | None = None,
    reward_token: str | None = None,
    needs_head: bool = False,
) -> Path:
    """Convert a language or reward model to a checkpoint of step 0 in the run directory `output`; returns its place.

    `head`: "load" the reward head, or "init" a head of zeros (POLAR's start); default: load it if the model has one.
    `needs_head`: refuse to write a checkpoint with a new head, whose rewards nothing could be compared with.
    `dtype` of the stored weights: bf16 or fp32; default: the model's own, and fp32 for fp16. Raises UserError.
    """
    source = open_model(model)
    has_head = _decide_head(source, head, is_needed=needs_head)
    codec = load_tokenizer(tokenizer or model, separator_token=separator_token, reward_token=reward_token)
    if tokenizer:
        warn_of_another_tokenizer(codec, given=tokenizer, model=model)
    is_own = not (tokenizer or separator_token or reward_token)
    source.check_tokenizer(codec, where=tokenizer or model, is_own=is_own)
    wrapper = source.wrapper
    if has_checkpoints(output):
        raise UserError(f"{output}: has checkpoints already; choose another --output")
    kind = DTYPES[dtype] if dtype else torch.bfloat16 if source.dtype == torch.bfloat16 else torch.float32
    config = config_of(source, run_directory=str(output), dtype=kind)
    saved = saving_directory(output, 0)
    writer = TensorWriter(saved, num_layers=source.architecture.num_layers)
    wanted = list(entries(source.family, source.architecture, with_head=has_head))
    rows = padded_vocab_size(config.model.vocab_size, multiple=config.model.make_vocab_size_divisible_by)
    try:
        _write_weights(wanted, source=source, writer=writer, dtype=kind, embedding_rows=rows)
        if not has_head:
            writer.add(HEAD, torch.zeros(1, source.architecture.hidden_size))
        writer.finish()
        state = TrainingState(
            step=0,
            consumed_comparisons=0,
            data_fingerprint="",
            max_response_length=source.max_response_length,
            layout={},
            backend="",
            precision=config.train.precision,
            wrapper=wrapper,
        )
        _write_small_files(saved, writer, config=config, tokenizer=codec, state=state)
        checkpoint = publish(saved, step=0, entries=writer.entries)
    except BaseException:
        shutil.rmtree(saved, ignore_errors=True)
        raise
    remove_remains(output)
    size = sum(entry["size"] for entry in writer.entries.values())
    log.info(f"{checkpoint}: {len(wanted)} tensors, {size / 2**30:.2f} GiB, {source.family.name}")
    return checkpoint


def _decide_head(source: HuggingFaceModel, head: str | None, *, is_needed: bool) -> bool:
    """Whether the reward head is loaded; what happens to it is always said."""
    is_there, where, named = source.has_head, source.directory, source.config["architectures"][0]
    if head == "load" and not is_there:
        raise UserError(f"{where}: {named} has no reward head to load; use --head init for one of zeros")
    if head is None and not is_there:
        log.info(f"{where}: {named} has no reward head; it starts at zero")
    if head == "init" and is_there:
        log.warn(f"{where}: the reward head of {named} is replaced by zeros, as --head init says")
    if is_needed and (head == "init" or not is_there):
        raise UserError(f"{where}: --verify compares rewards, and the reward head starts at zero; leave --verify out")
    return is_there and head != "init"


def _write_weights(
    wanted: Sequence[Entry],
    *,
    source: HuggingFaceModel,
    writer: TensorWriter,
    dtype: torch.dtype,
    embedding_rows: int,
) -> None:
    with log.Progress("converting", total=len(wanted), unit="tensors") as bar:
        for entry in wanted:
            tensor = _in_range(source.read(entry), dtype if entry.key != HEAD else torch.float32, entry=entry)
            if entry.key == EMBEDDING:
                tensor = padded(tensor, rows=embedding_rows)
            writer.add(entry.key, tensor, layer=entry.layer)
            bar.advance()


def _write_small_files(
    saved: Path, writer: TensorWriter, *, config: RunConfig, tokenizer: Tokenizer, state: TrainingState
) -> None:
    tokenizer.save(saved / "tokenizer")
    for name, content in (("config.yaml", dump_config(config).encode()), ("state.json", encode_state(state))):
        with HashedFile(saved / name) as file:
            file.write(content)
        writer.entries[name] = file.entry
    for path in sorted((saved / "tokenizer").iterdir()):
        content = path.read_bytes()
        with HashedFile(path) as file:
            file.write(content)
        writer.entries[f"tokenizer/{path.name}"] = file.entry


# --- To Hugging Face -------------------------------------------------------------------------------------------------


def to_hf(
    checkpoint: Path, *, output: Path, layout: Layout, dtype: str | None = None, max_shard_bytes: int = 2 * 2**30
) -> Path:
    """Convert a checkpoint, saved in any layout of ranks, to a Hugging Face directory that engines serve; returns it.

    `layout`: "internlm2", as POLAR's published checkpoints, with the code that transformers needs, or
    "sequence-classification", a native class of transformers with one label. `dtype`: bf16, fp16 or fp32; default: as
    in the checkpoint. Raises UserError, also for weights that fp16 cannot hold.
    """
    directory = find_checkpoint(checkpoint)
    config = load_saved_config(directory / "config.yaml")
    architecture = architecture_of(config.model)
    family = export_family(architecture, layout=layout)
    tokenizer = load_tokenizer(directory / "tokenizer")
    if layout == "sequence-classification" and tokenizer.pad_id == tokenizer.reward_id:
        raise UserError(
            f"{directory}: the reward token {tokenizer.reward_token!r} is also the padding token, and transformers "
            f"reads a classifier at the last token that is no padding, which would not be it; use --layout internlm2, "
            f"or start again from a conversion or data set with another --reward-token"
        )
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    with refusing_what_is_wrong(directory):
        saved = SavedTensors(directory)
        wanted = list(entries(family, architecture, with_head=True))
        _check_shapes(saved, wanted, architecture, vocab_size=vocab_size, directory=directory)
    kind = DTYPES[dtype] if dtype else saved.dtype(EMBEDDING)
    sizes = _sizes(wanted, architecture, vocab_size=vocab_size, item_bytes=kind.itemsize)
    shards = plan_shards(sizes, max_bytes=max_shard_bytes)
    ids = {"bos": tokenizer.bos_id, "pad": tokenizer.pad_id, "reward": tokenizer.reward_id}
    settings = export_config(
        family,
        architecture,
        vocab_size=vocab_size,
        max_positions=max(config.model.max_position_embeddings or 0, config.data.max_sequence_length),
        dtype=_TORCH_NAMES[kind],
        ids={name: id for name, id in ids.items() if id is not None},
    )
    state = read_state(directory)
    settings[EXPORTED_SEQUENCE_LENGTH] = config.data.max_sequence_length
    settings[EXPORTED_RESPONSE_LENGTH] = state.max_response_length
    settings[EXPORTED_TOKENIZER] = tokenizer.fingerprint
    if state.wrapper:
        settings[EXPORTED_WRAPPER] = state.wrapper
    with _fresh_directory(output) as target:
        tensors = _exported(saved, wanted, architecture, vocab_size=vocab_size, kind=kind)
        write_tensors(target, tensors, shards=shards)
        if layout == "internlm2":
            for name in ("configuration_internlm2.py", "modeling_internlm2.py"):
                code = package_files("megatron_polar.convert") / "internlm2" / name
                (target / name).write_bytes(code.read_bytes())
        export_tokenizer(tokenizer, target, max_length=config.data.max_sequence_length)
        (target / "config.json").write_bytes(orjson.dumps(settings, option=orjson.OPT_INDENT_2))
        sync_tree(target)
    size = sum(shard.size for shard in shards)
    count = sum(len(shard.names) for shard in shards)
    log.info(
        f"{output}: {count} tensors of {directory}, {size / 2**30:.2f} GiB in {len(shards)} files, "
        f"{settings['architectures'][0]}"
    )
    return output


def _check_shapes(
    saved: SavedTensors, wanted: list[Entry], architecture: Architecture, *, vocab_size: int, directory: Path
) -> None:
    for entry in wanted:
        if not saved.has(entry.key):
            raise UserError(f"{directory}: has no tensor {entry.key}, which its config.yaml describes")
        found = saved.shape(entry.key, is_layered=entry.layer is not None)
        expected = shape_of(entry.key, architecture, vocab_size=vocab_size)
        fits = found == expected or (entry.key == EMBEDDING and found[0] >= expected[0] and found[1:] == expected[1:])
        if not fits:
            raise UserError(f"{directory}: {entry.key} has shape {found}, and config.yaml makes it {expected}")


def _sizes(
    wanted: list[Entry], architecture: Architecture, *, vocab_size: int, item_bytes: int
) -> Iterator[tuple[str, int]]:
    for entry in wanted:
        whole = torch.empty(shape_of(entry.key, architecture, vocab_size=vocab_size), device="meta")
        parts = separate(whole, key=entry.key, count=len(entry.names), architecture=architecture)
        for name, part in zip(entry.names, parts, strict=True):
            yield name, part.numel() * item_bytes


def _exported(
    saved: SavedTensors, wanted: list[Entry], architecture: Architecture, *, vocab_size: int, kind: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    with log.Progress("converting", total=len(wanted), unit="tensors") as bar:
        for entry in wanted:
            with refusing_what_is_wrong(saved.directory):
                tensor = saved.read(entry.key, layer=entry.layer)
            if entry.key == EMBEDDING:
                tensor = tensor[:vocab_size]  # the rest is padding
            tensor = _in_range(tensor, kind, entry=entry)
            parts = separate(tensor, key=entry.key, count=len(entry.names), architecture=architecture)
            yield from zip(entry.names, parts, strict=True)
            bar.advance()


def _in_range(tensor: torch.Tensor, kind: torch.dtype, *, entry: Entry) -> torch.Tensor:
    """Cast; refuse what would overflow, and what is not finite already."""
    cast = tensor.to(kind)
    if not torch.isfinite(cast).all():
        name = entry.names[0]
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name}: holds NaN or infinity; convert an earlier checkpoint")
        raise UserError(
            f"{name}: has values up to {tensor.abs().max().item():.4g}, more than {_TORCH_NAMES[kind]} can hold "
            f"({torch.finfo(kind).max:.4g}); use --dtype bf16 or fp32"
        )
    return cast


@contextmanager
def _fresh_directory(output: Path) -> Iterator[Path]:
    """A directory that gets its name when it is complete. One that is there already and empty, perhaps through a link
    or as a mount point, gets the files then, config.json last, without which it is no model. Raises UserError where
    there is something else."""
    is_there = output.exists()
    if is_there and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; remove it, or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    parent, name = (output, "model") if is_there else (output.parent, output.name)
    target = parent / f".{name}.{os.urandom(4).hex()}.converting"
    target.mkdir()
    try:
        yield target
        if is_there:
            for path in sorted(target.iterdir(), key=lambda path: path.name == "config.json"):
                path.rename(output / path.name)
        else:
            target.rename(output)
    finally:
        shutil.rmtree(target, ignore_errors=True)
