"""Rewards come from the engine, complete and in order, or there is an error that says for which item and why.

test_client_calls.py has what the caller decides: servers, threads, keys, settings.
"""

import email.utils
import itertools
import math
import time

import pytest
from flaky_server import FlakyServer, classify, native, ok, pooling, sglang, value_of
from reward_items import ITEMS, refused, sequence_of

from megatron_polar.errors import UserError
from megatron_polar.serve.client import RewardItem

# --- shapes ------------------------------------------------------------------------------------------------------


def _bare(request):
    return pooling(request, lambda value: value)


def _per_sequence(request):
    return pooling(request, lambda value: [value])


SHAPES = {
    "vllm, internlm2": ("vllm", "internlm2", "/pooling", pooling),
    "vllm, internlm2, one list": ("vllm", "internlm2", "/pooling", _per_sequence),
    "vllm, sequence classification": ("vllm", "sequence-classification", "/classify", classify),
    "vllm, answered by lmdeploy's shape": ("vllm", "internlm2", "/pooling", _bare),
    "lmdeploy": ("lmdeploy", "internlm2", "/pooling", _bare),
    "sglang": ("sglang", "internlm2", "/classify", sglang),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_engine_is_sent_the_ids_of_training_and_rewards_come_in_order(shape, client_of, tokenizer_path):
    engine, layout, path, reply = SHAPES[shape]
    with FlakyServer(lambda request: ok(reply(request))) as server:
        rewards = client_of(server.url + "/", engine, layout=layout, model="polar").score(ITEMS)
        assert rewards == [value_of(sequence_of(tokenizer_path, item)) for item in ITEMS]
        assert {request.path for request in server.requests} == {path}
        for request in server.requests:
            body = dict(request.body)
            assert body.pop("model") == "polar"
            assert len(body.pop("input_ids" if engine == "sglang" else "input")) <= 4
            assert body == ({"use_activation": False} if engine == "vllm" else {})


def test_a_large_batch_goes_out_in_parts(client_of):
    sizes = (200_000, 1, 400_000)
    items = [RewardItem("ba", "li", "mo " * size) for size in sizes]
    with FlakyServer(lambda request: ok(native(request))) as server:
        rewards = client_of(server.url, "megatron-polar", tokenizer=None, batch_size=3).score(items)
        assert rewards == [value_of(["ba", "li", item.output, None]) for item in items]
        parts = [len(item["outputs"]) for request in server.requests for item in request.body["items"]]
        assert parts == [1, 2] or sorted(parts) == [1, 1, 1]


def test_our_own_server_gets_texts_and_equal_prompts_and_references_together(client_of):
    items = [ITEMS[i] for i in (0, 3, 1, 4, 2, 5, 49)] + [RewardItem("ba", "li", "mo", "pretrain")]
    items += [RewardItem([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "c", "d")]
    with FlakyServer(lambda request: ok(native(request))) as server:
        rewards = client_of(server.url, "megatron-polar", tokenizer=None, batch_size=6).score(items)
        keys = [("a\nb" if isinstance(i.prompt, list) else i.prompt, i.reference, i.output, i.wrapper) for i in items]
        assert rewards == [value_of(list(key)) for key in keys]
        asked = [item for request in server.requests for item in request.body["items"]]
        assert sorted(len(item["outputs"]) for item in asked) == [1, 1, 1, 3, 3]
        assert {request.path for request in server.requests} == {"/v1/score"}


def test_entries_out_of_order_are_sorted_by_their_index(client_of, tokenizer_path):
    def backwards(request):
        reply = pooling(request)
        return ok(reply | {"data": reply["data"][::-1]})

    with FlakyServer(backwards) as server:
        rewards = client_of(server.url).score(ITEMS[:10])
    assert rewards == [value_of(sequence_of(tokenizer_path, item)) for item in ITEMS[:10]]


def test_no_items_ask_nothing(client_of):
    with FlakyServer(lambda request: ok(pooling(request))) as server:
        assert client_of(server.url).score([]) == []
        assert server.requests == []


# --- failures that pass ------------------------------------------------------------------------------------------


def failing_first(count: int, failure, reply=pooling):
    """A server's behaviour: `failure` for the first `count` requests, then good replies."""
    return lambda request: failure(request) if request.number < count else ok(reply(request))


PASSING = {
    "500": lambda request: (500, {}, {"error": {"message": "boom"}}),
    "502 without a body": lambda request: (502, {}, b""),
    "524 of a proxy": lambda request: (524, {}, b"a timeout occurred"),
    "429": lambda request: (429, {"Retry-After": "0.05"}, {"error": "queue full"}),
    "503, unreadable Retry-After": lambda request: (503, {"Retry-After": "soon"}, {}),
    "hangs up": lambda request: None,
    "no JSON": lambda request: ok(b"<html>busy</html>"),
    "half a reply": lambda request: (200, {"Content-Length": "10"}, b'{"data": ['),
    "NaN once": lambda request: ok(pooling(request, lambda value: [[math.nan]])),
}


@pytest.mark.parametrize("failure", PASSING)
def test_a_failure_that_passes_is_asked_again(failure, client_of, tokenizer_path):
    with FlakyServer(failing_first(3, PASSING[failure])) as server:
        rewards = client_of(server.url).score(ITEMS[:12])
        assert rewards == [value_of(sequence_of(tokenizer_path, item)) for item in ITEMS[:12]]
        assert len(server.requests) == 6


def test_retry_after_is_kept_and_counts_for_every_request(client_of):
    with FlakyServer(failing_first(1, lambda request: (429, {"Retry-After": "0.4"}, {}))) as server:
        client_of(server.url, max_concurrency=1).score(ITEMS[:8])
        times = [request.time for request in server.requests]
        assert len(times) == 3
        assert times[1] - times[0] >= 0.4


def test_retry_after_may_be_a_date():
    from megatron_polar.retry_after import retry_after

    def seconds(value):
        return retry_after({"retry-after": value})

    assert seconds(email.utils.formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)
    assert seconds(email.utils.formatdate(time.time() - 60, usegmt=True)) is None
    assert [seconds(value) for value in ("7", "0", "-3", "nan", "tomorrow", "")] == [7.0, *[None] * 5]


def test_a_server_that_asks_for_no_pause_is_not_hammered(client_of):
    """Eight retries without a pause are over in a moment, and a reinforcement learning run with them."""
    with FlakyServer(lambda request: (503, {"Retry-After": "0"}, {})) as server:
        refused(client_of(server.url, retries=4, backoff_seconds=0.04), ITEMS[:2])
        times = [request.time for request in server.requests]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) == 5
    assert all(pause >= 0.02 * 2**k for k, pause in enumerate(pauses))


def test_a_server_that_loads_its_model_is_waited_for_whatever_the_retries(client_of, tokenizer_path):
    def loading(request):
        return 503, {"Retry-After": "0.02"}, {"error": {"type": "loading", "message": "still being loaded"}}

    with FlakyServer(failing_first(6, loading)) as server:
        rewards = client_of(server.url, retries=0).score(ITEMS[:2])
        assert len(server.requests) == 7
    assert rewards == [value_of(sequence_of(tokenizer_path, item)) for item in ITEMS[:2]]
    with FlakyServer(loading) as server:
        refused(client_of(server.url, retries=0, deadline_seconds=1), ITEMS[:2])
        assert len(server.requests) > 2


def test_a_request_that_takes_too_long_is_asked_again(client_of, tokenizer_path):
    def slow_once(request):
        time.sleep(6 if request.number == 0 else 0.0)
        return ok(pooling(request))

    with FlakyServer(slow_once) as server:
        begun = time.monotonic()
        rewards = client_of(server.url, timeout_seconds=0.4).score(ITEMS[:3])
        assert time.monotonic() - begun < 5
    assert rewards == [value_of(sequence_of(tokenizer_path, item)) for item in ITEMS[:3]]


def test_pauses_grow_and_end_after_the_retries(client_of):
    with FlakyServer(PASSING["500"]) as server:
        error = refused(client_of(server.url, retries=4, backoff_seconds=0.04), ITEMS[:2])
        assert error.indices == (0, 1)
        assert "HTTP 500" in error.reason and "boom" in error.reason and "5 attempts" in error.reason
        times = [request.time for request in server.requests]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) == 5
    assert all(pause >= 0.02 * 2**k for k, pause in enumerate(pauses))  # half of the nominal pause at least


