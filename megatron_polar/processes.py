"""Where a process is, and helper processes (checkpoint writers, loader workers) that neither outlive their rank nor end
before it."""

import ctypes
import os
import signal
import socket
from collections.abc import Mapping

_PR_SET_PDEATHSIG = 1


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """The node's name as Slurm knows it, which is what `sbatch --exclude` takes; else the host's."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def serve_rank(parent: int) -> None:
    """To be called in a fresh helper process of the rank with process number `parent`.

    The kernel ends the helper when its parent dies, however it dies: a loader worker that waits for a reader, or a
    writer in the middle of a file, would otherwise stay for ever. SIGTERM and SIGUSR1, which launchers send to every
    process of a job, are left to the rank, which finishes its step and then ends its helpers.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if os.getppid() != parent:
        os._exit(1)  # it died before the kernel was told
