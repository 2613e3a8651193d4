"""Which nodes are fit for the job: a pure function over what they say of themselves.

A node is accused of what the others do not share. What all of them share is not a node's fault: it is a mistake that
the user can mend (a missing dataset), and excluding nodes for it would leave none.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_polar.launch.judge_all_reduce import judge_all_reduce
from megatron_polar.launch.report import Failure, NodeReport
from megatron_polar.launch.verdict import Problem, Verdict

_SICK_CLOCKS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
_SAME_ENVIRONMENT = "start all nodes from one environment (the same venv or container image)"


@dataclass(frozen=True)
class Limits:
    """What is borne. Sizes in GB (10^9 bytes), bandwidths in GB/s of bus bandwidth; 0 asks for none."""

    min_free_gb: float = 1.0
    min_bandwidth_gb_s: float = 0.0
    max_clock_seconds: float = 5.0
    max_clock_deficit: float = 0.10
    """Share by which a node's maximal SM clock may lie below that of most nodes."""


def judge(
    reports: Sequence[NodeReport],
    *,
    failures: Sequence[Failure] = (),
    expected: Sequence[str] | int | None = None,
    limits: Limits | None = None,
) -> Verdict:
    """Judge the nodes. `expected` are their names in the order of the node list, or how many there should be.

    Where as many nodes say one thing as say another there is no majority: the first in the list is believed then, but
    for a node whose own files do not fit together.
    """
    limits = limits or Limits()
    names, reports, notes = _in_order(reports, failures, expected)
    if not reports:
        nothing = Problem(None, "ranks", "no report", "no node has left a report", _LOOK_AT_THE_LOG, is_mendable=True)
        return Verdict(names, (nothing,), tuple(notes))
    problems = [problem for report in reports for problem in _own_problems(report, limits)]
    problems += [*_differences(reports, problems), *_missing_nodes(names, reports, failures, expected)]
    problems += _slow_clocks(reports, limits)
    problems += judge_all_reduce(
        reports,
        failures=failures,
        num_missing=max(len(names), _num_expected(expected)) - len(reports),
        min_bandwidth_gb_s=limits.min_bandwidth_gb_s,
        max_clock_seconds=limits.max_clock_seconds,
    )
    notes += [note for report in reports for note in _notes(report)]
    order = {name: position for position, name in enumerate(names)}
    merged = sorted(_merge_common(problems, reports, num_nodes=len(names)), key=lambda p: order.get(p.node, -1))
    return Verdict(names, tuple(merged), tuple(notes))


# --- Who is there ----------------------------------------------------------------------------------------------------

_LOOK_AT_THE_LOG = "look into the job's log, and whether srun started there at all"


def _in_order(
    reports: Sequence[NodeReport], failures: Sequence[Failure], expected: Sequence[str] | int | None
) -> tuple[tuple[str, ...], list[NodeReport], list[str]]:
    """All nodes by name, the reports in that order, and notes on reports that nobody expects."""
    by_rank = sorted(reports, key=lambda report: (report.rank, report.node))
    if not isinstance(expected, Sequence):
        names = dict.fromkeys([report.node for report in by_rank] + sorted(failure.node for failure in failures))
        return tuple(names), by_rank, []
    position = {name: index for index, name in enumerate(dict.fromkeys(expected))}
    mine = sorted((report for report in reports if report.node in position), key=lambda r: position[r.node])
    strangers = [report.node for report in by_rank if report.node not in position]
    notes = [f"{name} has left a report, but is not in the node list; it is not judged" for name in strangers]
    return tuple(position), mine, notes


def _num_expected(expected: Sequence[str] | int | None) -> int:
    return expected if isinstance(expected, int) else len(set(expected or ()))


def _missing_nodes(
    names: Sequence[str],
    reports: Sequence[NodeReport],
    failures: Sequence[Failure],
    expected: Sequence[str] | int | None,
) -> Iterable[Problem]:
    there = {report.node for report in reports}
    said = {failure.node: f" (rank {failure.rank}: {failure.message})" for failure in failures}
    for name in names:
        if name not in there:
            message = f"has left no report{said.get(name, '')}"
            yield Problem(name, "ranks", "no report", message, _LOOK_AT_THE_LOG)
    nameless = _num_expected(expected) - len(names)
    if nameless > 0:
        message = f"{nameless} of {_num_expected(expected)} nodes have left no report"
        yield Problem("(unknown)", "ranks", "no report", message, "give --nodes their names to learn which")


