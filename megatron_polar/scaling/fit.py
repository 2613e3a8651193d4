"""Scaling laws over finished runs: L(N), L(C), L(N, D), with intervals and the largest run predicted from the others.

docs/scaling.md says what is fitted and how to read it; power_law.py is the arithmetic, runs.py what N, D, C and L are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_polar import log
from megatron_polar.errors import UserError
from megatron_polar.scaling.laws import PUBLISHED
from megatron_polar.scaling.power_law import (
    FLOOR,
    STRAIGHT,
    Interval,
    Law,
    Replicates,
    joint_law,
    r_squared,
    resample_items,
    resample_residuals,
)
from megatron_polar.scaling.runs import ScalingRun
from megatron_polar.scaling.selection import (
    FEWEST_SIZES,
    SAME_DATA,
    Count,
    DataUnit,
    LawMissing,
    largest_runs,
    most_data_of_each_size,
    pareto_frontier,
)

FEWEST_WITH_FLOOR = 5
"""Runs: three parameters and two degrees of freedom."""
FEWEST_JOINT = 7
"""Runs: five parameters and two degrees of freedom."""


@dataclass(frozen=True)
class Settings:
    """What N and D count, and how intervals are drawn."""

    count: Count = "parameters"
    data_unit: DataUnit = "tokens"
    replicates: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Prediction:
    """The largest run's loss from a fit to the others; `error` is predicted over real, less one."""

    runs: tuple[str, ...]
    at: dict[str, float]
    predicted: Interval
    real: float

    @property
    def error(self) -> float:
        return self.predicted.value / self.real - 1

    @property
    def is_inside(self) -> bool | None:
        """Whether the real loss lies in the interval; None where there is none."""
        if self.predicted.low is None or self.predicted.high is None:
            return None
        return self.predicted.low <= self.real <= self.predicted.high


@dataclass(frozen=True)
class FittedLaw:
    """One law: `x` [n, k] and `losses` [n] are what it was fitted to, `figures` its constants with 95 % intervals over
    runs, `item_figures` the same over held-out items."""

    name: str
    formula: str
    variables: tuple[str, ...]
    runs: tuple[str, ...]
    x: np.ndarray
    losses: np.ndarray
    law: Law
    theta: np.ndarray
    replicates: Replicates | None
    figures: dict[str, Interval]
    item_figures: dict[str, Interval] | None
    r_squared: float | None
    prediction: Prediction | None
    remarks: tuple[str, ...]

    def loss(self, x: np.ndarray) -> np.ndarray:
        """The law at x [m, k]."""
        return np.exp(self.law.log_loss(self.theta, np.log(x)))


@dataclass(frozen=True)
class ScalingFit:
    """All laws that the runs allow, and why the others are missing."""

    settings: Settings
    laws: dict[str, FittedLaw]
    missing: dict[str, str]


def fit_runs(runs: Sequence[ScalingRun], settings: Settings) -> ScalingFit:
    """Fit what the runs allow. Raises UserError with fewer than three sizes, or where the chosen count is unknown."""
    for run in runs:
        if getattr(run, settings.count) is None:
            raise UserError(
                f"{run.name}: how many parameters its embedding has is not known; use --parameters non-embedding, or "
                f"give a table with all_parameters"
            )
    sizes = sorted({getattr(run, settings.count) for run in runs})
    if len(sizes) < FEWEST_SIZES:
        found = ", ".join(f"{size:,}" for size in sizes)
        raise UserError(
            f"{len(runs)} runs have {len(sizes)} different sizes ({found} parameters), and a law needs at least "
            f"{FEWEST_SIZES}; train more sizes (`megatron-polar plan --ladder` writes their YAMLs)"
        )
    laws, missing = {}, {}
    fits: dict[str, Callable[[Sequence[ScalingRun], Settings], FittedLaw]] = {
        "loss_of_parameters": _of_parameters,
        "loss_of_parameters_with_floor": _of_parameters_with_floor,
        "loss_of_compute": _of_compute,
        "loss_of_parameters_and_data": _of_parameters_and_data,
    }
    for name, fit in log.progress(fits.items(), "fit", unit="laws"):
        try:
            laws[name] = fit(runs, settings)
        except LawMissing as reason:
            missing[name] = str(reason)
    return ScalingFit(settings, laws, missing)


# --- The four laws ---------------------------------------------------------------------------------------------------


