"""`megatron-polar serve`: rewards over HTTP are the scorer's, in every engine's shape; else there is a reason."""

import json
import math
import os
import socket

import numpy as np
import pytest
from hugging_face_models import make_model
from ranks import run_ranks
from servers import (
    ITEM,
    asked,
    error_of,
    expected,
    metrics_of,
    read_all,
    request_of,
    serving,
    trained_checkpoint,
)

from megatron_polar import cli
from megatron_polar.errors import UserError
from megatron_polar.score.requests import ScoreRequest
from megatron_polar.serve.shapes import sigmoid
from megatron_polar.serve.token import TOKEN_VARIABLE, read_token

SEPARATOR, REWARD = "<|reward|>", "[UNUSED_TOKEN_130]"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, trajectory_corpus) -> str:
    return trained_checkpoint(trajectory_corpus, tmp_path_factory.mktemp("server") / "run")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """One server for all tests that only ask."""
    directory = tmp_path_factory.mktemp("serving")
    limits = ["--max-items", 12, "--max-body-bytes", 100_000, "--max-text-bytes", 100_000]
    with serving(checkpoint, *limits, directory=directory) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def texts_of(item: dict) -> list[str]:
    """The whole POLAR text of each output, as clients of engines build it."""
    joint = "\n" if item.get("wrapper", "pretrain") == "sft" else ""
    head = f"{item['prompt']}{joint}{item['reference']}{SEPARATOR}{item['prompt']}{joint}"
    return [f"{head}{output}{REWARD}" for output in item["outputs"]]


def ids_of(item: dict, tokenizer_path) -> list[list[int]]:
    from megatron_polar.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    rows = []
    for text in texts_of(item):
        halves = [tokenizer.encode(half) for half in text.removesuffix(REWARD).split(SEPARATOR)]
        rows.append([tokenizer.bos_id, *halves[0], tokenizer.separator_id, *halves[1], tokenizer.reward_id])
    return rows


# --- Rewards ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def item_rewards(checkpoint) -> list[float]:
    rewards = expected(checkpoint, request_of(ITEM))[0]
    assert np.ptp(rewards) > 0.1
    return rewards


def test_native_rewards_equal_the_scorers(client, checkpoint):
    chat = [{"role": "user", "content": "ba"}, {"role": "assistant", "content": "ke"}]
    items = [
        ITEM,
        {"prompt": "nu", "reference": "zo li", "outputs": ["zo"], "wrapper": "pretrain"},
        {"prompt": chat, "reference": [{"role": "assistant", "content": "x"}], "outputs": [chat, ""]},
    ]
    answer = asked(client, "/v1/score", {"items": items, "model": "run"})
    plain = {"prompt": "ba\nke", "reference": "x", "outputs": ["ba\nke", ""]}
    wanted = expected(checkpoint, *map(request_of, [*items[:2], plain]))
    assert [len(row) for row in answer["rewards"]] == [3, 1, 2]
    np.testing.assert_allclose(np.concatenate(answer["rewards"]), np.concatenate(wanted), atol=1e-6)
    assert answer["truncated"] == [[False] * 3, [False], [False] * 2]
    assert answer["model"] == "run"


def test_every_engines_shape_gives_the_scorers_rewards(client, checkpoint, item_rewards, tokenizer_path):
    texts, ids = texts_of(ITEM), ids_of(ITEM, tokenizer_path)
    raw = {"use_activation": False}
    for given in (texts, ids):
        pooled = asked(client, "/pooling", {"model": "run", "input": given, **raw})
        assert [entry["index"] for entry in pooled["data"]] == [0, 1, 2]
        assert pooled["object"] == "list"
        assert pooled["usage"]["prompt_tokens"] == sum(map(len, ids))
        np.testing.assert_allclose([entry["data"][-1][0] for entry in pooled["data"]], item_rewards, atol=1e-6)
        classified = asked(client, "/classify", {"input": given, **raw})["data"]
        np.testing.assert_allclose([entry["probs"][-1] for entry in classified], item_rewards, atol=1e-6)
        assert [entry["num_classes"] for entry in classified] == [1, 1, 1]
        listed = asked(client, "/classify", {("text" if given is texts else "input_ids"): given, "model": "any"})
        np.testing.assert_allclose([entry["embedding"][0] for entry in listed], item_rewards, atol=1e-6)
        assert [entry["meta_info"]["prompt_tokens"] for entry in listed] == [len(row) for row in ids]
    alone = expected(checkpoint, request_of(ITEM | {"outputs": ITEM["outputs"][:1]}))[0][0]
    assert asked(client, "/pooling", {"input": texts[0], **raw})["data"][0]["data"][-1][0] == pytest.approx(alone, 1e-6)
    assert asked(client, "/pooling", {"input": ids[0], **raw})["data"][0]["data"][-1][0] == pytest.approx(alone, 1e-6)
    assert asked(client, "/classify", {"text": texts[0]})["embedding"][0] == pytest.approx(alone, 1e-6)


