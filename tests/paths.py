"""Names and links that lead out: what somebody could plant where the program reads or writes.

Beside every copy of good files lies a directory `victim`, which no attack may change.
"""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
from malicious import seal_checkpoint

from megatron_polar.manifest import MANIFEST, encode_manifest, file_entry


@dataclass(frozen=True)
class PathAttack:
    """`plant(directory)` changes a copy of the good files of a `kind`; then `door` is gone through.

    `goes_on` is true where the program may also do its work without following what was planted.
    """

    name: str
    kind: str
    door: str
    plant: Callable[[Path], None]
    goes_on: bool = False


def make_victim(directory: Path) -> None:
    """Files that look as attractive as they can: names and contents that would fit."""
    (directory / "inner").mkdir(parents=True)
    for name in ("precious", "inner/precious", "latest", "metrics.jsonl", "summary.json"):
        (directory / name).write_bytes(b"precious\n")


def step_of(run: Path) -> Path:
    return run / "checkpoints" / "step_00000002"


def victim_of(place: Path) -> Path:
    return place.parent / "victim"


# --- Reading ---------------------------------------------------------------------------------------------------------

_NAMES = ("../../../victim/precious", "{victim}/precious", "tokenizer/../../../../victim/precious", "/etc/passwd")
_NAMES += ("./../../../victim/precious", "..\\victim", "", ".", "..", "a\0b", "//etc/passwd", "tokenizer", "C:\\x")


def _name_in_manifest(name: str, *, kind: str) -> Callable[[Path], None]:
    def plant(place: Path) -> None:
        directory = step_of(place) if kind == "run" else place
        content = orjson.loads((directory / MANIFEST).read_bytes())
        content["files"][name.format(victim=victim_of(place))] = file_entry(victim_of(place) / "precious")
        (directory / MANIFEST).write_bytes(encode_manifest(content))

    return plant


def _link(name: str, *, relative: bool = False, directory: Callable[[Path], Path] = lambda place: place):
    """Move a file or directory out and put a link in its place: the very same bytes, elsewhere."""

    def plant(place: Path) -> None:
        source, target = directory(place) / name, place.parent / "outside"
        source.rename(target)
        source.symlink_to(os.path.relpath(target, source.parent) if relative else target)

    return plant


def _metadata_path(path: str) -> Callable[[Path], None]:
    def plant(place: Path) -> None:
        file = step_of(place) / ".metadata"
        metadata = pickle.loads(file.read_bytes())
        for entry in metadata.storage_data.values():
            entry.relative_path = path.format(victim=victim_of(place))
        file.write_bytes(pickle.dumps(metadata))
        seal_checkpoint(step_of(place))

    return plant


def _special(name: str, kind: str, *, directory: Callable[[Path], Path] = lambda place: place):
    """A pipe, a device or a socket in the place of a file."""

    def plant(place: Path) -> None:
        path = directory(place) / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(kind)

    return plant


def _reading() -> list[PathAttack]:
    attacks = []
    for name in _NAMES:
        for kind, door in (("run", "score"), ("dataset", "train on it")):
            plant = _name_in_manifest(name, kind=kind)
            attacks.append(PathAttack(f"{kind}: the manifest names {name!r}", kind, door, plant))
    for file in ("state.json", "config.yaml", ".metadata", "__0_0.distcp", "tokenizer", "tokenizer/tokenizer.model"):
        for relative in (False, True):
            plant = _link(file, relative=relative, directory=step_of)
            attacks.append(PathAttack(f"checkpoint: {file} is a link out, {relative=}", "run", "score", plant))
    for file in ("corpus.bin", "corpus.idx", "tokenizer", MANIFEST):
        plant = _link(file)
        attacks.append(PathAttack(f"dataset: {file} is a link out", "dataset", "train on it", plant))
    attacks += [
        PathAttack("checkpoint: the manifest is a link out", "run", "score", _link(MANIFEST, directory=step_of)),
        PathAttack("a step is a link", "run", "score", _link("step_00000002", directory=lambda p: p / "checkpoints")),
        PathAttack(
            "a step is a link, resume", "run", "resume", _link("step_00000002", directory=lambda p: p / "checkpoints")
        ),
    ]
    for path in ("../../../victim/precious", "{victim}/precious", "..", "/dev/zero", "tokenizer/tokenizer.model"):
        attacks.append(PathAttack(f".metadata names {path!r}", "run", "score", _metadata_path(path)))
    for file in ("state.json", "common.pt", "tokenizer/tokenizer.model", MANIFEST, ".metadata"):
        for kind in ("pipe", "/dev/zero"):
            plant = _special(file, kind, directory=step_of)
            attacks.append(PathAttack(f"checkpoint: {file} is {kind}", "run", "score", plant))
    for file in ("state.json", "tokenizer/tokenizer.model", MANIFEST):
        plant = _special(file, Path(file).name, directory=step_of)
        attacks.append(PathAttack(f"checkpoint: {file} is a link to itself", "run", "score", plant))
    for file in ("corpus.bin", "corpus.idx", MANIFEST):
        plant = _special(file, "pipe")
        attacks.append(PathAttack(f"dataset: {file} is a pipe", "dataset", "train on it", plant))
    inputs = {
        "dry run": "run.yaml",
        "train": "run.yaml",
        "sample": "pool.yaml",
        "preprocess with a file": "tokenizer.model",
        "preprocess lines": "lines.jsonl",
        "score lines": "lines.jsonl",
        "evaluate lines": "lines.jsonl",
        "train-tokenizer": "lines.jsonl",
        "sample lines": "lines.jsonl",
        "report": "metrics.jsonl",
    }
    for door, file in inputs.items():
        for kind in ("pipe", "/dev/zero", "/dev/stdin"):
            attacks.append(PathAttack(f"{door}: {file} is {kind}", "empty", door, _special(file, kind)))
    plant = _special("tokenizer.model", "pipe")
    return [*attacks, PathAttack("a tokenizer's model is a pipe", "tokenizer", "preprocess", plant)]


