"""Where prompts come from: openings of the pool's corpus, files of prompts, and prefixes of documents."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import orjson

from megatron_polar.data.lines import read_jsonl
from megatron_polar.data.template import prompt_text
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
    on_side = (words for words in _openings(pool.documents, pool.prompts) if prompt_side(words) == split)
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


def read_prompts(path: Path, *, limit: int | None) -> Iterator[str]:
    remedy = 'each line is an object with a "prompt": a text or a list of {"role", "content"} messages'
    count = 0
    for line_number, line in read_jsonl(path):
        if count == limit:
            return
        try:
            prompt = prompt_text(orjson.loads(line)["prompt"])
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            reason = "has no key `prompt`" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise UserError(f"{path}:{line_number}: {reason}; {remedy}") from None
        if not prompt.strip():
            raise UserError(f"{path}:{line_number}: the prompt is empty; {remedy}")
        count += 1
        yield prompt
    if count == 0 or (limit is not None and count < limit):
        wanted = "at least one is needed" if limit is None else f"num_prompts={limit} are asked for"
        raise UserError(f"{path}: holds {count} prompts, {wanted}; lower num_prompts or add lines")
