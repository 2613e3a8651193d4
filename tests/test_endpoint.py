"""Endpoints: limits that hold, servers that are not what the pool says, keys that stay where they are."""

import asyncio
import itertools
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import chat_server
import pytest
from flaky_server import FlakyServer

from megatron_polar import cli
from megatron_polar.errors import UserError
from megatron_polar.policies.answers import Ask, NoAnswer, Place
from megatron_polar.policies.clean import Cleaning
from megatron_polar.policies.endpoint import Endpoint, request_body
from megatron_polar.policies.pool import load_pool
from megatron_polar.policies.prompts import Prompt

KEY = "sk-very-secret-1234567890"


@pytest.fixture(scope="module")
def running():
    with chat_server.running("a", "b") as server:
        yield server


@pytest.fixture
def server(running):
    running.forget()
    return running


def pool_text(url: str, **settings) -> str:
    given = {"api": "completions", "backoff_seconds": 0.01, "timeout_seconds": 10, **settings}
    keys = ", ".join(f"{name}: {value}" for name, value in given.items())
    return "policies:\n" + "".join(f"- {{name: p{m}, endpoint: '{url}', model: {m}, {keys}}}\n" for m in "ab")


def endpoint_of(directory: Path, url: str, *, wrapper: str = "pretrain", **settings) -> Endpoint:
    path = directory / "pool.yaml"
    path.write_text(pool_text(url, **settings), encoding="utf-8")
    return Endpoint(dict(enumerate(load_pool(path).specs)), wrapper=wrapper)


def ask_for(number: int, prompt: str = "the start") -> Ask:
    return Ask(0, Place(number, number % 2, 0), Prompt(f"{prompt} {number}"), seed=number)


def answers(make_endpoint, asks) -> list:
    """Ask for all at once, as many as the endpoint takes at a time; exceptions are results."""

    async def run():
        endpoint, queue, found = make_endpoint(), iter(asks), []

        async def work():
            for ask in queue:
                try:
                    found.append(await endpoint.answer(ask))
                except (NoAnswer, UserError) as error:
                    found.append(error)

        await asyncio.gather(*(work() for _ in range(endpoint.concurrency)))
        await endpoint.close()
        return found

    return asyncio.run(run())


def check(make_endpoint) -> dict:
    async def run():
        endpoint = make_endpoint()
        try:
            return await endpoint.check()
        finally:
            await endpoint.close()

    return asyncio.run(run())


# --- limits ----------------------------------------------------------------------------------------------------------


def test_policies_of_one_endpoint_share_its_concurrency(server, tmp_path):
    server.behave(delay=0.02)
    found = answers(lambda: endpoint_of(tmp_path, server.url, max_concurrency=5), map(ask_for, range(60)))
    assert all(found) and len(found) == 60
    assert server.counts()["most_at_once"] == 5


def test_the_rate_limit_holds(server, tmp_path):
    answers(lambda: endpoint_of(tmp_path, server.url, requests_per_minute=1200), map(ask_for, range(21)))
    times = server.counts()["times"]
    assert times[-1] - times[0] >= 0.9, "20 pauses of 50 ms; the server's clock sees them arrive, not start"


def test_throttling_is_waited_for_as_long_as_the_server_says(server, tmp_path):
    server.behave(limit=2, delay=0.05, retry_after="0.3")
    found = answers(lambda: endpoint_of(tmp_path, server.url, max_concurrency=4, retries=0), map(ask_for, range(12)))
    assert all(found) and not any(isinstance(answer, Exception) for answer in found), "429 is no failed attempt"
    times = sorted(server.counts()["times"])
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) >= 0.28


