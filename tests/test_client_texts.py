"""What the client sends, on thousands of generated cases: the ids of the scorer by default, and under
`compat="official"` the text of POLAR's published client, written down here a second time from its description."""

import dataclasses
import inspect
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hugging_face_models import make_model
from tiny_runs import tiny_config
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_polar.convert.convert import from_hf, to_hf
from megatron_polar.data.template import EXPORTED_RESPONSE_LENGTH, EXPORTED_SEQUENCE_LENGTH
from megatron_polar.data.tokenizer import REWARD_TOKEN, SEPARATOR_TOKEN, load_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.score.requests import ScoreRequest
from megatron_polar.serve.client import RewardClient, RewardItem
from megatron_polar.serve.official import OfficialText

PIECES = [
    "ba",
    " ke",
    "li ",
    "mo",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    ".",
    ",",
    " .",
    "n't",
    "é",
    "e\u0301",
    "日本",
    "🙂",
    "ß",
]
PIECES += ["\u200b", "\u2581", "\r\n", "\x00", "0123", "<", "|", "<|", "<|rew", "ard|>", "[UNUSED", "_TOKEN_130]"]
TOKENS = [SEPARATOR_TOKEN, REWARD_TOKEN, "<s>", "</s>", "<unk>", "<pad>", "<|reward|>[UNUSED_TOKEN_130]"]
LIMITS = [(16384, 4096), (64, 24), (48, 22), (40, 8), (24, 10), (20, 8), (12, 4), (8, 3), (6, 1), (4, 4)]


def generated_text(rng: random.Random) -> str:
    length = rng.choice((0, 1, 2, 5, 12, 40))
    return "".join(rng.choice(TOKENS if rng.random() < 0.15 else PIECES) for _ in range(length))


def generated_side(rng: random.Random) -> str | list[dict]:
    """A text, or now and then a list of up to three messages."""
    if rng.random() < 0.8:
        return generated_text(rng)
    return [
        {"role": rng.choice(("user", "assistant")), "content": generated_text(rng)} for _ in range(rng.randint(1, 3))
    ]


def generated_items(seed: int, count: int) -> list[RewardItem]:
    rng = random.Random(seed)
    sides = [[generated_side(rng) for _ in range(3)] for _ in range(count)]
    return [RewardItem(*side, wrapper=rng.choice(("sft", "sft", "pretrain"))) for side in sides]


# --- compat="official" -------------------------------------------------------------------------------------------


def published(tokenizer, item: RewardItem, max_length: int, max_response_length: int) -> str:
    """The published client's text, from the prose of polar_method.md section 2 and reliability.md 3.1."""

    def text_of(side):
        return side if isinstance(side, str) else "\n".join(message["content"] for message in side)

    p, r1, r2 = (
        tokenizer.encode(text_of(side), add_special_tokens=True) for side in (item.prompt, item.reference, item.output)
    )
    if len(r1) > max_response_length:
        r1 = r1[0:max_response_length]
    if len(r2) > max_response_length:
        r2 = r2[0:max_response_length]
    room = (max_length - 4 - len(r1) - len(r2)) // 2
    if len(p) > room:
        p = p[-room:]
    p, r1, r2 = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (p, r1, r2))
    newline = "" if item.wrapper == "pretrain" else "\n"
    return p + newline + r1 + "<|reward|>" + p + newline + r2 + "[UNUSED_TOKEN_130]"


