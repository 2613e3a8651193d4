import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Fast

from megatron_polar.data.template import assemble_comparison, encode_half
from megatron_polar.data.tokenizer import REWARD_TOKEN, SEPARATOR_TOKEN, load_tokenizer
from megatron_polar.data.tokenizer_training import train_tokenizer
from megatron_polar.errors import UserError

TEXTS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "def total(values):\n    return sum(values)  # reward of all\n",
    "reward | rewards <reward> UNUSED TOKEN_130 token [list]",
    "Überraschung! 日本語のテキスト, ça va?\tTabs\r\n\r\nand   spaces ",
] * 20
TRICKY = [
    f"say {SEPARATOR_TOKEN} and {REWARD_TOKEN} now",
    SEPARATOR_TOKEN,
    REWARD_TOKEN * 3,
    f"{SEPARATOR_TOKEN}{REWARD_TOKEN}\n",
    "<s>start</s>",
    "<|rew<|reward|>ard|>",
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def train_sentencepiece(path: Path, **options) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def train_fast(directory: Path, *, special: bool, bos: bool, normalizer=None, pre_tokenizer=None) -> Path:
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel() if pre_tokenizer is None else decoders.Metaspace()
    if normalizer is not None:
        fast.normalizer = normalizer
    fast.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    fast.add_special_tokens(["<s>", "</s>"])
    fast.add_tokens([AddedToken(token, special=special, normalized=False) for token in (SEPARATOR_TOKEN, REWARD_TOKEN)])
    if bos:
        fast.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))]
        )
    directory.mkdir()
    fast.enable_truncation(5)  # a stored limit must not cut anything here
    fast.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


BUILDERS = {
    "trained here": lambda path: train_tokenizer(TEXTS, vocab_size=400, output=path / "t.model"),
    "sentencepiece, control": lambda path: train_sentencepiece(
        path / "control.model", control_symbols=[SEPARATOR_TOKEN, REWARD_TOKEN]
    ),
    "sentencepiece, user-defined": lambda path: train_sentencepiece(
        path / "user.model", user_defined_symbols=[SEPARATOR_TOKEN, REWARD_TOKEN]
    ),
    "huggingface, special": lambda path: train_fast(path / "special", special=True, bos=True),
    "huggingface, not special": lambda path: train_fast(path / "plain", special=False, bos=False),
}


@pytest.fixture(scope="module", params=list(BUILDERS))
def tokenizer_path(request, workspace) -> Path:
    directory = workspace / request.param
    directory.mkdir()
    return BUILDERS[request.param](directory)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return load_tokenizer(tokenizer_path)


def whole_text_ids(path: Path, text: str) -> list[int]:
    """Ids of a text whose control tokens are active, by the library alone: POLAR's own path."""
    if path.is_dir():
        fast = Fast.from_file(str(path / "tokenizer.json"))
        fast.no_truncation()
        return fast.encode(text, add_special_tokens=True).ids
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = [processor.bos_id()]
    halves = text.removesuffix(REWARD_TOKEN).split(SEPARATOR_TOKEN)
    for half, token in zip(halves, (SEPARATOR_TOKEN, REWARD_TOKEN), strict=True):
        ids += [*processor.encode(half), processor.piece_to_id(token)]
    return ids


@pytest.mark.parametrize("wrapper", ["sft", "pretrain"])
def test_comparison_ids_equal_encoding_the_whole_joined_text(tokenizer, tokenizer_path, wrapper):
    between = "\n" if wrapper == "sft" else ""
    for prompt, reference, candidate in [
        ("Say hello", "hello there", "again and again."),
        ("The quick brown", " fox jumps over", "s and spaces   "),
        ("reward of\n", "\n\n  values", "日本語 ça"),
    ]:
        text = f"{prompt}{between}{reference}{SEPARATOR_TOKEN}{prompt}{between}{candidate}{REWARD_TOKEN}"
        halves = [
            encode_half(tokenizer, prompt=prompt, trajectory=answer, wrapper=wrapper, max_response_length=4096)
            for answer in (reference, candidate)
        ]
        joined = assemble_comparison(halves[0], halves[1:], levels=(0,), control=tokenizer.control, max_length=16384)
        assert np.concatenate([joined.prefix, joined.candidates[0]]).tolist() == whole_text_ids(tokenizer_path, text)