def _of_parameters(runs: Sequence[ScalingRun], settings: Settings) -> FittedLaw:
    chosen, remarks = most_data_of_each_size(runs, count=settings.count, data_unit=settings.data_unit)
    x = _column(chosen, settings.count)
    return _fit(
        "loss_of_parameters", "L = a N^-alpha", ("N",), chosen, x=x, law=STRAIGHT, settings=settings, remarks=remarks
    )


def _of_parameters_with_floor(runs: Sequence[ScalingRun], settings: Settings) -> FittedLaw:
    chosen, remarks = most_data_of_each_size(runs, count=settings.count, data_unit=settings.data_unit)
    x = _column(chosen, settings.count)
    if len(np.unique(x)) < FEWEST_WITH_FLOOR:
        raise LawMissing(f"{len(np.unique(x))} sizes, and an irreducible term needs {FEWEST_WITH_FLOOR}")
    name, formula = "loss_of_parameters_with_floor", "L = a N^-alpha + E"
    return _fit(name, formula, ("N",), chosen, x=x, law=FLOOR, settings=settings, remarks=remarks)


def _of_compute(runs: Sequence[ScalingRun], settings: Settings) -> FittedLaw:
    frontier = pareto_frontier(runs, count=settings.count)
    remarks = []
    if len(frontier) < len(runs):
        remarks.append(
            f"{len(runs) - len(frontier)} of {len(runs)} runs are left out, as others as cheap are better; where "
            "losses are noisy that choice makes the exponent a little too large, and the interval does not know of it"
        )
    law = "loss_of_compute", "L = a C^-alpha", ("C",)
    return _fit(*law, frontier, x=_column(frontier, "flops"), law=STRAIGHT, settings=settings, remarks=remarks)


def _of_parameters_and_data(runs: Sequence[ScalingRun], settings: Settings) -> FittedLaw:
    unknown = [run.name for run in runs if getattr(run, settings.data_unit) is None]
    if unknown:
        raise LawMissing(f"{settings.data_unit} of {unknown[0]} are unknown")
    x = np.hstack([_column(runs, settings.count), _column(runs, settings.data_unit)])
    _check_joint(x)
    law = joint_law(np.log(x), np.log(_losses(runs)))
    name, formula = "loss_of_parameters_and_data", "L = A N^-alpha + B D^-beta + E"
    return _fit(name, formula, ("N", "D"), runs, x=x, law=law, settings=settings)


def _check_joint(x: np.ndarray) -> None:
    amounts = np.sort(x[:, 1])
    num_amounts = 1 + int(np.sum(amounts[1:] > SAME_DATA * amounts[:-1]))
    num_sizes = len(np.unique(x[:, 0]))
    if len(x) < FEWEST_JOINT or num_sizes < FEWEST_SIZES or num_amounts < FEWEST_SIZES:
        raise LawMissing(
            f"{len(x)} runs of {num_sizes} sizes and {num_amounts} amounts of data, and five constants need "
            f"{FEWEST_JOINT} runs of {FEWEST_SIZES} sizes and {FEWEST_SIZES} amounts"
        )
    if np.linalg.matrix_rank(np.column_stack([np.ones(len(x)), np.log(x)]), tol=1e-3) < 3:
        raise LawMissing("data grow with size in all runs alike, so that the two cannot be told apart")


def _column(runs: Sequence[ScalingRun], name: str) -> np.ndarray:
    return np.array([[float(getattr(run, name))] for run in runs])


def _losses(runs: Sequence[ScalingRun]) -> np.ndarray:
    return np.array([run.loss for run in runs])


# --- One law ---------------------------------------------------------------------------------------------------------


def _fit(
    name: str,
    formula: str,
    variables: tuple[str, ...],
    runs: Sequence[ScalingRun],
    *,
    x: np.ndarray,
    law: Law,
    settings: Settings,
    remarks: Sequence[str] = (),
) -> FittedLaw:
    log_x, losses = np.log(x), _losses(runs)
    log_loss = np.log(losses)
    theta = law.fit(log_x, log_loss)
    drawn = {"replicates": settings.replicates, "seed": settings.seed}
    replicates = resample_residuals(law, theta, log_x, log_loss, **drawn)
    if replicates is None:
        remarks = [*remarks, "as many constants as runs: no intervals"]
    items = _item_replicates(runs, law=law, theta=theta, log_x=log_x, settings=settings)
    return FittedLaw(
        name=name,
        formula=formula,
        variables=variables,
        runs=tuple(run.name for run in runs),
        x=x,
        losses=losses,
        law=law,
        theta=theta,
        replicates=replicates,
        figures=_figures(law, theta, replicates),
        item_figures=_figures(law, theta, items) if items else None,
        r_squared=r_squared(law, theta, log_x, log_loss),
        prediction=_predict_largest(runs, variables=variables, x=x, law=law, settings=settings),
        remarks=tuple(remarks),
    )


