"""A model is asked with what joined prompts and answers in its training, unless somebody says otherwise."""

import json
import shutil

import numpy as np
import pytest
from conftest import write_rankings, write_trajectories
from flaky_server import FlakyServer, native, ok, pooling
from hugging_face_models import make_model
from ranks import run_ranks
from reward_items import sequence_of
from servers import asked, serving
from tiny_runs import STEPS, checkpoint_of, run_training, tiny_config

from megatron_polar import cli
from megatron_polar.config.schema import DatasetSource
from megatron_polar.convert.convert import from_hf, to_hf
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.preprocess import preprocess
from megatron_polar.errors import UserError
from megatron_polar.manifest import encode_manifest
from megatron_polar.score.scorer import load_scorer
from megatron_polar.score.suites import load_suite, with_wrapper
from megatron_polar.serve.client import RewardClient, RewardItem
from megatron_polar.train.checkpoint_files import encode_state, read_state

LINE = {"prompt": "ba ke", "reference": "li mo", "outputs": ["li mo", "zo zo zo"]}
ITEM = RewardItem("ba ke", "li mo", "zo zo zo")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Trajectories whose lines name no wrapper."""
    path = write_trajectories(tmp_path_factory.mktemp("texts") / "in.jsonl", num_prompts=40, seed=3)
    path.write_text(path.read_text().replace(', "wrapper": "pretrain"}', "}"))
    return path


@pytest.fixture(scope="module")
def trained(texts, tokenizer_path, tmp_path_factory):
    """A run directory: trained as README says, on data that `--wrapper pretrain` was given for."""
    directory = tmp_path_factory.mktemp("wrapper")
    preprocess([texts], output=directory / "data", tokenizer_path=tokenizer_path, wrapper="pretrain")
    config = tiny_config(directory / "data", directory / "run", optimizer__lr=1e-2, checkpoint__save_interval=STEPS)
    run_training(config)
    return directory / "run"


@pytest.fixture(scope="module")
def export(trained):
    """The run in Hugging Face's format."""
    return to_hf(trained, output=trained.parent / "export", layout="sequence-classification")


# --- what is known ---------------------------------------------------------------------------------------------------


def wrapper_of_data(*corpora) -> str:
    sources = [DatasetSource(str(corpus)) for corpus in corpora]
    return ComparisonDataset(sources, seed=1, candidates_per_comparison=2, max_sequence_length=256).wrapper


def test_data_know_what_their_documents_have_whatever_the_default_was(
    trajectory_corpus, ranking_corpus, sentence_corpus, tmp_path
):
    manifest = json.loads((trajectory_corpus / "manifest.json").read_text())
    assert manifest["settings"]["wrapper"] == "sft"  # its lines name another one
    assert wrapper_of_data(trajectory_corpus) == "pretrain"
    assert wrapper_of_data(ranking_corpus) == "sft"
    assert wrapper_of_data(trajectory_corpus, ranking_corpus) == ""
    assert wrapper_of_data(sentence_corpus) == ""  # lines of both kinds


def test_older_data_and_older_checkpoints_do_not_say_and_wrong_ones_are_refused(trained, ranking_corpus, tmp_path):
    old = shutil.copytree(ranking_corpus, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest.pop("wrappers") == ["sft"]
    (old / "manifest.json").write_bytes(encode_manifest(manifest))
    assert wrapper_of_data(old) == ""
    (old / "manifest.json").write_bytes(encode_manifest(manifest | {"wrappers": ["chat"]}))
    with pytest.raises(UserError, match="odd 'wrappers'"):
        wrapper_of_data(old)
    state = read_state(checkpoint_of(trained, STEPS))
    content = json.loads(encode_state(state))
    del content["wrapper"]
    (tmp_path / "state.json").write_text(json.dumps(content))
    assert read_state(tmp_path).wrapper == ""
    (tmp_path / "state.json").write_text(json.dumps(content | {"wrapper": "chat"}))
    with pytest.raises(UserError, match="wrapper is 'chat'"):
        read_state(tmp_path)


def test_a_checkpoint_knows_the_wrapper_of_its_own_data(trained, tokenizer_path, tmp_path):
    assert read_state(checkpoint_of(trained, STEPS)).wrapper == "pretrain"
    source = write_rankings(tmp_path / "in.jsonl", num_prompts=16, seed=2)
    preprocess([source], output=tmp_path / "data", tokenizer_path=tokenizer_path)
    tuned = tiny_config(tmp_path / "data", tmp_path / "tuned", train__init_from=str(trained), train__num_steps=1)
    run_training(tuned)
    assert read_state(checkpoint_of(tmp_path / "tuned", 1)).wrapper == "sft"


def wrapper_of_scorer(directory) -> str:
    return load_scorer(directory, device_kind="cpu").wrapper


def test_it_travels_through_hugging_faces_format(trained, export, tokenizer_path, tmp_path):
    assert json.loads((export / "config.json").read_text())["polar_wrapper"] == "pretrain"
    assert read_state(from_hf(export, output=tmp_path / "again")).wrapper == "pretrain"
    assert run_ranks(wrapper_of_scorer, 1, export) == ["pretrain"]
    foreign = make_model("llama", tmp_path / "foreign", tokenizer_path=tokenizer_path)
    checkpoint = from_hf(foreign, output=tmp_path / "converted")
    assert read_state(checkpoint).wrapper == ""
    to_hf(checkpoint, output=tmp_path / "out", layout="sequence-classification")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "polar_wrapper" not in config
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"polar_wrapper": "chat"}))
    with pytest.raises(UserError, match="polar_wrapper is 'chat'; use one of sft, pretrain"):
        from_hf(tmp_path / "out", output=tmp_path / "no")


