"""What is asked of a policy, what comes back, and the journal that remembers it."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from megatron_polar.errors import UserError
from megatron_polar.policies.prompts import Prompt

_READ_BYTES = 65536
_MOST_OPEN = 64  # files; endpoints that are far ahead of others keep shards open


class Place(NamedTuple):
    """Which trajectory of a shard: the prompt's row, the policy's place in the pool, and the number of the draw."""

    row: int
    policy: int
    draw: int


@dataclass(frozen=True)
class Ask:
    """One trajectory that is wanted: every one is one request, with a seed of its own."""

    shard: int
    place: Place
    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Answer:
    """A text as the policy gave it; ending: at its own end, or cut off at max_tokens. seconds: of the last attempt."""

    text: str
    ending: Literal["stop", "length"]
    attempts: int = 1
    seconds: float = 0.0
    tokens: int = 0


class NoAnswer(Exception):
    """A request that failed for good; another attempt would not change it, or enough were made."""

    def __init__(self, reason: str, *, attempts: int = 1):
        super().__init__(reason)
        self.reason, self.attempts = reason, attempts


class Source(Protocol):
    """Who answers: an endpoint, or a model in this process; up to `concurrency` requests at a time."""

    name: str
    concurrency: int

    async def check(self, *, patience: float = 0.0) -> dict:
        """Find out whether requests can be answered; what the source says of itself. Raises UserError.

        `patience`: seconds that a server may take to start.
        """
        ...

    async def answer(self, ask: Ask) -> Answer:
        """Raises NoAnswer for this request, UserError where no request can be answered any more."""
        ...

    async def close(self) -> None: ...


class Journal:
    """A line for every request that is finished, one file a shard, so that none is ever sent again.

    A line is written in one call when its answer is there, so a killed process loses none of them; `sync` puts them on
    the disk, which only a machine that stops can need. The last line may be torn (a full disk, a power cut): what is
    behind the last whole line is cut off when the file is next opened.
    """

    def __init__(self, directory: Path, *, policies: list[str]):
        self._directory, self._policies = directory, policies
        self._numbers = {name: number for number, name in enumerate(policies)}
        self._open: OrderedDict[int, int] = OrderedDict()
        self._dirty: set[int] = set()

    def path(self, shard: int) -> Path:
        """Not .jsonl: `preprocess` reads all of these in a directory."""
        return self._directory / f"answers-{shard:05d}.ndjson"

    def append(self, ask: Ask, outcome: Answer | NoAnswer) -> None:
        """Write one line. Raises OSError where it cannot be written whole."""
        row, policy, draw = ask.place
        line: dict[str, Any] = {"row": row, "policy": self._policies[policy], "draw": draw}
        if isinstance(outcome, NoAnswer):
            line |= {"failed": outcome.reason, "attempts": outcome.attempts}
        else:
            line |= {"text": outcome.text, "ending": outcome.ending, "attempts": outcome.attempts}
            line |= {"seconds": round(outcome.seconds, 4), "tokens": outcome.tokens}
        content = orjson.dumps(line) + b"\n"
        descriptor = self._descriptor(ask.shard)
        end = os.fstat(descriptor).st_size
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(descriptor, end)  # the next line must not stand behind a part of this one
            error.filename = str(self.path(ask.shard))
            raise
        self._dirty.add(ask.shard)

    def read(self, shard: int) -> dict[Place, Answer | NoAnswer]:
        """What is finished of a shard. Raises UserError for a line that this program has not written."""
        path, found = self.path(shard), {}
        if not os.path.lexists(path):
            return found
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: not a regular file; delete it, and its requests are sent again")
        for number, line in enumerate(_whole_lines(path), start=1):
            try:
                entry = orjson.loads(line)
                place = Place(entry["row"], self._numbers[entry["policy"]], entry["draw"])
                if "failed" in entry:
                    found[place] = NoAnswer(entry["failed"], attempts=entry["attempts"])
                else:
                    names = ("text", "ending", "attempts", "seconds", "tokens")
                    found[place] = Answer(**{name: entry[name] for name in names})
            except (orjson.JSONDecodeError, KeyError, TypeError):
                raise UserError(
                    f"{path}:{number}: not what `sample` has written; delete the line, and its request is sent again"
                ) from None
        return found

    def sync(self) -> None:
        """Put all lines on the disk; may run in a thread beside `append`."""
        for shard in list(self._dirty):
            self._dirty.discard(shard)
            descriptor = os.open(self.path(shard), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

    def close(self, shard: int | None = None) -> None:
        """Close the file of one shard, or all."""
        for number in [shard] if shard is not None else list(self._open):
            if (descriptor := self._open.pop(number, None)) is not None:
                os.close(descriptor)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._open[shard] = os.open(self.path(shard), flags, 0o644)
            _cut_torn_line(self._open[shard])
        self._open.move_to_end(shard)
        return self._open[shard]


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def _cut_torn_line(descriptor: int) -> None:
    """Take off what is behind the last newline."""
    size = end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _READ_BYTES)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
