"""What is asked, in tokens: texts cut as in training; whole POLAR sequences as they are, with shared prefixes found."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from megatron_polar.data.template import Half, assemble_comparison
from megatron_polar.errors import UserError
from megatron_polar.score.requests import ScoreRequest
from megatron_polar.score.scorer import HalfMemo, Scorer, TokenizedRequest
from megatron_polar.serve.shapes import RequestError, Sequences, Texts, refusal


def tokenize(scorer: Scorer, asks: Texts | Sequences) -> TokenizedRequest:
    """Turn a request into comparisons; all its outputs, or inputs, are counted through.

    Raises RequestError (422), which names the field.
    """
    if isinstance(asks, Texts):
        return _tokenize_texts(scorer, asks)
    return _tokenize_sequences(scorer, asks)


def _tokenize_texts(scorer: Scorer, asks: Texts) -> TokenizedRequest:
    memo = scorer.memo()
    done = [
        _cut(scorer, request, where=name, memo=memo) for request, name in zip(asks.requests, asks.names, strict=True)
    ]
    first = np.cumsum([0, *(len(request.comparisons) for request in done)]).tolist()
    return TokenizedRequest(
        comparisons=tuple(comparison for request in done for comparison in request.comparisons),
        places=tuple((first[i] + number, k) for i, request in enumerate(done) for number, k in request.places),
        truncated=tuple(cut for request in done for cut in request.truncated),
    )


def _cut(scorer: Scorer, request: ScoreRequest, *, where: str, memo: HalfMemo) -> TokenizedRequest:
    try:
        return scorer.tokenize(request, memo=memo)
    except UserError as error:
        raise refusal(f"{where}: {error}") from None


def _tokenize_sequences(scorer: Scorer, asks: Sequences) -> TokenizedRequest:
    """Sequences with the same prompt and reference become one comparison, so that these are computed once."""
    encode = cache(scorer.tokenizer.encode)
    numbers: dict[bytes, int] = {}
    groups: list[tuple[Half, list[Half]]] = []
    places: list[tuple[int, int]] = []
    for index, entry in enumerate(asks.inputs):
        where = asks.name(index)
        split = _split_text(scorer, entry, encode=encode, where=where) if isinstance(entry, str) else None
        reference, candidate = split or _split_ids(scorer, entry, where=where)
        _check_length(scorer, reference, candidate, where=where)
        number = numbers.setdefault(reference.ids.tobytes(), len(groups))
        if number == len(groups):
            groups.append((reference, []))
        places.append((number, len(groups[number][1])))
        groups[number][1].append(candidate)
    comparisons = tuple(
        assemble_comparison(
            reference,
            candidates,
            levels=(0,) * len(candidates),
            control=scorer.control,
            max_length=2 * scorer.config.data.max_sequence_length,  # their lengths are known to fit: nothing is cut
        )
        for reference, candidates in groups
    )
    return TokenizedRequest(comparisons, tuple(places), (False,) * len(places))


def _check_length(scorer: Scorer, reference: Half, candidate: Half, *, where: str) -> None:
    control_tokens = 2 + (scorer.control.bos_id is not None)
    length, longest = len(reference.ids) + len(candidate.ids) + control_tokens, scorer.config.data.max_sequence_length
    if length > longest:
        raise RequestError(
            422,
            "too_long",
            f"{where} has {length} tokens and the model takes {longest}; shorten it, or use POST /v1/score, which cuts "
            f"as training does",
        )


def _split_text(scorer: Scorer, text: str, *, encode: Callable[[str], list[int]], where: str) -> tuple[Half, Half]:
    """The halves of a POLAR text whose control tokens are active; other special tokens in it stay text."""
    separator, reward = scorer.tokenizer.separator_token, scorer.tokenizer.reward_token
    if not text.endswith(reward):
        raise refusal(f"{where} does not end with {reward}, the reward token")
    if text.count(reward) > 1:
        raise refusal(f"{where} has {reward}, the reward token, within it; only its end may have it")
    halves = text.removesuffix(reward).split(separator)
    if len(halves) != 2:
        raise refusal(f"{where} has {len(halves) - 1} times {separator}, the separator; it must have it once")
    try:
        return _half(encode(halves[0])), _half(encode(halves[1]))
    except UserError as error:
        raise refusal(f"{where}: {error}") from None


def _split_ids(scorer: Scorer, ids: Sequence[int], *, where: str) -> tuple[Half, Half]:
    control, size = scorer.control, scorer.tokenizer.vocab_size
    if not (min(ids) >= 0 and max(ids) < size):
        raise refusal(f"{where} has ids outside of the vocabulary, 0 to {size - 1}")
    if ids[-1] != control.reward_id:
        raise refusal(f"{where} does not end with {control.reward_id}, the id of the reward token")
    if ids.count(control.reward_id) > 1:
        raise refusal(f"{where} has {control.reward_id}, the id of the reward token, within it; only its end may")
    if control.bos_id is not None and ids[0] != control.bos_id:
        raise refusal(f"{where} does not begin with {control.bos_id}, the id of BOS")
    if ids.count(control.separator_id) != 1:
        found = ids.count(control.separator_id)
        raise refusal(f"{where} has {found} times {control.separator_id}, the separator's id; it must have it once")
    middle = ids.index(control.separator_id)
    return _half(ids[control.bos_id is not None : middle]), _half(ids[middle + 1 : -1])


def _half(ids: Sequence[int]) -> Half:
    return Half(np.asarray(ids, dtype=np.int32), prompt_length=0, response_tokens_cut=0)