def _item_replicates(
    runs: Sequence[ScalingRun], *, law: Law, theta: np.ndarray, log_x: np.ndarray, settings: Settings
) -> Replicates | None:
    if any(run.items is None for run in runs):
        return None
    return resample_items(
        law,
        theta,
        log_x,
        item_losses=np.array([run.items.losses for run in runs]),
        item_pairs=runs[0].items.pairs,
        replicates=settings.replicates,
        seed=settings.seed,
    )


def _figures(law: Law, theta: np.ndarray, replicates: Replicates | None) -> dict[str, Interval]:
    """Constants of a law by name."""
    k = law.num_variables
    exponents = ("exponent",) if k == 1 else ("parameters_exponent", "data_exponent")
    coefficients = ("coefficient",) if k == 1 else ("parameters_coefficient", "data_coefficient")
    figures = {name: _interval(theta, replicates, index=k + j) for j, name in enumerate(exponents)}
    figures |= {name: _interval(theta, replicates, index=j, is_log=True) for j, name in enumerate(coefficients)}
    if law.has_floor:
        figures["irreducible"] = _interval(theta, replicates, index=-1, is_log=True)
    if k == 2:

        def optimum(theta: np.ndarray) -> float:
            """N grows with C to this power where loss is least for C ~ N D (Hoffmann et al., eq. 4)."""
            return float(theta[3] / max(theta[2] + theta[3], 1e-12))

        known = replicates.interval(optimum) if replicates else Interval(optimum(theta))
        figures["optimal_parameters_exponent"] = known
    return figures


def _interval(theta: np.ndarray, replicates: Replicates | None, *, index: int, is_log: bool = False) -> Interval:
    if replicates is None:
        found = Interval(float(theta[index]))
    else:
        found = replicates.interval(lambda theta: float(theta[index]))
    return _exp(found) if is_log else found


def _exp(interval: Interval) -> Interval:
    low, high = (None if bound is None else float(np.exp(bound)) for bound in (interval.low, interval.high))
    return Interval(float(np.exp(interval.value)), low, high)


def _predict_largest(
    runs: Sequence[ScalingRun], *, variables: tuple[str, ...], x: np.ndarray, law: Law, settings: Settings
) -> Prediction | None:
    """Fit without the largest run (selection.py says what goes with it), and predict it; None with too few others."""
    amount = {("N",): settings.count, ("C",): "flops", ("N", "D"): settings.data_unit}[variables]
    is_largest = largest_runs(runs, x, count=settings.count, amount=amount)
    rest = ~is_largest
    sizes = {getattr(run, settings.count) for run, is_left in zip(runs, rest, strict=True) if is_left}
    if len(sizes) < FEWEST_SIZES or rest.sum() <= law.num_parameters:
        return None
    log_x, log_loss = np.log(x), np.log(_losses(runs))
    theta = law.fit(log_x[rest], log_loss[rest])
    replicates = resample_residuals(
        law, theta, log_x[rest], log_loss[rest], replicates=settings.replicates, seed=settings.seed
    )
    at = log_x[is_largest].mean(axis=0)
    predicted = replicates.prediction(at, seed=settings.seed) if replicates else None
    return Prediction(
        runs=tuple(run.name for run, chosen in zip(runs, is_largest, strict=True) if chosen),
        at=dict(zip(variables, map(float, np.exp(at)), strict=True)),
        predicted=_exp(predicted or Interval(float(law.log_loss(theta, at[None])[0]))),
        real=float(np.exp(log_loss[is_largest].mean())),
    )


def paper_says(law: FittedLaw) -> dict | None:
    """The published law of the same name, and whether its exponent lies in our interval; None where there is none."""
    published = PUBLISHED.get(law.name)
    if published is None:
        return None
    own = law.figures["exponent"]
    inside = None if own.low is None else own.low <= published.exponent <= own.high
    return {
        "exponent": published.exponent,
        "coefficient": published.coefficient,
        "r_squared": published.r_squared,
        "source": published.source,
        "remark": published.remark,
        "exponent_inside_our_interval": inside,
    }