# --- Writing ---------------------------------------------------------------------------------------------------------

WRITTEN = {
    # door: what the command writes, below the planted directory
    "resume": (
        "config.yaml environment.json status.json metrics.jsonl events.jsonl checkpoints checkpoints/latest stacks "
        "tensorboard report.html bad_steps.json stacks/rank_00000.txt config.yaml.tmp environment.json.tmp "
        "status.json.tmp metrics.jsonl.tmp checkpoints/latest.tmp lock pairs.json pairs.json.tmp"
    ),
    "train into it": (
        "config.yaml environment.json status.json metrics.jsonl events.jsonl checkpoints stacks tensorboard "
        "report.html config.yaml.tmp status.json.tmp checkpoints/latest checkpoints/latest.tmp lock pairs.json "
        "pairs.json.tmp"
    ),
    "report": "report.html report.html.partial",
    "score into it": "scored.jsonl scored.jsonl.tmp",
    "evaluate into it": "summary.json rewards.jsonl report.html report.html.partial",
    "train a tokenizer into it": "x.model x.model.tmp",
    "sample into it": "settings.json settings.json.partial trajectories-00000.jsonl trajectories-00000.jsonl.partial",
    "preprocess into it": "corpus.bin manifest.json tokenizer .work .work/corpus.bin .work/manifest.json .work/lock",
}
_DIRECTORIES = ("checkpoints", "stacks", "tensorboard", "tokenizer", ".work")


def _planted(name: str, kind: str) -> Callable[[Path], None]:
    def plant(place: Path) -> None:
        path, victim = place / name, victim_of(place)
        if name in _DIRECTORIES and path.exists():
            shutil.move(path, victim / name)  # a resume must find its checkpoints
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        target = (
            victim / name if (victim / name).exists() else victim / ("inner" if name in _DIRECTORIES else "precious")
        )
        if kind == "link":
            path.symlink_to(target)
        elif kind == "link to nothing":
            path.symlink_to(victim / "new")
        elif kind == "hard link":
            os.link(target, path)
        else:
            os.mkfifo(path)

    return plant


def _beside_an_evaluation(plant: Callable[[Path], None]) -> Callable[[Path], None]:
    """Where `evaluate` would otherwise refuse the directory before it writes."""

    def both(place: Path) -> None:
        (place / "rewards.jsonl").touch()
        plant(place)

    return both


def _writing() -> list[PathAttack]:
    attacks = []
    for door, names in WRITTEN.items():
        copied = "run" if door in ("resume", "report") else "empty"
        for name in names.split():
            for kind in ("link", "link to nothing", "hard link", "pipe"):
                if kind == "hard link" and name in _DIRECTORIES:
                    continue
                plant = _planted(name, kind)
                if door == "evaluate into it" and name != "rewards.jsonl":
                    plant = _beside_an_evaluation(plant)
                attacks.append(PathAttack(f"{door}: {name} is a {kind}", copied, door, plant, goes_on=True))
    for name in (".saving-step_00000002-x", ".removed-step_00000001-x", "step_00000009", "damaged-step_00000001-x"):

        def plant(place: Path, name: str = name) -> None:
            (place / "checkpoints" / name).symlink_to(victim_of(place))

        attacks.append(PathAttack(f"resume: checkpoints/{name} is a link", "run", "resume", plant, goes_on=True))
    for text in ("../../victim", "{victim}", "step_00000002/../../../victim", "\0", "x" * 5000, "step_99999999"):

        def write(place: Path, text: str = text) -> None:
            (place / "checkpoints" / "latest").write_text(text.format(victim=victim_of(place)))

        attacks.append(PathAttack(f"latest says {text[:40]!r}", "run", "resume", write, goes_on=True))
    for name in ("step_\u00b2", "step_\u0661", "step_", "step_-1", "step_1e3", "step_" + "9" * 200):

        def make(place: Path, name: str = name) -> None:
            (place / "checkpoints" / name).mkdir()

        attacks.append(PathAttack(f"a step called {name[:20]!r}", "run", "resume", make, goes_on=True))
    return attacks


def path_table() -> list[PathAttack]:
    return [*_reading(), *_writing()]
