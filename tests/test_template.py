import numpy as np
import pytest

from megatron_polar.data.template import (
    ControlTokens,
    Half,
    assemble_comparison,
    encode_half,
    fitting_response_length,
    join_text,
    prompt_text,
)
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.errors import UserError

CONTROL = ControlTokens(bos_id=1, separator_id=2, reward_id=3, pad_id=0)


class Letters:
    """One token per character, but "ab" and "x\\n" are one: merges within an answer and over the boundary."""

    pairs = {"ab": 300, "x\n": 301}  # noqa: RUF012

    def encode(self, text):
        ids, place = [], 0
        while place < len(text):
            pair = text[place : place + 2]
            ids.append(self.pairs.get(pair, 10 + ord(text[place])))
            place += 2 if pair in self.pairs else 1
        return ids

    def decode(self, ids):
        return "".join({id: pair for pair, id in self.pairs.items()}.get(id, chr(id - 10)) for id in ids)


def half(text, *, prompt="pq", wrapper="sft", limit=1000):
    return encode_half(Letters(), prompt=prompt, trajectory=text, wrapper=wrapper, max_response_length=limit)


def text_of(ids):
    names = {1: "<s>", 2: "<sep>", 3: "<R>"}
    return "".join(names.get(int(id)) or Letters().decode([int(id)]) for id in ids)


def test_newline_rule_of_both_wrappers():
    assert join_text(prompt="p", trajectory="t", wrapper="sft") == "p\nt"
    assert join_text(prompt="p", trajectory="", wrapper="sft") == "p"
    assert join_text(prompt="p", trajectory="t", wrapper="pretrain") == "pt"
    with pytest.raises(UserError, match="chat"):
        join_text(prompt="p", trajectory="t", wrapper="chat")


def test_prompt_text_joins_contents_and_drops_roles():
    assert prompt_text("as it is") == "as it is"
    assert prompt_text([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]) == "a\nb"


def test_a_half_is_encoded_as_one_text():
    merged = half("t", prompt="yx")
    assert merged.ids.tolist() == [10 + ord("y"), 301, 10 + ord("t")]
    assert (merged.prompt_length, merged.response_tokens_cut) == (2, 0)
    assert merged.ids.dtype == np.int32


def test_a_long_answer_keeps_its_head_and_the_cut_is_counted_in_tokens():
    cut = half("cababd", limit=2)
    assert text_of(cut.ids) == "pq\ncab"
    assert cut.response_tokens_cut == 2
    assert half("cab", limit=2).response_tokens_cut == 0


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 13])
def test_the_cut_is_the_published_encode_cut_decode_encode(limit):
    tokenizer, text = Letters(), "abxabcabxx"
    expected = tokenizer.encode("pq\n" + tokenizer.decode(tokenizer.encode(text)[:limit]))
    cut = half(text, limit=limit)
    assert cut.ids.tolist() == expected
    assert cut.response_tokens_cut == max(0, len(tokenizer.encode(text)) - limit)


def test_all_sequences_are_the_published_text_and_share_their_longest_prefix():
    candidates = [half(text) for text in ("same A", "same B", "same")]
    joined = assemble_comparison(half("ref"), candidates, levels=(0, 1, 1), control=CONTROL, max_length=100)
    texts = [text_of(np.concatenate([joined.prefix, rest])) for rest in joined.candidates]
    assert texts == [f"<s>pq\nref<sep>pq\n{text}<R>" for text in ("same A", "same B", "same")]
    assert text_of(joined.prefix) == "<s>pq\nref<sep>pq\nsame"
    assert [text_of(rest) for rest in joined.candidates] == [" A<R>", " B<R>", "<R>"]
    assert joined.levels == (0, 1, 1)
    assert joined.prompt_tokens_cut == 0


def test_no_bos_where_the_tokenizer_has_none():
    control = ControlTokens(bos_id=None, separator_id=2, reward_id=3, pad_id=0)
    joined = assemble_comparison(half("r"), [half("c")], levels=(0,), control=control, max_length=100)
    assert text_of(np.concatenate([joined.prefix, joined.candidates[0]])) == "pq\nr<sep>pq\nc<R>"


