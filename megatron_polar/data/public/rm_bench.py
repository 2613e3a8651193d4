"""RM-Bench: chosen and rejected answers to a prompt, each in three styles (arXiv 2410.16184, ICLR 2025).

Format, from the README of github.com/THU-KEG/RM-Bench: a JSON list of {"id", "prompt", "chosen": [3 texts],
"rejected": [3 texts], "domain"}; the texts are in the order concise, detailed as plain text, detailed with markdown.
The folder `data` holds `total_dataset.json` and the same items by domain, `chat_filtered.json` and so on; entries of
these may lack the key `domain` and have it in the file's name only.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_polar.data.public.files import Record, json_rows, text_of, texts_of
from megatron_polar.data.public.judged import Answer, JudgedAnswers, unique_identifiers
from megatron_polar.errors import UserError

STYLES = ("concise", "detailed", "markdown")
DOMAINS = ("chat", "code", "math", "safety-refuse", "safety-response")
_TOTAL = "total_dataset.json"


def rm_bench_answers(path: Path) -> Iterator[JudgedAnswers]:
    """Yield the chosen answers (level 0) and then the rejected ones (level 1), each in the order of `STYLES`.

    `path` is one JSON file or the folder `data`, of which `total_dataset.json` is taken where it is there: the other
    files hold the same items again.
    """
    return unique_identifiers(_items(path))


def _items(path: Path) -> Iterator[JudgedAnswers]:
    for file in _files(path):
        for where, row in json_rows(file):
            domain = _domain(row, file=file, where=where)
            sides = [texts_of(row, side, where=where) for side in ("chosen", "rejected")]
            if any(len(side) != len(STYLES) for side in sides):
                raise UserError(
                    f"{where}: {len(sides[0])} chosen and {len(sides[1])} rejected answers, not three styles of each; "
                    "is this RM-Bench?"
                )
            yield JudgedAnswers(
                identifier=f"{domain}/{row.get('id')}",
                prompt=text_of(row, "prompt", where=where),
                answers=tuple(Answer(style, text) for side in sides for style, text in zip(STYLES, side, strict=True)),
                levels=(0, 0, 0, 1, 1, 1),
                category=domain,
            )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / _TOTAL).is_file():
        return [path / _TOTAL]
    files = sorted(path.glob("*_filtered.json"))
    if not files:
        raise UserError(f"{path}: neither {_TOTAL} nor a *_filtered.json in it; give the folder data of RM-Bench")
    return files


def _domain(row: Record, *, file: Path, where: str) -> str:
    named = row.get("domain", file.name.removesuffix(".json").removesuffix("_filtered"))
    known = [domain for domain in DOMAINS if isinstance(named, str) and named.startswith(domain)]
    if not known:
        raise UserError(
            f"{where}: neither a key domain nor the file's name is one of {', '.join(DOMAINS)}; keep the published "
            "names, such as chat_filtered.json"
        )
    return known[0]
