"""An OpenAI-compatible server on a real socket that answers by rote, counts what it answers, and fails as it is told.

Run as a program it prints its port and serves until its standard input closes.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def answer_of(model: str, prompt: str, seed: int) -> str:
    """What a model says to a prompt: the same text whenever it is asked again with the same seed."""
    draw = random.Random(hashlib.sha256(f"{model}|{prompt}|{seed}".encode()).digest())
    return " " + " ".join("".join(draw.choices(LETTERS, k=4)) for _ in range(draw.randint(12, 30))) + "."


class Server:
    """State behind the pages. `behaviour` may be changed from outside by POST /behaviour.

    fail: share of requests that fail with one of `kinds` (a status, "hang_up", "half", "not_json", "no_choices");
    delay: seconds; limit: requests under way at once before 429; refuse: a word in the prompt that gives 400; special
    words in a prompt: see `special`.
    """

    def __init__(self, models: list[str]):
        self.models = models
        self.behaviour = {"fail": 0.0, "kinds": [500], "delay": 0.0, "limit": 0, "key": "", "retry_after": ""}
        self.fresh()

    def fresh(self) -> None:
        self.answered: dict[str, int] = {}
        self.seen = self.failed = self.under_way = self.most_at_once = 0
        self.times: list[float] = []
        self.bodies: list[dict] = []
        self.random = random.Random(7)

    async def ask(self, request: Request) -> Response:
        body = await request.json()
        self.seen += 1
        self.times.append(asyncio.get_running_loop().time())
        if len(self.bodies) < 50:
            self.bodies.append(body)
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            return await self.reply(request, body)
        finally:
            self.under_way -= 1

    async def reply(self, request: Request, body: dict) -> Response:
        told = self.behaviour
        if told["key"] and request.headers.get("authorization") != f"Bearer {told['key']}":
            return JSONResponse({"error": f"bad key {request.headers.get('authorization')}"}, 401)
        if told["limit"] and self.under_way > told["limit"]:
            headers = {"retry-after": told["retry_after"]} if told["retry_after"] else {}
            return JSONResponse({"error": "slow down"}, 429, headers=headers)
        if told["delay"]:
            await asyncio.sleep(told["delay"])
        if self.random.random() < told["fail"]:
            self.failed += 1
            return self.failure(self.random.choice(told["kinds"]), request)
        is_chat = "messages" in body
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        special = self.special(prompt, is_chat)
        if isinstance(special, Response):
            return special
        text, ending = special or (answer_of(body["model"], prompt, body.get("seed", 0)), "stop")
        key = json.dumps([body["model"], prompt, body.get("seed")])
        self.answered[key] = self.answered.get(key, 0) + 1
        given = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        choice = {"index": 0, "finish_reason": ending, **given}
        return JSONResponse({"choices": [choice], "usage": {"completion_tokens": len(text.split())}})

    def special(self, prompt: str, is_chat: bool) -> Response | tuple[str, str] | None:
        """Prompts with these words are answered otherwise than by rote."""
        if "POISON" in prompt:
            return JSONResponse({"error": {"message": "this prompt is\nnot acceptable"}}, 400)
        if "BROKEN" in prompt:
            return JSONResponse({"error": "out of memory"}, 500)
        if "EMPTY" in prompt:
            return "  ", "stop"
        if "FILTER" in prompt:
            return "I should not", "content_filter"
        if "LOOP" in prompt:
            return " so it begins " + "again and again " * 60, "length"
        if "LONG" in prompt:
            return " One sentence. Another " + str(self.seen), "length"
        if "SAME" in prompt:
            return " always the very same answer", "stop"
        return None

    def failure(self, kind, request: Request) -> Response:
        if isinstance(kind, int):  # some proxies repeat the headers, keys among them
            return JSONResponse({"error": "injected", "you": request.headers.get("authorization")}, kind)
        if kind == "hang_up":
            return _HangUp()
        if kind == "half":
            return _HangUp(b'{"choices": [{"te')
        return Response(
            b"<html>oops" if kind == "not_json" else b'{"object": "text_completion"}', media_type="application/json"
        )

    async def list_models(self, request: Request) -> Response:
        if self.behaviour["key"] and request.headers.get("authorization") != f"Bearer {self.behaviour['key']}":
            return JSONResponse({"error": f"bad key {request.headers.get('authorization')}"}, 401)
        return JSONResponse({"object": "list", "data": [{"id": name, "owned_by": "tests"} for name in self.models]})

    async def behave(self, request: Request) -> Response:
        self.behaviour.update(await request.json())
        return JSONResponse({})

    async def forget(self, request: Request) -> Response:
        self.fresh()
        return JSONResponse({})

    async def counts(self, request: Request) -> Response:
        names = ("answered", "seen", "failed", "most_at_once", "times", "bodies")
        return JSONResponse({name: getattr(self, name) for name in names})

    def application(self) -> Starlette:
        routes = [Route(f"/v1{path}", self.ask, methods=["POST"]) for path in ("/completions", "/chat/completions")]
        routes += [Route("/v1/models", self.list_models), Route("/counts", self.counts)]
        routes += [Route("/behaviour", self.behave, methods=["POST"]), Route("/forget", self.forget, methods=["POST"])]
        return Starlette(routes=routes)


class _HangUp(Response):
    """Promises more than it sends, then closes the connection."""

    def __init__(self, head: bytes = b""):
        super().__init__()
        self.head = head

    async def __call__(self, scope, receive, send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"500")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.head, "more_body": True})
        raise ConnectionResetError("on purpose")


# --- from outside ----------------------------------------------------------------------------------------------------


class Remote:
    """A running server, as tests see it."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self._http = httpx.Client(base_url=self.url, trust_env=False, timeout=60)

    def behave(self, **behaviour) -> None:
        self._http.post("/behaviour", json=behaviour).raise_for_status()

    def forget(self) -> None:
        self._http.post("/forget").raise_for_status()
        self.behave(fail=0.0, kinds=[500], delay=0.0, limit=0, key="", retry_after="")

    def counts(self) -> dict:
        return self._http.get("/counts").json()


@contextlib.contextmanager
def running(*models: str) -> Iterator[Remote]:
    """A server in a process of its own, ended with the block."""
    command = [sys.executable, str(Path(__file__).resolve()), *models]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Remote(int(process.stdout.readline()))
        finally:
            process.kill()


async def _serve(models: list[str]) -> None:
    config = uvicorn.Config(
        Server(models).application(), host="127.0.0.1", port=0, log_level="critical", timeout_keep_alive=600
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    asyncio.run(_serve(parser.parse_args().models))
