"""`sample` over real HTTP: every request answered once, whatever fails and whenever it is killed."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import chat_server
import orjson
import pytest
from flaky_server import FlakyServer

from megatron_polar.data.lines import read_jsonl
from megatron_polar.data.parts import Part
from megatron_polar.data.records import TrajectoryGroup, parse_record
from megatron_polar.errors import UserError
from megatron_polar.policies.collect import Asking
from megatron_polar.policies.live import LiveProgress
from megatron_polar.policies.sample import sample_pool

ROOT = Path(__file__).parent.parent
MODELS = ("a", "b", "c")
FAILURES = [500, 503, 429, "hang_up", "half", "not_json", "no_choices"]


@pytest.fixture(scope="module")
def running():
    with chat_server.running(*MODELS) as server:
        yield server


@pytest.fixture
def server(running):
    running.forget()
    return running


def write_pool(directory: Path, server, *, rest: str = "", **settings) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    given = {"api": "completions", "backoff_seconds": 0.01, "timeout_seconds": 10, **settings}
    keys = ", ".join(f"{name}: {value}" for name, value in given.items())
    entries = [f"- {{name: policy-{model}, endpoint: '{server.url}/v1', model: {model}, {keys}}}\n" for model in MODELS]
    path = directory / "pool.yaml"
    path.write_text("policies:\n" + "".join(entries) + rest, encoding="utf-8")
    return path


def write_prompts(directory: Path, *prompts) -> Path:
    path = directory / "prompts.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"prompt": prompt}) + b"\n" for prompt in prompts))
    return path


def draw(pool: Path, output: Path, **settings):
    given = {"num_prompts": 60, "prompts": None, "policies_per_prompt": 3, "prompts_per_shard": 20}
    return sample_pool(pool, output=output, **{**given, **settings})


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("*.jsonl"))}


def groups(output: Path) -> list[TrajectoryGroup]:
    return [
        parse_record(line, source="sample", line_number=number, default_wrapper="sft")
        for number, line in read_jsonl(output)
    ]


def quarantined(output: Path) -> list[dict]:
    return [orjson.loads(line) for line in (output / "quarantine.ndjson").read_bytes().splitlines()]


def manifest_of(output: Path) -> dict:
    return json.loads((output / "manifest.json").read_text())


@pytest.fixture(scope="module")
def straight(running, tmp_path_factory) -> Path:
    """What a run without any trouble gives."""
    running.forget()
    directory = tmp_path_factory.mktemp("straight")
    draw(write_pool(directory, running), directory / "output")
    return directory / "output"


def test_every_request_is_answered_once_and_becomes_a_trajectory(server, tmp_path):
    report = draw(write_pool(tmp_path, server), tmp_path / "out")
    counts = server.counts()
    assert (report.num_prompts, report.num_trajectories, report.num_shards) == (60, 240, 3)
    assert counts["seen"] == len(counts["answered"]) == 240 and set(counts["answered"].values()) == {1}
    for record in groups(tmp_path / "out"):
        assert list(Counter(trajectory.policy for trajectory in record.trajectories).values()) == [2, 1, 1]
        assert record.wrapper == "pretrain"
    texts = {chat_server.answer_of(*orjson.loads(key)) for key in counts["answered"]}
    assert texts == {t.text for record in groups(tmp_path / "out") for t in record.trajectories}


def test_requests_carry_the_papers_settings_and_a_seed_of_their_own(server, tmp_path):
    draw(write_pool(tmp_path, server), tmp_path / "out", num_prompts=5)
    bodies = server.counts()["bodies"]
    settings = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_tokens": 4096}
    assert all(settings.items() <= body.items() for body in bodies)
    assert len({body["seed"] for body in bodies}) == len(bodies) == 20
    assert {body["prompt"] for body in bodies} == {record.prompt for record in groups(tmp_path / "out")}


def test_chat_policies_are_given_messages_and_no_top_k_where_it_is_0(server, tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    pool = write_pool(tmp_path, server, api="chat", top_k=0)
    prompts = write_prompts(tmp_path, messages, "How are you?")
    with pytest.raises(UserError, match=r"policy policy-a of .* chats: .*; use --wrapper sft"):
        draw(pool, tmp_path / "out", prompts=prompts, num_prompts=None)
    draw(pool, tmp_path / "out", prompts=prompts, num_prompts=None, wrapper="sft")
    bodies = server.counts()["bodies"]
    assert len(bodies) == 8 and not any("top_k" in body for body in bodies)
    asked = [body["messages"] for body in bodies]
    assert asked.count(messages) == asked.count([{"role": "user", "content": "How are you?"}]) == 4
    assert [(record.prompt, record.wrapper) for record in groups(tmp_path / "out")] == [
        ("Be kind.\nHi", "sft"),
        ("How are you?", "sft"),
    ]


def test_failures_of_every_kind_are_retried_and_change_nothing(server, straight, tmp_path):
    server.behave(fail=0.3, kinds=FAILURES, retry_after="0.01")
    draw(write_pool(tmp_path, server, retries=20), tmp_path / "out")
    counts = server.counts()
    assert counts["failed"] > 50 and counts["seen"] == 240 + counts["failed"]
    assert set(counts["answered"].values()) == {1}
    assert shards(tmp_path / "out") == shards(straight)
    described = manifest_of(tmp_path / "out")["collected"]["policies"]
    assert sum(policy["counts"]["retries"] for policy in described) >= counts["failed"] * 6 // 7 - 20


# --- kills -----------------------------------------------------------------------------------------------------------


def finished(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (output / ".work").glob("answers-*.ndjson"))


def start(pool: Path, output: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_polar", "sample", "--pool", pool, "--output", output]
    command += ["--num-prompts", "60", "--policies-per-prompt", "3", *words]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_sends_no_finished_request_again(server, tmp_path):
    pool, output = write_pool(tmp_path, server, max_concurrency=4), tmp_path / "out"
    server.behave(delay=0.05, fail=0.05, kinds=FAILURES)
    lost = 0
    for wanted in (60, 150):
        process = start(pool, output)
        while finished(output) < wanted:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.3)
        lost = sum(server.counts()["answered"].values()) - finished(output)
        assert not list(output.glob("*.jsonl")) and not (output / "manifest.json").exists()
    process = start(pool, output)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "requests were finished before and are not sent again" in said
    answered = server.counts()["answered"]
    assert len(answered) == finished(output) == 240
    assert sum(answered.values()) == 240 + lost, "only what was under way at a kill is asked for twice"
    assert lost <= 2 * 4
    records = groups(output)
    assert sum(len(record.trajectories) for record in records) == 240
    draw(pool, tmp_path / "straight", prompts_per_shard=500)
    assert shards(output) == shards(tmp_path / "straight")


def test_ctrl_c_waits_for_what_is_under_way_and_the_same_command_goes_on(server, tmp_path):
    pool, output = write_pool(tmp_path, server, max_concurrency=8), tmp_path / "out"
    server.behave(delay=0.2)
    process = start(pool, output)
    while finished(output) < 20:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in said
    assert "interrupted: nothing is lost, the same command goes on from here" in said
    assert sum(server.counts()["answered"].values()) == finished(output) < 240
    server.behave(delay=0.0)
    draw(pool, output, prompts_per_shard=500)
    assert set(server.counts()["answered"].values()) == {1}, "nothing was asked twice"


def test_a_line_that_cannot_be_written_whole_leaves_no_half(server, tmp_path, monkeypatch):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    write, lines = os.write, []

    def full_disk(descriptor, content):
        if b'"draw"' not in content:
            return write(descriptor, content)
        lines.append(content)
        if len(lines) < 30:
            return write(descriptor, content)
        write(descriptor, content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            draw(pool, output)
    assert "answers-0000" in caught.value.filename
    journals = b"".join(path.read_bytes() for path in (output / ".work").glob("answers-*"))
    assert journals.count(b"\n") == 29 and journals.endswith(b"}\n")
    draw(pool, output)
    assert len(server.counts()["answered"]) == 240


def test_no_link_is_followed(server, tmp_path):
    pool, output, elsewhere = write_pool(tmp_path, server), tmp_path / "out", tmp_path / "elsewhere"
    draw(pool, output, num_prompts=20)
    elsewhere.write_text("mine, without a newline at its end")
    (output / "manifest.json").unlink()
    (output / "trajectories-00000.jsonl").unlink()
    journal = output / ".work" / "answers-00000.ndjson"
    journal.unlink()
    journal.symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"answers-00000\.ndjson: not a regular file; delete it"):
        draw(pool, output, num_prompts=20)
    (output / ".work").rename(tmp_path / "moved")
    (output / ".work").symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match=r"\.work: a link; delete it"):
        draw(pool, output, num_prompts=20)
    assert elsewhere.read_text() == "mine, without a newline at its end"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"counts": 3}', b"\xff", None])
def test_a_summary_that_vouches_for_nothing_is_made_again(server, straight, tmp_path, content):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    draw(pool, output)
    summary = output / ".work" / "shard-00001.json"
    if content is None:
        content = summary.read_bytes().replace(b'"answered":', b'"answered":1')
    summary.write_bytes(content)
    assert draw(pool, output).num_reused == 2
    assert shards(output) == shards(straight) and server.counts()["seen"] == 240


def test_a_torn_last_line_of_a_journal_is_asked_for_again(server, straight, tmp_path):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    draw(pool, output)
    for name in ("trajectories-00001.jsonl", "manifest.json"):
        (output / name).unlink()
    journal = output / ".work" / "answers-00001.ndjson"
    journal.write_bytes(journal.read_bytes()[:-25])
    before = server.counts()["seen"]
    report = draw(pool, output)
    assert server.counts()["seen"] == before + 1 and report.num_reused == 2
    assert shards(output) == shards(straight)


def test_a_line_that_sample_has_not_written_is_named(server, tmp_path):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    draw(pool, output)
    (output / "trajectories-00001.jsonl").unlink()
    journal = output / ".work" / "answers-00001.ndjson"
    lines = journal.read_bytes().splitlines(keepends=True)
    for bad in (b"rubbish\n", b'{"row": 1}\n', b"\0\0\0\n", b"[]\n", lines[3].replace(b"policy-", b"other-")):
        journal.write_bytes(b"".join([*lines[:3], bad, *lines[4:]]))
        with pytest.raises(UserError, match=r"answers-00001\.ndjson:4: not what `sample` has written; delete the line"):
            draw(pool, output)


def test_a_damaged_shard_is_made_again_from_its_journal_without_a_request(server, straight, tmp_path):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    draw(pool, output)
    seen = server.counts()["seen"]
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-10]), lambda path: path.unlink()):
        damage(output / "trajectories-00002.jsonl")
        server.behave(fail=1.0)
        assert draw(pool, output).num_reused == 2
    assert server.counts()["seen"] == seen
    assert shards(output) == shards(straight)


def test_a_finished_output_is_left_alone_and_needs_no_server(server, tmp_path, capsys):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    draw(pool, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    pool.write_text(pool.read_text().replace(server.url, "http://127.0.0.1:9"))
    assert draw(pool, output).num_reused == 3, "another address is no other setting"
    assert "nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


def test_an_output_of_other_settings_is_refused(server, tmp_path):
    draw(write_pool(tmp_path, server), tmp_path / "out", num_prompts=5)
    for settings, changed in (
        ({"temperature": 0.7}, "other policies of the pool"),
        ({"rest": "cleaning: {cut_off: keep}\n"}, "another cleaning of the pool"),
        ({"max_concurrency": 2, "retries": 3, "requests_per_minute": 6000}, None),
    ):
        pool = write_pool(tmp_path, server, **settings)
        if changed:
            with pytest.raises(UserError, match=rf"holds trajectories of other settings \({changed}\); repeat"):
                draw(pool, tmp_path / "out", num_prompts=5)
        else:
            assert draw(pool, tmp_path / "out", num_prompts=5).num_reused == 1


def test_parts_give_the_bytes_of_one_call(server, straight, tmp_path):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    for index in (1, 0):
        assert not draw(pool, output, part=Part(index, 2)).is_complete
    seen = server.counts()["seen"]
    assert draw(pool, output).is_complete and server.counts()["seen"] == seen == 240
    assert shards(output) == shards(straight)
    served = [policy["served"] for policy in manifest_of(output)["collected"]["policies"]]
    assert served == [{"owned_by": "tests"}] * 3, "the last call has asked no server, and the parts have"


def test_a_manifest_of_before_parts_that_asked_again_is_written_anew(server, straight, tmp_path):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    server.behave(fail=0.1, kinds=[422])
    draw(pool, output)
    assert quarantined(output)
    server.behave(fail=0.0)
    for index in (0, 1):
        assert not draw(pool, output, part=Part(index, 2), asking=Asking(retry_failed=True)).is_complete
    assert draw(pool, output).is_complete
    manifest = manifest_of(output)
    assert [entry["sha256"] for entry in manifest["shards"]] == [
        hashlib.sha256(content).hexdigest() for content in shards(output).values()
    ]
    assert manifest["shards"] == manifest_of(straight)["shards"] and manifest["prompts"] == 60
    assert sum(policy["counts"]["failed"] for policy in manifest["collected"]["policies"]) == 0
    assert quarantined(output) == [] and manifest["quarantine"]["bytes"] == 0


def test_a_part_that_is_given_twice_sends_nothing_twice(server, straight, tmp_path):
    """The second is refused, and so is one of another number of parts with the same shard."""
    pool, output = write_pool(tmp_path, server, max_concurrency=4), tmp_path / "out"
    server.behave(delay=0.05)
    first = start(pool, output, "--part", "0/2")
    try:
        deadline = time.monotonic() + 60
        while not finished(output) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert first.poll() is None
        for part in (Part(0, 2), Part(0, 4)):
            with pytest.raises(UserError, match=r"out: another sample asks for shards of this part .*; wait for it"):
                draw(pool, output, part=part, prompts_per_shard=500)
        assert draw(pool, output, part=Part(1, 2), prompts_per_shard=500).num_shards == 0
        assert first.wait(timeout=60) == 0
    finally:
        first.kill()
        first.wait()
    draw(pool, output, prompts_per_shard=500)
    assert set(server.counts()["answered"].values()) == {1} and server.counts()["seen"] == 240
    assert b"".join(shards(output).values()) == b"".join(shards(straight).values())


# --- what cannot be used ---------------------------------------------------------------------------------------------


def test_requests_that_fail_for_good_are_quarantined_and_their_groups_dropped(server, tmp_path):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    prompts = write_prompts(tmp_path, "fine", "a POISON one", "EMPTY", "FILTER", "also fine")
    for _ in range(2):
        report = draw(pool, output, prompts=prompts, num_prompts=None)
        assert server.counts()["seen"] == 20, "what failed for good is not asked again"
    assert (report.num_prompts, report.num_trajectories) == (2, 8)
    entries = quarantined(output)
    reasons = Counter((entry["prompt"], entry["reason"]) for entry in entries)
    assert reasons == {
        (1, 'HTTP 400 Bad Request: {"error":{"message":"this prompt is\\nnot acceptable"}}'): 4,
        (2, "an empty answer"): 4,
        (3, "refused by the model or its filter"): 4,
        **{(number, "too few trajectories are left to compare"): 1 for number in (1, 2, 3)},
    }
    manifest = manifest_of(output)
    assert manifest["collected"]["cleaning"]["dropped_groups"] == 3
    assert sum(policy["counts"]["failed"] for policy in manifest["collected"]["policies"]) == 12
    assert manifest["quarantine"]["bytes"] == (output / "quarantine.ndjson").stat().st_size


def test_a_policy_that_answers_nothing_ends_the_run_and_leaves_no_poison_behind(server, tmp_path):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    server.behave(fail=1.0, kinds=[422])
    with pytest.raises(UserError, match=r"policy policy-\w: none of its 2\d requests was answered, first: HTTP 422"):
        draw(pool, output)
    assert finished(output) == 0
    server.behave(fail=0.0)
    assert draw(pool, output).num_trajectories == 240
    assert quarantined(output) == []


def test_refusals_after_an_interruption_are_kept_like_those_without_one(server, tmp_path):
    """The first shard is finished; in the second, one policy's only request is refused."""
    prompts = write_prompts(tmp_path, "fine", "also fine", "a POISON one")
    pool, given = write_pool(tmp_path, server), {"prompts": prompts, "num_prompts": None, "prompts_per_shard": 2}
    draw(pool, tmp_path / "whole", **given)
    draw(pool, tmp_path / "out", **given)
    (tmp_path / "out/manifest.json").unlink()
    for path in [*(tmp_path / "out").glob("*00001*"), *(tmp_path / "out/.work").glob("*00001*")]:
        path.unlink()
    assert draw(pool, tmp_path / "out", **given).is_complete
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_a_few_refusals_before_the_first_answer_are_kept(server, tmp_path):
    prompts = write_prompts(tmp_path, "POISON 1", "POISON 2", "fine")
    report = draw(write_pool(tmp_path, server, max_concurrency=1), tmp_path / "out", prompts=prompts, num_prompts=None)
    assert report.num_prompts == 1 and len(quarantined(tmp_path / "out")) == 8 + 2


