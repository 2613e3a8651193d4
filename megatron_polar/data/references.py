"""Several references for one prompt: how a record gives them, and what becomes of their rewards.

POLAR's reward compares a candidate with one reference. With several the reward is the mean of the rewards against each
(the paper names several references as future work, appendix A). A reward against one reference is an unbounded score
whose noise comes from what that one answer happens to say; the mean lessens the noise and keeps the scale, which is
that of training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEYS = ("reference", "references")
"""Of a record: one text, or a list of them. A record has exactly one of the two."""


class BadReferences(ValueError):
    """What is wrong with the references of a record: the `key`, and the `reason` as the rest of a sentence about it."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key!r} {reason}")
        self.key, self.reason = key, reason


@dataclass(frozen=True)
class References:
    """Distinct texts in order of first appearance, at least one, and how many repetitions were dropped."""

    texts: tuple[str, ...]
    duplicates: int


def read_references(record: Mapping[str, Any], *, read_text: Callable[[Any, str], str]) -> References:
    """The references of a record that has `reference` or `references`; `read_text(value, key)` reads one text.

    Raises BadReferences for neither or both of the keys and for what is no list or an empty one, and whatever
    `read_text` raises.
    """
    if "references" not in record:
        if "reference" not in record:
            raise BadReferences("reference", 'is missing; give it, or "references": [...] where there are several')
        return References((read_text(record["reference"], "reference"),), duplicates=0)
    if "reference" in record:
        raise BadReferences("references", "is there beside 'reference'; give one of the two")
    values = record["references"]
    if not isinstance(values, list):
        raise BadReferences("references", "is not a list; give a list of texts, or one text as 'reference'")
    if not values:
        raise BadReferences("references", "is an empty list; give at least one reference")
    return distinct_references([read_text(value, f"references[{place}]") for place, value in enumerate(values)])


def distinct_references(texts: Sequence[str]) -> References:
    """A text given twice would weigh twice in the mean: the first of equals stays."""
    kept = tuple(dict.fromkeys(texts))
    return References(kept, duplicates=len(texts) - len(kept))


def split_references(value: Any) -> list | None:
    """The references of a value that stands where one reference may: its entries, or None where it is one itself.

    A list is several references, unless all its entries are objects: then it is a list of messages, one reference.
    """
    if not isinstance(value, list | tuple) or (value and all(isinstance(entry, Mapping) for entry in value)):
        return None
    return list(value)


def mean_over_references(rewards: Sequence[Sequence[float]]) -> list[float]:
    """Rewards [reference][output] → [output], in fp64."""
    return [sum(column) / len(column) for column in zip(*rewards, strict=True)]
