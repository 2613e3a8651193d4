"""JSONL -> tokens in Megatron's .bin/.idx and a manifest: the same bytes for any number of workers and after a kill.

How lines become shards and shards the dataset is in shards.py; this module checks, names and publishes. Everything is
written below `output/.work` and renamed into its place at the end, the manifest last: a directory with one is complete.
"""

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import orjson
import xxhash

from megatron_polar import faults, log
from megatron_polar.data.lines import RecordError, list_inputs
from megatron_polar.data.preprocess_report import PreprocessReport, say_what_was_made
from megatron_polar.data.shards import (
    UNIT_BYTES,
    Merger,
    UnitContext,
    UnitSource,
    encode_units,
    shard_path,
)
from megatron_polar.data.storage import (
    COUNTS,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    MAXIMA,
    QUARANTINE,
    TOKENIZER,
    TOKENS,
    WORK,
    check_content,
    check_dataset,
    read_dataset_manifest,
)
from megatron_polar.data.template import WRAPPERS
from megatron_polar.data.tokenizer import Tokenizer, load_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.manifest import (
    MANIFEST,
    Damaged,
    HashedFile,
    check_nothing_else,
    encode_manifest,
    file_entry,
    hash_file,
    sync_directory,
    sync_file,
)

_MOST_NAMES = 20  # of inputs, in a message of one line


def preprocess(
    inputs: Sequence[Path | str],
    *,
    output: Path | str,
    tokenizer_path: Path | str,
    num_workers: int = 1,
    wrapper: str = "sft",
    max_response_length: int = 4096,
    max_bad_fraction: float = 0.0,
    separator_token: str | None = None,
    reward_token: str | None = None,
    unit_bytes: int = UNIT_BYTES,
) -> PreprocessReport:
    """Tokenise JSONL files into the indexed dataset `output` (format: docs/data.md).

    `wrapper` is for lines that name none; `max_response_length` is in tokens. Fails on the first bad line unless
    `max_bad_fraction` > 0; then bad lines go to `quarantine.jsonl`, and the run fails when they are more than that
    fraction. An output that is complete and was made from the same inputs and settings is left as it is. Raises
    UserError.
    """
    _check_arguments(num_workers, wrapper, max_response_length, max_bad_fraction, unit_bytes)
    settings = {
        "wrapper": wrapper,
        "max_response_length": max_response_length,
        "max_bad_fraction": float(max_bad_fraction),
    }
    output = Path(output)
    with _in_plain_words(output):
        files = list_inputs([Path(path) for path in inputs])
        tokenizer = load_tokenizer(tokenizer_path, separator_token=separator_token, reward_token=reward_token)
        _check_output(output, files=files)
        complete = _complete_output(output, files=files, tokenizer=tokenizer, settings=settings)
        if complete is not None:
            log.info(f"{output}: complete already, made from the same inputs and settings; nothing to do")
            return PreprocessReport.of_manifest(complete, output=output, already_complete=True, units_resumed=0)
        if not tokenizer.halves_are_independent:
            log.warn(f"{tokenizer_path}: writes the first word of a text apart; serve with token ids, not with text")
        context = UnitContext(
            tokenizer_path=Path(tokenizer_path),
            separator_token=tokenizer.separator_token,
            reward_token=tokenizer.reward_token,
            wrapper=wrapper,
            max_response_length=max_response_length,
            work=output / WORK,
            files=tuple(_short_names(files)),
            key=orjson.dumps([FORMAT_VERSION, tokenizer.fingerprint, wrapper, max_response_length]),
        )
        with _locked(context.work):
            source = UnitSource(files, context=context, unit_bytes=unit_bytes)
            merger = _merge(source, tokenizer=tokenizer, num_workers=num_workers, stop_at_bad_line=not max_bad_fraction)
            _check_counts(merger, files=files, output=output, max_bad_fraction=max_bad_fraction)
            manifest = {"inputs": source.entries, "settings": settings, "tokenizer": _describe_tokenizer(tokenizer)}
            manifest = _publish(merger, manifest, tokenizer=tokenizer, output=output)
            shutil.rmtree(context.work, ignore_errors=True)
    resumed = source.units_resumed
    report = PreprocessReport.of_manifest(manifest, output=output, already_complete=False, units_resumed=resumed)
    say_what_was_made(report, quarantine=output / QUARANTINE)
    return report


