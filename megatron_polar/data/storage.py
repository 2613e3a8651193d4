"""The files of a dataset: Megatron's index, the manifest with its checksum, and hashing while writing."""

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from megatron_polar.errors import UserError

FORMAT = "megatron_polar.corpus"
FORMAT_VERSION = 1
KINDS = ("trajectories", "preference")
HEADER_FIELDS = 3  # kind, wrapper, prompt length; then one policy id per half

# Megatron's .idx: magic, version 1, dtype code 4 (int32), number of sequences, number of document bounds.
_MAGIC = b"MMIDIDX\x00\x00"
_INT32_CODE = 4
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 18


class HashedFile:
    """A file being written, with its size in bytes and its SHA-256; flushed to the disk when closed."""

    def __init__(self, path: Path):
        self.path, self.size = path, 0
        self._hash = hashlib.sha256()

    def __enter__(self) -> "HashedFile":
        self._file = self.path.open("wb")
        return self

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def __exit__(self, *exception) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def sync_directory(directory: Path) -> None:
    """Make renames within `directory` survive a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_entry(path: Path) -> dict:
    """Size in bytes and SHA-256 of a file, as the manifest has them."""
    return {"size": path.stat().st_size, "sha256": hash_file(path, hashlib.sha256())}


def hash_file(path: Path, digest: Any) -> str:
    """Hash a file in constant memory with a fresh hash object; returns hex."""
    with path.open("rb", buffering=0) as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


# ---------------------------------------------------------------- manifest


def manifest_bytes(content: dict) -> bytes:
    """The manifest as a file: sorted keys, no time or place, a checksum over everything else."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **content}
    content["checksum"] = _checksum(content)
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _checksum(content: dict) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS)).hexdigest()


def read_manifest(directory: Path) -> dict:
    """Read and check a dataset's manifest. Raises UserError when it is missing, damaged, or of another format."""
    path = directory / "manifest.json"
    again = "run preprocess again"
    if not path.is_file():
        raise UserError(
            f"{path}: missing, so this is no complete dataset; give a directory made by preprocess or {again}"
        )
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); restore the file or {again}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not the manifest of a {FORMAT}; give a directory made by preprocess")
    if content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version")
        raise UserError(f"{path}: format_version={version}, this program reads {FORMAT_VERSION}; {again}")
    if content.get("checksum") != _checksum(content):
        raise UserError(f"{path}: its content does not fit its checksum, it was changed; restore the file or {again}")
    return content


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
                raise UserError(f"{path}: ends {count} numbers too early; run preprocess again")
            yield chunk
            count -= len(chunk)


def check_index(path: Path, *, num_sequences: int, num_documents: int, num_tokens_bytes: int, xxh3_128: str) -> None:
    """Check the hash of an .idx and its lengths, pointers and bounds; mcore reads wrong ones without a word.

    Raises UserError. Time grows with the index (one read at 2 GB/s or so), memory does not.
    """
    again = "restore the file or run preprocess again"
    with path.open("rb") as file:
        header = file.read(_INDEX_HEADER.size)
    expected = _INDEX_HEADER.pack(_MAGIC, 1, _INT32_CODE, num_sequences, num_documents + 1)
    size = _INDEX_HEADER.size + 12 * num_sequences + 8 * (num_documents + 1)
    if header != expected or path.stat().st_size != size:
        found = f"{num_sequences} sequences in {num_documents} documents"
        raise UserError(f"{path}: header or size do not fit {found}; {again}")
    offset = _INDEX_HEADER.size
    pointer_offset = offset + 4 * num_sequences
    pointers = read_chunks(path, dtype=np.int64, count=num_sequences, offset=pointer_offset)
    end = 0
    for lengths, found in zip(
        read_chunks(path, dtype=np.int32, count=num_sequences, offset=offset), pointers, strict=True
    ):
        ends = np.cumsum(lengths, dtype=np.int64) * 4 + end
        if lengths.min() < 0 or not np.array_equal(found, ends - lengths.astype(np.int64) * 4):
            raise UserError(f"{path}: a length and a pointer do not fit together; {again}")
        end = int(ends[-1])
    if end != num_tokens_bytes:
        raise UserError(f"{path}: its sequences make {end} bytes, the .bin has {num_tokens_bytes}; {again}")
    last = -1
    bounds = read_chunks(path, dtype=np.int64, count=num_documents + 1, offset=pointer_offset + 8 * num_sequences)
    for chunk in bounds:
        steps = np.diff(chunk, prepend=last)
        if (last < 0 and chunk[0] != 0) or steps.min() < 1:
            raise UserError(f"{path}: the bounds of documents do not rise; {again}")
        last = int(chunk[-1])
    if last != num_sequences:
        raise UserError(f"{path}: documents end at sequence {last} of {num_sequences}; {again}")
    if hash_file(path, xxhash.xxh3_128()) != xxh3_128:
        raise UserError(f"{path}: its content does not fit the manifest's hash; {again}")
