"""One self-contained HTML page of tables and figures: inline CSS and SVG, no network, readable in light and in dark."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_polar.manifest import write_durably
from megatron_polar.score.figures import FIRST_COLOUR, SECOND_COLOUR

_HEAT_COUNTS = 24  # columns up to which a heat map writes its counts out

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f23; --paper: #ffffff; --card: #f5f6f8; --rule: #d0d4d9; --soft: #57606a;
  --series-1: #0072b2; --series-2: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #14171a; --card: #1e2226; --rule: #3a4047;
  --soft: #9aa4ae; --series-1: #56b4e9; --series-2: #f0a13a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 2rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .8rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { max-width: 46rem; }
.soft, figcaption, caption { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.5rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem 2rem;
  margin-top: 1.2rem; align-items: start; }
figure { margin: 0; }
figcaption { font-size: .85rem; }
figure svg { width: 100%; max-width: 36rem; height: auto; display: block; }
svg text { font-family: inherit !important; fill: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: .85rem; padding-bottom: .4rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; white-space: nowrap; }
thead th { border-bottom-width: 2px; }
tbody th { font-weight: 400; }
th.number, td.number { text-align: right; }
table.heat { font-size: .8rem; }
table.heat th, table.heat td { padding: .15rem .3rem; border: 1px solid var(--rule); text-align: center; }
table.heat th { font-weight: 400; text-align: right; border: none; }
table.heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; vertical-align: top; }
table.heat small { display: block; color: var(--soft); font-size: .65rem; line-height: 1; }
table.heat td.total, table.heat thead td { border-color: transparent; }
table.heat caption div { position: sticky; left: 0; min-width: 22rem; max-width: 46rem; }
table.heat.dense { font-size: .68rem; }
table.heat.dense td { padding: .1rem .12rem; min-width: 1.3rem; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); padding: 1rem; border-radius: .5rem; overflow-x: auto; font-size: .85rem; }
"""


@dataclass(frozen=True)
class Section:
    """One part of a report: a heading, and HTML made by the functions of this file."""

    heading: str
    body: str


def write_report(output: Path, *, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write one HTML file that needs nothing else; it replaces an older one in a single step."""
    parts = [f"<section><h2>{html.escape(section.heading)}</h2>\n{section.body}</section>" for section in sections]
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<header><h1>{html.escape(title)}</h1>\n"
        f'<p class="soft">{html.escape(subtitle)}</p></header>\n<main>\n'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output, page.encode(errors="replace"), suffix=".partial")
    return output


def number(value: float | int | None) -> str:
    """Write a number for reading: whole numbers with thousands separators, others with four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    if math.isfinite(value) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def share(value: float | int | None) -> str:
    """Write a share with four decimals, so that a column of them lines up; counts and None as `number` does."""
    return f"{value:.4f}" if isinstance(value, float) else number(value)


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str | float | int | None]],
    *,
    caption: str,
    write_number: Callable[[float | int | None], str] = number,
) -> str:
    """Make a table whose first column names the rows; numbers (and None) are right-aligned, texts are escaped."""
    is_number = [all(not isinstance(row[column], str) for row in rows) for column in range(len(headers))]
    css = [' class="number"' if numeric else "" for numeric in is_number]
    head = "".join(f'<th scope="col"{css[i]}>{html.escape(text)}</th>' for i, text in enumerate(headers))
    lines = []
    for row in rows:
        cells = [html.escape(value) if isinstance(value, str) else write_number(value) for value in row]
        first, *others = (f"{style}>{cell}" for style, cell in zip(css, cells, strict=True))
        lines.append(f'<tr><th scope="row"{first}</th>' + "".join(f"<td{cell}</td>" for cell in others) + "</tr>")
    return (
        f'<div class="scroll"><table><caption>{html.escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>\n"
    )


@dataclass(frozen=True)
class HeatMap:
    """Shares by row and column, [rows, columns], None where there is none, each from so many observations.

    `totals` are further columns, by heading, before the others and not coloured.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    shares: Sequence[Sequence[float | None]]
    counts: Sequence[Sequence[int]]
    totals: Mapping[str, Sequence[float | None]]


def heat_map(cells: HeatMap, *, caption: str) -> str:
    """Make a table of percentages, the bluer the further above one half, the more orange the further below.

    A table stays readable at any number of columns, with a screen reader and without colour, which a picture does not.
    Each cell says its names and its count when pointed at; small tables write the counts out.
    """
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in (*cells.totals, *cells.columns))
    is_small = len(cells.columns) <= _HEAT_COUNTS
    lines = []
    for index, name in enumerate(cells.rows):
        row = "".join(f'<td class="total">{_percent(values[index])}</td>' for values in cells.totals.values())
        row += "".join(
            _heat_cell(share, count, name=f"{name} / {column}", has_count=is_small)
            for column, share, count in zip(cells.columns, cells.shares[index], cells.counts[index], strict=True)
        )
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{row}</tr>')
    return (
        f'<div class="scroll"><table class="heat{"" if is_small else " dense"}">'
        f"<caption><div>{html.escape(caption)}</div></caption>\n"
        f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>" + "\n".join(lines) + "</tbody></table></div>\n"
    )


def _heat_cell(share: float | None, count: int, *, name: str, has_count: bool) -> str:
    if share is None:
        return "<td></td>"
    red, green, blue = bytes.fromhex((FIRST_COLOUR if share >= 0.5 else SECOND_COLOUR)[1:])
    strength = min(1.0, abs(2 * share - 1)) * 0.65  # the ink stays readable on it, in light and in dark
    title = html.escape(f"{name}: {share:.4f} of {count:,}", quote=True)
    small = f"<small>{count:,}</small>" if has_count else ""
    style = f"background: rgb({red} {green} {blue} / {strength:.2f})"
    return f'<td style="{style}" title="{title}">{_percent(share)}{small}</td>'


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"


def cards(figures: Mapping[str, float | int | str | None]) -> str:
    """Make a row of headline figures from name → value."""
    boxes = [
        f'<div class="card"><b>{html.escape(value) if isinstance(value, str) else number(value)}</b>'
        f"<span>{html.escape(name)}</span></div>"
        for name, value in figures.items()
    ]
    return f'<div class="cards">{"".join(boxes)}</div>\n'