def test_equal_candidates_and_a_single_one_keep_at_least_the_reward_token():
    equal = assemble_comparison(half("r"), [half("c")] * 2, levels=(0, 1), control=CONTROL, max_length=100)
    assert [rest.tolist() for rest in equal.candidates] == [[3], [3]]
    single = assemble_comparison(half("r"), [half("c")], levels=(0,), control=CONTROL, max_length=100)
    assert single.candidates[0].tolist() == [3]


def test_empty_answers_to_a_prompt_are_followed_by_the_control_token():
    joined = assemble_comparison(half(""), [half(""), half("c")], levels=(0, 1), control=CONTROL, max_length=100)
    texts = [text_of(np.concatenate([joined.prefix, rest])) for rest in joined.candidates]
    assert texts == ["<s>pq<sep>pq<R>", "<s>pq<sep>pq\nc<R>"]


def test_a_long_prompt_keeps_its_tail_by_the_tightest_candidate():
    prompt = "0123456789"
    reference = half("rr", prompt=prompt)
    candidates = [half(text, prompt=prompt) for text in ("c", "dddd")]
    # Lengths without the prompt, newline included: 3 and 5; (24 - 4 - 3 - 5) // 2 = 6 tokens of prompt.
    joined = assemble_comparison(reference, candidates, levels=(0, 1), control=CONTROL, max_length=24)
    texts = [text_of(np.concatenate([joined.prefix, rest])) for rest in joined.candidates]
    assert texts == ["<s>456789\nrr<sep>456789\nc<R>", "<s>456789\nrr<sep>456789\ndddd<R>"]
    assert joined.prompt_tokens_cut == 4


@pytest.mark.parametrize("max_length", range(12, 40))
def test_no_sequence_exceeds_max_length(max_length):
    prompt = "0123456789"
    candidates = [half(text, prompt=prompt) for text in ("c", "ddd")]
    reference = half("rr", prompt=prompt)
    joined = assemble_comparison(reference, candidates, levels=(0, 1), control=CONTROL, max_length=max_length)
    longest = len(joined.prefix) + max(map(len, joined.candidates))
    assert longest <= max_length
    # Nothing is thrown away without need: one more prompt token in each half would break the published budget.
    assert joined.prompt_tokens_cut == 0 or longest + 2 > max_length - 1


@pytest.mark.parametrize("max_length", [60, 61, 62, 63, 64, 65, 100, 128, 129, 130, 131])
@pytest.mark.parametrize("answer", ["🙂", "ab🙂", "é", "東京 "])
def test_answers_cut_within_a_character_fit_beside_each_other(answer, max_length, tokenizer_path):
    """The bytes that a cut leaves become replacement characters, of three bytes each."""
    tokenizer = load_tokenizer(tokenizer_path)
    keep = fitting_response_length(4096, max_length)
    halves = [
        encode_half(tokenizer, prompt="p", trajectory=text, wrapper="sft", max_response_length=keep)
        for text in (answer * max_length, "x" + answer * max_length, "xy" + answer * max_length)
    ]
    assert any(half.response_tokens_cut for half in halves)
    for reference in halves:
        found = assemble_comparison(
            reference, halves, levels=range(3), control=tokenizer.control, max_length=max_length
        )
        assert all(len(found.prefix) + len(tail) <= max_length for tail in found.candidates)


def test_a_zero_budget_keeps_no_prompt_and_not_the_whole_prompt():
    # 3 + 4 tokens beside the prompt and 4 reserved: 11 leave (11 - 11) // 2 = 0, 12 leave 12 // 2 -> 0 too.
    for max_length in (11, 12):
        joined = assemble_comparison(half("rr"), [half("ddd")], levels=(0,), control=CONTROL, max_length=max_length)
        assert text_of(np.concatenate([joined.prefix, joined.candidates[0]])) == "<s>\nrr<sep>\nddd<R>"
        assert joined.prompt_tokens_cut == 2


def test_answers_that_do_not_fit_alone_are_an_error_with_the_remedy():
    with pytest.raises(UserError, match=r"max_length=10 .*max_response_length"):
        assemble_comparison(half("rr"), [half("ddd")], levels=(0,), control=CONTROL, max_length=10)


def test_every_candidate_needs_a_level():
    empty = Half(ids=np.zeros(0, np.int32), prompt_length=0, response_tokens_cut=0)
    with pytest.raises(ValueError, match="level"):
        assemble_comparison(empty, [empty, empty], levels=(0,), control=CONTROL, max_length=10)
