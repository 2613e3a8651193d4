"""Runs the study's commands: in order of need, several at a time, each once, with an ETA.

A job is one command with one output. When it has ended well it leaves `done/<name>.json` with a hash over the command,
the hashes of the jobs that it needs and, for scripts of this folder, their source: a job whose hash is there is not run
again. A job that was cut off goes on where its command can do that; otherwise its output is removed first.
"""

import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_polar.errors import UserError
from megatron_polar.log import format_seconds

HERE = Path(__file__).resolve().parent
PROGRAM = "megatron-polar"
_GO_ON = ("sample", "preprocess", "train")
"""Verbs that go on from what an interrupted call has left."""
_POLL_SECONDS = 0.05
_SHOWN_LINES = 12
_PRELOADED = ["megatron_polar.cli", "megatron_polar.train.run", "megatron_polar.score.evaluate", "matplotlib.figure"]
_PRELOADED += [
    "matplotlib.backends.backend_svg",
    "transformers.models.llama.modeling_llama",
    "megatron_polar.score.scorer",
]


@dataclass(frozen=True)
class Job:
    """One command. `words` start with `megatron-polar` or name a script of this folder; `seconds` is a guess for the
    ETA, of one core."""

    stage: str
    name: str
    words: tuple[str, ...]
    output: Path
    needs: tuple[str, ...] = ()
    seconds: float = 10.0
    reads: tuple[tuple[str, str], ...] = ()
    """What else decides the output: names and SHA-256 of files from outside, names and values of knobs."""

    @property
    def shown(self) -> str:
        """The command as it is typed."""
        return shlex.join(
            self.words if self.words[0] == PROGRAM else ("python", f"examples/study/{self.words[0]}", *self.words[1:])
        )


def checked_out() -> str | None:
    """The commit of this tree, "-dirty" behind it where code differs from it; None where git does not know."""

    def git(*words: str) -> subprocess.CompletedProcess:
        command = ("git", "-C", str(HERE.parents[1]), *words)
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        commit = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        is_dirty = bool(git("diff", "--quiet", "HEAD", "--", "examples/study", "megatron_polar").returncode)
    except FileNotFoundError:
        return None
    return commit + "-dirty" * is_dirty if commit else None