def test_openrlhf_gets_the_label_as_reference_and_the_query_without_its_prompt_as_output(client, checkpoint):
    body = {"query": ["ba ke li", "nu zo"], "prompts": ["ba ke", "nu"], "labels": ["mo", "ra"]}
    answer = asked(client, "/get_reward", body)
    wanted = expected(
        checkpoint, ScoreRequest("ba ke", "mo", (" li",), "pretrain"), ScoreRequest("nu", "ra", (" zo",), "pretrain")
    )
    np.testing.assert_allclose(answer["rewards"], np.concatenate(wanted), atol=1e-6)
    np.testing.assert_allclose(answer["scores"], [sigmoid(reward) for reward in answer["rewards"]])
    assert answer["extra_logs"] == {"truncated": [0.0, 0.0]}


def test_openrlhfs_end_tokens_are_no_words(client):
    """A policy that stops by itself gets the reward of its words, however its chat format closes an answer."""
    ends = ["", "</s>", "<|im_end|>\n", "<|eot_id|><|end_of_text|>"]
    body = {"query": [f"ba ke li{end}" for end in ends], "prompts": ["ba ke"] * 4, "labels": ["mo"] * 4}
    rewards = asked(client, "/get_reward", body)["rewards"]
    assert rewards == pytest.approx([rewards[0]] * 4, abs=1e-6)
    within = {"query": ["ba ke </s> li"], "prompts": ["ba ke"], "labels": ["mo"]}
    assert abs(asked(client, "/get_reward", within)["rewards"][0] - rewards[0]) > 1e-4


def test_vllm_squashes_rewards_unless_told_not_to(client, item_rewards):
    for extra in ({}, {"use_activation": True}, {"use_activation": None}):
        pooled = asked(client, "/pooling", {"input": texts_of(ITEM), **extra})["data"]
        classified = asked(client, "/classify", {"input": texts_of(ITEM), **extra})["data"]
        squashed = [1 / (1 + math.exp(-reward)) for reward in item_rewards]
        np.testing.assert_allclose([entry["data"][-1][0] for entry in pooled], squashed, atol=1e-6)
        np.testing.assert_allclose([entry["probs"][0] for entry in classified], squashed, atol=1e-6)
    assert (sigmoid(-1e4), sigmoid(0.0), sigmoid(1e4)) == (0.0, 0.5, 1.0)


def test_lmdeploys_pooling_is_a_bare_number(checkpoint, item_rewards, tmp_path):
    with serving(checkpoint, "--pooling-shape", "lmdeploy", directory=tmp_path) as server, server.client() as client:
        data = asked(client, "/pooling", {"input": texts_of(ITEM)})["data"]
        np.testing.assert_allclose([entry["data"] for entry in data], item_rewards, atol=1e-6)


def test_a_hugging_face_directory_is_served_as_it_is(tokenizer_path, tmp_path):
    model = make_model("llama", tmp_path / "model", tokenizer_path=tokenizer_path)
    with serving(model, "--model-name", "mine", directory=tmp_path) as server, server.client() as client:
        answer = asked(client, "/v1/score", {"items": [ITEM], "model": "mine"})
    np.testing.assert_allclose(answer["rewards"], expected(str(model), request_of(ITEM)), atol=1e-6)