# --- score, evaluate and serve ---------------------------------------------------------------------------------------


def command(*arguments) -> None:
    assert run_ranks(cli.main, 1, [*map(str, arguments), "--device", "cpu"]) == [0]


def scored(directory, *options, line=LINE, into) -> list[float]:
    (into / "in.jsonl").write_text(json.dumps(line) + "\n")
    command("score", "--checkpoint", directory, "--input", into / "in.jsonl", "--output", into / "out", *options)
    return json.loads((into / "out").read_text())["rewards"]


@pytest.mark.parametrize("kind", ["trained", "export"])
def test_score_takes_the_models_own(kind, request, tmp_path, capfd):
    model = request.getfixturevalue(kind)
    own = scored(model, into=tmp_path)
    said = capfd.readouterr().err
    assert "wrapper of texts that name none: pretrain (as in training)" in said and "warning" not in said
    named = scored(model, line=LINE | {"wrapper": "pretrain"}, into=tmp_path)
    other = scored(model, line=LINE | {"wrapper": "sft"}, into=tmp_path)
    assert own == named
    assert np.abs(np.subtract(own, other)).max() > 1e-3
    capfd.readouterr()
    assert scored(model, "--wrapper", "sft", into=tmp_path) == other
    assert "warning: --wrapper sft: " in (said := capfd.readouterr().err) and "trained with pretrain" in said


def test_evaluate_takes_the_models_own(trained, texts, tmp_path):
    for name, options in {"own": (), "pretrain": ("--wrapper", "pretrain"), "sft": ("--wrapper", "sft")}.items():
        arguments = ("--suite", "policies", "--data", texts, "--limit", 8, "--output", tmp_path / name, *options)
        command("evaluate", "--checkpoint", trained, *arguments)
    own, pretrain, sft = ((tmp_path / name / "rewards.jsonl").read_text() for name in ("own", "pretrain", "sft"))
    assert own == pretrain != sft


def test_items_that_name_a_wrapper_keep_it(texts, tmp_path):
    line = json.loads(texts.read_text().splitlines()[0])
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line | {'wrapper': 'sft'})}\n")
    items = load_suite("policies", tmp_path / "in.jsonl", default_wrapper=None)
    assert [item.wrapper for item in items] == [None, "sft"]
    assert [item.wrapper for item in with_wrapper(items, "pretrain")] == ["pretrain", "sft"]
    (tmp_path / "in.jsonl").write_text(json.dumps(line | {"wrapper": None}) + "\n")
    with pytest.raises(UserError, match="'wrapper' is a JSON null"):
        load_suite("policies", tmp_path / "in.jsonl", default_wrapper=None)


def test_serve_takes_the_models_own_and_the_client_leaves_it_to_the_server(trained, tmp_path):
    wanted = scored(trained, line=LINE | {"wrapper": "pretrain"}, into=tmp_path)
    with serving(trained, directory=tmp_path) as server:
        with server.client() as client:
            assert client.get("/v1/models").json()["data"][0]["wrapper"] == "pretrain"
            rewards = asked(client, "/v1/score", {"items": [LINE]})["rewards"][0]
        with RewardClient(server.url, engine="megatron-polar") as client:
            reward = client.score([ITEM])[0]
    np.testing.assert_allclose(rewards, wanted, atol=1e-6)
    assert reward == pytest.approx(wanted[1], abs=1e-6)


# --- the client ------------------------------------------------------------------------------------------------------


def test_the_client_leaves_the_field_out_unless_a_wrapper_is_given():
    with FlakyServer(lambda request: ok(native(request))) as server:
        for options, item, wanted in (
            ({}, ITEM, {}),
            ({"wrapper": "pretrain"}, ITEM, {"wrapper": "pretrain"}),
            ({"wrapper": "pretrain"}, RewardItem("a", "b", "c", "sft"), {"wrapper": "sft"}),
        ):
            with RewardClient(server.url, engine="megatron-polar", **options) as client:
                client.score([item])
            asked_item = server.requests[-1].body["items"][0]
            assert {key: asked_item[key] for key in asked_item if key == "wrapper"} == wanted
    with pytest.raises(UserError, match="wrapper='chat' is unknown"):
        RewardClient("http://127.0.0.1:1", engine="megatron-polar", wrapper="chat")


def test_engines_are_asked_with_the_wrapper_of_the_export(export, tokenizer_path, capfd):
    def ids(tokenizer, item=ITEM, **options) -> list[int]:
        with RewardClient(server.url, engine="vllm", tokenizer=tokenizer, **options) as client:
            client.score([item])
        return server.requests[-1].body["input"][0]

    pretrain, sft = (
        sequence_of(tokenizer_path, RewardItem(ITEM.prompt, ITEM.reference, ITEM.output, wrapper))
        for wrapper in ("pretrain", "sft")
    )
    with FlakyServer(lambda request: ok(pooling(request))) as server:
        assert ids(export) == pretrain != sft
        assert ids(export, RewardItem(ITEM.prompt, ITEM.reference, ITEM.output, "sft")) == sft
        assert ids(tokenizer_path) == sft
        assert ids(tokenizer_path, wrapper="pretrain") == pretrain
        assert "warning" not in capfd.readouterr().err
        assert ids(export, wrapper="sft") == sft
        assert "warning: wrapper='sft': the model of" in capfd.readouterr().err
