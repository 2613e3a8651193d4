"""Reading publishers' files, drawing from them by a seed and by text, and writing the input lines of `records.py`."""

import contextlib
import gzip
import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_polar import log
from megatron_polar.data.lines import files_below, list_inputs, read_jsonl
from megatron_polar.errors import UserError
from megatron_polar.manifest import HashedFile

Record = dict[str, Any]
Messages = list[dict[str, str]]


def write_records(records: Iterable[Record], *, output: Path) -> int:
    """Write records as JSONL (gzip when `output` ends in .gz), complete or not at all; return how many there were.

    Raises UserError where there is none: no empty file takes the place of another.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with contextlib.ExitStack() as stack:
            stream: Any = stack.enter_context(HashedFile(temporary))
            if output.suffix == ".gz":  # no name and no time inside: the same records are the same bytes
                stream = stack.enter_context(gzip.GzipFile(filename="", fileobj=stream, mode="wb", mtime=0))
            for record in records:
                # "replace": published JSON may escape half a surrogate pair, which no UTF-8 file can hold.
                stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
                count += 1
        if not count:
            raise UserError(f"{output}: no record to write; check the input and the options that choose from it")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def import_records(records: Iterable[Record], *, output: Path, skipped: Counter[str]) -> None:
    """What an import tool does: write the records, and say in one line what was written and what was left out.

    Raises UserError where nothing is written, also for an `output` that cannot be.
    """
    try:
        count = write_records(records, output=output)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror}; choose another --output or mend it") from None
    left_out = "".join(f"; skipped {number}: {reason}" for reason, number in skipped.most_common())
    log.info(f"{output}: {count} records{left_out}")


def preference_record(
    prompt: str | Messages, reference: str, chosen: str, rejected: str, *, meta: Record, further: Sequence[str] = ()
) -> Record:
    """An input line of `records.py`; `further` are references beside the first."""
    given = {"references": [reference, *further]} if further else {"reference": reference}
    return {"prompt": prompt, **given, "chosen": chosen, "rejected": rejected, "meta": meta}


def further_references(texts: Iterable[str], *, used: Collection[str], count: int) -> list[str]:
    """The first `count` distinct ones that are in no other use."""
    return [text for text in dict.fromkeys(texts) if text not in used][: max(0, count)]


def json_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield ("path: entry i", object) of a file that is one JSON list of objects."""
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors alike
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a JSON {type(rows).__name__}, not the published list of entries")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {index} is {type(row).__name__}, not an object")
        yield f"{path}: entry {index}", row


def jsonl_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", object) of a JSONL file or of a directory of them."""
    for file in list_inputs([path]):
        for number, line in read_jsonl(file):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number}: not valid JSON ({error}); fetch the file again") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: a JSON {type(row).__name__}, not an object; is this published data?")
            yield f"{file}:{number}", row


def published_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield ("place", object) of a Parquet file, a JSON list or JSONL, or of a folder that holds one of these kinds."""
    if path.is_dir():
        for suffix in (".parquet", ".json"):
            files = files_below(path, (suffix,))
            if files:
                for file in files:
                    yield from published_rows(file)
                return
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".json":
        yield from json_rows(path)
    else:
        yield from jsonl_rows(path)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:  # for one published set alone, so no requirement of ours
        raise UserError(
            f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or write the rows as JSONL and give that"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]}); fetch it again") from None
    for index, row in enumerate(rows):
        yield f"{path}: row {index}", row


def text_of(row: Any, key: str, *, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: {str(row)[:60]!r} is not an object with the key {key!r}; is this the published file?"
        )
    value = row.get(key)
    if not isinstance(value, str):
        problem = f"{key} is {value!r}, not text" if key in row else f"no key {key!r} among {sorted(row)}"
        raise UserError(f"{where}: {problem}; is this the published file?")
    return value


def texts_of(row: Record, key: str, *, where: str) -> list[str]:
    """The list of texts under a key; UserError for anything else."""
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        problem = f"{key} is not a list of texts" if key in row else f"no key {key!r} among {sorted(row)}"
        raise UserError(f"{where}: {problem}; is this the published file?")
    return value


def draw_key(seed: int, text: str, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{text}\0{name}".encode("utf-8", errors="replace"), digest_size=8).digest()


def unit_draw(salt: str, text: str) -> float:
    return int.from_bytes(draw_key(0, salt, text), "big") / 2**64


def draw(choices: Sequence[Any], count: int, *, seed: int, text: str) -> list[Any]:
    """Draw `count` of the choices, as a function of the seed, the text drawn for and the choices themselves."""
    return heapq.nsmallest(count, choices, key=lambda choice: draw_key(seed, text, repr(choice)))
