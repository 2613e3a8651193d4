"""What clients ask and what they get: the JSON of our own endpoint, vLLM, SGLang, LMDeploy and OpenRLHF.

Reading checks types and counts and names the field that is wrong; texts are tokenised elsewhere (tokens.py). Sources of
the shapes: vLLM's /pooling and /classify, SGLang's native /classify, LMDeploy's /pooling, OpenRLHF's utils/agent.py.
"""

import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import orjson

from megatron_polar.data.references import BadReferences, distinct_references, mean_over_references, read_references
from megatron_polar.data.template import WRAPPERS, prompt_text
from megatron_polar.score.requests import ScoreRequest, for_references
from megatron_polar.serve.wire import without_end

PoolingShape = Literal["vllm", "lmdeploy"]


class RequestError(Exception):
    """A request that gets an error for its reply: HTTP `status`, a stable word for programs, a sentence for people."""

    def __init__(self, status: int, kind: str, message: str, *, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_after = status, kind, message, retry_after

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "code": self.status}}


@dataclass(frozen=True)
class Settings:
    """What reading a request depends on; `wrapper`, for texts that name none, is None while it is to be the model's own
    and the model is not loaded."""

    model: str
    wrapper: str | None
    max_items: int
    max_text_bytes: int
    pooling_shape: PoolingShape


@dataclass(frozen=True)
class Texts:
    """Prompts, references and outputs in words, to be cut as in training; `names` says what each request is called in
    errors. Several references of one item are as many requests, one after the other."""

    requests: tuple[ScoreRequest, ...]
    names: tuple[str, ...]

    @property
    def num_sequences(self) -> int:
        return sum(len(request.outputs) for request in self.requests)


@dataclass(frozen=True)
class Sequences:
    """Whole POLAR texts, or their token ids: one reward each, nothing is cut."""

    inputs: tuple[str | list[int], ...]
    field: str
    is_single: bool

    @property
    def num_sequences(self) -> int:
        return len(self.inputs)

    def name(self, index: int) -> str:
        """How input `index` is called in an error."""
        return self.field if self.is_single else f"{self.field}[{index}]"


@dataclass(frozen=True)
class Scored:
    """One entry per output or input, in the order of the request; lengths in tokens."""

    rewards: list[float]
    truncated: list[bool]
    lengths: list[int]


@dataclass(frozen=True)
class Question:
    """What is to be scored, and how the answer is written down."""

    asks: Texts | Sequences
    reply: Callable[[Scored], Any]


