"""Where checkpoints lie, which of them count, and how one becomes the newest. No torch.

<run>/checkpoints/step_00000100/          a complete checkpoint: it has got its name as the last thing of all
                  latest                  name of the newest complete one
                  .saving-step_...-<id>/  being written, or left by a killed run: never read
                  damaged-step_...-<id>/  did not verify when a run resumed from an older one: kept for you to look at
A save always gets a fresh directory, and no complete checkpoint is ever written to again.
"""

import os
import shutil
import typing
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import orjson

from megatron_polar import faults, log
from megatron_polar.data.template import WRAPPERS
from megatron_polar.errors import UserError
from megatron_polar.manifest import (
    MANIFEST,
    Damaged,
    OtherVersion,
    check_hash,
    check_nothing_else,
    check_sizes,
    encode_manifest,
    read_manifest,
    sync_directory,
    write_durably,
)

FORMAT, FORMAT_VERSION = "megatron_polar.checkpoint", 2
_STEP_PREFIX, _SAVING, _REMOVED, _DAMAGED = "step_", ".saving-", ".removed-", "damaged-"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands, independent of the layout; `state.json` of a checkpoint."""

    step: int
    consumed_comparisons: int
    data_fingerprint: str
    max_response_length: int
    """Tokens that were kept of an answer when the training data were made; scoring cuts at the same place."""
    layout: dict[str, int]
    backend: str
    """gloo or nccl: random-number states of one device mean nothing on another."""
    precision: str = ""
    """`train.precision`: the optimizer's state of one is not that of another."""
    optimizer: str = ""
    """Which optimizer, as resume.py says it: the states of two are not the same."""
    guard: dict = field(default_factory=dict)
    """What the guard against bad steps remembers (train/guard.py)."""
    wrapper: str = ""
    """What joined prompts and answers in the training data; "" where it differed or is not known."""


def read_state(directory: Path) -> TrainingState:
    """Read `state.json` of a checkpoint. Raises UserError when it is not one of ours."""
    try:
        state = TrainingState(**orjson.loads((directory / "state.json").read_bytes()))
    except (OSError, orjson.JSONDecodeError, TypeError) as error:
        raise UserError(f"{directory}/state.json: cannot be used ({' '.join(str(error).split())})") from error
    for entry in fields(TrainingState):
        value, kind = getattr(state, entry.name), typing.get_origin(entry.type) or entry.type
        if type(value) is not kind or (kind is int and value < 0):
            raise UserError(f"{directory}/state.json: {entry.name} is {value!r:.60}; use another checkpoint")
    if state.wrapper not in ("", *WRAPPERS):
        raise UserError(f"{directory}/state.json: wrapper is {state.wrapper!r:.60}; use another checkpoint")
    return state


def encode_state(state: TrainingState) -> bytes:
    """The content of `state.json`."""
    return orjson.dumps(asdict(state), option=orjson.OPT_INDENT_2)


def _step_name(step: int) -> str:
    return f"{_STEP_PREFIX}{step:08d}"


def list_steps(run_directory: Path) -> list[Path]:
    """Checkpoints of a run by their names, newest first, complete or not."""
    found = [path for path in (run_directory / "checkpoints").glob(f"{_STEP_PREFIX}*") if _number(path) is not None]
    return sorted(found, key=_number, reverse=True)


def _number(path: Path) -> int | None:
    digits = path.name.removeprefix(_STEP_PREFIX)
    return int(digits) if digits.isascii() and digits.isdigit() else None


def has_checkpoints(run_directory: Path) -> bool:
    """Whether a save was ever finished here; what a run killed in its first save has left behind does not count."""
    return (run_directory / "checkpoints" / "latest").exists() or bool(list_steps(run_directory))


# --- Becoming the newest ---------------------------------------------------------------------------------------------


