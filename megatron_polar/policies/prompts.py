"""Where prompts come from: openings of the pool's corpus, files of prompts, and prefixes of documents."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from megatron_polar.data.lines import read_jsonl
from megatron_polar.data.template import prompt_text
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.policies.backends import choose, derived_seed
from megatron_polar.policies.ngram import MARKS, join_words
from megatron_polar.policies.pool import Pool, PromptRule

_HELD_OUT_ONE_IN = 10
_SPLIT_WORDS = 3  # a prompt's side is decided by its first words, so that one opening is never on both sides


def prompt_side(words: Sequence[str]) -> Literal["train", "heldout"]:
    """Say on which side a drawn prompt is, by its first three words alone: no pool and no seed can move it."""
    return "heldout" if derived_seed("split", *words[:_SPLIT_WORDS]) % _HELD_OUT_ONE_IN == 0 else "train"


def draw_prompts(pool: Pool, *, num_prompts: int | None, split: Literal["train", "heldout"], seed: int) -> list[str]:
    """Draw different openings of sentences and clauses of the pool's corpus, all on one side of the split.

    UserError where num_prompts is None or above the number of different openings.
    """
    if num_prompts is None:
        raise UserError(
            "--num-prompts is missing: say how many prompts to draw from the pool's corpus, or give a file: --prompts"
        )
    on_side = (words for words in _openings(pool.read_corpus(), pool.prompts) if prompt_side(words) == split)
    openings = sorted(set(map(join_words, on_side)))
    if num_prompts > len(openings):
        raise UserError(
            f"num_prompts={num_prompts} is above the {len(openings)} different {split} prompts in the corpus of "
            f"{pool.path}; lower it, name a larger corpus or widen prompts.min_words .. prompts.max_words"
        )
    return choose(openings, num_prompts, random.Random(derived_seed("prompts", seed)))


def _openings(documents: Sequence[Sequence[str]], rule: PromptRule) -> Iterator[Sequence[str]]:
    for document in documents:
        for start, word in enumerate(document):
            if word in MARKS or (start and document[start - 1] not in MARKS):
                continue
            for length in range(rule.min_words, min(rule.max_words, len(document) - start) + 1):
                yield document[start : start + length]


class Prompt(NamedTuple):
    """The text that trajectories belong to, and the messages that it was given as, for policies that chat."""

    text: str
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Wanted:
    """Which prompts: those of a file, prefixes of documents, or, without either, openings of the pool's corpus.

    tokenizer: counts the tokens of prefixes; None counts words.
    """

    prompts: Path | None
    documents: Path | None
    num_prompts: int | None
    split: Literal["train", "heldout"]
    tokenizer: Path | None
    max_prefix_tokens: int


def find_prompts(wanted: Wanted, pool: Pool, *, seed: int) -> list[Prompt]:
    """Read, cut or draw the prompts. Raises UserError for bad input, too little of it, and two kinds at once."""
    if wanted.documents is None:
        if wanted.tokenizer is not None:
            raise UserError("--tokenizer counts the tokens of prefixes: give --documents, or leave it out")
        if wanted.prompts is not None:
            return list(read_prompts(wanted.prompts, limit=wanted.num_prompts))
        texts = draw_prompts(pool, num_prompts=wanted.num_prompts, split=wanted.split, seed=seed)
        return [Prompt(text) for text in texts]
    if wanted.prompts is not None:
        raise UserError("--prompts and --documents exclude each other: prompts come from one place")
    if wanted.max_prefix_tokens < 1:
        raise UserError(f"max_prefix_tokens={wanted.max_prefix_tokens} is too small; use 1 or more")
    codec = None if wanted.tokenizer is None else load_tokenizer(wanted.tokenizer)
    limit, most = wanted.num_prompts, wanted.max_prefix_tokens
    return [
        Prompt(text) for text in cut_prefixes(wanted.documents, limit=limit, seed=seed, codec=codec, max_tokens=most)
    ]


def read_prompts(path: Path, *, limit: int | None) -> Iterator[Prompt]:
    """Read the first `limit` prompts of a JSONL file (all for None). Raises UserError with the line of a bad one."""
    remedy = 'each line is an object with a "prompt": a text or a list of {"role", "content"} messages'
    count = 0
    for line_number, line in read_jsonl(path):
        if count == limit:
            return
        try:
            given = orjson.loads(line)["prompt"]
            prompt = Prompt(prompt_text(given), _messages(given))
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            reason = "has no key `prompt`" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise UserError(f"{path}:{line_number}: {reason}; {remedy}") from None
        if not prompt.text.strip():
            raise UserError(f"{path}:{line_number}: the prompt is empty; {remedy}")
        count += 1
        yield prompt
    if count == 0 or (limit is not None and count < limit):
        if limit is None:
            raise UserError(f"{path}: holds no prompts; add lines")
        raise UserError(
            f"{path}: holds {count} prompts, and --num-prompts asks for {limit}; ask for fewer or add lines"
        )


def _messages(given: Any) -> tuple[tuple[str, str], ...]:
    """(role, content) of a list of messages; who says no role is the user."""
    if isinstance(given, str):
        return ()
    return tuple((str(message.get("role", "user")), message["content"]) for message in given)


# --- prefixes of documents -------------------------------------------------------------------------------------------

_CHARACTERS_PER_TOKEN = 16  # more than any text needs; what lies behind is not tokenized


class Codec(Protocol):
    """What cutting needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


def cut_prefixes(
    path: Path, *, limit: int | None, seed: int, codec: Codec | None = None, max_tokens: int = 1024
) -> Iterator[str]:
    """Yield beginnings of documents, the paper's prompts for base models: 1 to `max_tokens` tokens, uniformly (D.1.1).

    `path`: JSONL with a key `text`, or a directory of such files. Without a codec, words are counted. A document leaves
    at least its last token to the policies; one that is empty, or whose prefix was there before, gives none. Raises
    UserError for bad lines and where there are fewer than `limit`.
    """
    remedy = 'each line is an object with a "text": a document'
    seen: set[int] = set()
    for place, (line_number, line) in enumerate(read_jsonl(path)):
        if len(seen) == limit:
            return
        try:
            text = orjson.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError("`text` is no string")
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            reason = "has no key `text`" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise UserError(f"{path}:{line_number}: {reason}; {remedy}") from None
        rng = random.Random(derived_seed("prefix", seed, place))
        prefix = _cut(text.lstrip().replace("\0", ""), rng.random(), codec=codec, max_tokens=max_tokens)
        if prefix.strip() and (key := derived_seed(prefix)) not in seen:
            seen.add(key)
            yield prefix
    if not seen or (limit is not None and len(seen) < limit):
        wanted = "at least one is needed" if limit is None else f"num_prompts={limit} are asked for"
        raise UserError(f"{path}: gives {len(seen)} different prefixes, {wanted}; lower num_prompts or add documents")


def _cut(text: str, uniform: float, *, codec: Codec | None, max_tokens: int) -> str:
    """The first tokens (words for None) of a text; `uniform` in [0, 1) says how many."""
    if codec is None:
        ends = [found.end() for found in islice(re.finditer(r"\S+", text), max_tokens + 1)]
        most = min(max_tokens, len(ends) - 1)
        return text[: ends[int(uniform * most)]] if most > 0 else ""
    ids = codec.encode(text[: _CHARACTERS_PER_TOKEN * max_tokens])
    most = min(max_tokens, len(ids) - 1)
    # A token may hold a part of a character, which decoding shows as U+FFFD.
    return codec.decode(ids[: 1 + int(uniform * most)]).rstrip("\ufffd") if most > 0 else ""
