"""What one node can say of itself: GPUs, disks, clock, versions and data. No torch, so nothing here waits for a GPU."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import megatron_polar
from megatron_polar.config.schema import RunConfig
from megatron_polar.data.storage import read_dataset_manifest
from megatron_polar.launch.report import DatasetState, Gpu, NodeReport, Place, job_name
from megatron_polar.manifest import MANIFEST, Damaged, check_sizes, hash_file

_DISTRIBUTIONS = ("torch", "megatron-core", "transformer-engine")
_GPU_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
)
_THROTTLE_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""New drivers know the first, old ones the second."""
_THROTTLE_BITS = {
    0x02: "applications_clocks_setting",
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
"""nvml.h, without 0x01: an idle GPU."""


def describe_node(
    config: RunConfig,
    *,
    place: Place,
    output: Path,
    wants_all_reduce: bool,
    environment: Mapping[str, str] = os.environ,
    begin: Callable[[str], None] = lambda waits_for: None,
) -> NodeReport:
    """Look at this node. `begin` is told what is looked at next, since any of it may hang on a sick node."""
    begin("nvidia-smi")
    gpus, gpu_error = query_gpus()
    visible = _num_visible(environment.get("CUDA_VISIBLE_DEVICES"))
    begin(f"the clock and the free space of {output}")
    clock_offset = _clock_offset(output, node=place.node)
    places = {"run.directory": Path(config.run.directory), "TMPDIR": Path(tempfile.gettempdir())}
    free = {}
    for name, path in places.items():
        begin(f"the free space of {name} {path}")
        free[name] = _free_gb(path)
    begin("the versions of the installed packages")
    versions = _versions()
    datasets = []
    for path in dict.fromkeys(source.path for source in (*config.data.train, *config.data.validation)):
        begin(f"dataset {path}")
        datasets.append(_dataset_state(path))
    begin("train.init_from and data.tokenizer")
    inputs = {"train.init_from": config.train.init_from, "data.tokenizer": config.data.tokenizer}
    return NodeReport(
        node=place.node,
        job=job_name(environment),
        rank=place.rank,
        num_local_ranks=place.num_local_ranks,
        device=config.run.device,
        gpus=gpus,
        gpu_error=gpu_error,
        visible_gpus=visible,
        num_allocated_gpus=_num_allocated(environment.get("SLURM_GPUS_ON_NODE")),
        needs_transformer_engine=config.model.transformer_impl == "transformer_engine",
        has_own_gpu_only=visible == 1 and (place.num_local_ranks or 1) > 1 and "SLURM_LOCALID" in environment,
        free_gb=free,
        versions=versions,
        clock_offset_seconds=clock_offset,
        datasets=tuple(datasets),
        missing_inputs={key: path for key, path in inputs.items() if path is not None and not Path(path).exists()},
        wants_all_reduce=wants_all_reduce,
    )


# --- GPUs ------------------------------------------------------------------------------------------------------------


def query_gpus(*, timeout_seconds: float = 60.0) -> tuple[tuple[Gpu, ...], str]:
    """Ask nvidia-smi for its GPUs; returns them and, where it is there but fails, why. No nvidia-smi: no GPUs."""
    try:
        rows = _query(_GPU_FIELDS, timeout_seconds)
    except FileNotFoundError:
        return (), ""
    except _NoAnswer as error:
        return (), str(error)
    reasons: dict[str, str] = {}
    for field in _THROTTLE_FIELDS:
        try:
            reasons = dict(_query(("index", field), timeout_seconds))
            break
        except _NoAnswer:
            continue
    return tuple(_gpu(row, reasons.get(row[0], "")) for row in rows), ""


class _NoAnswer(Exception):
    pass


def _query(fields: tuple[str, ...], timeout_seconds: float) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        raise _NoAnswer(f"nvidia-smi did not answer within {timeout_seconds:g} s") from None
    except PermissionError as error:
        raise _NoAnswer(f"nvidia-smi: {error.strerror}") from None
    lines = result.stdout.strip().splitlines()
    rows = [[word.strip() for word in line.split(",")] for line in lines]
    if result.returncode or any(len(row) != len(fields) for row in rows):  # a lost GPU is a sentence among the rows
        said = " ".join((result.stderr or result.stdout).split())[:200]
        raise _NoAnswer(f"nvidia-smi ended with status {result.returncode}: {said}")
    return rows


def _gpu(row: list[str], reasons: str) -> Gpu:
    index, name, driver, memory, clock, max_clock, ecc_mode, uncorrected = row
    bits = int(reasons, 16) if reasons.startswith("0x") else 0
    return Gpu(
        index=int(index),
        name=name,
        driver=driver,
        memory_mib=_number(memory),
        sm_clock_mhz=_number(clock),
        max_sm_clock_mhz=_number(max_clock),
        ecc_mode=ecc_mode if ecc_mode in ("Enabled", "Disabled") else None,
        uncorrected_errors=_number(uncorrected),
        throttle_reasons=tuple(reason for bit, reason in _THROTTLE_BITS.items() if bits & bit),
    )


def _number(word: str) -> int | None:
    return int(word) if word.isdigit() else None  # [N/A], [Not Supported], [Unknown Error]


def _num_visible(devices: str | None) -> int | None:
    """CUDA shows the GPUs before the first name that it does not know, such as -1 or Slurm's NoDevFiles."""
    if devices is None:
        return None
    count = 0
    for word in devices.split(","):
        if not (word.strip().isdigit() or word.strip().startswith(("GPU-", "MIG-"))):
            break
        count += 1
    return count


def _num_allocated(count: str | None) -> int | None:
    return int(count) if count is not None and count.isdigit() else None


# --- Disk, clock, versions -------------------------------------------------------------------------------------------


def _free_gb(path: Path) -> float:
    path = path.absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(there).free / 1e9


def _clock_offset(directory: Path, *, node: str) -> float:
    """Seconds by which the file system that stamps a new file is ahead of this node's clock."""
    probe = directory / f".{node}.clock"
    before = time.time()
    probe.write_bytes(b"?")
    stamp, after = probe.stat().st_mtime, time.time()
    probe.unlink()
    return stamp - min(max(stamp, before), after)  # a slow file system is not a wrong clock


def installed_version(distribution: str) -> str | None:
    """Of this environment; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"Python": platform.python_version()}
    versions |= {name: installed_version(name) for name in _DISTRIBUTIONS}
    return {**versions, "megatron_polar": megatron_polar.__version__, "commit": _commit(), "code": _hash_of_the_code()}


def _commit() -> str | None:
    """The git commit of this package; None where git, the repository or the right to read it is missing."""
    root = Path(megatron_polar.__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.splitlines()
    # An installed package may lie within a repository of something else.
    return lines[1] if result.returncode == 0 and len(lines) == 2 and Path(lines[0]) == root else None


def _hash_of_the_code() -> str:
    """SHA-256 over this package's sources: a checkout may be edited, and an installed package has no commit."""
    root, digest = Path(megatron_polar.__file__).resolve().parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# --- Data ------------------------------------------------------------------------------------------------------------


def _dataset_state(name: str) -> DatasetState:
    """The manifest's hash, and whether it and the sizes of its files are right; contents are checked by training."""
    directory, sha256 = Path(name), None
    try:
        if not directory.is_dir():
            return DatasetState(name, None, "no such directory")
        if (directory / MANIFEST).is_file():
            sha256 = hash_file(directory / MANIFEST, hashlib.sha256())
        check_sizes(directory, read_dataset_manifest(directory)["files"])
    except Damaged as error:
        return DatasetState(name, sha256, str(error))
    except OSError as error:
        return DatasetState(name, sha256, f"{error.filename}: {error.strerror}")
    return DatasetState(name, sha256, "")
