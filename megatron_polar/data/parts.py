"""Several processes, on several machines too, at one output: which share of the work is whose, and who may be there."""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_polar.errors import UserError

_LOCK_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # NFS gives exclusive locks to writers only


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
    with os.fdopen(os.open(path, _LOCK_FILE, 0o644), "rb") as lock:
        if not _try_lock(lock.fileno(), fcntl.LOCK_SH if part else fcntl.LOCK_EX, path=path):
            if part is None and _try_lock(lock.fileno(), fcntl.LOCK_SH, path=path):
                raise UserError(f"{output}: parts of {verb} are at work here; run this again when they have ended")
            raise UserError(f"{output}: another {verb} writes here; wait for it or choose another output")
        yield


@contextmanager
def held_alone(path: Path, numbers: Iterable[int], *, taken: str) -> Iterator[None]:
    """Have numbered pieces of work alone, each a byte of the lock file `path`; UserError(taken) where another has one.

    For work that must not be done twice, whoever is given the same part, or parts of another number. These locks are
    the process's, and go when it closes the file: nothing else of it may open that.
    """
    with os.fdopen(os.open(path, _LOCK_FILE, 0o644), "rb+") as lock:
        for number in numbers:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError):  # POSIX allows either
                raise UserError(taken) from None
            except OSError as error:
                raise _no_locks(path, error) from error
        yield


def _try_lock(handle: int, kind: int, *, path: Path) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _no_locks(path, error) from error
    return True


def _no_locks(path: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"{path}: cannot be locked ({reason}); mount the file system with flock (Lustre: -o flock)")
