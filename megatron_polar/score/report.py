"""`report.html` of a training run and of an evaluation: curves, accuracies with intervals, and what was configured."""

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_polar import log
from megatron_polar.data.pair_counts import PAIRS
from megatron_polar.errors import UserError
from megatron_polar.score.evaluation_sections import further_sections, references_text
from megatron_polar.score.figures import (
    FIRST_COLOUR,
    SECOND_COLOUR,
    Line,
    histogram_figure,
    interval_figure,
    line_figure,
)
from megatron_polar.score.page import Section, cards, share, table, write_report
from megatron_polar.score.pair_matrix import pairs_section
from megatron_polar.score.reference_page import references_body
from megatron_polar.train.checkpoint_files import list_steps
from megatron_polar.train.journal import EVENTS, goodput, read_events, read_rows

_MOST_EVENTS = 200

_CURVES = (  # heading, y axis, caption, metrics: the first is drawn in blue, the second in orange
    (
        "Loss",
        "linear",
        "-log sigmoid of the reward difference, mean over pairs; log 2 = 0.693 is chance.",
        ("rm/loss", "validation/rm/loss"),
    ),
    (
        "Accuracy",
        "linear",
        "Share of pairs in the right order; 0.5 is chance.",
        ("rm/accuracy", "validation/rm/accuracy"),
    ),
    (
        "Margin",
        "linear",
        "Reward of the better answer minus that of the worse one.",
        ("rm/margin", "validation/rm/margin"),
    ),
    ("Gradient norm", "log", "Before clipping.", ("grad-norm",)),
    ("Learning rate", "linear", "As the schedule sets it.", ("learning-rate",)),
    ("Throughput", "from zero", "Comparisons per second, all ranks together.", ("comparisons/s",)),
    (
        "Tokens per second",
        "from zero",
        "Physical tokens, padding included, all ranks together.",
        ("tokens/physical_per_s",),
    ),
)


_LARGEST = 1e300
"""What is larger cannot be drawn."""


