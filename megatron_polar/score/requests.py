"""What a scorer is asked, and what is no answer: rewards of several outputs for one prompt, against one reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_polar.errors import UserError


@dataclass(frozen=True)
class ScoreRequest:
    """Outputs to be scored for one prompt against one reference; the scorer shares what they have in common."""

    prompt: str
    reference: str
    outputs: tuple[str, ...]
    wrapper: str


def for_references(
    prompt: str, references: Sequence[str], outputs: Sequence[str], *, wrapper: str
) -> tuple[ScoreRequest, ...]:
    """A request for each reference. The reward of an output is the mean of its rewards over all of them
    (`data.references.mean_over_references`)."""
    return tuple(ScoreRequest(prompt, reference, tuple(outputs), wrapper) for reference in references)


class Scorer(Protocol):
    """Anything that rates outputs: a checkpoint here, or a function of the text in a test."""

    def score(self, requests: Sequence[ScoreRequest], /) -> list[list[float]]:
        """Return a list of rewards per request, in order, one reward per output; higher is closer to the reference."""
        ...


def outputs_cut(scorer: Scorer) -> int:
    """Outputs that a scorer has cut to its model's length so far, once for each reference that it was scored against; 0
    for one that cuts nothing."""
    return getattr(scorer, "outputs_cut", 0)


def check_finite(rewards: Sequence[float], *, where: str) -> None:
    """Raise UserError for rewards that are NaN or infinite, which JSON would write as null."""
    if not all(map(math.isfinite, rewards)):
        raise UserError(
            f"{where}: rewards {list(rewards)} are not finite; the checkpoint holds NaN or infinity, or its precision "
            "overflows: take an earlier step, or fp32"
        )