def test_results_have_the_order_of_inputs_whatever_is_grouped(client, checkpoint):
    other = {"prompt": "nu", "reference": "zo li", "outputs": ["zo", "ve ve", "si"]}
    mixed = [text for pair in zip(texts_of(ITEM), texts_of(other), strict=True) for text in pair]
    data = asked(client, "/classify", {"input": mixed, "use_activation": False})["data"]
    first, second = expected(checkpoint, request_of(ITEM), request_of(other))
    wanted = [reward for pair in zip(first, second, strict=True) for reward in pair]
    # Two comparisons in one row instead of two rows: fp32 roundings.
    np.testing.assert_allclose([entry["probs"][0] for entry in data], wanted, atol=1e-5)


@pytest.mark.parametrize("prompt", [{}, {"prompt": "ba ke li " * 200}], ids=["whole", "cut"])
def test_outputs_that_share_a_prefix_equal_each_alone(client, prompt):
    outputs = [" ".join(["zo", "li ra", "mo"][: 1 + k % 3]) + f" {'ve' * k}" for k in range(12)]
    item = ITEM | {"outputs": outputs} | prompt
    together = asked(client, "/v1/score", {"items": [item]})["rewards"][0]
    alone = [asked(client, "/v1/score", {"items": [item | {"outputs": [o]}]})["rewards"][0][0] for o in outputs]
    np.testing.assert_allclose(together, alone, atol=2e-5)  # the acceptance bound; fp32 roundings are below it
    if not prompt:
        listed = asked(client, "/pooling", {"input": texts_of(item), "use_activation": False})["data"]
        np.testing.assert_allclose([entry["data"][-1][0] for entry in listed], alone, atol=2e-5)


def test_control_tokens_in_words_are_text(client, checkpoint):
    item = ITEM | {"prompt": f"ba {SEPARATOR} {REWARD}", "outputs": [f"{REWARD}", "<s>"]}
    answer = asked(client, "/v1/score", {"items": [item]})
    np.testing.assert_allclose(answer["rewards"][0], expected(checkpoint, request_of(item))[0], atol=1e-6)


def test_long_texts_are_cut_as_in_training_and_said_to_be(client, checkpoint):
    long = "ba ke li " * 200
    items = [
        ITEM | {"outputs": ["li", long]},
        ITEM | {"reference": long, "outputs": ["li"]},
        ITEM | {"prompt": long, "outputs": ["li", "mo"]},
        ITEM,
    ]
    answer = asked(client, "/v1/score", {"items": items})
    assert answer["truncated"] == [[False, True], [True], [True, True], [False] * 3]
    wanted = expected(checkpoint, *map(request_of, items))
    np.testing.assert_allclose(np.concatenate(answer["rewards"]), np.concatenate(wanted), atol=1e-5)


# --- Refusals --------------------------------------------------------------------------------------------------------

