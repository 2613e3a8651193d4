"""THE POLAR text and its token form, used by train, score and serve alike.

    [BOS] prompt [newline] reference <|reward|> prompt [newline] candidate [R]

[R] is the reward token, at whose position the model's score is read. The half before the separator and the half after
it are each encoded as one joined text, so that ids equal those of the whole text with its control tokens active.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_polar.errors import UserError

WRAPPERS = ("sft", "pretrain")

POLAR_RESPONSE_TOKENS = 4096
"""Tokens kept of an answer by POLAR's fine-tuning and its client (pre-training: 5120)."""
EXPORTED_SEQUENCE_LENGTH, EXPORTED_RESPONSE_LENGTH = "polar_max_sequence_length", "polar_max_response_length"
"""Keys of our own in an export's config.json: where texts were cut in training, in tokens."""
EXPORTED_WRAPPER, EXPORTED_TOKENIZER = "polar_wrapper", "polar_tokenizer"
"""Likewise: what joined prompts and answers in training, and the fingerprint of the tokenizer."""
# POLAR reserves four places: BOS, separator, reward token and one to spare.
_RESERVED_TOKENS = 4


class TextCodec(Protocol):
    """What the template needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class ControlTokens:
    """Ids that structure a comparison; `bos_id` is None for a tokenizer that starts texts without one."""

    bos_id: int | None
    separator_id: int
    reward_id: int
    pad_id: int


@dataclass(frozen=True)
class Half:
    """Tokens of prompt + trajectory as one text; the prompt alone has `prompt_length` tokens.

    `response_tokens_cut` counts what fell off the trajectory's end; halves read from a corpus have 0 here, their
    manifest holds the sum.
    """

    ids: np.ndarray
    prompt_length: int
    response_tokens_cut: int


@dataclass(frozen=True)
class TokenizedComparison:
    """A prefix shared by all candidates and what follows it for each, ending with the reward token.

    `prefix` is int32 [p], `candidates[i]` int32 [c_i] with c_i >= 1. `levels[i]` ranks candidate i, 0 = best; equal
    levels are not ordered against each other. `prompt_tokens_cut` tokens were taken from the prompt's head in every
    half. `policies` are those of the reference and of every candidate, in the numbering of the ComparisonDataset; ()
    where candidates are ranked for what they say.
    """

    prefix: np.ndarray
    candidates: tuple[np.ndarray, ...]
    levels: tuple[int, ...]
    prompt_tokens_cut: int
    policies: tuple[int, ...] = ()


def fitting_response_length(max_response_length: int, max_sequence_length: int) -> int:
    """Tokens of an answer to keep so that two of them fit beside the control tokens.

    Joined to a prompt, an answer may gain some: the newline, and six where the cut left three bytes of a character,
    each of which decodes to a replacement character of three bytes; a few more in case its words are cut otherwise.
    """
    gain = 1 + 6 + 3
    return max(1, min(max_response_length, (max_sequence_length - _RESERVED_TOKENS) // 2 - gain))


def prompt_text(messages_or_str: Any) -> str:
    """Return the text of a prompt or answer: itself, or a message list's contents joined by newlines, roles dropped.

    Raises TypeError for anything else. Source: POLAR's reward client (no chat template).
    """
    if isinstance(messages_or_str, str):
        return messages_or_str
    if not isinstance(messages_or_str, list) or not messages_or_str:
        raise TypeError('give a string or a list of {"role", "content"} messages')
    contents = [message.get("content") if isinstance(message, dict) else None for message in messages_or_str]
    if not all(isinstance(content, str) for content in contents):
        raise TypeError('every message of a list needs a "content" string')
    return "\n".join(contents)


def exported_wrapper(config: Mapping[str, Any], *, where: str) -> str:
    """What the model of a config.json was trained with; "" where that is not said. Raises UserError."""
    wrapper = config.get(EXPORTED_WRAPPER, "")
    if wrapper not in ("", *WRAPPERS):
        raise UserError(f"{where}: {EXPORTED_WRAPPER} is {wrapper!r:.60}; use one of {', '.join(WRAPPERS)}")
    return wrapper


def check_exported_tokenizer(config: Mapping[str, Any], fingerprint: str, *, where: str) -> None:
    """Raise UserError where a config.json names another tokenizer than the one that lies beside it."""
    made_with = config.get(EXPORTED_TOKENIZER, fingerprint)
    if made_with != fingerprint:
        raise UserError(
            f"{where}: the tokenizer here is {fingerprint[:12]}, and config.json says that the model was trained with "
            f"{made_with!s:.12}, so texts would get other ids; restore the tokenizer's files, or export the model again"
        )


def join_text(*, prompt: str, trajectory: str, wrapper: str) -> str:
    """Join a prompt and a trajectory as POLAR does: a newline between them for "sft", nothing for "pretrain".

    An empty trajectory follows without a newline, as in POLAR's training code.
    """
    if wrapper not in WRAPPERS:
        raise UserError(f"wrapper={wrapper!r} is unknown; use one of {', '.join(WRAPPERS)}")
    return prompt + ("\n" if wrapper == "sft" and trajectory else "") + trajectory


def encode_half(
    tokenizer: TextCodec,
    *,
    prompt: str,
    trajectory: str,
    wrapper: str,
    max_response_length: int,
    prompt_length: int | None = None,
) -> Half:
    """Encode prompt and trajectory as one text; a trajectory above `max_response_length` tokens keeps its head.

    The cut is made as published: encode, cut, decode, encode the joined text. Give `prompt_length` where it is known,
    to save encoding the prompt again for every trajectory of a group.
    """
    ids = tokenizer.encode(join_text(prompt=prompt, trajectory=trajectory, wrapper=wrapper))
    cut = 0
    # Encoding the trajectory alone would double the work. Its tokens differ from those within the joined text around
    # the boundary only, so it cannot exceed the limit when the whole text stays below half of it.
    if 2 * len(ids) > max_response_length:
        alone = tokenizer.encode(trajectory)
        cut = max(0, len(alone) - max_response_length)
        if cut:
            trajectory = tokenizer.decode(alone[:max_response_length])
            ids = tokenizer.encode(join_text(prompt=prompt, trajectory=trajectory, wrapper=wrapper))
    if prompt_length is None:
        prompt_length = len(tokenizer.encode(prompt))
    ids = np.asarray(ids, dtype=np.int32)
    # A merge over the boundary can make the joined text shorter than the prompt alone.
    return Half(ids=ids, prompt_length=min(prompt_length, len(ids)), response_tokens_cut=cut)


def assemble_comparison(
    reference: Half, candidates: Sequence[Half], *, levels: Sequence[int], control: ControlTokens, max_length: int
) -> TokenizedComparison:
    """Build [bos] reference half [separator] candidate half [reward] per candidate and split off the common prefix.

    Where a sequence would exceed `max_length` tokens the prompt's tail is kept, the same in every half: the budget is
    (max_length - 4 - reference - candidate) // 2 tokens, the smallest over the candidates, where a length counts all of
    a half but its prompt (the newline included). A budget <= 0 keeps no prompt token. Raises UserError when even that
    is too long. Source: POLAR's reward client and training code.
    """
    if not candidates or len(candidates) != len(levels):
        raise ValueError(
            f"{len(candidates)} candidates with {len(levels)} levels: need one level each, at least one candidate"
        )
    longest = max(len(half.ids) - half.prompt_length for half in candidates)
    reference_length = len(reference.ids) - reference.prompt_length
    room = max_length - _RESERVED_TOKENS - reference_length - longest
    budget = max(0, room // 2)
    cut = max(0, max(half.prompt_length for half in (reference, *candidates)) - budget)
    if room < 0:
        raise UserError(
            f"a reference of {reference_length} and a candidate of {longest} tokens do not fit max_length={max_length} "
            "even without the prompt; raise max_length or preprocess with a smaller max_response_length"
        )
    head = [] if control.bos_id is None else [control.bos_id]
    head = np.concatenate([_ids(head), _drop_head(reference, cut), _ids([control.separator_id])])
    reward = _ids([control.reward_id])
    tails = [np.concatenate([_drop_head(half, cut), reward]) for half in candidates]
    shared = _common_prefix(tails)
    return TokenizedComparison(
        prefix=np.concatenate([head, tails[0][:shared]]),
        candidates=tuple(tail[shared:] for tail in tails),
        levels=tuple(levels),
        prompt_tokens_cut=cut,
    )


def _ids(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def _drop_head(half: Half, count: int) -> np.ndarray:
    return half.ids[min(count, half.prompt_length) :]


def _common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest common prefix that leaves at least one token of every sequence."""
    limit = min(len(sequence) for sequence in sequences) - 1
    for other in sequences[1:]:
        different = np.flatnonzero(sequences[0][:limit] != other[:limit])
        limit = int(different[0]) if len(different) else limit
    return limit