@pytest.mark.parametrize("told", ["0", "0.001", "", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_throttling_without_a_pause_is_waited_for_with_pauses_of_our_own(tmp_path, monkeypatch, told):
    """A quota of a second that says 0: no request is given up, none is sent a thousand times."""
    monkeypatch.setattr("megatron_polar.policies.endpoint._MOST_THROTTLED", 3)
    opens = time.monotonic() + 1.0

    def reply(request):
        if request.time < opens:
            return 429, {"Retry-After": told}, {}
        return 200, {}, {"choices": [{"text": "well", "finish_reason": "stop"}]}

    with FlakyServer(reply) as flaky:
        settings = {"max_concurrency": 2, "retries": 0, "backoff_seconds": 0.1}
        found = answers(lambda: endpoint_of(tmp_path, flaky.url, **settings), map(ask_for, range(4)))
        assert [getattr(answer, "text", answer) for answer in found] == ["well"] * 4
        assert len(flaky.requests) < 40


def test_a_quota_of_a_day_is_not_waited_out(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_polar.policies.endpoint._MOST_THROTTLED", 3)
    monkeypatch.setattr("megatron_polar.policies.endpoint._MOST_THROTTLED_SECONDS", 0.2)
    listed = {"data": [{"id": "a"}, {"id": "b"}]}
    with FlakyServer(lambda request: (429, {}, {}), models=lambda: (200, {}, listed)) as flaky:
        settings = {"retries": 0, "backoff_seconds": 0.05, "max_concurrency": 2}
        found = answers(lambda: endpoint_of(tmp_path, flaky.url, **settings), map(ask_for, range(2)))
    assert any(isinstance(one, UserError) and "HTTP 429" in str(one) for one in found)


def test_pauses_grow_and_retries_end(server, tmp_path):
    server.behave(fail=1.0, kinds=[500])
    begun = time.monotonic()
    (failure,) = answers(lambda: endpoint_of(tmp_path, server.url, retries=4, backoff_seconds=0.1), [ask_for(0)])
    assert isinstance(failure, NoAnswer), "it is alone, and the server is there"
    assert time.monotonic() - begun >= 0.5 * (0.1 + 0.2 + 0.4 + 0.8)
    assert server.counts()["seen"] == 5


@pytest.mark.parametrize("at_once", [1, 2])
def test_where_nobody_is_answered_the_endpoint_is_given_up(server, tmp_path, at_once):
    """At the second request of those that stand alone, at the first of several."""
    server.behave(fail=1.0, kinds=[500])
    found = answers(lambda: endpoint_of(tmp_path, server.url, retries=1, max_concurrency=at_once), map(ask_for, (0, 1)))
    kinds = [NoAnswer, UserError] if at_once == 1 else [UserError]
    assert [type(one) for one in found[: len(kinds)]] == kinds
    assert all("nothing was answered for" in str(one) for one in found if isinstance(one, UserError))


def test_a_request_that_stands_alone_is_not_given_up_where_the_server_is_gone(tmp_path, monkeypatch):
    with FlakyServer(b"") as gone:
        url = gone.url
    monkeypatch.setattr("megatron_polar.policies.endpoint._LOOKS", 1)
    (failure,) = answers(lambda: endpoint_of(tmp_path, url, retries=1), [ask_for(0)])
    assert isinstance(failure, UserError) and "nothing was answered for" in str(failure)


def test_one_request_that_always_fails_ends_nothing(server, tmp_path):
    """One at a time, the second of three kills the server's worker."""
    asks = [ask_for(0), ask_for(1, "BROKEN"), ask_for(2)]
    found = answers(lambda: endpoint_of(tmp_path, server.url, retries=1, max_concurrency=1), asks)
    assert [isinstance(one, NoAnswer) for one in found] == [False, True, False]


def test_a_request_that_alone_fails_is_given_up_where_others_are_answered(server, tmp_path, monkeypatch):
    """The first fails four times while the second is answered: the endpoint lives."""
    monkeypatch.setattr(Endpoint, "_backoff", lambda self, spec, failures: 0.5)

    async def run():
        endpoint = endpoint_of(tmp_path, server.url, retries=3)
        failing = asyncio.create_task(endpoint.answer(ask_for(0, "BROKEN")))
        while server.counts()["seen"] < 1:
            await asyncio.sleep(0.01)
        assert (await endpoint.answer(ask_for(1))).text
        with pytest.raises(NoAnswer, match=r"HTTP 500 .*out of memory") as caught:
            await failing
        assert caught.value.attempts == 4
        await endpoint.close()

    asyncio.run(run())


@pytest.mark.parametrize("is_answered_between", [False, True])
def test_a_request_that_is_under_way_when_the_server_dies_is_not_given_up(tmp_path, monkeypatch, is_answered_between):
    """Others were answered after it was sent, or even after its first failure: it is the server all the same."""
    monkeypatch.setattr(Endpoint, "_backoff", lambda self, spec, failures: 0.4)
    monkeypatch.setattr("megatron_polar.policies.endpoint._LOOKS", 1)
    first = 0.0 if is_answered_between else 0.3

    def reply(request):
        if request.body["prompt"].startswith("slow"):
            time.sleep(first if request.number < 2 else 0.0)
            return None
        return 200, {}, {"choices": [{"text": "quick", "finish_reason": "stop"}]}

    async def run():
        with FlakyServer(reply, models=lambda: None) as flaky:
            endpoint = endpoint_of(tmp_path, flaky.url, retries=1)
            slow = asyncio.create_task(endpoint.answer(ask_for(0, "slow")))
            await asyncio.sleep(0.15)
            assert (await endpoint.answer(ask_for(1))).text == "quick"
            with pytest.raises(UserError, match=r"nothing was answered for .* no connection"):
                await slow
            await endpoint.close()

    asyncio.run(run())


def test_a_request_that_fails_while_others_wait_for_a_busy_server_is_to_blame_itself(tmp_path):
    def reply(request):
        if request.body["prompt"].startswith("BROKEN"):
            return 500, {}, {}
        time.sleep(1.0)
        return 200, {}, {"choices": [{"text": "late", "finish_reason": "stop"}]}

    with FlakyServer(reply, models=lambda: (200, {}, {"data": [{"id": "a"}, {"id": "b"}]})) as busy:
        asks = [ask_for(0, "BROKEN"), ask_for(1)]
        failure, late = answers(lambda: endpoint_of(tmp_path, busy.url, retries=1, max_concurrency=2), asks)
    assert isinstance(failure, NoAnswer) and late.text == "late"


def test_a_pause_holds_for_requests_that_wait_for_their_turn(tmp_path):
    """Eight at a time, ten a second: without a second look seven would arrive in the pause."""

    def reply(request):
        if request.number == 0:
            return 429, {"Retry-After": "1"}, {}
        return 200, {}, {"choices": [{"text": "well", "finish_reason": "stop"}]}

    with FlakyServer(reply) as flaky:
        settings = {"requests_per_minute": 600, "max_concurrency": 8}
        found = answers(lambda: endpoint_of(tmp_path, flaky.url, **settings), map(ask_for, range(8)))
        assert [answer.text for answer in found] == ["well"] * 8
        first, *rest = sorted(request.time for request in flaky.requests)
        assert sum(time < first + 0.9 for time in rest) <= 2


def test_a_reply_that_does_not_come_is_given_up_in_time(server, tmp_path):
    server.behave(delay=5.0)
    (failure,) = answers(lambda: endpoint_of(tmp_path, server.url, retries=1, timeout_seconds=0.2), [ask_for(0)])
    assert "no reply within 0.2 s" in str(failure)


def test_a_base_model_is_given_the_newline_that_sft_trajectories_stand_behind(tmp_path):
    (tmp_path / "pool.yaml").write_text(pool_text("http://x"), encoding="utf-8")
    spec = load_pool(tmp_path / "pool.yaml").specs[0]
    assert request_body(spec, ask_for(1), wrapper="pretrain")[1]["prompt"] == "the start 1"
    assert request_body(spec, ask_for(1), wrapper="sft")[1]["prompt"] == "the start 1\n"


def test_other_keys_of_requests_are_sent_and_belong_to_the_policy(tmp_path):
    path = tmp_path / "pool.yaml"
    path.write_text(pool_text("http://x", top_k=0, extra="{top_k: -1, min_p: 0.0}"), encoding="utf-8")
    spec = load_pool(path).specs[0]
    body = request_body(spec, ask_for(1), wrapper="pretrain")[1]
    assert (body["top_k"], body["min_p"]) == (-1, 0.0) and spec.identity()["extra"] == {"top_k": -1, "min_p": 0.0}
    path.write_text(pool_text("http://x"), encoding="utf-8")
    assert "extra" not in load_pool(path).specs[0].identity(), "outputs that were begun before there was this key go on"


# --- health ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_an_endpoint_is_named_with_or_without_v1(server, tmp_path, path):
    assert check(lambda: endpoint_of(tmp_path, server.url + path)) == {
        "a": {"owned_by": "tests"},
        "b": {"owned_by": "tests"},
    }


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:9/v1/models: no connection \(.*\), so pa, pb cannot be a"
    ):
        check(lambda: endpoint_of(tmp_path, "http://127.0.0.1:9/v1"))


def test_a_model_that_is_not_served_is_named_with_those_that_are(server, tmp_path):
    path = tmp_path / "pool.yaml"
    path.write_text(pool_text(server.url).replace("model: b", "model: llama"), encoding="utf-8")
    with pytest.raises(UserError, match=r"does not serve model='llama' of policy pb, but a, b; correct `model`"):
        check(lambda: Endpoint(dict(enumerate(load_pool(path).specs)), wrapper="sft"))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            (200, {}, b"<html>hello"),
            r"answers, but not as an OpenAI-compatible server \(<html>hello\); correct",
        ),
        ((200, {}, {"data": 3}), "answers, but not as an OpenAI-compatible server"),
        ((503, {}, {"error": "loading"}), "HTTP 503 Service Unavailable.*loading.*look at the server's log"),
        ((403, {}, {}), "HTTP 403 Forbidden.*check what the key may do"),
    ],
)
def test_a_server_that_cannot_be_used_is_named_with_the_reason(tmp_path, reply, message):
    with FlakyServer(lambda request: (200, {}, {}), models=lambda: reply) as flaky:
        with pytest.raises(UserError, match=message) as caught:
            check(lambda: endpoint_of(tmp_path, flaky.url))
        assert str(caught.value).startswith(flaky.url) and "\n" not in str(caught.value)