def read_json(body: bytes) -> dict[str, Any]:
    """Parse a body. Raises RequestError: 400 for what is no JSON (NaN, lone surrogates), 422 for what is no object."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, "invalid_json", f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise refusal(f"the body is {_kind(value)}; it must be a JSON object")
    return value


# --- Our own endpoint ------------------------------------------------------------------------------------------------


def read_score(body: dict[str, Any], settings: Settings) -> Question:
    """POST /v1/score. Fields that it does not know are refused: a misspelt `wrapper` would change rewards silently."""
    _check_model(body, settings)
    _only(body, ("items", "model", "per_reference"), where="")
    wants_each = body.get("per_reference", False)
    if not isinstance(wants_each, bool):
        raise refusal(f"per_reference is {_kind(wants_each)}; it must be true or false")
    items = [_item(item, f"items[{i}]", settings=settings) for i, item in enumerate(_list(body.get("items"), "items"))]
    requests = tuple(request for item in items for request in item.requests)
    count = sum(len(request.outputs) for request in requests)
    what = "outputs" if len(requests) == len(items) else "outputs, each counted once for each reference"
    _check_count(count, "items", what=what, settings=settings)
    _check_text_bytes(requests, "items", settings=settings)
    names = tuple(f"items[{i}]" for i, item in enumerate(items) for _ in item.requests)
    return Question(Texts(requests, names), partial(_score_reply, items, settings.model, wants_each))


@dataclass(frozen=True)
class _Item:
    """An item as a request for each of its references; `duplicates` were dropped, and are None for a lone one."""

    requests: tuple[ScoreRequest, ...]
    duplicates: int | None


def _item(item: Any, where: str, *, settings: Settings) -> _Item:
    if not isinstance(item, dict):
        raise refusal(f"{where} is {_kind(item)}; it must be an object with prompt, reference and outputs")
    _only(item, ("prompt", "reference", "references", "outputs", "wrapper"), where=f"{where}.")
    outputs = _list(item.get("outputs"), f"{where}.outputs")
    wrapper = item.get("wrapper", settings.wrapper)
    if wrapper not in WRAPPERS:
        raise refusal(f"{where}.wrapper must be one of {', '.join(WRAPPERS)}")
    prompt = _text(item.get("prompt"), f"{where}.prompt")
    try:
        references = read_references(item, read_text=lambda value, key: _text(value, f"{where}.{key}"))
    except BadReferences as bad:
        raise refusal(f"{where}.{bad.key} {bad.reason}") from None
    texts = [_text(output, f"{where}.outputs[{k}]") for k, output in enumerate(outputs)]
    requests = for_references(prompt, references.texts, texts, wrapper=wrapper)
    return _Item(requests, references.duplicates if "references" in item else None)


def _score_reply(items: Sequence[_Item], model: str, wants_each: bool, scored: Scored) -> dict[str, Any]:
    """Per item and output: the mean over the references, and whether anything was cut against any of them."""
    rewards, cuts = iter(scored.rewards), iter(scored.truncated)
    each = [[list(islice(rewards, len(request.outputs))) for request in item.requests] for item in items]
    cut = [[list(islice(cuts, len(request.outputs))) for request in item.requests] for item in items]
    reply = {
        "model": model,
        "rewards": [mean_over_references(rows) for rows in each],
        "truncated": [[any(column) for column in zip(*rows, strict=True)] for rows in cut],
    }
    if wants_each:
        reply["per_reference"] = each
    if any(item.duplicates is not None for item in items):
        reply["duplicate_references"] = [item.duplicates or 0 for item in items]
    return reply


# --- Engines ---------------------------------------------------------------------------------------------------------


def read_pooling(body: dict[str, Any], settings: Settings) -> Question:
    """POST /pooling: vLLM's (one row, that of the reward token) or by `--pooling-shape` LMDeploy's (a bare number)."""
    _check_model(body, settings)
    asks = _inputs(body, "input", settings=settings)
    if settings.pooling_shape == "lmdeploy":  # it knows no activation
        return Question(asks, partial(_list_reply, "pool", settings.model, _bare_entry))
    entry = partial(_pooling_entry, _activation(body))
    return Question(asks, partial(_list_reply, "pool", settings.model, entry))


def read_classify(body: dict[str, Any], settings: Settings) -> Question:
    """POST /classify: SGLang's where the body has `text` or `input_ids`, vLLM's where it has `input`."""
    given = [field for field in ("text", "input_ids", "input") if body.get(field) is not None]
    if len(given) != 1:
        raise refusal("give exactly one of text or input_ids (SGLang's form) and input (vLLM's)")
    asks = _inputs(body, given[0], settings=settings)
    if given[0] != "input":
        if given[0] == "text" and not all(isinstance(entry, str) for entry in asks.inputs):
            raise refusal("text must be a string or a list of strings; token ids go into input_ids")
        if given[0] == "input_ids" and any(isinstance(entry, str) for entry in asks.inputs):
            raise refusal("input_ids must be a list of token ids or a list of such lists; texts go into text")
        return Question(asks, partial(_sglang_reply, asks.is_single))
    _check_model(body, settings)
    entry = partial(_classify_entry, _activation(body))
    return Question(asks, partial(_list_reply, "classify", settings.model, entry))


def _inputs(body: dict[str, Any], field: str, *, settings: Settings) -> Sequences:
    """A text, texts, a list of token ids, or lists of them."""
    value = body.get(field)
    if isinstance(value, str):
        return Sequences((value,), field, is_single=True)
    entries = _list(value, field)
    kinds = {type(entry) for entry in entries}
    if kinds == {int}:
        return Sequences((entries,), field, is_single=True)
    _check_count(len(entries), field, what="inputs", settings=settings)
    if kinds == {list}:
        for index, ids in enumerate(entries):
            if {type(id) for id in ids} != {int}:
                raise refusal(f"{field}[{index}] must be a non-empty list of whole numbers, token ids")
    elif kinds != {str}:
        raise refusal(f"{field} must be a text, a list of texts, a list of token ids or a list of such lists, unmixed")
    return Sequences(tuple(entries), field, is_single=False)


def _activation(body: dict[str, Any]) -> bool:
    """Whether vLLM would squash the reward: it does, unless it is told not to."""
    if body.get("encoding_format", "float") != "float":
        raise refusal("encoding_format must be float; other encodings are not served here")
    value = body.get("use_activation")
    if value is not None and not isinstance(value, bool):
        raise refusal(f"use_activation is {_kind(value)}; it must be true or false")
    return value is not False


def _list_reply(prefix: str, model: str, entry: Callable[[float], dict[str, Any]], scored: Scored) -> dict[str, Any]:
    num_tokens = sum(scored.lengths)
    return {
        "id": f"{prefix}-{secrets.token_hex(16)}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": i, **entry(reward)} for i, reward in enumerate(scored.rewards)],
        "usage": {
            "prompt_tokens": num_tokens,
            "total_tokens": num_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


def _pooling_entry(activation: bool, reward: float) -> dict[str, Any]:
    return {"object": "pooling", "data": [[sigmoid(reward) if activation else reward]]}


def _bare_entry(reward: float) -> dict[str, Any]:
    return {"object": "pooling", "data": reward}


def _classify_entry(activation: bool, reward: float) -> dict[str, Any]:
    return {"label": "LABEL_0", "probs": [sigmoid(reward) if activation else reward], "num_classes": 1}


def _sglang_reply(is_single: bool, scored: Scored) -> Any:
    """A list, or for a single text the object itself, as SGLang does."""
    replies = [
        {"embedding": [reward], "meta_info": {"id": secrets.token_hex(16), "prompt_tokens": length}}
        for reward, length in zip(scored.rewards, scored.lengths, strict=True)
    ]
    return replies[0] if is_single else replies


# --- OpenRLHF --------------------------------------------------------------------------------------------------------


def read_openrlhf(body: dict[str, Any], settings: Settings) -> Question:
    """POST /get_reward: the reference is the label, the output is the query without its prompt and end tokens."""
    columns = [_list(body.get(name), name) for name in ("query", "prompts", "labels")]
    if len({len(column) for column in columns}) != 1:
        sizes = ", ".join(map(str, map(len, columns)))
        raise refusal(f"query, prompts and labels have {sizes} entries; they must be as many")
    _check_count(len(columns[0]), "query", what="queries", settings=settings)
    requests = []
    for i, (query, prompt, label) in enumerate(zip(*columns, strict=True)):
        for name, value in (("query", query), ("prompts", prompt), ("labels", label)):
            if not isinstance(value, str) and not (name == "labels" and isinstance(value, list)):
                why = ", the reference, or a list of them; set OpenRLHF's label key" if name == "labels" else ""
                raise refusal(f"{name}[{i}] is {_kind(value)}; it must be a string{why}")
        references = label if isinstance(label, list) else [label]
        if not references or not all(isinstance(text, str) for text in references):
            raise refusal(f"labels[{i}] is a list; as one, it must have one reference or more, and strings alone")
        if not all(references):
            raise refusal(f"labels[{i}], the reference, is empty; OpenRLHF sends that without a label key: set it")
        if not query.startswith(prompt):
            raise refusal(f"query[{i}] does not begin with prompts[{i}], so the output in it cannot be told")
        texts = distinct_references(references).texts
        requests.append(for_references(prompt, texts, (without_end(query[len(prompt) :]),), wrapper=settings.wrapper))
    names = tuple(f"query[{i}]" for i, request in enumerate(requests) for _ in request)
    asks = Texts(tuple(each for request in requests for each in request), names)
    _check_count(asks.num_sequences, "query", what="queries, counted once for each reference", settings=settings)
    _check_text_bytes(asks.requests, "query", settings=settings)
    return Question(asks, partial(_openrlhf_reply, [len(request) for request in requests]))


def _openrlhf_reply(counts: Sequence[int], scored: Scored) -> dict[str, Any]:
    """`counts`: references of each query, whose rewards follow each other."""
    rewards, cuts = iter(scored.rewards), iter(scored.truncated)
    means = [mean_over_references([[next(rewards)] for _ in range(count)])[0] for count in counts]
    return {
        "rewards": means,
        "scores": [sigmoid(reward) for reward in means],
        "extra_logs": {"truncated": [float(any(list(islice(cuts, count)))) for count in counts]},
    }


# --- Pieces ----------------------------------------------------------------------------------------------------------


def sigmoid(reward: float) -> float:
    """1 / (1 + e^-reward), which overflows nowhere."""
    small = math.exp(-abs(reward))
    return (1.0 if reward >= 0 else small) / (1.0 + small)


def refusal(message: str) -> RequestError:
    return RequestError(422, "invalid_request", message)


def _check_model(body: dict[str, Any], settings: Settings) -> None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise refusal(f"model is {_kind(model)}; it must be a string")
    if model not in (None, settings.model):
        raise RequestError(404, "unknown_model", f"model: this server has {settings.model!r} only, or leave it out")


def _check_count(count: int, field: str, *, what: str, settings: Settings) -> None:
    if count > settings.max_items:
        raise refusal(f"{field} has {count} {what}; at most {settings.max_items} fit one request: send several")


def _check_text_bytes(requests: Sequence[ScoreRequest], field: str, *, settings: Settings) -> None:
    """A prompt is encoded once with the reference and once with each output, and all of that is in memory at a time."""
    size = sum((1 + len(request.outputs)) * len(request.prompt.encode()) for request in requests)
    if size > settings.max_text_bytes:
        raise refusal(
            f"{field}: {size} bytes of prompts, each counted once for its reference and once for each output; at most "
            f"{settings.max_text_bytes} fit one request: send fewer outputs or references, or shorten the prompt"
        )


def _only(body: dict[str, Any], known: Sequence[str], *, where: str) -> None:
    unknown = sorted(body.keys() - set(known))
    if unknown:
        raise refusal(f"{where}{unknown[0][:100]} is not known here; there are {', '.join(known)}")


def _list(value: Any, where: str) -> list:
    if not isinstance(value, list) or not value:
        found = "is missing" if value is None else "is empty" if value == [] else f"is {_kind(value)}"
        raise refusal(f"{where} {found}; it must be a non-empty list")
    return value


def _text(value: Any, where: str) -> str:
    if value is None:
        raise refusal(f"{where} is missing")
    try:
        return prompt_text(value)
    except TypeError as error:
        raise refusal(f"{where}: {error}") from None


def _kind(value: Any) -> str:
    """What a value is called in JSON; values themselves are not repeated."""
    names = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
