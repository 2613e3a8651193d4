"""Stages of a study: each in a process of its own, forked from this warm one, and remembered in a file when it is done.

A fork has torch, transformers and megatron-core imported already: a verb starts in a tenth of a second instead of ten.
The process that forks must never run torch on several threads nor touch CUDA itself.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx

from megatron_polar import cli
from megatron_polar.errors import UserError
from megatron_polar.manifest import write_durably

_FORK = multiprocessing.get_context("fork")
_START_SECONDS = 120.0
_HERE = Path(__file__).resolve().parent
_STEPS = sorted({*_HERE.glob("rft_*.py"), _HERE / "base_model.py", _HERE / "muon.py"} - {_HERE / "rft_page.py"})
_CODE = hashlib.sha256(b"".join(path.read_bytes() for path in _STEPS)).hexdigest()
"""Of all that a stage may run of this folder: a mixture of two versions would be no run."""


def run_stage(directory: Path, name: str, function: Callable[..., dict], *arguments: object) -> dict:
    """Call `function(directory, *arguments)` in a fork, unless that was done before; returns what it gave (JSON).

    `directory`/done/`name`.json holds the arguments, a hash of the code, the result, seconds and CPU seconds; what is
    printed goes to `directory`/logs/`name`.log. Raises UserError when the stage fails, and when it was done with other
    arguments or by other code.
    """
    done, log = directory / "done" / f"{name}.json", directory / "logs" / f"{name}.log"
    wanted = [_plain(argument) for argument in arguments]
    if done.exists():
        record = json.loads(done.read_text())
        if (record["arguments"], record.get("code")) != (wanted, _CODE):
            how = "by other code" if record["arguments"] == wanted else "with another size or seed"
            raise UserError(f"{done}: was done {how}; choose another --output, or delete {directory}")
        return record["result"]
    for path in (done, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{directory.name}: {name}", flush=True)
    process = _FORK.Process(target=_stage, args=(function, directory, arguments, wanted, done, log))
    process.start()
    _join(process)
    if process.exitcode:
        raise UserError(f"stage {name} failed with exit status {process.exitcode}; {log} ends with: {_last_line(log)}")
    return json.loads(done.read_text())["result"]


def _plain(argument: object) -> object:
    """An argument as JSON gives it back."""
    value = dataclasses.asdict(argument) if dataclasses.is_dataclass(argument) else argument
    return json.loads(json.dumps(value))


def concurrently(calls: Sequence[tuple], jobs: int) -> None:
    """Make calls (function, *arguments), each in a fork, `jobs` at a time. Raises UserError when one fails.

    The others end their work first, so that little is lost.
    """
    waiting, processes, failed = list(calls), [], []
    try:
        while waiting or processes:
            while waiting and len(processes) < jobs:
                function, *arguments = waiting.pop(0)
                processes.append(_FORK.Process(target=_call, args=(function, arguments)))
                processes[-1].start()
            for process in [process for process in processes if not process.is_alive()]:
                process.join()
                processes.remove(process)
                failed += [process.exitcode] * bool(process.exitcode)
            time.sleep(0.02)
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        raise
    if failed:
        raise UserError(f"{len(failed)} of {len(calls)} runs failed; their messages are above")


def _stage(
    function: Callable[..., dict], directory: Path, arguments: tuple, wanted: list, done: Path, log: Path
) -> None:
    _write_to(log)
    started = time.monotonic()
    try:
        result = function(directory, *arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _end(1)
    except BaseException:
        traceback.print_exc()
        _end(1)
    cpu = sum(
        use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    record = {
        "arguments": wanted,
        "code": _CODE,
        "seconds": time.monotonic() - started,
        "cpu_seconds": cpu,
        "result": result,
    }
    write_durably(done, json.dumps(record, indent=1).encode())
    _end(0)


def _write_to(log: Path) -> None:
    """Send what this process prints, and what libraries print for it, to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def _end(status: int) -> None:
    """Leave a fork without the exit handlers of the process that it was forked from."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    for helper in multiprocessing.active_children():
        helper.terminate()
        helper.join()
    os._exit(status)


def _join(process) -> None:
    """Wait; whatever ends the waiting ends the process, too."""
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(nothing)"


# --- Within a stage --------------------------------------------------------------------------------------------------


def polar(*arguments: object) -> None:
    """Run `megatron-polar ARGUMENTS` in a fork: megatron-core's process groups live once in a process.

    Raises UserError when its exit status is not 0; its messages are in the stage's log.
    """
    words = [str(argument) for argument in arguments]
    print("$ megatron-polar", *words, flush=True)
    status = in_fork(cli.main, words)
    if status:
        raise UserError(f"megatron-polar {words[0]} ended with status {status}; its message is in the log above")


def in_fork(function: Callable[..., object], *arguments: object) -> int:
    """Call a function in a fork; returns what it returned as exit status (None: 0), 1 for an exception."""
    process = _FORK.Process(target=_call, args=(function, arguments))
    process.start()
    _join(process)
    return process.exitcode


def _call(function: Callable[..., object], arguments: Sequence) -> None:
    status: object = None
    try:
        status = function(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except SystemExit as leaving:
        status = leaving.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    _end(status if isinstance(status, int) else 0)


@contextlib.contextmanager
def running(ready: str, function: Callable[..., object], *arguments: object) -> Iterator[str]:
    """Run a server, `function(*arguments, port)`, in a fork while the block lasts; gives its address.

    It serves when the page `ready` answers 200, and ends on SIGTERM. Raises UserError when it does not come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = _FORK.Process(target=_call, args=(function, (*arguments, port)))
    process.start()
    try:
        yield _wait_for(process, f"http://127.0.0.1:{port}", ready)
    finally:
        process.terminate()
        process.join(10)
        process.kill()
        process.join()


def _wait_for(process, address: str, ready: str) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while process.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}{ready}", trust_env=False).status_code == 200:
                return address
        time.sleep(0.05)
    raise UserError(f"a server did not answer within {_START_SECONDS:.0f} s, or ended; its message is in the log above")
