"""POST to one of several equal servers, again and again until one gives a usable answer or the time is up.

Rewards are a pure function of what is sent, so asking twice does no harm.
"""

import asyncio
import atexit
import contextlib
import json
import os
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from megatron_polar.errors import UserError, printable
from megatron_polar.retry_after import may_pass, retry_after
from megatron_polar.serve.wire import BadReply

Answer = TypeVar("Answer")

_MAX_PAUSE_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
_LOOK_SECONDS, _MOST_LOOKS = 5.0, 3


class Refused(Exception):
    """An answer that asking again would not change: `status` is HTTP's."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Unanswered(Exception):
    """No usable answer before the retries or the time were used up; `position` as in BadReply."""

    def __init__(self, reason: str, *, position: int | None = None):
        super().__init__(reason)
        self.position = position


class _Passing(Exception):
    """A failure that may be gone next time, or on another server; `pause` is what the server asked for, in seconds.
    `is_loading`: the server says that it will answer when its model is loaded."""

    def __init__(
        self, reason: str, *, pause: float | None = None, position: int | None = None, is_loading: bool = False
    ):
        super().__init__(reason)
        self.pause, self.position, self.is_loading = pause, position, is_loading


class _TooLate(Exception):
    """The deadline came first, which says nothing of any server."""


@dataclass
class _Server:
    """One base URL; it is left alone until `wakes` (monotonic seconds) after `strikes` failures in a row. `is_known`:
    it has said what it serves, or will not, after so many `looks` without a reply, the last of them until `looked`."""

    url: str
    is_known: bool = False
    looks: int = 0
    looked: float = 0.0
    wakes: float = 0.0
    strikes: int = 0


class Transport:
    """Sends bodies to `urls` in turn, at most `max_concurrency` at a time whichever threads they come from.

    A failed server rests, twice as long after each failure in a row and as long as its Retry-After says; a server that
    rests is asked only where all of them do. One that loads its model is waited for, whatever the retries. `token` goes
    into the Authorization header and nowhere else. `inspect` is given a server's URL and its reply to GET /v1/models
    before its first request, and may raise UserError.
    """

    def __init__(
        self,
        urls: tuple[str, ...],
        *,
        token: str | None,
        timeout_seconds: float,
        retries: int,
        backoff_seconds: float,
        max_concurrency: int,
        inspect: Callable[[str, Any], None] | None = None,
    ):
        self._inspect = inspect
        self._servers = [_Server(_checked_url(url)) for url in urls]
        self._token, self._timeout, self._retries = token, timeout_seconds, retries
        self._backoff, self._max_concurrency = backoff_seconds, max_concurrency
        self._random = random.Random()  # not the global one: a training run's draws must not depend on our retries
        self._turn = 0
        self._start = threading.Lock()
        self._session: _Session | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Answer]) -> "Future[Answer]":
        """Run a coroutine on the thread that all requests of this client share."""
        with self._start:
            if self._session is None or self._session.pid != os.getpid():  # a fork has no threads but its own
                self._session = _Session(self._open_http, max_concurrency=self._max_concurrency)
                weakref.finalize(self, self._session.close).atexit = False  # at exit the session ends itself
            return asyncio.run_coroutine_threadsafe(coroutine, self._session.loop)

    def close(self) -> None:
        """Close connections and end the thread; the next `submit` starts anew."""
        with self._start:
            if self._session is not None:
                self._session.close()
                self._session.join()
            self._session = None

    async def ask(self, path: str, body: bytes, *, read: Callable[[Any], Answer], deadline: float) -> Answer:
        """POST a JSON body and return `read(decoded reply)`; a BadReply that it raises counts as a failure.

        `deadline` is in seconds of time.monotonic(). Raises Refused or Unanswered, and what `inspect` raises. To be
        called through `submit`.
        """
        session = self._session
        assert session is not None, "ask() runs on the thread that submit() started"
        started, attempts, too_early, failure = time.monotonic(), 0, 0, None
        place = here = path
        while attempts - too_early <= self._retries:
            try:
                async with self._slot(session, deadline):
                    server = self._choose()  # with the slot in hand: what was learnt while waiting for it counts
                    pause = max(0.0, server.wakes - time.monotonic()) * self._random.uniform(1.0, 1.25)
                    if not pause:
                        attempts, begun, here = attempts + 1, time.monotonic(), f"{server.url}{path}"
                        answer = await self._attempt(session, server, path, body, read=read, deadline=deadline)
                        server.strikes = 0
                        return answer
            except _Passing as error:
                failure, place = error, here
                too_early += error.is_loading
                self._let_rest(server, begun=begun, attempts=attempts - too_early, pause=error.pause)
                continue
            except _TooLate as error:
                if failure is None:
                    failure, place = _Passing(str(error)), here
                break
            if time.monotonic() + pause >= deadline:
                failure = failure or _Passing(f"every server asked to be left alone, for {pause:.0f} s or more")
                break
            await asyncio.sleep(pause)
        used = f"{attempts} attempt{'s' * (attempts != 1)} in {time.monotonic() - started:.1f} s"
        raise Unanswered(f"{place}: {failure} ({used})", position=failure.position)

    @contextlib.asynccontextmanager
    async def _slot(self, session: "_Session", deadline: float) -> AsyncIterator[None]:
        """Be one of the requests that may be under way at a time."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await session.slots.acquire()
        except TimeoutError:
            raise _TooLate(f"{self._max_concurrency} others (max_concurrency) were under way all the time") from None
        try:
            yield
        finally:
            session.slots.release()

    async def _attempt(
        self,
        session: "_Session",
        server: _Server,
        path: str,
        body: bytes,
        *,
        read: Callable[[Any], Answer],
        deadline: float,
    ) -> Answer:
        if self._inspect is not None and not server.is_known:
            await self._look_at(server, session, seconds=min(_LOOK_SECONDS, deadline - time.monotonic()))
        seconds = max(0.001, min(self._timeout, deadline - time.monotonic()))
        try:
            # httpx's own limits are per read; a reply that trickles in would outlast them.
            response = await asyncio.wait_for(session.http.post(server.url + path, content=body), seconds)
        except (TimeoutError, httpx.TimeoutException):
            reason = f"no reply within {seconds:.3g} s"
            raise (_Passing if seconds >= self._timeout else _TooLate)(reason) from None
        except httpx.HTTPError as error:
            what = str(error) or type(error).__name__
            raise _Passing(f"no connection ({self._printable(what)})") from None
        if may_pass(response.status_code):
            pause = retry_after(response.headers)
            raise _Passing(self._describe(response), pause=pause, is_loading=_is_loading(response))
        if response.status_code != httpx.codes.OK:
            raise Refused(response.status_code, f"{server.url}{path}: {self._describe(response)}")
        try:
            return read(response.json())
        except BadReply as error:
            raise _Passing(f"not usable: {error}", position=error.position) from None
        except (ValueError, RecursionError) as error:
            raise _Passing(f"not JSON ({self._printable(str(error))}): {self._printable(response.text)}") from None

    async def _look_at(self, server: _Server, session: "_Session", *, seconds: float) -> None:
        """Ask a server what it serves. Where it does not say, nothing is known against it; one that cannot be asked now
        is asked again next time."""
        begun = time.monotonic()
        try:
            response = await asyncio.wait_for(session.http.get(f"{server.url}/v1/models"), max(0.001, seconds))
        except httpx.HTTPError:
            return
        except TimeoutError:
            if server.looked <= begun:  # looks that were under way together count once
                server.looks, server.looked = server.looks + 1, time.monotonic()
            server.is_known = server.looks >= _MOST_LOOKS
            return
        if may_pass(response.status_code):
            return
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            if response.status_code == httpx.codes.OK:
                self._inspect(server.url, response.json())
        server.is_known = True

    def _choose(self) -> _Server:
        """The next server in turn that is awake, else the one that wakes first."""
        self._turn = (self._turn + 1) % len(self._servers)
        in_turn = self._servers[self._turn :] + self._servers[: self._turn]
        now = time.monotonic()
        return min(in_turn, key=lambda server: max(server.wakes, now))

    def _let_rest(self, server: _Server, *, begun: float, attempts: int, pause: float | None) -> None:
        if server.wakes <= begun:  # failures of requests that were under way together count once
            server.strikes += 1
        if pause is None:
            doublings = min(max(server.strikes, attempts) - 1, 16)
            pause = min(_MAX_PAUSE_SECONDS, self._backoff * 2**doublings) * self._random.uniform(0.5, 1.0)
        server.wakes = max(server.wakes, time.monotonic() + pause)

    def _open_http(self) -> httpx.AsyncClient:
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        limits = httpx.Limits(max_connections=self._max_concurrency, max_keepalive_connections=self._max_concurrency)
        timeout = httpx.Timeout(None, connect=min(self._timeout, _CONNECT_SECONDS))
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout)

    def _describe(self, response: httpx.Response) -> str:
        said = self._printable(response.text)
        return f"HTTP {response.status_code} {response.reason_phrase}" + (f": {said}" if said else "")

    def _printable(self, text: str) -> str:
        """The head of a text; a server that repeats our headers must not get the token into a log."""
        return printable(text.replace(self._token, "***") if self._token else text, limit=200)


