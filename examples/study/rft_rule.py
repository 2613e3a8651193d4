"""The rule itself as a reward, behind the address of a reward server: what GRPO could reach with a perfect reward.

It answers POST /v1/score as `megatron-polar serve` does, so that GRPO cannot tell it from a reward model.
"""

import torch
import uvicorn
from rft_problems import final_number
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


def rule_reward(reference: str, output: str) -> float:
    """1 where an answer ends with the same number as its reference, which is right, else 0."""
    number = final_number(output)
    return float(number is not None and number == final_number(reference))


async def _score(request: Request) -> JSONResponse:
    items = (await request.json())["items"]
    rewards = [[rule_reward(item["reference"], output) for output in item["outputs"]] for item in items]
    return JSONResponse({"rewards": rewards, "truncated": [[False] * len(row) for row in rewards]})


async def _ready(_: Request) -> JSONResponse:
    return JSONResponse({"status": "ready"})


def serve_rule(port: int) -> None:
    """Serve until SIGTERM."""
    torch.set_num_threads(1)
    pages = Starlette(routes=[Route("/ready", _ready), Route("/v1/score", _score, methods=["POST"])])
    uvicorn.run(pages, host="127.0.0.1", port=port, log_level="warning", timeout_keep_alive=600)