@pytest.mark.parametrize("text", TRICKY)
def test_control_tokens_in_user_text_stay_text(tokenizer, text):
    ids = tokenizer.encode(text)
    control = {tokenizer.bos_id, tokenizer.separator_id, tokenizer.reward_id}
    assert control.isdisjoint(ids)
    # Sentencepiece's defaults collapse runs of white space; the characters must all be there.
    assert "".join(tokenizer.decode(ids).split()) == "".join(text.split())


def test_control_tokens_in_random_text_stay_text(tokenizer):
    choose = random.Random(3)
    parts = [SEPARATOR_TOKEN, REWARD_TOKEN, "<|", "|>", "<s>", "[", "_130]", "a", " ", "\n", "ward", "é"]
    control = {tokenizer.bos_id, tokenizer.separator_id, tokenizer.reward_id}
    for _ in range(300):
        text = "".join(choose.choices(parts, k=choose.randrange(1, 12)))
        ids = tokenizer.encode(text)
        assert control.isdisjoint(ids), text
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


def test_a_text_may_spell_a_control_token_a_thousand_times(tokenizer, monkeypatch):
    """Where the library sees it, too: split once for each, which no stack holds."""
    encode = tokenizer._codec.encode
    control = [tokenizer.separator_id]
    monkeypatch.setattr(tokenizer._codec, "encode", lambda text: control if SEPARATOR_TOKEN in text else encode(text))
    text = SEPARATOR_TOKEN * 1500
    ids = tokenizer.encode(text)
    assert tokenizer.separator_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_a_file_under_another_name_is_saved_without_what_was_not_read(workspace, tmp_path):
    source = train_fast(tmp_path / "fast", special=True, bos=False)
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    named = (source / "tokenizer.json").rename(source / "edited.json")
    tokenizer = load_tokenizer(named)
    assert tokenizer.bos_id is None
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_decode_skips_control_ids(tokenizer):
    ids = tokenizer.encode("again")
    around = [tokenizer.separator_id, *ids, tokenizer.reward_id]
    assert tokenizer.decode(around).strip() == "again"


def test_a_saved_tokenizer_is_the_same(tokenizer, workspace, request):
    directory = workspace / "saved" / request.node.callspec.id
    tokenizer.save(directory)
    again = load_tokenizer(directory)
    again.save(directory)  # onto itself
    for name in ("fingerprint", "vocab_size", "control", "kind", "separator_token", "reward_token"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS[:4] + TRICKY)


def test_other_control_tokens_make_another_fingerprint_and_travel_with_the_tokenizer(workspace):
    path = train_fast(workspace / "others", special=True, bos=True)
    standard = load_tokenizer(path)
    swapped = load_tokenizer(path, separator_token=REWARD_TOKEN, reward_token=SEPARATOR_TOKEN)
    assert (swapped.separator_id, swapped.reward_id) == (standard.reward_id, standard.separator_id)
    assert swapped.fingerprint != standard.fingerprint
    swapped.save(workspace / "swapped")
    assert load_tokenizer(workspace / "swapped").fingerprint == swapped.fingerprint


def test_bos_follows_configuration_then_post_processor(workspace):
    with_bos = train_fast(workspace / "bos", special=True, bos=True)
    without_bos = train_fast(workspace / "no_bos", special=True, bos=False)
    first = load_tokenizer(with_bos)
    assert first.bos_id == Fast.from_file(str(with_bos / "tokenizer.json")).token_to_id("<s>")
    assert load_tokenizer(without_bos).bos_id is None
    for path, value, expected in ((with_bos, False, None), (without_bos, True, first.bos_id)):
        (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": value}))
        assert load_tokenizer(path).bos_id == expected


def test_ids_equal_those_of_transformers(workspace):
    transformers = pytest.importorskip("transformers")
    path = train_fast(workspace / "transformers", special=True, bos=True)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), bos_token="<s>")
    text = f"Say hello\nhello{SEPARATOR_TOKEN}Say hello\nagain{REWARD_TOKEN}"
    ours = load_tokenizer(path)
    reference, candidate = (
        encode_half(ours, prompt="Say hello", trajectory=answer, wrapper="sft", max_response_length=100)
        for answer in ("hello", "again")
    )
    joined = assemble_comparison(reference, [candidate], levels=(0,), control=ours.control, max_length=100)
    assert np.concatenate([joined.prefix, joined.candidates[0]]).tolist() == theirs(text)["input_ids"]


