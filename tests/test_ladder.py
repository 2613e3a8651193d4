"""`plan --ladder`: shapes, budgets, files that are never overwritten; and a ladder that is trained and fitted."""

import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
from ranks import run_ranks
from tiny_runs import change, run_training, tiny_config, training_refusal

from megatron_polar.cli import main
from megatron_polar.cli_scaling import parse_sizes
from megatron_polar.config.load import dump_config, load_config
from megatron_polar.config.presets import PRESETS, architecture_of
from megatron_polar.config.schema import DatasetSource, ParallelSection
from megatron_polar.config.validate import check_layout
from megatron_polar.errors import USER_ERROR, UserError
from megatron_polar.scaling.gather import gather_runs
from megatron_polar.scaling.items import read_items
from megatron_polar.scaling.laws import Sizes, batch_size, peak_learning_rate
from megatron_polar.scaling.runs import read_run
from megatron_polar.scaling.shapes import shape_of_size

ROOT = Path(__file__).resolve().parents[1]

# --- Shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.2e5, 1e6, 5e6, 2e7, 5e7, 1e8, 2e8, 5e8, 1e9, 2e9, 7e9, 2e10, 7e10])
def test_shapes_have_the_wanted_size_and_sensible_proportions(size):
    shape = shape_of_size(size, like=PRESETS["nano"])
    assert shape.num_parameters(0) == pytest.approx(size, rel=0.12)
    assert shape.num_attention_heads * shape.kv_channels == shape.hidden_size
    assert shape.num_attention_heads % shape.num_query_groups == 0
    assert 0.5 < shape.hidden_size / shape.num_layers / (32 * (shape.hidden_size / 128) ** 0.4) < 2
    assert shape.num_layers >= 2
    if shape.hidden_size >= 1024:
        check_layout(ParallelSection(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), shape)


def test_polar_7b_has_the_shape_that_its_size_asks_for():
    polar = PRESETS["polar_7b"]
    shape = shape_of_size(polar.num_parameters(0), like=polar)
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    assert [getattr(shape, name) for name in sizes] == [getattr(polar, name) for name in sizes]
    assert shape.rotary_base == polar.rotary_base


@pytest.mark.parametrize("size", [10.0, 1e13])
def test_sizes_beyond_all_shapes_are_refused(size):
    with pytest.raises(UserError, match="shapes reach from"):
        shape_of_size(size, like=PRESETS["nano"])


def test_sizes_are_lists_or_ranges():
    assert parse_sizes("50M, 1.5b,2000", num_sizes=5) == (5e7, 1.5e9, 2000.0)
    assert parse_sizes("1M..100M", num_sizes=3) == pytest.approx((1e6, 1e7, 1e8))
    for text in ("x", "5M,5M", "", "2M..1M", "1M..", "0"):
        with pytest.raises(UserError, match="--sizes"):
            parse_sizes(text, num_sizes=3)


# --- Plans -----------------------------------------------------------------------------------------------------------

BASE_1_8B = [str(ROOT / "examples/pretrain_1_8b.yaml"), "train.init_from=checkpoints/base_{size}", "--no-paths"]


def ladder(directory, *arguments) -> dict:
    """ladder.json of a command that succeeds."""
    assert main(["plan", *map(str, arguments), "--ladder", str(directory)]) == 0
    return json.loads((directory / "ladder.json").read_text())


def refusal(capsys, directory, *arguments) -> str:
    """The error line of a command that must be refused, with nothing written."""
    capsys.readouterr()
    assert main(["plan", *map(str, arguments), "--ladder", str(directory)]) == USER_ERROR
    assert not directory.exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_papers_rule_gives_all_sizes_the_same_tokens_and_its_own_hyper_parameters(tmp_path):
    """Five models of 50M to 1B parameters on 54B tokens (section 4.4), learning rate and batch by appendix D.3."""
    options = ("--sizes", "50M..1B", "--num-sizes", "5", "--reward-tokens", "54e9", "--base-tokens", "2.5e12")
    runs = ladder(tmp_path / "study", *BASE_1_8B, *options)["runs"]
    assert len(runs) == 5
    for run in runs:
        assert run["tokens"] == pytest.approx(54e9, rel=1e-3)
        sizes = Sizes(run["all_parameters"], base_tokens=2.5e12, reward_tokens=54e9)
        assert run["global_batch_size"] == round(batch_size(sizes))
        assert run["lr"] == pytest.approx(peak_learning_rate(sizes), rel=1e-3)
        config = load_config(tmp_path / "study" / f"{run['name']}.yaml")
        assert config.train.init_from == f"checkpoints/base_{run['name'].removeprefix('n').split('_')[0]}"
        assert math.ceil(config.train.num_steps / 20) == config.evaluation.interval
    assert [run["num_steps"] for run in runs] == sorted((run["num_steps"] for run in runs), reverse=True)


