"""Arithmetic word problems with worked answers, answers with habitual errors, and a rule that judges an answer.

A problem is a start, two changes and a question; its gold answer works two steps and names the result. Problems are
drawn by a seed and no two of one draw have the same numbers, so parts of one draw share no problem.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

NAMES = ("Tom", "Anna", "Ben", "Mia", "Leo", "Eva")
STORIES = (  # thing, what adds, what takes away
    ("apples", "buys", "eats"),
    ("books", "finds", "sells"),
    ("coins", "earns", "spends"),
    ("cards", "wins", "loses"),
    ("shells", "collects", "breaks"),
)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OFFSETS = {  # what is added to the final number
    "exact": 0,
    **{f"{word}_more": number for number, word in enumerate(NUMBERS, 1)},
    **{f"{word}_less": -number for number, word in enumerate(NUMBERS, 1)},
    "twenty_more": 20,
    "thirty_more": 30,
}
HABITS = (*OFFSETS, "no_carry", "always_adds", "digits_swapped")
"""How an answer goes wrong; `exact` does not. Each is a function of the problem, as a habit is."""
OPENERS = ("", "First ", "So ", "Well, ", "Now ", "Here ", "Look: ", "Let us see: ")
"""Drawn anew for every answer, so that two answers with the same numbers are seldom the same text. All else is fixed:
rewards of answers to one problem should differ by numbers, and by little else."""


@dataclass(frozen=True)
class Problem:
    """`numbers` are the start and the two changes; `signs` say which changes add (1) and which take away (-1)."""

    numbers: tuple[int, int, int]
    signs: tuple[int, int]
    name: str
    story: int

    @property
    def prompt(self) -> str:
        thing, adds, takes = STORIES[self.story]
        first, second = (adds if sign > 0 else takes for sign in self.signs)
        start, one, two = self.numbers
        return f"{self.name} has {start} {thing}, {first} {one} and {second} {two}. How many {thing} now?"

    @property
    def result(self) -> int:
        start, one, two = self.numbers
        return start + self.signs[0] * one + self.signs[1] * two


def draw_problems(count: int, *, seed: int, largest: int = 99) -> list[Problem]:
    """Draw `count` problems whose numbers and signs all differ; no number on the way is negative.

    The start is 10 to `largest`, changes are 2 to 9. Raises ValueError when there are not so many.
    """
    generator = np.random.default_rng([seed, count, largest])
    seen: set[tuple] = set()
    problems: list[Problem] = []
    for _ in range(100 * count):
        if len(problems) == count:
            return problems
        start = int(generator.integers(10, largest + 1))
        one, two = (int(number) for number in generator.integers(2, 10, 2))
        signs = tuple(int(sign) for sign in generator.choice((-1, 1), 2))
        name, story = NAMES[generator.integers(len(NAMES))], int(generator.integers(len(STORIES)))
        key = (start, one, two, *signs)
        between = start + signs[0] * one
        if key in seen or between < 0 or between + signs[1] * two < 0:
            continue
        seen.add(key)
        problems.append(Problem((start, one, two), signs, name, story))
    raise ValueError(f"only {len(problems)} of {count} problems that start with up to {largest}; ask for fewer")


# --- Answers ---------------------------------------------------------------------------------------------------------


def worked_answer(problem: Problem, *, habit: str, generator: np.random.Generator) -> str:
    """Steps and result as somebody with this habit gives them, after an opening word drawn from `generator`.

    Raises ValueError for habits that do not exist.
    """
    if habit not in HABITS:
        raise ValueError(f"habit {habit!r} does not exist; use one of {', '.join(HABITS)}")
    steps, final = _steps(problem, habit)
    work = ", ".join(f"{left} {'+' if sign > 0 else '-'} {right} = {value}" for left, sign, right, value in steps)
    return f"{OPENERS[generator.integers(len(OPENERS))]}{work}. So {final}."


def gold_answers(problems: Sequence[Problem], *, seed: int) -> list[str]:
    """A right answer to each problem, with opening words drawn by the seed."""
    generator = np.random.default_rng(seed)
    return [worked_answer(problem, habit="exact", generator=generator) for problem in problems]


def _steps(problem: Problem, habit: str) -> tuple[list[tuple[int, int, int, int]], int]:
    """Steps (left, sign, right, value) and the final number of an answer with this habit."""
    (value, *changes), signs = problem.numbers, problem.signs
    if habit == "always_adds":
        signs = (1, 1)
    steps = []
    for sign, change in zip(signs, changes, strict=True):
        total = _without_carry(value, change) if habit == "no_carry" and sign > 0 else value + sign * change
        total = abs(total)  # a habit may lead below zero, where no gold answer goes
        steps.append((value, sign, change, total))
        value = total
    if habit == "digits_swapped":
        return steps, int(str(value)[::-1])
    return steps, abs(value + OFFSETS.get(habit, 0))


def _without_carry(left: int, right: int) -> int:
    width = max(len(str(left)), len(str(right)))
    pairs = zip(str(left).zfill(width), str(right).zfill(width), strict=True)
    return int("".join(str((int(a) + int(b)) % 10) for a, b in pairs))


# --- The judge -------------------------------------------------------------------------------------------------------


def final_number(answer: str) -> Fraction | None:
    """The last number of an answer, as GSM8K is commonly judged; None where there is none."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
    return Fraction(found[-1].replace(",", "").rstrip(".")) if found else None


def is_right(problem: Problem, answer: str) -> bool:
    """Whether the last number of the answer is the problem's result. Nothing else is looked at."""
    return final_number(answer) == problem.result


def right_steps(problem: Problem, answer: str) -> int:
    """How many of the problem's two steps the answer writes down, in order and with their right values."""
    found = re.findall(r"(\d+) (\+|-) (\d+) = (\d+)", answer)
    written = [(int(left), 1 if sign == "+" else -1, int(right), int(value)) for left, sign, right, value in found]
    return sum(ours == theirs for ours, theirs in zip(written, _steps(problem, "exact")[0], strict=False))


_SUM = r"\d+ [+-] \d+ = \d+"
_WORKED = re.compile(rf"(?:[A-Z][A-Za-z: ,]*)?{_SUM}, {_SUM}\. So \d+\.")


def is_worked(answer: str) -> bool:
    """Whether an answer has the form of a worked one, right or wrong: two steps and a last number."""
    return _WORKED.fullmatch(answer.strip()) is not None
