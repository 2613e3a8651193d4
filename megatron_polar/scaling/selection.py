"""Which runs a law is fitted to, and which of them are the largest, to be predicted from the others."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_polar.scaling.runs import ScalingRun

FEWEST_SIZES = 3
SAME_DATA = 1.1
"""D that differ by less than this factor are the same amount of data."""
_SAME_COMPUTE = 1.02
"""Seeds of one setting differ a little in C: their comparisons are of other lengths."""
_SAME_BUDGET = 1.1
"""Sizes trained at one budget differ a little in C: steps are whole, and no plan knows the lengths to come."""

Count = Literal["parameters", "all_parameters"]
DataUnit = Literal["tokens", "comparisons"]


class LawMissing(Exception):
    """Why a law cannot be fitted to these runs."""


def most_data_of_each_size(
    runs: Sequence[ScalingRun], *, count: Count, data_unit: DataUnit
) -> tuple[list[ScalingRun], list[str]]:
    """Runs with the most data of their size (several where seeds differ), and a remark where sizes differ in it."""
    amounts = [getattr(run, data_unit) for run in runs]
    if None in amounts:
        which = "some" if any(amount is not None for amount in amounts) else "all"
        return list(runs), [f"{data_unit} of {which} runs are unknown, so all runs of a size are taken"]
    most: dict[int, float] = {}
    for run, amount in zip(runs, amounts, strict=True):
        size = getattr(run, count)
        most[size] = max(most.get(size, 0.0), amount)
    pairs = zip(runs, amounts, strict=True)
    chosen = [run for run, amount in pairs if amount * SAME_DATA > most[getattr(run, count)]]
    spread = max(most.values()) / min(most.values())
    remarks = []
    if spread > SAME_DATA:
        remarks.append(
            f"the sizes' data differ by a factor of {spread:.3g}, so the exponent mixes size and data; L(N, D) does not"
        )
    return chosen, remarks


def pareto_frontier(runs: Sequence[ScalingRun], *, count: Count) -> list[ScalingRun]:
    """Of every budget the best setting, where no cheaper one is as good; in order of FLOPs.

    Settings whose FLOPs differ by less than a tenth have one budget, and the seeds of a setting stand and fall
    together, by their mean loss. Where every size has a budget of its own nothing is to be chosen, and a run that a
    cheaper one beats shows noise: all are taken. Raises LawMissing with fewer than three.
    """
    unknown = [run.name for run in runs if run.flops is None]
    if unknown:
        raise LawMissing(f"FLOPs of {unknown[0]} are unknown")
    settings = sorted(_settings(runs, count=count, amount="flops"), key=lambda setting: setting[0].flops)
    budgets = _budgets(settings)
    if len(budgets) < FEWEST_SIZES:
        raise LawMissing(f"{len(budgets)} amounts of compute at least a tenth apart, and a law needs {FEWEST_SIZES}")
    if len(budgets) == len(settings) == len({getattr(run, count) for run in runs}):
        return [run for setting in settings for run in setting]
    found: list[list[ScalingRun]] = []
    for budget in budgets:
        best = min(budget, key=_mean_loss)
        if not found or _mean_loss(best) < _mean_loss(found[-1]):
            found.append(best)
    if len(found) < FEWEST_SIZES:
        raise LawMissing(f"{len(found)} settings on the frontier of loss and compute, and a law needs {FEWEST_SIZES}")
    return [run for setting in found for run in setting]


def largest_runs(runs: Sequence[ScalingRun], x: np.ndarray, *, count: Count, amount: str) -> np.ndarray:
    """Whether each of `runs`, at `x` [n, k], goes with the one of the largest product of x: [n] of bool.

    Its seeds do, and where compute is `amount` ("flops") all of its budget.
    """
    most = int(np.argmax(x.prod(axis=1)))
    if amount == "flops":
        return x[:, 0] * _SAME_BUDGET > x[most, 0]
    settings = _settings(runs, count=count, amount=amount)
    largest = next(setting for setting in settings if any(run is runs[most] for run in setting))
    return np.array([any(run is one for one in largest) for run in runs])


def _settings(runs: Sequence[ScalingRun], *, count: Count, amount: str) -> list[list[ScalingRun]]:
    """Runs of one size and one `amount` ("flops", or of data) stand together: they differ in their seeds."""
    factor = _SAME_COMPUTE if amount == "flops" else SAME_DATA
    settings: list[list[ScalingRun]] = []
    for run in sorted(runs, key=lambda run: (getattr(run, count), getattr(run, amount))):
        last = settings[-1][0] if settings else None
        if (
            last
            and getattr(last, count) == getattr(run, count)
            and getattr(run, amount) < factor * getattr(last, amount)
        ):
            settings[-1].append(run)
        else:
            settings.append([run])
    return settings


def _budgets(settings: Sequence[list[ScalingRun]]) -> list[list[list[ScalingRun]]]:
    """Settings in order of FLOPs, those of one budget together."""
    budgets: list[list[list[ScalingRun]]] = []
    for setting in settings:
        if budgets and setting[0].flops < _SAME_BUDGET * budgets[-1][0][0].flops:
            budgets[-1].append(setting)
        else:
            budgets.append([setting])
    return budgets


def _mean_loss(runs: Sequence[ScalingRun]) -> float:
    return sum(run.loss for run in runs) / len(runs)