GOOD_TEXT = texts_of(ITEM)[0]


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        ("/v1/score", [], "the body is a list"),
        ("/v1/score", {}, "items is missing"),
        ("/v1/score", {"items": []}, "items is empty"),
        ("/v1/score", {"items": {}}, "items is an object"),
        ("/v1/score", {"items": [1]}, "items[0] is a number"),
        ("/v1/score", {"items": [ITEM, ITEM | {"outputs": "x"}]}, "items[1].outputs is a string"),
        ("/v1/score", {"items": [ITEM | {"outputs": []}]}, "items[0].outputs is empty"),
        ("/v1/score", {"items": [ITEM | {"outputs": ["x", 3]}]}, "items[0].outputs[1]: give a string or a list"),
        ("/v1/score", {"items": [ITEM | {"outputs": ["x", [{"role": "user"}]]}]}, 'needs a "content" string'),
        ("/v1/score", {"items": [ITEM | {"prompt": None}]}, "items[0].prompt is missing"),
        ("/v1/score", {"items": [ITEM | {"reference": {}}]}, "items[0].reference: "),
        ("/v1/score", {"items": [ITEM | {"wrapper": "chat"}]}, "items[0].wrapper must be one of sft, pretrain"),
        ("/v1/score", {"items": [ITEM | {"wrapper": []}]}, "items[0].wrapper must be one of sft, pretrain"),
        ("/v1/score", {"items": [ITEM | {"wraper": "sft"}]}, "items[0].wraper is not known"),
        ("/v1/score", {"items": [ITEM], "stream": True}, "stream is not known"),
        ("/v1/score", {"items": [ITEM], "model": 3}, "model is a number"),
        ("/v1/score", {"items": [ITEM | {"outputs": ["x"] * 13}]}, "items has 13 outputs; at most 12"),
        ("/v1/score", {"items": [ITEM | {"prompt": "é" * 5001, "outputs": ["x"] * 9}]}, "items: 100020 bytes"),
        ("/v1/score", {"items": [ITEM | {"prompt": "é" * 9000, "outputs": ["x"] * 2}] * 2}, "items: 108000 bytes"),
        ("/pooling", {}, "input is missing"),
        ("/pooling", {"input": [GOOD_TEXT] * 13}, "input has 13 inputs; at most 12"),
        ("/pooling", {"input": [GOOD_TEXT, 3]}, "unmixed"),
        ("/pooling", {"input": [1.5]}, "unmixed"),
        ("/pooling", {"input": [True]}, "unmixed"),
        ("/pooling", {"input": [[1], []]}, "input[1] must be a non-empty list"),
        ("/pooling", {"input": [[1, None]]}, "input[0] must be a non-empty list of whole numbers"),
        ("/pooling", {"input": GOOD_TEXT, "use_activation": "no"}, "use_activation is a string"),
        ("/pooling", {"input": GOOD_TEXT, "encoding_format": "base64"}, "encoding_format must be float"),
        ("/pooling", {"input": "ba ke"}, f"input does not end with {REWARD}"),
        ("/pooling", {"input": GOOD_TEXT + "\n"}, f"input does not end with {REWARD}"),
        ("/pooling", {"input": [GOOD_TEXT, f"ba{REWARD}"]}, "input[1] has 0 times <|reward|>"),
        ("/pooling", {"input": f"{SEPARATOR}{GOOD_TEXT}"}, "input has 2 times <|reward|>"),
        ("/pooling", {"input": f"{REWARD}{GOOD_TEXT}"}, "within it"),
        ("/pooling", {"input": f"{'ba ke ' * 200}{GOOD_TEXT}"}, "tokens and the model takes 256"),
        ("/pooling", {"input": [1, 5, -3]}, "outside of the vocabulary, 0 to 419"),
        ("/pooling", {"input": [1, 5, 420]}, "outside of the vocabulary"),
        ("/pooling", {"input": [1, 5, 2**63]}, "outside of the vocabulary"),
        ("/pooling", {"input": [1, 4, 7]}, "does not end with 5"),
        ("/pooling", {"input": [7, 4, 7, 5]}, "does not begin with 1"),
        ("/pooling", {"input": [1, 4, 5, 5]}, "within it"),
        ("/pooling", {"input": [[1, 7, 5]]}, "input[0] has 0 times 4"),
        ("/pooling", {"input": [1, 4, 4, 5]}, "input has 2 times 4"),
        ("/pooling", {"input": [1, 4, *[7] * 254, 5]}, "input has 257 tokens"),
        ("/classify", {}, "exactly one of"),
        ("/classify", {"text": GOOD_TEXT, "input": GOOD_TEXT}, "exactly one of"),
        ("/classify", {"text": [[1, 4, 5]]}, "token ids go into input_ids"),
        ("/classify", {"input_ids": [GOOD_TEXT]}, "texts go into text"),
        ("/get_reward", {"query": ["ab"], "prompts": ["a"]}, "labels is missing"),
        ("/get_reward", {"query": ["ab"], "prompts": ["a"], "labels": [None]}, "labels[0] is null"),
        ("/get_reward", {"query": ["ab"], "prompts": ["a"], "labels": [""]}, "labels[0], the reference, is empty"),
        ("/get_reward", {"query": ["ab"], "prompts": ["a"], "labels": ["x", "y"]}, "have 1, 1, 2 entries"),
        (
            "/get_reward",
            {"query": ["ab"], "prompts": ["b"], "labels": ["x"]},
            "query[0] does not begin with prompts[0]",
        ),
        ("/get_reward", {"query": [1], "prompts": ["b"], "labels": ["x"]}, "query[0] is a number"),
        (
            "/get_reward",
            {"query": ["é" * 6000 + "x"], "prompts": ["é" * 6000], "labels": [list("abcde")]},
            "query: 120000 bytes of prompts",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_by_the_name_of_its_field(client, path, body, part):
    error = error_of(client.post(path, json=body), 422)
    assert part in error["message"]


def test_the_bounds_of_lengths_and_counts_are_themselves_allowed(client):
    assert len(asked(client, "/pooling", {"input": [GOOD_TEXT] * 12})["data"]) == 12
    long = ITEM | {"prompt": "é" * 5000, "outputs": ["x"] * 9}
    assert asked(client, "/v1/score", {"items": [long]})["truncated"] == [[True] * 9]
    assert asked(client, "/pooling", {"input": [1, 4, *[7] * 253, 5]})["usage"]["prompt_tokens"] == 256
    assert asked(client, "/pooling", {"input": [1, 4, 5]})["usage"]["prompt_tokens"] == 3


def test_other_models_paths_methods_and_contents_are_refused(client):
    assert "'run'" in error_of(client.post("/v1/score", json={"items": [ITEM], "model": "gpt"}), 404)["message"]
    assert error_of(client.post("/score", json={}), 404)["type"] == "unknown_path"
    assert error_of(client.post("/pooling/", json={}), 404)["type"] == "unknown_path"
    assert error_of(client.get("/pooling"), 405)["type"] == "method"
    assert error_of(client.post("/pooling", content=b"{}"), 415)["type"] == "content_type"
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert error_of(client.post("/pooling", content=b"{}", headers=headers), 415)["type"] == "content_encoding"
    for content in (b"", b"{", b'{"items": NaN}', b'{"input": "\\ud800"}', b'"\xff"', b"[" * 50_000):
        response = client.post("/pooling", content=content, headers={"content-type": "application/json; charset=utf-8"})
        assert error_of(response, 400)["type"] == "invalid_json"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [100_001, 700_000])
