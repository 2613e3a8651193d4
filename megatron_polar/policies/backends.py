"""Where trajectories come from: the backends behind the `backend:` key of a pool, and their one interface."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_polar.policies.ngram import (
    MARKS,
    NgramModel,
    Truncation,
    continues_without_space,
    fit_ngram,
    join_words,
    split_words,
)

BACKENDS = ("embedded", "imitation", "http", "transformers")


class Policy(Protocol):
    """What `sample` needs of a backend: a name, and several trajectories for one prompt."""

    name: str

    def generate(self, prompt: str, *, num_trajectories: int, seed: int, wrapper: str) -> list[str]:
        """Draw trajectories; the result depends on the arguments and the policy alone, never on earlier calls."""
        ...


@dataclass(frozen=True)
class EmbeddedSpec:
    """A word n-gram policy as a pool describes it: all that is needed to fit it and to draw from it again.

    corpus_fraction is the share of the corpus's documents that it reads; after each word it utters one of its
    favourite_words with insertion_probability; a trajectory ends at the first full stop after min_words words and
    marks, and at max_words at the latest.
    """

    name: str
    seed: int
    order: int
    truncation: Truncation
    corpus_fraction: float
    favourite_words: tuple[str, ...]
    insertion_probability: float
    min_words: int
    max_words: int


def derived_seed(*parts: int | str) -> int:
    """Hash a path of names and numbers to a 64-bit seed, equal on every machine and Python version."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = str(part).encode("utf-8", errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)  # lengths keep ("ab", "c") apart from ("a", "bc")
    return int.from_bytes(digest.digest(), "little")


def choose(items: Sequence, count: int, rng: random.Random) -> list:
    """Choose `count` different items in random order, by `rng.random()` alone: the draw that Python never changes."""
    pool = list(items)
    for position in range(count):
        other = position + int(rng.random() * (len(pool) - position))
        pool[position], pool[other] = pool[other], pool[position]
    return pool[:count]


@dataclass(frozen=True)
class EmbeddedPolicy:
    """A fitted word n-gram policy with its habits."""

    spec: EmbeddedSpec
    model: NgramModel

    @property
    def name(self) -> str:
        return self.spec.name

    def generate(self, prompt: str, *, num_trajectories: int, seed: int, wrapper: str) -> list[str]:
        """Draw trajectories that continue `prompt`, each from its own seed: (pool seed, `seed`, policy, prompt, index).

        Under the wrapper "pretrain" a trajectory starts with the space that separates it from the prompt.
        """
        context = tuple(split_words(prompt)[-(self.spec.order - 1) :]) if self.spec.order > 1 else ()
        trajectories = []
        for index in range(num_trajectories):
            rng = random.Random(derived_seed("trajectory", self.spec.seed, seed, self.name, prompt, index))
            words = self._continue(context, rng)
            glued = wrapper != "pretrain" or continues_without_space(words[0]) or not prompt or prompt[-1].isspace()
            trajectories.append(join_words(words) if glued else " " + join_words(words))
        return trajectories

    def _continue(self, context: tuple[str, ...], rng: random.Random) -> list[str]:
        spec, uniform = self.spec, rng.random
        words: list[str] = []
        while len(words) < spec.max_words:
            word = self.model.next_word(context, uniform)
            words.append(word)
            context = (*context, word)[-2:]
            # A habit is an interjection: the sentence goes on as if it had not been said.
            if word not in MARKS and uniform() < spec.insertion_probability and spec.favourite_words:
                words.append(spec.favourite_words[int(uniform() * len(spec.favourite_words))])
            if word == "." and len(words) >= spec.min_words:
                break
        return words[: spec.max_words]


def fit_embedded(spec: EmbeddedSpec, documents: Sequence[Sequence[str]]) -> EmbeddedPolicy:
    """Fit the policy on its own share of `documents`, chosen by (pool seed, policy name)."""
    rng = random.Random(derived_seed("documents", spec.seed, spec.name))
    count = max(1, round(spec.corpus_fraction * len(documents)))
    share = sorted(choose(range(len(documents)), count, rng))
    model = fit_ngram([documents[index] for index in share], order=spec.order, truncation=spec.truncation)
    return EmbeddedPolicy(spec, model)
