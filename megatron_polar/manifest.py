"""Files that prove themselves: hashes taken while writing, and a manifest that names every file of a directory.

Datasets and checkpoints share it. A manifest is written last, in one canonical form with a checksum over itself, so a
directory with one is complete, and no byte of it or of the files that it names can change unnoticed.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
import xxhash

MANIFEST = "manifest.json"
BLOCK_BYTES = 64 * 1024 * 1024
"""Large files are also hashed in blocks of this size, so that many ranks can check one file together."""

_READ_BYTES = 1 << 20


class Damaged(Exception):
    """A file or directory is not what its manifest says: one line with the file, what is wrong, and both hashes."""


class OtherVersion(Damaged):
    """Whole, but written by a program that this one does not know."""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file to an error of the operating system, which names none when reading or writing fails."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# --- Writing ---------------------------------------------------------------------------------------------------------


class HashedFile:
    """A file being written, with its size in bytes and its SHA-256; on the disk, not in a cache, when it is closed.

    With `blocks` it also takes the XXH3 of each block of BLOCK_BYTES. It is always a new file: what has its name
    already, what an older run has left or a link to somewhere else, is removed and never written through.
    """

    def __init__(self, path: Path, *, blocks: bool = False):
        self.path, self.size = Path(path), 0
        self._sha256 = hashlib.sha256()
        self._block = xxhash.xxh3_64() if blocks else None
        self._blocks: list[str] = []

    def __enter__(self) -> "HashedFile":
        self.path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self.path, flags, 0o644), "wb")
        return self

    def write(self, data: bytes) -> int:
        """Write bytes (anything with the buffer protocol); returns how many."""
        view = memoryview(data).cast("B")
        with _naming(self.path):
            self._file.write(view)
        self._sha256.update(view)
        if self._block is not None:
            self._update_blocks(view)
        self.size += len(view)
        return len(view)

    def _update_blocks(self, view: memoryview) -> None:
        position = self.size
        while view:
            part = view[: BLOCK_BYTES - position % BLOCK_BYTES]
            self._block.update(part)
            position, view = position + len(part), view[len(part) :]
            if position % BLOCK_BYTES == 0:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = xxhash.xxh3_64()

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        with _naming(self.path):
            self._file.flush()

    def __exit__(self, *exception) -> None:
        with _naming(self.path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def blocks(self) -> list[str]:
        """XXH3-64 (hex) of each block, the last one shorter; call it when everything is written."""
        rest = [self._block.hexdigest()] if self.size % BLOCK_BYTES else []
        return [*self._blocks, *rest]

    @property
    def entry(self) -> dict:
        """Size and SHA-256, as a manifest has them."""
        return {"size": self.size, "sha256": self.sha256}


def write_durably(path: Path, content: bytes, *, suffix: str = ".tmp") -> dict:
    """Write a file so that after a kill or power failure it has its old content or all of the new; returns its
    entry. Where it cannot be written, nothing new is left.

    It is written under its name with `suffix` first: give one of your own where two processes may write it at once.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        with HashedFile(temporary) as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return file.entry


def sync_file(path: Path) -> None:
    """Make a finished file survive a power failure."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make renames within `directory` survive a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_file(path: Path, digest: Any, *, after_each: Callable[[], None] = lambda: None) -> str:
    """Hash a file in constant memory with a fresh hash object; returns hex. `after_each` MiB it calls."""
    with _naming(path), path.open("rb", buffering=0) as stream:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
            after_each()
    return digest.hexdigest()


def file_entry(path: Path) -> dict:
    """Size in bytes and SHA-256 of a file, as a manifest has them."""
    return {"size": path.stat().st_size, "sha256": hash_file(path, hashlib.sha256())}


# --- The manifest ----------------------------------------------------------------------------------------------------


def encode_manifest(content: dict) -> bytes:
    """A manifest as a file: sorted keys, a checksum over everything else, and nothing that could be written twice
    ways."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    checksum = hashlib.sha256(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS)).hexdigest()
    options = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps({**rest, "checksum": checksum}, option=options)


