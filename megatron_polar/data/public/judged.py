"""What readers of test sets yield where an input line of `records.py` is too narrow: several best answers, or none."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple


class Answer(NamedTuple):
    """An answer and what it is from: a model, or a style in RM-Bench; "" where that is not published."""

    model: str
    text: str


@dataclass(frozen=True)
class JudgedAnswers:
    """Answers to one prompt in a known order, and further answers to it that can be references.

    `levels[i]` is the rank of `answers[i]`, 0 the best. `best` are answers known to be above all of `answers`,
    `others` further ones whose order is not known; neither holds one of `answers`.
    """

    identifier: str
    prompt: str
    answers: tuple[Answer, ...]
    levels: tuple[int, ...]
    category: str
    best: tuple[Answer, ...] = ()
    others: tuple[Answer, ...] = ()


def unique_identifiers(items: Iterable[JudgedAnswers]) -> Iterator[JudgedAnswers]:
    """Number the later ones of equal identifiers: a publisher's ids may repeat."""
    seen: dict[str, int] = {}
    for item in items:
        count = seen[item.identifier] = seen.get(item.identifier, 0) + 1
        yield item if count == 1 else replace(item, identifier=f"{item.identifier}~{count}")
