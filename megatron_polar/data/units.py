"""Input lines -> work units: consecutive lines up to a fixed size, the same for any number of processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_polar.data.lines import InputLine, read_lines
from megatron_polar.data.parts import Part

# Bytes of text in a work unit. It decides nothing about the output, only how much memory a worker takes and how much
# work a kill can cost.
UNIT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class UnitContext:
    """All that a worker needs beside the lines of a unit."""

    tokenizer_path: Path
    separator_token: str
    reward_token: str
    wrapper: str
    max_response_length: int
    work: Path
    files: tuple[str, ...]
    key: bytes


@dataclass(frozen=True)
class Unit:
    """Consecutive input lines, each with the number of its file."""

    index: int
    lines: list[tuple[int, InputLine]]
    digest: str


class UnitSource:
    """Cuts the input files into units, and notes name, size and hash of each file that was read to its end.

    With a `part` it yields the units of that part only; lines of others are read and counted, neither kept nor hashed,
    and `entries` stays empty.
    """

    def __init__(self, files: Sequence[Path], *, context: UnitContext, unit_bytes: int, part: Part | None = None):
        self.files, self.context, self._unit_bytes, self._part = files, context, unit_bytes, part
        self.total_bytes = sum(file.stat().st_size for file in files)
        self.bytes_read = self.lines_read = 0
        self.units_resumed = 0
        self.entries: list[dict] = []

    def update(self, data: bytes) -> None:
        self.bytes_read += len(data)
        if self._part is None:
            self._hash.update(data)

    def units(self) -> Iterator[Unit]:
        lines: list[tuple[int, InputLine]] = []
        index = size = 0
        is_ours = self._is_ours(index)
        for number, file in enumerate(self.files):
            self._hash, before = xxhash.xxh3_128(), self.bytes_read
            for line in read_lines(file, meter=self):
                self.lines_read += 1
                size += len(line.data)
                if is_ours:
                    lines.append((number, line))
                if size >= self._unit_bytes:
                    if is_ours:
                        yield self._unit(index, lines)
                    lines, index, size = [], index + 1, 0
                    is_ours = self._is_ours(index)
            if self._part is None:
                name, read = self.context.files[number], self.bytes_read - before
                self.entries.append({"name": name, "size": read, "xxh3_128": self._hash.hexdigest()})
        if lines:
            yield self._unit(index, lines)

    def _is_ours(self, index: int) -> bool:
        return self._part is None or self._part.holds(index)

    def _unit(self, index: int, lines: list[tuple[int, InputLine]]) -> Unit:
        digest = xxhash.xxh3_128(self.context.key)
        for number, line in lines:
            place = f"{self.context.files[number]}\n{line.number}\n{line.byte_offset}"
            digest.update(f"\n{place}\n{len(line.data)}\n{line.skipped}\n".encode())
            digest.update(line.data)
        return Unit(index=index, lines=lines, digest=digest.hexdigest())
