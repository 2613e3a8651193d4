"""One JSONL line -> TrajectoryGroup or Preference, or an error that says file, line, reason and remedy."""

import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import orjson
import zstandard

from megatron_polar.data.template import WRAPPERS, prompt_text
from megatron_polar.errors import UserError

INPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

# A longer line is a broken file (no newlines), and reading it whole would break the promise of constant memory.
MAX_LINE_BYTES = 64 * 1024 * 1024
_READ_BYTES = 256 * 1024
# Small, because a zstd block of very repetitive text can expand more than a thousandfold.
_ZSTD_READ_BYTES = 16 * 1024

_FORMS = 'one of {"prompt","trajectories"}, {"prompt","reference","chosen","rejected"}, {"prompt","reference","ranked"}'


class RecordError(UserError):
    """A line that cannot be used: `file`, `line` and `reason` apart, for the quarantine."""

    def __init__(self, reason: str, *, file: str, line: int):
        super().__init__(f"{file}:{line}: {reason}")
        self.file, self.line, self.reason = file, line, reason

    def __reduce__(self):
        return _rebuild_record_error, (self.reason, self.file, self.line)


def _rebuild_record_error(reason: str, file: str, line: int) -> RecordError:
    return RecordError(reason, file=file, line=line)


class _Reason(Exception):
    """Why a record is unusable, before the place is known."""


@dataclass(frozen=True)
class Trajectory:
    """One continuation of the prompt, and the policy (model and sampling settings) that wrote it."""

    policy: str
    text: str


@dataclass(frozen=True)
class TrajectoryGroup:
    """Trajectories of several policies for one prompt; unknown keys of the line are kept in `meta`."""

    prompt: str
    trajectories: tuple[Trajectory, ...]
    wrapper: str
    meta: dict


@dataclass(frozen=True)
class Preference:
    """Candidates in order of preference, best first (at least two), beside a reference for the same prompt."""

    prompt: str
    reference: str
    candidates: tuple[str, ...]
    wrapper: str
    meta: dict


class Meter(Protocol):
    """Sees the raw bytes of a file as they are read: a hash object fits."""

    def update(self, data: bytes, /) -> Any: ...


# ---------------------------------------------------------------- reading lines


def list_inputs(paths: Sequence[Path]) -> list[Path]:
    """Expand directories into their .jsonl, .jsonl.gz and .jsonl.zst files, sorted by path; files stay as given.

    Raises UserError for a path that does not exist, another suffix, or a directory without such files.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(
                entry for entry in path.rglob("*") if entry.name.endswith(INPUT_SUFFIXES) and entry.is_file()
            )
            if not found:
                raise UserError(f"{path}: no {', '.join(INPUT_SUFFIXES)} file in this directory; check the path")
            files.extend(found)
        elif not path.exists():
            raise UserError(f"{path}: no such file or directory; check the path")
        elif not path.name.endswith(INPUT_SUFFIXES):
            raise UserError(f"{path}: not a JSONL file by its name; rename it to {' or '.join(INPUT_SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise UserError("no input given; name at least one JSONL file or directory")
    return files


def read_jsonl(path: Path | str, *, meter: Meter | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its newline) of a .jsonl, .jsonl.gz or .jsonl.zst file; blank lines are
    skipped.

    A directory yields its such files one after the other. `meter.update` gets the raw (compressed) bytes. Memory is
    bounded by the longest line. Raises UserError with `path:line` for a damaged or truncated archive and for a line
    above 64 MiB.
    """
    path = Path(path)
    if path.is_dir():
        for file in list_inputs([path]):
            yield from read_jsonl(file, meter=meter)
        return
    number = 0
    try:
        with _open_lines(path, meter=meter) as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(f"{path}:{number}: line is longer than {MAX_LINE_BYTES >> 20} MiB; is this JSONL?")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as some editors write it
                if not line.isspace() and line:
                    yield number, line.rstrip(b"\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path}:{number + 1}: damaged or truncated archive ({error}); fetch the file again") from error
    except OSError as error:
        raise UserError(f"{path}:{number + 1}: cannot be read ({error.strerror or error}); check the file") from error


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


# ---------------------------------------------------------------- one line


def parse_record(
    line: bytes | str, *, source: str, line_number: int, default_wrapper: str = "sft"
) -> TrajectoryGroup | Preference:
    """Read one input line of docs/data.md, whichever of the three forms it has.

    Raises RecordError (a UserError) whose message starts with `source:line_number`.
    """
    try:
        return _parse(_load_object(line), default_wrapper=default_wrapper)
    except _Reason as reason:
        raise RecordError(str(reason), file=source, line=line_number) from None


def drop_duplicates(
    record: TrajectoryGroup | Preference, *, source: str, line_number: int
) -> tuple[TrajectoryGroup | Preference, int]:
    """Return the record without repeated trajectories (same policy, same text) or candidates, and how many were
    dropped.

    The first of equals stays. Raises RecordError when the rest can no longer be compared.
    """
    try:
        if isinstance(record, Preference):
            candidates = tuple(dict.fromkeys(record.candidates))
            dropped = len(record.candidates) - len(candidates)
            if len(candidates) < 2:
                raise _Reason("all candidates have the same text, so there is no preference; drop the line")
            return (replace(record, candidates=candidates) if dropped else record), dropped
        trajectories = tuple(dict.fromkeys(record.trajectories))
        dropped = len(record.trajectories) - len(trajectories)
        if dropped:
            note = f" once {dropped} duplicate(s) (same policy, same text) are dropped"
            _check_policies(trajectories, note=note)
        return (replace(record, trajectories=trajectories) if dropped else record), dropped
    except _Reason as reason:
        raise RecordError(str(reason), file=source, line=line_number) from None


