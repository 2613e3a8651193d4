"""Campaigns of faults against checkpoints on the disk: corruption, looks while they are written, full disks.

As in faults_training.py: deterministic by its seed, prints nothing, returns figures.
"""

import contextlib
import io
import random
import shutil
import subprocess
import time
from pathlib import Path

import orjson
from faults_training import last_start, log_of, run_job, shards, start_job
from tiny_runs import change, checkpoint_of, tiny_config

from megatron_polar import faults
from megatron_polar.config.schema import RunConfig
from megatron_polar.manifest import MANIFEST, file_entry
from megatron_polar.train import run as run_module
from megatron_polar.train.checkpoint_files import find_checkpoint, list_steps, verify_checkpoint
from megatron_polar.train.journal import read_events

# --- Corrupted checkpoints -------------------------------------------------------------------------------------------


def checkpoint_corruptions(corpus: Path, workdir: Path, *, count: int, seed: int, train_every: int = 50) -> dict:
    """Damage the newest checkpoint `count` times, one fault at a time: is it found, named, and the older one taken?

    Every `train_every`-th time a real run resumes, otherwise what it does first: verify (as two ranks share it) and
    choose.
    """
    choose = random.Random(seed)
    config = tiny_config(corpus, workdir / "run", checkpoint__save_interval=2)
    run_job(config)
    run = workdir / "run"
    figures = {"injected": 0, "found": 0, "fell_back": 0, "resumed": 0, "resumes": 0, "missed": []}
    for number in range(count):
        copy = workdir / "copy"
        shutil.copytree(run, copy)
        kind, name, shows_hashes = _damage(copy, choose)
        newest, older = checkpoint_of(copy, 6), checkpoint_of(copy, 4)
        problems = [verify_checkpoint(newest, part=part, of=2) for part in range(2)]
        problem = next(filter(None, problems), None)
        figures["injected"] += 1
        found = problem is not None and name in problem and (problem.count("...") == 2 or not shows_hashes)
        figures["found"] += found
        if not found:
            figures["missed"].append(f"{kind} {name}: {problem}")
        with contextlib.redirect_stderr(io.StringIO()):
            figures["fell_back"] += find_checkpoint(copy) == older
        if number % train_every == 0:
            figures["resumes"] += 1
            run_job(change(config, run__directory=str(copy)))
            same = shards(checkpoint_of(copy, 6)) == shards(checkpoint_of(run, 6))
            figures["resumed"] += last_start(copy) == 4 and same
        shutil.rmtree(copy)
    return figures


def _damage(run: Path, choose: random.Random) -> tuple[str, str, bool]:
    """One fault in the checkpoint of step 6; returns its kind, the file that must be named, and whether a content
    changed, so that both hashes must be shown."""
    newest, older = checkpoint_of(run, 6), checkpoint_of(run, 4)
    names = sorted(orjson.loads((newest / MANIFEST).read_bytes())["files"])
    name = choose.choice([*names, *(n for n in names if n.endswith(".distcp")), MANIFEST])
    kind = choose.choice(("bit", "page", "cut", "longer", "swap", "missing", "extra", "stale", "stale_manifest"))
    path = newest / name
    if kind in ("bit", "page", "cut", "longer"):
        data = bytearray(path.read_bytes())
        place = choose.randrange(len(data))
        if kind == "bit":
            data[place] ^= 1 << choose.randrange(8)
        elif kind == "page":
            page = slice(place - place % 4096, place - place % 4096 + 4096)
            if not any(data[page]):
                data[page.start] = 1  # this page is zero already: the opposite fault
            else:
                data[page] = bytes(len(data[page]))
        elif kind == "cut":
            data = data[:place]
        else:
            data += choose.randbytes(choose.randint(1, 5000))
        path.write_bytes(data)
        return kind, name, kind in ("bit", "page") and name != MANIFEST
    if kind == "missing":
        path.unlink()
        return kind, name, False
    if kind == "extra":
        name = choose.choice(("__7_0.distcp", "tokenizer/extra.json", "core.123", ".hidden"))
        (newest / name).write_bytes(choose.randbytes(choose.randint(0, 100)))
        return kind, name, False
    name = MANIFEST if kind == "stale_manifest" else choose.choice((".metadata", "state.json", "__0_0.distcp"))
    if (newest / name).read_bytes() == (older / name).read_bytes():
        name = "__0_0.distcp"
    shutil.copyfile(older / name, newest / name)
    if kind == "stale_manifest":  # an old manifest names other hashes: the first file that differs is shown
        files = orjson.loads((older / MANIFEST).read_bytes())["files"]
        changed = [n for n, entry in files.items() if file_entry(newest / n) != entry]
        return (
            kind,
            "has SHA-256" if all(files[n]["size"] == file_entry(newest / n)["size"] for n in changed) else "",
            False,
        )
    return kind, name, False