def read_metrics(path: Path) -> list[dict]:
    """Read `metrics.jsonl` in order of iteration: the training and held-out rows of one iteration become one.

    Where a resumed run wrote a figure twice, the later line counts. Lines that cannot be read, such as the half line
    that a killed run leaves, are left out with a warning. UserError where no line is left.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file, so there is nothing to report; name a directory that `train` has written"
        )
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: dict[int, dict] = {}
    unreadable = []
    for line_number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["iteration"], int) or abs(row["iteration"]) >= 2**63:
                raise TypeError("iteration is not a number of steps")
            rows.setdefault(row["iteration"], {}).update(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            unreadable.append(f"{path}:{line_number}: not a line of metrics ({type(error).__name__}: {error})")
    if unreadable:
        log.warn(f"{unreadable[0]}; left out: {len(unreadable)} of {len(lines)} lines")
    if not rows:
        raise UserError(f"{path}: holds no finished iteration, so there is nothing to report; train for longer")
    return [rows[iteration] for iteration in sorted(rows)]


def _points(rows: Sequence[dict], metric: str) -> tuple[list[float], list[float]]:
    present = [row for row in rows if isinstance(row.get(metric), int | float) and abs(row[metric]) < _LARGEST]
    return [row["iteration"] for row in present], [row[metric] for row in present]


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    smooth, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        smooth.append(total / min(index + 1, window))
    return smooth


def _curves(rows: Sequence[dict]) -> str:
    figures = []
    for heading, y_axis, caption, metrics in _CURVES:
        lines: list[Line] = []
        for metric, colour in zip(metrics, (FIRST_COLOUR, SECOND_COLOUR), strict=False):
            x, y = _points(rows, metric)
            window = len(y) // 20
            if not y:
                continue
            if len(y) == len(rows) and window >= 2 and metric.startswith("rm/"):
                lines.append(Line(f"{metric}, each iteration", x, y, colour, is_faint=True))
                lines.append(Line(f"{metric}, mean of {window}", x, _smoothed(y, window), colour))
            else:
                lines.append(Line(metric, x, y, colour, has_markers=len(y) < len(rows)))
        if lines:
            figures.append(line_figure(lines, title=heading, x_label="iteration", caption=caption, y_axis=y_axis))
    return f'<div class="figures">{"".join(figures)}</div>\n'


def _metrics_table(rows: Sequence[dict]) -> str:
    names = sorted({name for row in rows for name in row} - {"iteration"})
    lines = []
    for name in names:
        x, y = _points(rows, name)
        if y:
            lines.append((name, y[0], y[-1], int(x[-1]), min(y), max(y)))
    headers = ("metric", "first", "last", "at iteration", "lowest", "highest")
    return table(headers, lines, caption="Every number of metrics.jsonl, rounded to four significant digits.")


def _read_events(run_directory: Path) -> list[dict]:
    """`read_events`, with a warning of lines that are none."""
    events, path = read_events(run_directory), run_directory / EVENTS
    num_lines = len(path.read_bytes().splitlines()) if path.is_file() else 0
    if num_lines > len(events):
        log.warn(f"{path}: holds lines that are no events; left out: {num_lines - len(events)} of {num_lines} lines")
    return events


def _reliability(events: Sequence[dict], *, rows: Sequence[dict]) -> str:
    """Where the time went, and what happened, over all restarts of a run."""
    found = goodput(events, rows)
    cards_shown = {
        "effective training time": f"{found.ettr:.1%}",
        "wall clock": log.format_seconds(found.wall_seconds),
        "restarts": found.restarts,
        "steps done again": found.lost_steps,
        "steps skipped": found.skipped_steps,
        "saves failed": found.failed_saves,
        "standing still to save": log.format_seconds(found.stall_seconds),
    }
    first = events[0]["time"]
    lines = [
        (log.format_seconds(event["time"] - first), event["event"], event.get("step", ""), _describe_event(event))
        for event in events
    ]
    headers = ("after", "event", "iteration", "")
    shown = table(headers, lines[-_MOST_EVENTS:], caption="Hours, minutes and seconds since the first start.")
    count = f"the last {_MOST_EVENTS} of {len(lines)}" if len(lines) > _MOST_EVENTS else str(len(lines))
    return f"{cards(cards_shown)}<details><summary>events ({count})</summary>{shown}</details>\n"


def _describe_event(event: dict) -> str:
    if event["event"] == "start":
        return f"from {event['origin']}" + (f", {event['lost_steps']} steps lost" if event.get("lost_steps") else "")
    if event["event"] == "save":
        return event["problem"] or f"{event['seconds']:.1f} s, of which {event['stalled_seconds']:.1f} s standing still"
    if event["event"] == "straggler":
        ranks = event.get("ranks", [event["rank"]])
        who = f"rank {ranks[0]} takes" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} take"
        return f"{who} {event['ratio']:.2f} times as long as the others"
    return str(event.get("reason", ""))


def read_rewards(path: Path) -> dict[str, list[float]]:
    """Read the `rewards.jsonl` of an evaluation as the rewards of the best and of the worst answers of every item."""
    groups: dict[str, list[float]] = {"best answers": [], "worst answers": []}
    for line in path.read_bytes().splitlines():  # of text it would end lines at U+2028, too, which names may hold
        item = json.loads(line)
        if not all(isinstance(reward, float) and math.isfinite(reward) for reward in item["rewards"]):
            raise ValueError("rewards that are no numbers")
        for reward, level in zip(item["rewards"], item["levels"], strict=True):
            if level == min(item["levels"]):
                groups["best answers"].append(reward)
            elif level == max(item["levels"]):
                groups["worst answers"].append(reward)
    return groups


def _evaluation_body(summary: dict, rewards: dict[str, list[float]] | None) -> str:
    overall = [
        ("all pairs (micro)", summary),
        ("pairs of matched length", summary["length_matched"]),
        ("pairs whose better answer is shorter", summary["better_is_shorter"]),
    ]
    categories = sorted(summary["categories"].items())
    rows: list[tuple] = [_accuracy_row(name, entry) for name, entry in overall]
    if len(categories) > 1:
        macro = (summary["macro_accuracy"], summary["macro_low"], summary["macro_high"])
        counts = (summary["num_pairs"], summary["num_ties"])
        rows.insert(1, (f"mean of {len(categories)} categories (macro)", *macro, *counts))
        rows += [_accuracy_row(name, entry) for name, entry in categories]
    check = (
        f"Label-swap check: {summary['swap_check']}; "
        f"the accuracy with swapped labels is {share(summary['swapped_accuracy'])}. "
        f"Preferring the longer answer would reach {share(summary['length_only_accuracy'])}, "
        f"counting the words shared with the reference {share(summary['word_overlap_accuracy'])}; "
        f"the tie rate is {share(summary['tie_rate'])}."
    )
    intervals = [(row[0], row[1], row[2], row[3]) for row in rows if row[1] is not None]
    figures = interval_figure(intervals, title="Accuracy with 95 % intervals", caption="Dashed: chance, 0.5.")
    if rewards and all(rewards.values()):
        caption = "The further apart, the better; rewards have no absolute zero."
        figures += histogram_figure(rewards, title="Rewards", x_label="reward", caption=caption)
    headers = ("group of pairs", "accuracy", "95 % from", "to", "pairs", "ties")
    caption = "Accuracy: share of pairs in the right order, a tie counts half; chance has 0.5."
    accuracies = table(headers, rows, caption=caption, write_number=share)
    several = (
        f"<h3>Several references</h3>\n{references_body(summary['references'])}" if "references" in summary else ""
    )
    body = f'<p>{html.escape(check)}</p>\n{accuracies}<div class="figures">{figures}</div>\n{several}'
    return references_text(summary) + body


def _accuracy_row(name: str, entry: dict) -> tuple:
    return (name, *(entry[key] for key in ("accuracy", "low", "high", "num_pairs", "num_ties")))


def evaluation_report(summary: dict, *, rewards: Path | None, output: Path) -> Path:
    """Write an evaluation as one HTML file: accuracies with intervals, rewards, and the sections of analysis.py.

    `summary` is what `score.evaluate.evaluate` returns, `rewards` the `rewards.jsonl` that it writes. Returns `output`.
    """
    groups = None if rewards is None else read_rewards(rewards)
    sections = [Section("Accuracy", _evaluation_body(summary, groups)), *further_sections(summary)]
    subtitle = f"{summary['num_items']:,} items, {summary['num_pairs']:,} pairs"
    if summary.get("num_references", 1) > 1:
        subtitle += f", {summary['num_references']} references each"
    subtitle += f"; reference: {summary['reference_scheme']}" if "reference_scheme" in summary else ""
    if summary.get("checkpoint"):
        subtitle += f"; {summary['checkpoint']}"
    return write_report(output, title=f"Evaluation: {summary['suite']}", subtitle=subtitle, sections=sections)


@contextmanager
def _refusing_odd_files(directory: Path) -> Iterator[None]:
    """One line for a summary or rewards that `evaluate` has not written."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(
            f"{directory}: its summary.json or rewards.jsonl is not what `evaluate` writes ({reason}); evaluate again"
        ) from error