@contextmanager
def _in_plain_words(output: Path) -> Iterator[None]:
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


def _merge(source: UnitSource, *, tokenizer: Tokenizer, num_workers: int, stop_at_bad_line: bool) -> Merger:
    """Encode all units and append them to the dataset's files below the work directory, which are closed then."""
    context, files = source.context, source.files
    with Merger(context.work) as merger, ExitStack() as stack:
        results = encode_units(source, context=context, tokenizer=tokenizer, num_workers=num_workers)
        stack.callback(results.close)
        for unit, done in results:
            if done["bad"] and stop_at_bad_line:
                bad = done["bad"][0]
                raise RecordError(bad["reason"], file=str(files[context.files.index(bad["file"])]), line=bad["line"])
            merger.append(shard_path(context.work, unit), done)
    return merger


def _check_arguments(
    num_workers: int, wrapper: str, max_response_length: int, max_bad_fraction: float, unit_bytes: int
) -> None:
    if num_workers < 1:
        raise UserError(f"num_workers={num_workers} is not a number of processes; use 1 or more")
    if wrapper not in WRAPPERS:
        raise UserError(f"wrapper={wrapper!r} is unknown; use one of {', '.join(WRAPPERS)}")
    if max_response_length < 1:
        raise UserError(f"max_response_length={max_response_length} leaves no token of an answer; use 1 or more")
    if not 0 <= max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction={max_bad_fraction} is not a fraction of the lines; use 0 to 1")
    if unit_bytes < 1:
        raise UserError(f"unit_bytes={unit_bytes} is not a size; use 1 or more")


def _check_output(output: Path, *, files: Sequence[Path]) -> None:
    """Refuse an output that holds other people's files, or the inputs: both would become part of a dataset."""
    ours = {TOKENS, INDEX, QUARANTINE, TOKENIZER, MANIFEST, WORK}
    foreign = sorted(set(os.listdir(output)) - ours) if output.is_dir() else []
    if foreign:
        raise UserError(f"{output}: holds {foreign[0]!r}, which is no part of a dataset; choose an empty directory")
    inside = [file for file in files if file.resolve().is_relative_to(output.resolve())]
    if inside:
        raise UserError(f"{inside[0]}: an input inside of the output {output}; choose another output directory")


def _short_names(files: Sequence[Path]) -> list[str]:
    """Names relative to the directory that all inputs share: a dataset does not carry paths of its machine."""
    resolved = [file.resolve() for file in files]
    if len(set(resolved)) < len(resolved):
        twice = next(file for file, count in Counter(resolved).items() if count > 1)
        raise UserError(f"{twice}: given twice as input; name each file once")
    base = os.path.commonpath([file.parent for file in resolved])
    return [file.relative_to(base).as_posix() for file in resolved]


def _describe_tokenizer(tokenizer: Tokenizer) -> dict:
    names = ("kind", "fingerprint", "vocab_size", "bos_id", "pad_id", "separator_id", "reward_id")
    return {name: getattr(tokenizer, name) for name in (*names, "separator_token", "reward_token")}


def _complete_output(output: Path, *, files: Sequence[Path], tokenizer: Tokenizer, settings: dict) -> dict | None:
    """The manifest of an output that this very call made before; None where there is work to do; else an error.

    An output of this call that was damaged since is work to do.
    """
    if not os.path.lexists(output / MANIFEST):
        return None
    remedy = "choose another output directory or remove this one"
    try:
        manifest = read_dataset_manifest(output)
        check_nothing_else(output, manifest["files"], allowed=[WORK])
    except Damaged as error:
        raise UserError(f"{output}/{error}; {remedy}") from error
    different = _differences(manifest, files=files, tokenizer=tokenizer, settings=settings)
    if different:
        raise UserError(f"{output}: was made with {'; '.join(different)}; {remedy}")
    try:
        check_dataset(output, manifest)
        check_content(output, manifest)
    except Damaged as error:
        log.warn(f"{output}/{error}; making the dataset again")
        (output / MANIFEST).unlink()
        sync_directory(output)
        return None
    shutil.rmtree(output / WORK, ignore_errors=True)  # of a run that was killed just after its manifest
    return manifest


