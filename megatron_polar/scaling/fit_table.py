"""A fit as `fit.json` and as the table of the console."""

from collections.abc import Sequence
from dataclasses import asdict

from megatron_polar.scaling.fit import FittedLaw, ScalingFit, paper_says
from megatron_polar.scaling.gather import Gathered
from megatron_polar.scaling.power_law import Interval
from megatron_polar.scaling.runs import ScalingRun
from megatron_polar.scaling.table import short

FORMAT, FORMAT_VERSION = "megatron_polar.scaling_fit", 1
_COUNTS = {
    "parameters": "weights without the embedding",
    "all_parameters": "all weights, the embedding's rows included",
}


def as_json(fit: ScalingFit, gathered: Gathered) -> dict:
    """Everything that was fitted, and what to; docs/scaling.md explains the keys."""
    settings = fit.settings
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "conventions": conventions(fit, gathered),
        "seed": settings.seed,
        "replicates": settings.replicates,
        "laws": {name: _law_as_json(law) for name, law in fit.laws.items()},
        "missing": fit.missing,
        "runs": [_run_as_json(run) for run in gathered.runs],
        "excluded": [{"run": name, "reason": reason} for name, reason in gathered.excluded],
        "notes": list(gathered.notes),
    }


def conventions(fit: ScalingFit, gathered: Gathered) -> dict[str, str]:
    """What the letters mean in this fit."""
    suites = {run.items.suite for run in gathered.runs if run.items is not None}
    loss = "mean held-out loss of the evaluations in the last 5 % of the steps, at least the last"
    if suites:
        loss = f"mean loss over the pairs of the suite {suites.pop()}"
    if all(run.num_evaluations is None and run.items is None for run in gathered.runs):
        loss = "as the table gives it"
    return {
        "N": _COUNTS[fit.settings.count],
        "D": f"{fit.settings.data_unit} trained on; tokens count every comparison as full sequences",
        "C": "physical FLOPs of the run, shared prefixes once, without recomputation",
        "L": f"{loss}, in nats a pair",
        "r_squared": "1 - SSR / SST of log L over the runs of the law",
        "intervals": "95 %; runs' residuals drawn with replacement, stretched by Student's t for few runs",
    }


def _law_as_json(law: FittedLaw) -> dict:
    found = {
        "formula": law.formula,
        **{name: asdict(interval) for name, interval in law.figures.items()},
        "r_squared": law.r_squared,
        "num_runs": len(law.runs),
        "runs": list(law.runs),
        "largest_held_out": None,
        "over_held_out_items": None,
        "paper": paper_says(law),
        "remarks": list(law.remarks),
    }
    if law.item_figures is not None:
        found["over_held_out_items"] = {name: asdict(interval) for name, interval in law.item_figures.items()}
    if law.law.huber_delta is not None:
        found["huber_delta"] = law.law.huber_delta
    if law.prediction is not None:
        prediction = law.prediction
        found["largest_held_out"] = {
            "runs": list(prediction.runs),
            "at": prediction.at,
            "predicted": asdict(prediction.predicted),
            "real": prediction.real,
            "error": prediction.error,
            "inside_interval": prediction.is_inside,
        }
    return found


def _run_as_json(run: ScalingRun) -> dict:
    left_out = ("items", "notes")
    found = {name: value for name, value in vars(run).items() if name not in left_out}
    return found | {"num_items": len(run.items.pairs) if run.items is not None else None}


# --- Console ---------------------------------------------------------------------------------------------------------

_SYMBOLS = {
    "coefficient": "a",
    "exponent": "alpha",
    "parameters_coefficient": "A",
    "parameters_exponent": "alpha",
    "data_coefficient": "B",
    "data_exponent": "beta",
    "irreducible": "E",
    "optimal_parameters_exponent": "N ~ C^",
}


def symbol(name: str) -> str:
    """What a constant is called in the formula."""
    return _SYMBOLS[name]


def render_fit(fit: ScalingFit, gathered: Gathered) -> str:
    """The table that `megatron-polar fit` prints."""
    lines = _run_lines(gathered.runs, fit)
    for law in fit.laws.values():
        lines += ["", *_law_lines(law)]
    if fit.missing:
        lines += ["", *(f"not fitted: {name.replace('_', ' ')}: {reason}" for name, reason in fit.missing.items())]
    if gathered.notes or gathered.excluded:
        lines += ["", *(f"note: {note}" for note in gathered.notes)]
        lines += [f"left out: {name}" for name, _ in gathered.excluded]
    return "\n".join(lines)


def _run_lines(runs: Sequence[ScalingRun], fit: ScalingFit) -> list[str]:
    head = ("run", "N", f"D, {fit.settings.data_unit}", "C, FLOPs", "L")
    rows = [head]
    for run in sorted(runs, key=lambda run: (getattr(run, fit.settings.count), run.flops or 0.0)):
        amount = getattr(run, fit.settings.data_unit)
        rows.append(
            (
                run.name,
                short(getattr(run, fit.settings.count)),
                short(amount) if amount is not None else "unknown",
                f"{run.flops:.3g}" if run.flops is not None else "unknown",
                f"{run.loss:.4f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _law_lines(law: FittedLaw) -> list[str]:
    figures = ", ".join(f"{symbol(name)} {with_interval(interval)}" for name, interval in law.figures.items())
    r_squared = "" if law.r_squared is None else f", R² {law.r_squared:.4f}"
    lines = [f"{law.formula}   over {len(law.runs)} runs{r_squared}", f"    {figures}"]
    if law.item_figures is not None:
        over = ", ".join(f"{symbol(name)} {with_interval(interval)}" for name, interval in law.item_figures.items())
        lines.append(f"    over held-out items: {over}")
    if law.prediction is not None:
        found = law.prediction
        lines.append(
            f"    {', '.join(found.runs)} from the others: predicted {with_interval(found.predicted)}, real "
            f"{found.real:.4f}, error {found.error:+.2%}"
        )
    else:
        lines.append("    the largest run is not predicted: too few others")
    paper = paper_says(law)
    if paper is not None:
        inside = {True: "inside our interval", False: "outside of our interval", None: "we have no interval"}
        lines.append(
            f"    paper: a {paper['coefficient']}, alpha {paper['exponent']}, which is "
            f"{inside[paper['exponent_inside_our_interval']]}, R² {paper['r_squared']} ({paper['source']})"
        )
    return lines + [f"    note: {remark}" for remark in law.remarks]


def with_interval(interval: Interval) -> str:
    """`0.0425 [0.041, 0.044]`, four significant digits."""
    if interval.low is None or interval.high is None:
        return f"{interval.value:.4g} [no interval]"
    return f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
