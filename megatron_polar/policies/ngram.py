"""Word n-gram language models: small real stochastic policies that need no network, no GPU and no download.

Text becomes lower-case words and the marks `. , ; :`. A model of order n continues a text by Witten-Bell back-off: from
the longest known context it steps back to a shorter one with probability T / (T + N) (T different followers seen N
times), and otherwise draws from that context's followers after temperature, top-k and top-p, in this order, as Hugging
Face does.
"""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from megatron_polar.errors import UserError

MAX_ORDER = 3
MARKS = frozenset(".,;:")

_WORDS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|[.,;:]")
_WORDS_PER_DOCUMENT = 400  # long texts are cut at paragraphs, so that policies can differ in what they have read
_MIN_WORDS_PER_PARAGRAPH = 8  # shorter ones are headings, grammar and code


def split_words(text: str) -> list[str]:
    """Split text into lower-case words and marks; digits, symbols and underscores are dropped."""
    return _WORDS.findall(text.lower())


def join_words(words: Sequence[str]) -> str:
    """Write words as text: one space between words, none before a mark."""
    return "".join(word if word in MARKS or not position else f" {word}" for position, word in enumerate(words))


def continues_without_space(word: str) -> bool:
    """Whether `word` follows a text directly (a mark) instead of after a space."""
    return word in MARKS


def split_documents(text: str) -> list[list[str]]:
    """Cut text into documents of at least 400 words (the last may be shorter), keeping only paragraphs of prose."""
    documents: list[list[str]] = [[]]
    for paragraph in re.split(r"\n\s*\n", text):
        words = split_words(paragraph)
        is_prose = sum(word not in MARKS for word in words) >= _MIN_WORDS_PER_PARAGRAPH and "." in words
        if not is_prose or "::=" in paragraph:
            continue
        if words[-1] not in MARKS:
            words.append(".")
        if len(documents[-1]) >= _WORDS_PER_DOCUMENT:
            documents.append([])
        documents[-1].extend(words)
    return [document for document in documents if document]


def read_documents(corpus: Sequence[Path] | None) -> list[list[str]]:
    """Read the words of text files, or of Python's own language reference (`pydoc_data.topics`) for None.

    Returns documents, each a list of words. UserError where a file is missing, is not UTF-8 or holds no prose.
    """
    if corpus is None:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    else:
        texts = [_read_text(path) for path in corpus]
    documents = [document for text in texts for document in split_documents(text)]
    if not documents:
        where = "pydoc_data.topics" if corpus is None else ", ".join(map(str, corpus))
        raise UserError(
            f"corpus: {where} holds no paragraph of {_MIN_WORDS_PER_PARAGRAPH} or more words with a full stop, so no "
            "policy can be fitted; name text files with prose"
        )
    return documents


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"corpus: {path}: a device, a pipe or a directory; name an existing text file or `pydoc`")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise UserError(f"corpus: {path}: {reason}; name an existing text file or `pydoc`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"corpus: {path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None


@dataclass(frozen=True)
class Truncation:
    """How a distribution is sharpened and cut before a draw; the defaults are the paper's (appendix D.1.1).

    temperature > 0 divides log-probabilities; top_k keeps the most probable words (0 keeps all); top_p keeps the
    smallest set of words that holds this much probability (1.0 keeps all).
    """

    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50


@dataclass(frozen=True)
class Distribution:
    """What may follow one context: words by falling probability, their cumulative probability, and P(step back)."""

    words: tuple[str, ...]
    cumulative: tuple[float, ...]
    back_off: float


def truncated_distribution(followers: dict[str, int], truncation: Truncation) -> Distribution:
    """Turn counts into the distribution that is drawn from: temperature, then top-k, then top-p, renormalised."""
    ranked = sorted(followers.items(), key=lambda item: (-item[1], item[0]))
    total = sum(followers.values())
    weights = [(count / ranked[0][1]) ** (1.0 / truncation.temperature) for _, count in ranked]
    if truncation.top_k:
        weights = weights[: truncation.top_k]
    mass = truncation.top_p * sum(weights)
    sums = list(accumulate(weights))
    # The word that crosses top_p stays; the small slack keeps a rounding error from admitting one more.
    kept = next((rank + 1 for rank, reached in enumerate(sums) if reached >= mass * (1 - 1e-12)), len(sums))
    words = tuple(word for word, _ in ranked[:kept])
    cumulative = tuple(reached / sums[kept - 1] for reached in sums[:kept])
    return Distribution(words, cumulative, len(followers) / (len(followers) + total))


@dataclass
class NgramModel:
    """Counts of one word after 0 .. order-1 words, and the truncated distributions drawn so far (a cache)."""

    order: int
    truncation: Truncation
    followers: dict[tuple[str, ...], dict[str, int]]
    _distributions: dict[tuple[str, ...], Distribution] = field(default_factory=dict, repr=False)

    def next_word(self, context: tuple[str, ...], uniform: Callable[[], float], *, settled: int = 0) -> str:
        """Draw the word after `context` (its last order-1 words count); `uniform` returns numbers in [0, 1).

        A known context of at most `settled` words is never stepped back from.
        """
        context = context[len(context) - min(len(context), self.order - 1) :]
        while True:
            distribution = self._distributions.get(context)
            if distribution is None and context in self.followers:
                distribution = truncated_distribution(self.followers[context], self.truncation)
                self._distributions[context] = distribution
            if distribution is not None and (len(context) <= settled or uniform() >= distribution.back_off):
                rank = bisect_right(distribution.cumulative, uniform(), hi=len(distribution.words) - 1)
                return distribution.words[rank]
            context = context[1:]


def fit_ngram(documents: Sequence[Sequence[str]], *, order: int, truncation: Truncation | None = None) -> NgramModel:
    """Count every 1- .. order-gram of `documents` (lists of words); contexts never span two documents."""
    if not 1 <= order <= MAX_ORDER:
        raise UserError(f"order={order} is not an n-gram order that is offered; use 1 to {MAX_ORDER}")
    followers: dict[tuple[str, ...], dict[str, int]] = {}
    for length in range(1, order + 1):
        grams: Counter = Counter()
        for document in documents:
            grams.update(zip(*(document[offset:] for offset in range(length)), strict=False))
        by_context: defaultdict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
        for gram, count in grams.items():
            by_context[gram[:-1]][gram[-1]] = count
        followers.update(by_context)
    return NgramModel(order, truncation or Truncation(), followers)