def test_a_body_above_the_limit_is_refused(client, chunked, size):
    body = b'{"items": "' + b"x" * size + b'"}'
    content = iter([body[:70_000], body[70_000:]]) if chunked else body
    response = client.post("/v1/score", content=content, headers={"content-type": "application/json"})
    assert "100000 bytes" in error_of(response, 413)["message"]


def test_a_declared_body_far_above_the_limit_is_refused_before_it_is_sent(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = "POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9999999\r\n\r\n"
        connection.sendall(head.encode())
        assert read_all(connection).startswith(b"HTTP/1.1 413 ")


# --- Who may ask -----------------------------------------------------------------------------------------------------


def test_without_the_token_only_health_and_readiness_are_answered(checkpoint, tmp_path):
    (tmp_path / "token").write_text("correct-horse\n")
    with (
        serving(checkpoint, "--token-file", tmp_path / "token", directory=tmp_path) as server,
        server.client() as client,
    ):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "correct-horse"},
            {"authorization": "Bearer correct-horse2"},
        ):
            for method, path in (("POST", "/v1/score"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/x")):
                response = client.request(method, path, headers=headers)
                error = error_of(response, 401)
                assert error["type"] == "unauthorized"
                assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
        client.headers["authorization"] = "Bearer correct-horse"
        asked(client, "/v1/score", {"items": [ITEM]})
        assert client.get("/v1/models").status_code == 200
        assert "correct-horse" not in server.log.read_text()


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None, variable=TOKEN_VARIABLE) is None
    monkeypatch.setenv(TOKEN_VARIABLE, " from-the-environment ")
    assert read_token(None, variable=TOKEN_VARIABLE) == "from-the-environment"
    (tmp_path / "token").write_text("from-the-file\n")
    assert read_token(tmp_path / "token", variable=TOKEN_VARIABLE) == "from-the-file"
    for bad in ("", "\n", "two words", "two\nlines", "ünï"):
        (tmp_path / "token").write_text(bad)
        with pytest.raises(UserError, match="not an API key"):
            read_token(tmp_path / "token", variable=TOKEN_VARIABLE)
    (tmp_path / "token").write_bytes(b"\xff")
    for unreadable in (tmp_path / "token", tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=f"{unreadable}: the file with the API key cannot be read"):
            read_token(unreadable, variable=TOKEN_VARIABLE)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(TOKEN_VARIABLE, " ")
    assert read_token(None, variable=TOKEN_VARIABLE) is None
    assert f"{TOKEN_VARIABLE} is empty" in capsys.readouterr().err


# --- What cannot start -----------------------------------------------------------------------------------------------


def _serve(arguments: list[str], environment: dict[str, str]) -> int:
    os.environ.pop("WORLD_SIZE")
    os.environ.pop("RANK")
    os.environ.update(environment)
    return cli.main(["serve", "--device", "cpu", *arguments])


@pytest.mark.parametrize(
    ("options", "environment", "part"),
    [
        ([], {"WORLD_SIZE": "2"}, "was started on 2 ranks and works on one"),
        (["--host", "203.0.113.1"], {}, "--host 203.0.113.1 --port 8000: cannot listen there"),
        (["--port", "99999"], {}, "--port 99999: cannot listen there"),
        (["--max-items", "0"], {}, "--max-items 0 must be 1 or more"),
        (["--request-seconds", "nan"], {}, "--request-seconds nan must be"),
        (["--token-file", "/dev/null"], {}, "/dev/null: not an API key"),
        (["--token-file", "/nowhere"], {}, "/nowhere: the file with the API key cannot be read (No such file or"),
        (["--host", "0.0.0.0"], {TOKEN_VARIABLE: ""}, f"{TOKEN_VARIABLE} is empty, and the server would be open"),
    ],
)
def test_a_server_that_cannot_work_says_why(checkpoint, options, environment, part, capfd):
    assert run_ranks(_serve, 1, ["--checkpoint", checkpoint, *options], environment) == [2]
    assert part in capfd.readouterr().err


def test_a_checkpoint_that_cannot_be_loaded_ends_the_server(tmp_path, capfd):
    arguments = ["--checkpoint", str(tmp_path), "--port", "0"]
    assert run_ranks(_serve, 1, arguments, {}) == [2]
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}")