def _differences(manifest: dict, *, files: Sequence[Path], tokenizer: Tokenizer, settings: dict) -> list[str]:
    """How the call that made an output differs from this one: all settings and inputs.

    The content of inputs is compared only where nothing else differs: reading terabytes to learn more would be a pity.
    """
    different = _unequal(manifest["settings"], settings)
    codec = _unequal(manifest["tokenizer"], _describe_tokenizer(tokenizer))
    if codec:
        different.append(f"another tokenizer ({'; '.join(codec)})")
    then = [f"{entry.get('name')!r} of {entry.get('size')!r} bytes" for entry in manifest["inputs"]]
    named = zip(_short_names(files), files, strict=True)
    now = [f"{name!r} of {file.stat().st_size} bytes" for name, file in named]
    if then != now:
        sides = {"only then": set(then) - set(now), "only now": set(now) - set(then)}
        parts = [f"{side}: {_listed(entries)}" for side, entries in sides.items() if entries]
        different.append(f"other inputs ({'; '.join(parts) or 'in another order'})")
    if not different:
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


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keep a second run out of the same output directory; the lock goes with the process, however it ends."""
    if work.is_symlink():
        raise UserError(f"{work}: is a link, and could lead anywhere; remove it")
    work.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{work.parent}: another preprocess writes here; wait for it or choose another output"
            ) from None
        if os.path.lexists(work.parent / MANIFEST):
            raise UserError(f"{work.parent}: another preprocess has just finished here; run the same command again")
        for stale in work.glob("*.tmp"):  # half-written by a run that was killed, or found the disk full
            stale.unlink(missing_ok=True)
        yield


def _check_counts(merger: Merger, *, files: Sequence[Path], output: Path, max_bad_fraction: float) -> None:
    lines, bad = merger.counts["lines"], merger.counts["bad_lines"]
    if not lines:
        given = "the one file given holds" if len(files) == 1 else f"all {len(files)} files given hold"
        raise UserError(f"{files[0]}: empty input: {given} only blank lines or nothing; check the path")
    if bad > max_bad_fraction * lines or not merger.counts["documents"]:
        quarantine = output / QUARANTINE
        merger.quarantine.path.replace(quarantine)
        raise UserError(
            f"{quarantine}: names {bad} bad lines of {lines} ({bad / lines:.2%}), more than "
            f"max_bad_fraction={max_bad_fraction} allows; mend them or raise the fraction"
        )


def _publish(merger: Merger, manifest: dict, *, tokenizer: Tokenizer, output: Path) -> dict:
    """Put the files in their places, the manifest last: a directory with a manifest is complete.

    All of it is on the disk before its name is. A link in the place of a file is replaced, never followed.
    """
    work = output / WORK
    written = merger.finish()
    entries = {file.path.name: file.entry for file in written}
    entries |= _save_tokenizer(tokenizer, directory=work / TOKENIZER)
    faults.point("before_dataset_files")
    _remove(output / QUARANTINE)
    _remove(output / TOKENIZER)
    for file in written:
        file.path.replace(output / file.path.name)
    (work / TOKENIZER).replace(output / TOKENIZER)
    counts = {name: merger.counts[name] for name in COUNTS}
    index = hash_file(output / INDEX, xxhash.xxh3_128())
    sequences = {"sequences": merger.num_sequences, "documents": counts["documents"], "index_xxh3_128": index}
    maxima = {name: merger.counts[name] for name in MAXIMA}
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}
    manifest |= {"counts": counts, "invariants": {**sequences, **maxima}, "policies": list(merger.policies)}
    manifest["wrappers"] = sorted(merger.wrappers)
    manifest |= {"files": entries, "blocks": {TOKENS: written[0].blocks}}
    with HashedFile(work / MANIFEST) as file:
        file.write(encode_manifest(manifest))
    sync_directory(output)
    faults.point("before_dataset_manifest")
    file.path.replace(output / MANIFEST)
    sync_directory(output)
    faults.point("after_dataset_manifest")
    return read_dataset_manifest(output)


def _save_tokenizer(tokenizer: Tokenizer, *, directory: Path) -> dict[str, dict]:
    """Write a copy of the tokenizer; returns the manifest entries of its files."""
    _remove(directory)
    tokenizer.save(directory)
    files = sorted(directory.iterdir())
    for file in files:
        sync_file(file)
    sync_directory(directory)
    return {f"{TOKENIZER}/{file.name}": file_entry(file) for file in files}


def _remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