def test_a_server_that_fails_for_good_ends_the_run_and_the_same_command_goes_on(server, straight, tmp_path):
    pool, output = write_pool(tmp_path, server, retries=3), tmp_path / "out"
    server.behave(fail=1.0, kinds=[503])
    with pytest.raises(
        UserError, match=rf"{server.url}: nothing was answered for .* 3 retries, at last HTTP 503.*again"
    ):
        draw(pool, output)
    server.behave(fail=0.0)
    draw(pool, output)
    assert shards(output) == shards(straight) and quarantined(output) == []


def test_where_one_server_dies_the_others_end_what_they_have(server, straight, tmp_path, capsys):
    dead = FlakyServer(lambda request: None, models=lambda: (200, {}, {"data": [{"id": "c"}]}))
    pool, output = write_pool(tmp_path, server, retries=1), tmp_path / "out"
    whole = pool.read_text()
    last = whole.rstrip().splitlines()[-1]
    with dead:
        pool.write_text(whole.replace(last, last.replace(server.url, dead.url)))
        with pytest.raises(UserError, match=rf"{dead.url}: nothing was answered for .*start the same command again"):
            draw(pool, output)
    assert "(the other sources go on)" in capsys.readouterr().err
    wanted = sum(t.policy != "policy-c" for record in groups(straight) for t in record.trajectories)
    assert finished(output) == wanted < 240
    pool.write_text(whole)
    draw(pool, output)
    assert shards(output) == shards(straight) and set(server.counts()["answered"].values()) == {1}


