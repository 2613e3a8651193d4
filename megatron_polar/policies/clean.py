"""What is done to answers before they become trajectories: loops, cut-off endings, duplicates. Pure functions.

As in the paper (appendix D.1.1): repetition loops are truncated but stay loop-like, since a policy that loops is to be
told from one that does not; incomplete endings are truncated. It names no method for duplicates; ours is MinHash.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

_LONGEST_UNIT = 1000  # characters of what a loop repeats
_SHINGLE_WORDS = 3
_PERMUTATIONS = 128
_NUMBER_OF_ITEM = re.compile(r"[ \t]*\d{1,3}\.")
"""The number of an item of a list is no sentence."""
_ABBREVIATION = re.compile(r"(?<![^\W_])(?:Mrs?|Ms|Dr|Prof|St|Mt|vs|cf|ca|approx|Figs?|Eqs?|Vol|pp|e\.g|i\.e|[A-Z])\.$")
"""Nor does one of these mostly end one: English titles, initials and the commonest of texts on facts."""
_SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’»)\]*_`]*(?=\s|$)|[。！？]|\n(?=\s*\S)|```(?=\s|$)")


@dataclass(frozen=True)
class Cleaning:
    """loop_repeats: so often a text must repeat its end to be a loop, and so often the loop is kept (0: loops stay).

    loop_characters: a loop is at least so long. cut_off: an ending at max_tokens is cut back to the last sentence that
    is whole, kept, or the trajectory is dropped. near_duplicates: estimated Jaccard similarity of word 3-grams from
    which an answer to the same prompt counts as one that was there before (0: only equal texts do).
    """

    loop_repeats: int = 4
    loop_characters: int = 100
    cut_off: Literal["trim", "keep", "drop"] = "trim"
    near_duplicates: float = 0.9


class Draft(NamedTuple):
    """An answer on its way to a trajectory; is_cut_off: it ended at max_tokens."""

    policy: str
    text: str
    is_cut_off: bool = False


class Cleaned(NamedTuple):
    """A text, and what was done to it: "" or "loop", "trimmed", "cut_off" (kept as it was), "dropped"."""

    text: str
    done: str


class Duplicate(NamedTuple):
    """Places of a draft that goes and of the earlier one that it repeats; is_exact: letter for letter."""

    place: int
    of: int
    is_exact: bool


def truncate_loop(text: str, *, repeats: int, characters: int) -> str:
    """Cut a loop at the end of `text` to its first `repeats` rounds, or more until it has `characters`; else `text`.

    A loop is a shortest unit of up to 1,000 characters that the text repeats to its end, the last time perhaps in part.
    What is left still is a loop by the same measure, so truncating twice changes nothing.
    """
    stripped = text.rstrip()
    if len(text) - len(stripped) >= characters:  # empty lines to the end
        return text[: len(stripped) + characters]
    for unit in range(1, min(_LONGEST_UNIT, len(stripped) // max(repeats, 2)) + 1):
        length = _periodic_end(stripped, unit)
        if length >= max(repeats * unit, characters):
            rounds = max(repeats, -(-characters // unit))
            return text if rounds * unit >= length else stripped[: len(stripped) - length + rounds * unit]
    return text


def _periodic_end(text: str, unit: int) -> int:
    """Length of the longest end of `text` that repeats with period `unit`; 0 unless two whole rounds are there."""
    end = len(text)
    last = text[end - unit :]
    if text[end - 2 * unit : end - unit] != last:
        return 0
    start = end - 2 * unit
    while start >= unit and text[start - unit : start] == last:
        start -= unit
    while start > 0 and text[start - 1] == text[start - 1 + unit]:
        start -= 1
    return end - start


def trim_ending(text: str) -> str:
    """Cut `text` behind its last whole sentence or line; without one it stays as it is."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text) if not _ends_no_sentence(text, found.end())]
    return text[: ends[-1]].rstrip() if ends and text[: ends[-1]].strip() else text


def _ends_no_sentence(text: str, end: int) -> bool:
    """Whether the line up to `end` is a number and a point, or its last word is an abbreviation."""
    start = text.rfind("\n", 0, end) + 1
    return bool(_NUMBER_OF_ITEM.fullmatch(text, start, end) or _ABBREVIATION.search(text[max(start, end - 12) : end]))


def clean_text(draft: Draft, cleaning: Cleaning) -> Cleaned:
    """Truncate a loop, else treat an ending that was cut off as `cleaning` says."""
    if cleaning.loop_repeats:
        text = truncate_loop(draft.text, repeats=cleaning.loop_repeats, characters=cleaning.loop_characters)
        if text != draft.text:
            return Cleaned(text, "loop")
    if not draft.is_cut_off:
        return Cleaned(draft.text, "")
    if cleaning.cut_off == "drop":
        return Cleaned("", "dropped")
    trimmed = trim_ending(draft.text) if cleaning.cut_off == "trim" else draft.text
    return Cleaned(trimmed, "trimmed" if trimmed != draft.text else "cut_off")


def find_duplicates(drafts: Sequence[Draft], cleaning: Cleaning) -> list[Duplicate]:
    """Find drafts that repeat an earlier one that stays: equal but for white space, or nearly so by MinHash.

    The estimate's standard error is 1/sqrt(128), 0.09 at the worst and 0.03 at 0.9.
    """
    found: list[Duplicate] = []
    words = [draft.text.split() for draft in drafts]
    sketches = [_sketch(split) for split in words] if cleaning.near_duplicates else []
    kept: list[int] = []
    for place, split in enumerate(words):
        of = next((other for other in kept if words[other] == split), None)
        is_exact = of is not None
        if of is None and sketches:
            alike = (other for other in kept if sketches[place].jaccard(sketches[other]) >= cleaning.near_duplicates)
            of = next(alike, None)
        if of is None:
            kept.append(place)
        else:
            found.append(Duplicate(place, of, is_exact))
    return found


def warm_up(cleaning: Cleaning) -> None:
    """Import what `find_duplicates` needs, half a second, while the first answers are waited for."""
    if cleaning.near_duplicates:
        _sketch(["word"])


@cache
def _empty_sketch():
    """Copied for every text: drawing its permutations again would take longer than all else of a short one."""
    from datasketch import MinHash

    return MinHash(num_perm=_PERMUTATIONS, seed=1)


def _sketch(words: Sequence[str]):
    lowered = [word.lower() for word in words]
    width = min(_SHINGLE_WORDS, len(lowered))
    shingles = {" ".join(lowered[start : start + width]) for start in range(len(lowered) - width + 1)}
    sketch = _empty_sketch().copy()
    sketch.update_batch([shingle.encode("utf-8", errors="surrogatepass") for shingle in sorted(shingles)])
    return sketch
