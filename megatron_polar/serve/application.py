"""The server's endpoints, and the life of the model behind them.

A thread of its own loads the model and scores (torch's modes belong to a thread), two others tokenise, the event loop
answers.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_polar import log
from megatron_polar.score.scorer import Scorer
from megatron_polar.serve.batching import Batcher, NotFinite, QueueFull
from megatron_polar.serve.limits import Limits
from megatron_polar.serve.metrics import Metrics
from megatron_polar.serve.shapes import (
    Question,
    RequestError,
    Scored,
    Settings,
    read_classify,
    read_json,
    read_openrlhf,
    read_pooling,
    read_score,
)
from megatron_polar.serve.tokens import tokenize

_OPEN_PATHS = ("/health", "/ready")
_CLIENT_LEFT = 499
_DRAINED_BODIES = 8
_FAILURES_TO_BE_UNREADY, _UNREADY_SECONDS = 3, 60.0
"""For so long after the last one: who is sent nothing while unready would stay so."""

Reader = Callable[[dict, Settings], Question]


@dataclass(frozen=True)
class ServeOptions:
    """Where to listen, who may ask (`token`; None: anybody), and what replies look like."""

    settings: Settings
    limits: Limits
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None


class Application:
    """The state of a server and its endpoints; `asgi` is what uvicorn runs."""

    def __init__(self, load: Callable[[], Scorer], options: ServeOptions):
        self._load, self._limits, self._settings = load, options.limits, options.settings
        self._metrics = Metrics()
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._tokenizing = ThreadPoolExecutor(2, thread_name_prefix="tokenize")  # a long text holds up but one of them
        self._scorer: Scorer | None = None
        self._batcher: Batcher | None = None
        self._loaded_at = 0
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        readers = {
            "/v1/score": read_score,
            "/pooling": read_pooling,
            "/classify": read_classify,
            "/get_reward": read_openrlhf,
        }
        pages = {"/health": self._health, "/ready": self._ready, "/v1/models": self._models, "/metrics": self._page}
        routes = [
            Route(path, functools.partial(self._answer, read), methods=["POST"]) for path, read in readers.items()
        ]
        routes += [Route(path, page, methods=["GET"]) for path, page in pages.items()]
        handlers = {HTTPException: _http_error, Exception: self._internal_error}
        app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)
        app.router.redirect_slashes = False
        self.asgi = _Guard(app, token=options.token, metrics=self._metrics, paths=(*readers, *pages))

    # --- Life --------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(self._load_and_run())
        worker.add_done_callback(self._note_end)
        yield
        worker.cancel()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._model_thread.shutdown(wait=False, cancel_futures=True)

    async def _load_and_run(self) -> None:
        scorer = await asyncio.get_running_loop().run_in_executor(self._model_thread, self._load)
        self._batcher = Batcher(
            scorer.score_tokens,
            executor=self._model_thread,
            max_tokens=self._limits.max_batch_tokens or scorer.config.data.max_tokens_per_micro_batch,
            wait=self._limits.batch_wait_ms / 1000,
            max_queue=self._limits.max_queue,
            metrics=self._metrics,
        )
        wrapper = scorer.default_wrapper(self._settings.wrapper)
        self._settings = dataclasses.replace(self._settings, wrapper=wrapper)
        self._scorer, self._loaded_at = scorer, int(time.time())
        log.info(f"{self._settings.model} is ready")
        await self._batcher.run()

    def _note_end(self, worker: asyncio.Task) -> None:
        if not worker.cancelled():
            self.failure = worker.exception()
            self.on_failure()

    # --- Endpoints ---------------------------------------------------------------------------------------------------

    async def _answer(self, read: Reader, request: Request) -> Response:
        try:
            scorer, batcher = self._loaded()
            _check_content(request)
            body = await _read_body(request, self._limits)
            question = read(read_json(body), self._settings)
            scored = await self._in_time(request, self._score(question, scorer=scorer, batcher=batcher))
            return _json(question.reply(scored))
        except RequestError as error:
            return _error(error)
        except QueueFull as full:
            message = f"{full.waiting} sequences wait already; try again in {full.retry_after} s"
            return _error(RequestError(429, "queue_full", message, retry_after=full.retry_after))
        except NotFinite:
            return self._not_finite(request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_LEFT)
        except Exception as error:
            return await self._internal_error(request, error)

    async def _score(self, question: Question, *, scorer: Scorer, batcher: Batcher) -> Scored:
        batcher.check_room(question.asks.num_sequences)  # before the work of tokenising
        loop = asyncio.get_running_loop()
        tokenized = await loop.run_in_executor(self._tokenizing, tokenize, scorer, question.asks)
        flat = tokenized.in_order(await batcher.score(tokenized.comparisons))
        for reward in flat:
            self._metrics.rewards.observe(reward)
        return Scored(flat, list(tokenized.truncated), [tokenized.length(i) for i in range(len(flat))])

    async def _in_time(self, request: Request, work: Awaitable[Scored]) -> Scored:
        """Wait for the scores as long as there is time and somebody who wants them."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request))
        seconds = self._limits.request_seconds
        try:
            await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            raise RequestError(
                504, "timeout", f"not scored within {seconds:g} s; send less at once, or try again later"
            )
        finally:
            task.cancel()
            gone.cancel()

    def _loaded(self) -> tuple[Scorer, Batcher]:
        if self._scorer is None or self._batcher is None:
            raise RequestError(503, "loading", "the model is still being loaded; GET /ready tells when", retry_after=5)
        return self._scorer, self._batcher

    async def _internal_error(self, request: Request, error: Exception) -> Response:
        """A reply with an id and no details. The log gets the places in the code: a message could quote a text."""
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        identifier = self._note_failure(request, "error", what=f"{type(error).__name__} at {' '.join(places)}")
        return _error(RequestError(500, "internal", f"an error on the server's side; the log has {identifier}"))

    def _not_finite(self, request: Request) -> Response:
        """Of what is asked, not of the moment: a client must not repeat it, and may halve it to find the item."""
        identifier = self._note_failure(request, "not_finite", what="a reward is NaN or infinite")
        return _error(RequestError(422, "not_finite", f"the model gave no finite reward; the log has {identifier}"))

    def _note_failure(self, request: Request, cause: str, *, what: str) -> str:
        """Count and log it; returns the id that the log has."""
        identifier = secrets.token_hex(6)
        self._metrics.failures.labels(cause).inc()
        log.warn(f"request {identifier} to {request.url.path} failed: {what}")
        return identifier

    async def _health(self, _: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        try:
            _, batcher = self._loaded()
        except RequestError as error:
            return _error(error)
        is_fresh = batcher.seconds_since_failure < _UNREADY_SECONDS
        if is_fresh and batcher.failures_in_a_row >= _FAILURES_TO_BE_UNREADY:
            return _error(RequestError(503, "failing", f"the last {batcher.failures_in_a_row} comparisons failed"))
        if batcher.seconds_in_batch > self._limits.request_seconds:
            return _error(RequestError(503, "stalled", f"one batch has taken {batcher.seconds_in_batch:.0f} s so far"))
        return _json({"status": "ready"})

    async def _models(self, _: Request) -> Response:
        try:
            scorer, _batcher = self._loaded()
        except RequestError as error:
            return _error(error)
        model = {
            "id": self._settings.model,
            "object": "model",
            "created": self._loaded_at,
            "owned_by": "megatron-polar",
            "max_model_len": scorer.config.data.max_sequence_length,
            "max_response_tokens": scorer.max_response_length,
            "tokenizer": scorer.tokenizer.fingerprint,
            "wrapper": self._settings.wrapper,
        }
        return _json({"object": "list", "data": [model]})

    async def _page(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Guard:
    """Around all endpoints: asks for the token, and counts and times every request."""

    def __init__(self, app: ASGIApp, *, token: str | None, metrics: Metrics, paths: list[str]):
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._secret = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), _CLIENT_LEFT

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        app = self._app if self._may_ask(scope) else _unauthorized()
        try:
            await app(scope, receive, send_and_note)
        except Exception:
            if status == _CLIENT_LEFT:  # else it is answered and logged; Starlette raises it again all the same
                raise
        finally:
            endpoint = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.seconds.labels(endpoint).observe(time.monotonic() - start)

    def _may_ask(self, scope: Scope) -> bool:
        if self._secret is None or scope["path"] in _OPEN_PATHS:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._secret)


