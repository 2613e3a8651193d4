"""`fit` on tables of runs: known laws are found, runs that cannot be compared are refused, the files say all of it."""

import json

import numpy as np
import pytest

from megatron_polar.cli import main
from megatron_polar.errors import USER_ERROR, UserError
from megatron_polar.scaling.fit import Settings, fit_runs
from megatron_polar.scaling.gather import gather_runs
from megatron_polar.scaling.laws import PUBLISHED
from megatron_polar.scaling.runs import ScalingRun
from megatron_polar.scaling.selection import pareto_frontier

COLUMNS = ("name", "parameters", "loss", "tokens", "flops", "seed", "held_out", "tokenizer")


def write_table(path, rows):
    """A CSV of rows, which are mappings."""
    lines = [",".join(COLUMNS)]
    lines += [",".join(str(row.get(column, "")) for column in COLUMNS) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def fixed_tokens(*, noise: float = 0.002, seed: int = 1, count: int = 6, **changes) -> list[dict]:
    """The paper's law of N with noise, every size on 54B tokens."""
    law, generator = PUBLISHED["loss_of_parameters"], np.random.default_rng(seed)
    rows = []
    for size in np.geomspace(5e7, 1e9, count):
        loss = law.loss(size) * np.exp(generator.normal(0, noise))
        row = {"name": f"n{size:.0f}", "parameters": int(size), "loss": loss, "tokens": 54e9, "flops": 6 * size * 54e9}
        rows.append(row | {"held_out": "h", "tokenizer": "t"} | changes)
    return rows


def grid(*, noise: float = 0.003) -> list[dict]:
    """0.2 + 6 N^-0.3 + 40 D^-0.28 with noise, five sizes and four amounts of data."""
    generator = np.random.default_rng(5)
    rows = []
    for size in np.geomspace(1e6, 1e9, 5):
        for tokens in np.geomspace(1e8, 1e11, 4):
            loss = (0.2 + 6 * size**-0.3 + 40 * tokens**-0.28) * np.exp(generator.normal(0, noise))
            row = {"parameters": int(size), "loss": loss, "tokens": tokens, "flops": 6 * size * tokens}
            rows.append(row | {"name": f"n{size:.0f}_d{tokens:.0f}"})
    return rows


def fitted(tmp_path, *inputs, options=(), name="out") -> dict:
    """fit.json of a command that succeeds."""
    arguments = ["fit", *map(str, inputs), "--output", str(tmp_path / name), "--replicates", "100", *options]
    assert main(arguments) == 0
    return json.loads((tmp_path / name / "fit.json").read_text())


def refusal(capsys, tmp_path, *inputs, options=()) -> str:
    """The one error line of a command that must be refused, with nothing written."""
    capsys.readouterr()
    assert main(["fit", *map(str, inputs), "--output", str(tmp_path / "refused"), *options]) == USER_ERROR
    assert not (tmp_path / "refused").exists()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


def holds(figure: dict, truth: float) -> bool:
    return figure["low"] <= truth <= figure["high"]


# --- What is found ---------------------------------------------------------------------------------------------------


def test_the_papers_own_law_is_found_from_runs_that_follow_it(tmp_path, capsys):
    found = fitted(tmp_path, write_table(tmp_path / "runs.csv", fixed_tokens()))
    law, published = found["laws"]["loss_of_parameters"], PUBLISHED["loss_of_parameters"]
    assert holds(law["exponent"], published.exponent)
    assert holds(law["coefficient"], published.coefficient)
    assert law["exponent"]["high"] - law["exponent"]["low"] < 0.01
    assert law["r_squared"] > 0.98
    assert law["paper"]["exponent_inside_our_interval"] is True
    assert law["paper"]["source"] == "arXiv 2507.05197, section 4.4"
    largest = law["largest_held_out"]
    assert largest["runs"] == ["n1000000000"]
    assert largest["inside_interval"] is True
    assert abs(largest["error"]) < 0.01
    assert largest["error"] == pytest.approx(largest["predicted"]["value"] / largest["real"] - 1)
    assert found["conventions"]["N"] == "weights without the embedding"
    printed = capsys.readouterr().out
    assert "L = a N^-alpha   over 6 runs" in printed
    assert "which is inside our interval" in printed
    assert f"error {largest['error']:+.2%}" in printed


def test_another_law_is_not_taken_for_the_papers(tmp_path):
    rows = [row | {"loss": 20 * row["parameters"] ** -0.2} for row in fixed_tokens()]
    law = fitted(tmp_path, write_table(tmp_path / "runs.csv", rows))["laws"]["loss_of_parameters"]
    assert law["exponent"]["value"] == pytest.approx(0.2)
    assert law["paper"]["exponent_inside_our_interval"] is False


def test_the_joint_law_and_the_floor_are_found_from_a_grid(tmp_path):
    found = fitted(tmp_path, write_table(tmp_path / "runs.csv", grid()))
    joint = found["laws"]["loss_of_parameters_and_data"]
    for name, truth in (("parameters_exponent", 0.3), ("data_exponent", 0.28), ("irreducible", 0.2)):
        assert holds(joint[name], truth), name
    assert holds(joint["optimal_parameters_exponent"], 0.28 / 0.58)
    assert joint["huber_delta"] == pytest.approx(1.345 * 0.003, rel=0.6)
    assert abs(joint["largest_held_out"]["error"]) < 0.01
    # L(N) from the runs with the most data of each size, for which the floor is what 100B tokens leave.
    floor = found["laws"]["loss_of_parameters_with_floor"]
    assert floor["num_runs"] == 5
    assert holds(floor["irreducible"], 0.2 + 40 * 1e11**-0.28)
    assert found["laws"]["loss_of_compute"]["num_runs"] < 20


def seeds(*, num_sizes: int, amounts: tuple[float, ...] = (54e9,)) -> list[dict]:
    """Three runs of each setting, whose tokens and FLOPs differ by up to 0.4 %, as those of other seeds do."""
    generator, rows = np.random.default_rng(3), []
    for size in np.geomspace(5e7, 1e9, num_sizes):
        for tokens in amounts:
            for seed in range(3):
                own = tokens * (1 + generator.uniform(-0.004, 0.004))
                loss = (0.9 * size**-0.0425 + 40 * tokens**-0.28) * np.exp(generator.normal(0, 0.002))
                row = {"parameters": int(size), "loss": loss, "tokens": own, "flops": 6 * size * own, "seed": seed}
                rows.append(row | {"name": f"n{size:.0f}_d{tokens:.0f}_s{seed}"})
    return rows


def test_all_seeds_of_the_largest_setting_are_predicted_from_the_others(tmp_path):
    """None of them stays in the fit, though their tokens and FLOPs are not quite the same."""
    found = fitted(tmp_path, write_table(tmp_path / "four.csv", seeds(num_sizes=4)), name="four")["laws"]
    most = [f"n1000000000_d54000000000_s{seed}" for seed in range(3)]
    for name in ("loss_of_parameters", "loss_of_compute"):
        assert sorted(found[name]["largest_held_out"]["runs"]) == most, name
    # Three sizes leave two.
    found = fitted(tmp_path, write_table(tmp_path / "three.csv", seeds(num_sizes=3)), name="three")["laws"]
    assert all(law["largest_held_out"] is None for law in found.values())
    amounts = (1e9, 8e9, 54e9)
    found = fitted(tmp_path, write_table(tmp_path / "grid.csv", seeds(num_sizes=4, amounts=amounts)), name="grid")
    assert sorted(found["laws"]["loss_of_parameters_and_data"]["largest_held_out"]["runs"]) == most


def test_equal_seeds_give_equal_files_and_others_other_intervals(tmp_path):
    table = write_table(tmp_path / "runs.csv", fixed_tokens())
    first, again = (fitted(tmp_path, table, name=name) for name in ("a", "b"))
    other = fitted(tmp_path, table, options=("--seed", "3"), name="c")
    assert first == again
    figures = [found["laws"]["loss_of_parameters"]["exponent"] for found in (first, other)]
    assert figures[0]["value"] == figures[1]["value"]
    assert figures[0]["low"] != figures[1]["low"]


def test_the_report_is_one_file_with_plots(tmp_path):
    fitted(tmp_path, write_table(tmp_path / "runs.csv", grid()))
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 5
    assert "http" not in page.replace("http://www.w3.org", "")
    for text in ("Beside the paper", "0.0425", "0.0342", "The largest run, predicted from the others", "n1000000_d1"):
        assert text in page


def test_jsonl_tables_say_the_same(tmp_path):
    rows = fixed_tokens()
    csv = write_table(tmp_path / "runs.csv", rows)
    jsonl = tmp_path / "runs.jsonl"
    jsonl.write_text("".join(json.dumps(row | {"remark": "x"}) + "\n" for row in rows))
    assert fitted(tmp_path, csv, name="a")["laws"] == fitted(tmp_path, jsonl, name="b")["laws"]


def test_a_column_that_is_nearly_called_right_is_refused_and_others_are_named(tmp_path, capsys):
    rows = fixed_tokens()
    text = write_table(tmp_path / "runs.csv", rows).read_text()
    (tmp_path / "typo.csv").write_text(text.replace("tokens,", "token,", 1))
    assert "typo.csv:2: a column called 'token'; did you mean 'tokens'?" in refusal(
        capsys, tmp_path, tmp_path / "typo.csv"
    )
    (tmp_path / "bare.csv").write_text(text.partition("\n")[2])
    assert "parameters is missing" in refusal(capsys, tmp_path, tmp_path / "bare.csv")
    assert "line 1 of a CSV is its header" in refusal(capsys, tmp_path, tmp_path / "bare.csv")
    lines = text.splitlines()
    (tmp_path / "more.csv").write_text(
        "\n".join([lines[0] + ",remarks", *(line + ",good" for line in lines[1:])]) + "\n"
    )
    fitted(tmp_path, tmp_path / "more.csv")
    assert "more.csv: not used: remarks" in capsys.readouterr().err


# --- Which runs make which law ---------------------------------------------------------------------------------------


def runs_of(rows, **changes) -> list[ScalingRun]:
    known = {key for key in COLUMNS if key not in ("seed",)}
    return [ScalingRun(**{key: value for key, value in row.items() if key in known}, **changes) for row in rows]


def test_the_frontier_has_the_runs_that_no_cheaper_one_beats():
    points = [(1.0, 0.6), (2.0, 0.65), (3.0, 0.5), (3.5, 0.55), (5.0, 0.45), (4.0, 0.45), (9.0, 0.3)]
    runs = [ScalingRun(str(i), 10, loss, flops=flops) for i, (flops, loss) in enumerate(points)]
    assert [run.name for run in pareto_frontier(runs, count="parameters")] == ["0", "2", "5", "6"]


def test_seeds_of_one_setting_stand_and_fall_together():
    """Means 0.6, 0.55, 0.57 and 0.5: the third setting falls, and its lucky seed with it."""
    points = [(1.0, 0.6), (2.0, 0.5), (2.01, 0.6), (3.0, 0.49), (3.01, 0.65), (4.0, 0.5)]
    runs = [ScalingRun(str(i), 10, loss, flops=flops) for i, (flops, loss) in enumerate(points)]
    assert [run.name for run in pareto_frontier(runs, count="parameters")] == ["0", "1", "2", "5"]


def iso_flop_runs(*, scatter: float, budgets=(1e19, 1e20, 1e21, 1e22), seed: int = 0) -> list[ScalingRun]:
    """Six sizes a budget on 0.2 + 400 N^-0.34 + 410 D^-0.28, without noise; FLOPs scatter around their budget."""
    generator, runs = np.random.default_rng(seed), []
    for budget in budgets:
        for size in np.sqrt(budget / 120) * np.geomspace(0.2, 5, 6):
            flops = budget * np.exp(generator.uniform(-scatter, scatter))
            loss = 0.2 + 400 * size**-0.34 + 410 * (budget / (6 * size)) ** -0.28
            runs.append(ScalingRun(f"{budget:.0e}-{size:.0f}", int(size), loss, flops=flops))
    return runs


@pytest.mark.parametrize("scatter", (0.0, 1e-6, 0.04))
def test_of_every_budget_the_best_size_counts_whichever_is_a_hair_cheaper(scatter):
    """Whole steps never come to a budget exactly."""
    exact = [run.name for run in pareto_frontier(iso_flop_runs(scatter=0.0), count="parameters")]
    assert [name.partition("-")[0] for name in exact] == ["1e+19", "1e+20", "1e+21", "1e+22"]
    for seed in range(10):
        runs = iso_flop_runs(scatter=scatter, seed=seed)
        assert [run.name for run in pareto_frontier(runs, count="parameters")] == exact
        law = fit_runs(runs, Settings(replicates=2)).laws["loss_of_compute"]
        assert law.prediction.runs == tuple(exact[-1:])
    assert "20 of 24 runs are left out, as others as cheap are better" in law.remarks[0]


def test_sizes_of_one_budget_make_no_law_of_compute():
    runs = iso_flop_runs(scatter=1e-6, budgets=(1e19,))
    missing = fit_runs(runs, Settings(replicates=2)).missing["loss_of_compute"]
    assert "1 amounts of compute at least a tenth apart, and a law needs 3" in missing


def test_what_is_predicted_for_compute_has_no_run_of_its_budget_in_the_fit():
    """Every size has one amount of compute, and two sizes have the largest."""
    points = [(1, 1e18), (2, 1e19), (3, 1e20), (4, 1e21), (5, 1.00001e21)]
    runs = [ScalingRun(str(size), size, flops**-0.03, flops=flops) for size, flops in points]
    prediction = fit_runs(runs, Settings(replicates=2)).laws["loss_of_compute"].prediction
    assert prediction.runs == ("5",) and abs(prediction.error) < 1e-9


def test_of_a_ladder_with_one_budget_a_size_noise_chooses_no_runs():
    """2 % of noise: over many ladders the exponent is the paper's, which the runs that happen to be better exceed."""
    found = []
    for seed in range(60):
        law, generator = PUBLISHED["loss_of_compute"], np.random.default_rng(seed)
        flops = np.geomspace(1e18, 1e21, 8)
        losses = law.loss(flops) * np.exp(generator.normal(0, 0.02, 8))
        runs = [ScalingRun(str(i), i + 1, loss, flops=c) for i, (loss, c) in enumerate(zip(losses, flops, strict=True))]
        assert len(pareto_frontier(runs, count="parameters")) == 8
        found.append(fit_runs(runs, Settings(replicates=2)).laws["loss_of_compute"].figures["exponent"].value)
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - law.exponent) < 2.5 * error


