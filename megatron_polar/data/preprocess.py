"""JSONL -> tokens in Megatron's .bin/.idx and a manifest: the same bytes for any number of workers and after a kill.

How lines become shards and shards the dataset is in shards.py; this module checks, names and publishes. Everything is
written below `output/.work` and renamed into its place at the end, the manifest last: a directory with one is complete.
"""

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
import xxhash

from megatron_polar import log
from megatron_polar.data.records import RecordError, list_inputs
from megatron_polar.data.shards import (
    COUNTS,
    MAXIMA,
    UNIT_BYTES,
    Merger,
    UnitContext,
    UnitSource,
    encode_units,
    shard_path,
)
from megatron_polar.data.storage import HashedFile, file_entry, hash_file, manifest_bytes, read_manifest, sync_directory
from megatron_polar.data.template import WRAPPERS
from megatron_polar.data.tokenizer import Tokenizer, load_tokenizer
from megatron_polar.errors import UserError


@dataclass(frozen=True)
class PreprocessReport:
    """What a run wrote, in documents (prompts), halves (prompt + one answer) and tokens; see docs/data.md."""

    output: Path
    already_complete: bool
    units_resumed: int
    lines: int
    bad_lines: int
    documents: int
    trajectory_groups: int
    preferences: int
    halves: int
    tokens: int
    policies: int
    responses_cut: int
    response_tokens_cut: int
    duplicates_dropped: int

    @classmethod
    def of_manifest(
        cls, manifest: dict, *, output: Path, already_complete: bool, units_resumed: int
    ) -> "PreprocessReport":
        counts = manifest["counts"]
        copied = ("lines", "bad_lines", "documents", "trajectory_groups", "preferences", "halves", "tokens")
        return cls(
            output=output,
            already_complete=already_complete,
            units_resumed=units_resumed,
            **{name: counts[name] for name in (*copied, "responses_cut", "response_tokens_cut")},
            policies=len(manifest["policies"]),
            duplicates_dropped=counts["duplicate_trajectories"] + counts["duplicate_candidates"],
        )


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
    output, files = Path(output), list_inputs([Path(path) for path in inputs])
    tokenizer = load_tokenizer(tokenizer_path, separator_token=separator_token, reward_token=reward_token)
    settings = {
        "wrapper": wrapper,
        "max_response_length": max_response_length,
        "max_bad_fraction": float(max_bad_fraction),
    }
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
        work=output / ".work",
        files=tuple(_short_names(files)),
        key=orjson.dumps([tokenizer.fingerprint, wrapper, max_response_length]),
    )
    with _locked(context.work):
        source = UnitSource(files, context=context, unit_bytes=unit_bytes)
        with ExitStack() as stack:
            merger = stack.enter_context(Merger(context.work))
            results = encode_units(source, context=context, tokenizer=tokenizer, num_workers=num_workers)
            stack.callback(results.close)
            for unit, done in results:
                if done["bad"] and max_bad_fraction == 0:
                    bad = done["bad"][0]
                    raise RecordError(
                        bad["reason"], file=str(files[context.files.index(bad["file"])]), line=bad["line"]
                    )
                merger.append(shard_path(context.work, unit), done)
        _check_counts(merger, files=files, output=output, max_bad_fraction=max_bad_fraction)
        manifest = {"inputs": source.entries, "settings": settings, "tokenizer": _describe_tokenizer(tokenizer)}
        manifest = _publish(merger, manifest, tokenizer=tokenizer, output=output)
    shutil.rmtree(context.work)
    report = PreprocessReport.of_manifest(
        manifest, output=output, already_complete=False, units_resumed=source.units_resumed
    )
    log.info(
        f"{output}: {report.documents} documents, {report.halves} halves, {report.tokens} tokens, {report.policies} "
        f"policies; {report.responses_cut} answers cut by {report.response_tokens_cut} tokens, "
        f"{report.duplicates_dropped} duplicates dropped, {report.bad_lines} of {report.lines} lines quarantined"
    )
    return report


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
    """The manifest of an output that this very call made before, None for no complete output; any other is an error."""
    if not (output / "manifest.json").exists():
        return None
    manifest = read_manifest(output)
    remedy = "choose another output directory or remove this one"
    for key, value in settings.items():
        if manifest["settings"].get(key) != value:
            raise UserError(f"{output}: was made with {key}={manifest['settings'].get(key)}, not {value}; {remedy}")
    if manifest["tokenizer"] != _describe_tokenizer(tokenizer):
        raise UserError(f"{output}: was made with another tokenizer; {remedy}")
    # Sizes first: hashing terabytes to learn that a size differs would be a pity.
    entries = [
        {"name": name, "size": file.stat().st_size} for name, file in zip(_short_names(files), files, strict=True)
    ]
    if entries != [{"name": entry["name"], "size": entry["size"]} for entry in manifest["inputs"]]:
        raise UserError(f"{output}: was made from other inputs; {remedy}")
    for file, entry in zip(files, manifest["inputs"], strict=True):
        if hash_file(file, xxhash.xxh3_128()) != entry["xxh3_128"]:
            raise UserError(f"{output}: was made from other content of {file}; {remedy}")
    shutil.rmtree(output / ".work", ignore_errors=True)  # of a run that was killed just after its manifest
    return manifest


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keep a second run out of the same output directory; the lock goes with the process, however it ends."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{work.parent}: another preprocess writes here; wait for it or choose another output"
            ) from None
        yield


