"""The campaign of benchmarks/sampling.py against models: its proxy fails as it says, its judge finds what is wrong."""

import importlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import orjson
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _neighbours(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def campaign():
    return importlib.import_module("sampling_campaign")


@pytest.fixture
def failing_proxy():
    return importlib.import_module("failing_proxy")


# --- the proxy -------------------------------------------------------------------------------------------------------


class _Echo(BaseHTTPRequestHandler):
    """A model that says its prompt again."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = orjson.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.prompts.append(asked["prompt"])
        body = orjson.dumps({"choices": [{"text": f"{asked['prompt']} again", "finish_reason": "stop"}]})
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def echo():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    server.daemon_threads, server.prompts = True, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_every_kind_of_failure_is_what_it_is_called_and_recorded(echo, failing_proxy):
    """A request that fails before the server is asked leaves no text; one that fails afterwards leaves one withheld."""
    upstream, kinds = f"http://127.0.0.1:{echo.server_port}", set()
    with failing_proxy.running(upstream, failures=0.7, seed=3) as proxy, httpx.Client(trust_env=False) as http:
        for number in range(40):
            key = failing_proxy.key_of("m", f"p{number}", number)
            fate = failing_proxy.fate_of(key, 1, failures=0.7, seed=3)
            kinds.add(fate)
            echo.prompts.clear()
            got = _ask(http, proxy.url, number)
            seen = proxy.record()["requests"][key]
            is_asked, outcome = failing_proxy.KINDS.get(fate, (True, "given"))
            assert got == {"given": f"p{number} again", "half": "dropped", "reset": "dropped"}.get(outcome, outcome)
            assert echo.prompts == [f"p{number}"] * is_asked
            assert seen["attempts"] == 1
            assert seen["given"] == [f"p{number} again"] * (fate is None)
            assert seen["withheld"] == [f"p{number} again"] * (is_asked and fate is not None)
        record = proxy.record()
    assert kinds == {None, *failing_proxy.KINDS}
    assert sum(record["failed"].values()) == sum(not one["given"] for one in record["requests"].values())
    assert record["under_way"] == 0


def _ask(http: httpx.Client, url: str, number: int) -> str:
    """The text, the status, or "dropped"."""
    body = {"model": "m", "prompt": f"p{number}", "seed": number}
    try:
        response = http.post(f"{url}/v1/completions", json=body)
    except httpx.TransportError:
        return "dropped"
    return response.json()["choices"][0]["text"] if response.status_code == 200 else str(response.status_code)


def test_so_many_fail_as_are_asked_for_and_another_attempt_has_another_fate(failing_proxy):
    fates = [failing_proxy.fate_of(f"request {n}", 1, failures=0.05, seed=1) for n in range(10_000)]
    assert 0.044 < sum(fate is not None for fate in fates) / 10_000 < 0.056  # 2.7 standard errors
    failed = [n for n, fate in enumerate(fates) if fate]
    again = [failing_proxy.fate_of(f"request {n}", 2, failures=0.05, seed=1) for n in failed]
    assert 0 < sum(fate is not None for fate in again) < len(again) / 5


# --- the judge -------------------------------------------------------------------------------------------------------


@pytest.fixture
def found(campaign, failing_proxy):
    """What a campaign of two prompts leaves behind when all is right: everything that `judge` takes."""
    asked = campaign.wanted(1, ["one prompt", "another"], ["a", "b", "c", "d"])
    keys = {place: failing_proxy.key_of(*request) for place, request in asked.items()}
    texts = {place: f"text {number}" for number, place in enumerate(asked)}
    journal = [
        {"shard": place[0], "row": place[1], "policy": place[2], "draw": place[3], "text": texts[place]}
        for place in asked
    ]
    requests = {key: {"attempts": 1, "given": [texts[place]], "withheld": []} for place, key in keys.items()}
    lines = []
    for prompt in ("one prompt", "another"):
        places = [place for place, request in asked.items() if request.prompt == prompt]
        lines.append({"prompt": prompt, "trajectories": [{"policy": p[2], "text": texts[p]} for p in places]})
    record = {"failed": {}, "requests": requests}
    finished = dict.fromkeys(list(keys.values())[:3], 1)
    return {"asked": asked, "journal": journal, "record": record, "lines": lines, "finished": finished}


def judged(campaign, found, quarantine=()):
    written = campaign.Written(found["lines"], quarantine)
    options = {"finished": found["finished"], "seconds": 1.0}
    return campaign.judge(found["asked"], found["journal"], found["record"], written, **options)


def test_a_right_campaign_is_found_right(campaign, found):
    result = judged(campaign, found)
    assert (result.requests, result.once, result.in_output, result.left_out) == (10, 10, 10, 0)
    assert result.is_right


def test_what_was_under_way_at_a_kill_may_be_answered_twice(campaign, found):
    seen = list(found["record"]["requests"].values())[5]
    seen |= {"attempts": 2, "given": ["lost with the sampler", *seen["given"]]}
    result = judged(campaign, found)
    assert (result.is_right, result.under_way) == (True, 1)


def _lose(found):
    found["journal"].pop()


def _double(found):
    found["journal"].append(found["journal"][0])


def _fail(found):
    found["journal"][0]["failed"] = "no reply"
    del found["journal"][0]["text"]


def _change_a_text(found):
    found["journal"][0]["text"] = "of another"


def _change_the_output(found):
    found["lines"][0]["trajectories"][0]["text"] = "of another"


def _leave_out(found):
    found["lines"][0]["trajectories"].pop()


def _repeat_in_output(found):
    found["lines"][0]["trajectories"].append(found["lines"][0]["trajectories"][0])


def _ask_for_more(found):
    found["record"]["requests"]["nobody wanted this"] = {"attempts": 1, "given": ["text"], "withheld": []}


def _ask_again_what_was_finished(found):
    seen = next(iter(found["record"]["requests"].values()))
    seen |= {"attempts": 2, "given": 2 * seen["given"]}


@pytest.mark.parametrize(
    ("damage", "count"),
    [
        (_lose, "lost"),
        (_double, "doubled"),
        (_fail, "lost"),
        (_change_a_text, "foreign_texts"),
        (_change_the_output, "foreign_texts"),
        (_leave_out, None),
        (_repeat_in_output, "foreign_texts"),
        (_ask_for_more, "strangers"),
        (_ask_again_what_was_finished, "again"),
    ],
)
def test_whatever_goes_wrong_is_found_and_counted(campaign, found, damage, count):
    damage(found)
    result = judged(campaign, found)
    assert not result.is_right
    assert count is None or getattr(result, count) >= 1


def test_equal_answers_and_dropped_prompts_are_accounted_for(campaign, found):
    trajectories = found["lines"][0]["trajectories"]
    dropped = found["lines"].pop()
    double = trajectories.pop()
    _rename(found, double["text"], trajectories[0]["text"])
    result = judged(campaign, found, quarantine=[{"prompt": 1, "text": dropped["prompt"], "reason": "too few"}])
    assert (result.in_output, result.left_out, result.is_right) == (4, 6, True)


def _rename(found, old, new):
    for line in found["journal"]:
        line["text"] = new if line["text"] == old else line["text"]
    for seen in found["record"]["requests"].values():
        seen["given"] = [new if text == old else text for text in seen["given"]]


# --- all of it -------------------------------------------------------------------------------------------------------


def test_a_small_campaign_against_models_of_transformers(tmp_path):
    """Training, the real server, failures, a kill and both tables."""
    options = "--server transformers --requests 200 --failures 0.2 --kills 1 --concurrency 8 --tokens 6 --steps 20"
    command = [sys.executable, ROOT / "benchmarks/sampling.py", *options.split(), "--compared", "50", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    (row,) = [row for row in rows if row[0] == "200"]
    requests, failures, kills, once, lost, doubled, foreign, again, under_way = map(int, row)
    assert (requests, kills, once, lost, doubled, foreign, again) == (200, 1, 200, 0, 0, 0, 0)
    assert failures > 20
    assert under_way <= 8
    speeds = {row[0]: row for row in rows if "loop" in row[0] or row[0] == "sample"}
    assert len(speeds) == 3
    assert all(float(row[1]) > 0 and float(row[-1]) > 0 for row in speeds.values())