def test_budgets_are_met_to_half_a_step_and_larger_models_get_fewer_comparisons(tmp_path):
    options = ("--sizes", "100M,300M,1B", "--flops", "1e19,1e20", "--base-tokens", "2.5e12", "--seeds", "1,2")
    runs = ladder(tmp_path / "study", *BASE_1_8B, *options)["runs"]
    assert len(runs) == 12
    assert {run["seed"] for run in runs} == {1, 2}
    for run in runs:
        assert run["flops"] == pytest.approx(run["budget"], rel=0.5 / run["num_steps"] + 1e-9)
        assert run["comparisons"] == run["num_steps"] * run["global_batch_size"]
    for budget in (1e19, 1e20):
        data = [run["comparisons"] for run in runs if run["budget"] == budget and run["seed"] == 1]
        assert data == sorted(data, reverse=True)


def test_large_sizes_get_the_layout_that_the_search_finds(tmp_path):
    options = ("--sizes", "1B,20B", "--reward-tokens", "54e9", "--base-tokens", "2.5e12", "--nodes", "4")
    study = ladder(tmp_path / "study", *BASE_1_8B, *options)
    small, large = study["runs"]
    ranks = [run["tensor_model_parallel_size"] * run["pipeline_model_parallel_size"] for run in (small, large)]
    assert ranks[1] > ranks[0]
    assert study["cluster"].startswith("4 nodes x 8 GPUs")
    assert "slurm/launch.sh --nodes=4" in (tmp_path / "study" / "README.md").read_text()


def test_what_makes_no_study_is_refused(tmp_path, capsys, base):
    study = tmp_path / "study"
    sizes = ("--sizes", "50M,100M", "--reward-tokens", "54e9")
    law = ("--base-tokens", "2.5e12")
    example = BASE_1_8B[0]
    assert "write {size} in it" in refusal(capsys, study, example, "--no-paths", *sizes, *law)
    assert "ask for --base-tokens" in refusal(capsys, study, *base, "model.preset=null", *SHAPE, *sizes)
    few = ("--sizes", "50M,100M", "--reward-tokens", "1e6")
    assert "far below" in refusal(capsys, study, *base, *few)
    assert "either --flops" in refusal(capsys, study, *base, "--sizes", "50M,100M")
    assert "either --flops" in refusal(capsys, study, *base, *sizes, "--flops", "1e20")
    assert "--sizes is missing" in refusal(capsys, study, *base, "--reward-tokens", "1e9")
    assert "data.validation is empty" in refusal(capsys, study, *base, "data.validation=[]", *sizes)
    same = ("--sizes", "1M,1.001M", "--reward-tokens", "1e6", "--hyper-parameters", "base")
    assert "both give" in refusal(capsys, study, *base, *same)
    tiny = ("--sizes", "1M,2M", "--flops", "1e6", "--hyper-parameters", "base")
    assert "less than one step" in refusal(capsys, study, *base, *tiny)
    for option, value in (("--flops", "x"), ("--seeds", "a")):
        assert option in refusal(capsys, study, *base, "--sizes", "1M,2M", option, value)
    assert "no such directory" in refusal(capsys, study, *base, "data.train=[{path: nowhere}]", *sizes)


SHAPE = [f"model.{name}={value}" for name, value in (("num_layers", 2), ("hidden_size", 32), ("ffn_hidden_size", 64))]

# --- Files and a real study ------------------------------------------------------------------------------------------

TINY = ("--sizes", "28k,56k,110k", "--reward-tokens", "13000", "--hyper-parameters", "base")