def _check_counts(merger: Merger, *, files: Sequence[Path], output: Path, max_bad_fraction: float) -> None:
    lines, bad = merger.counts["lines"], merger.counts["bad_lines"]
    if not lines:
        raise UserError(f"{files[0]}:1: empty input, no line in {len(files)} file(s); check the path")
    if bad > max_bad_fraction * lines or not merger.counts["documents"]:
        quarantine = output / "quarantine.jsonl"
        merger.quarantine.path.replace(quarantine)
        raise UserError(
            f"{quarantine}: names {bad} bad lines of {lines} ({bad / lines:.2%}), more than "
            f"max_bad_fraction={max_bad_fraction} allows; mend them or raise the fraction"
        )


def _publish(merger: Merger, manifest: dict, *, tokenizer: Tokenizer, output: Path) -> dict:
    """Put the files in their places, the manifest last: a directory with a manifest is complete."""
    work = output / ".work"
    written = merger.finish()
    shutil.rmtree(work / "tokenizer", ignore_errors=True)
    tokenizer.save(work / "tokenizer")
    names = sorted(path.name for path in (work / "tokenizer").iterdir())
    entries = {f"tokenizer/{name}": file_entry(work / "tokenizer" / name) for name in names}
    shutil.rmtree(output / "tokenizer", ignore_errors=True)
    (output / "quarantine.jsonl").unlink(missing_ok=True)
    for file in written:
        file.path.replace(output / file.path.name)
        entries[file.path.name] = {"size": file.size, "sha256": file.sha256}
    (work / "tokenizer").replace(output / "tokenizer")
    counts = {name: merger.counts[name] for name in COUNTS}
    index = hash_file(output / "corpus.idx", xxhash.xxh3_128())
    sequences = {"sequences": merger.num_sequences, "documents": counts["documents"], "index_xxh3_128": index}
    maxima = {name: merger.counts[name] for name in MAXIMA}
    manifest = {**manifest, "counts": counts, "invariants": {**sequences, **maxima}}
    manifest |= {"policies": list(merger.policies), "files": dict(sorted(entries.items()))}
    with HashedFile(work / "manifest.json") as file:
        file.write(manifest_bytes(manifest))
    sync_directory(output)
    file.path.replace(output / "manifest.json")
    sync_directory(output)
    return read_manifest(output)
