"""What a run writes down of itself: whole lines only, and accounts that add up over restarts."""

import os
import subprocess
import sys

import orjson
import pytest
from faults_goodput import goodput_trace

from megatron_polar.train.journal import Journal, LineFile, goodput, read_events, read_rows


@pytest.mark.parametrize("seed", [1, 2])
def test_goodput_of_a_failing_run_is_what_the_simulation_kept_account_of(seed, tmp_path):
    figures = goodput_trace(tmp_path / "run", seed=seed)
    assert figures["relative_error"] <= 0.001
    assert figures["accounts_agree"]
    assert figures["restarts"] > 10


@pytest.mark.parametrize("beside", [0.0, 400.0])
def test_steps_behind_the_last_event_count_for_both_sides_of_the_goodput(beside):
    """A run that goes on, or was killed: here 360 steps of 10 s until a save, and 240 behind it; a save in the
    background ends while steps go on."""
    save = {"time": 3700.0 + beside, "event": "save", "step": 360, "seconds": 100.0 + beside, "stalled_seconds": 100.0}
    events = [{"time": 0.0, "event": "start", "step": 0}, save]
    rows = [{"iteration": step, "iteration-time": 10.0} for step in range(10, 610, 10)]
    found = goodput(events, rows)
    assert (found.wall_seconds, found.productive_seconds) == (6100.0, 6000.0)
    assert found.ettr == pytest.approx(6000 / 6100)
    done = {"time": 7000.0, "event": "done", "step": 600}
    assert goodput([*events, done], rows).wall_seconds == 7000.0


def test_of_a_row_with_an_event_in_between_only_what_came_after_is_added():
    events = [{"time": 0.0, "event": "start", "step": 0}, {"time": 1510.0, "event": "bad_step", "step": 150}]
    rows = [{"iteration": step, "iteration-time": 10.0} for step in (100, 200)]
    assert goodput(events, rows).wall_seconds == 1510.0 + 500.0
    slow = {"time": 1510.0, "event": "straggler", "step": 150, "seconds": 9.0, "ratio": 2.0}  # its seconds are a step's
    assert goodput([events[0], slow], rows).wall_seconds == 1510.0 + 500.0


def test_a_run_without_events_has_no_goodput(tmp_path):
    assert goodput(read_events(tmp_path), read_rows(tmp_path)).ettr == 0.0


def test_half_a_line_is_passed_over_and_dropped_by_the_next_start(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(b'{"time": 1.0, "event": "start", "step": 0}\n{"time": 2.0, "ev')
    assert [event["event"] for event in read_events(tmp_path)] == ["start"]
    journal = Journal(tmp_path, writes=True)
    journal.write("start", step=3)
    assert [event["step"] for event in read_events(tmp_path)] == [0, 3]
    assert journal.restarts == 1
    assert all(orjson.loads(line) for line in (tmp_path / "events.jsonl").read_bytes().splitlines())


def test_lines_that_cannot_be_written_wait_and_come_in_order(tmp_path, monkeypatch, capfd):
    file = LineFile(tmp_path / "lines")
    file.append({"n": 0})
    real, full = os.fsync, [True]

    def fsync(handle: int) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    file.append({"n": 1})
    file.append({"n": 2})
    assert (tmp_path / "lines").read_bytes() == b'{"n":0}\n'  # nothing half-written
    full[0] = False
    file.append({"n": 3})
    assert [orjson.loads(line)["n"] for line in (tmp_path / "lines").read_bytes().splitlines()] == [0, 1, 2, 3]
    assert capfd.readouterr().err.count("cannot be written now") == 1


_ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from megatron_polar.train.journal import LineFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = LineFile(Path(sys.argv[1]))
file.append({"n": 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
for n in range(1, 4):
    file.append({"n": n, "text": "x" * 500})
assert Path(sys.argv[1]).stat().st_size < 20
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.append({"n": 4})
"""


def test_a_line_for_which_half_there_was_room_is_not_half_written(tmp_path):
    """The first write ends at the limit, as on a disk that has just become full."""
    path = tmp_path / "lines"
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_FULL_DISK, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [orjson.loads(line)["n"] for line in path.read_bytes().splitlines()] == [0, 1, 2, 3, 4]


def test_a_report_of_bad_steps_that_cannot_be_written_is_a_warning_and_a_fenced_job_writes_none(tmp_path, capfd):
    journal = Journal(tmp_path, writes=True)
    journal.write("start", step=0)
    for step in (3, 5, 6):
        journal.write("bad_step", step=step, reason="loss is nan")
    Journal(tmp_path, writes=True, may_write=lambda: False).write_bad_steps(first=5, replay="again")
    Journal(tmp_path, writes=False).write_bad_steps(first=5, replay="again")
    assert not (tmp_path / "bad_steps.json").exists()
    (tmp_path / "bad_steps.json").mkdir()
    journal.write_bad_steps(first=5, replay="again")
    assert "bad_steps.json: cannot be written (Is a directory); events.jsonl" in capfd.readouterr().err
    (tmp_path / "bad_steps.json").rmdir()
    journal.write_bad_steps(first=5, replay="again")
    written = orjson.loads((tmp_path / "bad_steps.json").read_bytes())
    assert ([event["step"] for event in written["steps"]], written["replay"]) == ([5, 6], "again")
