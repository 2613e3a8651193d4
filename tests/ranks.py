"""Run a function on N real gloo ranks, forked from this warm process: seconds instead of torchrun's minutes.

The test process itself must stay clean: it never joins a process group, never enters the CUDA substitution and never
runs torch on several threads (an OpenMP pool does not survive a fork).
"""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from pathlib import Path

_CONTEXT = multiprocessing.get_context("fork")


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank of a job on this machine; the first rank hosts the store on `port`."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def become_rank(rank: int, world_size: int, port: int) -> None:
    """Make this process, a fork, a rank of a job."""
    os.environ.update(rank_environment(rank, world_size, port))


def run_ranks(function, world_size: int, *arguments, timeout: float = 240.0) -> list:
    """Call `function(*arguments)` on every rank; returns the results by rank. Any failure fails with its traceback."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        processes = []
        for rank in range(world_size):
            process = _CONTEXT.Process(
                target=_child, args=(function, arguments, rank, world_size, port, Path(directory)), daemon=False
            )
            process.start()
            processes.append(process)
        _wait(processes, deadline=time.monotonic() + timeout)
        results = [_read(Path(directory) / str(rank)) for rank in range(world_size)]
    errors = [  # a rank that died without a word first: what the others say is that they lost it
        f"rank {rank} ended with status {process.exitcode} and said nothing (-9: killed after {timeout:.0f} s, or 5 s "
        "after another rank's end)"
        for rank, (process, result) in enumerate(zip(processes, results, strict=True))
        if result is None
    ]
    errors += [result[1] for result in results if result is not None and result[0] == "error"]
    if errors:
        raise AssertionError("\n\n".join(errors))
    return [value for _, value in results]


def _wait(processes, *, deadline: float) -> None:
    grace = None
    while any(p.is_alive() for p in processes):
        if any(p.exitcode not in (None, 0) for p in processes) and grace is None:
            grace = (
                time.monotonic() + 5
            )  # the others wait for the dead one in a collective: let them report, then end them
        if time.monotonic() > deadline or (grace and time.monotonic() > grace):
            for process in processes:
                if process.is_alive():
                    process.kill()
        time.sleep(0.01)
    for process in processes:
        process.join()


def _child(function, arguments, rank: int, world_size: int, port: int, directory: Path) -> None:
    become_rank(rank, world_size, port)
    try:
        outcome = ("value", function(*arguments))
    except BaseException:
        outcome = ("error", f"rank {rank}:\n{traceback.format_exc()}")
    temporary = directory / f"{rank}.tmp"
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.rename(directory / str(rank))
    for helper in multiprocessing.active_children():  # saving a checkpoint starts one, and os._exit would orphan it
        helper.kill()
        helper.join()
    os._exit(0 if outcome[0] == "value" else 1)


def _read(path: Path) -> tuple | None:
    return pickle.loads(path.read_bytes()) if path.exists() else None