def has_report(run_directory: Path) -> bool:
    """Whether the report of a run was drawn after its last save."""
    report, steps = run_directory / "report.html", list_steps(run_directory)
    return report.is_file() and bool(steps) and steps[0].stat().st_mtime <= report.stat().st_mtime


def training_report(run_directory: Path, *, evaluations: Mapping[str, Path] | None = None) -> Path:
    """Write `report.html` into a run directory from its metrics, configuration and `summary.json`, where they are.

    Texts in `summary.json` stand above its numbers. `evaluations` are output directories of `evaluate` by the heading
    to show. Returns the report's path.
    """
    rows = read_metrics(run_directory / "metrics.jsonl")
    sections = []
    summary_path, config_path = run_directory / "summary.json", run_directory / "config.yaml"
    if summary_path.is_file():
        with _refusing_odd_files(run_directory):
            summary = json.loads(summary_path.read_text(encoding="utf-8"))
            figures = {
                name.replace("_", " "): value for name, value in summary.items() if isinstance(value, int | float)
            }
            told = "".join(f"<p>{html.escape(text)}</p>\n" for text in summary.values() if isinstance(text, str))
            sections.append(Section("Result", told + cards(figures)))
    for name, directory in (evaluations or {}).items():
        with _refusing_odd_files(directory):
            evaluation = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
            sections.append(Section(name, _evaluation_body(evaluation, read_rewards(directory / "rewards.jsonl"))))
            sections += further_sections(evaluation, prefix=f"{name}: ")
    sections.append(Section("Curves", _curves(rows)))
    if (run_directory / PAIRS).is_file():
        pairs = pairs_section(run_directory / PAIRS)
        sections += [pairs] if pairs else []
    events = _read_events(run_directory)
    if events:
        sections.append(Section("Reliability", _reliability(events, rows=read_rows(run_directory))))
    sections.append(Section("Figures", _metrics_table(rows)))
    if config_path.is_file():
        config = html.escape(config_path.read_text(encoding="utf-8", errors="replace"))
        folded = f"<details><summary>config.yaml</summary><pre>{config}</pre></details>\n"
        sections.append(Section("Configuration", folded))
    first, last = rows[0]["iteration"], rows[-1]["iteration"]
    subtitle = f"{run_directory.name}: iterations {first:,} to {last:,}"
    return write_report(run_directory / "report.html", title="POLAR training run", subtitle=subtitle, sections=sections)
