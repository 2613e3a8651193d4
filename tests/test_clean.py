"""Cleaning of answers: loops stay loops, endings are whole, duplicates are found and nothing else is."""

import random
import time

import pytest
from datasketch import MinHash

from megatron_polar.policies import clean
from megatron_polar.policies.clean import Cleaning, Draft, clean_text, find_duplicates, trim_ending, truncate_loop

LIMITS = {"repeats": 4, "characters": 100}


def words(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=5)) for _ in range(count)]


@pytest.mark.parametrize("unit", ["a", "-", "no. ", "again and again, ", "x" * 39 + "y", " ".join(words(60))])
@pytest.mark.parametrize("rest", [0, 1, 7])
def test_a_loop_is_cut_and_still_is_one(unit, rest):
    opening = "So it begins: "
    text = opening + unit * 200 + unit[:rest]
    cut = truncate_loop(text, **LIMITS)
    assert text.startswith(cut) and cut.startswith(opening)
    rounds = (len(cut) - len(opening)) / len(unit)
    assert 4 <= rounds < max(6, 100 / len(unit) + 2)
    assert truncate_loop(cut, **LIMITS) == cut, "what is left is a loop by the same measure"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "word",
        "ha ha ha ha ha",
        "A heading\n-----",
        "no, no, no, no, but yes",
        "a" * 300 + "b",
        " ".join(words(400)),
        "twice the same sentence of some length, that happens. " * 3,
    ],
)
def test_what_is_no_loop_stays(text):
    assert truncate_loop(text, **LIMITS) == text


def test_empty_lines_to_the_end_are_a_loop():
    assert truncate_loop("Done." + "\n" * 5000, **LIMITS) == "Done." + "\n" * 100


@pytest.mark.parametrize(("unit", "end"), [("ab", "c"), ("a", ""), ("a" * 999 + "b", "a")], ids=["two", "one", "long"])
def test_the_time_of_a_near_loop_does_not_grow_with_the_square_of_its_length(unit, end):
    def seconds(length: int) -> float:
        text = unit * (length // len(unit)) + end
        times = []
        for _ in range(3):
            begun = time.process_time()
            truncate_loop(text, **LIMITS)
            times.append(time.process_time() - begun)
        return min(times)

    assert seconds(320_000) < 24 * seconds(40_000)  # 8 times the length: 8 where it is linear, 64 where it is not


@pytest.mark.parametrize(
    ("text", "trimmed"),
    [
        ("One. Two. Thr", "One. Two."),
        ('He said "yes!" and th', 'He said "yes!"'),
        ("first line\nsecond li", "first line"),
        ("没有问题。还有", "没有问题。"),
        ("no end at all", "no end at all"),
        ("Whole.", "Whole."),
        ("about 3.14 and", "about 3.14 and"),
        ("...", "..."),
        ("1. First item\n2. Second it", "1. First item"),
        ("It was in 1984. And th", "It was in 1984."),
        ("Dr. Smith said that thi", "Dr. Smith said that thi"),
        ("I saw it. So did J. Doe and Mr. Li, e.g. in Ma", "I saw it."),
        ("Is it so? No. It isn", "Is it so? No."),
    ],
)
def test_an_ending_is_trimmed_behind_its_last_whole_sentence(text, trimmed):
    assert trim_ending(text) == trimmed


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("trim", ("One.", "trimmed")), ("keep", ("One. Tw", "cut_off")), ("drop", ("", "dropped"))],
)
def test_cut_off_endings_are_treated_as_configured(setting, expected):
    cleaning = Cleaning(cut_off=setting)
    assert clean_text(Draft("p", "One. Tw", True), cleaning) == expected
    assert clean_text(Draft("p", "One. Tw", False), cleaning) == ("One. Tw", ""), "a policy's own ending"


def test_a_loop_that_was_cut_off_is_not_trimmed_to_nothing_and_may_be_left():
    text = "Sure. " + "and so on " * 100
    assert clean_text(Draft("p", text, True), Cleaning()) == ("Sure. " + "and so on " * 9 + "and so on", "loop")
    assert clean_text(Draft("p", text, False), Cleaning(loop_repeats=0)) == (text, "")


def test_duplicates_are_exact_near_or_none():
    base = words(200)
    near = [*base[:100], "other", *base[101:]]
    far = [*base[:100], *words(100, seed=1)]
    drafts = [Draft("a", " ".join(text)) for text in (base, far, near)] + [Draft("b", "  ".join(base) + "\n")]
    found = find_duplicates(drafts, Cleaning())
    assert [(d.place, d.of, d.is_exact) for d in found] == [(2, 0, False), (3, 0, True)]
    assert [d.place for d in find_duplicates(drafts, Cleaning(near_duplicates=0))] == [3]


def test_the_estimate_is_near_the_true_similarity():
    """128 permutations: a standard error of 0.044 at 0.5; ten texts, four errors allowed for."""
    for seed in range(10):
        one, other = words(300, seed), [*words(200, seed), *words(100, seed + 100)]
        shingles = [{tuple(text[i : i + 3]) for i in range(len(text) - 2)} for text in (one, other)]
        true = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
        drafts = [Draft("a", " ".join(one)), Draft("b", " ".join(other))]
        assert find_duplicates(drafts, Cleaning(near_duplicates=max(0.01, true - 0.18)))
        assert not find_duplicates(drafts, Cleaning(near_duplicates=true + 0.18))


def test_sketches_are_those_of_a_fresh_minhash():
    """They are copies of an empty one, which must stay empty."""
    for text in ("one two three four", "four five six", "one two three four"):
        fresh = MinHash(num_perm=128, seed=1)
        split = text.split()
        fresh.update_batch([" ".join(split[i : i + 3]).encode() for i in range(len(split) - 2)])
        assert clean._sketch(split).digest().tolist() == fresh.digest().tolist()


def test_short_answers_are_compared_as_they_stand():
    drafts = [Draft("a", "Yes"), Draft("b", "No"), Draft("c", "yes"), Draft("d", "yes it is")]
    found = find_duplicates(drafts, Cleaning())
    assert [(d.place, d.of, d.is_exact) for d in found] == [(2, 0, False)]
