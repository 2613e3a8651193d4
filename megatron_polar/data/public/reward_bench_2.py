"""RewardBench 2: one right answer among four, and prompts with many right answers (arXiv 2506.01937).

Format, from the card of the data set allenai/reward-bench-2: rows of {"id", "prompt", "chosen": [texts],
"rejected": [texts], "num_correct", "num_incorrect", "total_completions", "models", "subset", "additional_metadata"},
published as Parquet. In the subset Ties an id is "ref:N" (a prompt with one right answer) or "tied:N" (its like with
several); the scoring of both together is in `score/published.py`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_polar.data.public.files import published_rows, text_of, texts_of
from megatron_polar.data.public.judged import Answer, JudgedAnswers, unique_identifiers
from megatron_polar.errors import UserError

TIES = "Ties"
SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", TIES)
_TIES_ID = re.compile(r"(ref|tied):\d+")


def reward_bench_2_answers(path: Path, *, skipped: Counter[str]) -> Iterator[JudgedAnswers]:
    """Yield the right answers (level 0) and then the wrong ones (level 1); the identifier is "subset/id".

    `path` is a Parquet file, JSONL or a JSON list of the published rows, or a folder of one of them.
    """
    return unique_identifiers(_items(path, skipped=skipped))


def _items(path: Path, *, skipped: Counter[str]) -> Iterator[JudgedAnswers]:
    ties: set[str] = set()
    for where, row in published_rows(path):
        right, wrong = (texts_of(row, side, where=where) for side in ("chosen", "rejected"))
        for key, texts in (("num_correct", right), ("num_incorrect", wrong)):
            if row.get(key, len(texts)) != len(texts):
                raise UserError(
                    f"{where}: {key} is {row[key]!r} and there are {len(texts)} such answers; fetch it again"
                )
        if not right or not wrong:
            skipped["row without a right or without a wrong answer"] += 1
            continue
        subset = _subset(text_of(row, "subset", where=where))
        if subset == TIES and (not _TIES_ID.fullmatch(str(row.get("id"))) or row["id"] in ties):
            why = "is there twice" if row["id"] in ties else "is not ref:N or tied:N"
            raise UserError(f"{where}: id {row.get('id')!r} of the subset Ties {why}; give the published rows once")
        ties.update([row["id"]] if subset == TIES else [])
        models = row.get("models")
        named = isinstance(models, list) and len(models) == len(right) + len(wrong)
        names = [str(model) for model in models] if named else [""] * (len(right) + len(wrong))
        yield JudgedAnswers(
            identifier=f"{subset}/{row.get('id')}",
            prompt=text_of(row, "prompt", where=where),
            answers=tuple(Answer(name, text) for name, text in zip(names, right + wrong, strict=True)),
            levels=(0,) * len(right) + (1,) * len(wrong),
            category=subset,
        )


def _subset(name: str) -> str:
    return next((subset for subset in SUBSETS if subset.casefold() == name.casefold()), name)
