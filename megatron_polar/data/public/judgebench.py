"""JudgeBench: pairs of one model's answers, one of them objectively right (arXiv 2410.12784, ICLR 2025).

Format, from the README of github.com/ScalerLab/JudgeBench: JSONL of {"pair_id", "original_id", "source", "question",
"response_model", "response_A", "response_B", "label": "A>B" or "B>A"}, a file per response model in its folder `data`.
The paper's four categories follow from `source`: mmlu-pro-* is knowledge, livebench-reasoning, livebench-math and
livecodebench speak for themselves.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_polar.data.public.files import jsonl_rows, text_of
from megatron_polar.data.public.judged import Answer, JudgedAnswers, unique_identifiers
from megatron_polar.errors import UserError

CATEGORIES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}


def judgebench_answers(path: Path, *, skipped: Counter[str]) -> Iterator[JudgedAnswers]:
    """Yield the right answer (level 0) and the wrong one (level 1).

    Judges are asked in both orders, because their verdict may depend on it; a reward does not. Both answers come from
    one model, so nothing tells them apart by policy.
    """
    return unique_identifiers(_items(path, skipped=skipped))


def _items(path: Path, *, skipped: Counter[str]) -> Iterator[JudgedAnswers]:
    for where, row in jsonl_rows(path):
        question, source = text_of(row, "question", where=where), text_of(row, "source", where=where)
        texts = [text_of(row, f"response_{side}", where=where) for side in "AB"]
        label = row.get("label")
        if label not in ("A>B", "B>A"):
            raise UserError(f"{where}: label is {label!r}, not 'A>B' or 'B>A'; is this JudgeBench?")
        if texts[0] == texts[1]:
            skipped["pair of equal answers"] += 1
            continue
        right, wrong = texts if label == "A>B" else texts[::-1]
        model = str(row.get("response_model", ""))
        yield JudgedAnswers(
            identifier=f"{model or 'judgebench'}/{row.get('pair_id')}",
            prompt=question,
            answers=(Answer(model, right), Answer(model, wrong)),
            levels=(0, 1),
            category=next((name for start, name in CATEGORIES.items() if source.startswith(start)), source),
        )