@pytest.fixture(scope="module")
def base(trajectory_corpus, tmp_path_factory) -> list[str]:
    """The YAML of a small run on the CPU, with held-out data."""
    directory = tmp_path_factory.mktemp("base")
    config = change(
        tiny_config(trajectory_corpus, directory / "runs"),
        run__device="cpu",
        data__validation=(DatasetSource(str(trajectory_corpus)),),
        optimizer__lr=3e-3,
        evaluation__num_comparisons=8,
    )
    (directory / "base.yaml").write_text(dump_config(config))
    return [str(directory / "base.yaml")]


@pytest.fixture(scope="module")
def study(base, tmp_path_factory) -> Path:
    """The YAMLs of three tiny sizes, each trained to its end."""
    directory = tmp_path_factory.mktemp("study") / "yaml"
    ladder(directory, *base, *TINY)
    for path in sorted(directory.glob("*.yaml")):
        run_training(load_config(path))
    return directory


def runs_of(study: Path) -> list[Path]:
    return [Path(load_config(path).run.directory) for path in sorted(study.glob("*.yaml"))]


def test_every_yaml_loads_validates_and_passes_a_dry_run(study, capsys):
    rows = json.loads((study / "ladder.json").read_text())["runs"]
    assert sorted(f"{row['name']}.yaml" for row in rows) == sorted(path.name for path in study.glob("*.yaml"))
    for row in rows:
        path = study / f"{row['name']}.yaml"
        config = load_config(path)
        assert architecture_of(config.model).num_parameters(0) == row["parameters"]
        assert (config.parallel, config.run.device) == (ParallelSection(), "cpu")
        capsys.readouterr()
        assert main(["train", str(path), "--dry-run"]) == 0
        assert capsys.readouterr().out == dump_config(config)


def test_the_same_study_again_changes_nothing_and_another_is_refused(base, tmp_path, capsys):
    directory = tmp_path / "study"
    ladder(directory, *base, *TINY)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}
    command = shlex.split(json.loads((directory / "ladder.json").read_text())["command"])
    assert main(command[1:]) == 0  # the command that the files name is the one that makes them
    with pytest.raises(AssertionError):
        ladder(directory, *base, *TINY, "optimizer.lr=0.5")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is there with another content, and is not overwritten" in said
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()} == before


def test_the_trained_study_is_fitted(study, tmp_path, capsys):
    assert main(["fit", *map(str, runs_of(study)), "--output", str(tmp_path / "fit")]) == 0
    found = json.loads((tmp_path / "fit" / "fit.json").read_text())
    law = found["laws"]["loss_of_parameters"]
    assert law["num_runs"] == 3
    assert law["exponent"]["low"] < law["exponent"]["value"] < law["exponent"]["high"]
    planned = {row["name"]: row for row in json.loads((study / "ladder.json").read_text())["runs"]}
    for run in found["runs"]:
        plan = planned[run["name"]]
        assert (run["parameters"], run["all_parameters"]) == (plan["parameters"], plan["all_parameters"])
        assert run["comparisons"] == plan["comparisons"]
        assert run["flops"] == pytest.approx(plan["flops"], rel=0.5)  # of mean lengths, and without padding
        assert 0.05 < run["loss"] < 0.8
    assert (tmp_path / "fit" / "report.html").is_file()
    assert "L = a N^-alpha   over 3 runs" in capsys.readouterr().out


def test_flops_and_tokens_are_those_of_the_rows_that_were_computed(study):
    """The slow twin: all steps drawn again, every row counted."""
    directory = runs_of(study)[1]
    config = load_config(directory / "config.yaml")
    tokens, attended, rewards, logical = run_ranks(counts_of_all_rows, 1, config)[0]
    flops = 3 * architecture_of(config.model).forward_flops(
        tokens=tokens, attended=attended, rewards=rewards, reward_keys=logical
    )
    run = read_run(directory)
    assert run.flops == pytest.approx(flops, rel=1e-9)
    assert run.tokens == pytest.approx(logical, rel=1e-9)
    assert run.comparisons == config.train.num_steps * 8


def counts_of_all_rows(config) -> list[int]:
    """Physical tokens, pairs inside the mask, rewards and logical tokens of a whole run on this rank."""
    from megatron_polar.data.steps import StepDataset
    from megatron_polar.train.build import join_ranks, open_data

    _, topology = join_ranks(config)
    data = open_data(config, topology=topology)
    steps = StepDataset(data.train, global_batch_size=config.train.global_batch_size, rank=0, shape=data.shape)
    counts = np.zeros(4, dtype=np.int64)
    for number in range(config.train.num_steps):
        for batch in steps[number].micro_batches:
            counts += [batch.tokens.size, batch.num_attended, len(batch.reward_positions), batch.num_logical_tokens]
    return counts.tolist()


