"""The client in its caller's hands: several servers, threads and loops, API keys, items of any length, settings."""

import asyncio
import gc
import math
import os
import pickle
import subprocess
import sys
import threading
import time

import pytest
from flaky_server import FlakyServer, native, ok, pooling, value_of
from ranks import free_port, run_ranks
from reward_items import ITEMS, refused, sequence_of

from megatron_polar.errors import UserError
from megatron_polar.serve.client import RewardClient, RewardError, RewardItem

# --- several servers ---------------------------------------------------------------------------------------------


def _dead_url() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_servers_take_turns(client_of):
    reply = lambda request: ok(pooling(request))  # noqa: E731
    with FlakyServer(reply) as first, FlakyServer(reply) as second:
        client_of([first.url, second.url], batch_size=1, max_concurrency=1).score(ITEMS)
        assert len(first.requests) == len(second.requests) == 25


@pytest.mark.parametrize("sick", ["dead", "failing", "hanging up"])
def test_a_sick_server_among_healthy_ones_is_left_alone(sick, client_of, tokenizer_path):
    behaviour = lambda request: (500, {}, {}) if sick == "failing" else None  # noqa: E731
    with FlakyServer(lambda request: ok(pooling(request))) as healthy, FlakyServer(behaviour) as other:
        urls = [_dead_url() if sick == "dead" else other.url, healthy.url]
        rewards = client_of(urls, batch_size=1, backoff_seconds=0.2).score(ITEMS)
        assert rewards == [value_of(sequence_of(tokenizer_path, item)) for item in ITEMS]
        assert len(healthy.requests) == 50
        assert len(other.requests) <= 12


async def _many_calls(client, count: int) -> list:
    """As a trainer's reward function does it: all at once, a call an answer."""
    calls = (client.score_async([ITEMS[place % len(ITEMS)]]) for place in range(count))
    return await asyncio.gather(*calls, return_exceptions=True)


def test_calls_that_wait_for_their_turn_hear_that_a_server_hangs(client_of):
    """Which server to ask is chosen when the turn comes, not before."""
    with (
        FlakyServer(lambda request: time.sleep(4)) as hung,
        FlakyServer(lambda request: ok(pooling(request))) as healthy,
    ):
        client = client_of([hung.url, healthy.url], max_concurrency=2, timeout_seconds=0.5, backoff_seconds=60)
        rewards = asyncio.run(_many_calls(client, 40))
        assert all(isinstance(row, list) for row in rewards)
        assert len(hung.requests) <= 2 and len(healthy.requests) == 40


def test_calls_that_wait_for_their_turn_keep_retry_after(client_of):
    def busy_first(request):
        return (429, {"Retry-After": "0.6"}, {}) if request.number < 2 else ok(pooling(request))

    with FlakyServer(busy_first) as server:
        rewards = asyncio.run(_many_calls(client_of(server.url, max_concurrency=2), 20))
        assert all(isinstance(row, list) for row in rewards)
        first, _, third, *_ = [request.time for request in server.requests]
        assert third - first >= 0.6 and len(server.requests) == 22


def test_a_call_whose_turn_does_not_come_says_so_and_blames_no_server(client_of):
    with FlakyServer(lambda request: (time.sleep(0.4), ok(pooling(request)))[1]) as server:
        client = client_of(server.url, max_concurrency=1, deadline_seconds=1.5)
        rewards = asyncio.run(_many_calls(client, 12))
        late = [error.reason for error in rewards if isinstance(error, RewardError)]
        assert any("1 others (max_concurrency) were under way all the time (0 attempts" in reason for reason in late)
        assert client._transport._servers[0].strikes == 0


def test_nobody_there_is_an_error_that_names_the_server(client_of):
    url = _dead_url()
    error = refused(client_of(url, retries=2), ITEMS[:1])
    assert error.indices == (0,)
    assert f"{url}/pooling" in error.reason and "no connection" in error.reason and "3 attempts" in error.reason


