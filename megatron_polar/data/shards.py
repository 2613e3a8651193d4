"""Work units of input lines -> shards -> one dataset: fixed units, any number of workers, the same bytes.

The parent cuts the input lines into units of a fixed size in bytes. Workers turn a unit into a shard file and then a
small `done` file with counts and hashes; the parent appends shards in unit order, so nothing in the output depends on
who finished first. A unit whose done file and shard still fit its lines is not done again. Memory holds a few units,
however large the input is.
"""

import hashlib
import io
import multiprocessing
import os
import secrets
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import orjson
import xxhash

from megatron_polar import faults, log
from megatron_polar.data.lines import InputLine, RecordError, too_long
from megatron_polar.data.records import Preference, TrajectoryGroup, drop_duplicates, parse_record
from megatron_polar.data.storage import (
    COUNTS,
    HEADER_FIELDS,
    INDEX,
    KINDS,
    MAXIMA,
    QUARANTINE,
    REFERENCE,
    TOKENS,
    WRAPPER_FIELD,
    write_index,
)
from megatron_polar.data.template import WRAPPERS, encode_half
from megatron_polar.data.tokenizer import Tokenizer, load_tokenizer
from megatron_polar.data.units import Unit, UnitContext, UnitSource
from megatron_polar.errors import UserError
from megatron_polar.manifest import Damaged, HashedFile, encode_manifest, write_durably

QUARANTINE_FIELDS = ("file", "line", "byte_offset", "reason", "sha256")


# ---------------------------------------------------------------- in the parent: units -> shards


def shard_path(work: Path, index: int) -> Path:
    return work / f"unit-{index:08d}.shard"


