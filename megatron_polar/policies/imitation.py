"""Policies that imitate a model from its published answers: n-gram models with a cache, no network, no weights.

A fitted policy mixes two n-gram models of the model's own answers: one of all that it wrote (its style), one of its
answer to this very prompt (its content), as a cache language model does (Kuhn and De Mori 1990). Tokens are verbatim:
case, digits, marks and white space stay, so that lists, headings and numbers look as the model wrote them.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_polar.data.lines import read_jsonl
from megatron_polar.data.template import prompt_text
from megatron_polar.errors import UserError
from megatron_polar.policies.backends import choose, derived_seed
from megatron_polar.policies.keys import TEXT, WORD, check_section, integer, number
from megatron_polar.policies.ngram import MAX_ORDER, NgramModel, Truncation, fit_ngram

START, END = "\x02", "\x03"
"""Around every answer: where it begins and ends is learnt like words are."""

_TOKENS = re.compile(r"\s*(?:[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+|[^\w\s]|_)")
_REMEDY = (
    'each line is {"prompt": text or messages, "text": the answer}, and `"heard": false` where it is not to be read'
)
_KEYS = {
    "name": WORD,
    "backend": TEXT,
    "answers": TEXT,
    "order": integer(3, 2, MAX_ORDER),
    "temperature": number(1.0, 0, 10, open_low=True),
    "top_p": number(0.9, 0, 1, open_low=True),
    "top_k": integer(50, 0),
    "corpus_fraction": number(0.5, 0, 1, open_low=True),
    "fidelity": number(0.5, 0, 1),
    "max_words": integer(48, 1),
}
_SHARED = ("top_p", "top_k", "corpus_fraction", "max_words")
"""Keys of the pool's `sampling` section that such a policy takes over."""


def split_tokens(text: str) -> list[str]:
    """Split text into words, numbers and marks, each with the white space before it: joined, they are the text."""
    return _TOKENS.findall(text)


@dataclass(frozen=True)
class ImitationSpec:
    """An imitation as a pool describes it.

    answers: JSONL with the model's answers; its hash counts, its place does not. corpus_fraction: share of the answers
    that are read for the style. fidelity: probability of following the answer to the prompt at hand where it says how
    to go on, instead of the style. A trajectory ends where an answer would, and at max_words tokens at the latest.
    """

    name: str
    seed: int
    answers: str
    answers_sha256: str
    order: int
    truncation: Truncation
    corpus_fraction: float
    fidelity: float
    max_words: int

    def identity(self) -> dict:
        """What trajectories depend on, for the settings of an output."""
        return {"backend": "imitation"} | {name: value for name, value in asdict(self).items() if name != "answers"}


def read_imitation(
    entry: dict[str, Any], sampling: dict[str, Any], *, seed: int, directory: Path, where: str
) -> ImitationSpec:
    """Check and complete an entry of `policies:` that names `answers` (relative to `directory`). Raises UserError."""
    defaults = {name: sampling[name] for name in _SHARED if name in sampling}
    keys = {name: key._replace(default=defaults.get(name, key.default)) for name, key in _KEYS.items()}
    policy = check_section({"backend": "imitation"} | entry, keys, where=where)
    path = directory / policy["answers"]
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise UserError(f"{where}: answers: {path}: {reason}; name a JSONL file, {_REMEDY}") from None
    return ImitationSpec(
        name=policy["name"],
        seed=seed,
        answers=str(path),
        answers_sha256=digest,
        order=policy["order"],
        truncation=Truncation(float(policy["temperature"]), float(policy["top_p"]), policy["top_k"]),
        corpus_fraction=float(policy["corpus_fraction"]),
        fidelity=float(policy["fidelity"]),
        max_words=policy["max_words"],
    )


@dataclass(frozen=True)
class ImitationPolicy:
    """A fitted imitation: the n-grams of its style, and every prompt's answer for its content."""

    spec: ImitationSpec
    style: NgramModel
    answers: dict[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        return self.spec.name

    def generate(self, prompt: str, *, num_trajectories: int, seed: int, wrapper: str) -> list[str]:
        """Draw trajectories, each from its own seed: (pool seed, `seed`, policy, prompt, index).

        A prompt without an answer among the model's is answered from its style alone. Under the wrapper "pretrain" a
        trajectory starts with the white space that separates it from the prompt.
        """
        answer = self.answers.get(prompt)
        content = None if answer is None else fit_ngram([answer], order=self.spec.order, truncation=Truncation())
        trajectories = []
        for index in range(num_trajectories):
            rng = random.Random(derived_seed("trajectory", self.spec.seed, seed, self.name, prompt, index))
            text = "".join(self._draw(content, rng)).strip()
            apart = wrapper == "pretrain" and bool(prompt) and not prompt[-1].isspace()
            trajectories.append("\n" + text if apart else text)
        return trajectories

    def _draw(self, content: NgramModel | None, rng: random.Random) -> list[str]:
        """Tokens until the end of the answer; never none, so that no trajectory is empty."""
        spec, uniform = self.spec, rng.random
        words: list[str] = []
        context: tuple[str, ...] = (START,)
        while len(words) < spec.max_words:
            if content is not None and context[-1:] in content.followers and uniform() < spec.fidelity:
                word = content.next_word(context, uniform, settled=MAX_ORDER)
            else:
                word = self.style.next_word(context, uniform, settled=1)
            if word in (START, END):  # drawn behind nothing at all, they say nothing
                if words:
                    break
                continue
            words.append(word)
            context = (*context, word)[-(MAX_ORDER - 1) :]
        return words


def fit_imitation(spec: ImitationSpec) -> ImitationPolicy:
    """Fit the policy: its style on its own share of the answers that are heard, chosen by (pool seed, policy name).

    Raises UserError with the line for an answer that cannot be read, and where no answer is left to learn from.
    """
    answers, heard = read_answers(Path(spec.answers))
    rng = random.Random(derived_seed("documents", spec.seed, spec.name))
    count = max(1, round(spec.corpus_fraction * len(heard)))
    share = sorted(choose(range(len(heard)), count, rng))
    style = fit_ngram([heard[index] for index in share], order=spec.order, truncation=spec.truncation)
    return ImitationPolicy(spec, style, answers)


def read_answers(path: Path) -> tuple[dict[str, tuple[str, ...]], Sequence[tuple[str, ...]]]:
    """Read a model's answers: tokens of the answer to each prompt, and those that style is learnt from.

    Lines with `"heard": false` are for their own prompt alone: answers to held-out prompts, whose text must not get
    into other trajectories.
    """
    answers: dict[str, tuple[str, ...]] = {}
    heard = []
    for number_of_line, line in read_jsonl(path):
        try:
            found = orjson.loads(line)
            prompt, text, is_heard = prompt_text(found["prompt"]), found["text"], found.get("heard", True)
            tokens = tuple(split_tokens(text.replace(START, "").replace(END, "")))
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}:{number_of_line}: cannot be read ({error!r}); {_REMEDY}") from None
        if not tokens:
            continue  # a model may have answered nothing
        answers[prompt] = (START, *tokens, END)
        if is_heard:
            heard.append(answers[prompt])
    if not heard:
        raise UserError(f"{path}: no answer in it that may be read; {_REMEDY}")
    return answers, heard
