"""Tables of runs, one a line: for studies whose run directories are elsewhere."""

import csv
import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from megatron_polar import log
from megatron_polar.data.lines import read_lines
from megatron_polar.errors import UserError, printable
from megatron_polar.scaling.runs import ScalingRun

SUFFIXES = (".csv", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_NUMBERS = ("parameters", "loss", "all_parameters", "comparisons", "tokens", "flops")
_REQUIRED = ("parameters", "loss")
_TEXTS = ("name", "held_out", "tokenizer")
_KNOWN = (*_NUMBERS, "seed", *_TEXTS)


def read_table(path: Path) -> list[ScalingRun]:
    """Read a CSV with a header, or JSONL: `parameters` and `loss`, and as far as known `name`, `all_parameters`,
    `comparisons`, `tokens`, `flops`, `seed`, `held_out`, `tokenizer`; other columns are named and passed over.

    Raises UserError with file:line, also for a column that is nearly called like one of these.
    """
    rows = list(_rows(path))
    _check_columns(rows, path=path)
    runs = [_run(row, where=where) for row, where in rows]
    if not runs:
        raise UserError(f"{path}: no line with a run in it; check the path")
    return runs


def _check_columns(rows: Sequence[tuple[dict, str]], *, path: Path) -> None:
    """One row for each unknown column: a letter too few would lose the data of all runs."""
    first = {name: where for row, where in reversed(rows) for name in row if name not in _KNOWN}
    for name, where in first.items():
        near = difflib.get_close_matches(name.lower(), _KNOWN, n=1, cutoff=0.8)
        if near:
            raise UserError(f"{where}: a column called {printable(name, limit=40)!r}; did you mean {near[0]!r}?")
    if first:
        log.info(f"{path}: not used: {', '.join(printable(name, limit=40) for name in sorted(first))}")


def _rows(path: Path) -> Iterator[tuple[dict, str]]:
    if path.name.endswith(".csv"):
        yield from _csv_rows(path)
        return
    for line in read_lines(path):
        where = f"{path}:{line.number}"
        try:
            row = orjson.loads(line.data)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{where}: malformed JSON ({error}); write one JSON object per line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: {printable(str(row), limit=40)} is no JSON object; write one per line")
        yield row, where


def _csv_rows(path: Path) -> Iterator[tuple[dict, str]]:
    header: list[str] | None = None
    for line in read_lines(path):
        where = f"{path}:{line.number}"
        try:
            rows = list(csv.reader([line.data.decode()], strict=True))  # a line at a time: no cell goes over two
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({error.reason}); save the file as that") from None
        except csv.Error as error:
            raise UserError(
                f"{where}: no line of a CSV ({error}); write one run a line, lines ending as on Unix"
            ) from None
        cells = [cell.strip() for cell in rows[0]] if rows else []
        if header is None:
            header = cells
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise UserError(
                    f"{where}: two columns are called {printable(twice[0], limit=40)}; leave one of them out"
                )
            continue
        if len(cells) != len(header):
            raise UserError(f"{where}: has {len(cells)} cells, and the header has {len(header)}")
        yield dict(zip(header, cells, strict=True)), where


def _run(row: dict, *, where: str) -> ScalingRun:
    given = {name: value for name, value in row.items() if value not in (None, "")}
    values: dict = {name: _number(given[name], name=name, where=where) for name in _NUMBERS if name in given}
    for name in _REQUIRED:
        if name not in values:
            hint = "" if row.keys() & set(_KNOWN) else " (line 1 of a CSV is its header)"
            raise UserError(f"{where}: {name} is missing; known columns: {', '.join(_KNOWN)}{hint}")
    for name in ("parameters", "all_parameters"):
        if name in values:
            if values[name] != round(values[name]):
                raise UserError(f"{where}: {name}={values[name]:g} is not a whole number; write weights, not billions")
            values[name] = round(values[name])
    values |= {name: str(given[name]) for name in _TEXTS if name in given}
    if "seed" in given:
        values["seed"] = round(_number(given["seed"], name="seed", where=where, lowest=-1.0))
    return ScalingRun(**{"name": where, **values})


def _number(value: object, *, name: str, where: str, lowest: float = 0.0) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not lowest < number < math.inf:
        raise UserError(f"{where}: {name}={printable(str(value), limit=40)} must be a number above {lowest:g}")
    return number
