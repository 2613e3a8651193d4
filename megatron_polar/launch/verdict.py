"""What the judge of a preflight says: problems, bad nodes, an exit status, and the table that a person reads."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_polar.errors import DONE, PREFLIGHT_FAILED, USER_ERROR
from megatron_polar.launch.report import NodeReport

COLUMNS = ("ranks", "GPUs", "driver", "SM MHz", "ECC", "free GB", "clock s", "versions", "data", "all-reduce")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one node (None: the same with all, and so the fault of none)."""

    node: str | None
    column: str
    subject: str
    """What it is about, the same for all nodes that have this problem."""
    message: str
    remedy: str
    is_mendable: bool = False
    """Whether the user has made a mistake, where all nodes have this problem."""

    def __str__(self) -> str:
        return f"{self.node or 'all nodes'}: {self.message}; {self.remedy}"


@dataclass(frozen=True)
class Verdict:
    """The judgement of a job's nodes, in the order of the node list; `notes` are worth a line and refuse nobody."""

    nodes: tuple[str, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    @property
    def bad_nodes(self) -> tuple[str, ...]:
        """The nodes that should not be used again before somebody has looked at them."""
        accused = {problem.node for problem in self.problems}
        return tuple(node for node in self.nodes if node in accused)

    @property
    def status(self) -> int:
        """What the user has to mend goes first: without the bad nodes the job would fail as well."""
        if any(problem.node is None for problem in self.problems):
            return USER_ERROR
        return PREFLIGHT_FAILED if self.problems else DONE


# --- The table -------------------------------------------------------------------------------------------------------


def render(verdict: Verdict, reports: Sequence[NodeReport]) -> str:
    """A line per node, `!` beside what is wrong, then a line per problem and note, and a summary."""
    by_node = {report.node: report for report in reports}
    rows = [["", "node", *COLUMNS]]
    for node in verdict.nodes:
        marked = {problem.column for problem in verdict.problems if problem.node in (node, None)}
        cells = _cells(by_node[node]) if node in by_node else ["no report", *["-"] * (len(COLUMNS) - 1)]
        cells = [f"{cell} !" if column in marked else cell for column, cell in zip(COLUMNS, cells, strict=True)]
        rows.append(["BAD" if node in verdict.bad_nodes else "ok", node, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", *map(str, verdict.problems)] if verdict.problems else []
    lines += [f"note: {note}" for note in verdict.notes]
    bad = verdict.bad_nodes
    summary = f"{len(verdict.nodes) - len(bad)} of {len(verdict.nodes)} nodes are good"
    if bad:
        summary += f"; bad: {','.join(bad)}"
    if verdict.status == USER_ERROR:
        summary += "; what is wrong with all of them has to be mended first"
    return "\n".join([*lines, f"preflight: {summary}"])


def _cells(report: NodeReport) -> list[str]:
    gpus, versions = report.gpus, report.versions
    last = "?" if report.num_local_ranks is None else str(report.rank + report.num_local_ranks - 1)
    names = Counter(gpu.name for gpu in gpus)
    clocks = [gpu.max_sm_clock_mhz for gpu in gpus if gpu.max_sm_clock_mhz is not None]
    errors = [gpu.uncorrected_errors for gpu in gpus if gpu.uncorrected_errors is not None]
    fitting = sum(not dataset.damage for dataset in report.datasets)
    of_datasets = "" if fitting == len(report.datasets) else f" of {len(report.datasets)}"
    return [
        str(report.rank) if report.num_local_ranks == 1 else f"{report.rank}-{last}",
        " + ".join(f"{count} x {name}" for name, count in names.items()) or ("failed" if report.gpu_error else "none"),
        " + ".join(sorted({gpu.driver for gpu in gpus})) or "-",
        str(min(clocks)) if clocks else "-",
        str(sum(errors)) if errors else "-",
        " / ".join(f"{free:.0f}" for free in report.free_gb.values()) or "-",
        f"{report.clock_offset_seconds:.1f}",
        f"torch {versions.get('torch')}, {(versions.get('commit') or versions.get('code') or '?')[:7]}",
        f"{fitting}{of_datasets} fit" + (f", {len(report.missing_inputs)} missing" if report.missing_inputs else ""),
        _all_reduce_cell(report),
    ]


def _all_reduce_cell(report: NodeReport) -> str:
    found = report.all_reduce
    if not report.wants_all_reduce:
        return "not asked"
    if found is None:
        return "no result"
    if not found.is_done:
        return "hung" if found.waited_for else "failed"
    bandwidth = "" if found.bandwidth_gb_s is None else f", {found.bandwidth_gb_s:.3g} GB/s"
    return f"{found.latency_us:.0f} us{bandwidth}"
