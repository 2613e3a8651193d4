"""What happened to a run over all its restarts: events.jsonl, status.json, and how much of the time was useful."""

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from megatron_polar import log
from megatron_polar.manifest import write_durably

EVENTS, STATUS, BAD_STEPS_FILE = "events.jsonl", "status.json", "bad_steps.json"


class LineFile:
    """A file of JSON lines that a full disk neither spoils nor lets stop the run: what cannot be written waits for the
    next time."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[bytes] = []
        self._failed = False

    def append(self, row: dict) -> None:
        """Write a row, and those that are waiting; on the disk when this returns, or all of them wait on."""
        self._waiting.append(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        try:
            with open(self.path, "ab", buffering=0, opener=_open_no_link) as file:  # a buffer would be written again
                end = file.seek(0, os.SEEK_END)
                try:
                    rest = memoryview(b"".join(self._waiting))
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), end)
                    raise
            self._waiting, self._failed = [], False
        except OSError as error:
            if not self._failed:
                log.warn(f"{self.path}: cannot be written now ({error.strerror or error}); its rows wait in memory")
            self._failed = True

    def end_with_a_whole_line(self) -> None:
        """Drop what a kill has left of a last line. A file that has a second name goes on as a copy of its own."""
        if self.path.is_file() and not self.path.is_symlink():
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if self.path.stat().st_nlink > 1:
                write_durably(self.path, whole)
            elif whole != data:
                os.truncate(self.path, len(whole))


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


class Journal:
    """Appends events to `events.jsonl` and keeps `status.json`; only the first rank writes, the others may call.
    `may_write` is asked every time: a job that is fenced keeps silent."""

    def __init__(self, directory: Path, *, writes: bool, may_write: Callable[[], bool] = lambda: True):
        self.directory, self._writes, self._may_write = directory, writes, may_write
        self._file = LineFile(directory / EVENTS)
        if writes:
            self._file.end_with_a_whole_line()
        events = read_events(directory) if writes else []
        starts = [event["time"] for event in events if event["event"] == "start"]
        self.restarts, self.first_start = len(starts), min(starts, default=time.time())
        self.step = last_step(directory)
        """Finished steps, as far as this process knows."""
        self.done_at = done_step(events)
        """Where the run was done when this process came, until it begins more steps."""

    def write(self, event: str, **fields) -> None:
        """Append one event with the time in seconds since 1970."""
        if event == "start":
            self.done_at = None
        if self._writes and self._may_write():
            self._file.append({"time": time.time(), "event": event, **fields})

    def read(self) -> list[dict]:
        """All events so far."""
        return read_events(self.directory)

    def end(self, state: str, *, exit_status: int, reason: str = "", machine: str | None = None) -> None:
        """Write down how this process ends, unless it ends before the run has begun, or finds it done as it was;
        `machine`: the one that is to blame."""
        if (self.directory / STATUS).exists() or (self.directory / EVENTS).exists():
            if state != "done" or self.done_at is None:
                self.write(state, step=self.step, **({"reason": reason} if reason else {}))
            self.status(state, exit_status=exit_status, reason=reason, machine=machine)

    def write_bad_steps(self, *, first: int, replay: str) -> None:
        """Say in `bad_steps.json` which steps from `first` on were skipped, and with which command to look into them.
        What cannot be written does not change how the run ends."""
        if not (self._writes and self._may_write()):
            return
        path = self.directory / BAD_STEPS_FILE
        try:
            bad = [event for event in bad_steps(self.read()) if event["step"] >= first]
            report = {"steps": bad, "replay": replay, "time": time.time()}
            write_durably(path, orjson.dumps(report, option=orjson.OPT_INDENT_2))
        except OSError as error:
            log.warn(f"{path}: cannot be written ({error.strerror or error}); {EVENTS} and the log name the steps")

    def status(
        self, state: str, *, exit_status: int | None = None, reason: str = "", machine: str | None = None
    ) -> None:
        """Say in `status.json` where the run stands: a launcher behind torchrun cannot see our exit status."""
        if self._writes and self._may_write():
            try:
                told = {"exit_status": exit_status, "reason": reason, "machine": machine}
                write_status(self.directory, state=state, step=self.step, **told)
            except OSError as error:
                log.warn(f"{self.directory / STATUS}: cannot be written now ({error.strerror or error})")


def write_status(
    directory: Path,
    *,
    state: str,
    step: int,
    exit_status: int | None,
    reason: str,
    machine: str | None = None,
    suffix: str = ".tmp",
) -> None:
    """Write `status.json`, at once or not at all. `suffix`: of the temporary name, where several ranks may write."""
    content = {"state": state, "step": step, "exit_status": exit_status, "reason": reason, "time": time.time()}
    content |= {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", "")}
    content |= {"machine": machine} if machine else {}
    write_durably(directory / STATUS, orjson.dumps(content, option=orjson.OPT_INDENT_2), suffix=suffix)


def read_events(directory: Path) -> list[dict]:
    """Events of a run in order; a line that a kill has cut short is passed over."""
    return [
        row
        for row in _rows(directory / EVENTS, needed=("time",))
        if isinstance(row.get("event"), str) and all(_is_number(row[name]) for name in _NUMBERS & row.keys())
    ]


def done_step(events: Iterable[dict]) -> int | None:
    """The last step of a run that is done. None where it is not, or where more steps of it have begun since."""
    marks = [event for event in events if event["event"] in ("start", "done")]
    return marks[-1].get("step") if marks and marks[-1]["event"] == "done" else None


def bad_steps(events: Iterable[dict]) -> list[dict]:
    """Events of skipped steps that still count: those behind the step from which a later start went on were undone."""
    found: list[dict] = []
    for event in events:
        if event["event"] == "start":
            found = [bad for bad in found if bad["step"] <= event.get("step", 0)]
        elif event["event"] == "bad_step" and "step" in event:
            found.append(event)
    return found


def last_sign_of_life(directory: Path, *, resumed_at: int) -> dict:
    """What the process before this one left behind: when it was last heard of, and steps that have to be done again."""
    events = read_events(directory)
    if not events:
        return {}
    rows = read_rows(directory)
    signs = [event["time"] for event in events]
    if (directory / "metrics.jsonl").is_file():
        signs.append((directory / "metrics.jsonl").stat().st_mtime)
    kept = [row for row in rows if row["iteration"] <= resumed_at]
    return {
        "last_sign": max(signs),
        "lost_steps": max(0, max((row["iteration"] for row in rows), default=resumed_at) - resumed_at),
        "lost_seconds": productive_seconds(rows) - productive_seconds(kept),
    }


def last_step(directory: Path) -> int:
    """The step that `status.json` names; 0 where it cannot be read."""
    try:
        step = orjson.loads((directory / STATUS).read_bytes())["step"]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return 0
    return step if isinstance(step, int) else 0


def read_rows(directory: Path) -> list[dict]:
    """Rows of metrics.jsonl with training figures."""
    return [
        row
        for row in _rows(directory / "metrics.jsonl", needed=("iteration", "iteration-time"))
        if isinstance(row["iteration"], int)
    ]


_NUMBERS = {"step", "seconds", "stalled_seconds", "last_sign", "lost_steps", "lost_seconds"}
"""Entries of events that are numbers."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rows(path: Path, *, needed: tuple[str, ...]) -> Iterable[dict]:
    """Lines of JSON objects with these numbers; others, such as the half line that a kill leaves, are passed over."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict) and all(_is_number(row.get(name)) for name in needed):
            yield row


@dataclass(frozen=True)
class Goodput:
    """Where a run's wall-clock time went, in seconds. `ettr`, the effective training time ratio (arXiv 2410.21680), is
    the share spent in steps whose results still count."""

    ettr: float
    wall_seconds: float
    productive_seconds: float
    lost_seconds: float
    down_seconds: float
    save_seconds: float
    stall_seconds: float
    restarts: int
    lost_steps: int
    skipped_steps: int
    failed_saves: int


def goodput(events: Sequence[dict], rows: Sequence[dict]) -> Goodput:
    """Account for a run's time from its events and the rows of metrics that have survived its restarts.

    Productive: seconds of the steps in `rows`. Lost: seconds of steps that were done again after a restart. Down:
    from the last sign of life before a restart to the restart.
    """
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        return Goodput(0.0, *[0.0] * 6, *[0] * 4)
    saves = [event for event in events if event["event"] == "save"]
    down = sum(event["time"] - event.get("last_sign", event["time"]) for event in starts)
    wall = _last_heard_of(events, rows) - starts[0]["time"]
    productive = productive_seconds(rows)
    return Goodput(
        ettr=min(1.0, productive / wall) if wall > 0 else 0.0,
        wall_seconds=wall,
        productive_seconds=productive,
        lost_seconds=sum(event.get("lost_seconds", 0.0) for event in starts),
        down_seconds=down,
        save_seconds=sum(event.get("seconds", 0.0) for event in saves),
        stall_seconds=sum(event.get("stalled_seconds", 0.0) for event in saves),
        restarts=len(starts) - 1,
        lost_steps=sum(event.get("lost_steps", 0) for event in starts),
        skipped_steps=len(bad_steps(events)),
        failed_saves=sum(bool(event.get("problem")) for event in saves),
    )


def _last_heard_of(events: Sequence[dict], rows: Sequence[dict]) -> float:
    """When the last event was, or the last step since one whose row was written: a run that goes on, or was killed, has
    done more than its events tell."""
    times = [event["time"] for event in events]
    last = max((event for event in events if "step" in event), key=lambda event: event["time"], default=None)
    if last is not None:
        times.append(last["time"] + productive_seconds(rows, since=last["step"]))
        if last["event"] == "save":  # steps went on beside it
            times[-1] -= last.get("seconds", 0.0) - last.get("stalled_seconds", 0.0)
    return max(times)


def productive_seconds(rows: Sequence[dict], *, since: int = 0) -> float:
    """Seconds of the steps behind `since` that rows of metrics.jsonl stand for; a row's steps reach back to the row
    before it."""
    total, last = 0.0, 0
    for row in rows:
        total += row["iteration-time"] * max(0, row["iteration"] - max(last, since))
        last = row["iteration"]
    return total


def goodput_table(directory: Path) -> dict:
    """`goodput` of a run directory as a plain mapping, for reports."""
    return asdict(goodput(read_events(directory), read_rows(directory)))
