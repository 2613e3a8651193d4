"""Reports: one file that needs nothing else, with every plot and exactly the figures of the run."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_polar.errors import UserError
from megatron_polar.score.evaluate import evaluate
from megatron_polar.score.figures import Line, line_figure
from megatron_polar.score.page import Section, cards, number, share, table, write_report
from megatron_polar.score.report import evaluation_report, read_metrics, read_rewards, training_report
from megatron_polar.score.suites import EvaluationItem

VOID_ELEMENTS = {"meta", "br", "img", "input", "link", "hr", "path", "use", "circle", "rect", "line"}


class Page(HTMLParser):
    """The parts of a page that the tests look at; an element that is closed out of order is an error."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[tuple[str, bool]]] = []
        self.headings: list[str] = []
        self.num_plots = 0
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.addresses += [values[name] for name in ("src", "href", "xlink:href", "action") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        self.num_plots += tag == "svg" and values.get("role") == "img"
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", values.get("class") == "number"))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID_ELEMENTS:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID_ELEMENTS:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            text, is_number = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, is_number)


class Favouring:
    """A scorer that likes answers with the word "good", with noise that depends on the text alone."""

    def score(self, requests):
        return [[random.Random(o).gauss(1.2 if "good" in o else 0.0, 1.0) for o in r.outputs] for r in requests]


def metrics_rows(count: int) -> list[dict]:
    rng = random.Random(0)
    rows = []
    for iteration in range(1, count + 1):
        row = {
            "iteration": iteration,
            "rm/loss": 0.7 - 0.5 * iteration / count + rng.gauss(0, 0.02),
            "rm/accuracy": 0.5 + 0.4 * iteration / count,
            "rm/margin": rng.random(),
            "learning-rate": 1e-3 * iteration / count,
            "grad-norm": math.exp(rng.gauss(0, 0.3)),
            "iteration-time": 0.25,
            "comparisons/s": 200 + rng.random(),
            "tokens/physical_per_s": 12345.678,
        }
        if iteration % 10 == 0:
            row["validation/rm/accuracy"] = 0.5 + 0.35 * iteration / count
        rows.append(row)
    return rows


def write_metrics(directory: Path, rows: list[dict]) -> Path:
    path = directory / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_evaluation(output: Path, *, num_categories: int) -> dict:
    items = [
        EvaluationItem(
            f"item {i}",
            f"prompt {i}",
            "reference",
            (f"good {i}", f"bad {i} ..."),
            (0, 1),
            f"<{i % num_categories}>",
            "sft",
        )
        for i in range(120)
    ]
    return evaluate(Favouring(), items, output=output, suite="policies")


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    write_metrics(directory, metrics_rows(60))
    (directory / "config.yaml").write_text("data:\n  path: <b>&amp\n")
    (directory / "summary.json").write_text(
        json.dumps({"in_words": "a < b", "heldout_accuracy": 0.9312, "train_seconds": 1234.5})
    )
    run_evaluation(directory / "heldout", num_categories=3)
    return directory


@pytest.fixture(scope="module")
def page(run_directory) -> Page:
    return Page(training_report(run_directory, evaluations={"New prompts": run_directory / "heldout"}))


def test_the_report_needs_nothing_but_itself(page):
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link", page.text)
    assert all(address.startswith("#") for address in page.addresses)


def test_every_reference_inside_the_report_has_its_target(page):
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page.text))
    assert used and {first or second for first, second in used} <= set(page.ids)


def test_the_report_has_every_plot_under_its_heading(page):
    plots = ["Accuracy with 95 % intervals", "Rewards", "Reliability of the probabilities", "Accuracy and length"]
    plots += ["Loss", "Accuracy", "Margin", "Gradient norm", "Learning rate", "Throughput", "Tokens per second"]
    assert [heading for heading in page.headings if heading in plots] == plots
    assert "<p>a &lt; b</p>" in page.text
    assert page.num_plots == len(plots)


def test_no_colour_of_a_plot_is_fixed_so_that_dark_mode_can_change_it(page):
    assert set(re.findall(r"(?:fill|stroke): ?(#\w+)", page.text)) == set()
    assert "var(--series-1)" in page.text and "prefers-color-scheme: dark" in page.text


def test_the_table_holds_the_figures_of_the_metrics_file(page, run_directory):
    rows = read_metrics(run_directory / "metrics.jsonl")
    shown = {row[0][0]: [text for text, _ in row[1:]] for row in page.rows}
    for name in set().union(*rows) - {"iteration"}:
        values = [row[name] for row in rows if name in row]
        assert shown[name] == [number(v) for v in (values[0], values[-1], 60, min(values), max(values))]
    assert shown["tokens/physical_per_s"][1] == "12,346"


