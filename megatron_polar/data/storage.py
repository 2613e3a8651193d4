"""The files of a dataset: their names, Megatron's index, and checks of all of them against the manifest."""

import hashlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orjson
import xxhash

from megatron_polar import log
from megatron_polar.data.template import WRAPPERS
from megatron_polar.manifest import (
    MANIFEST,
    Damaged,
    HashedFile,
    block_sizes,
    check_block,
    check_hash,
    check_nothing_else,
    check_sizes,
    hash_file,
    read_manifest,
)

FORMAT = "megatron_polar.corpus"
FORMAT_VERSION = 2
TOKENS, INDEX, TOKENIZER = "corpus.bin", "corpus.idx", "tokenizer"
QUARANTINE = "quarantine.ndjson"  # not .jsonl: `preprocess` reads all of these in a directory
OLD_QUARANTINE = "quarantine.jsonl"  # its name until 2026-11
WORK = ".work"  # what an unfinished run has done so far
KINDS = ("trajectories", "preference", "references")
"""What a document holds; "references" is a preference with several references, and is written for no other."""
REFERENCE = -2
"""In the place of a policy id: this half of a document of the kind "references" is one of its references."""
MAXIMA = ("longest_prompt", "longest_response", "longest_half")
COUNTS = (
    "lines",
    "bad_lines",
    "documents",
    "trajectory_groups",
    "preferences",
    "halves",
    "tokens",
    "responses_cut",
    "response_tokens_cut",
    "duplicate_trajectories",
    "duplicate_candidates",
    "identical_candidates",
)
HEADER_FIELDS = 3  # kind, wrapper, prompt length; then one policy id per half
WRAPPER_FIELD = 1

# Megatron's .idx: magic, version 1, dtype code 4 (int32), number of sequences, number of document bounds.
_MAGIC = b"MMIDIDX\x00\x00"
_INT32_CODE = 4
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 18

_ENTRIES: dict[str, dict[str, type]] = {
    "counts": dict.fromkeys(COUNTS, int),
    "invariants": {**dict.fromkeys(("sequences", "documents", *MAXIMA), int), "index_xxh3_128": str},
    "tokenizer": {**dict.fromkeys(("vocab_size", "pad_id", "separator_id", "reward_id"), int), "fingerprint": str},
    "settings": {"max_response_length": int},
}
"""What the sections of a manifest must hold, as far as anything looks into it."""


_ITEMS: dict[str, Callable[[object], bool]] = {
    "policies": lambda item: isinstance(item, str),
    "inputs": lambda item: isinstance(item, dict),
    "wrappers": lambda item: item in WRAPPERS,
}
"""Lists of a manifest, and what each of their entries must be."""


def read_dataset_manifest(directory: Path) -> dict:
    """Read a dataset's manifest and check that it has what the other functions here look for. Raises Damaged."""
    manifest = read_manifest(directory, format_name=FORMAT, format_version=FORMAT_VERSION)
    kinds = dict.fromkeys(("files", "blocks", "invariants", "counts", "tokenizer", "settings"), dict)
    lists = {"wrappers": [], **manifest}  # an older dataset does not say them
    for key, kind in {**kinds, **dict.fromkeys(_ITEMS, list)}.items():
        if not isinstance(lists.get(key), kind):
            raise Damaged(f"{MANIFEST} has no {key!r}: preprocess did not write it")
    for section, entries in _ENTRIES.items():
        for key, kind in entries.items():
            if type(manifest[section].get(key)) is not kind:
                raise Damaged(f"{MANIFEST} has no {section}.{key}: preprocess did not write it")
    for key, is_good in _ITEMS.items():
        if not all(map(is_good, lists[key])):
            raise Damaged(f"{MANIFEST} has odd {key!r}: preprocess did not write it")
    for name in (TOKENS, INDEX):
        if name not in manifest["files"]:
            raise Damaged(f"{MANIFEST} does not name {name}: preprocess did not write it")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or type(entry.get("sha256")) is not str:
            raise Damaged(f"{MANIFEST} has no size and SHA-256 of {name}: preprocess did not write it")
    num_blocks = len(block_sizes(manifest["files"][TOKENS]["size"]))
    blocks = manifest["blocks"].get(TOKENS)
    if not isinstance(blocks, list) or len(blocks) != num_blocks:
        raise Damaged(f"{MANIFEST} does not hash {TOKENS} in {num_blocks} blocks: preprocess did not write it")
    return manifest


def fingerprint_of(manifest: dict) -> str:
    """SHA-256 (hex) of what training depends on: tokens, index, policies, tokenizer; not the inputs' names."""
    files = [manifest["files"][name]["sha256"] for name in (TOKENS, INDEX)]
    parts = [FORMAT_VERSION, files, manifest["policies"], manifest["tokenizer"]["fingerprint"]]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()


def check_dataset(directory: Path, manifest: dict) -> None:
    """Check that the files are those of the manifest by name, kind and size, and all of the index. Raises Damaged."""
    files, invariants = manifest["files"], manifest["invariants"]
    check_sizes(directory, files)
    check_nothing_else(directory, files, allowed=[WORK])
    check_index(
        directory / INDEX,
        num_sequences=invariants["sequences"],
        num_documents=invariants["documents"],
        num_tokens_bytes=files[TOKENS]["size"],
        xxh3_128=invariants["index_xxh3_128"],
    )


