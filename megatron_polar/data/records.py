"""One JSONL line -> TrajectoryGroup or Preference, or an error that says file, line, reason and remedy."""

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from megatron_polar import log
from megatron_polar.data.lines import RecordError, read_jsonl
from megatron_polar.data.references import BadReferences, read_references
from megatron_polar.data.template import WRAPPERS, prompt_text
from megatron_polar.errors import printable

# Far below what the JSON parsers refuse themselves, which depends on how deep the stack already is.
MAX_DEPTH = 100
_SHOWN = 60  # characters of a value in a message
RULES_VERSION = 2
"""Of what a line becomes (`drop_duplicates`): work that was begun by other rules is begun again."""
KEYS = ("prompt", "trajectories", "reference", "references", "chosen", "rejected", "ranked", "wrapper")
_ALIKE = 0.85  # difflib's ratio from which an unknown key is taken for a known one, misspelt
_FORMS = 'one of {"prompt","trajectories"}, {"prompt","reference","chosen","rejected"}, {"prompt","reference","ranked"}'
"""Several references, `"references": [...]` in the place of `reference`, are in docs/data.md."""


def warn_of_misspelt(places: Mapping[str, str], *, known: Sequence[str]) -> None:
    """Name the keys that have no effect and probably were meant to have one; `places` are where keys first stand."""
    for key, where in places.items():
        near = [] if key in known else difflib.get_close_matches(key, known, n=1, cutoff=_ALIKE)
        if near:
            log.warn(f"{where}: key {printable(key, limit=_SHOWN)!r} has no effect; {near[0]!r} would have one")


class _Reason(Exception):
    """Why a record is unusable, before the place is known."""


@dataclass(frozen=True)
class Trajectory:
    """One continuation of the prompt, and the policy (model and sampling settings) that wrote it."""

    policy: str
    text: str


@dataclass(frozen=True)
class TrajectoryGroup:
    """Trajectories of several policies for one prompt; unknown keys of the line are kept in `meta`."""

    prompt: str
    trajectories: tuple[Trajectory, ...]
    wrapper: str | None
    meta: dict


@dataclass(frozen=True)
class Preference:
    """Candidates in order of preference, best first (at least two), beside a reference for the same prompt.

    A line may give several references: `more_references` are those behind the first.
    """

    prompt: str
    reference: str
    candidates: tuple[str, ...]
    wrapper: str | None
    meta: dict
    more_references: tuple[str, ...] = ()
    duplicate_references: int = 0
    """Repetitions of a reference in the line, which are dropped."""

    @property
    def references(self) -> tuple[str, ...]:
        return (self.reference, *self.more_references)


@dataclass(frozen=True)
class Distinct:
    """A record without repeated texts, and what was dropped: answers given twice, and texts of an earlier policy."""

    record: TrajectoryGroup | Preference
    duplicates: int
    identical: int


def parse_record(
    line: bytes | str, *, source: str, line_number: int, default_wrapper: str | None = "sft"
) -> TrajectoryGroup | Preference:
    """Read one input line of docs/data.md, whichever of the three forms it has.

    `default_wrapper` is for a line that names none; None leaves it open. Raises RecordError (a UserError) whose message
    starts with `source:line_number`.
    """
    try:
        return _parse(_load_object(line), default_wrapper=default_wrapper)
    except _Reason as reason:
        raise RecordError(str(reason), file=source, line=line_number) from None