def test_the_evaluation_table_holds_the_figures_of_the_summary(page, run_directory):
    summary = json.loads((run_directory / "heldout" / "summary.json").read_text())
    shown = {row[0][0]: [text for text, _ in row[1:]] for row in page.rows}
    expected = {"all pairs (micro)": summary, **summary["categories"]}
    assert len(expected) == 4
    for name, entry in expected.items():
        assert shown[name] == [share(entry[key]) for key in ("accuracy", "low", "high", "num_pairs", "num_ties")]
    assert shown["mean of 3 categories (macro)"][0] == share(summary["macro_accuracy"])
    assert "Label-swap check: passed" in page.text


def test_numbers_are_right_aligned_and_names_are_not(page):
    assert all(is_number for row in page.rows for _, is_number in row[1:])
    assert not any(row[0][1] for row in page.rows)


def test_text_of_the_user_stays_text(page):
    assert "path: &lt;b&gt;&amp;amp" in page.text
    assert "&lt;0&gt;" in page.text and "<0>" not in page.text


def test_headline_figures_come_from_the_summary(page):
    assert "<b>0.9312</b><span>heldout accuracy</span>" in page.text


def test_a_run_without_summary_configuration_and_validation_is_reported(tmp_path):
    rows = [{"iteration": 3, "rm/loss": 0.69, "grad-norm": 0.0}]
    write_metrics(tmp_path, rows)
    page = Page(training_report(tmp_path))
    assert page.num_plots == 2
    assert ("0.69", True) in page.rows[-1]


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    write_metrics(tmp_path, [{"iteration": 1, "rm/loss": 0.7}, {"iteration": 2, "rm/loss": float("nan")}])
    page = Page(training_report(tmp_path))
    assert [text for text, _ in page.rows[-1]] == ["rm/loss", "0.7", "0.7", "1", "0.7", "0.7"]


def test_a_resumed_run_counts_its_later_lines(tmp_path):
    path = write_metrics(tmp_path, [{"iteration": i, "rm/loss": loss} for i, loss in ((1, 0.7), (2, 9.0), (2, 0.6))])
    assert [row["rm/loss"] for row in read_metrics(path)] == [0.7, 0.6]


def test_lines_that_cannot_be_read_are_left_out_named_and_counted(tmp_path, capfd):
    path = write_metrics(tmp_path, metrics_rows(3))
    events = tmp_path / "events.jsonl"
    events.write_text('{"time": 1.0, "event": "start", "step": 0, "origin": "random weights"}\n')
    training_report(tmp_path)
    assert capfd.readouterr().err == ""
    path.write_text("what\n" + path.read_text() + '{"iteration": 4, "rm/lo')
    events.write_text(events.read_text() + '{"time": 2.0}\n{"time": 3.0, "ev')
    assert "Reliability" in Page(training_report(tmp_path)).headings
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2, 3]
    first, second, third = capfd.readouterr().err.splitlines()
    assert first == third  # of the second reading
    assert first.startswith(f"warning: {path}:1: not a line of metrics (JSONDecodeError: ")
    assert first.endswith("; left out: 2 of 5 lines")
    assert second == f"warning: {events}: holds lines that are no events; left out: 2 of 3 lines"


def test_a_directory_without_metrics_is_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        training_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no finished iteration"):
        training_report(tmp_path)


def test_an_evaluation_alone_becomes_a_report(tmp_path):
    summary = run_evaluation(tmp_path, num_categories=1)
    page = Page(evaluation_report(summary, rewards=tmp_path / "rewards.jsonl", output=tmp_path / "report.html"))
    assert page.num_plots == 4 and "mean of 1" not in page.text
    assert page.headings[1:] == [
        *("Accuracy", "Accuracy with 95 % intervals", "Rewards"),
        *("Calibration", "Reliability of the probabilities", "Length", "Accuracy and length"),
    ]
    without = Page(evaluation_report(summary, rewards=None, output=tmp_path / "without.html"))
    assert without.num_plots == 3


def test_the_sections_hold_the_figures_of_the_summary(tmp_path):
    summary = run_evaluation(tmp_path, num_categories=1)
    page = Page(evaluation_report(summary, rewards=None, output=tmp_path / "report.html"))
    shown = {row[0][0]: [text for text, _ in row[1:]] for row in page.rows}
    for name, key in (
        ("rewards and length", "reward_and_length"),
        ("the known order and length", "quality_and_length"),
    ):
        found = summary["length_bias"][key]
        assert shown[name] == [share(found[entry]) for entry in ("correlation", "low", "high", "num_items")]
    for one in summary["calibration"]["bins"]:
        values = [share(one[key]) for key in ("num_pairs", "confidence", "accuracy")]
        assert shown[f"{one['low']:.2f} to {one['high']:.2f}"] == values
    fit = summary["calibration"]["fit"]
    assert shown["log loss"] == [share(fit["log_loss_before"]), share(fit["log_loss_after"])]
    assert f"<b>{number(summary['calibration']['ece'])}</b>" in page.text