def test_the_deadline_ends_everything(client_of):
    with FlakyServer(lambda request: time.sleep(5)) as server:
        begun = time.monotonic()
        error = refused(client_of(server.url, deadline_seconds=0.5, retries=1000), ITEMS)
        assert time.monotonic() - begun < 4
        assert "no reply" in error.reason


def test_a_server_that_wants_to_be_left_alone_for_too_long_is_an_error_at_once(client_of):
    with FlakyServer(lambda request: (429, {"Retry-After": "3600"}, {})) as server:
        client = client_of(server.url, deadline_seconds=60)
        begun = time.monotonic()
        assert "HTTP 429" in refused(client, ITEMS[:1]).reason
        assert "left alone" in refused(client, ITEMS[:1]).reason
        assert time.monotonic() - begun < 30  # not the hour, nor the minute
        assert len(server.requests) == 1


# --- replies that are no rewards ---------------------------------------------------------------------------------


def _changed(position: int, **changes):
    def reply(request):
        answer = pooling(request)
        if position < len(answer["data"]):
            answer["data"][position] |= changes
        return ok(answer)

    return reply


BAD_REPLIES = {
    # name: (behaviour, places of the items at fault, part of the reason); four items are asked
    "one reward too few": (lambda r: ok({"data": pooling(r)["data"][:-1]}), (0, 1, 2, 3), "3 rewards for 4 items"),
    "one too many": (lambda r: ok({"data": pooling(r)["data"] * 2}), (0, 1, 2, 3), "8 rewards for 4 items"),
    "no rewards": (lambda r: ok({"data": []}), (0, 1, 2, 3), "0 rewards for 4 items"),
    "a missing index": (_changed(2, index=7), (2,), "no entry has index 2"),
    "an index twice": (_changed(1, index=0), (1,), "no entry has index 1"),
    "an index for some": (_changed(0, index=None), (0,), "no entry has index 0"),
    "NaN": (_changed(1, data=[[math.nan]]), (1,), "nan, not finite"),
    "infinity": (_changed(3, data=[math.inf]), (3,), "inf, not finite"),
    "minus infinity": (_changed(0, data=-math.inf), (0,), "-inf, not finite"),
    "an integer beyond float": (_changed(0, data=10**400), (0,), "inf, not finite"),
    "null": (_changed(2, data=None), (2,), "None, no number"),
    "true": (_changed(2, data=[[True]]), (2,), "True, no number"),
    "a text": (_changed(2, data="0.5"), (2,), "0.5, no number"),
    "an empty list": (_changed(2, data=[]), (2,), "0 numbers where a reward model gives one"),
    "an empty row": (_changed(2, data=[[]]), (2,), "0 numbers where a reward model gives one"),
    "an embedding": (_changed(0, data=[0.1, 0.2, 0.3]), (0,), "3 numbers where a reward model gives one"),
    "a logit per word": (_changed(0, data=[[0.1], [0.2, 0.3]]), (0,), "2 numbers where a reward model gives one"),
    "no data": (lambda r: ok({"rewards": [1, 2, 3, 4]}), (0, 1, 2, 3), "no 'data'"),
    "a list": (lambda r: ok([1, 2, 3, 4]), (0, 1, 2, 3), "no 'data'"),
    "numbers as entries": (lambda r: ok({"data": [1, 2, 3, 4]}), (0, 1, 2, 3), "not a list of objects"),
    "an entry without its key": (
        lambda r: ok({"data": [{"index": i} for i in range(4)]}),
        (0,),
        "has no data or probs",
    ),
    "an error with status 200": (lambda r: ok({"object": "error", "message": "x"}), (0, 1, 2, 3), "no 'data'"),
    "no JSON": (lambda r: ok(b"ok"), (0, 1, 2, 3), "not JSON"),
    "too deep": (lambda r: ok(b"[" * 200_000), (0, 1, 2, 3), "not JSON"),
    "no UTF-8": (lambda r: ok(b'{"data": "\xff"}'), (0, 1, 2, 3), "not JSON"),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_reply_without_one_finite_reward_per_item_is_an_error(name, client_of):
    behaviour, places, part = BAD_REPLIES[name]
    with FlakyServer(behaviour) as server:
        error = refused(client_of(server.url, retries=1), ITEMS[:4])
        assert len(server.requests) == 2
    assert error.indices == places
    assert part in error.reason
    assert isinstance(error, UserError)


BAD_NATIVE = {
    "a row missing": {"rewards": [[1.0]], "truncated": [[False], [False]]},
    "a reward missing": {"rewards": [[1.0], []], "truncated": [[False], [False]]},
    "flat": {"rewards": [1.0, 2.0], "truncated": [[False], [False]]},
    "no truncated": {"rewards": [[1.0], [2.0]]},
    "null": {"rewards": [[1.0], [None]], "truncated": [[False], [False]]},
}


@pytest.mark.parametrize("name", BAD_NATIVE)
def test_a_bad_reply_of_our_own_server_is_an_error(name, client_of):
    with FlakyServer(lambda request: ok(BAD_NATIVE[name])) as server:
        error = refused(client_of(server.url, "megatron-polar", retries=0), [ITEMS[0], ITEMS[3]])
    assert error.indices == ((1,) if name == "null" else (0, 1))


def test_sglang_may_give_one_object_for_one_text_and_no_more(client_of):
    with FlakyServer(lambda request: ok({"embedding": [0.25]})) as server:
        assert client_of(server.url, "sglang").score(ITEMS[:1]) == [0.25]
        assert "1 rewards for 2 items" in refused(client_of(server.url, "sglang", retries=0), ITEMS[:2]).reason


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "part"), [(401, "API key"), (403, "API key"), (404, "base URL"), (307, "HTTP 307")])
def test_a_refusal_is_not_asked_again_and_says_what_to_do(status, part, client_of):
    with FlakyServer(lambda request: (status, {}, {"error": {"message": "no"}})) as server:
        error = refused(client_of(server.url, max_concurrency=1))
        assert len(server.requests) == 1
    assert error.indices == (0, 1, 2, 3)
    assert part in error.reason