def check_content(
    directory: Path, manifest: dict, *, part: int = 0, of: int = 1, after_each: Callable[[], None] = lambda: None
) -> int:
    """Compare content with hashes: every `of`-th block of the tokens, and all other files where `part` is 0.

    Returns the bytes read; `after_each` is called after every block and file. Raises Damaged with the file, the place
    and both hashes.
    """
    files, blocks = manifest["files"], manifest["blocks"][TOKENS]
    others = {name: entry for name, entry in files.items() if name != TOKENS} if part == 0 else {}
    mine = range(part, len(blocks), of)
    with log.Progress("verify", total=len(others) + len(mine), unit="files and blocks") as bar:
        for name, entry in others.items():
            check_hash(directory, name, entry)
            bar.advance()
            after_each()
        for number in mine:
            check_block(directory / TOKENS, number=number, expected=blocks[number])
            bar.advance()
            after_each()
    return sum(block_sizes(files[TOKENS]["size"])[part::of]) + sum(entry["size"] for entry in others.values())


# ---------------------------------------------------------------- index


def write_index(index: HashedFile, *, lengths: Path, documents: Path) -> None:
    """Write Megatron's .idx from two files of int32: tokens per sequence, sequences per document.

    The same bytes as mcore's IndexedDatasetBuilder, which keeps every length as a Python object; this one takes
    constant memory.
    """
    num_sequences, num_documents = lengths.stat().st_size // 4, documents.stat().st_size // 4
    index.write(_INDEX_HEADER.pack(_MAGIC, 1, _INT32_CODE, num_sequences, num_documents + 1))
    for chunk in read_chunks(lengths, dtype=np.int32, count=num_sequences):
        index.write(chunk.tobytes())
    pointer = 0  # in bytes
    for chunk in read_chunks(lengths, dtype=np.int32, count=num_sequences):
        ends = np.cumsum(chunk, dtype=np.int64) * 4 + pointer
        index.write(np.concatenate([[pointer], ends[:-1]]).astype(np.int64).tobytes())
        pointer = int(ends[-1])
    index.write(np.zeros(1, np.int64).tobytes())
    end = 0
    for chunk in read_chunks(documents, dtype=np.int32, count=num_documents):
        ends = np.cumsum(chunk, dtype=np.int64) + end
        index.write(ends.tobytes())
        end = int(ends[-1])


def read_chunks(path: Path, *, dtype: type, count: int, offset: int = 0) -> Iterator[np.ndarray]:
    """Yield `count` numbers from byte `offset` of a file in arrays of bounded size."""
    with path.open("rb") as file:
        file.seek(offset)
        while count:
            chunk = np.fromfile(file, dtype=dtype, count=min(count, _CHUNK))
            if not len(chunk):
                raise Damaged(f"{path.name} ends {count} numbers too early")
            yield chunk
            count -= len(chunk)


def check_index(path: Path, *, num_sequences: int, num_documents: int, num_tokens_bytes: int, xxh3_128: str) -> None:
    """Check the hash of an .idx and its lengths, pointers and bounds; mcore reads wrong ones without a word.

    Raises Damaged. Time grows with the index (one read at 2 GB/s or so), memory does not.
    """
    name, found_hash = path.name, hash_file(path, xxhash.xxh3_128())
    if found_hash != xxh3_128:
        raise Damaged(f"{name} has XXH3 {found_hash} instead of {xxh3_128}")
    with path.open("rb") as file:
        header = file.read(_INDEX_HEADER.size)
    expected = _INDEX_HEADER.pack(_MAGIC, 1, _INT32_CODE, num_sequences, num_documents + 1)
    size = _INDEX_HEADER.size + 12 * num_sequences + 8 * (num_documents + 1)
    if header != expected or path.stat().st_size != size:
        raise Damaged(f"{name}: header or size do not fit {num_sequences} sequences in {num_documents} documents")
    offset = _INDEX_HEADER.size
    pointer_offset = offset + 4 * num_sequences
    pointers = read_chunks(path, dtype=np.int64, count=num_sequences, offset=pointer_offset)
    end = 0
    for lengths, found in zip(
        read_chunks(path, dtype=np.int32, count=num_sequences, offset=offset), pointers, strict=True
    ):
        ends = np.cumsum(lengths, dtype=np.int64) * 4 + end
        if lengths.min() < 0 or not np.array_equal(found, ends - lengths.astype(np.int64) * 4):
            raise Damaged(f"{name}: a length and a pointer do not fit together")
        end = int(ends[-1])
    if end != num_tokens_bytes:
        raise Damaged(f"{name}: its sequences make {end} bytes, the .bin has {num_tokens_bytes}")
    last = -1
    bounds = read_chunks(path, dtype=np.int64, count=num_documents + 1, offset=pointer_offset + 8 * num_sequences)
    for chunk in bounds:
        steps = np.diff(chunk, prepend=last)
        if (last < 0 and chunk[0] != 0) or steps.min() < 1:
            raise Damaged(f"{name}: the bounds of documents do not rise")
        last = int(chunk[-1])
    if last != num_sequences:
        raise Damaged(f"{name}: documents end at sequence {last} of {num_sequences}")