def _load_object(line: bytes | str) -> dict:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if isinstance(line, bytes):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as bad:
                place = f"byte {bad.start}: 0x{line[bad.start]:02x}"
                raise _Reason(f"not UTF-8 ({place}); convert the file to UTF-8") from None
        raise _Reason(f"malformed JSON ({_one_line(error)}); write one JSON object per line") from None
    if not isinstance(value, dict):
        raise _Reason(f"a JSON {_json_type(value)}, not an object; expected {_FORMS}")
    return value


def _parse(value: dict, *, default_wrapper: str) -> TrajectoryGroup | Preference:
    if "trajectories" in value:
        required: tuple[str, ...] = ("prompt", "trajectories")
    elif "ranked" in value:
        required = ("prompt", "reference", "ranked")
    elif "chosen" in value or "rejected" in value or "reference" in value:
        required = ("prompt", "reference", "chosen", "rejected")
    else:
        raise _Reason(f"keys {sorted(value)} make no record; expected {_FORMS}")
    missing = [key for key in required if key not in value]
    if missing:
        raise _Reason(f"missing key {', '.join(map(repr, missing))} (found {sorted(value)}); expected {_FORMS}")
    prompt = _text(value["prompt"], key="prompt")
    if not prompt.strip():
        raise _Reason("'prompt' is empty; every record needs a prompt, drop the line")
    wrapper = value.get("wrapper", default_wrapper)
    if wrapper not in WRAPPERS:
        raise _Reason(f"'wrapper' is {wrapper!r}; use one of {', '.join(WRAPPERS)}")
    meta = {key: item for key, item in value.items() if key not in (*required, "wrapper")}
    if "trajectories" in value:
        trajectories = _trajectories(value["trajectories"])
        _check_policies(trajectories)
        return TrajectoryGroup(prompt=prompt, trajectories=trajectories, wrapper=wrapper, meta=meta)
    if "ranked" in value:
        ranked = value["ranked"]
        if not isinstance(ranked, list) or len(ranked) < 2:
            raise _Reason(f"'ranked' is {_describe(ranked)}; give a list of two or more answers, best first")
        candidates = tuple(_text(item, key=f"ranked[{index}]") for index, item in enumerate(ranked))
    else:
        candidates = tuple(_text(value[key], key=key) for key in ("chosen", "rejected"))
    reference = _text(value["reference"], key="reference")
    return Preference(prompt=prompt, reference=reference, candidates=candidates, wrapper=wrapper, meta=meta)


def _trajectories(items: Any) -> tuple[Trajectory, ...]:
    if not isinstance(items, list):
        raise _Reason(f'\'trajectories\' is {_describe(items)}; give a list of {{"policy", "text"}} objects')
    trajectories = []
    for index, item in enumerate(items):
        if not isinstance(item, dict) or not {"policy", "text"} <= item.keys():
            raise _Reason(f'\'trajectories[{index}]\' is {_describe(item)}; it needs "policy" and "text"')
        policy = item["policy"]
        if not isinstance(policy, str) or not policy:
            raise _Reason(f"'trajectories[{index}].policy' is {_describe(policy)}; give the policy's name")
        trajectories.append(Trajectory(policy, _text(item["text"], key=f"trajectories[{index}].text")))
    return tuple(trajectories)


def _check_policies(trajectories: Sequence[Trajectory], *, note: str = "") -> None:
    """A group can be compared when one policy has two trajectories (reference, positive) and another one (negative)."""
    counts = Counter(trajectory.policy for trajectory in trajectories)
    listed = ", ".join(f"{' '.join(policy.split())} x{count}" for policy, count in counts.most_common(4))
    listed += ", ..." if len(counts) > 4 else ""
    if not counts:
        raise _Reason("'trajectories' is empty; give at least two of one policy and one of another")
    if max(counts.values()) < 2:
        raise _Reason(f"no policy has two trajectories{note} ({listed}); sample at least two from one policy")
    if len(counts) < 2:
        raise _Reason(f"all trajectories are of one policy{note} ({listed}); add at least one of another policy")


def _text(value: Any, *, key: str) -> str:
    try:
        return prompt_text(value)
    except TypeError as error:
        raise _Reason(f"'{key}' is {_describe(value)}; {error}") from None


def _describe(value: Any) -> str:
    text = orjson.dumps(value).decode("utf-8")
    return f"a JSON {_json_type(value)} {text[:60]}{'...' if len(text) > 60 else ''}"


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Every prompt and every answer of the records in `paths`: what a tokenizer is trained on. Raises RecordError."""
    for path in paths:
        for number, line in read_jsonl(path):
            if line.strip():
                record = parse_record(line, source=str(path), line_number=number)
                yield record.prompt
                if isinstance(record, Preference):
                    yield record.reference
                    yield from record.candidates
                else:
                    yield from (trajectory.text for trajectory in record.trajectories)
