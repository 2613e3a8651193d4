"""A model is never asked with ids of another tokenizer than its own, on whichever way that could have come there."""

import dataclasses
import json
import shutil
import time

import pytest
import sentencepiece
from flaky_server import FlakyServer, ok, pooling, value_of
from hugging_face_models import make_model
from ranks import run_ranks
from reward_items import ITEMS, sequence_of
from servers import metrics_of, serving, trained_checkpoint
from tiny_runs import STEPS, checkpoint_of, tiny_config, training_refusal
from transformers import AutoTokenizer

from megatron_polar import cli
from megatron_polar.config.load import load_saved_config
from megatron_polar.convert.convert import from_hf, to_hf
from megatron_polar.convert.tokenizer import export_tokenizer
from megatron_polar.data.tokenizer import REWARD_TOKEN, SEPARATOR_TOKEN, load_tokenizer
from megatron_polar.data.tokenizer_training import train_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.serve import transport
from megatron_polar.serve.client import RewardClient
from megatron_polar.train.checkpoint_files import find_checkpoint


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A tokenizer with as many pieces as the tests' own, and others."""
    texts = [f"{chr(97 + n % 26)}{chr(98 + n % 25)} hello world {n}" for n in range(300)]
    return train_tokenizer(texts, vocab_size=420, output=tmp_path_factory.mktemp("other") / "other.model")


@pytest.fixture(scope="module")
def trained(trajectory_corpus, tmp_path_factory) -> str:
    return trained_checkpoint(trajectory_corpus, tmp_path_factory.mktemp("tokenizers") / "run")


@pytest.fixture
def export(trained, tmp_path):
    return to_hf(trained, output=tmp_path / "export", layout="sequence-classification")


def names_both(message: str, *paths) -> bool:
    return all(load_tokenizer(path).fingerprint[:12] in message for path in paths)


# --- in an export ----------------------------------------------------------------------------------------------------


def test_an_export_whose_tokenizer_was_replaced_is_refused_by_all_that_read_it(export, other, tokenizer_path, tmp_path):
    assert json.loads((export / "config.json").read_text())["polar_tokenizer"] == load_tokenizer(export).fingerprint
    shutil.copyfile(other, export / "tokenizer.model")
    for read in (
        lambda: from_hf(export, output=tmp_path / "again"),
        lambda: RewardClient("http://127.0.0.1:1", engine="vllm", tokenizer=export),
    ):
        with pytest.raises(UserError, match="restore the tokenizer's files") as caught:
            read()
        assert names_both(str(caught.value), tokenizer_path, export)
    (tmp_path / "in.jsonl").write_text('{"prompt": "ba", "reference": "ke", "output": "li"}\n')
    arguments = ["score", "--checkpoint", str(export), "--input", str(tmp_path / "in.jsonl")]
    assert run_ranks(cli.main, 1, [*arguments, "--output", str(tmp_path / "out"), "--device", "cpu"]) == [2]
    assert not (tmp_path / "out").exists()
    checkpoint = from_hf(export, output=tmp_path / "mended", tokenizer=tokenizer_path)
    assert load_tokenizer(checkpoint / "tokenizer").fingerprint == load_tokenizer(tokenizer_path).fingerprint


def test_tokens_that_a_configuration_has_renamed_stay_so_in_an_export(tokenizer_path, tmp_path):
    """As POLAR's own tokenizer does: its separator is a renamed piece, and <|im_start|> lies beyond the pieces."""
    from sentencepiece import sentencepiece_model_pb2

    source = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer_path.read_bytes())
    separator = load_tokenizer(tokenizer_path).separator_id
    model.pieces[separator].piece = "[UNUSED_TOKEN_0]"
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    renamed = {str(separator): {"content": "<|reward|>", "special": True}}
    (source / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": renamed}))
    checkpoint = from_hf(source, output=tmp_path / "run")
    export = to_hf(checkpoint, output=tmp_path / "export", layout="sequence-classification")
    ours, again = load_tokenizer(checkpoint / "tokenizer"), load_tokenizer(export)
    assert again.fingerprint == ours.fingerprint
    assert again.control == ours.control
    assert from_hf(export, output=tmp_path / "again").is_dir()


def test_an_export_has_a_tokenizer_that_transformers_4_knows(tokenizer_path, tmp_path):
    """transformers 5 writes a class of its own, TokenizersBackend, and SGLang and LMDeploy come with 4."""
    tokenizer = load_tokenizer(tokenizer_path)
    export_tokenizer(tokenizer, tmp_path, max_length=64)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("ba ke").input_ids == [tokenizer.bos_id, *tokenizer.encode("ba ke")]
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 64)


