"""The exceptions that mean "you, the user, can mend this", how foreign text stands in them, and the exit statuses that
a launcher can tell apart."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DONE, FAILED, USER_ERROR = 0, 1, 2
BAD_STEPS = 17
"""Steps kept failing: look into them first; the same command would go on behind them."""
CANNOT_SAVE = 73
"""Checkpoints could not be written several times in a row."""
ENVIRONMENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
ENVIRONMENT_ERRORS |= {errno.ELOOP, errno.EISDIR, errno.ENXIO}  # links, directories and pipes in the place of a file
ENVIRONMENT_ERRORS |= {errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG}  # names where something else or nothing is
"""What the operating system says when the user can mend it; the command line exits with USER_ERROR."""
STALLED = 74
"""A rank hung or died: start again."""
INTERRUPTED = 130
"""Ctrl-C, without a checkpoint."""
STOPPED = 75
"""Asked to stop by a signal, with a checkpoint written: start again to go on."""
MACHINE_DIFFERS = 76
"""Weights that must be equal are not, and were not saved, or one machine reads other bytes than another: start again,
without the machine that is named."""

FENCED = 77
"""Another job has taken over the run directory: leave it to that one."""
PREFLIGHT_FAILED = 79
"""A node is not fit for the job, before anything was computed: start again without the nodes that are named."""

NO_PROGRESS = 78
"""Of a Slurm job: several restarts have brought no newer checkpoint, or there were too many: look at its log."""


class UserError(ValueError):
    """Wrong input, configuration or environment: one line naming what, where, why and the remedy.

    The command line prints it without a traceback and exits with status 2. Anything else that escapes is our mistake
    and keeps its traceback.
    """


class RunStopped(UserError):
    """A run that ends before its last step, for a reason that is not a mistake in its input; `status` says which.
    `machine`: the one without which it should be started again."""

    def __init__(self, message: str, *, status: int, machine: str | None = None):
        super().__init__(message)
        self.status, self.machine = status, machine

    def __reduce__(self):
        return _rebuild_run_stopped, (str(self), self.status, self.machine)


def _rebuild_run_stopped(message: str, status: int, machine: str | None) -> RunStopped:
    return RunStopped(message, status=status, machine=machine)


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put the key whose value is looked at before a UserError that is raised meanwhile."""
    try:
        yield
    except RunStopped:
        raise
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def describe_missing_package(error: ModuleNotFoundError) -> str | None:
    """In one line that this Python has no such package, with the remedy; None where it is a module of one that it has:
    a fault of ours, or of that package."""
    if not error.name or "." in error.name or error.name == __package__:
        return None
    return (
        f"{sys.executable} has no module {error.name!r}; use the environment that has it (`source .venv/bin/activate`, "
        f"where make has made one), or install it: requirements.txt lists what is needed"
    )


def describe_os_error(error: OSError, *, otherwise: str) -> str:
    """What the operating system says, in one line with the path (or `otherwise`) and the remedy."""
    remedies = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EIO: "check the disk"}
    where = error.filename2 or error.filename or otherwise
    return f"{where}: {error.strerror or error}; {remedies.get(error.errno, 'check the path')}"


def printable(text: str, *, limit: int) -> str:
    """The head of a text from outside, `limit` characters, as it can stand in a message of one line on a terminal."""
    near, rest = text[: 4 * limit], text[4 * limit :]  # a whole reply may be megabytes
    words = " ".join(near.split())
    head = "".join(mark if mark.isprintable() else f"\\u{ord(mark):04x}" for mark in words[:limit])
    return head + "..." * (len(words) > limit or bool(rest.strip()))
