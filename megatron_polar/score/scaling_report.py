"""`report.html` of a scaling study: laws with intervals, log-log plots, the largest run predicted, the paper beside."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_polar.scaling.fit import FittedLaw, ScalingFit, paper_says
from megatron_polar.scaling.fit_table import conventions, symbol, with_interval
from megatron_polar.scaling.gather import Gathered
from megatron_polar.scaling.laws import PUBLISHED
from megatron_polar.scaling.power_law import Interval
from megatron_polar.score.figures import FIRST_COLOUR, SECOND_COLOUR, Band, Line, Points, log_log_figure
from megatron_polar.score.page import Section, cards, number, table, write_report

_CURVE_POINTS = 60
_BEYOND = 2.0
"""How far curves go on beyond the largest run."""


def scaling_report(fit: ScalingFit, gathered: Gathered, *, output: Path) -> Path:
    """Write the report as one HTML file; returns `output`."""
    sections = [Section("Result", _headline(fit)), Section("Laws", _laws(fit))]
    sections.append(Section("Plots", f'<div class="figures">{_figures(fit, gathered)}</div>\n'))
    sections.append(Section("The largest run, predicted from the others", _predictions(fit)))
    sections.append(Section("Beside the paper", _paper(fit)))
    sections.append(Section("Runs", _runs(fit, gathered)))
    sections.append(Section("What the letters mean", _meaning(fit, gathered)))
    subtitle = f"{len(gathered.runs)} runs; seed {fit.settings.seed}, {fit.settings.replicates:,} replicates"
    return write_report(output, title="Scaling laws", subtitle=subtitle, sections=sections)


def _headline(fit: ScalingFit) -> str:
    figures: dict[str, float | int | str | None] = {}
    for name, what in (("loss_of_parameters", "L(N)"), ("loss_of_compute", "L(C)")):
        if name in fit.laws:
            law = fit.laws[name]
            figures[f"exponent of {what}"] = law.figures["exponent"].value
            figures[f"R² of {what}"] = law.r_squared
    prediction = fit.laws["loss_of_parameters"].prediction
    if prediction is not None:
        figures["error of the largest run's prediction"] = f"{prediction.error:+.2%}"
    return cards(figures)


def _laws(fit: ScalingFit) -> str:
    rows: list[tuple] = []
    for law in fit.laws.values():
        for name, interval in law.figures.items():
            items = law.item_figures[name] if law.item_figures else None
            rows.append((law.formula, symbol(name), *_cells(interval), *(_cells(items)[1:]), len(law.runs)))
    headers = ("law", "constant", "value", "95 % from", "to", "over items from", "to", "runs")
    caption = "Intervals: runs' residuals drawn anew, stretched by Student's t; over items: held-out items drawn anew."
    body = table(headers, rows, caption=caption)
    remarks = [f"{law.formula}: {remark}" for law in fit.laws.values() for remark in law.remarks]
    remarks += [f"Not fitted: {name.replace('_', ' ')}: {reason}." for name, reason in fit.missing.items()]
    return body + _list(remarks)


def _cells(interval: Interval | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if interval is None else (interval.value, interval.low, interval.high)


def _list(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>\n"


# --- Plots -----------------------------------------------------------------------------------------------------------

_AXES = {"N": "N, parameters", "D": "D", "C": "C, FLOPs"}


def _figures(fit: ScalingFit, gathered: Gathered) -> str:
    figures = [_one_variable(law, fit, gathered) for law in fit.laws.values() if len(law.variables) == 1]
    if "loss_of_parameters_and_data" in fit.laws:
        law = fit.laws["loss_of_parameters_and_data"]
        figures += [_joint(law, fit), _fitted_against_real(law)]
    return "".join(figures)


def _one_variable(law: FittedLaw, fit: ScalingFit, gathered: Gathered) -> str:
    x, held_out = law.x[:, 0], law.prediction
    curve = np.geomspace(x.min(), x.max() * _BEYOND, _CURVE_POINTS)
    lines = [Line(f"{law.formula}, fitted", curve.tolist(), law.loss(curve[:, None]).tolist())]
    bands = []
    if law.replicates is not None:
        low, high = np.exp(law.replicates.band(np.log(curve[:, None])))
        # The band of a handful of runs may be wider than any page.
        limits = law.losses.min() / 2, law.losses.max() * 2
        bands.append(Band(curve.tolist(), np.clip(low, *limits).tolist(), np.clip(high, *limits).tolist()))
    published = PUBLISHED.get(law.name)
    if published is not None:  # its slope through the middle of our points: levels depend on data and vocabulary
        level = np.exp(np.mean(np.log(law.losses) + published.exponent * np.log(x)))
        slope = (level * curve**-published.exponent).tolist()
        lines.append(Line(f"the paper's exponent, {published.exponent}", curve.tolist(), slope, SECOND_COLOUR, True))
    is_largest = np.isin(law.runs, held_out.runs) if held_out else np.zeros(len(x), dtype=bool)
    points = []
    if law.name == "loss_of_compute":
        others = [run for run in gathered.runs if run.name not in law.runs and run.flops is not None]
        if others:
            losses = [run.loss for run in others]
            points.append(Points("beaten by a cheaper run", [run.flops for run in others], losses, SECOND_COLOUR, True))
    points.append(Points("runs", x[~is_largest].tolist(), law.losses[~is_largest].tolist()))
    if held_out is not None:
        points.append(Points("largest run", x[is_largest].tolist(), law.losses[is_largest].tolist(), is_hollow=True))
        points.append(_predicted_point(law, x=x[is_largest]))
    caption = "Band: 95 % of the law. Orange dot: the largest run as the others predict it, with its interval. "
    caption += "Both are cut at half the lowest and twice the highest loss."
    axis = _AXES[law.variables[0]]
    return log_log_figure(
        points, lines=lines, bands=bands, title=law.formula, x_label=axis, y_label="held-out loss", caption=caption
    )


def _predicted_point(law: FittedLaw, *, x: np.ndarray) -> Points:
    found = law.prediction.predicted
    limits = law.losses.min() / 2, law.losses.max() * 2
    errors = None
    if found.low is not None:
        errors = ([max(found.low, limits[0])], [min(found.high, limits[1])])
    return Points("predicted from the others", [float(x[0])], [found.value], SECOND_COLOUR, errors=errors)


def _joint(law: FittedLaw, fit: ScalingFit) -> str:
    """Loss over data, one curve a size."""
    sizes = np.unique(law.x[:, 0])
    amounts = np.geomspace(law.x[:, 1].min(), law.x[:, 1].max() * _BEYOND, _CURVE_POINTS)
    lines, points = [], []
    for number_of_size, size in enumerate(sizes):
        colour = (FIRST_COLOUR, SECOND_COLOUR)[number_of_size % 2]
        own = law.x[:, 0] == size
        curve = law.loss(np.column_stack([np.full(_CURVE_POINTS, size), amounts]))
        lines.append(Line(f"N {number(float(size))}", amounts.tolist(), curve.tolist(), colour))
        points.append(Points("", law.x[own, 1].tolist(), law.losses[own].tolist(), colour))
    axis = f"D, {fit.settings.data_unit}"
    caption = "One curve a size, the smallest on top."
    return log_log_figure(
        points, lines=lines, title=law.formula, x_label=axis, y_label="held-out loss", caption=caption
    )


def _fitted_against_real(law: FittedLaw) -> str:
    ends = [float(law.losses.min()), float(law.losses.max())]
    return log_log_figure(
        [Points("runs", law.loss(law.x).tolist(), law.losses.tolist())],
        lines=[Line("equal", ends, ends, SECOND_COLOUR, is_faint=True)],
        title="L(N, D): fitted against real",
        x_label="loss by the law",
        y_label="held-out loss",
        caption="Runs off the line are what the law does not explain.",
    )


# --- Tables ----------------------------------------------------------------------------------------------------------


def _predictions(fit: ScalingFit) -> str:
    rows: list[tuple] = []
    for law in fit.laws.values():
        found = law.prediction
        if found is None:
            rows.append((law.formula, "too few other runs", None, None, None, None, ""))
            continue
        values = (found.predicted.value, found.predicted.low, found.predicted.high, found.real)
        rows.append((law.formula, ", ".join(found.runs), *values, f"{found.error:+.2%}"))
    headers = ("law", "held out", "predicted", "95 % from", "to", "real", "error")
    caption = "Fitted without the run, then asked for it; the interval has the law's uncertainty and one run's scatter."
    return table(headers, rows, caption=caption)


def _paper(fit: ScalingFit) -> str:
    rows: list[tuple] = []
    for law in fit.laws.values():
        paper = paper_says(law)
        if paper is None:
            continue
        own = with_interval(law.figures["exponent"])
        inside = {True: "yes", False: "no", None: "no interval"}[paper["exponent_inside_our_interval"]]
        rows.append(
            (law.formula, paper["exponent"], own, inside, paper["r_squared"], law.r_squared, paper["coefficient"])
        )
    headers = ("law", "paper's exponent", "ours", "inside ours", "paper's R²", "our R²", "paper's coefficient")
    body = table(headers, rows, caption="arXiv 2507.05197, section 4.4.")
    remarks = [f"{law.formula}: {PUBLISHED[law.name].remark}." for law in fit.laws.values() if law.name in PUBLISHED]
    remarks.append("Levels depend on data, vocabulary and held-out set; only exponents may be compared.")
    return body + _list(remarks)


def _runs(fit: ScalingFit, gathered: Gathered) -> str:
    rows = [
        (
            run.name,
            run.parameters,
            run.all_parameters,
            run.comparisons,
            run.tokens,
            run.flops,
            run.loss,
            run.num_evaluations,
        )
        for run in sorted(gathered.runs, key=lambda run: (run.parameters, run.flops or 0.0))
    ]
    headers = ("run", "N", "with embedding", "comparisons", "tokens", "FLOPs", "held-out loss", "evaluations")
    body = table(headers, rows, caption=_CAPTION, write_number=_compact)
    lines = [*gathered.notes, *(f"Left out: {name}: {reason}" for name, reason in gathered.excluded)]
    return body + _list(lines)


_CAPTION = (
    "Run directories were checked to be finished and to hold out the same data; rows of a table are taken as given."
)


def _compact(value: float | int | None) -> str:
    """Numbers of a study span twenty decades."""
    return f"{value:.3e}" if isinstance(value, float) and value >= 1e7 else number(value)


def _meaning(fit: ScalingFit, gathered: Gathered) -> str:
    rows = list(conventions(fit, gathered).items())
    return table(("letter", "meaning"), rows, caption="See docs/scaling.md.")