def test_a_server_may_take_its_time_to_start(tmp_path):
    with FlakyServer(lambda request: None, models=lambda: models(flaky.num_looks)) as flaky:

        def models(look):
            return (503, {}, {}) if look < 7 else (200, {}, {"data": [{"id": "a"}, {"id": "b"}]})

        def patient():
            endpoint = endpoint_of(tmp_path, flaky.url)
            endpoint.check = partial(endpoint.check, patience=30.0)
            return endpoint

        with pytest.raises(UserError, match="HTTP 503"):
            check(lambda: endpoint_of(tmp_path, flaky.url))
        assert set(check(patient)) == {"a", "b"} and flaky.num_looks == 7


def test_a_server_that_has_no_room_for_a_prompt_is_named(tmp_path):
    models = [{"id": "a", "max_model_len": 4097}, {"id": "b", "max_model_len": 4096}]
    with FlakyServer(lambda request: None, models=lambda: (200, {}, {"data": models})) as full:
        with pytest.raises(
            UserError, match=r"max_tokens=4096 of policy pb leaves no room for a prompt in the 4096 tok"
        ):
            check(lambda: endpoint_of(tmp_path, full.url))
        assert check(lambda: endpoint_of(tmp_path, full.url, max_tokens=4000))["b"] == {"max_model_len": 4096}


