"""Figures of reports: matplotlib's SVG, inlined into a page whose colours they follow, in light and in dark."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

# Okabe and Ito's palette: told apart with any common colour blindness. Matplotlib draws in these colours; in the page
# each becomes a CSS variable, so that dark mode can exchange it.
_COLOURS = {"--ink": "#1b1f23", "--rule": "#d0d4d9", "--series-1": "#0072b2", "--series-2": "#d55e00"}
_INK, _RULE, FIRST_COLOUR, SECOND_COLOUR = _COLOURS.values()
_MAX_POINTS = 600
_FEW_POINTS = 10
_FIGURE_INCHES = (5.2, 2.9)

YAxis = Literal["linear", "log", "from zero"]


@dataclass(frozen=True)
class Line:
    """One curve: x and y of equal length; a faint one is drawn thin, behind the others."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = FIRST_COLOUR
    is_faint: bool = False
    has_markers: bool = False


def line_figure(lines: Sequence[Line], *, title: str, x_label: str, caption: str, y_axis: YAxis = "linear") -> str:
    """Draw curves over a common x as a figure with a heading; above 600 points neighbours are averaged, and few points
    have markers."""
    with _Figure(title, caption=caption) as drawing:
        for line in lines:
            x, y = _thinned(line.x, line.y)
            drawing.axes.plot(
                x,
                y,
                color=line.colour,
                linewidth=1.0 if line.is_faint else 1.8,
                alpha=0.35 if line.is_faint else 1.0,
                marker="o" if line.has_markers or len(x) <= _FEW_POINTS else None,
                markersize=4,
                label=line.label,
            )
        drawing.axes.set_yscale("log" if y_axis == "log" else "linear")
        if y_axis == "from zero":
            drawing.axes.set_ylim(bottom=0)
        drawing.axes.set_xlabel(x_label)
        if len(lines) > 1:
            drawing.axes.legend(frameon=False, labelcolor=_INK)
    return drawing.html


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    if len(x) <= _MAX_POINTS:
        return list(x), list(y)
    edges = [round(index * len(x) / _MAX_POINTS) for index in range(_MAX_POINTS + 1)]
    means = [(sum(x[a:b]) / (b - a), sum(y[a:b]) / (b - a)) for a, b in pairwise(edges)]
    return [mean[0] for mean in means], [mean[1] for mean in means]


def interval_figure(rows: Sequence[tuple[str, float, float, float]], *, title: str, caption: str) -> str:
    """Draw (label, value, low, high) rows of accuracies as dots with intervals, and chance as a dashed line."""
    height = max(1.6, 0.6 + 0.22 * len(rows))
    with _Figure(title, caption=caption, inches=(_FIGURE_INCHES[0], height)) as drawing:
        positions = range(len(rows), 0, -1)
        values = [row[1] for row in rows]
        errors = [[max(0.0, row[1] - row[2]) for row in rows], [max(0.0, row[3] - row[1]) for row in rows]]
        drawing.axes.axvline(0.5, color=SECOND_COLOUR, linestyle="--", linewidth=1.2, label="chance")
        drawing.axes.errorbar(
            values, list(positions), xerr=errors, fmt="o", color=FIRST_COLOUR, capsize=3, markersize=5, label="accuracy"
        )
        drawing.axes.set_yticks(list(positions), [row[0] for row in rows])
        drawing.axes.set_xlim(0.0 if min(row[2] for row in rows) < 0.3 else 0.3, 1.01)
        drawing.axes.set_ylim(0.4, len(rows) + 0.6)
        drawing.axes.grid(False, axis="y")
    return drawing.html


def interval_line_figure(
    points: Sequence[tuple[float, float, float, float]], *, title: str, x_label: str, y_label: str, caption: str
) -> str:
    """Draw (x, value, low, high) points, joined, with their intervals."""
    x, value, low, high = zip(*points, strict=True)
    with _Figure(title, caption=caption) as drawing:
        errors = [[v - b for v, b in zip(value, low, strict=True)], [t - v for t, v in zip(high, value, strict=True)]]
        drawing.axes.errorbar(x, value, yerr=errors, fmt="o-", color=FIRST_COLOUR, capsize=3, markersize=5)
        drawing.axes.set_xticks(x, [f"{place:g}" for place in x])
        drawing.axes.set_xlabel(x_label)
        drawing.axes.set_ylabel(y_label)
    return drawing.html


def reliability_figure(points: Sequence[tuple[float, float, float, float]], *, title: str, caption: str) -> str:
    """Draw (confidence, accuracy, low, high) of the bins that are not empty, and the line where both are equal."""
    with _Figure(title, caption=caption) as drawing:
        drawing.axes.plot([0.5, 1], [0.5, 1], color=SECOND_COLOUR, linestyle="--", linewidth=1.2, label="calibrated")
        x, y = [point[0] for point in points], [point[1] for point in points]
        errors = [[max(0.0, p[1] - p[2]) for p in points], [max(0.0, p[3] - p[1]) for p in points]]
        drawing.axes.errorbar(
            x, y, yerr=errors, fmt="o-", color=FIRST_COLOUR, capsize=3, markersize=5, label="measured"
        )
        drawing.axes.set_xlim(0.49, 1.01)
        drawing.axes.set_ylim(max(0.0, min([0.5, *(point[2] for point in points)]) - 0.02), 1.02)
        drawing.axes.set_xlabel("mean confidence, sigmoid(|reward difference|)")
        drawing.axes.set_ylabel("share right")
        drawing.axes.legend(frameon=False, labelcolor=_INK, loc="upper left")
    return drawing.html