def test_a_taken_port_is_refused(checkpoint, server, capfd):
    assert run_ranks(_serve, 1, ["--checkpoint", checkpoint, "--port", str(server.port)], {}) == [2]
    assert "Address already in use" in capfd.readouterr().err


def test_listening_to_others_without_a_token_is_warned_of(checkpoint, server, tmp_path):
    assert "warning" not in server.log.read_text()
    with serving(checkpoint, "--host", "0.0.0.0", directory=tmp_path) as open_server:
        assert "warning: http://0.0.0.0:" in open_server.log.read_text()


def test_models_tell_what_a_client_needs(client):
    model = client.get("/v1/models").json()["data"][0]
    assert (model["id"], model["max_model_len"], model["max_response_tokens"]) == ("run", 256, 116)
    assert len(model["tokenizer"]) == 64


def test_metrics_count_requests_tokens_and_rewards(client):
    before = metrics_of(client)
    asked(client, "/v1/score", {"items": [ITEM]})
    client.post("/v1/score", json={})
    client.get("/somewhere/else")
    after = metrics_of(client)

    def grown(name: str) -> float:
        return after[f"megatron_polar_{name}"] - before.get(f"megatron_polar_{name}", 0.0)

    assert grown('requests_total{endpoint="/v1/score",status="200"}') == 1
    assert grown('requests_total{endpoint="/v1/score",status="422"}') == 1
    assert grown('requests_total{endpoint="other",status="404"}') == 1
    assert grown('request_seconds_count{endpoint="/v1/score"}') == 2
    assert (grown("batch_sequences_count"), grown("batch_sequences_sum"), grown("reward_count")) == (1, 3, 3)
    assert grown("batch_tokens_sum") < grown("unshared_tokens_total"), "the prefix was computed once"
    assert after["megatron_polar_queue_sequences"] == 0
    assert not any("somewhere" in name for name in after)


def test_replies_are_strict_json(client):
    text = client.post("/v1/score", json={"items": [ITEM]}).text
    assert json.loads(text, parse_constant=pytest.fail)