def test_a_server_without_a_list_of_models_is_left_to_the_first_request(server, tmp_path):
    assert check(lambda: endpoint_of(tmp_path, f"{server.url}/elsewhere")) == {}
    (failure,) = answers(lambda: endpoint_of(tmp_path, f"{server.url}/elsewhere"), [ask_for(0)])
    assert isinstance(failure, UserError)
    assert "HTTP 404" in str(failure) and "check endpoint, model and api" in str(failure)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(server, tmp_path, monkeypatch, capsys):
    """A server that repeats the key in its errors included: not on the terminal, not in any file."""
    path = tmp_path / "pool.yaml"
    path.write_text(pool_text(server.url, api_key_env="SAMPLING_KEY", retries=1), encoding="utf-8")
    command = ["sample", "--pool", str(path), "--output", str(tmp_path / "out"), "--num-prompts", "4"]
    command += ["--policies-per-prompt", "2"]
    server.behave(key=KEY, fail=0.3, kinds=[422])
    monkeypatch.delenv("SAMPLING_KEY", raising=False)
    said = []
    for value, status, message in (
        (None, 2, "the environment variable SAMPLING_KEY with its API key (policy pa) is not set or empty; export it"),
        (f"{KEY} x", 2, "is not one word of printable ASCII"),
        (KEY[:-1], 2, "HTTP 401 Unauthorized"),
        (KEY, 0, "failed for good"),
    ):
        if value is not None:
            monkeypatch.setenv("SAMPLING_KEY", value)
        assert cli.main(command) == status
        said.append(capsys.readouterr().err)
        assert message in said[-1]
    assert KEY[:-1] not in "".join(said)
    assert b"Bearer ***" in (tmp_path / "out" / "quarantine.ndjson").read_bytes()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY[:-1].encode() not in file.read_bytes(), file


