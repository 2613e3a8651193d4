"""The preflight of a job: every node looks at itself, all ranks add a few numbers, and a judge reads what they wrote.

The judge is a step of its own, without torch and without ranks: the first rank may be the one that hangs.
"""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

from megatron_polar import log
from megatron_polar.config.schema import RunConfig
from megatron_polar.errors import STALLED, RunStopped, UserError
from megatron_polar.launch.deadline import Deadline
from megatron_polar.launch.judge import Limits, judge
from megatron_polar.launch.node import describe_node
from megatron_polar.launch.report import (
    BAD_NODES,
    AllReduce,
    Failure,
    Place,
    clear_failure,
    job_name,
    place_of_this,
    read_evidence,
    write_failure,
    write_report,
)
from megatron_polar.launch.verdict import render
from megatron_polar.manifest import write_durably

_MOST_NODES = 100_000


# --- On every rank ---------------------------------------------------------------------------------------------------


def look_at_node(config: RunConfig, *, output: Path, timeout_seconds: float, with_all_reduce: bool = True) -> Place:
    """This rank's part of a preflight; the first rank of each node writes `output`/<node>.json.

    Whatever takes longer than `timeout_seconds` ends the process with STALLED, and is written down. Raises UserError
    where this rank cannot take part, RunStopped (STALLED) where another one has left.
    """
    place = place_of_this()
    output.mkdir(parents=True, exist_ok=True)
    rank = _Rank(place, output)
    name = f"rank {place.rank} ({place.node})"
    try:
        with Deadline(timeout_seconds, name=name, give_up=rank.give_up) as deadline:
            deadline.phase(f"the directory {output}")
            clear_failure(output, node=place.node, rank=place.rank)
            rank.look(config, deadline, wants_all_reduce=with_all_reduce)
            if with_all_reduce:
                rank.measure(config, deadline)
    except Exception as error:
        with contextlib.suppress(OSError):  # the directory may be what is wrong, and the first error says so
            rank.fail(" ".join(str(error).split()) or type(error).__name__)
        if isinstance(error, RuntimeError) and rank.is_among_others:
            raise RunStopped(
                f"{name}: the all-reduce of the preflight failed: {' '.join(str(error).split())}; see the table of "
                f"`megatron-polar preflight --judge`",
                status=STALLED,
            ) from error
        raise
    return place


class _Rank:
    """What one rank has found so far, for whoever has to write it down: this thread, or the deadline's."""

    def __init__(self, place: Place, output: Path):
        self.place, self.output = place, output
        self.report = None
        self.measurement = None

    @property
    def is_among_others(self) -> bool:
        """Whether it waits for other ranks, so that the fault may be theirs."""
        return self.measurement is not None and self.measurement.can_meet

    def look(self, config: RunConfig, deadline: Deadline, *, wants_all_reduce: bool) -> None:
        if self.place.local_rank == 0:
            self.report = describe_node(
                config,
                place=self.place,
                output=self.output,
                wants_all_reduce=wants_all_reduce,
                begin=deadline.phase,
            )
            write_report(self.output, self.report)

    def measure(self, config: RunConfig, deadline: Deadline) -> None:
        deadline.phase("the import of torch")
        from megatron_polar.launch.all_reduce import Measurement

        self.measurement = Measurement(self.place, device=config.run.device, deadline=deadline)
        result = self.measurement.run()
        self._write(result)
        self.measurement.close()

    def give_up(self, waited_for: str, *, is_told: bool) -> None:
        """Write down what this rank hangs in. One that is told to stop has not failed, however far it came: others
        have, and srun ends all."""
        if is_told:
            self._write_unfinished(waited_for=waited_for)
        elif not self.is_among_others:
            self.fail(f"gave up waiting for {waited_for}")
        else:
            self._write_unfinished(waited_for=waited_for)
            if self.place.local_rank == 0 and "meeting" not in self.measurement.result.stages:
                self._write_unfinished(waited_for=waited_for, arrived=self.measurement.arrived())  # may hang itself

    def fail(self, message: str) -> None:
        """Write down why this rank ends: alone, or among others, whose fault it may be."""
        if self.is_among_others and self.report is not None:
            self._write_unfinished(error=message)
        else:
            mine = Failure(self.place.node, job_name(), self.place.rank, message, is_among_others=self.is_among_others)
            write_failure(self.output, mine)

    def _write_unfinished(self, **changes) -> None:
        result = self.measurement.result if self.measurement is not None else AllReduce()
        if not result.is_done:
            self._write(replace(result, **changes))

    def _write(self, result: AllReduce) -> None:
        if self.report is not None:
            self.report = replace(self.report, all_reduce=result)
            write_report(self.output, self.report)


# --- Afterwards, once ------------------------------------------------------------------------------------------------


def judge_directory(directory: Path, *, expected: tuple[str, ...] | int | None, limits: Limits) -> int:
    """Print the table of a preflight, write the names of bad nodes to `directory`/bad_nodes, return the exit status:
    0, PREFLIGHT_FAILED where nodes are bad, USER_ERROR where all nodes have what the user has to mend."""
    evidence = read_evidence(directory, job=job_name())
    verdict = judge(evidence.reports, failures=evidence.failures, expected=expected, limits=limits)
    strange = tuple(f"{directory / name} is not judged: {why}" for name, why in evidence.strange.items())
    verdict = replace(verdict, notes=(*verdict.notes, *strange))
    write_durably(directory / BAD_NODES, "".join(f"{node}\n" for node in verdict.bad_nodes).encode())
    print(render(verdict, evidence.reports), flush=True)
    log.info(f"{directory / BAD_NODES}: {len(verdict.bad_nodes)} nodes")
    return verdict.status


def parse_nodes(text: str) -> tuple[str, ...] | int:
    """A number of nodes, or their names: separated by commas or spaces, ranges as Slurm writes them (gpu[01-03,7])."""
    if text.strip().isdigit():
        return int(text)
    pattern = r"(?:[\w.-]|\[[\d,-]*\])+"
    names = [name for word in re.findall(pattern, text) for name in _expand(word)]
    is_broken = re.sub(pattern, "", text).strip(" \t\n,") != ""
    if is_broken or not names or any(not re.fullmatch(r"[\w.-]+", name) for name in names) or len(names) > _MOST_NODES:
        raise UserError(f"--nodes {text!r} is neither a number nor a list of nodes; give $SLURM_JOB_NODELIST")
    return tuple(dict.fromkeys(names))


def _expand(word: str) -> list[str]:
    parts = re.fullmatch(r"([^\[]*)\[([\d,-]+)\](.*)", word)
    if parts is None:
        return [word]
    first, ranges, rest = parts.groups()
    names, tails = [], _expand(rest)
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        if not low.isdigit() or not (high or low).isdigit() or int(high or low) - int(low) >= _MOST_NODES:
            return [word]
        numbers = range(int(low), int(high or low) + 1)
        names += [f"{first}{number:0{len(low)}d}{tail}" for number in numbers for tail in tails]
    return names
