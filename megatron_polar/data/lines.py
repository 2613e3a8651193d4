"""Lines of .jsonl, .jsonl.gz and .jsonl.zst files, with their places, in constant memory."""

import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import zstandard

from megatron_polar.errors import UserError

INPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

# A longer line is a broken file (no newlines), and reading it whole would break the promise of constant memory.
MAX_LINE_BYTES = 64 * 1024 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_READ_BYTES = 256 * 1024
# Neither a message of one line nor a manifest can hold such a name; Python reads bytes that are no UTF-8 as surrogates.
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# Small, because a zstd block of very repetitive text can expand more than a thousandfold.
_ZSTD_READ_BYTES = 16 * 1024


class RecordError(UserError):
    """A line that cannot be used: `file`, `line` and `reason` apart, for the quarantine."""

    def __init__(self, reason: str, *, file: str, line: int):
        super().__init__(f"{file}:{line}: {reason}")
        self.file, self.line, self.reason = file, line, reason

    def __reduce__(self):
        return _rebuild_record_error, (self.reason, self.file, self.line)


def _rebuild_record_error(reason: str, file: str, line: int) -> RecordError:
    return RecordError(reason, file=file, line=line)


class InputLine(NamedTuple):
    """A line of an input: number from 1, offset in the decompressed file, bytes without the newline.

    Of a line above MAX_LINE_BYTES nothing is kept but the hash: `data` is empty, `skipped` the SHA-256 of the line.
    """

    number: int
    byte_offset: int
    data: bytes
    skipped: str = ""


class Meter(Protocol):
    """Sees the raw bytes of a file as they are read: a hash object fits."""

    def update(self, data: bytes, /) -> Any: ...


def list_inputs(paths: Sequence[Path]) -> list[Path]:
    """Expand directories into their .jsonl, .jsonl.gz and .jsonl.zst files, sorted by path; files stay as given.

    Links are followed. Raises UserError for a path that does not exist, another suffix, a directory without such
    files, and for what is no regular file: a device or a pipe has no end, and no second reading.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = files_below(path, INPUT_SUFFIXES)
            if not found:
                raise UserError(f"{path}: no {', '.join(INPUT_SUFFIXES)} file in this directory; check the path")
            files.extend(found)
        elif not path.exists():
            raise UserError(f"{path}: no such file or directory; check the path")
        elif not path.name.endswith(INPUT_SUFFIXES):
            raise UserError(
                f"{path}: not a JSONL file by its name; give one that ends in {' or '.join(INPUT_SUFFIXES)}, with one "
                "JSON object a line"
            )
        else:
            files.append(path)
    if not files:
        raise UserError("no input given; name at least one JSONL file or directory")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: not a regular file, nor a link to one; write the lines to a file")
        if _UNWRITABLE.search(f"{file} {file.resolve()}"):
            raise UserError(f"{str(file)!r}: has control characters in its name, or is not UTF-8; rename it")
    return files


def files_below(directory: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files below a directory whose names end so, sorted by path. Links are followed; a directory that several paths
    lead to is read once. Raises UserError for one that cannot be read."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error

    found, seen, waiting = [], set(), [directory]
    while waiting:  # links last: what lies here itself keeps its own name
        for place, directories, names in os.walk(waiting.pop(0), onerror=refuse):
            real = os.path.realpath(place)
            if real in seen:
                directories.clear()
                continue
            seen.add(real)
            directories.sort()
            waiting += [path for path in (Path(place, name) for name in directories) if path.is_symlink()]
            found += [Path(place, name) for name in names if name.endswith(suffixes)]
    return sorted(found)


def read_jsonl(path: Path | str, *, meter: Meter | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its newline) of a .jsonl, .jsonl.gz or .jsonl.zst file; blank lines are
    skipped.

    A directory yields its such files one after the other. `meter.update` gets the raw (compressed) bytes. Memory is
    bounded by the longest line. Raises UserError with `path:line` for a damaged or truncated archive and for a line
    above 64 MiB.
    """
    path = Path(path)
    for file in list_inputs([path]) if path.is_dir() else [path]:
        for line in read_lines(file, meter=meter):
            if line.skipped:
                raise RecordError(too_long(), file=str(file), line=line.number)
            yield line.number, line.data