# --- One node by itself ----------------------------------------------------------------------------------------------


def _own_problems(report: NodeReport, limits: Limits) -> Iterable[Problem]:
    yield from _gpu_problems(report)
    node = report.node
    for place, free in report.free_gb.items():
        if free < limits.min_free_gb:
            message = f"{free:.1f} GB are free in {place}, fewer than --min-free-gb {limits.min_free_gb:g}"
            yield Problem(node, "free GB", place, message, "make room there, or choose another place", is_mendable=True)
    if abs(report.clock_offset_seconds) > limits.max_clock_seconds:
        side = "behind" if report.clock_offset_seconds > 0 else "ahead of"
        message = f"its clock is {abs(report.clock_offset_seconds):.1f} s {side} the file system's"
        yield Problem(node, "clock s", "clock", message, "have the clock set (chrony, NTP)", is_mendable=True)
    for dataset in report.datasets:
        if dataset.damage:
            message = f"dataset {dataset.path}: {dataset.damage}"
            remedy = "copy it again, run preprocess again, or correct data.train and data.validation"
            yield Problem(node, "data", dataset.path, message, remedy, is_mendable=True)
    for key, path in report.missing_inputs.items():
        yield Problem(node, "data", key, f"{key}={path} is not there", "correct or copy it", is_mendable=True)


def _gpu_problems(report: NodeReport) -> Iterable[Problem]:
    node, ranks = report.node, report.num_local_ranks or 1
    uses_gpus = report.device != "cpu" and report.visible_gpus != 0
    needs_engine = report.needs_transformer_engine
    if report.gpu_error and uses_gpus:
        remedy = "drain the node and look for Xid messages in dmesg (to run on CPUs: CUDA_VISIBLE_DEVICES='')"
        yield Problem(node, "GPUs", "nvidia-smi", report.gpu_error, remedy, is_mendable=True)
    if uses_gpus and report.num_allocated_gpus and not report.gpus and not report.gpu_error:
        message = f"no GPU is seen, and Slurm has given the job {report.num_allocated_gpus} here"
        remedy = "look for the driver, and for the container's GPU hook (for a run on CPUs: run.device=cpu)"
        yield Problem(node, "GPUs", "no GPU", message, remedy, is_mendable=True)
    for gpu in report.gpus:
        if gpu.uncorrected_errors:
            message = f"GPU {gpu.index} ({gpu.name}) has {gpu.uncorrected_errors} uncorrected ECC errors"
            yield Problem(node, "ECC", "ECC", message, "drain the node and have the GPU reset or replaced")
    seen = len(report.gpus) if report.visible_gpus is None else min(len(report.gpus), report.visible_gpus)
    if report.gpus and uses_gpus and not report.has_own_gpu_only and seen < ranks:
        message = f"{seen} GPUs for {ranks} ranks"
        remedy = f"start at most {seen} ranks on it (--ntasks-per-node, --gpus-per-node), or drain the node"
        yield Problem(node, "GPUs", "ranks without a GPU", message, remedy, is_mendable=True)
    if report.gpus and uses_gpus and "+cpu" in (report.versions.get("torch") or ""):
        message = f"{len(report.gpus)} GPUs, and torch {report.versions['torch']}, which knows none"
        remedy = "use an environment with requirements-gpu.txt, or a container (for a run on CPUs: run.device=cpu)"
        yield Problem(node, "versions", "torch without GPUs", message, remedy, is_mendable=True)
    elif report.gpus and uses_gpus and needs_engine and not report.versions.get("transformer-engine"):
        message = "no transformer-engine, and model.transformer_impl=transformer_engine"
        remedy = "use an environment with requirements-gpu.txt, or a container (or model.transformer_impl=local)"
        yield Problem(node, "versions", "transformer-engine", message, remedy, is_mendable=True)


def _notes(report: NodeReport) -> Iterable[str]:
    for gpu in report.gpus:
        reasons = [reason for reason in gpu.throttle_reasons if reason in _SICK_CLOCKS]
        if reasons:
            yield f"{report.node}: GPU {gpu.index} is slowed down now by {', '.join(reasons)}"


# --- One node against the others -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Norm:
    """What the nodes should agree on, and a sentence's end that says whose word it is."""

    value: object
    holders: str