# --- `latest` while saving -------------------------------------------------------------------------------------------


def latest_polls(corpus: Path, workdir: Path, *, polls: int) -> dict:
    """Look at `latest` as often as possible while a run saves after every step in the background."""
    config = tiny_config(
        corpus,
        workdir / "run",
        train__num_steps=100_000,
        checkpoint__save_interval=1,
        checkpoint__async_save=True,
        checkpoint__keep=4,
        logging__interval=1000,
        evaluation__interval=0,
    )
    processes = start_job(config)
    latest = workdir / "run" / "checkpoints" / "latest"
    while not latest.exists() and processes[0].is_alive():
        time.sleep(0.01)
    figures, seen = {"polls": 0, "incomplete": 0}, set()
    while figures["polls"] < polls and processes[0].is_alive():
        name = latest.read_text().strip()
        directory = latest.parent / name
        whole = _is_whole(directory)
        if not whole and latest.read_text().strip() != name and not directory.exists():
            continue  # four newer checkpoints came, and this one was deleted, between the two looks
        figures["polls"] += 1
        figures["incomplete"] += not whole
        seen.add(name)
        time.sleep(0.001)
    for process in processes:
        process.kill()
        process.join()
    return figures | {"checkpoints_seen": len(seen)}


def _is_whole(directory: Path) -> bool:
    try:
        files = orjson.loads((directory / MANIFEST).read_bytes())["files"]
        return all((directory / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, orjson.JSONDecodeError):
        return False


# --- Full disk -------------------------------------------------------------------------------------------------------


def disk_full(corpus: Path, workdir: Path, *, background: bool = False) -> dict | None:
    """Fill a small disk between two saves: the error names ENOSPC, the old checkpoint stays, training goes on, and the
    next save with room succeeds. None where no tmpfs can be mounted."""
    disk = workdir / "disk"
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        return None
    try:
        config = tiny_config(
            corpus,
            disk / "run",
            train__num_steps=24,
            checkpoint__keep=1,
            checkpoint__async_save=background,
            evaluation__interval=0,
        )
        body = _FillTheDisk(disk / "ballast", full_for=8)
        codes = run_job(config, body=body)
        shown = log_of(config).read_text()
        events = [event for event in read_events(disk / "run") if event["event"] == "save"]
        failed = [event["step"] for event in events if event["problem"]]
        return {
            "exit_status": codes[0],
            "failed_saves": failed,
            "names_enospc_and_path": shown.count("[Errno 28] No space left on device") == len(failed)
            and str(disk / "run" / "checkpoints") in shown,
            "old_checkpoint_intact_meanwhile": body.kept(disk / "run"),
            "saved_in_the_end": verify_checkpoint(checkpoint_of(disk / "run", 24)) is None,
            "remains": len(list((disk / "run" / "checkpoints").glob(".*"))),
        }
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class _FillTheDisk:
    """Train with a file that takes all room once there is a checkpoint, for some steps."""

    def __init__(self, ballast: Path, *, full_for: int):
        self.ballast, self.full_for = ballast, full_for

    def __call__(self, config: RunConfig) -> None:
        run, full_steps = Path(config.run.directory), -1

        def point(name: str) -> None:
            nonlocal full_steps
            if name != "after_update" or (full_steps < 0 and not list_steps(run)):
                return
            full_steps += 1
            if full_steps == 0:
                self._fill()
            elif full_steps == self.full_for:
                kept = list_steps(run)
                (run.parent.parent / "intact").write_text(str(len(kept) == 1 and verify_checkpoint(kept[0]) is None))
                self.ballast.unlink()

        faults.point = point
        run_module.train(config)

    def _fill(self) -> None:
        with contextlib.suppress(OSError), self.ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 14))
                file.flush()

    def kept(self, run: Path) -> bool:
        """Whether the checkpoint from before was intact while the disk was full."""
        return (run.parent.parent / "intact").read_text() == "True"
