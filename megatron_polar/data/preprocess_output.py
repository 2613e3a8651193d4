"""The output directory of `preprocess`: what may be in it, whether it is complete already, and who may write there."""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import xxhash

from megatron_polar import log
from megatron_polar.data.parts import Part, locked
from megatron_polar.data.storage import (
    INDEX,
    OLD_QUARANTINE,
    QUARANTINE,
    TOKENIZER,
    TOKENS,
    WORK,
    check_content,
    check_dataset,
    read_dataset_manifest,
)
from megatron_polar.data.tokenizer import Tokenizer
from megatron_polar.errors import UserError
from megatron_polar.manifest import MANIFEST, Damaged, check_nothing_else, check_sizes, hash_file, sync_directory

_MOST_NAMES = 20  # of inputs, in a message of one line


@contextmanager
def in_plain_words(output: Path) -> Iterator[None]:
    """Make one line of a full or broken disk, and of a work file that is not as it was written."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"{output}: {error.strerror or error}{place}; mend that and run the same command again, finished units are "
            "kept"
        ) from error
    except Damaged as error:
        raise UserError(f"{output / WORK}/{error}; run the same command again, it makes that unit anew") from error


def check_output(output: Path, *, files: Sequence[Path]) -> None:
    """Refuse an output that holds other people's files, or the inputs: both would become part of a dataset."""
    ours = {TOKENS, INDEX, QUARANTINE, OLD_QUARANTINE, TOKENIZER, MANIFEST, WORK}
    foreign = sorted(set(os.listdir(output)) - ours) if output.is_dir() else []
    if foreign:
        raise UserError(f"{output}: holds {foreign[0]!r}, which is no part of a dataset; choose an empty directory")
    inside = [file for file in files if file.resolve().is_relative_to(output.resolve())]
    if inside:
        raise UserError(f"{inside[0]}: an input inside of the output {output}; choose another output directory")
    short_names(files)  # refuses one that is given twice


def short_names(files: Sequence[Path]) -> list[str]:
    """Names relative to the directory that all inputs share: a dataset does not carry paths of its machine."""
    resolved = [file.resolve() for file in files]
    if len(set(resolved)) < len(resolved):
        twice = next(file for file, count in Counter(resolved).items() if count > 1)
        raise UserError(f"{twice}: given twice as input; name each file once")
    base = os.path.commonpath([file.parent for file in resolved])
    return [file.relative_to(base).as_posix() for file in resolved]


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """The tokenizer's entry in a manifest."""
    names = ("kind", "fingerprint", "vocab_size", "bos_id", "pad_id", "separator_id", "reward_id")
    return {name: getattr(tokenizer, name) for name in (*names, "separator_token", "reward_token")}


# --- Complete already? -----------------------------------------------------------------------------------------------


def check_same_call(
    output: Path, *, files: Sequence[Path], tokenizer: Tokenizer, settings: dict, read_files: bool
) -> dict | None:
    """The manifest of an output that this very call made before; None where there is none. UserError where another call
    made it. With `read_files` the content of inputs is compared, too."""
    if not os.path.lexists(output / MANIFEST):
        return None
    remedy = "choose another output directory or remove this one"
    try:
        manifest = read_dataset_manifest(output)
        check_nothing_else(output, manifest["files"], allowed=[WORK])
    except Damaged as error:
        raise UserError(f"{output}/{error}; {remedy}") from error
    different = _differences(manifest, files=files, tokenizer=tokenizer, settings=settings, read_files=read_files)
    if different:
        raise UserError(f"{output}: was made with {'; '.join(different)}; {remedy}")
    return manifest


def complete_output(
    output: Path, *, files: Sequence[Path], tokenizer: Tokenizer, settings: dict, part: Part | None
) -> dict | None:
    """The manifest of an output that this very call made before; None where there is work to do; else an error.

    An output of this call that was damaged since is work to do. A part, one of many at once, compares names and sizes
    but no contents, and changes nothing.
    """
    call = {"files": files, "tokenizer": tokenizer, "settings": settings}
    manifest = check_same_call(output, **call, read_files=part is None)
    if manifest is None:
        return None
    try:
        if part is not None:
            check_sizes(output, manifest["files"])
            return manifest
        check_dataset(output, manifest)
        check_content(output, manifest)
    except Damaged as error:
        if part is not None:
            raise UserError(f"{output}/{error}; the command without --part makes the dataset again") from error
        log.warn(f"{output}/{error}; making the dataset again")
        (output / MANIFEST).unlink()
        sync_directory(output)
        return None
    shutil.rmtree(output / WORK, ignore_errors=True)  # of a run that was killed just after its manifest
    return manifest


def _differences(
    manifest: dict, *, files: Sequence[Path], tokenizer: Tokenizer, settings: dict, read_files: bool
) -> list[str]:
    """How the call that made an output differs from this one: all settings and inputs.

    The content of inputs is compared only where nothing else differs: reading terabytes to learn more would be a pity.
    """
    different = _unequal(manifest["settings"], settings)
    codec = _unequal(manifest["tokenizer"], describe_tokenizer(tokenizer))
    if codec:
        different.append(f"another tokenizer ({'; '.join(codec)})")
    then = [f"{entry.get('name')!r} of {entry.get('size')!r} bytes" for entry in manifest["inputs"]]
    named = zip(short_names(files), files, strict=True)
    now = [f"{name!r} of {file.stat().st_size} bytes" for name, file in named]
    if then != now:
        sides = {"only then": set(then) - set(now), "only now": set(now) - set(then)}
        parts = [f"{side}: {_listed(entries)}" for side, entries in sides.items() if entries]
        different.append(f"other inputs ({'; '.join(parts) or 'in another order'})")
    if read_files and not different:
        pairs = zip(files, manifest["inputs"], strict=True)
        changed = [str(f) for f, entry in pairs if hash_file(f, xxhash.xxh3_128()) != entry.get("xxh3_128")]
        different += [f"other content of {_listed(changed)}"] if changed else []
    return different


def _unequal(then: dict, now: dict) -> list[str]:
    names = [name for name in {**now, **then} if then.get(name) != now.get(name)]
    return [f"{name}={then.get(name)!r:.40}, not {now.get(name)!r:.40}" for name in names]


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" if names[_MOST_NAMES:] else "")


# --- Who may write ---------------------------------------------------------------------------------------------------


@contextmanager
def locked_work(work: Path, *, part: Part | None) -> Iterator[None]:
    """Make the work directory and keep others out of it; parts of one preprocess keep each other company."""
    output = work.parent
    if work.is_symlink():
        raise UserError(f"{work}: is a link, and could lead anywhere; remove it")
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / "lock", part=part, output=output, verb="preprocess"):
        if os.path.lexists(output / MANIFEST):
            raise UserError(f"{output}: another preprocess has just finished here; run the same command again")
        if part is None:  # else another part may be writing it
            for stale in work.glob("*.tmp"):  # half-written by a run that was killed, or found the disk full
                stale.unlink(missing_ok=True)
        yield
