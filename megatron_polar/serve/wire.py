"""What travels between client and engine: the request for a batch of items, and the rewards in its reply.

| engine | request | reward of item i |
|---|---|---|
| vllm, internlm2 | `POST /pooling {"input": [ids], "use_activation": false}` | `data[i].data[-1][0]` |
| vllm, sequence-classification | `POST /classify`, the same body | `data[i].probs[0]` |
| sglang | `POST /classify {"input_ids": [ids]}`, or `text` | `[i].embedding[0]` |
| lmdeploy | `POST /pooling {"input": [ids]}` | `data[i].data`, a bare number |
| megatron-polar | `POST /v1/score {"items": [{"prompt", "reference", "outputs", "wrapper"?}]}` | `rewards[i][j]` |

Without `use_activation: false` vLLM would send the sigmoid of the reward. Whatever the engine, a reward may come as a
number, as a list of one number, or as one such list per token, of which the last counts; but from LMDeploy, which knows
no sigmoid to switch off, only as a number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from megatron_polar.convert.families import Layout
from megatron_polar.errors import UserError, printable

Engine = Literal["vllm", "sglang", "lmdeploy", "megatron-polar"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang", "lmdeploy", "megatron-polar")
END_TOKENS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<eos>")
"""What closes an answer in common chat formats; OpenRLHF hands answers over with it."""


@dataclass(frozen=True)
class RewardItem:
    """One output to be rewarded: texts, or lists of {"role", "content"} messages whose contents are joined by newlines.

    `reference` may be a list of references, each a text or such messages: the reward is the mean over them. `wrapper`
    says what stands between a prompt and what follows it: a newline ("sft") or nothing ("pretrain"). None is what the
    model was trained with, as far as its server or its export knows (else "sft").
    """

    prompt: str | list[dict]
    reference: str | list[dict] | list[str | list[dict]]
    output: str | list[dict]
    wrapper: str | None = None


@dataclass(frozen=True)
class ItemTexts:
    """An item as our own server takes it, which encodes the texts itself; it knows what to do without a wrapper."""

    prompt: str
    reference: str
    output: str
    wrapper: str | None


Content = np.ndarray | str | ItemTexts
"""What is sent of one item: int32 token ids [s], one whole text, or its texts."""


@dataclass(frozen=True)
class Encoded:
    """An item ready to be sent, and whether something of it had to be cut."""

    content: Content
    is_truncated: bool


@dataclass(frozen=True)
class Reply:
    """Rewards of a batch in the order of its items, and how many items the server says it had to cut."""

    rewards: tuple[float, ...]
    num_truncated: int = 0


class RewardError(UserError):
    """Rewards that could not be had. `indices` are the places of the items in what was asked, `reason` says why."""

    def __init__(self, indices: Sequence[int], reason: str):
        self.indices, self.reason = tuple(indices), reason
        first, more = self.indices[0], len(self.indices) - 1
        others = f" (and {more} more, up to item {max(self.indices)})" if more else ""
        super().__init__(f"no reward for item {first}{others}: {reason}")

    def __reduce__(self):
        return RewardError, (self.indices, self.reason)


class BadReply(Exception):
    """A reply that is not one finite reward per item; `position` is the item's place in the batch where one is at
    fault."""

    def __init__(self, reason: str, *, position: int | None = None):
        super().__init__(reason)
        self.position = position


def endpoint(engine: Engine, layout: Layout) -> str:
    """The path below the engine's base URL."""
    if engine == "vllm":
        return "/pooling" if layout == "internlm2" else "/classify"
    return {"sglang": "/classify", "lmdeploy": "/pooling", "megatron-polar": "/v1/score"}[engine]


def request_body(contents: Sequence[Content], *, engine: Engine, model: str | None) -> dict[str, Any]:
    """The JSON object that asks for the rewards of a batch; equal prompts and references in a row become one item."""
    if engine == "megatron-polar":
        body: dict[str, Any] = {"items": [_native_item(group) for group in _groups(contents)]}
    elif engine == "sglang":
        body = {"text" if isinstance(contents[0], str) else "input_ids": list(contents)}
    else:
        body = {"input": list(contents)}
    if engine == "vllm":
        body["use_activation"] = False
    return body if model is None else {"model": model, **body}