@pytest.mark.parametrize("engine", ["vllm", "megatron-polar"])
def test_the_item_that_spoils_a_batch_is_found(engine, client_of):
    def picky(request):
        if "poison" in str(request.body) or "7, 7, 7, 7" in str(request.body):
            return 422, {}, {"error": {"message": "cannot take this"}}
        return ok(native(request) if engine == "megatron-polar" else pooling(request))

    items = [*ITEMS[:21], RewardItem("poison", "a", "b"), *ITEMS[21:]]
    with FlakyServer(picky) as server:
        client = client_of(server.url, engine, batch_size=16)
        if engine == "vllm":
            client._encode = _poisoned(client._encode)
        error = refused(client, items)
    assert error.indices == (21,)
    assert "cannot take this" in error.reason


def _poisoned(encode):
    def encode_item(item):
        encoded = encode(item)
        if item.prompt == "poison":
            encoded.content[:4] = 7
        return encoded

    return encode_item


def test_a_batch_that_is_too_large_for_the_server_is_halved(client_of, tokenizer_path):
    behaviour = lambda r: (413, {}, {}) if len(r.body["input"]) > 3 else ok(pooling(r))  # noqa: E731
    with FlakyServer(behaviour) as server:
        rewards = client_of(server.url, batch_size=16).score(ITEMS)
    assert rewards == [value_of(sequence_of(tokenizer_path, item)) for item in ITEMS]


def test_the_first_error_ends_the_other_requests(client_of):
    with FlakyServer(lambda r: (400, {}, {}) if r.number == 0 else (time.sleep(0.2), ok(pooling(r)))[1]) as server:
        refused(client_of(server.url, batch_size=1, max_concurrency=2))
        time.sleep(0.3)
        assert len(server.requests) <= 4