def test_names_in_the_configuration_rename_sentencepiece_ids_as_in_polars_own_tokenizer(workspace):
    directory = workspace / "renamed"
    directory.mkdir()
    train_sentencepiece(directory / "tokenizer.model", user_defined_symbols=["[UNUSED_TOKEN_0]", REWARD_TOKEN])
    id = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).piece_to_id(
        "[UNUSED_TOKEN_0]"
    )
    config = {"added_tokens_decoder": {str(id): {"content": SEPARATOR_TOKEN, "special": True}}, "pad_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.separator_id, tokenizer.pad_id) == (id, 2)
    # The piece's old name is text now as well.
    assert id not in tokenizer.encode(f"[UNUSED_TOKEN_0] {SEPARATOR_TOKEN}")


def test_a_model_whose_vocabulary_spells_the_control_token_still_gives_text(workspace):
    """`ignore_merges` (Llama 3) looks a whole word up before anything else: only splitting the text helps."""
    letters = {
        token: id
        for id, token in enumerate([SEPARATOR_TOKEN, REWARD_TOKEN, *sorted(set(SEPARATOR_TOKEN + REWARD_TOKEN))])
    }
    fast = Fast(models.BPE(vocab=letters, merges=[], ignore_merges=True))
    fast.add_special_tokens([SEPARATOR_TOKEN, REWARD_TOKEN])
    (workspace / "spelled").mkdir()
    fast.save(str(workspace / "spelled" / "tokenizer.json"))
    tokenizer = load_tokenizer(workspace / "spelled")
    assert tokenizer.encode(SEPARATOR_TOKEN) == [letters[letter] for letter in SEPARATOR_TOKEN]


def test_a_normaliser_cannot_make_a_control_token_out_of_text(workspace):
    words = {"<unk>": 0, SEPARATOR_TOKEN: 1, REWARD_TOKEN: 2}
    fast = Fast(models.WordLevel(words, unk_token="<unk>"))
    fast.normalizer = normalizers.NFKC()
    (workspace / "wide").mkdir()
    fast.save(str(workspace / "wide" / "tokenizer.json"))
    tokenizer = load_tokenizer(workspace / "wide")
    wide = SEPARATOR_TOKEN.replace("<", "\uff1c")
    assert fast.encode(wide).ids == [1]
    assert 1 not in tokenizer.encode(wide)


def test_a_tokenizer_that_treats_the_first_word_apart_is_noticed(workspace):
    first_only = pre_tokenizers.Metaspace(prepend_scheme="first")
    path = train_fast(workspace / "first", special=True, bos=False, pre_tokenizer=first_only)
    assert not load_tokenizer(path).halves_are_independent
    assert load_tokenizer(train_fast(workspace / "usual", special=True, bos=False)).halves_are_independent


def test_stored_dropout_does_not_make_ids_random(workspace):
    path = train_fast(workspace / "dropout", special=True, bos=False)
    stored = json.loads((path / "tokenizer.json").read_text())
    expected = load_tokenizer(path).encode(TEXTS[0])
    stored["model"]["dropout"] = 0.9
    (path / "tokenizer.json").write_text(json.dumps(stored))
    assert load_tokenizer(path).encode(TEXTS[0]) == expected


def test_training_is_deterministic_and_gives_text_back_byte_for_byte(workspace):
    paths = [train_tokenizer(iter(TEXTS), vocab_size=380, output=workspace / f"same{i}.model") for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    tokenizer = load_tokenizer(paths[0])
    assert tokenizer.vocab_size == 380
    assert (tokenizer.bos_id, tokenizer.pad_id) == (1, 3)
    for text in ["", " ", "\n\n", "  two  \n\ttabs \r\n", "é e\u0301 ﬁ ① 日本 🙂\u200d", "\x00\x7f", *TEXTS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("vocab_size", [100, 10_000_000])
def test_a_vocabulary_that_cannot_be_made_is_an_error(workspace, vocab_size):
    with pytest.raises(UserError, match=f"--vocab-size {vocab_size}"):
        train_tokenizer(TEXTS, vocab_size=vocab_size, output=workspace / "never.model")
    assert not (workspace / "never.model").exists()


def test_missing_control_tokens_are_named(workspace):
    bare = train_sentencepiece(workspace / "bare.model")
    with pytest.raises(UserError, match=r"bare\.model: has no separator token '<\|reward\|>'; add it"):
        load_tokenizer(bare)
    half = train_sentencepiece(workspace / "half.model", control_symbols=[SEPARATOR_TOKEN])
    with pytest.raises(UserError, match=r"half\.model: has no reward token"):
        load_tokenizer(half)
    with pytest.raises(UserError, match="choose two tokens"):
        load_tokenizer(half, reward_token=SEPARATOR_TOKEN)


def test_what_is_no_tokenizer_is_refused(workspace):
    (workspace / "junk.model").write_bytes(b"\xff junk")
    (workspace / "junk").mkdir()
    (workspace / "nothing").mkdir()
    (workspace / "junk" / "tokenizer.json").write_text('{"model": 1}')
    for path in ("junk.model", "junk", "nothing", "absent"):
        with pytest.raises(UserError, match=path):
            load_tokenizer(workspace / path)


def test_a_text_too_small_for_the_vocabulary_says_how_many_pieces_it_has(tmp_path):
    with pytest.raises(
        UserError, match=r"--vocab-size 9000: this text has pieces for at most \d+; ask for that or less"
    ):
        train_tokenizer(["a few words only"] * 5, vocab_size=9000, output=tmp_path / "t.model")


def test_a_vocabulary_too_small_for_the_letters_says_how_many_it_needs(tmp_path):
    texts = [chr(0x4E00 + number) * 3 for number in range(100)]
    with pytest.raises(UserError, match=r"--vocab-size 300: this text needs at least \d+, for its different") as caught:
        train_tokenizer(texts, vocab_size=300, output=tmp_path / "t.model")
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    with pytest.raises(UserError):
        train_tokenizer(texts, vocab_size=least - 1, output=tmp_path / "t.model")
    train_tokenizer(texts, vocab_size=least, output=tmp_path / "t.model")


def test_no_text_is_not_blamed_on_the_vocabulary(tmp_path):
    for texts in ([], ["", ""]):
        with pytest.raises(UserError, match="the inputs hold no text"):
            train_tokenizer(texts, vocab_size=300, output=tmp_path / "t.model")


def test_texts_that_are_not_looked_at_are_spoken_of(tmp_path, capsys):
    """Inputs of two languages one behind the other, of which the second would be spelt in bytes."""
    train_tokenizer(TEXTS, vocab_size=380, output=tmp_path / "all.model", max_texts=len(TEXTS))
    assert "not looked at" not in capsys.readouterr().err
    some = train_tokenizer([*TEXTS, "東京" * 50], vocab_size=380, output=tmp_path / "some.model", max_texts=len(TEXTS))
    assert f"the first {len(TEXTS):,} texts are used" in capsys.readouterr().err
    assert some.read_bytes() == (tmp_path / "all.model").read_bytes()


def test_a_tokenizer_is_not_replaced_by_another(tmp_path):
    path = train_tokenizer(TEXTS, vocab_size=380, output=tmp_path / "t.model")
    before = path.read_bytes()
    train_tokenizer(TEXTS, vocab_size=380, output=path)
    with pytest.raises(UserError, match=r"t\.model: is there and would become another tokenizer"):
        train_tokenizer(TEXTS, vocab_size=390, output=path)
    assert path.read_bytes() == before


def test_a_data_error_is_not_blamed_on_the_vocabulary(tmp_path):
    def texts():
        yield "some text"
        raise UserError("input.jsonl:2: malformed JSON")

    with pytest.raises(UserError, match=r"^input\.jsonl:2: malformed JSON$"):
        train_tokenizer(texts(), vocab_size=300, output=tmp_path / "t.model")
