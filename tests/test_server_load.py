"""A busy, failing or ending server: limits hold, a request is harmed by no other, and what was accepted is answered."""

import itertools
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from servers import ITEM, asked, error_of, expected, metrics_of, read_all, request_of, serving, trained_checkpoint

from megatron_polar.score.scorer import Scorer
from megatron_polar.serve.metrics import Metrics


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, trajectory_corpus) -> str:
    return trained_checkpoint(trajectory_corpus, tmp_path_factory.mktemp("server") / "run")


def behind(gate: Path) -> Callable[[], None]:
    """Make a server score nothing until `gate` exists."""

    def prepare() -> None:
        original = Scorer.score_tokens

        def score_tokens(self, comparisons):
            while not gate.exists():
                time.sleep(0.005)
            return original(self, comparisons)

        Scorer.score_tokens = score_tokens

    return prepare


def wait_for_queue(client: httpx.Client, length: int) -> None:
    deadline = time.monotonic() + 20
    while (found := metrics_of(client)["megatron_polar_queue_sequences"]) != length:
        assert time.monotonic() < deadline, f"{found} sequences wait, not {length}"
        time.sleep(0.01)


def spoil_long_outputs() -> None:
    """Sequences above 30 tokens get NaN; a batch with one above 60 fails, with a text in its exception."""
    original = Scorer.score_tokens

    def spoiled(self, comparisons):
        lengths = [[len(c.prefix) + len(candidate) for candidate in c.candidates] for c in comparisons]
        if max(map(max, lengths)) > 60:
            raise RuntimeError("canary: a text of the user's")
        rewards = original(self, comparisons)
        return [
            [math.nan if length > 30 else reward for length, reward in zip(*row, strict=True)]
            for row in zip(lengths, rewards, strict=True)
        ]

    def no_page(self):
        raise RuntimeError("canary: on a page")

    Scorer.score_tokens, Metrics.text = spoiled, no_page


def test_a_full_queue_is_429_and_a_late_answer_504(checkpoint, tmp_path):
    one, gate = {"items": [ITEM | {"outputs": ["li"]}]}, tmp_path / "gate"
    options = ["--max-queue", 4, "--request-seconds", 1.5, "--max-batch-tokens", 1]
    with (
        serving(checkpoint, *options, directory=tmp_path, prepare=behind(gate)) as server,
        ThreadPoolExecutor(5) as pool,
        server.client() as client,
    ):
        waiting = [pool.submit(client.post, "/v1/score", json=one) for _ in range(5)]
        wait_for_queue(client, 4)  # and one is being scored
        refused = client.post("/v1/score", json=one)
        assert error_of(refused, 429)["type"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        for late in waiting:
            assert error_of(late.result(), 504)["type"] == "timeout"
        wait_for_queue(client, 0)
        assert error_of(client.get("/ready"), 503)["type"] == "stalled"
        gate.touch()
        assert client.post("/v1/score", json=one).status_code == 200
        assert client.get("/ready").status_code == 200


def test_a_client_that_leaves_takes_its_work_along(checkpoint, tmp_path):
    gate = tmp_path / "gate"
    with (
        serving(checkpoint, "--max-batch-tokens", 1, directory=tmp_path, prepare=behind(gate)) as server,
        server.client() as client,
    ):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/score", json={"items": [ITEM] * 20}, timeout=0.5, trust_env=False)
        wait_for_queue(client, 0)
        gate.touch()
        asked(client, "/v1/score", {"items": [ITEM | {"outputs": ["li"]}]})
        assert metrics_of(client)["megatron_polar_batch_sequences_count"] == 2, "what had begun, and the other client's"


def test_nan_is_422_and_a_failure_500_with_an_id_and_hurt_no_other_request(checkpoint, tmp_path):
    nan, crash = "zo " * 30, "zo " * 60
    options = ["--batch-wait-ms", 200]
    with (
        serving(checkpoint, *options, directory=tmp_path, prepare=spoil_long_outputs) as server,
        ThreadPoolExecutor(3) as pool,
        server.client() as client,
    ):
        items = [ITEM, ITEM | {"outputs": ["li", nan]}, ITEM | {"outputs": [crash]}]
        good, not_finite, failed = pool.map(lambda item: client.post("/v1/score", json={"items": [item]}), items)
        np.testing.assert_allclose(good.json()["rewards"], expected(checkpoint, request_of(ITEM)), atol=1e-5)
        log = server.log.read_text()
        for response, status, kind in ((not_finite, 422, "not_finite"), (failed, 500, "internal")):
            error = error_of(response, status)
            assert error["type"] == kind
            assert error["message"].split()[-1] in log
        assert error_of(client.get("/metrics"), 500)["type"] == "internal"
        log = server.log.read_text()
        assert "canary" not in log
        assert "zo zo" not in log
        assert client.get("/ready").status_code == 200
        for _ in range(3):
            client.post("/v1/score", json={"items": [items[1]]})
        assert error_of(client.get("/ready"), 503)["type"] == "failing"
        assert client.post("/v1/score", json={"items": [ITEM]}).status_code == 200
        assert client.get("/ready").status_code == 200


def spoil_and_forgive() -> None:
    from megatron_polar.serve import application

    application._UNREADY_SECONDS = 1.0
    spoil_long_outputs()


def test_a_server_that_is_sent_nothing_while_it_is_unready_becomes_ready(checkpoint, tmp_path):
    """Behind a load balancer no comparison would come to show that it is well."""
    with serving(checkpoint, directory=tmp_path, prepare=spoil_and_forgive) as server, server.client() as client:
        for _ in range(3):
            error_of(client.post("/v1/score", json={"items": [ITEM | {"outputs": ["zo " * 30]}]}), 422)
        deadline = time.monotonic() + 20
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def count_instead_of_scoring() -> None:
    """Every sequence gets another reward, as rounding may have it on some processors."""
    numbers = itertools.count()
    Scorer.score_tokens = lambda self, comparisons: [[float(next(numbers)) for _ in c.candidates] for c in comparisons]


def test_outputs_of_the_same_tokens_get_the_same_reward(checkpoint, tmp_path):
    with serving(checkpoint, directory=tmp_path, prepare=count_instead_of_scoring) as server, server.client() as client:
        items = [ITEM | {"outputs": ["ba", "", "ba", ""]}, ITEM, ITEM]
        rewards = asked(client, "/v1/score", {"items": items})["rewards"]
        assert rewards == [[0.0, 1.0, 0.0, 1.0], [4.0, 5.0, 6.0], [4.0, 5.0, 6.0]]
        inputs = [[1, 9, 4, 9, 5], [1, 9, 4, 8, 5], [1, 9, 4, 9, 5]]
        rows = asked(client, "/pooling", {"input": inputs, "use_activation": False})["data"]
        assert [row["data"][-1][0] for row in rows] == [10.0, 11.0, 10.0]


def test_many_clients_at_once_get_their_own_rewards(checkpoint, tmp_path):
    words = ["ba", "ke", "li", "mo", "nu", "ra", "si", "to"]
    items = [{"prompt": f"{a} {b}", "reference": b, "outputs": [f"{b} {a}", a]} for a in words for b in words]
    wanted = expected(checkpoint, *map(request_of, items))
    with (
        serving(checkpoint, directory=tmp_path) as server,
        ThreadPoolExecutor(16) as pool,
        server.client() as client,
    ):
        answers = list(pool.map(lambda item: asked(client, "/v1/score", {"items": [item]})["rewards"][0], items))
        num_batches = metrics_of(client)["megatron_polar_batch_sequences_count"]
    np.testing.assert_allclose(answers, wanted, atol=1e-5)  # other rows than alone: fp32 roundings
    assert num_batches < len(items)


def test_slow_clients_are_closed_and_slow_nobody_down(checkpoint, tmp_path):
    options = ["--head-seconds", 2, "--body-seconds", 2, "--batch-wait-ms", 0]
    with serving(checkpoint, *options, directory=tmp_path) as server, server.client() as client:

        def p99() -> float:
            seconds = []
            for _ in range(40):
                start = time.monotonic()
                asked(client, "/v1/score", {"items": [ITEM]})
                seconds.append(time.monotonic() - start)
            return sorted(seconds)[-2]

        alone = p99()
        head = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 900\r\n"
        slow = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(90)]
        for number, connection in enumerate(slow):  # nothing, half a head, half a body
            connection.sendall([b"", head, head + b"\r\n{"][number % 3])
        beside = p99()
        # Who waited for a slow one would wait two seconds; the rest is noise of a shared machine.
        assert beside < alone + 1
        endings = [read_all(connection) for connection in slow]
        assert endings[0::3] == [b""] * 30
        assert endings[1::3] == [b""] * 30
        assert all(ending.startswith(b"HTTP/1.1 408 ") for ending in endings[2::3])
        for connection in slow:
            connection.close()