# --- concurrency, threads and loops ------------------------------------------------------------------------------


def test_requests_under_way_are_bounded_over_all_threads(client_of, tokenizer_path):
    wanted = [value_of(sequence_of(tokenizer_path, item)) for item in ITEMS]
    with FlakyServer(lambda request: (time.sleep(0.04), ok(pooling(request)))[1]) as server:
        client = client_of(server.url, batch_size=2)
        results = [None] * 4

        def score(number):
            results[number] = client.score(ITEMS)

        threads = [threading.Thread(target=score, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [wanted] * 4
        assert server.most_at_once == 3


def test_async_calls_run_beside_the_callers_own_work(client_of, tokenizer_path):
    wanted = [value_of(sequence_of(tokenizer_path, item)) for item in ITEMS]

    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        results = await asyncio.gather(*(client.score_async(ITEMS) for _ in range(3)))
        ticking.cancel()
        return results, ticks

    with FlakyServer(lambda request: (time.sleep(0.04), ok(pooling(request)))[1]) as server:
        client = client_of(server.url)
        results, ticks = asyncio.run(main())
        assert results == [wanted] * 3
        assert ticks >= 5
        assert asyncio.run(client.score_async(ITEMS)) == wanted  # another loop
        assert server.most_at_once == 3


def test_score_works_where_a_loop_is_running(client_of):
    async def main():
        return client.score(ITEMS[:2])

    with FlakyServer(lambda request: ok(pooling(request))) as server:
        client = client_of(server.url)
        assert asyncio.run(main()) == client.score(ITEMS[:2])


def test_a_cancelled_call_stops_asking(client_of):
    async def main():
        call = asyncio.ensure_future(client.score_async(ITEMS))
        await asyncio.sleep(0.1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    with FlakyServer(lambda request: (time.sleep(0.05), ok(pooling(request)))[1]) as server:
        client = client_of(server.url, batch_size=1, max_concurrency=1)
        asyncio.run(main())
        asked = len(server.requests)
        time.sleep(0.2)
        assert len(server.requests) <= asked + 1


def test_a_client_can_be_closed_and_used_again_and_waiters_are_not_forgotten(client_of):
    with FlakyServer(lambda request: (time.sleep(0.3), ok(pooling(request)))[1]) as server:
        client = client_of(server.url)
        ends = []

        def score():
            try:
                client.score(ITEMS)
            except BaseException as error:
                ends.append(type(error).__name__)

        thread = threading.Thread(target=score)
        thread.start()
        time.sleep(0.1)
        client.close()
        thread.join(5)
        assert ends == ["CancelledError"]
        assert len(client.score(ITEMS[:1])) == 1


def test_a_forgotten_client_leaves_no_thread(tokenizer_path):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "reward client"]

    before = len(threads())
    with FlakyServer(lambda request: ok(pooling(request))) as server:
        client = RewardClient(server.url, engine="vllm", tokenizer=tokenizer_path)
        client.score(ITEMS[:1])
        assert len(threads()) == before + 1
        del client
        gc.collect()
        deadline = time.monotonic() + 5
        while len(threads()) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(threads()) == before


_LEAVES_DURING_AN_IMPORT = """
import atexit, sys, time
from megatron_polar.serve.client import RewardClient, RewardError, RewardItem

class Slow:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "sniffio" and leaving:
            time.sleep(0.5)  # a busy disk, with the import lock held

class ImportsAtTheEnd:  # in a cycle, which Python collects when it has ended its threads and still has its modules
    def __init__(self):
        self.itself = self

    def __del__(self):
        import tabnanny  # which nothing else imports

leaving = False
atexit.register(time.sleep, 0.2)  # behind the client's own: the thread is in the import when Python ends its threads
client = RewardClient("http://127.0.0.1:9", engine="megatron-polar", retries=0)
try:
    client.score([RewardItem("p", "r", "a")])
except RewardError:
    sys.modules.pop("sniffio", None)  # as where it is not installed: httpcore asks the finders again and again
    sys.meta_path.insert(0, Slow)
    leaving = True
ImportsAtTheEnd()
"""


def test_a_program_that_ends_waits_for_the_thread():
    """Killed inside an import, the thread would keep the import lock, and the program would never end."""
    result = subprocess.run([sys.executable, "-c", _LEAVES_DURING_AN_IMPORT], check=False, timeout=60)
    assert result.returncode == 0


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(RewardError([3, 7], "no reply")))
    assert (error.indices, error.reason) == ((3, 7), "no reply")
    assert str(error) == "no reward for item 3 (and 1 more, up to item 7): no reply"


_FORKED: RewardClient


def _score_in_child() -> list[float]:
    return _FORKED.score(ITEMS[:3])


def test_a_client_works_in_a_forked_process(client_of):
    global _FORKED
    with FlakyServer(lambda request: ok(pooling(request))) as server:
        _FORKED = client_of(server.url)
        assert run_ranks(_score_in_child, 1)[0] == _FORKED.score(ITEMS[:3])


# --- tokens ------------------------------------------------------------------------------------------------------


def test_the_api_key_is_sent_and_never_shown(client_of, tmp_path, monkeypatch, capsys):
    (tmp_path / "key").write_text("key-from-file\n")
    monkeypatch.setenv("MEGATRON_POLAR_API_KEY", "key-from-environment")
    monkeypatch.setenv("OTHER_KEY", "other-key")
    echo = lambda r: (500, {}, {"you sent": r.headers.get("Authorization", "nothing")})  # noqa: E731
    with FlakyServer(echo) as server:
        for options, key in (
            ({}, "key-from-environment"),
            ({"api_key_env": "OTHER_KEY"}, "other-key"),
            ({"api_key_file": tmp_path / "key"}, "key-from-file"),
            ({"api_key_env": "NOT_SET"}, None),
        ):
            client = client_of(server.url, retries=0, **options)
            error = refused(client, ITEMS[:1])
            sent = server.requests[-1].headers.get("Authorization")
            assert sent == (None if key is None else f"Bearer {key}")
            if key is not None:
                shown = f"{error} {error!r} {client!r} {vars(client)} {capsys.readouterr()}"
                assert key not in shown
                assert "Bearer ***" in str(error)


@pytest.mark.parametrize("key", ["two words", "späße", "line\nline"])
def test_an_unusable_api_key_is_refused_without_being_shown(key, client_of, monkeypatch):
    monkeypatch.setenv("MEGATRON_POLAR_API_KEY", key)
    with pytest.raises(UserError, match="MEGATRON_POLAR_API_KEY: not an API key") as caught:
        client_of("http://127.0.0.1:1")
    assert key not in str(caught.value)


def test_a_password_in_a_url_is_refused_without_being_shown(client_of):
    with pytest.raises(UserError, match="user or password") as caught:
        client_of("http://me:secret@rewards:8000")
    assert "secret" not in str(caught.value)


# --- items and lengths -------------------------------------------------------------------------------------------

LONG = " ".join(["ba ke li mo"] * 60)


def test_long_texts_are_cut_as_in_training_and_said_once(client_of, tokenizer_path, capsys):
    items = [RewardItem(LONG, LONG, LONG), RewardItem("ba", "ke", "li"), RewardItem("ba", LONG, "li")]
    limits = {"max_sequence_length": 64, "max_response_length": 20}
    with FlakyServer(lambda request: ok(pooling(request))) as server:
        client = client_of(server.url, **limits)
        rewards = client.score(items)
        client.score(items)
        sent = [sequence for request in server.requests for sequence in request.body["input"]]
    wanted = [sequence_of(tokenizer_path, item, max_length=64, max_response_length=20) for item in items]
    assert rewards == [value_of(sequence) for sequence in wanted]
    assert max(map(len, sent)) <= 64
    assert client.num_truncated == 4
    assert capsys.readouterr().err.count("2 of 3 items were too long") == 1


def test_truncation_by_our_own_server_is_counted(client_of):
    def reply(request):
        answer = native(request)
        return ok(answer | {"truncated": [[True] * len(row) for row in answer["truncated"]]})

    with FlakyServer(reply) as server:
        client = client_of(server.url, "megatron-polar")
        client.score(ITEMS)
    assert client.num_truncated == 50


PUBLISHED_TAKES = [RewardItem([], "b", "c"), RewardItem("a", "b", "c", wrapper="chat")]


@pytest.mark.parametrize("engine", ["vllm", "vllm official", "megatron-polar"])
@pytest.mark.parametrize(
    ("item", "part"),
    [
        (RewardItem("a", "b", None), "TypeError"),
        (RewardItem("a", 3, "c"), "TypeError"),
        (RewardItem([], "b", "c"), "TypeError"),
        (RewardItem([{"role": "user"}], "b", "c"), "Error"),
        (RewardItem("a", "b", "c", wrapper="chat"), "wrapper='chat'"),
        (RewardItem("a", "b", "\ud800"), "Unicode"),
        ("no item", "type str"),
    ],
    ids=repr,
)
def test_an_item_that_is_no_text_is_refused_with_its_place(item, part, engine, client_of):
    with FlakyServer(lambda request: ok(native(request) if "items" in request.body else pooling(request))) as server:
        engine, _, compat = engine.partition(" ")
        client = client_of(server.url, engine, compat=compat or None)
        if compat and item in PUBLISHED_TAKES:
            client.score([*ITEMS[:5], item])
            return
        error = refused(client, [*ITEMS[:5], item])
    assert error.indices == (5,)
    assert part in error.reason


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"engine": "tgi"}, "engine='tgi' is unknown"),
        ({"layout": "llama"}, "layout='llama' is unknown"),
        ({"compat": "mine"}, "compat='mine' is unknown"),
        ({"tokenizer": None}, "needs `tokenizer`"),
        ({"engine": "megatron-polar", "compat": "official"}, "/v1/score"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_concurrency": 1.5}, "max_concurrency=1.5"),
        ({"retries": -1}, "retries=-1"),
        ({"timeout_seconds": 0}, "timeout_seconds=0"),
        ({"deadline_seconds": math.inf}, "deadline_seconds=inf"),
        ({"urls": []}, "urls is empty"),
        ({"urls": "127.0.0.1:8000"}, "no base URL"),
        ({"urls": "ftp://host"}, "no base URL"),
        ({"urls": "http://host:8000/?key=1"}, "no base URL"),
        ({"urls": [None]}, "no base URL"),
        ({"api_key_file": "/nowhere/key"}, "/nowhere/key"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(options, part, client_of):
    options = {"urls": "http://127.0.0.1:1"} | options
    with pytest.raises(UserError) as caught:
        client_of(options.pop("urls"), **options)
    assert part in str(caught.value)


# --- the import --------------------------------------------------------------------------------------------------


def import_seconds(statement: str) -> float:
    """Processor time of a fresh interpreter that runs `statement`, the least of three: others use this machine, too."""
    code = f"{statement}\nimport time\nprint(time.process_time())"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        for _ in range(3)
    ]
    return min(float(run.stdout) for run in runs)


@pytest.fixture(scope="module")
def seconds_of_torch() -> float:
    return import_seconds("import torch")


@pytest.mark.parametrize("module", ["client", "adapters"])
def test_the_import_is_quick_and_light(module, seconds_of_torch):
    seconds = import_seconds(
        f"import sys, megatron_polar.serve.{module}\n"
        "assert not {'torch', 'megatron.core', 'transformers', 'tokenizers', 'sentencepiece'} & set(sys.modules)"
    )
    assert seconds < seconds_of_torch / 2  # a fifth of it