def saving_directory(run_directory: Path, step: int) -> Path:
    """Make a fresh directory to write the checkpoint of `step` into."""
    checkpoints = run_directory / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    target = checkpoints / f"{_SAVING}{_step_name(step)}-{os.urandom(4).hex()}"
    target.mkdir()
    return target


def publish(saved: Path, *, step: int, entries: dict[str, dict]) -> Path:
    """Write the manifest of a finished save, give it its name and point `latest` to it. Raises OSError.

    `entries` are size and SHA-256 of every file in `saved`; all of them are on the disk already.
    """
    faults.point("before_manifest")
    sync_tree(saved)
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, "files": entries}
    write_durably(saved / MANIFEST, encode_manifest(content))
    faults.point("after_manifest")
    target = saved.with_name(_step_name(step))
    if target.exists():  # one that did not verify, or of a future that this run has left; it was not resumed from
        target.rename(saved.with_name(saved.name.replace(_SAVING, _REMOVED)))
    faults.point("before_publish")
    saved.rename(target)
    sync_directory(target.parent)
    faults.point("after_publish")
    _point_latest_if_possible(target)
    return target


def _point_latest_if_possible(target: Path) -> None:
    """A hint for people: resuming looks at the checkpoints themselves."""
    try:
        point_latest(target)
    except OSError as error:
        log.warn(f"{target.parent / 'latest'}: cannot be moved to {target.name} ({error.strerror or error})")


def point_latest(target: Path) -> None:
    """Move `latest` to a complete checkpoint, at once or not at all."""
    faults.point("before_latest")
    write_durably(target.parent / "latest", (target.name + "\n").encode())
    faults.point("after_latest")


def sync_tree(directory: Path) -> None:
    """Make the entries of a directory and of those below it survive a power failure."""
    for path in [*(p for p in directory.rglob("*") if p.is_dir()), directory]:
        sync_directory(path)


def prune(run_directory: Path, *, newest: Path, keep: int, keep_every: int) -> None:
    """Delete all but `newest`, the `keep` - 1 checkpoints before it (0: keep all) and multiples of `keep_every`, and
    what killed saves have left. What is newer than `newest` was not written by this run, and stays."""
    faults.point("in_prune")
    checkpoints = run_directory / "checkpoints"
    known = [path for path in list_steps(run_directory) if _number(path) <= _number(newest)]
    for old in known[keep:] if keep else []:
        if not (keep_every and _number(old) % keep_every == 0):
            # It vanishes as a whole; a kill in between leaves remains that nobody reads.
            old.rename(checkpoints / f"{_REMOVED}{old.name}-{os.urandom(4).hex()}")
    remove_remains(run_directory)


def remove_remains(run_directory: Path) -> None:
    """Delete what killed saves and deletions have left: room that the next save may need."""
    checkpoints = run_directory / "checkpoints"
    for remains in [*checkpoints.glob(f"{_SAVING}*"), *checkpoints.glob(f"{_REMOVED}*")]:
        shutil.rmtree(remains, ignore_errors=True)


def set_aside_newer(than: Path, *, damaged: Iterable[Path]) -> dict[Path, str]:
    """Rename the damaged checkpoints newer than the one that a run resumes from, so that none is counted as kept;
    returns their new names."""
    renamed = {}
    for path in damaged:
        if _number(path) > _number(than):
            aside = path.with_name(f"{_DAMAGED}{path.name}-{os.urandom(4).hex()}")
            path.rename(aside)
            log.warn(f"{path}: renamed to {aside.name}; look at it, then delete it")
            renamed[path] = aside.name
    latest = than.parent / "latest"
    named = latest.read_text(errors="replace").strip() if latest.is_file() else None
    if named != than.name:
        if named is not None:
            log.warn(
                f"{latest}: named {named:.40}, and {than.name} is the newest intact one; to go back, move newer ones "
                f"out of the way"
            )
        _point_latest_if_possible(than)
    return renamed


# --- Finding and verifying -------------------------------------------------------------------------------------------