@dataclass(frozen=True)
class Points:
    """Single measurements; hollow ones are set apart from the others, and labels stand beside them where given."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = FIRST_COLOUR
    is_hollow: bool = False
    errors: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper ends of vertical intervals."""


@dataclass(frozen=True)
class Band:
    """The space between two curves over a common x."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def log_log_figure(
    points: Sequence[Points],
    *,
    lines: Sequence[Line] = (),
    bands: Sequence[Band] = (),
    title: str,
    x_label: str,
    y_label: str,
    caption: str,
) -> str:
    """Draw points, curves and bands on logarithmic axes."""
    with _Figure(title, caption=caption) as drawing:
        axes = drawing.axes
        axes.set_xscale("log")
        axes.set_yscale("log")
        for band in bands:
            axes.fill_between(band.x, band.low, band.high, color=FIRST_COLOUR, alpha=0.15, linewidth=0)
        for line in lines:
            style = "--" if line.is_faint else "-"
            axes.plot(line.x, line.y, color=line.colour, linewidth=1.6, linestyle=style, label=line.label)
        for group in points:
            face = "none" if group.is_hollow else group.colour
            if group.errors is not None:
                ends = [[y - low for y, low in zip(group.y, group.errors[0], strict=True)]]
                ends += [[high - y for y, high in zip(group.y, group.errors[1], strict=True)]]
                axes.errorbar(group.x, group.y, yerr=ends, fmt="none", ecolor=group.colour, capsize=3, linewidth=1.2)
            axes.scatter(group.x, group.y, s=26, facecolors=face, edgecolors=group.colour, zorder=3, label=group.label)
        for axis in (axes.xaxis, axes.yaxis):
            _label_within_decades(axis)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    return drawing.html


def _label_within_decades(axis) -> None:
    """Losses span less than a decade, where a logarithmic axis labels next to nothing."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    if high / low < 10:
        axis.set_major_locator(MaxNLocator(6))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))


def histogram_figure(groups: Mapping[str, Sequence[float]], *, title: str, x_label: str, caption: str) -> str:
    """Draw up to two groups of numbers as overlaid histograms over common bins."""
    values = [value for group in groups.values() for value in group]
    with _Figure(title, caption=caption) as drawing:
        limits = (min(values), max(values)) if min(values) < max(values) else (values[0] - 0.5, values[0] + 0.5)
        # Filled against outlined: told apart without colour too.
        for (label, group), colour, kind in zip(
            groups.items(), (FIRST_COLOUR, SECOND_COLOUR), ("stepfilled", "step"), strict=False
        ):
            alpha = 0.45 if kind == "stepfilled" else 1.0
            drawing.axes.hist(
                group, bins=40, range=limits, color=colour, histtype=kind, alpha=alpha, linewidth=1.8, label=label
            )
        drawing.axes.set_xlabel(x_label)
        drawing.axes.set_ylabel("answers")
        drawing.axes.legend(frameon=False, labelcolor=_INK)
    return drawing.html


class _Figure:
    """One matplotlib figure while it is drawn (`axes`), and its `html` after the `with` block."""

    def __init__(self, title: str, *, caption: str, inches: tuple[float, float] = _FIGURE_INCHES):
        self._title, self._caption, self._inches = title, caption, inches
        self.html = ""

    def __enter__(self) -> "_Figure":
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # no pyplot: no global state, and the Agg canvas needs no display

        settings = {
            "svg.fonttype": "none",
            "svg.hashsalt": "megatron_polar",
            "font.size": 9,
            "axes.unicode_minus": True,
        }
        self._settings = rc_context({**settings, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _RULE})
        self._settings.__enter__()
        self._figure = Figure(figsize=self._inches, layout="constrained")
        self.axes = self._figure.add_subplot()
        self.axes.spines[["top", "right"]].set_visible(False)
        self.axes.tick_params(which="both", colors=_INK, length=3)
        self.axes.grid(True, color=_RULE, linewidth=0.6)
        self.axes.set_axisbelow(True)
        return self

    def __exit__(self, *exception) -> None:
        if exception[0] is None:
            buffer = io.StringIO()
            self._figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            self.html = (
                f"<figure><h3>{html.escape(self._title)}</h3>{_inline_svg(buffer.getvalue(), label=self._title)}"
                f"<figcaption>{html.escape(self._caption)}</figcaption></figure>\n"
            )
        self._settings.__exit__(*exception)


def _inline_svg(document: str, *, label: str) -> str:
    """Turn matplotlib's SVG document into an element of a page that follows the page's colours."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"(?=[^<]*viewBox)|\sxmlns(?::\w+)?="[^"]*"', "", svg)
    for variable, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    referenced = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda match: match.group(0) if match.group(1) in referenced else "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1)
