"""GSM8K: problems with a ground truth and with solutions of four models, each marked right or wrong."""

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from megatron_polar.data.public.files import (
    Record,
    draw,
    further_references,
    jsonl_rows,
    preference_record,
    text_of,
    unit_draw,
)
from megatron_polar.errors import UserError


def gsm8k_split(question: str, *, heldout_fraction: float = 0.2) -> str:
    """Say which split a problem belongs to, "train" or "heldout": a property of its text, whatever the seed or file."""
    return "heldout" if unit_draw("gsm8k split", question) < heldout_fraction else "train"


def gsm8k_preferences(
    path: Path,
    *,
    split: str = "all",
    heldout_fraction: float = 0.2,
    pairs_per_problem: int = 1,
    reference: str = "gold",
    max_references: int = 1,
    seed: int = 0,
    skipped: Counter[str],
) -> Iterator[Record]:
    """Yield, from `example_model_solutions.jsonl`, a reference, a right and a wrong solution.

    `reference`: "gold", the ground truth; "leave-one-out", another right solution; or "policy:NAME", the solution of
    that model where it is right. Further references, up to `max_references`, are the other right
    solutions, with "policy:NAME" none. `split`: "train", "heldout" or "all" (`gsm8k_split`). Problems that every model
    solved, or none, have no pair. Texts stay as published, the calculator's `<<2*9=18>>` included: they are part of
    what the models wrote.
    """
    for where, row in jsonl_rows(path):
        question = text_of(row, "question", where=where)
        truth = ("", text_of(row, "ground_truth", where=where))
        if split not in ("all", gsm8k_split(question, heldout_fraction=heldout_fraction)):
            skipped[f"problem outside the split {split!r}"] += 1
            continue
        solutions = _solutions(row, where=where)
        others = [(solution,) for solution in solutions[True]]
        if reference.startswith("policy:"):
            others = [(solution,) for (solution,) in others if solution[0] == reference.removeprefix("policy:")]
        choices = [
            (right, wrong, *other)
            for right, wrong, other in product(*solutions.values(), [()] if reference == "gold" else others)
            if len({text for _, text in (right, wrong, *(other or [truth]))}) == 3
        ]
        if not choices:
            also = "" if reference == "gold" else ", and another right one as reference"
            skipped[f"problem without both a right and a wrong solution{also}"] += 1
        category = f"{len(solutions[True])} of {len(solutions[True]) + len(solutions[False])} models right"
        for right, wrong, *other in draw(choices, pairs_per_problem, seed=seed, text=question):
            meta = {"chosen_policy": right[0], "rejected_policy": wrong[0], "category": category}
            meta |= {"reference_policy": other[0][0]} if other else {}
            used = ((other or [truth])[0][1], right[1], wrong[1])
            rest = draw([solution for (solution,) in others], len(others), seed=seed, text=f"references\n{question}")
            further = further_references([text for _, text in rest], used=used, count=max_references - 1)
            yield preference_record(question, *used, meta=meta, further=further)


def _solutions(row: Record, *, where: str) -> dict[bool, list[tuple[str, str]]]:
    """(model, solution) of the right ones and of the wrong ones."""
    solutions: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for model, entry in row.items():
        if isinstance(entry, dict):
            correct = entry.get("is_correct")
            if not isinstance(correct, bool):
                raise UserError(f"{where}: {model}.is_correct is {correct!r}, not a boolean; is this OpenAI's file?")
            solutions[correct].append((model, text_of(entry, "solution", where=f"{where}: {model}")))
    return solutions
