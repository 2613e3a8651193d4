"""One job at a time in a run directory, and no more word from a job that another has taken over from.

The kernel's lock of the file `lock` keeps a second job out. But a job on a node that was cut off from the cluster lives
on, keeps its lock or never had one that other nodes see, and knows nothing of the job that goes on elsewhere in its
place. So every job puts a new file `lock` into the directory, and one whose file is no longer there is fenced: it
writes nothing into the directory any more.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_polar import log
from megatron_polar.errors import FENCED, RunStopped, UserError
from megatron_polar.parallel.topology import Topology

TAKE_OVER = "POLAR_TAKE_OVER"
"""Environment variable: what `lock` says of a job that is over, as a scheduler that cannot reach its node knows."""
_LONGEST = 400
_SECONDS_FOR_REMAINS = 5.0
"""A job that was just killed may leave a writer or a loader, which share its lock and die a moment after it."""


class RunLock:
    """This job's claim on a run directory. The first rank holds the file; the others know what it says."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._handle: int | None = None
        self._made: list[Path] = []
        self.text = ""
        """What our file says: host, process, job and restart. No other job's file says the same."""

    def is_ours(self) -> bool:
        """Whether this job may write here. Opens the file instead of asking for its name: NFS keeps names in memory."""
        if not self.text:
            return True
        try:
            current = os.open(self.directory / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if self._handle is None:
                    return os.pread(current, _LONGEST, 0).decode(errors="replace").strip() == self.text
                return os.path.samestat(os.fstat(current), os.fstat(self._handle))
            finally:
                os.close(current)
        except OSError as error:
            # ESTALE is NFS's answer about our own file when another host has put one in its place. Storage that does
            # not answer at all is none of these: what is to be written will fail by itself.
            return error.errno not in (errno.ENOENT, errno.ESTALE)

    def taken_over(self) -> RunStopped:
        """The error of a job that is fenced."""
        holder = _holder(self._read())
        message = f"{self.directory}: another job has taken over here ({holder}); this one writes nothing more and ends"
        return RunStopped(message, status=FENCED)

    def take(self) -> str | None:
        """Claim the directory; returns what keeps us out, or None."""
        self._made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _SECONDS_FOR_REMAINS
        while True:
            old = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                text = os.pread(old, _LONGEST, 0).decode(errors="replace").strip()
                is_over = bool(text) and os.environ.get(TAKE_OVER) == text
                if is_over or self._lock(old):
                    if os.path.samestat(os.fstat(old), os.stat(self.directory / "lock", follow_symlinks=False)):
                        self._put_ours_there()
                        if is_over:
                            log.warn(f"{self.directory}: taken over from a job that is over ({_holder(text)})")
                        return None
                elif time.monotonic() > deadline:
                    return f"a job is running in it ({_holder(text)})"
            finally:
                os.close(old)
            time.sleep(0.1)

    def release(self) -> None:
        """Let go. A directory that got nothing but the lock goes again, and empty ones above that came with it."""
        if self._handle is None:
            return
        if os.listdir(self.directory) == ["lock"] and self.is_ours():  # the run was refused
            os.unlink(self.directory / "lock")
            os.rmdir(self.directory)
            with contextlib.suppress(OSError):  # somebody else has put something there
                for path in self._made[1:]:
                    os.rmdir(path)
        os.close(self._handle)
        self._handle = None

    def _lock(self, handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # Lustre mounted without flock, for one
            reason = error.strerror or error
            log.warn(f"{self.directory}: cannot be locked here ({reason}); see to it that one job runs in it")
        return True

    def _put_ours_there(self) -> None:
        path = self.directory / f".lock-{os.urandom(4).hex()}"
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        job = f"{os.environ.get('SLURM_JOB_ID', '-')} {os.environ.get('SLURM_RESTART_COUNT', '0')}"
        self.text = f"{socket.gethostname()} {os.getpid()} {job}"
        os.write(self._handle, f"{self.text}\n".encode())
        with contextlib.suppress(OSError):  # said above
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(path, self.directory / "lock")

    def _read(self) -> str:
        try:
            return (self.directory / "lock").read_text(errors="replace")[:_LONGEST].strip()
        except OSError:
            return ""


def _holder(text: str) -> str:
    """What `lock` says, for people: host, process, and under Slurm job and restart."""
    words = text.split()[:3]
    host, process, job = words + ["?", "?", "-"][len(words) :]
    return f"host {host}, process {process}" + (f", job {job}" if job != "-" else "")


@contextmanager
def lock_run(directory: Path, *, topology: Topology) -> Iterator[RunLock]:
    """Keep other jobs out of a run directory; the lock goes with the first rank's process, however it ends.

    Collective. Raises UserError on every rank when another job holds it.
    """
    lock = RunLock(directory)
    problem = lock.take() if topology.rank == 0 else None
    told = [problem, lock.text]
    dist.broadcast_object_list(told, src=0)
    problem, lock.text = told
    try:
        if problem is not None:
            raise UserError(f"{directory}: {problem}; wait for its end, stop it, or choose another run.directory")
        yield lock
    finally:
        lock.release()