def read_lines(path: Path, *, meter: Meter | None = None) -> Iterator[InputLine]:
    """`read_jsonl` of one file, with the places of lines, and with those that are too long in constant memory."""
    number = offset = 0
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file, nor a link to one; write the lines to a file")
    try:
        if path.name.endswith((".gz", ".zst")) and path.stat().st_size == 0:
            raise EOFError("it has no bytes, not even an archive's head")
        with _open_lines(path, meter=meter) as stream:
            while data := stream.readline(MAX_LINE_BYTES + 1):
                number, start = number + 1, offset
                if len(data) > MAX_LINE_BYTES:
                    size, sha256 = _skip_line(stream, data)
                    offset += size
                    yield InputLine(number, start, b"", sha256)
                    continue
                offset += len(data)
                if number == 1 and data.startswith(_BYTE_ORDER_MARK):  # as some editors write it
                    data, start = data.removeprefix(_BYTE_ORDER_MARK), len(_BYTE_ORDER_MARK)
                if data and not data.isspace():
                    yield InputLine(number, start, _without_newline(data))
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        if "too much memory" in str(error):
            remedy = "zstd --long made it, which takes too much memory to read; compress it again without"
            raise UserError(f"{path}:{number + 1}: {error}; {remedy}") from error
        raise UserError(f"{path}:{number + 1}: damaged or truncated archive ({error}); fetch the file again") from error
    except OSError as error:
        raise UserError(f"{path}:{number + 1}: cannot be read ({error.strerror or error}); check the file") from error


def too_long() -> str:
    """Why a skipped line is refused."""
    return f"the line is longer than {MAX_LINE_BYTES} bytes; write one JSON object per line"


def _without_newline(data: bytes) -> bytes:
    return data.removesuffix(b"\n").removesuffix(b"\r")


def _skip_line(stream: io.BufferedIOBase, data: bytes) -> tuple[int, str]:
    """Read on to the end of a line that begins with `data`, keeping nothing; returns its bytes and its SHA-256."""
    digest, size = hashlib.sha256(), len(data)
    while not data.endswith(b"\n") and (more := stream.readline(_READ_BYTES)):
        size += len(more)
        digest.update(data[:-1])  # the last byte may belong to the newline
        data = data[-1:] + more
    digest.update(_without_newline(data))
    return size, digest.hexdigest()


def _open_lines(path: Path, *, meter: Meter | None) -> io.BufferedIOBase:
    raw: Any = path.open("rb", buffering=0)
    if meter is not None:
        raw = _Metered(raw, meter)
    if path.name.endswith(".gz"):
        # BufferedReader closes what it wraps; GzipFile does not close a file object given to it.
        return io.BufferedReader(_Owning(gzip.GzipFile(fileobj=io.BufferedReader(raw, _READ_BYTES)), raw), _READ_BYTES)
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(raw), _READ_BYTES)
    return io.BufferedReader(raw, _READ_BYTES)


class _Metered(io.RawIOBase):
    """A raw stream that shows what is read from it to a meter."""

    def __init__(self, raw: io.RawIOBase, meter: Meter):
        self._raw, self._meter = raw, meter

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._raw.readinto(buffer) or 0
        self._meter.update(bytes(memoryview(buffer)[:count]))
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Owning(io.RawIOBase):
    """A stream that also closes the file below it."""

    def __init__(self, stream: io.BufferedIOBase, below: io.RawIOBase):
        self._stream, self._below = stream, below

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        self._below.close()
        super().close()


class _ZstdStream(io.RawIOBase):
    """Decompresses frame after frame; unlike zstandard's stream_reader it notices a frame that ends too early."""

    def __init__(self, raw: io.RawIOBase):
        self._raw = raw
        self._frame: Any = None
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            if not self._compressed:
                self._compressed = self._raw.read(_ZSTD_READ_BYTES) or b""
                if not self._compressed:
                    if self._frame is not None:
                        raise EOFError("zstd frame ends too early")
                    return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._text = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
