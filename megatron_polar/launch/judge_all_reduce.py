"""Whose fault it is that the ranks did not meet, add rightly or fast enough. Part of judge.py.

In a collective all wait for one, so most nodes without a result are victims. The most telling evidence counts, and
what is weaker is not asked any more: a rank that failed by itself, ranks that never came, a node that fell silent
while the others still wrote, one that is a stage behind, a few that met an error where most only waited. Where none of
it names anybody, nobody is named.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from megatron_polar.launch.report import STAGES, AllReduce, Failure, NodeReport
from megatron_polar.launch.verdict import Problem

_COLUMN = "all-reduce"
_SLOW_SHARE = 0.7
"""A node whose own links reach less than this share of the others' median is the one that slows them all down."""
_LOOK_AT_THE_NODE = "look into the job's log, then drain the node"
_LOOK_AT_THE_NETWORK = (
    "check MASTER_ADDR, MASTER_PORT, the firewall and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, run again with "
    "NCCL_DEBUG=INFO, or raise --timeout-seconds"
)
_NAMES = {"meeting": "that all meet", "node": "the node's own all-reduce", "all": "the all-reduce", "done": "the end"}


def judge_all_reduce(
    reports: Sequence[NodeReport],
    *,
    failures: Sequence[Failure],
    num_missing: int,
    min_bandwidth_gb_s: float,
    max_clock_seconds: float,
) -> list[Problem]:
    """The problems of the nodes that were to take part; `num_missing` nodes have left no report, which is known."""
    asked = [report for report in reports if report.wants_all_reduce]
    found = {report.node: report.all_reduce for report in asked if report.all_reduce is not None}
    alone = [failure for failure in failures if not failure.is_among_others]
    problems = list(_failed(alone, {report.node for report in reports}))
    if asked and not all(report.node in found and found[report.node].is_done for report in asked):
        problems = problems or list(_absent(asked, found))
        if not problems and not num_missing:
            problems = list(_silent(asked, found)) or list(_behind(found))
            problems = problems or list(_failing(found, failures)) or [_nobody(found)]
        return problems
    clocks = {node: result.clock_unix_seconds for node, result in found.items() if result.clock_unix_seconds}
    problems += [*_wrong(found), *_slow(found, min_bandwidth_gb_s), *_skewed(clocks, max_clock_seconds)]
    return problems


# --- No result -------------------------------------------------------------------------------------------------------


def _failed(failures: Sequence[Failure], nodes: set[str]) -> Iterable[Problem]:
    by_node: dict[str, list[Failure]] = {}
    for failure in sorted(failures, key=lambda failure: failure.rank):
        if failure.node in nodes:
            by_node.setdefault(failure.node, []).append(failure)
    for node, mine in by_node.items():
        ranks = f"rank {mine[0].rank}" if len(mine) == 1 else f"{len(mine)} ranks from {mine[0].rank} on"
        message = f"{ranks} failed: {mine[0].message}"
        yield Problem(node, _COLUMN, mine[0].message, message, _LOOK_AT_THE_NODE, is_mendable=True)


def _absent(asked: Sequence[NodeReport], found: Mapping[str, AllReduce]) -> Iterable[Problem]:
    seen = [result.arrived for result in found.values() if result.arrived is not None]
    if not seen:
        return
    come = {report.node: max(arrived.get(report.node, 0) for arrived in seen) for report in asked}
    for report in asked:
        wanted = report.num_local_ranks or max(come.values())
        if come[report.node] < wanted:
            message = f"{come[report.node]} of its {wanted} ranks came to meet the others"
            yield Problem(report.node, _COLUMN, "absent", message, _LOOK_AT_THE_NODE)


def _silent(asked: Sequence[NodeReport], found: Mapping[str, AllReduce]) -> Iterable[Problem]:
    for report in asked:
        if found and report.node not in found:
            message = "its first rank ended without a word"
            yield Problem(report.node, _COLUMN, "silent", message, _LOOK_AT_THE_NODE)


def _behind(found: Mapping[str, AllReduce]) -> Iterable[Problem]:
    furthest = max(len(result.stages) for result in found.values()) if found else 0
    for node, result in found.items():
        if len(result.stages) < furthest:
            where = result.error or f"gave up while waiting for {result.waited_for}"
            message = f"did not reach {_NAMES[STAGES[len(result.stages)]]}, as others did: {where}"
            yield Problem(node, _COLUMN, "behind", message, _LOOK_AT_THE_NODE)


