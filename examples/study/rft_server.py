"""An OpenAI-compatible server (`/v1/completions`) for small local policies, on the CPU or a GPU.

rft_server.py NAME=DIRECTORY ... [--device cpu] [--port 8001]

Requests that wait are answered together, one batch of one model at a time: of a model with half a million parameters a
batch of 64 costs little more than a single answer. SIGTERM or Ctrl-C end it.
"""

import argparse
import asyncio
import contextlib
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from rft_policies import Draw, continue_prompts, load
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

LARGEST_BATCH = 128


@dataclass
class _Waiting:
    prompt: str
    seed: int
    answer: asyncio.Future


class Policies:
    """Models by name, and what waits for each of them and for each way of drawing."""

    def __init__(self, directories: dict[str, Path], *, device: str):
        self._models = {name: load(path, device=device) for name, path in directories.items()}
        for model, _ in self._models.values():
            model.eval()
        self._queues: dict[tuple[str, Draw], list[_Waiting]] = defaultdict(list)
        self._wake = asyncio.Event()

    @property
    def names(self) -> list[str]:
        return list(self._models)

    async def complete(self, name: str, prompt: str, draw: Draw, *, seed: int) -> tuple[str, bool]:
        """A continuation, and whether it ended by itself."""
        waiting = _Waiting(prompt, seed, asyncio.get_running_loop().create_future())
        self._queues[name, draw].append(waiting)
        self._wake.set()
        return await waiting.answer

    async def work(self) -> None:
        """Answer the longest queue, again and again."""
        while True:
            await self._wake.wait()
            key = max(self._queues, key=lambda key: len(self._queues[key]), default=None)
            if key is None or not self._queues[key]:
                self._wake.clear()
                continue
            batch, self._queues[key] = self._queues[key][:LARGEST_BATCH], self._queues[key][LARGEST_BATCH:]
            await self._answer(batch, *key)

    async def _answer(self, batch: list[_Waiting], name: str, draw: Draw) -> None:
        prompts, seeds = [one.prompt for one in batch], [one.seed for one in batch]
        try:
            found = await asyncio.to_thread(continue_prompts, *self._models[name], prompts, draw, seeds=seeds)
        except Exception as error:  # whoever asked is told, and the others are still answered
            for one in batch:
                one.answer.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
            return
        for one, answer in zip(batch, found, strict=True):
            if not one.answer.done():
                one.answer.set_result(answer)


def application(policies: Policies) -> Starlette:
    """The two pages that `sample` asks for."""

    async def list_models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": name} for name in policies.names]})

    async def complete(request: Request) -> JSONResponse:
        body = await request.json()
        if body.get("model") not in policies.names:
            return JSONResponse({"error": f"no model {body.get('model')!r}"}, 404)
        try:
            draw = Draw(
                max_tokens=int(body.get("max_tokens", 16)),
                temperature=float(body.get("temperature", 1.0)),
                top_p=float(body.get("top_p", 1.0)),
                top_k=int(body.get("top_k", 0)),
            )
            prompt, seed = str(body["prompt"]), int(body.get("seed", 0))
        except (KeyError, TypeError, ValueError) as error:
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 400)
        text, ended = await policies.complete(body["model"], prompt, draw, seed=seed)
        choice = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length"}
        return JSONResponse({"choices": [choice], "usage": {"completion_tokens": len(text.split())}})

    @contextlib.asynccontextmanager
    async def working(_: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(policies.work())
        yield
        worker.cancel()

    routes = [Route("/v1/models", list_models), Route("/v1/completions", complete, methods=["POST"])]
    return Starlette(routes=routes, lifespan=working)


def serve(directories: dict[str, Path], *, device: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    torch.set_num_threads(1)
    pages = application(Policies(directories, device=device))
    uvicorn.run(pages, host="127.0.0.1", port=port, log_level="warning", timeout_keep_alive=600)


def main() -> None:
    """Serve the policies that are named on the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("policies", nargs="+", metavar="NAME=DIRECTORY")
    options.add_argument("--device", default="cpu")
    options.add_argument("--port", type=int, default=8001)
    given = options.parse_args()
    named = [policy.partition("=") for policy in given.policies]
    if not all(name and path for name, _, path in named):
        sys.exit("error: policies are given as NAME=DIRECTORY")
    serve({name: Path(path) for name, _, path in named}, device=given.device, port=given.port)


if __name__ == "__main__":
    main()
