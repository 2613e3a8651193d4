"""An HTTP server in a thread that answers as engines do, and misbehaves as it is told: real sockets on 127.0.0.1."""

import json
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FlakyServer:
    """`answer(request)` gives the reply to a request as (status, headers, object or raw bytes), or None to hang up.

    `requests` holds the decoded bodies in the order of their arrival, `most_at_once` how many were under way together.
    GET /v1/models is answered by `models()` in the same form; without it there is no such page.
    """

    def __init__(self, answer: "Callable[[Request], Any]", models: Callable[[], Any] = lambda: (404, {}, {})):
        self.answer, self.models, self.num_looks = answer, models, 0
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._under_way, self._lock = 0, threading.Lock()
        self._http = _Server(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "FlakyServer":
        return self

    def __exit__(self, *exception) -> None:
        self._http.shutdown()
        self._http.server_close()

    def take(self, request: "Request") -> Any:
        with self._lock:
            request.number = len(self.requests)
            self.requests.append(request)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            return self.answer(request)
        finally:
            with self._lock:
                self._under_way -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # clients that give up are what is tested


class Request:
    """What arrived: its number, path, headers and decoded body."""

    def __init__(self, path: str, headers: dict[str, str], body: Any):
        self.number, self.path, self.headers, self.body, self.time = -1, path, headers, body, time.monotonic()


def _handler(server: FlakyServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(server.take(Request(self.path, dict(self.headers), body)))

        def do_GET(self):
            server.num_looks += 1
            self.reply(server.models())

        def reply(self, reply):
            if reply is None:
                self.close_connection = True
                return
            status, headers, content = reply
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)
            except OSError:
                self.close_connection = True  # the client has lost its patience

        def log_message(self, *arguments):
            pass

    return Handler


# --- engines -----------------------------------------------------------------------------------------------------


def value_of(content: Any) -> float:
    """A number that tells contents apart: of token ids, of a text, or of prompt, reference, output and wrapper."""
    return zlib.crc32(json.dumps(content).encode()) / 2**32 - 0.5


def pooling(request: Request, shape: Callable[[float], Any] = lambda value: [[9.0], [value]]) -> Any:
    """vLLM's /pooling (one row per token), or with another `shape` another engine's."""
    entries = [
        {"index": i, "object": "pooling", "data": shape(value_of(x))} for i, x in enumerate(request.body["input"])
    ]
    return {"id": "x", "object": "list", "data": entries}


def classify(request: Request) -> Any:
    """vLLM's /classify."""
    values = [value_of(content) for content in request.body["input"]]
    return {"data": [{"index": i, "label": "LABEL_0", "probs": [v], "num_classes": 1} for i, v in enumerate(values)]}


def sglang(request: Request) -> Any:
    """SGLang's /classify."""
    contents = request.body["text"] if "text" in request.body else request.body["input_ids"]
    return [{"embedding": [value_of(content)], "meta_info": {"id": "x"}} for content in contents]


def native(request: Request, value: Callable[[dict, str], float] | None = None) -> Any:
    """Our own /v1/score."""

    def default(item: dict, output: str) -> float:
        return value_of([item["prompt"], item["reference"], output, item.get("wrapper")])

    rewards = [[(value or default)(item, output) for output in item["outputs"]] for item in request.body["items"]]
    return {"model": "m", "rewards": rewards, "truncated": [[False] * len(row) for row in rewards]}


def ok(content: Any) -> tuple[int, dict[str, str], Any]:
    """A good reply."""
    return 200, {}, content
