"""One job at a time in a run directory."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_polar import log
from megatron_polar.errors import UserError
from megatron_polar.parallel.topology import Topology

_SECONDS_FOR_REMAINS = 5.0
"""A job that was just killed may leave a writer or a loader, which share its lock and die a moment after it."""


@contextmanager
def lock_run(directory: Path, *, topology: Topology) -> Iterator[None]:
    """Keep a second job out of a run directory; the lock goes with the first rank's process, however it ends.

    Collective. Raises UserError on every rank when another job holds it. It is the kernel's lock of a file: on a
    network file system it holds between machines only where that is so. A directory that got nothing but the lock goes
    again.
    """
    problem: list[str | None] = [None]
    handle = None
    if topology.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            _lock(handle)
            if os.fstat(handle).st_nlink == 1:  # what has a name elsewhere, too, is locked and left as it is
                os.truncate(handle, 0)
                os.pwrite(handle, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            host, _, process = os.pread(handle, 200, 0).decode(errors="replace").strip().partition(" ")
            problem = [f"a job is running in it (host {host or '?'}, process {process or '?'})"]
        except OSError as error:  # Lustre mounted without flock, for one
            log.warn(
                f"{directory}: cannot be locked here ({error.strerror or error}); see to it that one job runs in it"
            )
    dist.broadcast_object_list(problem, src=0)
    try:
        if problem[0] is not None:
            raise UserError(f"{directory}: {problem[0]}; wait for its end, stop it, or choose another run.directory")
        yield
    finally:
        if handle is not None:
            if os.listdir(directory) == ["lock"]:  # the run was refused
                os.unlink(directory / "lock")
                os.rmdir(directory)
            os.close(handle)


def _lock(handle: int) -> None:
    """Raises BlockingIOError when somebody else keeps the lock."""
    deadline = time.monotonic() + _SECONDS_FOR_REMAINS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