def drop_duplicates(record: TrajectoryGroup | Preference, *, source: str, line_number: int) -> Distinct:
    """Drop answers that would be compared with themselves; the first of equals stays.

    In a preference these are repeated candidates and those with the text of a reference: beside that every other answer
    is worse for no reason. Repeated references, which are dropped already, are counted with them. In a group they are
    trajectories given twice (same policy, same text), and a text that an earlier policy wrote as well: nothing tells
    the two apart, so it is label noise. Raises RecordError when the rest can no longer be compared.
    """
    try:
        if isinstance(record, Preference):
            candidates = tuple(text for text in dict.fromkeys(record.candidates) if text not in record.references)
            if len(candidates) < 2:
                same = len(set(record.candidates)) == 1
                left = "beside the reference's own text fewer than two candidates are left"
                found = "all candidates have the same text" if same else left
                raise _Reason(f"{found}, so there is no preference; drop the line")
            dropped = len(record.candidates) - len(candidates)
            record = replace(record, candidates=candidates) if dropped else record
            return Distinct(record, duplicates=dropped + record.duplicate_references, identical=0)
        unique = tuple(dict.fromkeys(record.trajectories))
        first_of_text: dict[str, Trajectory] = {}
        for trajectory in unique:
            first_of_text.setdefault(trajectory.text, trajectory)
        kept = tuple(first_of_text.values())
        duplicates, identical = len(record.trajectories) - len(unique), len(unique) - len(kept)
        if duplicates or identical:
            counted = {f"{duplicates} duplicate(s) (same policy, same text)": duplicates}
            counted[f"{identical} text(s) identical to another policy's"] = identical
            _check_policies(kept, note=f" once {' and '.join(text for text in counted if counted[text])} are dropped")
            record = replace(record, trajectories=kept)
        return Distinct(record, duplicates=duplicates, identical=identical)
    except _Reason as reason:
        raise RecordError(str(reason), file=source, line=line_number) from None


def _load_object(line: bytes | str) -> dict:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _Reason(describe_bad_json(line, error)) from None
    if not isinstance(value, dict):
        raise _Reason(f"a JSON {json_type(value)}, not an object; expected {_FORMS}")
    text = line if isinstance(line, str) else line.decode("utf-8")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value, levels=MAX_DEPTH)
    _ALL_KEYS.decode(text)
    return value


def describe_bad_json(line: bytes | str, error: Exception) -> str:
    """Why a line is no JSON, and the remedy."""
    try:
        if isinstance(line, bytes):
            line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return f"not UTF-8 (byte {bad.start}: 0x{line[bad.start]:02x}); convert the file to UTF-8"
    return f"malformed JSON ({_one_line(error)}); write one JSON object per line"


def _check_depth(value: Any, *, levels: int) -> None:
    if isinstance(value, dict | list):
        if not levels:
            raise _Reason(f"nested deeper than {MAX_DEPTH} levels; is this a record?")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, levels=levels - 1)


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Reason(f"the key {_quoted(twice)} is there twice, so it is not clear what is meant; keep one of them")


# orjson keeps the last of two equal keys without a word; the standard parser shows all of them.
_ALL_KEYS = json.JSONDecoder(object_pairs_hook=_refuse_repeated_keys, parse_int=str, parse_float=str)


def _parse(value: dict, *, default_wrapper: str | None) -> TrajectoryGroup | Preference:
    reference = "references" if "references" in value else "reference"
    if "trajectories" in value:
        required: tuple[str, ...] = ("prompt", "trajectories")
    elif "ranked" in value:
        required = ("prompt", reference, "ranked")
    elif "chosen" in value or "rejected" in value or reference in value:
        required = ("prompt", reference, "chosen", "rejected")
    else:
        raise _Reason(f"keys {_keys(value)} make no record; expected {_FORMS}")
    missing = [key for key in required if key not in value]
    if missing:
        raise _Reason(f"missing key {', '.join(map(repr, missing))} (found {_keys(value)}); expected {_FORMS}")
    prompt = _text(value["prompt"], key="prompt")
    if not prompt.strip():
        raise _Reason("'prompt' is empty; every record needs a prompt, drop the line")
    wrapper = value.get("wrapper", default_wrapper)
    if wrapper not in WRAPPERS and ("wrapper" in value or wrapper is not None):
        raise _Reason(f"'wrapper' is {_describe(wrapper)}; use one of {', '.join(WRAPPERS)}")
    meta = {key: item for key, item in value.items() if key not in (*required, "wrapper")}
    if "trajectories" in value:
        trajectories = _trajectories(value["trajectories"])
        _check_policies(trajectories)
        return TrajectoryGroup(prompt=prompt, trajectories=trajectories, wrapper=wrapper, meta=meta)
    if "ranked" in value:
        ranked = value["ranked"]
        if not isinstance(ranked, list) or len(ranked) < 2:
            raise _Reason(f"'ranked' is {_describe(ranked)}; give a list of two or more answers, best first")
        candidates = tuple(_text(item, key=f"ranked[{index}]") for index, item in enumerate(ranked))
    else:
        candidates = tuple(_text(value[key], key=key) for key in ("chosen", "rejected"))
    try:
        found = read_references(value, read_text=lambda item, key: _text(item, key=key))
    except BadReferences as bad:
        raise _Reason(str(bad)) from None
    return Preference(
        prompt=prompt,
        reference=found.texts[0],
        candidates=candidates,
        wrapper=wrapper,
        meta=meta,
        more_references=found.texts[1:],
        duplicate_references=found.duplicates,
    )