def test_connections_beyond_the_limit_are_told_so(checkpoint, tmp_path):
    with serving(checkpoint, "--max-connections", 3, directory=tmp_path) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(3)]
        with server.client() as client:
            assert error_of(client.get("/health"), 503)["type"] == "too_many_connections"
        held.pop().close()
        time.sleep(0.2)
        with server.client() as client:
            assert client.get("/health").status_code == 200


def test_sigterm_lets_what_is_in_flight_finish_and_ends_with_0(checkpoint, tmp_path):
    one, gate = {"items": [ITEM | {"outputs": ["li"]}]}, tmp_path / "gate"
    with (
        serving(checkpoint, "--max-batch-tokens", 1, directory=tmp_path, prepare=behind(gate)) as server,
        ThreadPoolExecutor(4) as pool,
        server.client() as client,
    ):
        answers = [pool.submit(asked, client, "/v1/score", one) for _ in range(4)]
        wait_for_queue(client, 3)
        with socket.create_connection(("127.0.0.1", server.port)):
            server.process.terminate()
            time.sleep(0.5)
            with pytest.raises(httpx.ConnectError):
                httpx.get(server.url, trust_env=False)
            gate.touch()
            assert len({answer.result()["rewards"][0][0] for answer in answers}) == 1
            assert server.stop() == 0
        assert server.log.read_text().splitlines()[-1].endswith(": stopped")


def _load_slowly() -> None:
    import megatron_polar.score.scorer as module

    original = module.load_scorer

    def load(*arguments, **keywords):
        time.sleep(2)
        return original(*arguments, **keywords)

    module.load_scorer = load


def test_while_the_model_loads_the_server_lives_and_is_not_ready(checkpoint, tmp_path):
    with (
        serving(checkpoint, directory=tmp_path, prepare=_load_slowly, wait=False) as server,
        server.client() as client,
    ):
        assert client.get("/health").status_code == 200
        for response in (client.get("/ready"), client.get("/v1/models"), client.post("/v1/score", json={})):
            assert error_of(response, 503)["type"] == "loading"
            assert response.headers["retry-after"]
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.join(20)
        assert server.process.exitcode == 0
