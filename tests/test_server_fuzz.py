"""Thousands of broken requests, with good ones between them: no crash, no reply without a reason, no wrong reward.

`POLAR_FUZZ_REQUESTS` changes their number.
"""

import http.client
import json
import math
import os
import random
import socket
from collections import Counter
from dataclasses import dataclass, field

from ranks import run_ranks
from servers import RunningServer, serving, trained_checkpoint

from megatron_polar.score.requests import ScoreRequest
from megatron_polar.score.scorer import load_scorer

NUM_REQUESTS = int(os.environ.get("POLAR_FUZZ_REQUESTS", "10000"))
WORDS = [
    "ba",
    "ke",
    "li",
    "mo",
    "nu",
    "é",
    "東京",
    "🙂",
    "\0",
    "\n",
    "<|reward|>",
    "[UNUSED_TOKEN_130]",
    "<s>",
    "\u2581",
]
PATHS = ["/v1/score", "/pooling", "/classify", "/get_reward"]
JSON = {"content-type": "application/json"}
# What stands where something else should.
JUNK = [
    None,
    True,
    False,
    0,
    -1,
    5,
    10**30,
    1e308,
    -0.0,
    "",
    "x",
    "\ud7ff",
    [],
    {},
    [[]],
    [{}],
    {"": None},
    [None],
    "\0",
]


@dataclass(frozen=True)
class Attack:
    """One HTTP request; `raw` is sent as it is, on a connection of its own."""

    name: str
    path: str = "/v1/score"
    body: bytes = b""
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    raw: bytes | None = None


# --- Good requests ---------------------------------------------------------------------------------------------------


def _words(choose: random.Random, most: int) -> str:
    return " ".join(choose.choices(WORDS, k=choose.randrange(most)))


def good_request(choose: random.Random) -> ScoreRequest:
    outputs = tuple(_words(choose, 12) for _ in range(choose.randrange(1, 4)))
    return ScoreRequest(_words(choose, 8), _words(choose, 12), outputs, choose.choice(["sft", "pretrain"]))


def body_of(request: ScoreRequest) -> dict:
    keys = {"prompt": request.prompt, "reference": request.reference, "wrapper": request.wrapper}
    return {"items": [keys | {"outputs": list(request.outputs)}]}


def _score(checkpoint: str, requests: list[ScoreRequest]) -> list[list[float]]:
    scorer = load_scorer(checkpoint, device_kind="cpu")
    return [scorer.score([request])[0] for request in requests]


# --- Broken ones -----------------------------------------------------------------------------------------------------


def _any_body(choose: random.Random) -> tuple[str, dict]:
    """A path and a body that fits it."""
    text = f"{_words(choose, 5)}<|reward|>{_words(choose, 5)}[UNUSED_TOKEN_130]"
    bodies = {
        "/v1/score": body_of(good_request(choose)),
        "/pooling": {"input": choose.choice([text, [text], [1, 9, 4, 9, 5], [[1, 4, 5]]]), "use_activation": False},
        "/classify": {choose.choice(["text", "input"]): [text, text]},
        "/get_reward": {"query": ["ba ke"], "prompts": ["ba"], "labels": ["li"]},
    }
    path = choose.choice(PATHS)
    return path, bodies[path]


def random_bytes(choose: random.Random) -> Attack:
    return Attack("random bytes", choose.choice(PATHS), choose.randbytes(choose.randrange(200)))


def broken_bytes(choose: random.Random) -> Attack:
    path, value = _any_body(choose)
    body = bytearray(json.dumps(value, ensure_ascii=choose.random() < 0.5).encode())
    for _ in range(choose.randrange(1, 4)):
        place = choose.randrange(len(body))
        body[place : place + choose.randrange(3)] = choose.randbytes(choose.randrange(3))
    return Attack("broken bytes", path, bytes(body))


def wrong_types(choose: random.Random) -> Attack:
    path, value = _any_body(choose)
    for _ in range(choose.randrange(1, 3)):
        value = _replace_somewhere(value, choose)
    return Attack("wrong types", path, json.dumps(value).encode())