def _trajectories(items: Any) -> tuple[Trajectory, ...]:
    if not isinstance(items, list):
        raise _Reason(f'\'trajectories\' is {_describe(items)}; give a list of {{"policy", "text"}} objects')
    trajectories = []
    for index, item in enumerate(items):
        if not isinstance(item, dict) or not {"policy", "text"} <= item.keys():
            raise _Reason(f'\'trajectories[{index}]\' is {_describe(item)}; it needs "policy" and "text"')
        policy = item["policy"]
        if not isinstance(policy, str) or not policy:
            raise _Reason(f"'trajectories[{index}].policy' is {_describe(policy)}; give the policy's name")
        _refuse_nul(policy, key=f"trajectories[{index}].policy")
        trajectories.append(Trajectory(policy, _text(item["text"], key=f"trajectories[{index}].text")))
    return tuple(trajectories)


def _check_policies(trajectories: Sequence[Trajectory], *, note: str = "") -> None:
    """A group can be compared when one policy has two trajectories (reference, positive) and another one (negative)."""
    counts = Counter(trajectory.policy for trajectory in trajectories)
    if not counts:
        raise _Reason("'trajectories' is empty; give at least two of one policy and one of another")
    if len(counts) > 1 and max(counts.values()) > 1:
        return
    listed = ", ".join(f"{printable(policy, limit=_SHOWN)} x{count}" for policy, count in counts.most_common(4))
    listed += ", ..." if len(counts) > 4 else ""
    if max(counts.values()) < 2:
        raise _Reason(f"no policy has two trajectories{note} ({listed}); sample at least two from one policy")
    raise _Reason(f"all trajectories are of one policy{note} ({listed}); add at least one of another policy")


def _text(value: Any, *, key: str) -> str:
    try:
        text = prompt_text(value)
    except TypeError as error:
        raise _Reason(f"'{key}' is {_describe(value)}; {error}") from None
    _refuse_nul(text, key=key)
    return text


def _refuse_nul(text: str, *, key: str) -> None:
    if "\0" in text:
        raise _Reason(f"'{key}' contains a NUL character, a sign of broken data; mend it or drop the line")


def _describe(value: Any) -> str:
    return "a JSON null" if value is None else f"a JSON {json_type(value)} {_quoted(value)}"


def _quoted(value: Any) -> str:
    return printable(orjson.dumps(value).decode("utf-8"), limit=_SHOWN)


def _keys(value: dict) -> str:
    return f"[{printable(', '.join(map(repr, sorted(value))), limit=120)}]"


def json_type(value: Any) -> str:
    """JSON's name of a decoded value's type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Every prompt and every answer of the records in `paths`: what a tokenizer is trained on. Raises RecordError."""
    for path in paths:
        for number, line in read_jsonl(path):
            if line.strip():
                record = parse_record(line, source=str(path), line_number=number)
                yield record.prompt
                if isinstance(record, Preference):
                    yield from record.references
                    yield from record.candidates
                else:
                    yield from (trajectory.text for trajectory in record.trajectories)
