"""What the server allows: every number with its default, its reason and its option of `megatron-polar serve`."""

import math
from dataclasses import dataclass, field, fields

from megatron_polar.errors import UserError


def _limit(default: float, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """Sizes, counts and seconds; a request beyond one of them is refused with the status that `help` names."""

    max_body_bytes: int = _limit(2_000_000, "bytes of a request's body (413)")
    max_items: int = _limit(256, "outputs or inputs to score in one request (422)")
    max_text_bytes: int = _limit(32_000_000, "bytes of a request's prompts, once for each reference and output (422)")
    max_queue: int = _limit(4096, "sequences that may wait to be scored, over all requests (429)")
    max_connections: int = _limit(900, "open connections (503)")
    head_seconds: float = _limit(10.0, "for a connection to send a whole request head, then it is closed")
    body_seconds: float = _limit(30.0, "for a request's body to arrive (408)")
    request_seconds: float = _limit(120.0, "from a complete body to the reply (504)")
    keep_alive_seconds: float = _limit(30.0, "that an idle connection stays open")
    batch_wait_ms: float = _limit(2.0, "milliseconds that an idle server waits for more requests to score together")
    max_batch_tokens: int = _limit(0, "tokens scored together; 0: the checkpoint's data.max_tokens_per_micro_batch")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            least = 0 if entry.name in ("batch_wait_ms", "max_batch_tokens") else 1 if entry.type is int else 0.001
            if not (math.isfinite(value) and value >= least):
                raise UserError(f"--{entry.name.replace('_', '-')} {value} must be {least} or more")