# --- what a pool may say ---------------------------------------------------------------------------------------------

GOOD = "name: x, endpoint: http://h:1, model: m, api: chat"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("name: x, endpoint: http://h:1, model: m", "the key `api` is missing; set it to `completions` or `chat`"),
        ("name: x, endpoint: http://h:1, api: chat", "the key `model` is missing"),
        ("name: x, backend: http, model: m, api: chat", "the key `endpoint` is missing"),
        ("name: x, endpoint: http://h:1, model: m, api: chats", "api='chats' is not `completions` or `chat`"),
        ("name: x, endpoint: h:1, model: m, api: chat", "endpoint='h:1' is no base URL of a server; give one such as"),
        ("name: x, endpoint: 'http://h:1/?k=v', model: m, api: chat", "is no base URL"),
        ("name: x, endpoint: ftp://h, model: m, api: chat", "is no base URL"),
        ("name: x, endpoint: 'http://u:secret@h', model: m, api: chat", "has a user or password in it .of h.; put the"),
        (f"{GOOD}, api_key: sk-1", "unknown key `api_key`; did you mean `api_key_env`"),
        (f"{GOOD}, api_key_env: sk-secret", "api_key_env is not the name of an environment variable; put the key into"),
        (f"{GOOD}, api_key_env: [a]", "api_key_env is not the name of an environment variable"),
        (f"{GOOD}, temperature: -1", r"temperature=-1 is not a number in \(0, 10\]"),
        (f"{GOOD}, max_concurrency: 0", "max_concurrency=0 is not a whole number from 1 to 4096"),
        (f"{GOOD}, requests_per_minute: fast", "requests_per_minute='fast' is not a whole number from 0 up"),
        (f"{GOOD}, retries: 1.5", "retries=1.5 is not a whole number"),
        (f"{GOOD}, timeout_seconds: 0", r"timeout_seconds=0 is not a number in \(0, 86400\]"),
        (f"{GOOD}, corpus_fraction: 1", "unknown key `corpus_fraction`; use one of"),
        (f"{GOOD}, max_tokens: 0", "max_tokens=0 is not a whole number from 1 up"),
        ("name: x, path: models/x, api: chat", "unknown key `api`"),
        ("name: x, backend: transformers", "the key `path` is missing"),
        ("name: x, backend: vllm", "backend='vllm' does not exist here; use `embedded`, `imitation`, `http`"),
    ],
)
def test_every_mistake_in_an_entry_is_one_clear_line(tmp_path, entry, message):
    path = tmp_path / "pool.yaml"
    path.write_text(f"policies:\n- {{{GOOD.replace('name: x', 'name: y')}}}\n- {{{entry}}}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_pool(path)
    assert "policies[1]" in str(caught.value) and "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("cleaning: {cutoff: keep}\n", "cleaning: unknown key `cutoff`; did you mean `cut_off`"),
        ("cleaning: {cut_off: cut}\n", "cleaning: cut_off='cut' is not `trim` or `keep` or `drop`"),
        ("cleaning: {near_duplicates: 2}\n", r"near_duplicates=2 is not a number in \[0, 1\]"),
        ("sampling: {max_tokens: many}\n", "sampling: max_tokens='many' is not a whole number from 1 up"),
    ],
)
def test_every_mistake_in_a_section_is_one_clear_line(tmp_path, rest, message):
    path = tmp_path / "pool.yaml"
    path.write_text(pool_text("http://h") + rest, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_pool(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extra": "{seed: 3}"}, "extra has seed, which `sample` sets in every request; take it out"),
        ({"extra": "{top_k: -1}"}, "extra has top_k, .*take it out, or set top_k: 0"),
        ({"extra": "[min_p]"}, "extra=.* a mapping of other keys of requests"),
    ],
)
def test_other_keys_of_requests_must_not_be_ours(tmp_path, settings, message):
    path = tmp_path / "pool.yaml"
    path.write_text(pool_text("http://x", **settings), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_pool(path)


def test_two_names_of_one_policy_are_refused(tmp_path):
    path, url = tmp_path / "pool.yaml", "http://x"
    twins = pool_text(url).replace("model: b", "model: a")
    path.write_text(twins, encoding="utf-8")
    with pytest.raises(UserError, match="pa and pb are one model with one way of sampling"):
        load_pool(path)
    path.write_text(twins.replace("{name: pb,", "{name: pb, temperature: 0.7,"), encoding="utf-8")
    assert len(load_pool(path).specs) == 2
    path.write_text(twins.replace(f"name: pb, endpoint: '{url}'", f"name: pb, endpoint: '{url}2'"), encoding="utf-8")
    assert len(load_pool(path).specs) == 2, "another server may have another model by that name"


def test_policies_of_one_endpoint_must_agree_on_its_limits(tmp_path):
    path = tmp_path / "pool.yaml"
    lines = pool_text("http://h", max_concurrency=4).splitlines()
    path.write_text("\n".join([*lines[:2], lines[2].replace("max_concurrency: 4", "max_concurrency: 8")]))
    with pytest.raises(
        UserError, match=r"max_concurrency=8 of pb and 4 of pa are for one endpoint, http://h; give both"
    ):
        load_pool(path)


def test_cleaning_is_not_for_embedded_policies(tmp_path):
    path = tmp_path / "pool.yaml"
    path.write_text("embedded: {num_policies: 2}\ncleaning: {cut_off: keep}\n", encoding="utf-8")
    with pytest.raises(UserError, match="cleaning is for answers of models, and every policy here is embedded"):
        load_pool(path)


def test_sampling_of_the_pool_is_the_default_of_its_policies(tmp_path):
    path = tmp_path / "pool.yaml"
    path.write_text(pool_text("http://h") + "sampling: {top_p: 0.5, top_k: 0, max_tokens: 7}\n", encoding="utf-8")
    spec = load_pool(path).specs[0]
    assert (spec.temperature, spec.top_p, spec.top_k, spec.max_tokens) == (1.0, 0.5, 0, 7)


def test_the_documented_pool_of_servers_has_the_documented_defaults(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "policies.md").read_text(encoding="utf-8")
    path = tmp_path / "pool.yaml"
    path.write_text(page.split("```yaml\n")[2].split("```")[0], encoding="utf-8")
    full, short = load_pool(path).specs
    own = {"name", "endpoint", "model", "api_key_env"}
    defaults = {name: value for name, value in asdict(short).items() if name not in own}
    assert {name: value for name, value in asdict(full).items() if name not in own} == defaults
    assert load_pool(path).cleaning == Cleaning()
    minimal = tmp_path / "minimal.yaml"
    minimal.write_text(path.read_text().partition("cleaning:")[0].replace("sampling:", "# sampling:"), encoding="utf-8")
    assert load_pool(minimal).specs[1] == short and load_pool(minimal).cleaning == Cleaning()
