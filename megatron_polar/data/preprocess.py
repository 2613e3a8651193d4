"""JSONL -> tokens in Megatron's .bin/.idx and a manifest: the same bytes for any number of workers and after a kill.

How lines become shards and shards the dataset is in shards.py; this module checks, names and publishes. Everything is
written below `output/.work` and renamed into its place at the end, the manifest last: a directory with one is complete.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import orjson
import xxhash

from megatron_polar import faults, log
from megatron_polar.data.lines import RecordError, list_inputs, read_jsonl
from megatron_polar.data.parts import Part
from megatron_polar.data.preprocess_output import (
    check_output,
    check_same_call,
    complete_output,
    describe_tokenizer,
    in_plain_words,
    locked_work,
    short_names,
)
from megatron_polar.data.preprocess_report import PartReport, PreprocessReport, say_what_a_part_made, say_what_was_made
from megatron_polar.data.records import KEYS, RULES_VERSION, warn_of_misspelt
from megatron_polar.data.shards import Merger, encode_units, shard_path
from megatron_polar.data.storage import (
    COUNTS,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    MAXIMA,
    OLD_QUARANTINE,
    QUARANTINE,
    TOKENIZER,
    TOKENS,
    WORK,
    read_dataset_manifest,
)
from megatron_polar.data.template import WRAPPERS
from megatron_polar.data.tokenizer import Tokenizer, load_tokenizer
from megatron_polar.data.units import UNIT_BYTES, UnitContext, UnitSource
from megatron_polar.errors import UserError
from megatron_polar.manifest import (
    MANIFEST,
    HashedFile,
    encode_manifest,
    file_entry,
    hash_file,
    sync_directory,
    sync_file,
)

_HEADS, _HEAD_LINES = 64, 64  # input files whose first lines are looked at for misspelt keys, and how many lines


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
    part: Part | None = None,
    check: bool = False,
) -> PreprocessReport | PartReport | None:
    """Tokenise JSONL files into the indexed dataset `output` (format: docs/data.md).

    `wrapper` is for lines that name none; `max_response_length` is in tokens. Fails on the first bad line unless
    `max_bad_fraction` > 0; then bad lines go to `quarantine.ndjson`, and the run fails when they are more than that
    fraction. An output that is complete and was made from the same inputs and settings is left as it is. With a `part`
    it encodes that part's work units and leaves them to a call without one; parts may run at the same time. `check`:
    look at the arguments, write nothing, return None. Raises UserError.
    """
    _check_arguments(num_workers, wrapper, max_response_length, max_bad_fraction, unit_bytes)
    settings = {
        "wrapper": wrapper,
        "max_response_length": max_response_length,
        "max_bad_fraction": float(max_bad_fraction),
    }
    output = Path(output)
    with in_plain_words(output):
        files = list_inputs([Path(path) for path in inputs])
        tokenizer = load_tokenizer(tokenizer_path, separator_token=separator_token, reward_token=reward_token)
        check_output(output, files=files)
        call = {"files": files, "tokenizer": tokenizer, "settings": settings}
        if check:
            check_same_call(output, **call, read_files=False)
            log.info(f"{output}: the arguments are right; {len(files)} input files")
            return None
        complete = complete_output(output, **call, part=part)
        if complete is not None:
            log.info(f"{output}: complete already, made from the same inputs and settings; nothing to do")
            if part is not None:
                return PartReport(output, part, already_complete=True, units_made=0, units_resumed=0)
            return PreprocessReport.of_manifest(complete, output=output, already_complete=True, units_resumed=0)
        if not tokenizer.halves_are_independent:
            log.warn(f"{tokenizer_path}: writes the first word of a text apart; serve with token ids, not with text")
        context = _unit_context(
            files, tokenizer=tokenizer, tokenizer_path=tokenizer_path, settings=settings, output=output
        )
        _look_for_misspelt_keys(files)
        source = UnitSource(files, context=context, unit_bytes=unit_bytes, part=part)
        call = {"output": output, "tokenizer": tokenizer, "settings": settings, "num_workers": num_workers}
        with locked_work(context.work, part=part):
            return _make_dataset(source, **call) if part is None else _make_part(source, part=part, **call)


def _look_for_misspelt_keys(files: Sequence[Path]) -> None:
    """Warn of keys at the head of the input whose names nearly are those of ours; what is no line is told later."""
    places: dict[str, str] = {}
    for file in files[:_HEADS]:
        with suppress(UserError, orjson.JSONDecodeError):
            for number, line in islice(read_jsonl(file), _HEAD_LINES):
                value = orjson.loads(line)
                for key in value if isinstance(value, dict) else ():
                    places.setdefault(key, f"{file}:{number}")
    warn_of_misspelt(places, known=KEYS)


def _unit_context(
    files: Sequence[Path], *, tokenizer: Tokenizer, tokenizer_path: Path | str, settings: dict, output: Path
) -> UnitContext:
    wrapper, max_response_length = settings["wrapper"], settings["max_response_length"]
    return UnitContext(
        tokenizer_path=Path(tokenizer_path),
        separator_token=tokenizer.separator_token,
        reward_token=tokenizer.reward_token,
        wrapper=wrapper,
        max_response_length=max_response_length,
        work=output / WORK,
        files=tuple(short_names(files)),
        key=orjson.dumps([FORMAT_VERSION, RULES_VERSION, tokenizer.fingerprint, wrapper, max_response_length]),
    )


def _make_part(
    source: UnitSource, *, part: Part, output: Path, tokenizer: Tokenizer, settings: dict, num_workers: int
) -> PartReport:
    """Encode the units of one part; they stay in the work directory."""
    with closing(_encode(source, tokenizer=tokenizer, settings=settings, num_workers=num_workers)) as units:
        num_units = sum(1 for _ in units)
    if not source.lines_read:
        raise _empty_input(source.files)
    resumed = source.units_resumed
    report = PartReport(output, part, already_complete=False, units_made=num_units - resumed, units_resumed=resumed)
    say_what_a_part_made(report)
    return report


def _make_dataset(
    source: UnitSource, *, output: Path, tokenizer: Tokenizer, settings: dict, num_workers: int
) -> PreprocessReport:
    """Encode the units that are missing, append all to the dataset and publish it."""
    work = source.context.work
    with (
        Merger(work) as merger,
        closing(_encode(source, tokenizer=tokenizer, settings=settings, num_workers=num_workers)) as units,
    ):
        for unit, done in units:
            merger.append(shard_path(work, unit), done)
    _check_counts(merger, files=source.files, output=output, max_bad_fraction=settings["max_bad_fraction"])
    manifest = {"inputs": source.entries, "settings": settings, "tokenizer": describe_tokenizer(tokenizer)}
    manifest = _publish(merger, manifest, tokenizer=tokenizer, output=output)
    shutil.rmtree(work, ignore_errors=True)
    resumed = source.units_resumed
    report = PreprocessReport.of_manifest(manifest, output=output, already_complete=False, units_resumed=resumed)
    say_what_was_made(report, quarantine=output / QUARANTINE)
    return report


def _encode(
    source: UnitSource, *, tokenizer: Tokenizer, settings: dict, num_workers: int
) -> Iterator[tuple[int, dict]]:
    """Yield (unit, its done file) in order; raises RecordError at a bad line where none is allowed."""
    context = source.context
    with closing(encode_units(source, context=context, tokenizer=tokenizer, num_workers=num_workers)) as units:
        for unit, done in units:
            if done["bad"] and not settings["max_bad_fraction"]:
                bad = done["bad"][0]
                file = source.files[context.files.index(bad["file"])]
                way_out = "; or set such lines aside with --max-bad-fraction"
                raise RecordError(bad["reason"] + way_out, file=str(file), line=bad["line"])
            yield unit, done


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


def _check_counts(merger: Merger, *, files: Sequence[Path], output: Path, max_bad_fraction: float) -> None:
    lines, bad = merger.counts["lines"], merger.counts["bad_lines"]
    if not lines:
        raise _empty_input(files)
    if bad > max_bad_fraction * lines or not merger.counts["documents"]:
        quarantine = output / QUARANTINE
        merger.quarantine.path.replace(quarantine)
        if bad == lines:
            raise UserError(f"{quarantine}: says why none of the {lines} lines can be used; are these records?")
        raise UserError(
            f"{quarantine}: names {bad} bad lines of {lines} ({bad / lines:.2%}), more than "
            f"max_bad_fraction={max_bad_fraction} allows; mend them or raise the fraction"
        )


def _empty_input(files: Sequence[Path]) -> UserError:
    given = "the one file given holds" if len(files) == 1 else f"all {len(files)} files given hold"
    return UserError(f"{files[0]}: empty input: {given} only blank lines or nothing; check the path")


def _publish(merger: Merger, manifest: dict, *, tokenizer: Tokenizer, output: Path) -> dict:
    """Put the files in their places, the manifest last: a directory with a manifest is complete.

    All of it is on the disk before its name is. A link in the place of a file is replaced, never followed.
    """
    work = output / WORK
    written = merger.finish()
    entries = {file.path.name: file.entry for file in written}
    entries |= _save_tokenizer(tokenizer, directory=work / TOKENIZER)
    faults.point("before_dataset_files")
    for name in (QUARANTINE, OLD_QUARANTINE):
        _remove(output / name)
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
