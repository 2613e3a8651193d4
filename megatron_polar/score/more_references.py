"""Where the further references of a test set come from (docs/evaluation.md, "Several references")."""

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_polar import log
from megatron_polar.errors import UserError

if TYPE_CHECKING:
    from megatron_polar.score.suites import EvaluationItem


def further_trajectories(texts: Sequence[str], *, used: Collection[str], seed: int, name: str) -> tuple[str, ...]:
    """The other trajectories of the reference's policy, in a seeded order: neither the first reference nor a candidate,
    and no text twice. `name` is the item's identifier."""
    draw = random.Random(f"{seed}\0{name}\0references")
    return tuple(sorted((text for text in dict.fromkeys(texts) if text not in used), key=lambda _: draw.random()))


def with_references(items: Sequence["EvaluationItem"], count: int) -> list["EvaluationItem"]:
    """The items with exactly their first `count` references each."""
    return [replace(item, more_references=item.more_references[: count - 1]) for item in items]


def items_with_references(items: Sequence["EvaluationItem"], count: int, *, suite: str) -> list["EvaluationItem"]:
    """The items that have `count` references, with as many; says how many have fewer. Raises UserError for none."""
    if count < 1:
        raise UserError(f"--references {count} leaves nothing to compare with; give 1 or more")
    found = [item for item in items if len(item.more_references) >= count - 1]
    if not found:
        most = max((1 + len(item.more_references) for item in items), default=0)
        raise UserError(
            f"suite {suite}: no item has {count} references, the most is {most}; ask for fewer, or give data with more "
            "(docs/evaluation.md, Several references)"
        )
    if len(found) < len(items):
        left_out = len(items) - len(found)
        log.info(f"suite {suite}: left out {left_out} of {len(items)} items, which have fewer than {count} references")
    return with_references(found, count)