def read_reply(reply: Any, *, contents: Sequence[Content], engine: Engine) -> Reply:
    """Rewards out of an engine's decoded reply. Raises BadReply unless there is exactly one finite reward per item."""
    if engine == "megatron-polar":
        return _read_native(reply, contents)
    if engine == "sglang":
        entries, keys = reply if isinstance(reply, list) else [reply], ("embedding",)
    else:
        entries, keys = _field(reply, "data"), ("data", "probs")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadReply(f"not a list of objects with {' or '.join(keys)} (got {_brief(entries)})")
    if len(entries) != len(contents):
        raise BadReply(f"{len(entries)} rewards for {len(contents)} items")
    entries = _in_order(entries)
    if engine == "lmdeploy" and any(isinstance(entry.get("data"), list) for entry in entries):
        raise BadReply(
            "lists where LMDeploy sends bare numbers; is this vLLM? engine='lmdeploy' would get its sigmoids"
        )
    return Reply(tuple(_reward_of(entry, keys, position) for position, entry in enumerate(entries)))


def without_end(answer: str, end_tokens: Sequence[str] = END_TOKENS) -> str:
    """An answer of OpenRLHF's without the end tokens that it closes with."""
    while end := next((token for token in end_tokens if token and answer.rstrip().endswith(token)), None):
        answer = answer.rstrip().removesuffix(end)
    return answer


def _groups(contents: Sequence[ItemTexts]) -> list[list[ItemTexts]]:
    return [list(group) for _, group in groupby(contents, key=lambda item: (item.prompt, item.reference, item.wrapper))]


def _native_item(group: list[ItemTexts]) -> dict[str, Any]:
    first = group[0]
    outputs = [item.output for item in group]
    wrapper = {} if first.wrapper is None else {"wrapper": first.wrapper}
    return {"prompt": first.prompt, "reference": first.reference, "outputs": outputs, **wrapper}


def _read_native(reply: Any, contents: Sequence[ItemTexts]) -> Reply:
    wanted = [len(group) for group in _groups(contents)]
    found = []
    for key in ("rewards", "truncated"):
        values = _field(reply, key)
        if not isinstance(values, list) or not all(isinstance(row, list) for row in values):
            raise BadReply(f"{key!r} is not a list of lists (got {_brief(values)})")
        if [len(row) for row in values] != wanted:
            counts = f"{[len(row) for row in values]} instead of {wanted}"
            raise BadReply(f"wrong number of {key}: per item of the request {_brief(counts)}")
        found.append([value for row in values for value in row])
    rewards, truncated = found
    numbers = tuple(_number(value, position) for position, value in enumerate(rewards))
    return Reply(numbers, num_truncated=sum(map(bool, truncated)))


def _in_order(entries: list[dict]) -> list[dict]:
    """Sort by `index`, which either every entry has or none."""
    indices = [entry.get("index") for entry in entries]
    if all(index is None for index in indices):
        return entries
    for position in range(len(entries)):
        if position not in indices:
            raise BadReply(f"no entry has index {position} (found {_brief(indices)})", position=position)
    return sorted(entries, key=lambda entry: entry["index"])


def _reward_of(entry: dict, keys: Sequence[str], position: int) -> float:
    key = next((key for key in keys if key in entry), None)
    if key is None:
        raise BadReply(f"the entry has no {' or '.join(keys)} (found {_brief(sorted(entry))})", position=position)
    value = entry[key]
    if isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1]
    if isinstance(value, list):
        if len(value) != 1:
            raise BadReply(f"{len(value)} numbers where a reward model gives one; is it one?", position=position)
        value = value[0]
    return _number(value, position)


def _number(value: Any, position: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadReply(f"the reward is {_brief(value)}, no number", position=position)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadReply(f"the reward is {number}, not finite; do the model's activations overflow?", position=position)
    return number


def _field(reply: Any, key: str) -> Any:
    if not isinstance(reply, dict) or key not in reply:
        raise BadReply(f"no {key!r} in the reply (got {_brief(reply)})")
    return reply[key]


def _brief(value: Any) -> str:
    return printable(value if isinstance(value, str) else repr(value), limit=120)