def test_a_restart_on_other_ranks_does_not_change_the_flops(study, tmp_path):
    """The same work on two ranks from step 3 on: half the throughput a rank."""
    run = copied(study, tmp_path)
    wanted = read_run(run).flops
    rows = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    for row in rows:
        if row["iteration"] > 3 and "throughput" in row:
            row["throughput"] /= 2
    write_lines(run / "metrics.jsonl", rows)
    assert read_run(run).flops < wanted
    events = [orjson.loads(line) for line in (run / "events.jsonl").read_bytes().splitlines()]
    write_lines(run / "events.jsonl", [*events, {"time": 1.0, "event": "start", "step": 3, "world_size": 2}])
    assert read_run(run).flops == pytest.approx(wanted)


# --- Runs that cannot be used ----------------------------------------------------------------------------------------


def copied(study: Path, tmp_path: Path, *, number: int = 0) -> Path:
    """A copy of one run's directory, without its checkpoints."""
    target = tmp_path / f"copy{number}"
    shutil.copytree(runs_of(study)[number], target, ignore=shutil.ignore_patterns("checkpoints"))
    return target


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))


def edit(path: Path, **changes) -> None:
    """Change entries of a JSON file; None removes one."""
    content = orjson.loads(path.read_bytes()) | changes
    path.write_bytes(orjson.dumps({name: value for name, value in content.items() if value is not None}))


def change_losses(run: Path, value) -> None:
    """Give the last held-out row another loss; "remove" takes the row away."""
    rows = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    last = max((row for row in rows if "validation/rm/loss" in row), key=lambda row: row["iteration"])
    last["validation/rm/loss"] = value
    write_lines(run / "metrics.jsonl", [row for row in rows if row is not last or value != "remove"])


UNUSABLE = {
    "stopped": (lambda run: edit(run / "status.json", state="stopped"), ("not finished", "'stopped'", "train it")),
    "shorter": (lambda run: edit(run / "status.json", step=3), ("not finished", "at step 3 of")),
    "no_status": (lambda run: (run / "status.json").unlink(), ("not finished", "no status.json")),
    "nan": (lambda run: change_losses(run, None), ("is NaN", "diverged", "leave it out")),
    "no_held_out": (lambda run: change_losses(run, "remove"), ("no held-out loss after its last step", "--evaluation")),
    "no_metrics": (lambda run: write_lines(run / "metrics.jsonl", []), ("does not reach step",)),
    "other_held_out": (lambda run: edit(run / "environment.json", validation_data=["f" * 64]), ("held-out data",)),
    "other_tokenizer": (lambda run: edit(run / "environment.json", tokenizer="e" * 64), ("tokenizer eeee",)),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_run_that_cannot_be_used_is_named_or_left_out(name, study, tmp_path, capsys):
    spoil, parts = UNUSABLE[name]
    run = copied(study, tmp_path)
    spoil(run)
    inputs = [str(run), *map(str, runs_of(study))]
    capsys.readouterr()
    assert main(["fit", *inputs, "--output", str(tmp_path / "fit")]) == USER_ERROR
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "fit").exists()
    for part in (f"error: {run}: ", *parts):
        assert part in said
    gathered = gather_runs(list(map(Path, inputs)), skip_unusable=True)
    ((left_out, reason),) = gathered.excluded
    assert left_out == str(run) and parts[0] in reason
    assert [one.name for one in gathered.runs] == [path.name for path in runs_of(study)]
    assert f"warning: left out: {run}: " in capsys.readouterr().err


def test_a_command_that_was_refused_leaves_a_finished_run_finished(study, tmp_path):
    run = copied(study, tmp_path)
    wanted = read_run(run)
    config = change(load_config(run / "config.yaml"), run__directory=str(run))
    training_refusal(change(config, data__train=(DatasetSource(str(tmp_path / "nowhere")),)))
    assert orjson.loads((run / "status.json").read_bytes())["state"] == "refused"
    assert read_run(run) == wanted


