"""An OpenAI-compatible server that is asked for trajectories: limits, retries, and when to give up.

Unlike rewards, trajectories are drawn and paid for, so a finished request is never sent again, and one that may have
been answered is repeated only where no answer came.
"""

import asyncio
import itertools
import random
import ssl
import time
from collections.abc import Sequence
from typing import Any

import httpx
import orjson

from megatron_polar.errors import UserError, printable
from megatron_polar.policies.answers import Answer, Ask, NoAnswer
from megatron_polar.policies.remote import HttpSpec, read_key
from megatron_polar.retry_after import may_pass, retry_after

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_ENDING_STATUSES = {
    401: "check the key and api_key_env",
    402: "check the account",
    403: "check what the key may do",
    404: "check endpoint, model and api",
    405: "check endpoint and api",
}
"""What no request at this endpoint would get past, and the remedy."""
_MAX_PAUSE_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 900.0  # that a server may ask for
_CONNECT_SECONDS, _LOOK_SECONDS, _LOOKS = 10.0, 10.0, 3
_MOST_THROTTLED, _MOST_THROTTLED_SECONDS = 100, 3600.0
"""A request is given up after so many answers 429 in a row and so long: a quota of a minute or of many asks is waited
out, one of a day is not."""


class _Passing(Exception):
    """A failure that may be gone next time."""


class _NoConnection(_Passing):
    """Nobody was there to answer, so that it cannot be the request's own fault."""


class _Throttled(_Passing):
    """HTTP 429; `pause` is what the server asked for, in seconds."""

    def __init__(self, reason: str, *, pause: float | None):
        super().__init__(reason)
        self.pause = pause