def test_that_runs_are_left_out_of_the_law_of_compute_is_said():
    law = fit_runs(runs_of(grid()), Settings(replicates=20)).laws["loss_of_compute"]
    assert len(law.runs) < 20 and f"{20 - len(law.runs)} of 20 runs are left out" in law.remarks[0]


def test_sizes_with_unequal_data_are_said_to_mix_size_and_data():
    rows = [row | {"tokens": 54e9 if i < 5 else 10e9} for i, row in enumerate(fixed_tokens())]
    law = fit_runs(runs_of(rows), Settings(replicates=100)).laws["loss_of_parameters"]
    assert "differ by a factor of 5.4" in law.remarks[0]


def test_laws_that_the_runs_do_not_allow_say_why(tmp_path):
    rows = [
        {key: value for key, value in row.items() if key not in ("tokens", "flops")} for row in fixed_tokens(count=4)
    ]
    fit = fit_runs(runs_of(rows), Settings(replicates=100))
    assert set(fit.laws) == {"loss_of_parameters"}
    assert "FLOPs of n50000000 are unknown" in fit.missing["loss_of_compute"]
    assert "4 sizes, and an irreducible term needs 5" in fit.missing["loss_of_parameters_with_floor"]
    assert "tokens of n50000000 are unknown" in fit.missing["loss_of_parameters_and_data"]