UNREADABLE = "cannot be read now"
"""How `verify_checkpoint` begins what may be the file system's fault and not the checkpoint's."""


def verify_checkpoint(
    directory: Path, *, part: int = 0, of: int = 1, after_each: Callable[[], None] = lambda: None
) -> str | None:
    """Why the checkpoint cannot be trusted, in one line; None when every file has its size and SHA-256.

    `of` ranks share the hashing: each takes its `part`, of about equal size, and calls `after_each` MiB of it.
    """
    if directory.is_symlink():
        return "is a link, and checkpoints are directories"
    try:
        manifest = read_manifest(directory, format_name=FORMAT, format_version=FORMAT_VERSION)
        files, number = manifest["files"], _number(directory)
        if part == 0:
            check_sizes(directory, files)
            check_nothing_else(directory, files)
        for name in _share(files, part=part, of=of):
            check_sizes(directory, {name: files[name]})
            check_hash(directory, name, files[name], after_each=after_each)
        if number is not None and manifest["step"] != number:
            return f"holds step {manifest['step']} under the name of step {number}: it was renamed or copied"
    except OtherVersion as other:
        raise UserError(f"{directory}: {other}; use the program that wrote it, or move it out of the way") from None
    except Damaged as damage:
        return str(damage)
    except OSError as error:
        return f"{UNREADABLE}: {error.filename or 'a file'} ({error.strerror or error})"
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} does not describe a checkpoint"
    return None


def _share(files: dict[str, dict], *, part: int, of: int) -> Iterable[str]:
    """The files that one of several readers takes: largest first, each to the reader with the least so far."""
    loads, mine = [0] * of, []
    for name in sorted(files, key=lambda name: (-files[name]["size"], name)):
        reader = loads.index(min(loads))
        loads[reader] += files[name]["size"] + 1
        if reader == part:
            mine.append(name)
    return mine


def candidates(path: str | Path) -> list[Path]:
    """The checkpoints that `path`, a run directory or one step of it, may mean, newest first. Raises UserError."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        return list_steps(path)
    if path.is_dir() and _number(path) is not None:
        return [path.resolve() if path.is_symlink() else path]
    if path.is_dir() and path.name.startswith(_DAMAGED):
        remedy = f"give the run directory, {path.parent.parent}"
        raise UserError(f"{path}: was set aside because it did not verify; {remedy}")
    if path.name == "checkpoints" and list_steps(path.parent):
        raise UserError(f"{path}: holds the checkpoints of a run; give the run directory, {path.parent}")
    if (path / "config.json").is_file():
        command = f"megatron-polar convert from-hf --model {path} --output RUN_DIR"
        raise UserError(f"{path}: this is a Hugging Face model; convert it first: {command}, and give RUN_DIR here")
    raise UserError(f"{path}: no checkpoint here; give a run directory or one of its checkpoints/step_... directories")


def none_verifies(path: str | Path, count: int, *, to_resume: bool = False) -> UserError:
    """The error of a run directory whose checkpoints are all unusable: a run never starts over silently."""
    path = Path(path)
    if _number(path) is not None:
        older = [p for p in list_steps(path.parent.parent) if _number(p) != _number(path)]
        remedy = f"give {path.parent.parent} to take the newest that is intact" if older else "restore it"
        return UserError(f"{path}: is not complete and intact; {remedy}")
    otherwise = "choose another run.directory to start again" if to_resume else "give another run"
    return UserError(f"{path}: none of its {count} checkpoints is complete and intact; restore one, or {otherwise}")


def find_checkpoint(path: str | Path) -> Path:
    """The newest complete step of a run directory, or the step itself; says which steps it skips and why.

    Raises UserError when there is no checkpoint, or none that verifies.
    """
    found = candidates(path)
    for candidate in found:
        problem = verify_checkpoint(candidate)
        if problem is None:
            return candidate
        log.warn(f"{candidate}: skipped: {problem}")
    raise none_verifies(path, len(found))