@pytest.mark.parametrize("has_config", [True, False])
def test_an_export_asks_for_no_tokenizer_code_of_somebody_else(has_config, tokenizer_path, tmp_path):
    """InternLM's own tokenizer names Python beside it; engines are told to trust the export, for its model's sake."""
    (tmp_path / "made").mkdir()
    export_tokenizer(load_tokenizer(tokenizer_path), tmp_path / "made", max_length=64)
    source = make_model("internlm2", tmp_path / "source", tokenizer_path=tokenizer_path)
    for file in (*source.glob("tokenizer*"), source / "polar_tokens.json"):
        file.unlink()
    shutil.copyfile(tmp_path / "made/tokenizer.json", source / "tokenizer.json")
    if has_config:
        config = json.loads((tmp_path / "made/tokenizer_config.json").read_bytes())
        config |= {"tokenizer_class": "InternLM2Tokenizer"}
        config |= {"auto_map": {"AutoTokenizer": ["them/repo--tokens.Slow", "them/repo--tokens.Fast"]}}
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    checkpoint = from_hf(source, output=tmp_path / "run")
    export = to_hf(checkpoint, output=tmp_path / "export", layout="internlm2")
    assert b"auto_map" not in (export / "tokenizer_config.json").read_bytes()
    ours = load_tokenizer(checkpoint / "tokenizer")
    assert load_tokenizer(export).fingerprint == ours.fingerprint
    loaded = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    assert loaded("ba ke").input_ids == [ours.bos_id, *ours.encode("ba ke")]


@pytest.mark.parametrize("are_renamed", [False, True])
def test_a_unigram_model_is_exported(are_renamed, tmp_path, capsys):
    """sentencepiece's default kind, with control tokens of its own or named by tokenizer_config.json."""
    words = [f"{a}{b}{c}" for a in "bdkl" for b in "aeiou" for c in ("n", "r", "st", "")]
    symbols = [] if are_renamed else [SEPARATOR_TOKEN, REWARD_TOKEN]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(words[n::7]) for n in range(7)), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320, model_type="unigram", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, hard_vocab_limit=False, control_symbols=symbols,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    if are_renamed:
        beyond = {400: SEPARATOR_TOKEN, 401: REWARD_TOKEN}
        added = {str(id): {"content": token, "special": True} for id, token in beyond.items()}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path if are_renamed else tmp_path / "tokenizer.model")
    (tmp_path / "export").mkdir()
    export_tokenizer(tokenizer, tmp_path / "export", max_length=64)
    assert "differently" not in capsys.readouterr().err
    loaded = AutoTokenizer.from_pretrained(tmp_path / "export")
    text = f"ban dest{tokenizer.separator_token}kor 12{tokenizer.reward_token}"
    halves = [*tokenizer.encode("ban dest"), tokenizer.separator_id, *tokenizer.encode("kor 12"), tokenizer.reward_id]
    assert loaded(text).input_ids == [tokenizer.bos_id, *halves]


# --- behind a server -------------------------------------------------------------------------------------------------