def _norm(values: Mapping[str, object], *, distrusted: Iterable[str] = ()) -> _Norm:
    """The value of most nodes; among equally many that of the first node that is not distrusted."""
    counts = Counter(values.values())
    most = max(counts.values())
    candidates = [value for value in counts if counts[value] == most]
    if len(candidates) == 1:
        return _Norm(candidates[0], "on most nodes")
    tied = {node: value for node, value in values.items() if value in candidates}
    trusted = [node for node in tied if node not in set(distrusted)]
    node = (trusted or list(tied))[0]
    return _Norm(tied[node], f"on {node} (no majority: the later in the node list is named)")


def _differences(reports: Sequence[NodeReport], own_problems: Sequence[Problem]) -> Iterable[Problem]:
    """Nodes that are not as most others are. What a node is accused of by itself, in the same column, explains that it
    differs, and takes the weight from its word."""

    def compare(column: str, what: str, values: Mapping[str, object], remedy: str) -> Iterable[Problem]:
        distrusted = {problem.node for problem in own_problems if problem.column == column}
        norm = _norm(values, distrusted=distrusted) if values else None
        for node, value in values.items():
            if value != norm.value and node not in distrusted:
                message = f"{what} is {_shown(value)}, and {_shown(norm.value)} {norm.holders}"
                yield Problem(node, column, what, message, remedy)

    for name in dict.fromkeys(name for report in reports for name in report.versions):
        versions = {report.node: report.versions.get(name) for report in reports}
        yield from compare("versions", name, versions, _SAME_ENVIRONMENT)
    remedy = "drain the node, or ask for nodes of one kind (--constraint, --exclude)"
    yield from compare("GPUs", "the number of GPUs", {report.node: len(report.gpus) for report in reports}, remedy)
    for column, what, field in (("GPUs", "the GPUs' model", "name"), ("driver", "the GPU driver", "driver")):
        kinds = {
            report.node: " + ".join(sorted({getattr(gpu, field) for gpu in report.gpus}))
            for report in reports
            if report.gpus
        }
        yield from compare(column, what, kinds, remedy)
    for path in dict.fromkeys(dataset.path for report in reports for dataset in report.datasets):
        hashes = {
            report.node: next((data.manifest_sha256 for data in report.datasets if data.path == path), None)
            for report in reports
        }
        what = f"the SHA-256 of the manifest of dataset {path}"
        yield from compare("data", what, hashes, "copy the dataset again, so that all nodes read the same bytes")
    backends = {report.node: report.all_reduce.backend for report in reports if report.all_reduce}
    backends = {node: backend for node, backend in backends.items() if backend}
    yield from compare("all-reduce", "the way to talk", backends, "check the GPU driver there, or set run.device")


def _shown(value: object) -> str:
    if value is None or value == "":
        return "missing"
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text  # a hash


def _slow_clocks(reports: Sequence[NodeReport], limits: Limits) -> Iterable[Problem]:
    clocks = {}
    for report in reports:
        known = [gpu.max_sm_clock_mhz for gpu in report.gpus if gpu.max_sm_clock_mhz is not None]
        if known:
            clocks[report.node] = min(known)
    norm = _norm(clocks) if clocks else None
    for node, clock in clocks.items():
        if clock < (1 - limits.max_clock_deficit) * norm.value:
            message = f"the maximal SM clock is {clock} MHz, and {norm.value} MHz {norm.holders}"
            yield Problem(node, "SM MHz", "SM clock", message, "reset the GPUs' clocks (nvidia-smi -rgc), or drain it")


# --- All nodes alike -------------------------------------------------------------------------------------------------


def _merge_common(problems: Sequence[Problem], reports: Sequence[NodeReport], *, num_nodes: int) -> list[Problem]:
    """One problem instead of one per node, where all nodes have it and the user can mend it.

    A single report out of several nodes does not tell whether the others agree.
    """
    accused: dict[tuple[str, str], set[str | None]] = {}
    for problem in problems:
        accused.setdefault((problem.column, problem.subject), set()).add(problem.node)
    everybody = {report.node for report in reports}
    can_agree = len(everybody) > 1 or num_nodes == 1
    merged = {}
    for problem in problems:
        key = (problem.column, problem.subject)
        if can_agree and problem.is_mendable and accused[key] >= everybody:
            merged.setdefault((*key, None), replace(problem, node=None))
        else:
            merged[(*key, problem.node, problem.message)] = problem
    return list(merged.values())
