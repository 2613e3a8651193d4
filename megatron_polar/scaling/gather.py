"""Which runs make a scaling study: all that were given, or one clear error, or those that were said to be left out."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_polar import log
from megatron_polar.errors import UserError
from megatron_polar.scaling.runs import ScalingRun, read_run
from megatron_polar.scaling.runs_table import SUFFIXES, read_table

_CHANCE = 0.693147
"""log 2: the loss of a model that tells nothing apart."""


@dataclass(frozen=True)
class Gathered:
    """Runs whose losses can be compared, those that were left out with the reason, and what to keep in mind."""

    runs: tuple[ScalingRun, ...]
    excluded: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def gather_runs(inputs: Sequence[Path], *, evaluation: str | None = None, skip_unusable: bool = False) -> Gathered:
    """Read run directories, or tables of runs, and check that their losses mean the same.

    Raises UserError naming the first run that cannot be used; with `skip_unusable` such runs are left out, and of runs
    that do not fit each other all but the largest group.
    """
    excluded: list[tuple[str, str]] = []
    runs: list[ScalingRun] = []
    for path in inputs:
        try:
            runs += _read(path, evaluation=evaluation)
        except UserError as error:
            if not skip_unusable:
                raise
            excluded.append((str(path), str(error)))
    for what, meaning in (("held_out", "held-out data"), ("tokenizer", "tokenizer")):
        runs = _alike(runs, what=what, meaning=meaning, skip_unusable=skip_unusable, excluded=excluded)
    for name, reason in excluded:
        log.warn(f"left out: {reason}" if name in reason else f"left out: {name}: {reason}")
    if not runs:
        raise UserError("no run is left to fit; give finished runs")
    runs = _with_short_names(runs)
    return Gathered(tuple(runs), tuple(excluded), tuple(_notes(runs)))


def _read(path: Path, *, evaluation: str | None) -> list[ScalingRun]:
    if path.is_dir():
        return [read_run(path, evaluation=evaluation)]
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; give run directories, or a table of runs")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: neither a run directory nor a table ({', '.join(SUFFIXES)}); check the path")
    if evaluation is not None:
        raise UserError(f"{path}: --evaluation is for run directories, and a table has its losses; leave one out")
    return read_table(path)


def _alike(
    runs: list[ScalingRun], *, what: str, meaning: str, skip_unusable: bool, excluded: list[tuple[str, str]]
) -> list[ScalingRun]:
    """Runs with the most common fingerprint (of several as common: the first run's)."""
    groups = Counter(getattr(run, what) for run in runs)
    if len(groups) < 2:
        return runs
    common = groups.most_common(1)[0][0]
    first = next(run for run in runs if getattr(run, what) == common)
    kept = []
    for run in runs:
        fingerprint = getattr(run, what)
        if fingerprint == common:
            kept.append(run)
            continue
        reason = (
            f"{run.name}: has {meaning} {_brief(fingerprint)}, and {first.name} has {_brief(common)}, so that their "
            f"losses cannot be compared"
        )
        if not skip_unusable:
            raise UserError(
                f"{reason}; fit them apart, or give --skip-unusable to go on with the {groups[common]} runs that have "
                f"{_brief(common)}"
            )
        excluded.append((run.name, reason))
    return kept


def _brief(fingerprint: str | None) -> str:
    return "an unknown one" if fingerprint is None else fingerprint[:12]


def _with_short_names(runs: Sequence[ScalingRun]) -> list[ScalingRun]:
    """Last parts of paths where they tell the runs apart."""
    short = [Path(run.name).name for run in runs]
    if len(set(short)) < len(short):
        return list(runs)
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, short, strict=True)]


def _notes(runs: Sequence[ScalingRun]) -> list[str]:
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    unlearnt = [run.name for run in runs if run.loss >= _CHANCE]
    if unlearnt:
        notes.append(f"loss of log 2 or more, which is chance: {', '.join(unlearnt)} have learnt nothing yet")
    if len({run.seed for run in runs}) > 1 and all(run.items is None for run in runs):
        notes.append(
            "runs have different seeds, which also draw other comparisons from the same held-out data: part of their "
            "scatter is that"
        )
    if len({run.train_data for run in runs}) > 1:
        notes.append("runs were trained on different datasets, not only on more or less of one")
    return notes