def _failing(found: Mapping[str, AllReduce], failures: Sequence[Failure]) -> Iterable[Problem]:
    """A dead link says so at its ends. Where a rank dies of it, all others meet errors, too, and nobody knows."""
    errors = {failure.node: failure.message for failure in failures if failure.is_among_others}
    errors |= {node: result.error for node, result in found.items() if result.error}
    if 2 * len(errors) < len(found):
        for node, error in errors.items():
            message = f"failed where most others only waited: {error}"
            yield Problem(node, _COLUMN, "failed", message, "drain the node and check its links (ibstat, NVLink)")


def _nobody(found: Mapping[str, AllReduce]) -> Problem:
    ends = dict.fromkeys(result.error or f"gave up waiting for {result.waited_for}" for result in found.values())
    message = f"no result, and no node stands out: {next(iter(ends), 'their ranks ended without a word')}"
    return Problem(None, _COLUMN, "no result", message, _LOOK_AT_THE_NETWORK, is_mendable=True)


# --- A bad result ----------------------------------------------------------------------------------------------------


def _wrong(found: Mapping[str, AllReduce]) -> Iterable[Problem]:
    by_themselves = {node: result for node, result in found.items() if result.wrong_in_node}
    for node, result in by_themselves.items():
        message = f"wrong sum over its own ranks, on rank {', '.join(map(str, result.wrong_in_node))}"
        yield Problem(node, _COLUMN, "wrong sum", message, "drain the node: its GPUs or links corrupt data")
    wrong = {node: result for node, result in found.items() if result.wrong_ranks}
    if by_themselves or not wrong:
        return
    if len(wrong) == len(found) > 1:
        message = "wrong sum over all ranks on every node, and the right one within each"
        remedy = "run preflight again on halves of the nodes to find the link that corrupts data"
        yield Problem(None, _COLUMN, "wrong sum", message, remedy, is_mendable=True)
        return
    for node, result in wrong.items():
        message = f"wrong sum over all ranks, on rank {', '.join(map(str, result.wrong_ranks))}"
        yield Problem(node, _COLUMN, "wrong sum", message, "drain the node: its GPUs or links corrupt data")


def _slow(found: Mapping[str, AllReduce], minimum: float) -> Iterable[Problem]:
    """An all-reduce is as slow as its slowest link on all nodes, so each node's own links are looked at."""
    low = {
        node: result.bandwidth_gb_s
        for node, result in found.items()
        if result.bandwidth_gb_s is not None and result.bandwidth_gb_s < minimum
    }
    if not low:
        return
    below = f"below --min-bandwidth-gb-s {minimum:g}"
    within = {node: r.node_bandwidth_gb_s for node, r in found.items() if r.node_bandwidth_gb_s is not None}
    between = {node: max(result.exchanges.values()) for node, result in found.items() if result.exchanges}
    slow = {node: "its own ranks" for node in _far_below(within, least=2)}
    slow |= {node: "its neighbours" for node in _far_below(between, least=3)}
    for node, whom in slow.items():
        speed, others = (within, within) if whom == "its own ranks" else (between, between)
        message = (
            f"all-reduce {next(iter(low.values())):.3g} GB/s, {below}; with {whom} it does {speed[node]:.3g} GB/s, "
            f"the median node {statistics.median(others.values()):.3g}"
        )
        yield Problem(node, _COLUMN, "bandwidth", message, "drain the node and check its links (ibstat, NVLink)")
    if slow:
        return
    remedy = "check NCCL_IB_HCA and NCCL_SOCKET_IFNAME, run with NCCL_DEBUG=INFO, or lower the minimum"
    for node, bandwidth in low.items():
        message = f"all-reduce {bandwidth:.3g} GB/s, {below}, and no node is slower than the others"
        yield Problem(node, _COLUMN, "bandwidth", message, remedy, is_mendable=True)


def _far_below(speeds: Mapping[str, float], *, least: int) -> list[str]:
    if len(speeds) < least:
        return []
    return [node for node, speed in speeds.items() if speed < _SLOW_SHARE * statistics.median(speeds.values())]


def _skewed(clocks: Mapping[str, float], limit: float) -> Iterable[Problem]:
    if not clocks:
        return
    tie = "" if len(clocks) > 2 else " (of two clocks, the later node's is named)"
    norm = statistics.median(clocks.values()) if len(clocks) > 2 else next(iter(clocks.values()))
    for node, clock in clocks.items():
        if abs(clock - norm) > limit:
            side = "ahead of" if clock > norm else "behind"
            message = f"its clock is {abs(clock - norm):.1f} s {side} the others'{tie}"
            yield Problem(node, "clock s", "clocks", message, "have the clock set (chrony, NTP)")