class Endpoint:
    """Policies behind one base URL: they share its connections, its limits and its key.

    The first of `specs` gives what belongs to the endpoint. To be used in one event loop.
    """

    def __init__(self, specs: dict[int, HttpSpec], *, wrapper: str):
        self._specs, self._wrapper = specs, wrapper
        spec = next(iter(specs.values()))
        self.name, self.concurrency, self._interval = spec.endpoint, spec.max_concurrency, 0.0
        if spec.requests_per_minute:
            self._interval = 60.0 / spec.requests_per_minute
        self._key = read_key(spec)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # Parsed once, not for each request: 0.03 ms, and another 0.015 for headers that a client has already.
        self._pages = {path: httpx.URL(self.name + path) for path in (_COMPLETIONS, _CHAT)}
        # A client for each request that is under way: one for all looks through its connections at every request,
        # which with a hundred of them takes longer than all else.
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        timeout, encryption = httpx.Timeout(None, connect=_CONNECT_SECONDS), ssl.create_default_context()
        self._idle = [
            httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, verify=encryption)
            for _ in range(self.concurrency)
        ]
        self._random = random.Random()  # of pauses only
        self._next_start = self._wakes = self._last_answer = 0.0
        self._num_open = self._num_failing = 0  # requests; failing: those whose latest attempt did
        self._gave_up_alone = False

    async def close(self) -> None:
        for client in self._idle:
            await client.aclose()

    # --- health ------------------------------------------------------------------------------------------------------

    async def check(self, *, patience: float = 0.0) -> dict:
        """Ask the server what it serves, before the first request. UserError names the endpoint, why and the remedy.

        `patience`: seconds for which a server may still be starting, where a few looks in a row are not enough.
        """
        url, begun = f"{self.name}/v1/models", time.monotonic()
        for look in itertools.count():
            if look >= _LOOKS and time.monotonic() - begun >= patience:
                break
            if look:
                pause = min(1.0, self._first_backoff()) * 2 ** min(look, 16)
                await asyncio.sleep(min(pause, _LOOK_SECONDS))
            try:
                response = await asyncio.wait_for(self._idle[-1].get(url), _LOOK_SECONDS)
            except (TimeoutError, httpx.TimeoutException):
                reason, remedy = f"no reply within {_LOOK_SECONDS:.0f} s", "look at the server's log"
                continue
            except httpx.HTTPError as error:
                reason = f"no connection ({self._shown(str(error) or type(error).__name__)})"
                remedy = "start the server, or correct `endpoint` in the pool"
                continue
            reason, remedy = self._described(response), "look at the server's log"
            if response.status_code in (404, 405, 429):
                return {}  # a server without this page, or a busy one; the first request will tell
            if response.status_code in _ENDING_STATUSES:
                remedy = _ENDING_STATUSES[response.status_code]
                break
            if response.status_code == httpx.codes.OK:
                return self._check_models(response)
        raise UserError(f"{url}: {reason}, so {self._who()} cannot be asked; {remedy}")

    def _check_models(self, response: httpx.Response) -> dict:
        try:
            served = {entry["id"]: entry for entry in orjson.loads(response.content)["data"]}
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f"{self.name}/v1/models: answers, but not as an OpenAI-compatible server "
                f"({self._shown(response.text)}); correct `endpoint` in the pool"
            ) from None
        for spec in self._specs.values():
            if spec.model not in served:
                names = self._shown(", ".join(map(str, list(served)[:5])) + (", ..." if len(served) > 5 else ""))
                raise UserError(
                    f"{self.name}: does not serve model={spec.model!r} of policy {spec.name}, but {names}; "
                    "correct `model` in the pool or start the server with it"
                )
            room = served[spec.model].get("max_model_len")
            if isinstance(room, int) and spec.max_tokens >= room:
                raise UserError(
                    f"{self.name}: max_tokens={spec.max_tokens} of policy {spec.name} leaves no room for a prompt "
                    f"in the {room} tokens that the server allows {spec.model} (max_model_len); lower it, or raise that"
                )
        ours = {spec.model for spec in self._specs.values()}
        return {
            name: {k: v for k, v in served[name].items() if k in ("owned_by", "root", "max_model_len")} for name in ours
        }

    def _who(self) -> str:
        names = [spec.name for spec in self._specs.values()]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    # --- asking ------------------------------------------------------------------------------------------------------

    async def answer(self, ask: Ask) -> Answer:
        """Ask until there is an answer. Raises NoAnswer, and UserError when the endpoint answers to nobody any more."""
        self._num_open += 1
        try:
            return await self._answer(ask)
        finally:
            self._num_open -= 1

    async def _answer(self, ask: Ask) -> Answer:
        spec = self._specs[ask.place.policy]
        path, body = request_body(spec, ask, wrapper=self._wrapper)
        content, attempts, throttled, failing_since = orjson.dumps(body), 0, 0, None
        try:
            while True:
                await self._take_turn()
                attempts += 1
                try:
                    answer = await self._attempt(spec, path, content, attempts=attempts)
                    self._last_answer, self._gave_up_alone = time.monotonic(), False
                    return answer
                except _Passing as error:
                    if failing_since is None:
                        failing_since, self._num_failing = time.monotonic(), self._num_failing + 1
                    failure: _Passing = error
                if isinstance(failure, _Throttled):
                    attempts, throttled = attempts - 1, throttled + 1
                    ours = self._backoff(spec, throttled)
                    pause = ours if failure.pause is None else max(failure.pause, spec.backoff_seconds)
                    self._wakes = max(self._wakes, time.monotonic() + min(pause, _LONGEST_PAUSE_SECONDS))
                elif attempts <= spec.retries:
                    await asyncio.sleep(self._backoff(spec, attempts))
                seconds = time.monotonic() - failing_since
                is_locked_out = throttled > _MOST_THROTTLED and seconds > _MOST_THROTTLED_SECONDS
                if attempts > spec.retries or is_locked_out:
                    await self._blame(failure, failing_since=failing_since, retries=spec.retries)
                    raise NoAnswer(str(failure), attempts=attempts + throttled)
        finally:
            self._num_failing -= failing_since is not None

    async def _blame(self, failure: _Passing, *, failing_since: float, retries: int) -> None:
        """A request is to be given up: return where it is to blame itself, raise UserError where the endpoint is."""
        if not await self._is_this_request(failure, failing_since=failing_since):
            raise UserError(
                f"{self.name}: nothing was answered for {time.monotonic() - failing_since:.0f} s and {retries} "
                f"retries, at last {failure}; look at the server, then start the same command again: finished "
                "requests are kept"
            )

    async def _is_this_request(self, failure: _Passing, *, failing_since: float) -> bool:
        """A request is to blame itself where others were answered since it began to fail, or where the server is there
        and others wait for it without failing. One that is alone is, too, if the one before it was answered: two such
        requests in a row are a server that answers nobody."""
        others_were_answered = self._last_answer >= failing_since
        if others_were_answered and not isinstance(failure, _NoConnection):
            return True
        others_wait = self._num_open > self._num_failing
        is_alone = self._num_open == 1 and not self._gave_up_alone
        if not (others_were_answered or others_wait or is_alone):
            return False
        try:
            await self.check()
        except UserError:
            return False
        self._gave_up_alone = self._num_open == 1 and not others_were_answered
        return True

    async def _take_turn(self) -> None:
        """Wait until the rate limit and the server's own wish allow a request."""
        while True:
            now = time.monotonic()
            if self._wakes > now:
                await asyncio.sleep((self._wakes - now) * self._random.uniform(1.0, 1.1))
                continue
            start = max(now, self._next_start)
            self._next_start = start + self._interval
            if start > now:
                await asyncio.sleep(start - now)
            if self._wakes <= time.monotonic():  # others may have been told to wait meanwhile
                return

    async def _attempt(self, spec: HttpSpec, path: str, content: bytes, *, attempts: int) -> Answer:
        started, client = time.monotonic(), self._idle.pop()
        try:
            post = client.post(self._pages[path], content=content)
            # httpx's own limits are per read; a reply that trickles in would outlast them.
            response = await asyncio.wait_for(post, spec.timeout_seconds)
        except (TimeoutError, httpx.TimeoutException):
            raise _Passing(f"no reply within {spec.timeout_seconds:.3g} s") from None
        except httpx.HTTPError as error:
            raise _NoConnection(f"no connection ({self._shown(str(error) or type(error).__name__)})") from None
        finally:
            self._idle.append(client)
        status = response.status_code
        if status == httpx.codes.TOO_MANY_REQUESTS:
            raise _Throttled(self._described(response), pause=retry_after(response.headers))
        if status == httpx.codes.CONFLICT or may_pass(status):
            raise _Passing(self._described(response))
        is_one_prompt = status == httpx.codes.FORBIDDEN and self._last_answer  # a filter, where others got through
        if status in _ENDING_STATUSES and not is_one_prompt:
            raise UserError(
                f"{self.name}{path}: {self._described(response)} to a request of policy {spec.name}; "
                f"{_ENDING_STATUSES[status]}, then start the same command again: finished requests are kept"
            )
        if status != httpx.codes.OK:
            raise NoAnswer(self._described(response), attempts=attempts)
        try:
            reply = orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise _Passing(f"a reply that is not JSON: {self._shown(response.text)}") from None
        return read_reply(reply, attempts=attempts, seconds=time.monotonic() - started)

    def _backoff(self, spec: HttpSpec, failures: int) -> float:
        longest = min(_MAX_PAUSE_SECONDS, spec.backoff_seconds * 2 ** min(failures - 1, 16))
        return longest * self._random.uniform(0.5, 1.0)

    def _first_backoff(self) -> float:
        return next(iter(self._specs.values())).backoff_seconds

    def _described(self, response: httpx.Response) -> str:
        said = self._shown(response.text)
        return f"HTTP {response.status_code} {response.reason_phrase}" + (f": {said}" if said else "")

    def _shown(self, text: str) -> str:
        """The head of a text; a server that repeats our headers must not get the key into a log or a journal."""
        return printable(text.replace(self._key, "***") if self._key else text, limit=200)