def test_requests_that_failed_for_good_are_sent_once_more_where_that_is_wanted(server, straight, tmp_path):
    pool, output = write_pool(tmp_path, server), tmp_path / "out"
    server.behave(fail=0.1, kinds=[422])
    draw(pool, output)
    failed = len([entry for entry in quarantined(output) if "policy" in entry])
    assert failed > 5
    server.behave(fail=0.0)
    seen = server.counts()["seen"]
    assert draw(pool, output).num_reused == 3 and server.counts()["seen"] == seen
    for _ in range(2):
        draw(pool, output, asking=Asking(retry_failed=True))
        assert server.counts()["seen"] == seen + failed
    assert shards(output) == shards(straight) and quarantined(output) == []


def test_a_shard_that_cannot_be_written_ends_the_run_at_once(server, straight, tmp_path, monkeypatch):
    pool, output = write_pool(tmp_path, server, max_concurrency=2), tmp_path / "out"
    server.behave(delay=0.02)

    def full_disk(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("megatron_polar.policies.collect.assemble", full_disk)
        with pytest.raises(OSError, match="No space left"):
            draw(pool, output)
    assert server.counts()["seen"] < 200
    draw(pool, output)
    assert shards(output) == shards(straight) and set(server.counts()["answered"].values()) == {1}


def test_answers_are_cleaned_and_counted(server, tmp_path, capsys):
    prompts = write_prompts(tmp_path, "LOOP", "LONG", *[f"SAME {number}" for number in range(25)], "fine")
    draw(write_pool(tmp_path, server), tmp_path / "out", prompts=prompts, num_prompts=None, prompts_per_shard=10)
    counts = manifest_of(tmp_path / "out")["collected"]["cleaning"]
    assert (counts["loop"], counts["trimmed"]) == (4, 4)
    assert counts["exact_duplicates"] == 3 * 27 and counts["dropped_groups"] == 27
    assert [record.prompt for record in groups(tmp_path / "out")] == ["fine"]
    assert "too alike to tell apart" in capsys.readouterr().err


def test_a_cut_off_ending_that_is_kept_is_marked(server, tmp_path):
    pool = write_pool(tmp_path, server, rest="cleaning: {cut_off: keep}\n")
    draw(pool, tmp_path / "out", prompts=write_prompts(tmp_path, "LONG", "fine"), num_prompts=None)
    lines = [orjson.loads(line) for line in shards(tmp_path / "out")["trajectories-00000.jsonl"].splitlines()]
    marks = [[trajectory.get("cut_off") for trajectory in line["trajectories"]] for line in lines]
    assert marks == [[True] * 4, [None] * 4]
    assert len(groups(tmp_path / "out")) == 2, "preprocess reads it all the same"


# --- schedules and mixtures ------------------------------------------------------------------------------------------


def test_all_from_all(server, tmp_path):
    pool = write_pool(tmp_path, server)
    draw(pool, tmp_path / "out", num_prompts=6, schedule="all", trajectories_per_policy=3)
    for record in groups(tmp_path / "out"):
        policies = [trajectory.policy for trajectory in record.trajectories]
        assert policies == [name for name in ("policy-a", "policy-b", "policy-c") for _ in range(3)]


def test_embedded_policies_of_a_mixed_pool_answer_too(server, tmp_path):
    rest = "embedded: {num_policies: 2}\nsampling: {corpus_fraction: 0.1}\n"
    pool = write_pool(tmp_path, server, rest=rest)
    draw(pool, tmp_path / "out", num_prompts=6, schedule="all")
    names = ["embedded-000", "embedded-001", "policy-a", "policy-b", "policy-c"]
    for record in groups(tmp_path / "out"):
        assert list(Counter(trajectory.policy for trajectory in record.trajectories)) == names
    draw(pool, tmp_path / "again", num_prompts=6, schedule="all")
    assert shards(tmp_path / "out") == shards(tmp_path / "again")


def test_workers_change_nothing_where_servers_are_asked(server, straight, tmp_path, capsys):
    """slurm/sample.sh gives a job's cores, whatever the pool."""
    draw(write_pool(tmp_path, server), tmp_path / "out", workers=2)
    assert "workers=2: only embedded policies need them" in capsys.readouterr().err
    assert shards(tmp_path / "out") == shards(straight)


def test_check_asks_nobody_and_writes_nothing(server, tmp_path):
    assert draw(write_pool(tmp_path, server), tmp_path / "out", check=True) is None
    assert not (tmp_path / "out").exists() and server.counts()["seen"] == 0


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_has_a_line_and_an_eta_for_each_policy_with_the_slowest_first():
    names = [f"p{number}" for number in range(15)]
    live = LiveProgress(names, totals=[100] * 15, begun=[20] * 15)
    with live:
        for _ in range(40):
            live.count(3, retries=1, is_failed=False)
        for _ in range(80):
            live.count(7, retries=0, is_failed=True)
    lines = live.lines(60.0)
    assert lines[0] == "sample: 420/1500 requests, 40 retries, 80 failed, ETA 9:00, 1:00 elapsed"
    assert lines[1] == "  p0: 20/100 requests" and lines[-1] == "  and 2 more policies" and len(lines) == 14
    assert not any("p7" in line for line in lines)
    assert LiveProgress(["a"], totals=[100], begun=[20]).lines(1.0)[1] == "  a: 20/100 requests"