# --- Pieces ----------------------------------------------------------------------------------------------------------


def _check_content(request: Request) -> None:
    """Only JSON by name: a web page in a browser cannot send that to another origin without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "content_type", "the Content-Type header must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(415, "content_encoding", "the Content-Encoding header: compressed bodies are not taken")


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The body. One that is too large is read on for a while, so that its sender gets to read the reply."""
    chunks: list[bytes] = []

    async def read() -> int:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limits.max_body_bytes:
                chunks.append(chunk)
            elif size > _DRAINED_BODIES * limits.max_body_bytes:
                break
        return size

    too_large = RequestError(413, "body_too_large", f"the body is larger than {limits.max_body_bytes} bytes; split it")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > _DRAINED_BODIES * limits.max_body_bytes:
        raise too_large
    try:
        size = await asyncio.wait_for(read(), timeout=limits.body_seconds)
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} s"
        raise RequestError(408, "body_timeout", message) from None
    if size > limits.max_body_bytes:
        raise too_large
    return b"".join(chunks)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _error(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body may still be coming
    return Response(
        orjson.dumps(error.body()), status_code=error.status, headers=headers, media_type="application/json"
    )


def _unauthorized() -> Response:
    message = "this server asks for a token: send the header Authorization: Bearer TOKEN"
    return _error(RequestError(401, "unauthorized", message), {"www-authenticate": "Bearer"})


async def _http_error(_: Request, error: HTTPException) -> Response:
    known = {404: ("unknown_path", "no such endpoint"), 405: ("method", "the method does not fit this endpoint")}
    kind, message = known.get(error.status_code, ("http", str(error.detail)))
    return _error(RequestError(error.status_code, kind, f"{message}; see docs/serving.md"), dict(error.headers or {}))
