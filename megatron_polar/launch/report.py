"""What one node says of itself before training, as a file that the judge reads without torch and without ranks.

Ranks and judge meet in a directory only: the network between the nodes is what is on trial.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson

from megatron_polar.errors import UserError
from megatron_polar.manifest import write_durably
from megatron_polar.processes import node_name

SUFFIX, FAILURE_SUFFIX, BAD_NODES = ".json", ".failure", "bad_nodes"
STAGES = ("meeting", "node", "all", "done")
"""Of the all-reduce, in order: all ranks have met, those of each node have added, all have, all is measured."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job: node, rank, number of ranks, and the same on its node (None: unknown)."""

    node: str
    rank: int
    world_size: int
    local_rank: int
    num_local_ranks: int | None


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi sees it; None where the card or the driver does not tell."""

    index: int
    name: str
    driver: str
    memory_mib: int | None
    sm_clock_mhz: int | None
    max_sm_clock_mhz: int | None
    ecc_mode: str | None
    uncorrected_errors: int | None
    """Since the driver was loaded."""
    throttle_reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetState:
    """One dataset of the configuration: SHA-256 of its manifest, the first thing that does not fit ("": none)."""

    path: str
    manifest_sha256: str | None
    damage: str


@dataclass(frozen=True)
class AllReduce:
    """What came of adding numbers over all ranks, as the first rank of a node saw it.

    Bandwidths are bus bandwidths in GB/s (10^9 bytes; what the links carry, whatever the number of ranks); None where
    there is nothing to carry. `exchanges` are GB/s with the neighbouring nodes, the slowest of the ranks' pairs.
    """

    stages: tuple[str, ...] = ()
    """Of STAGES, those that are behind it."""
    waited_for: str = ""
    """What it hung in, if it hung."""
    error: str = ""
    arrived: dict[str, int] | None = None
    """Ranks that had come, per node, when the meeting was given up; None: it was not, or that could not be read."""
    num_ranks: int = 0
    backend: str = ""
    latency_us: float | None = None
    bandwidth_gb_s: float | None = None
    node_bandwidth_gb_s: float | None = None
    exchanges: dict[str, float] = field(default_factory=dict)
    wrong_ranks: tuple[int, ...] = ()
    """Ranks of this node that got a wrong sum over all ranks."""
    wrong_in_node: tuple[int, ...] = ()
    """Ranks of this node that got a wrong sum over its own ranks."""
    clock_unix_seconds: float | None = None
    """Its clock at one moment, the same on all nodes but for milliseconds."""

    @property
    def is_done(self) -> bool:
        return "done" in self.stages


@dataclass(frozen=True)
class NodeReport:
    """All that one node says of itself. Sizes in GB are 10^9 bytes."""

    node: str
    job: str
    rank: int
    """Of its first rank."""
    num_local_ranks: int | None
    device: str
    """`run.device` of the configuration."""
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str = ""
    """Why nvidia-smi, which is there, told nothing."""
    visible_gpus: int | None = None
    """Entries of CUDA_VISIBLE_DEVICES; None: not set."""
    has_own_gpu_only: bool = False
    """Slurm shows every task its own GPU, so the first rank cannot see the others'."""
    num_allocated_gpus: int | None = None
    """What Slurm has given the job on this node; None: not told."""
    needs_transformer_engine: bool = False
    """`model.transformer_impl: transformer_engine`."""
    free_gb: dict[str, float] = field(default_factory=dict)
    """By the name of the place: run.directory, TMPDIR."""
    versions: dict[str, str | None] = field(default_factory=dict)
    clock_offset_seconds: float = 0.0
    """By how much the file system's clock is ahead of the node's; 0 where the node itself stamps its files."""
    datasets: tuple[DatasetState, ...] = ()
    missing_inputs: dict[str, str] = field(default_factory=dict)
    """Key of the configuration and the path that is not there."""
    wants_all_reduce: bool = True
    all_reduce: AllReduce | None = None


@dataclass(frozen=True)
class Failure:
    """A rank that could not even come to meet the others, and why; `is_among_others`: it had come, and the fault may be
    theirs."""

    node: str
    job: str
    rank: int
    message: str
    is_among_others: bool = False


@dataclass(frozen=True)
class Evidence:
    """What a directory of reports holds. `strange` are files that are not reports of this job, with the reason."""

    reports: tuple[NodeReport, ...]
    failures: tuple[Failure, ...]
    strange: dict[str, str]