def test_data_that_grow_with_size_cannot_be_told_from_size():
    rows = [row | {"tokens": 20.0 * row["parameters"]} for row in fixed_tokens(count=8)]
    missing = fit_runs(runs_of(rows), Settings(replicates=100)).missing
    assert "cannot be told apart" in missing["loss_of_parameters_and_data"]


def test_three_sizes_make_a_law_with_a_wide_interval_and_no_prediction():
    fit = fit_runs(runs_of(fixed_tokens(count=3)), Settings(replicates=100))
    law = fit.laws["loss_of_parameters"]
    wide = law.figures["exponent"]
    assert law.prediction is None
    narrow = fit_runs(runs_of(fixed_tokens(count=12)), Settings(replicates=100)).laws["loss_of_parameters"]
    assert wide.high - wide.low > 3 * (narrow.figures["exponent"].high - narrow.figures["exponent"].low)


# --- What is refused -------------------------------------------------------------------------------------------------


def test_too_few_sizes_are_refused(tmp_path, capsys):
    rows = fixed_tokens(count=2) * 3
    said = refusal(capsys, tmp_path, write_table(tmp_path / "runs.csv", rows))
    assert "6 runs have 2 different sizes (50,000,000, 1,000,000,000 parameters)" in said
    assert "plan --ladder" in said