class _Session:
    """An event loop on a daemon thread, and the connections and the limit that belong to it.

    The thread is waited for before the interpreter ends: one that is killed inside an import (httpcore looks for
    sniffio again and again) keeps the import lock, and the main thread then waits for it for ever.
    """

    def __init__(self, open_http: Callable[[], httpx.AsyncClient], *, max_concurrency: int):
        self.pid, self.loop, self._is_open = os.getpid(), asyncio.new_event_loop(), True
        self.http, self.slots = open_http(), asyncio.Semaphore(max_concurrency)
        self._thread = threading.Thread(target=self._run, name="reward client", daemon=True)
        atexit.register(self._end)
        self._thread.start()

    def _run(self) -> None:
        self.loop.run_forever()
        self.loop.close()
        atexit.unregister(self._end)

    def _end(self) -> None:
        self.close()
        self.join()

    def close(self) -> None:
        if self._is_open and self.pid == os.getpid():
            self._is_open = False
            asyncio.run_coroutine_threadsafe(self._shut_down(), self.loop)

    def join(self) -> None:
        """Wait for the thread to end, unless it is this one, or one that a fork has left behind."""
        if self.pid == os.getpid() and threading.current_thread() is not self._thread:
            self._thread.join(_CONNECT_SECONDS)

    async def _shut_down(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()  # whoever waits for one gets CancelledError instead of waiting for ever
        await asyncio.gather(*others, return_exceptions=True)
        await self.http.aclose()
        self.loop.stop()


def _is_loading(response: httpx.Response) -> bool:
    """Whether our own server says that its model is still being loaded."""
    try:
        return response.json()["error"]["type"] == "loading"
    except (ValueError, RecursionError, LookupError, TypeError):
        return False


def _checked_url(url: str) -> str:
    """Take a base URL without its last slash. Raises UserError for what is none, and for a password in it."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL()
    if parsed.userinfo:
        raise UserError(
            f"the URL of {parsed.host} has a user or password in it; put a token into a file or an environment "
            "variable (api_key_file, api_key_env)"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise UserError(f"url={url!r} is no base URL of a server; give one such as http://127.0.0.1:8000")
    return str(parsed).rstrip("/")