def request_body(spec: HttpSpec, ask: Ask, *, wrapper: str) -> tuple[str, dict[str, Any]]:
    """The path and the JSON of one request: a prefix to continue, or messages to answer."""
    body: dict[str, Any] = {"model": spec.model, "temperature": spec.temperature, "top_p": spec.top_p}
    body |= {"max_tokens": spec.max_tokens, "seed": ask.seed}
    if spec.top_k:
        body["top_k"] = spec.top_k
    body |= spec.extra
    if spec.api == "completions":
        return _COMPLETIONS, {**body, "prompt": ask.prompt.text + "\n" * (wrapper == "sft")}
    messages: Sequence[tuple[str, str]] = ask.prompt.messages or (("user", ask.prompt.text),)
    return _CHAT, {**body, "messages": [{"role": r, "content": text} for r, text in messages]}


def read_reply(reply: Any, *, attempts: int, seconds: float) -> Answer:
    """Take the text out of a reply. Raises NoAnswer for refusals and empty texts, _Passing for what is no reply."""
    try:
        choice = reply["choices"][0]
        message = choice.get("message") or {}
        text, ending = (message["content"] if message else choice["text"]), choice.get("finish_reason")
        refusal = message.get("refusal")
        tokens = (reply.get("usage") or {}).get("completion_tokens") or 0
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _Passing("a reply without choices, or with one that has no text") from None
    if refusal or ending == "content_filter":
        raise NoAnswer("refused by the model or its filter", attempts=attempts)
    if text is not None and not isinstance(text, str):
        raise _Passing("a reply whose text is none")
    if not (text or "").strip():
        thought = message.get("reasoning_content") or message.get("reasoning")
        raise NoAnswer("reasoning, and no answer behind it" if thought else "an empty answer", attempts=attempts)
    if "\0" in text:
        raise NoAnswer("an answer with a NUL character", attempts=attempts)
    tokens = tokens if isinstance(tokens, int) else 0
    ending = "length" if ending == "length" else "stop"
    return Answer(text, ending, attempts=attempts, seconds=seconds, tokens=tokens)
