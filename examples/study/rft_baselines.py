"""Rewards that nobody has learnt, behind the address of a reward server, so that GRPO cannot tell them from a model.

The rule that judges says what GRPO could reach with a perfect reward; counting the words that an answer shares with its
reference says what it reaches without any model. Both answer POST /v1/score as `megatron-polar serve` does.
"""

from collections.abc import Callable

import torch
import uvicorn
from rft_problems import final_number
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from megatron_polar.score.statistics import shared_words


def rule_reward(reference: str, output: str) -> float:
    """1 where an answer ends with the same number as its reference, which is right, else 0."""
    number = final_number(output)
    return float(number is not None and number == final_number(reference))


UNLEARNT: dict[str, Callable[[str, str], float]] = {"rule": rule_reward, "words": shared_words}
"""By name: the reward of (reference, answer)."""


def serve_unlearnt(name: str, port: int) -> None:
    """Serve one of `UNLEARNT` until SIGTERM."""
    reward_of = UNLEARNT[name]

    async def score(request: Request) -> JSONResponse:
        items = (await request.json())["items"]
        rewards = [[reward_of(item["reference"], output) for output in item["outputs"]] for item in items]
        return JSONResponse({"rewards": rewards, "truncated": [[False] * len(row) for row in rewards]})

    async def ready(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ready"})

    torch.set_num_threads(1)
    pages = Starlette(routes=[Route("/ready", ready), Route("/v1/score", score, methods=["POST"])])
    uvicorn.run(pages, host="127.0.0.1", port=port, log_level="warning", timeout_keep_alive=600)