def encode_units(
    source: UnitSource, *, context: UnitContext, tokenizer: Tokenizer, num_workers: int
) -> Iterator[tuple[int, dict]]:
    """Yield (unit index, its done file) in unit order, a bounded number of units in flight."""
    total = max(1, source.total_bytes // 1_000_000)
    with log.Progress("preprocess", total=total, unit="MB") as bar, ExitStack() as stack:
        pool = None
        if num_workers > 1:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads' locks
            pool = ProcessPoolExecutor(num_workers, spawn, initializer=_start_worker, initargs=(context,))
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        pending: deque[tuple[int, Future | dict]] = deque()
        for unit in source.units():
            done = _read_done(unit, work=context.work)
            if done is not None:
                source.units_resumed += 1
                pending.append((unit.index, done))
            elif pool is None:
                pending.append((unit.index, _encode_unit(unit, context=context, tokenizer=tokenizer)))
            else:
                pending.append((unit.index, _submit(pool, unit)))
            if len(pending) >= (1 if pool is None else 2 * num_workers):
                yield _result(*pending.popleft())
            bar.advance(max(0, min(source.bytes_read // 1_000_000, total) - bar.done))
        while pending:
            yield _result(*pending.popleft())


_WORKER_DIED = "a worker process died (killed for memory?); run the same command again, finished units are kept"


def _submit(pool: ProcessPoolExecutor, unit: Unit) -> Future:
    try:
        return pool.submit(_encode_unit_in_worker, unit)
    except BrokenProcessPool as error:
        raise UserError(_WORKER_DIED) from error


def _result(index: int, done: Future | dict) -> tuple[int, dict]:
    try:
        return index, done if isinstance(done, dict) else done.result()
    except BrokenProcessPool as error:
        raise UserError(_WORKER_DIED) from error


def _read_done(unit: Unit, *, work: Path) -> dict | None:
    """The done file of an earlier run, if it is of the same lines and settings and its shard is whole."""
    shard = shard_path(work, unit.index)
    try:
        written = shard.with_suffix(".done").read_bytes()
        done = orjson.loads(written)
        whole = encode_manifest(done) == written and done["unit"] == unit.digest and _is_complete(done)
        _read_shard(shard, done)
    except (OSError, orjson.JSONDecodeError, AttributeError, KeyError, TypeError, Damaged):
        return None
    return done if whole else None


def _is_complete(done: dict) -> bool:
    return (
        all(type(done["counts"][name]) is int for name in (*COUNTS, *MAXIMA))
        and isinstance(done["policies"], list)
        and all(isinstance(name, str) for name in done["policies"])
        and isinstance(done["bad"], list)
        and all(set(QUARANTINE_FIELDS) <= bad.keys() for bad in done["bad"])
    )


def _read_shard(shard: Path, done: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, lengths of sequences, sequences per document. Raises Damaged for what `_encode_unit` does not write."""
    data = shard.read_bytes()
    found = xxhash.xxh3_128(data).hexdigest()
    if found != done["shard"]:
        raise Damaged(f"{shard.name} has XXH3 {found} instead of {done['shard']}")
    try:
        with io.BytesIO(data) as file:
            arrays = tuple(np.load(file, allow_pickle=False) for _ in range(3))
    except Exception as error:  # a broken file may raise nearly anything
        raise Damaged(f"{shard.name} does not hold three arrays ({type(error).__name__})") from error
    if not all(isinstance(array, np.ndarray) and array.dtype == np.int32 and array.ndim == 1 for array in arrays):
        raise Damaged(f"{shard.name} does not hold three lists of numbers")
    tokens, lengths, documents = arrays
    headers = np.cumsum(documents, dtype=np.int64) - documents
    if (
        min(lengths.min(initial=0), documents.min(initial=1) - 1) < 0
        or lengths.sum(dtype=np.int64) != len(tokens)
        or documents.sum(dtype=np.int64) != len(lengths)
        or lengths[headers].min(initial=HEADER_FIELDS) < HEADER_FIELDS
    ):
        raise Damaged(f"{shard.name}: its numbers of tokens, sequences and documents do not fit together")
    wrappers = tokens[_header_places(lengths, documents) + WRAPPER_FIELD]
    if wrappers.min(initial=0) < 0 or wrappers.max(initial=0) >= len(WRAPPERS):
        raise Damaged(f"{shard.name} has a wrapper that is none of {', '.join(WRAPPERS)}")
    policies = tokens[_policy_places(lengths, documents)]
    kinds = np.repeat(tokens[_header_places(lengths, documents)], lengths[headers] - HEADER_FIELDS)
    lowest = np.where(kinds == KINDS.index("references"), REFERENCE, -1)
    if (policies < lowest).any() or policies.max(initial=-1) >= len(done["policies"]):
        raise Damaged(f"{shard.name} has policies that its done file does not name")
    return tokens, lengths, documents


def _header_places(lengths: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Where in the tokens the headers begin."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return starts[np.cumsum(documents, dtype=np.int64) - documents]


def _policy_places(lengths: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Where in the tokens the policy ids of all headers are."""
    headers = np.cumsum(documents, dtype=np.int64) - documents  # sequence number of every document's header
    sizes = lengths[headers] - HEADER_FIELDS
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(_header_places(lengths, documents) + HEADER_FIELDS, sizes) + within


# ---------------------------------------------------------------- in the workers

_worker_state: dict = {}


def _start_worker(context: UnitContext) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    # A killed parent cannot stop its workers: they watch it.
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    tokenizer = load_tokenizer(
        context.tokenizer_path, separator_token=context.separator_token, reward_token=context.reward_token
    )
    _worker_state.update(context=context, tokenizer=tokenizer)


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_unit_in_worker(unit: Unit) -> dict:
    return _encode_unit(unit, context=_worker_state["context"], tokenizer=_worker_state["tokenizer"])


def _encode_unit(unit: Unit, *, context: UnitContext, tokenizer: Tokenizer) -> dict:
    """Tokenise the unit's lines into a shard file; write and return its done file's content."""
    faults.point("unit")
    counts = Counter(dict.fromkeys((*COUNTS, *MAXIMA), 0))
    policies: dict[str, int] = {}
    bad: list[dict] = []
    sequences: list[np.ndarray] = []
    documents: list[int] = []
    for number, line in unit.lines:
        counts["lines"] += 1
        try:
            document = _encode_line(
                line,
                source=context.files[number],
                context=context,
                tokenizer=tokenizer,
                policies=policies,
                counts=counts,
            )
        except RecordError as error:
            counts["bad_lines"] += 1
            sha256 = line.skipped or hashlib.sha256(line.data).hexdigest()
            entry = (error.file, error.line, line.byte_offset, error.reason, sha256)
            bad.append(dict(zip(QUARANTINE_FIELDS, entry, strict=True)))
        else:
            sequences.extend(document)
            documents.append(len(document))
    tokens = np.concatenate(sequences) if sequences else np.zeros(0, np.int32)
    arrays = io.BytesIO()
    for array in (tokens, np.array([len(ids) for ids in sequences], np.int32), np.array(documents, np.int32)):
        np.save(arrays, array, allow_pickle=False)
    shard, data = shard_path(context.work, unit.index), arrays.getvalue()
    own = f".{secrets.token_hex(8)}.tmp"  # a worker of a killed run, or another machine, may be at this unit too
    write_durably(shard, data, suffix=own)
    faults.point("after_unit_shard")
    digest = xxhash.xxh3_128(data).hexdigest()
    done = {"unit": unit.digest, "shard": digest, "counts": counts, "policies": list(policies), "bad": bad}
    write_durably(shard.with_suffix(".done"), encode_manifest(done), suffix=own)
    faults.point("after_unit_done")
    return done


def _encode_line(
    line: InputLine, *, source: str, context: UnitContext, tokenizer: Tokenizer, policies: dict, counts: Counter
) -> list[np.ndarray]:
    """Header and halves of one line; raises RecordError, and counts nothing then."""
    where = {"source": source, "line_number": line.number}
    if line.skipped:
        raise RecordError(too_long(), file=source, line=line.number)
    distinct = drop_duplicates(parse_record(line.data, **where, default_wrapper=context.wrapper), **where)
    try:
        document = _encode_document(
            distinct.record, context=context, tokenizer=tokenizer, policies=policies, counts=counts
        )
    except UserError as error:  # a text that this tokenizer cannot encode
        raise RecordError(str(error), file=source, line=line.number) from error
    preference = isinstance(distinct.record, Preference)
    counts["documents"] += 1
    counts["preferences" if preference else "trajectory_groups"] += 1
    counts["duplicate_candidates" if preference else "duplicate_trajectories"] += distinct.duplicates
    counts["identical_candidates"] += distinct.identical
    return document


def _encode_document(
    record: TrajectoryGroup | Preference, *, context: UnitContext, tokenizer: Tokenizer, policies: dict, counts: Counter
) -> list[np.ndarray]:
    """Header and halves of one record; policy ids are the unit's own, the parent replaces them."""
    if isinstance(record, Preference):
        texts = [*record.references, *record.candidates]
    else:
        texts = [trajectory.text for trajectory in record.trajectories]
    prompt_length = len(tokenizer.encode(record.prompt))
    halves = [
        encode_half(
            tokenizer,
            prompt=record.prompt,
            trajectory=text,
            wrapper=record.wrapper,
            max_response_length=context.max_response_length,
            prompt_length=prompt_length,
        )
        for text in texts
    ]
    for half in halves:
        counts["tokens"] += len(half.ids)
        counts["responses_cut"] += half.response_tokens_cut > 0
        counts["response_tokens_cut"] += half.response_tokens_cut
        counts["longest_half"] = max(counts["longest_half"], len(half.ids))
        counts["longest_response"] = max(counts["longest_response"], len(half.ids) - half.prompt_length)
    counts["halves"] += len(halves)
    counts["longest_prompt"] = max(counts["longest_prompt"], prompt_length)
    if isinstance(record, Preference):
        several = len(record.references) if record.more_references else 0
        kind, ids = "references" if several else "preference", [-1] * len(halves)
        ids[:several] = [REFERENCE] * several
    else:
        kind = "trajectories"
        ids = [policies.setdefault(trajectory.policy, len(policies)) for trajectory in record.trajectories]
    header = [KINDS.index(kind), WRAPPERS.index(record.wrapper), prompt_length, *ids]
    return [np.array(header, np.int32), *(half.ids for half in halves)]


# ---------------------------------------------------------------- in the parent: shards -> dataset


class Merger:
    """Appends shards in unit order: tokens to corpus.bin, lengths to two side files, bad lines to the quarantine."""

    def __init__(self, work: Path):
        self._work = work
        self.counts: Counter = Counter(dict.fromkeys((*COUNTS, *MAXIMA), 0))
        self.policies: dict[str, int] = {}
        self.wrappers: set[str] = set()
        self.num_sequences = 0

    def __enter__(self) -> "Merger":
        self._stack = ExitStack()
        open_file = self._stack.enter_context
        self._tokens = open_file(HashedFile(self._work / TOKENS, blocks=True))
        self.quarantine = open_file(HashedFile(self._work / QUARANTINE))
        self._lengths = open_file(HashedFile(self._work / "lengths"))
        self._documents = open_file(HashedFile(self._work / "documents"))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def append(self, shard: Path, done: dict) -> None:
        faults.point("merge")
        tokens, lengths, documents = _read_shard(shard, done)
        self._use_global_policies(tokens, lengths, documents, names=done["policies"])
        numbers = np.unique(tokens[_header_places(lengths, documents) + WRAPPER_FIELD])
        self.wrappers |= {WRAPPERS[number] for number in numbers}
        self._tokens.write(tokens.tobytes())
        self._lengths.write(lengths.tobytes())
        self._documents.write(documents.tobytes())
        for bad in done["bad"]:
            entry = {name: bad[name] for name in QUARANTINE_FIELDS}  # a done file that was read has them sorted
            self.quarantine.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        self.num_sequences += len(lengths)
        for name in COUNTS:
            self.counts[name] += done["counts"][name]
        for name in MAXIMA:
            self.counts[name] = max(self.counts[name], done["counts"][name])

    def _use_global_policies(
        self, tokens: np.ndarray, lengths: np.ndarray, documents: np.ndarray, *, names: Sequence[str]
    ) -> None:
        """Replace a unit's policy ids by those of the whole dataset, given in order of first appearance."""
        if not names:
            return
        ids = np.array([self.policies.setdefault(name, len(self.policies)) for name in names], np.int32)
        places = _policy_places(lengths, documents)
        local = tokens[places]
        tokens[places] = np.where(local < 0, local, ids[np.maximum(local, 0)])

    def finish(self) -> list[HashedFile]:
        """Write the index; return the files of the dataset, tokens first."""
        with HashedFile(self._work / INDEX) as index:
            write_index(index, lengths=self._lengths.path, documents=self._documents.path)
        quarantine = [self.quarantine] if self.quarantine.size else []
        return [self._tokens, index, *quarantine]