def read_manifest(directory: Path, *, format_name: str, format_version: int) -> dict:
    """Read and check a directory's manifest; raises Damaged when it is missing, changed, or of another format."""
    path = directory / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise Damaged(f"{MANIFEST} is missing: the directory was never finished")
    data = path.read_bytes()
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Damaged(f"{MANIFEST} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or content.get("format") != format_name:
        raise Damaged(f"{MANIFEST} is not the manifest of a {format_name}")
    try:
        again = encode_manifest(content)
    except TypeError as error:
        raise Damaged(f"{MANIFEST} is damaged: {error}") from error
    if again != data:
        found, wanted = hashlib.sha256(data).hexdigest(), hashlib.sha256(again).hexdigest()
        raise Damaged(f"{MANIFEST} was changed: its SHA-256 is {found[:12]}..., its content's {wanted[:12]}...")
    version = content.get("format_version")
    if version != format_version:
        raise OtherVersion(f"{MANIFEST} has format_version={version}, this program {format_version}")
    return content


def check_names(directory: Path, files: Iterable[str]) -> None:
    """Refuse names that lead out of `directory`: absolute ones, `..`, and links to elsewhere. Raises Damaged."""
    root = os.path.realpath(directory)
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
            raise Damaged(f"{MANIFEST} names {name!r}, which leads out of the directory")
        if not Path(os.path.realpath(directory / name)).is_relative_to(root):
            raise Damaged(f"{name} is a link out of the directory")


def check_sizes(directory: Path, files: dict[str, dict]) -> None:
    """Check names and sizes of all files that a manifest names; raises Damaged at the first that does not fit."""
    check_names(directory, files)
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            raise Damaged(f"{name} is missing" if not path.exists() else f"{name} is not a regular file")
        size = path.stat().st_size
        if size != entry["size"]:
            word = "truncated" if size < entry["size"] else "too long"
            raise Damaged(f"{name} is {word}: {size} bytes instead of {entry['size']}")


def check_nothing_else(directory: Path, files: dict[str, dict], *, allowed: Iterable[str] = ()) -> None:
    """Refuse a directory that holds more than its manifest names. Raises Damaged naming the first extra file.

    What is called as `allowed` says, directly in `directory`, is not looked into.
    """
    known, allowed = {*files, MANIFEST}, set(allowed)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        extra = name not in known and name.split("/")[0] not in allowed
        if extra and (path.is_symlink() or not path.is_dir()):
            raise Damaged(f"{name} is not in {MANIFEST}: it does not belong here")


def check_hash(directory: Path, name: str, entry: dict, *, after_each: Callable[[], None] = lambda: None) -> None:
    """Compare a file's SHA-256 with its manifest entry; raises Damaged with both."""
    found = hash_file(directory / name, hashlib.sha256(), after_each=after_each)
    if found != entry["sha256"]:
        raise Damaged(f"{name} has SHA-256 {found[:12]}... instead of {entry['sha256'][:12]}...")


def block_sizes(size: int) -> list[int]:
    """Bytes of each block of a file of `size` bytes: BLOCK_BYTES, and the last one what is left."""
    return [min(BLOCK_BYTES, size - start) for start in range(0, size, BLOCK_BYTES)]


def check_block(path: Path, *, number: int, expected: str) -> None:
    """Compare the XXH3 of one block of a file; raises Damaged with the place and both."""
    with _naming(path), path.open("rb", buffering=0) as stream:
        stream.seek(number * BLOCK_BYTES)
        digest, left = xxhash.xxh3_64(), BLOCK_BYTES
        while left and (data := stream.read(min(_READ_BYTES, left))):
            digest.update(data)
            left -= len(data)
    if digest.hexdigest() != expected:
        place = f"block {number} (bytes {number * BLOCK_BYTES} to {(number + 1) * BLOCK_BYTES - left})"
        raise Damaged(f"{path.name}: {place} has XXH3 {digest.hexdigest()} instead of {expected}")
