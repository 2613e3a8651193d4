"""HTTP connections that cannot be held open by sending slowly, and whose own errors are JSON as well.

uvicorn closes idle connections between requests, but waits for ever for the first byte and for the rest of a head.
"""

import asyncio

import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_polar.serve.limits import Limits
from megatron_polar.serve.shapes import RequestError


class Connection(H11Protocol):
    """uvicorn's connection with a deadline for request heads and a limit of connections."""

    def __init__(self, *arguments, limits: Limits, **keywords):
        super().__init__(*arguments, **keywords)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            message = f"{self._limits.max_connections} connections are open already; try again later, or reuse one"
            self._refuse(RequestError(503, "too_many_connections", message))
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(RequestError(400, "invalid_http", msg))

    def _watch_head(self) -> None:
        """Run the timer from a connection's beginning, and from the first byte of each further request, to its head."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or self.transport.is_closing():
            self._stop_watching()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.head_seconds, self.transport.close)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: RequestError) -> None:
        self._stop_watching()
        body = orjson.dumps(error.body())
        phrase = {400: "Bad Request", 503: "Service Unavailable"}[error.status]
        head = f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