def _replace_somewhere(value, choose: random.Random):
    if isinstance(value, dict) and value and choose.random() < 0.9:
        key = choose.choice(list(value))
        if choose.random() < 0.1:
            return {k: v for k, v in value.items() if k != key} | {"odd": choose.choice(JUNK)}
        return value | {key: _replace_somewhere(value[key], choose)}
    if isinstance(value, list) and value and choose.random() < 0.9:
        place = choose.randrange(len(value))
        return [_replace_somewhere(v, choose) if i == place else v for i, v in enumerate(value)]
    return choose.choice(JUNK)


def deep_nesting(choose: random.Random) -> Attack:
    depth = choose.choice([10, 500, 1100, 9000])
    opening, closing = choose.choice([("[", "]"), ('{"items":', "}"), ('{"items":[', "]}")])
    inner = opening * depth + "1" + closing * choose.choice([depth, depth - 1])
    body = choose.choice([inner, f'{{"items": {inner}}}', f'{{"input": {inner}}}'])
    return Attack("deep nesting", choose.choice(PATHS), body.encode())


def odd_numbers(choose: random.Random) -> Attack:
    number = choose.choice(["NaN", "-Infinity", "Infinity", "1e999", "-1e999", "9" * 400, "0x10", "1.", "-", "1e-400"])
    where = choose.choice(['{"input": [1, %s, 5]}', '{"input": %s}', '{"items": [%s]}', '{"query": [%s]}', "%s"])
    return Attack("odd numbers", choose.choice(PATHS), (where % number).encode())


def odd_ids(choose: random.Random) -> Attack:
    ids = [choose.choice([-1, 0, 1, 2, 3, 4, 5, 6, 400, 419, 420, 2**31, 2**40]) for _ in range(choose.randrange(12))]
    if choose.random() < 0.5:
        ids = [1, *ids, 4, 7, 5]
    body = {choose.choice(["input", "input_ids"]): choose.choice([ids, [ids], [[1, 4, 5], ids]])}
    return Attack("odd ids", choose.choice(["/pooling", "/classify"]), json.dumps(body).encode())


def surrogates(choose: random.Random) -> Attack:
    odd = choose.choice([b"\\ud800", b"\\udfff\\ud800", b"\xed\xa0\x80", b"\xff\xfe", b"\xc0\x80", b"\\u00", b"\\x41"])
    key = choose.choice([b'{"text": "%s"}', b'{"%s": 1}', b'{"items": [{"prompt": "%s"}]}', b'{"input": ["%s"]}'])
    return Attack("surrogates", choose.choice(PATHS), key % odd)