# --- Who and where ---------------------------------------------------------------------------------------------------


def job_name(environment: Mapping[str, str] = os.environ) -> str:
    """Slurm's job and how often it was requeued, so that reports of an earlier start are told apart; "" without
    Slurm."""
    job = environment.get("SLURM_JOB_ID")
    return f"{job}.{environment.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def place_of_this(environment: Mapping[str, str] = os.environ) -> Place:
    """Read where this process stands from RANK, WORLD_SIZE and LOCAL_RANK. Raises UserError where they do not fit."""
    if "RANK" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError(
            f"preflight: srun started {environment['SLURM_STEP_NUM_TASKS']} tasks, but RANK, WORLD_SIZE, LOCAL_RANK, "
            f"MASTER_ADDR and MASTER_PORT are not set; set them (RANK=$SLURM_PROCID, WORLD_SIZE=$SLURM_NTASKS, "
            f"LOCAL_RANK=$SLURM_LOCALID, ...)"
        )
    try:
        rank, world_size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        local_rank = int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0")))
        num_local_ranks = _num_local_ranks(environment, world_size)
    except ValueError as error:
        raise UserError(
            f"preflight: RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be whole numbers ({error})"
        ) from None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if world_size > 1 and missing:
        raise UserError(f"preflight: WORLD_SIZE={world_size}, but {missing[0]} is not set; set it to rank 0's")
    return Place(node_name(environment), rank, world_size, local_rank, num_local_ranks)


def _num_local_ranks(environment: Mapping[str, str], world_size: int) -> int | None:
    if "LOCAL_WORLD_SIZE" in environment:
        return int(environment["LOCAL_WORLD_SIZE"])
    if world_size == 1:
        return 1
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):  # such as 8(x2),4
        count, _, repeats = part.partition("(x")
        if count.isdigit():
            counts += [int(count)] * int(repeats.rstrip(")") or 1)
    index = int(environment.get("SLURM_NODEID", "-1"))
    return counts[index] if 0 <= index < len(counts) else None


# --- Files -----------------------------------------------------------------------------------------------------------


def write_report(directory: Path, report: NodeReport) -> None:
    """Write a node's report whole or not at all."""
    write_durably(directory / f"{report.node}{SUFFIX}", orjson.dumps(report, option=orjson.OPT_INDENT_2))


def write_failure(directory: Path, failure: Failure) -> None:
    """Write down why a rank did not come, or what it met among the others."""
    write_durably(_failure_path(directory, failure.node, failure.rank), orjson.dumps(failure))


def clear_failure(directory: Path, *, node: str, rank: int) -> None:
    """Forget what the same rank wrote when it was here before."""
    _failure_path(directory, node, rank).unlink(missing_ok=True)


def _failure_path(directory: Path, node: str, rank: int) -> Path:
    return directory / f"{node}.rank{rank}{FAILURE_SUFFIX}"


def read_evidence(directory: Path, *, job: str) -> Evidence:
    """Read all reports and failures in a directory; those of another job or start count as strange (`job` "": all
    are taken)."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the --output of `megatron-polar preflight`")
    reports, failures, strange = [], [], {}
    for path in sorted(directory.iterdir()):
        if path.suffix not in (SUFFIX, FAILURE_SUFFIX):
            continue
        try:
            content = orjson.loads(path.read_bytes())
            item = Failure(**content) if path.suffix == FAILURE_SUFFIX else _report_of(content)
        except (orjson.JSONDecodeError, TypeError, KeyError) as error:
            strange[path.name] = f"no report of this version of megatron_polar ({' '.join(str(error).split())})"
            continue
        if job and item.job != job:
            strange[path.name] = f"left by job {item.job or '(none)'}, this is {job}"
        else:
            (failures if isinstance(item, Failure) else reports).append(item)
    return Evidence(tuple(reports), tuple(failures), strange)


def _report_of(content: dict) -> NodeReport:
    report = NodeReport(**content)
    all_reduce = content["all_reduce"]
    if all_reduce is not None:
        sequences = {key: tuple(all_reduce[key]) for key in ("stages", "wrong_ranks", "wrong_in_node")}
        all_reduce = AllReduce(**{**all_reduce, **sequences})
    return replace(
        report,
        gpus=tuple(Gpu(**{**gpu, "throttle_reasons": tuple(gpu["throttle_reasons"])}) for gpu in content["gpus"]),
        datasets=tuple(DatasetState(**dataset) for dataset in content["datasets"]),
        all_reduce=all_reduce,
    )