def test_a_summary_of_an_older_version_is_shown_without_the_newer_sections(tmp_path):
    summary = run_evaluation(tmp_path, num_categories=1)
    newer = ("reference_scheme", "reference_scheme_meaning", "free_wins", "published", "policy_pairs", "calibration")
    older = {key: value for key, value in summary.items() if key not in (*newer, "length_bias")}
    page = Page(evaluation_report(older, rewards=None, output=tmp_path / "report.html"))
    assert page.headings[1:] == ["Accuracy", "Accuracy with 95 % intervals"]


def heat_of(tmp_path: Path, num_policies: int) -> tuple[dict, Page]:
    names = [f"<{number}>" for number in range(num_policies)]
    items = [
        EvaluationItem(
            f"{own}{other}", f"p{i}", "r", (f"good {own}{i}", f"x {other}"), (0, 1), "c", "sft", (own, other), own
        )
        for own in names
        for i, other in enumerate(names)
        if own != other
    ]
    summary = evaluate(Favouring(), items, output=tmp_path, suite="policies", reference_scheme="leave-one-out")
    return summary, Page(evaluation_report(summary, rewards=None, output=tmp_path / "report.html"))


def test_the_heat_map_holds_the_matrix_of_policies(tmp_path):
    summary, page = heat_of(tmp_path, 5)
    pairs = summary["policy_pairs"]
    columns = [text for text, _ in page.rows[[row[0][0] for row in page.rows].index("")]][3:]
    assert sorted(columns) == pairs["policies"]
    for row in (row for row in page.rows if row[0][0] in pairs["policies"] and len(row) == 8):
        own = pairs["policies"].index(row[0][0])
        for (text, _), other in zip(row[3:], map(pairs["policies"].index, columns), strict=True):
            accuracy = pairs["accuracy"][own][other]
            assert text == ("" if accuracy is None else f"{100 * accuracy:.0f}")
        assert row[1][0] == f"{100 * pairs['by_reference'][row[0][0]]['accuracy']:.0f}"
        assert row[2][0] == f"{100 * pairs['auc'][row[0][0]]['auc']:.0f}"
    assert page.num_plots == 4 and "AUC by the policy of the reference" in page.headings
    title = f'title="&lt;0&gt; / &lt;1&gt;: {pairs["accuracy"][0][1]:.4f} of 1">{100 * pairs["accuracy"][0][1]:.0f}'
    assert f"{title}<small>1</small>" in page.text and "<0>" not in page.text


def test_a_large_heat_map_keeps_its_counts_for_those_who_point_at_a_cell(tmp_path):
    _, page = heat_of(tmp_path, 26)
    assert 'class="heat dense"' in page.text and "<small>" not in page.text
    assert len(re.findall(r'<td style="background[^"]*" title="[^"]* of 1">', page.text)) == 26 * 25


def test_rewards_are_those_of_the_best_and_the_worst_answers(tmp_path):
    lines = [{"levels": [0, 1, 2], "rewards": [3.0, 2.0, 1.0]}, {"levels": [1, 0], "rewards": [-1.0, 5.0]}]
    (tmp_path / "rewards.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_rewards(tmp_path / "rewards.jsonl") == {"best answers": [3.0, 5.0], "worst answers": [1.0, -1.0]}


def test_a_long_curve_is_thinned_to_means():
    steps = range(100_000)
    figure = line_figure([Line("y", steps, [7.0] * len(steps))], title="t", x_label="x", caption="c")
    assert len(figure) < 60_000


def test_the_same_run_gives_the_same_bytes(run_directory):
    first = training_report(run_directory).read_bytes()
    assert training_report(run_directory).read_bytes() == first


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1234567, "1,234,567"), (0.123456, "0.1235"), (12345.6, "12,346"), (float("nan"), "nan"), (2.0, "2")],
)
def test_numbers_are_written_for_reading(value, text):
    assert number(value) == text


def test_parts_can_be_put_together_by_hand(tmp_path):
    body = cards({"runs": 3}) + table(("name", "value"), [("a<b", 1.5), ("c", None)], caption="Two rows")
    page = Page(write_report(tmp_path / "new" / "x.html", title="A & B", subtitle="", sections=[Section("One", body)]))
    assert [text for text, _ in page.rows[1]] == ["a<b", "1.5"]
    assert page.headings == ["A & B", "One"]
    assert not list((tmp_path / "new").glob("*.partial"))


def test_training_and_validation_rows_of_one_iteration_are_both_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 5, "rm/loss": 0.5}\n{"iteration": 5, "validation/rm/accuracy": 0.75}\n')
    assert read_metrics(path) == [{"iteration": 5, "rm/loss": 0.5, "validation/rm/accuracy": 0.75}]