def test_runs_from_before_fingerprints_were_written_are_known_by_their_datasets(study, tmp_path):
    run = copied(study, tmp_path)
    wanted = read_run(run)
    edit(run / "environment.json", validation_data=None, tokenizer=None, embedding_rows=None)
    found = read_run(run)
    assert (found.held_out, found.tokenizer) == (wanted.held_out, wanted.tokenizer)
    assert found.all_parameters == wanted.all_parameters
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace(load_config(run / "config.yaml").data.validation[0].path, "nowhere")
    )
    with pytest.raises(UserError, match="it cannot be told whether its loss compares"):
        read_run(run)


def test_losses_of_an_evaluation_go_before_those_of_the_loop(study, tmp_path, capsys):
    """Three items: two pairs, one pair, none; their losses by hand, and intervals over them."""
    runs = [copied(study, tmp_path, number=number) for number in range(3)]
    for number, run in enumerate(runs):
        write_evaluation(run / "test", scale=1.0 + number)
    margins = np.array([1.0, 3.0, 2.0])
    found = read_run(runs[0], evaluation="test")
    assert found.loss == pytest.approx(np.mean(np.log1p(np.exp(-margins))))
    assert found.items.pairs.tolist() == [2, 1]
    inputs = ["fit", *map(str, runs), "--evaluation", "test", "--replicates", "100"]
    assert main([*inputs, "--output", str(tmp_path / "fit")]) == 0
    law = json.loads((tmp_path / "fit" / "fit.json").read_text())["laws"]["loss_of_parameters"]
    over = law["over_held_out_items"]["exponent"]
    assert over["low"] <= over["value"] == law["exponent"]["value"] <= over["high"]
    write_evaluation(runs[1] / "test", scale=1.0, first="other")
    assert main([*inputs, "--output", str(tmp_path / "again")]) == USER_ERROR
    assert "copy1: has held-out data" in capsys.readouterr().err
    write_evaluation(runs[1] / "test", scale=1.0, check="FAILED: x")
    with pytest.raises(UserError, match="label-swap check"):
        read_run(runs[1], evaluation="test")
    with pytest.raises(UserError, match="run `megatron-polar evaluate`"):
        read_run(runs[1], evaluation="none")
    (runs[1] / "test" / "summary.json").write_text("[]")
    with pytest.raises(UserError, match="not what `evaluate` writes"):
        read_run(runs[1], evaluation="test")


def test_equal_items_may_come_from_files_of_any_name(tmp_path):
    """Their hash says that they are equal; an older evaluation has none, and names are all that is known."""
    for name, first, texts in (
        ("a", "one.jsonl:1", "f" * 64),
        ("b", "two.jsonl.gz:1", "f" * 64),
        ("c", "x:1", "0" * 64),
    ):
        write_evaluation(tmp_path / name, scale=1.0, first=first, texts=texts)
    same, renamed, other = (read_items(tmp_path / name).identity for name in "abc")
    assert same == renamed != other
    write_evaluation(tmp_path / "a", scale=1.0, first="one.jsonl:1")
    write_evaluation(tmp_path / "b", scale=1.0, first="two.jsonl:1")
    assert read_items(tmp_path / "a").identity != read_items(tmp_path / "b").identity


def write_evaluation(
    directory: Path, *, scale: float, first: str = "a", check: str = "passed", texts: str | None = None
) -> None:
    """What `evaluate` leaves of three items."""
    directory.mkdir(exist_ok=True)
    summary = {"suite": "policies", "swap_check": check} | ({"items_sha256": texts} if texts else {})
    (directory / "summary.json").write_text(json.dumps(summary))
    items = [
        {"identifier": first, "levels": [0, 1, 1], "rewards": [3.0 * scale, 2.0 * scale, 0.0]},
        {"identifier": "b", "levels": [1, 0], "rewards": [0.0, 2.0 * scale]},
        {"identifier": "c", "levels": [0, 0], "rewards": [1.0, 2.0]},
    ]
    write_lines(directory / "rewards.jsonl", items)


def test_both_commands_take_no_torch(base, study, tmp_path):
    plan = ["plan", *base, *TINY, "--ladder", str(tmp_path / "study")]
    fit = ["fit", *map(str, runs_of(study)), "--output", str(tmp_path / "fit"), "--replicates", "100"]
    program = (
        "import sys\nfrom megatron_polar.cli import main\n"
        f"statuses = [main(command) for command in ({plan!r}, {fit!r})]\n"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules], statuses)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] [0, 0]"
