"""A real reward server in a process forked from this warm one, on a real socket."""

import contextlib
import multiprocessing
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from ranks import run_ranks
from tiny_runs import STEPS, run_training, tiny_config

from megatron_polar import cli
from megatron_polar.score.requests import ScoreRequest
from megatron_polar.score.scorer import load_scorer

ITEM = {"prompt": "ba ke", "reference": "li mo", "outputs": ["li mo", "zo zo zo", "ra"], "wrapper": "sft"}

_CONTEXT = multiprocessing.get_context("fork")


@dataclass
class RunningServer:
    """A server process, its address and the file that its stderr goes to."""

    process: multiprocessing.Process
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60.0, trust_env=False, **options)

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, timeout: float = 30.0) -> int:
        """Ask it to end by SIGTERM and return its exit status."""
        self.process.terminate()
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the server did not end on SIGTERM"
        return self.process.exitcode


def trained_checkpoint(corpus, directory) -> str:
    """A run whose weights have moved far from their start."""
    run_training(tiny_config(corpus, directory, optimizer__lr=1e-2, checkpoint__save_interval=STEPS))
    return str(directory)


@contextlib.contextmanager
def serving(
    checkpoint, *options, directory: Path, prepare: Callable[[], None] | None = None, wait: bool = True
) -> Iterator[RunningServer]:
    """`megatron-polar serve` on a free port; `prepare` runs in its process before it starts."""
    log = directory / "server.log"
    log.unlink(missing_ok=True)
    arguments = ["serve", "--checkpoint", str(checkpoint), "--device", "cpu", "--port", "0", *map(str, options)]
    process = _CONTEXT.Process(target=_child, args=(arguments, log, prepare))
    process.start()
    try:
        server = RunningServer(process, _address(process, log), log)
        if wait:
            _wait_until_ready(server)
        yield server
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _child(arguments: list[str], log: Path, prepare: Callable[[], None] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if prepare is not None:
        prepare()
    sys.exit(cli.main(arguments))


def _address(process, log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.is_alive():
        found = re.search(r"(http://\S+:\d+): loading", log.read_text() if log.exists() else "")
        if found:
            return found[1]
        time.sleep(0.02)
    process.join(5)
    raise AssertionError(f"the server did not start: {log.read_text() if log.exists() else ''}")


def _wait_until_ready(server: RunningServer) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if httpx.get(f"{server.url}/ready", trust_env=False).status_code == 200:
            return
        time.sleep(0.02)
    raise AssertionError(f"the server was not ready in time: {server.log.read_text()}")


# --- Asking -----------------------------------------------------------------------------------------------------------


def _score(checkpoint: str, batches: list[list[ScoreRequest]]) -> list:
    scorer = load_scorer(checkpoint, device_kind="cpu")
    return [scorer.score(batch) for batch in batches]


def expected(checkpoint, *requests: ScoreRequest) -> list[list[float]]:
    """Rewards of each request, asked alone."""
    return [rewards[0] for rewards in run_ranks(_score, 1, checkpoint, [[request] for request in requests])[0]]


def request_of(item: dict) -> ScoreRequest:
    """Without a wrapper that of the tests' trajectories, which the model behind the server was trained with."""
    return ScoreRequest(item["prompt"], item["reference"], tuple(item["outputs"]), item.get("wrapper", "pretrain"))


def asked(client: httpx.Client, path: str, body: object) -> dict | list:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code"}
    assert error["code"] == status
    return error


def metrics_of(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def read_all(connection: socket.socket) -> bytes:
    """What comes over a connection until the server closes it."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)