def other_contents(choose: random.Random) -> Attack:
    path, value = _any_body(choose)
    kinds = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json", "*/*"]
    headers = choose.choice(
        [{"content-type": choose.choice(kinds)}, {}, JSON | {"content-encoding": choose.choice(["gzip", "br", "x"])}]
    )
    return Attack("other contents", path, json.dumps(value).encode(), headers=headers)


def oversize(choose: random.Random) -> Attack:
    size = choose.choice([20_001, 25_000, 200_000])
    filler = choose.choice([b" ", b"[", b'"', b"\0"])
    return Attack("oversize", choose.choice(PATHS), b'{"items": ' + filler * size)


def other_places(choose: random.Random) -> Attack:
    paths = ["/", "/v1", "/v1/score/", "//v1/score", "/../etc/passwd", "/%00", "/%ff%fe", "/metrics/x", "/v1/score%2f"]
    method = choose.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "FOO"])
    if choose.random() < 0.5:
        return Attack("other places", choose.choice(paths), b"{}")
    return Attack("other places", choose.choice(PATHS), b"", method=method)


def broken_http(choose: random.Random) -> Attack:
    head = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    raw = choose.choice(
        [
            choose.randbytes(60).replace(b"\n", b"") + b"\r\n\r\n",
            b"GET /v1/score\r\n\r\n",
            b"POST /v1/score HTTP/9.9\r\n\r\n",
            head + b"content-length: -5\r\n\r\n{}",
            head + b"content-length: 99999999999999999999999\r\n\r\n{}",
            head + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
            head + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
            head + b"transfer-encoding: gzip\r\n\r\n{}",
            head + b"x" * 70_000 + b": y\r\n\r\n",
            head + b"bad header\r\n\r\n",
            b"POST /v1/score HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\nhost: x\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ]
    )
    return Attack("broken HTTP", raw=raw)


def left_halfway(choose: random.Random) -> Attack:
    whole = (
        b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n"
        + b"{" * 40
    )
    return Attack("left halfway", raw=whole[: choose.randrange(1, len(whole))])


ATTACKS = (
    *[random_bytes, broken_bytes, broken_bytes, wrong_types, wrong_types, wrong_types, deep_nesting, odd_numbers],
    *[odd_ids, odd_ids, surrogates, other_contents, oversize, other_places, broken_http, left_halfway],
)


# --- Sending and judging ---------------------------------------------------------------------------------------------


class Sender:
    """Sends requests over one kept connection; gives status and body, or None where the attack left before a reply."""

    def __init__(self, server: RunningServer):
        self.port = server.port
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def send(self, attack: Attack) -> tuple[int, bytes] | None:
        if attack.raw is not None:
            return self._send_raw(attack)
        self._connection.request(attack.method, attack.path, body=attack.body, headers=attack.headers)
        response = self._connection.getresponse()
        return response.status, response.read()

    def _send_raw(self, attack: Attack) -> tuple[int, bytes] | None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(attack.raw)
            if attack.name == "left halfway":
                return None
            response = http.client.HTTPResponse(connection)
            response.begin()
            return response.status, response.read()


def judge(attack: Attack, status: int, body: bytes) -> str:
    """What is wrong with a reply to a broken request; empty when nothing is."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except ValueError as error:
        return f"no strict JSON: {error}"
    if status == 200:  # broken, and still a valid request
        return "" if all(map(math.isfinite, numbers_in(value))) else "a number that is not finite"
    if not 400 <= status < 500:
        return f"status {status}"
    error = value.get("error") if isinstance(value, dict) else None
    if not isinstance(error, dict) or error.get("code") != status or not error.get("type") or not error.get("message"):
        return "no reason"
    return "" if len(error["message"]) < 400 else "a reason that repeats the request"


def _no_constant(name: str):
    raise ValueError(name)


def numbers_in(value) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers_in(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers_in(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_broken_requests_get_reasons_and_good_ones_between_them_their_rewards(
    tmp_path, tmp_path_factory, trajectory_corpus
):
    checkpoint = trained_checkpoint(trajectory_corpus, tmp_path_factory.mktemp("fuzz") / "run")
    choose = random.Random(17)
    good = [good_request(choose) for _ in range(60)]
    wanted = run_ranks(_score, 1, checkpoint, good)[0]
    seen, wrong, num_good = Counter(), [], 0
    with serving(checkpoint, "--max-body-bytes", 20_000, "--batch-wait-ms", 0, directory=tmp_path) as server:
        sender = Sender(server)
        for number in range(NUM_REQUESTS):
            if number == NUM_REQUESTS // 4:
                memory = server.resident_bytes()
            if number % 10 == 0:
                index = choose.randrange(len(good))
                status, body = sender.send(Attack("good", body=json.dumps(body_of(good[index])).encode()))
                assert status == 200, body
                assert json.loads(body)["rewards"] == [wanted[index]], "bit for bit what Scorer.score gives"
                num_good += 1
                continue
            attack = choose.choice(ATTACKS)(choose)
            reply = sender.send(attack)
            if reply is None:
                continue
            seen[attack.name, reply[0]] += 1
            if problem := judge(attack, *reply):
                wrong.append((problem, attack, reply))
        growth = server.resident_bytes() - memory
        assert sender.send(Attack("ready", "/ready", method="GET", headers={}))[0] == 200
        assert server.stop() == 0
        log = server.log.read_text()
    assert not wrong, f"{len(wrong)} wrong replies, the first: {wrong[0]}"
    assert num_good >= NUM_REQUESTS // 10
    assert {name for name, _ in seen} | {"left halfway"} == {attack(choose).name for attack in ATTACKS}
    assert growth < 50e6, f"memory grew by {growth / 1e6:.0f} MB"
    assert "Traceback" not in log
    assert len(log.splitlines()) < 10, log
    print(f"{NUM_REQUESTS} requests, {num_good} good; memory grew by {growth / 1e6:.1f} MB; {dict(seen)}")
