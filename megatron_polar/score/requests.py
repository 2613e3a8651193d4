"""What a scorer is asked: rewards of several outputs for one prompt, against one reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ScoreRequest:
    """Outputs to be scored for one prompt against one reference; the scorer shares what they have in common."""

    prompt: str
    reference: str
    outputs: tuple[str, ...]
    wrapper: str


class Scorer(Protocol):
    """Anything that rates outputs: a checkpoint here, or a function of the text in a test."""

    def score(self, requests: Sequence[ScoreRequest], /) -> list[list[float]]:
        """Return a list of rewards per request, in order, one reward per output; higher is closer to the reference."""
        ...
