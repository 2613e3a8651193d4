"""`score`: a JSONL file of prompts, references and outputs → the same lines with their rewards."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import orjson

from megatron_polar import log
from megatron_polar.data.lines import list_inputs, read_jsonl
from megatron_polar.data.records import describe_bad_json, json_type, warn_of_misspelt
from megatron_polar.data.references import BadReferences, mean_over_references, read_references
from megatron_polar.data.template import WRAPPERS, prompt_text
from megatron_polar.errors import UserError, printable
from megatron_polar.manifest import HashedFile
from megatron_polar.score.requests import Scorer, ScoreRequest, check_finite, for_references, outputs_cut

_LINES_AT_ONCE = 256
_SHOWN = 80  # characters of a value in a message
_KEYS = ("prompt", "reference", "references", "output", "outputs", "wrapper")


@dataclass(frozen=True)
class _Line:
    where: str
    value: dict
    requests: tuple[ScoreRequest, ...]  # one for each reference
    is_single: bool
    duplicate_references: int


def read_requests(path: Path) -> int:
    """Count the lines of a score file or directory of them. Raises UserError with file:line for the first line that
    cannot be scored, and where there is no line at all."""
    count = sum(1 for _ in _read_lines(path, default_wrapper=WRAPPERS[0]))
    if not count:
        raise UserError(f"{path}: empty input: only blank lines or nothing; check the path")
    return count


def score_file(scorer: Scorer, path: Path, *, output: Path, default_wrapper: str, per_reference: bool = False) -> int:
    """Copy each line of `path` to `output` with `reward` (for `output`) or `rewards` (for `outputs`) added.

    With several references that is the mean over them; `per_reference` adds the rewards against each, [reference] for
    `output` and [reference][output] for `outputs`. The output file appears complete or not at all; every rank scores,
    the first one writes. Returns the number of lines. Raises UserError for rewards that are not finite.
    """
    total = read_requests(path)
    scored = _scored_lines(
        scorer, path, total=total, default_wrapper=default_wrapper, per_reference=per_reference, output=output
    )
    if not log.is_first_rank():
        for _ in scored:
            pass
        return total
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    try:
        with HashedFile(temporary) as sink:
            for line in scored:
                sink.write(orjson.dumps(line) + b"\n")
        temporary.replace(output)
        if cut := outputs_cut(scorer):
            log.warn(f"{output}: {cut} outputs were too long with prompt and reference, and were cut as in training")
    finally:
        temporary.unlink(missing_ok=True)
    return total


def _scored_lines(
    scorer: Scorer, path: Path, *, total: int, default_wrapper: str, per_reference: bool, output: Path
) -> Iterator[dict]:
    lines = _read_lines(path, default_wrapper=default_wrapper)
    duplicates, places = 0, {}
    with log.Progress("scoring", total=total, unit="lines") as bar:
        while chunk := list(islice(lines, _LINES_AT_ONCE)):
            rewards = iter(scorer.score([request for line in chunk for request in line.requests]))
            for line in chunk:
                yield line.value | _added(line, [next(rewards) for _ in line.requests], per_reference=per_reference)
                duplicates += line.duplicate_references
                for key in line.value:
                    places.setdefault(key, line.where)
            bar.advance(len(chunk))
    if duplicates and log.is_first_rank():
        log.warn(f"{output}: {duplicates} references were there twice in their line; each counts once in the mean")
    if log.is_first_rank():
        warn_of_misspelt(places, known=_KEYS)


def _added(line: _Line, rows: list[list[float]], *, per_reference: bool) -> dict:
    """The keys that a line gets; `rows` are its rewards, [reference][output]."""
    for row in rows:
        check_finite(row, where=line.where)
    means = mean_over_references(rows)
    added: dict = {"reward": means[0]} if line.is_single else {"rewards": means}
    if per_reference:
        added["per_reference"] = [row[0] for row in rows] if line.is_single else rows
    return added


def _read_lines(path: Path, *, default_wrapper: str) -> Iterator[_Line]:
    for file in list_inputs([path]) if path.is_dir() else [path]:
        for number, raw in read_jsonl(file):
            yield _parse(raw, where=f"{file}:{number}", default_wrapper=default_wrapper)


def _parse(raw: bytes, *, where: str, default_wrapper: str) -> _Line:
    try:
        value = orjson.loads(raw)
        orjson.dumps(value)  # what is nested too deeply can be read, and not be written again
    except (orjson.JSONDecodeError, TypeError) as error:
        raise UserError(f"{where}: {describe_bad_json(raw, error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON {json_type(value)}, not an object with prompt, reference and output")
    is_single = "outputs" not in value
    given = "references" if "references" in value else "reference"
    for key in ("prompt", given, "output" if is_single else "outputs"):
        if key not in value:
            raise UserError(
                f"{where}: key {key!r} is missing; a line needs prompt, reference (or references: [...]) and output "
                "(or outputs: [...])"
            )
    outputs = [value["output"]] if is_single else value["outputs"]
    if not isinstance(outputs, list) or not outputs:
        raise UserError(f"{where}: outputs={_shown(outputs)} must be a non-empty list")
    prompt = _text(value["prompt"], key="prompt", where=where)
    try:
        references = read_references(value, read_text=lambda item, key: _text(item, key=key, where=where))
    except BadReferences as bad:
        raise UserError(f"{where}: {bad}") from None
    texts = [
        _text(output, key="output" if is_single else f"outputs[{i}]", where=where) for i, output in enumerate(outputs)
    ]
    wrapper = value.get("wrapper", default_wrapper)
    if wrapper not in WRAPPERS:
        raise UserError(f"{where}: wrapper={_shown(wrapper)} must be {' or '.join(WRAPPERS)}")
    requests = for_references(prompt, references.texts, texts, wrapper=wrapper)
    return _Line(where, value, requests, is_single, references.duplicates)


def _shown(value: object) -> str:
    return printable(repr(value), limit=_SHOWN)


def _text(value: object, *, key: str, where: str) -> str:
    try:
        return prompt_text(value)
    except TypeError as error:
        raise UserError(f"{where}: {key}={_shown(value)}: {error}") from None