def mismatch(client: RewardClient) -> str:
    with client, pytest.raises(UserError, match="give the directory of the served export") as caught:
        client.score(ITEMS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("engine", ["megatron-polar", "vllm"])
def test_our_own_server_is_not_asked_with_another_tokenizer(engine, trained, other, tokenizer_path, tmp_path):
    with serving(trained, directory=tmp_path) as server:
        message = mismatch(RewardClient(server.url, engine=engine, tokenizer=other))
        assert names_both(message, other, tokenizer_path)
        with server.client() as http:
            assert not any("/v1/score" in name or "/pooling" in name for name in metrics_of(http))
        own = checkpoint_of(trained, STEPS) / "tokenizer"
        with RewardClient(server.url, engine=engine, tokenizer=own, max_sequence_length=256) as client:
            assert len(client.score(ITEMS[:3])) == 3


def served(directory) -> tuple:
    """vLLM's /v1/models."""
    entry = {"id": "polar", "object": "model", "owned_by": "vllm", "root": str(directory), "max_model_len": 256}
    return ok({"object": "list", "data": [entry]})


def test_an_engine_is_not_asked_with_another_tokenizer_where_its_model_can_be_read(
    export, other, tokenizer_path, capfd
):
    with FlakyServer(lambda request: ok(pooling(request)), lambda: served(export)) as server:
        client = RewardClient(server.url, engine="vllm", tokenizer=other)
        assert names_both(mismatch(client), other, tokenizer_path)
        mismatch(RewardClient(server.url, engine="vllm", tokenizer=other, model="polar", compat="official"))
        assert server.requests == []
    with FlakyServer(lambda request: ok(pooling(request)), lambda: served(export)) as server:
        with RewardClient(server.url, engine="vllm", tokenizer=export) as client:
            client.score(ITEMS[:1])
            client.score(ITEMS[:1])
            assert server.num_looks == 1
        assert "warning" not in capfd.readouterr().err
        with RewardClient(server.url, engine="vllm", tokenizer=tokenizer_path) as client:
            client.score(ITEMS[:1])
        assert "trained with 'pretrain', and items that name no wrapper are joined as 'sft'" in capfd.readouterr().err


NO_ANSWERS = {
    "no such page": lambda: (404, {}, {}),
    "an error": lambda: (500, {}, {}),
    "hangs up": lambda: None,
    "hangs": lambda: time.sleep(1),
    "no JSON": lambda: ok(b"<html>"),
    "no UTF-8": lambda: ok(b"\xff"),
    "too deep": lambda: ok(b"[" * 200_000),
    "a list": lambda: ok([1]),
    "no models": lambda: ok({"data": []}),
    "numbers": lambda: ok({"data": [1, {"id": 3, "root": 7}]}),
    "a directory that is not here": lambda: served("/nowhere/at all"),
    "no path": lambda: served("a\0b"),
    "no fingerprint": lambda: ok({"data": [{"owned_by": "megatron-polar", "tokenizer": 3}]}),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_a_server_that_does_not_say_its_tokenizer_is_asked_all_the_same(name, client_of, tokenizer_path, monkeypatch):
    monkeypatch.setattr(transport, "_LOOK_SECONDS", 0.2)
    with FlakyServer(lambda request: ok(pooling(request)), NO_ANSWERS[name]) as server:
        rewards = client_of(server.url, max_concurrency=1).score(ITEMS[:8])
        assert rewards == [value_of(sequence_of(tokenizer_path, item)) for item in ITEMS[:8]]
        assert len(server.requests) == 2


# --- in training -----------------------------------------------------------------------------------------------------


def test_data_of_another_tokenizer_than_init_from_are_refused_with_the_checkpoints_own(
    trajectory_corpus, other, tokenizer_path, tmp_path
):
    model = make_model("llama", tmp_path / "model", tokenizer_path=other)
    from_hf(model, output=tmp_path / "base")
    checkpoint = find_checkpoint(tmp_path / "base")
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__init_from=str(tmp_path / "base"))
    config = dataclasses.replace(config, model=load_saved_config(checkpoint / "config.yaml").model)
    message = training_refusal(config)
    assert message.startswith(f"{trajectory_corpus}: made with tokenizer ")
    assert names_both(message, other, tokenizer_path)
    assert f"train.init_from={checkpoint}" in message
    assert f"megatron-polar preprocess INPUT --output ANOTHER_DIR --tokenizer {checkpoint / 'tokenizer'}" in message


def test_a_hugging_face_model_in_the_place_of_a_checkpoint_is_said_to_be_one(
    trajectory_corpus, tokenizer_path, tmp_path
):
    model = make_model("llama", tmp_path / "model", tokenizer_path=tokenizer_path)
    said = f"{model}: this is a Hugging Face model; convert it first: megatron-polar convert from-hf --model {model} "
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__init_from=str(model))
    assert training_refusal(config).startswith(f"train.init_from: {said}")
    with pytest.raises(UserError) as caught:
        to_hf(model, output=tmp_path / "export", layout="internlm2")
    assert str(caught.value).startswith(said)