@dataclass
class Jobs:
    """All jobs of a study below `directory`, and which of them are done."""

    directory: Path
    jobs: dict[str, Job]
    parallel: int
    forks: bool
    hashes: dict[str, str] = field(default_factory=dict)
    commit: str | None = field(default_factory=checked_out)

    def __post_init__(self) -> None:
        for name, job in self.jobs.items():  # in an order in which needs come first
            parts = [*job.words, *(self.hashes[need] for need in job.needs), *(f"{n} {d}" for n, d in job.reads)]
            if job.words[0] != PROGRAM:
                parts.append(hashlib.sha256((HERE / job.words[0]).read_bytes()).hexdigest())
            self.hashes[name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def record_of(self, name: str) -> dict | None:
        """What a job that is done has left: hash, command, seconds. None where it is not done."""
        try:
            record = json.loads((self.directory / "done" / f"{name}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return record if record.get("hash") == self.hashes[name] else None

    def run(self, stages: Sequence[str]) -> int:
        """Run what is not done of `stages`; returns 0, or the exit status of the first job that failed."""
        wanted = {name: job for name, job in self.jobs.items() if job.stage in stages}
        waiting = [name for name in wanted if self.record_of(name) is None]
        for name in waiting:
            missing = [n for n in self.jobs[name].needs if n not in wanted and self.record_of(n) is None]
            if missing:
                stage = self.jobs[missing[0]].stage
                raise UserError(f"{name} needs {missing[0]}, which is not done; run --stages {stage} first")
        print(f"{len(wanted) - len(waiting)} of {len(wanted)} jobs are done, {len(waiting)} to run", flush=True)
        context = _context() if self.forks and waiting else None
        running: dict[str, _Running] = {}
        clock = _Clock(sum(self.jobs[name].seconds for name in waiting), parallel=self.parallel)
        try:
            while waiting or running:
                for name in [n for n in waiting if self._is_ready(n, waiting, running)][: self.parallel - len(running)]:
                    waiting.remove(name)
                    running[name] = self._start(name, context)
                time.sleep(_POLL_SECONDS)
                for name in [name for name, one in running.items() if one.status() is not None]:
                    status = self._finish(name, running.pop(name), clock, left=len(waiting) + len(running))
                    if status:
                        return status
        finally:
            for one in running.values():
                one.stop()
        return 0

    def _is_ready(self, name: str, waiting: Sequence[str], running: dict) -> bool:
        return not any(need in waiting or need in running for need in self.jobs[name].needs)

    def _start(self, name: str, context) -> "_Running":
        job, begun = self.jobs[name], self.directory / "begun" / name
        same = begun.is_file() and begun.read_text() == self.hashes[name]
        if not (same and job.words[0] == PROGRAM and job.words[1] in _GO_ON):
            _remove(job.output, within=self.directory)
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(self.hashes[name])
        log = self.directory / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"$ {job.shown}", flush=True)
        return _Running(job, log, context)

    def _finish(self, name: str, one: "_Running", clock: "_Clock", *, left: int) -> int:
        status, seconds = one.status(), time.monotonic() - one.started
        if status:
            said = one.log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
            print("\n".join([*said, f"error: {name} failed with exit status {status}; all it said is in {one.log}"]))
            return status if status > 0 else 1
        done = self.directory / "done" / f"{name}.json"
        done.parent.mkdir(parents=True, exist_ok=True)
        record = {"hash": self.hashes[name], "command": one.job.shown, "seconds": round(seconds, 2)}
        record["cpu_seconds"] = None if one.cpu_seconds() is None else round(one.cpu_seconds(), 2)
        record["commit"] = self.commit
        temporary = done.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(done)
        clock.finished(one.job.seconds)
        print(f"  {name}: {seconds:.0f} s; {left} jobs left, ETA {clock.eta()}", flush=True)
        return 0


class _Clock:
    """Time left, from the guesses and how they have held so far."""

    def __init__(self, total: float, *, parallel: int):
        self.left, self.done, self.parallel, self.start = total, 0.0, parallel, time.monotonic()

    def finished(self, seconds: float) -> None:
        self.left, self.done = self.left - seconds, self.done + seconds

    def eta(self) -> str:
        pace = (time.monotonic() - self.start) / self.done if self.done else 1 / self.parallel
        return format_seconds(self.left * pace)


class _Running:
    """A command under way: a fork of a warm process, or a process of its own."""

    def __init__(self, job: Job, log: Path, context):
        self.job, self.log, self.started = job, log, time.monotonic()
        self._used = None
        if context is not None:
            self._used = context.Value("d", 0.0)
            self.process = context.Process(target=_run_here, args=(job.words, str(log), self._used))
            self.process.start()
        else:
            words = (
                ("-m", "megatron_polar", *job.words[1:])
                if job.words[0] == PROGRAM
                else (str(HERE / job.words[0]), *job.words[1:])
            )
            with log.open("wb") as stream:
                self.process = subprocess.Popen([sys.executable, *words], stdout=stream, stderr=stream)

    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self.process.exitcode if hasattr(self.process, "exitcode") else self.process.poll()

    def cpu_seconds(self) -> float | None:
        """Processor time of a fork that has ended; None for a process of its own."""
        return None if self._used is None else self._used.value

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self.process.terminate()
        (self.process.join if hasattr(self.process, "join") else self.process.wait)()


def _context():
    """Workers fork from one process that has imported what commands need: seconds less for each of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _run_here(words: Sequence[str], log: str, used) -> None:
    """In the fork: run a command as the console does, with its output in a file; `used` gets its processor time."""
    with open(log, "wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if words[0] == PROGRAM:
        from megatron_polar.cli import main
    else:
        sys.path.insert(0, str(HERE))
        main = __import__(Path(words[0]).stem).main
    status = main(list(words[1:]))
    sys.stdout.flush()
    used.value = time.process_time() + sum(os.times()[2:4])  # its own, and of children that it has waited for
    sys.exit(status)


def _remove(path: Path, *, within: Path) -> None:
    """Remove what an earlier run has left, below the study's own directory only."""
    if not path.resolve().is_relative_to(within.resolve()) or path.resolve() == within.resolve():
        raise UserError(f"{path}: lies outside of {within}, so it is not removed; choose another --run")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def end_with_children() -> None:
    """From now on SIGTERM ends this process, and forks of it, as Ctrl-C does: with all that they have started."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def refuse_foreign(directory: Path) -> None:
    """Raise UserError for a directory that holds something else than a study, or than rft.py's part of one."""
    others = directory.exists() and any(path.name != "rft" for path in directory.iterdir())
    if others and not (directory / "study.json").exists():
        raise UserError(f"{directory}: is not empty and no directory of a study; choose another --run")
    directory.mkdir(parents=True, exist_ok=True)