def _byte_level(directory: Path) -> Path:
    """A tokenizer such as Qwen's or Llama 3's, as transformers saves it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["ba ke li mo nu ra. Don't, 日本 é"] * 50, trainer)
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (SEPARATOR_TOKEN, REWARD_TOKEN)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)
    return directory


def _export(directory: Path, model: Path) -> Path:
    from megatron_polar.convert.tokenizer import export_tokenizer

    directory.mkdir()
    export_tokenizer(load_tokenizer(model), directory, max_length=16384)
    return directory


class _WithBos:
    """transformers on a bare sentencepiece file, which it starts without the BOS that training starts with."""

    def __init__(self, model: Path, directory: Path):
        directory.mkdir()
        (directory / "tokenizer.model").write_bytes(model.read_bytes())
        self.plain = AutoTokenizer.from_pretrained(directory)

    def encode(self, text, add_special_tokens):
        return [self.plain.convert_tokens_to_ids("<s>"), *self.plain.encode(text, add_special_tokens=False)]

    def decode(self, ids, skip_special_tokens):
        return self.plain.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.fixture(params=["byte-level", "export", "sentencepiece"])
def tokenizer(request, tmp_path, tokenizer_path):
    """A path for our client, and what transformers makes of it."""
    if request.param == "sentencepiece":
        return tokenizer_path, _WithBos(tokenizer_path, tmp_path / "bare")
    path = (
        _byte_level(tmp_path / "fast") if request.param == "byte-level" else _export(tmp_path / "fast", tokenizer_path)
    )
    return path, AutoTokenizer.from_pretrained(path)


def test_official_text_equals_the_published_algorithm(tokenizer):
    """4,000 cases for each of three tokenizers: 12,000."""
    path, oracle = tokenizer
    encoders = [OfficialText(path, max_sequence_length=long, max_response_length=short) for long, short in LIMITS]
    cut = 0
    for number, item in enumerate(generated_items(seed=1, count=4000)):
        which = number % len(LIMITS)
        encoded = encoders[which](item)
        assert encoded.content == published(oracle, item, *LIMITS[which]), (item, LIMITS[which])
        cut += encoded.is_truncated
    assert 500 < cut < 3500


def test_quirks_of_the_published_text(tokenizer_path):
    def text(prompt, reference, output, wrapper="sft", limits=LIMITS[0]):
        encoder = OfficialText(tokenizer_path, max_sequence_length=limits[0], max_response_length=limits[1])
        return encoder(RewardItem(prompt, reference, output, wrapper)).content

    assert text("ba", "ke", "li") == "ba\nke<|reward|>ba\nli[UNUSED_TOKEN_130]"
    assert text("ba", "", "") == "ba\n<|reward|>ba\n[UNUSED_TOKEN_130]"
    assert text("ba", "ke", "li", "pretrain") == "bake<|reward|>bali[UNUSED_TOKEN_130]"
    assert text("ba", "ke", "li", "chat") == text("ba", "ke", "li")
    assert text([], "ke", "li") == "\nke<|reward|>\nli[UNUSED_TOKEN_130]"
    assert text("b<|reward|>a</s>", "k[UNUSED_TOKEN_130]e", "<s>li") == text("ba", "ke", "li")
    # Reference and output are BOS and a word, the prompt is BOS and five words: a budget of 1 token keeps its last
    # word, 0 keeps all of it, -1 drops BOS, -3 two words as well.
    words = " ".join(["ba"] * 5)
    for long, kept in ((10, " ba"), (8, words), (6, words), (2, " ba ba ba")):
        expected = f"{kept}\nke<|reward|>{kept}\nli[UNUSED_TOKEN_130]"
        assert text(words, "ke", "li", limits=(long, 4)) == expected


def test_official_text_is_what_engines_are_sent(tokenizer_path):
    from flaky_server import FlakyServer, ok, pooling, sglang

    item = RewardItem("ba", "", "k<|reward|>e")
    text = "ba\n<|reward|>ba\nke[UNUSED_TOKEN_130]"

    def bare(request):
        return pooling(request, lambda value: value)

    for engine, reply in (("vllm", pooling), ("lmdeploy", bare), ("sglang", sglang)):
        with FlakyServer(lambda request, reply=reply: ok(reply(request))) as server:
            options = {"engine": engine, "tokenizer": tokenizer_path, "compat": "official"}
            with RewardClient(server.url, **options) as client:
                client.score([item])
            assert server.requests[0].body["text" if engine == "sglang" else "input"] == [text]


def test_lengths_are_the_exports(tokenizer_path, tmp_path):
    source = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path)
    lengths = {EXPORTED_SEQUENCE_LENGTH: 40, EXPORTED_RESPONSE_LENGTH: 4}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | lengths))
    run = from_hf(source, output=tmp_path / "run")
    export = to_hf(run, output=tmp_path / "export", layout="sequence-classification")
    client = RewardClient("http://127.0.0.1:1", engine="vllm", tokenizer=export)
    encoded = client._encode(RewardItem("ba " * 99, "ke", "li " * 99, "sft"))
    tokenizer = load_tokenizer(export)
    after = encoded.content.tolist()[encoded.content.tolist().index(tokenizer.separator_id) + 1 :]
    assert 30 < len(encoded.content) <= 40
    assert tokenizer.decode(after).count("li") == 4
    for name, value in (("max_sequence_length", 40), ("max_response_length", 4)):
        with pytest.raises(UserError, match=f"{name}=512, and the export was trained with {value}"):
            RewardClient("http://127.0.0.1:1", engine="vllm", tokenizer=export, **{name: 512})


# --- the default -------------------------------------------------------------------------------------------------


def _scorer(tokenizer, *, max_length: int, max_response_length: int, monkeypatch):
    """The scorer's text path without its model."""
    from megatron_polar.score import scorer

    config = tiny_config("corpus", "run", data__max_sequence_length=max_length)
    monkeypatch.setattr(scorer, "row_shape", lambda *arguments, **options: None)
    parts = dict.fromkeys(inspect.signature(scorer.Scorer).parameters)
    parts |= {"config": config, "model": SimpleNamespace(architecture=None), "tokenizer": tokenizer}
    return scorer.Scorer(**parts | {"max_response_length": max_response_length, "wrapper": ""})


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_default_ids_equal_the_scorers(kind, tokenizer_path, tmp_path, monkeypatch):
    """4,000 cases for each of two tokenizers; user text that spells control tokens never gets their ids."""
    path = tokenizer_path if kind == "sentencepiece" else _byte_level(tmp_path / "fast")
    tokenizer = load_tokenizer(path)
    pairs = []
    for long, short in LIMITS:
        if long >= 8:  # where a reference and an output of one token fit
            client = RewardClient(
                "http://127.0.0.1:1", engine="vllm", tokenizer=path, max_sequence_length=long, max_response_length=short
            )
            scorer = _scorer(tokenizer, max_length=long, max_response_length=short, monkeypatch=monkeypatch)
            pairs.append((client, scorer))
    cut = 0
    for number, item in enumerate(generated_items(seed=2, count=4000)):
        client, scorer = pairs[number % len(pairs)]
        ours, ids, is_truncated = _outcome(lambda client=client, item=item: client._encode(item))
        wanted = _scorer_outcome(scorer, item)
        assert (ours, ids, is_truncated) == wanted, item
        if ids is not None:
            assert ids.count(tokenizer.separator_id) == ids.count(tokenizer.reward_id) == 1
            assert ids.count(tokenizer.bos_id) == 1
            cut += is_truncated
    assert 300 < cut < 3500


def _outcome(encode):
    try:
        encoded = encode()
    except ValueError as error:
        return str(error), None, None
    return None, encoded.content.tolist(), encoded.is_truncated


def _scorer_outcome(scorer, item: RewardItem):
    def encode():
        prompt, reference, output = (
            side if isinstance(side, str) else "\n".join(message["content"] for message in side)
            for side in dataclasses.astuple(item)[:3]
        )
        made = scorer.tokenize(ScoreRequest(prompt, reference, (output,), item.wrapper))
        return SimpleNamespace(content=made.sequence(0), is_truncated=made.truncated[0])

    return _outcome(encode)
