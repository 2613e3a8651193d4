"""Several processes, on several machines too, at one output: which share of the work is whose, and who may be there."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_polar.errors import UserError


@dataclass(frozen=True)
class Part:
    """Of numbered pieces of work those with number % of == index: an element of an array of `of` jobs."""

    index: int
    of: int

    def __post_init__(self):
        if not 0 <= self.index < self.of:
            raise UserError(_not_a_part(f"{self}"))

    def holds(self, number: int) -> bool:
        return number % self.of == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def parse_part(text: str) -> Part:
    """Read `I/N`; raises UserError for anything but N parts that are counted from 0."""
    numbers = re.fullmatch(r"(-?[0-9]{1,9})/(-?[0-9]{1,9})", text)
    if numbers is None:
        raise UserError(_not_a_part(text))
    return Part(int(numbers[1]), int(numbers[2]))


def _not_a_part(text: str) -> str:
    return f"part {text[:40]!r} is not I/N with I from 0 to N-1; four jobs are 0/4, 1/4, 2/4 and 3/4"


@contextmanager
def locked(path: Path, *, part: Part | None, output: Path, verb: str) -> Iterator[None]:
    """Hold the lock file `path`: parts share it, a run without a part has it alone; else UserError at once.

    The lock goes with the process, however it ends. A link in the place of the file is not followed.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # NFS gives exclusive locks to writers only
    with os.fdopen(os.open(path, flags, 0o644), "rb") as lock:
        if not _try_lock(lock.fileno(), fcntl.LOCK_SH if part else fcntl.LOCK_EX, path=path):
            if part is None and _try_lock(lock.fileno(), fcntl.LOCK_SH, path=path):
                raise UserError(f"{output}: parts of {verb} are at work here; run this again when they have ended")
            raise UserError(f"{output}: another {verb} writes here; wait for it or choose another output")
        yield


def _try_lock(handle: int, kind: int, *, path: Path) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path}: cannot be locked ({reason}); mount the file system with flock (Lustre: -o flock)"
        ) from error
    return True