@pytest.mark.parametrize(("column", "what"), [("held_out", "held-out data"), ("tokenizer", "tokenizer")])
def test_a_run_that_breaks_comparability_is_refused_or_left_out_and_named(column, what, tmp_path, capsys):
    rows = fixed_tokens(noise=0.0)
    rows[2] |= {column: "another", "loss": 0.1}
    table = write_table(tmp_path / "runs.csv", rows)
    said = refusal(capsys, tmp_path, table)
    for part in (rows[2]["name"], what, "another", "cannot be compared", "--skip-unusable"):
        assert part in said
    found = fitted(tmp_path, table, options=("--skip-unusable",))
    assert [entry["run"] for entry in found["excluded"]] == [rows[2]["name"]]
    assert found["laws"]["loss_of_parameters"]["exponent"]["value"] == pytest.approx(0.0425)
    assert "left out" in capsys.readouterr().err


BAD_TABLES = {
    "missing_column": ("name,loss\na,0.5\n", (":2: parameters is missing", "known columns")),
    "nan": ("parameters,loss\n5,nan\n", (":2: loss=nan must be a number above 0",)),
    "negative": ("parameters,loss,flops\n5,0.5,-3\n", (":2: flops=-3 must be a number above 0",)),
    "billions": ("parameters,loss\n7.2,0.5\n", (":2: parameters=7.2 is not a whole number; write weights, not",)),
    "twice": ("parameters,loss,loss\n5,1,2\n", (":1: two columns are called loss",)),
    "old_mac": ("parameters,loss\n5,0.5\r6,0.4\n", (":2: no line of a CSV",)),
    "quotes": ('parameters,loss\n5,"0.5\n', (":2: no line of a CSV",)),
    "cells": ("parameters,loss\n5,0.5,6\n", (":2: has 3 cells, and the header has 2",)),
    "empty": ("parameters,loss\n", ("no line with a run in it",)),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused_by_file_and_line(name, tmp_path, capsys):
    text, parts = BAD_TABLES[name]
    (tmp_path / "runs.csv").write_text(text)
    said = refusal(capsys, tmp_path, tmp_path / "runs.csv")
    for part in (str(tmp_path / "runs.csv"), *parts):
        assert part in said


def test_bad_lines_of_jsonl_are_refused_by_file_and_line(tmp_path, capsys):
    for line, part in (
        ("{", "malformed JSON"),
        ("[1]", "no JSON object"),
        ('{"parameters": "x", "loss": 1}', "above 0"),
    ):
        (tmp_path / "runs.jsonl").write_text(f"\n{line}\n")
        said = refusal(capsys, tmp_path, tmp_path / "runs.jsonl")
        assert f"{tmp_path / 'runs.jsonl'}:2: " in said and part in said


def test_inputs_and_options_that_are_none_are_refused(tmp_path, capsys):
    table = write_table(tmp_path / "runs.csv", fixed_tokens())
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    assert "no such file or directory" in refusal(capsys, tmp_path, tmp_path / "nowhere")
    assert "neither a run directory nor a table" in refusal(capsys, tmp_path, tmp_path / "notes.txt")
    assert "no config.yaml in it" in refusal(capsys, tmp_path, tmp_path / "empty")
    assert "--evaluation is for run directories" in refusal(capsys, tmp_path, table, options=("--evaluation", "x"))
    assert "must be at least 100" in refusal(capsys, tmp_path, table, options=("--replicates", "5"))
    assert "is not known; use --parameters" in refusal(capsys, tmp_path, table, options=("--parameters", "all"))
    with pytest.raises(UserError, match="no run is left"):
        gather_runs([tmp_path / "nowhere"], skip_unusable=True)


def test_runs_at_chance_and_of_other_seeds_are_noted(tmp_path):
    rows = [row | {"seed": index} for index, row in enumerate(fixed_tokens())]
    rows[0]["loss"] = 0.7
    notes = gather_runs([write_table(tmp_path / "runs.csv", rows)]).notes
    assert any(rows[0]["name"] in note and "learnt nothing" in note for note in notes)
    assert any("different seeds" in note for note in notes)
