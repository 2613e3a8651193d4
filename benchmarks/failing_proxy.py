"""A proxy before an OpenAI-compatible server: it lets a share of the requests fail, and records every answer.

Run as a program it prints its port and serves until its standard input closes. A failure comes before the server is
asked, or after it has answered: then the answer is made and never given. Which request fails, and how, follows from
the seed, the request (model, prompt, seed) and the number of the attempt, whatever else is under way.
"""

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

KINDS = {  # (whether the server is asked, what the client gets)
    "500": (False, "500"),
    "503": (False, "503"),
    "dropped": (False, "reset"),
    "500 after the answer": (True, "500"),
    "503 after the answer": (True, "503"),
    "dropped after the answer": (True, "reset"),
    "half the answer": (True, "half"),
}
_LARGEST_HEAD = 65536


@dataclass
class Seen:
    """What is known of one request: attempts that arrived, and texts that were sent to a client or held back."""

    attempts: int = 0
    given: list[str] = field(default_factory=list)
    withheld: list[str] = field(default_factory=list)


def key_of(model: str, prompt: str, seed: int) -> str:
    """A request's name in the record."""
    return json.dumps([model, prompt, seed])


def fate_of(key: str, attempt: int, *, failures: float, seed: int) -> str | None:
    """Which of KINDS befalls an attempt, or None."""
    draw = random.Random(f"{seed} {attempt} {key}")
    return draw.choice(list(KINDS)) if draw.random() < failures else None


class Proxy:
    """One connection to the server for each connection of a client."""

    def __init__(self, upstream: str, *, failures: float, seed: int):
        parts = urlsplit(upstream)
        self._host, self._port = parts.hostname, parts.port
        self._failures, self._seed = failures, seed
        self._seen: dict[str, Seen] = {}
        self._failed = dict.fromkeys(KINDS, 0)
        self._under_way = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client until either side goes."""
        server: list[asyncio.StreamWriter] = []
        try:
            upstream = await asyncio.open_connection(self._host, self._port, limit=_LARGEST_HEAD)
            server.append(upstream[1])
            while True:
                await self._exchange((reader, writer), upstream)
        except (asyncio.IncompleteReadError, OSError):
            pass  # gone: the client was killed, or has what it wanted
        finally:
            for end in (writer, *server):
                end.close()

    async def _exchange(self, client: tuple, upstream: tuple) -> None:
        reader, writer = client
        head, body = await _read_message(reader)
        path = head.split(b" ", 2)[1]
        if path == b"/record":
            writer.write(_reply("200 OK", json.dumps(self._record()).encode()))
        elif not path.startswith(b"/v1/completions"):
            writer.write(b"".join(await self._forward(upstream, head + body)))
        else:
            self._under_way += 1
            try:
                await self._complete(writer, upstream, head, body)
            finally:
                self._under_way -= 1
        await writer.drain()

    async def _complete(self, writer: asyncio.StreamWriter, upstream: tuple, head: bytes, body: bytes) -> None:
        asked = json.loads(body)
        key = key_of(asked["model"], asked["prompt"], asked["seed"])
        seen = self._seen.setdefault(key, Seen())
        seen.attempts += 1
        fate = fate_of(key, seen.attempts, failures=self._failures, seed=self._seed)
        is_asked, outcome = KINDS[fate] if fate else (True, "given")
        if fate:
            self._failed[fate] += 1
        answer = await self._forward(upstream, head + body) if is_asked else (b"", b"")
        if is_asked and answer[0].split(b" ", 2)[1] == b"200":
            (seen.withheld if fate else seen.given).append(json.loads(answer[1])["choices"][0]["text"])
        if outcome == "given":
            writer.write(b"".join(answer))
        elif outcome == "half":
            writer.write(answer[0] + answer[1][: len(answer[1]) // 2])
            await writer.drain()
            raise ConnectionResetError("on purpose")
        elif outcome == "reset":
            writer.transport.abort()
            raise ConnectionResetError("on purpose")
        else:
            writer.write(_reply(f"{outcome} Injected", b'{"error": "injected"}'))

    async def _forward(self, upstream: tuple, message: bytes) -> tuple[bytes, bytes]:
        reader, writer = upstream
        writer.write(message)
        return await _read_message(reader)

    def _record(self) -> dict:
        seen = {key: asdict(one) for key, one in self._seen.items()}
        return {"under_way": self._under_way, "failed": self._failed, "requests": seen}


async def _read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of an HTTP message whose length is in its head, as httpx and uvicorn write them."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return head, await reader.readexactly(int(value))
    return head, b""


def _reply(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


# --- from outside ----------------------------------------------------------------------------------------------------


class Remote:
    """A running proxy."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self._http = httpx.Client(base_url=self.url, trust_env=False, timeout=60)

    def record(self) -> dict:
        """under_way; failed: how many of each kind; requests: key -> attempts, given, withheld."""
        return self._http.get("/record").json()


@contextlib.contextmanager
def running(upstream: str, *, failures: float, seed: int) -> Iterator[Remote]:
    """A proxy in a process of its own, ended with the block."""
    command = [sys.executable, str(Path(__file__).resolve()), upstream, "--failures", str(failures)]
    command += ["--seed", str(seed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Remote(int(process.stdout.readline()))
        finally:
            process.kill()


async def _serve(proxy: Proxy) -> None:
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=_LARGEST_HEAD)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    """Serve the proxy that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("upstream", help="http://HOST:PORT of the server")
    parser.add_argument("--failures", type=float, default=0.05, help="share of the attempts that fail")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    asyncio.run(_serve(Proxy(options.upstream, failures=options.failures, seed=options.seed)))


if __name__ == "__main__":
    main()
