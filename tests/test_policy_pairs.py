"""Counts of policy pairs in real runs: what they say, and that draws by difficulty survive kills and other layouts."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
from ranks import run_ranks
from test_loader import needs_dali
from tiny_runs import (
    change,
    checkpoint_of,
    killed_after,
    metric_rows,
    run_training,
    tiny_config,
    train_with,
    training_refusal,
)

from megatron_polar import faults
from megatron_polar.config.load import load_config
from megatron_polar.config.schema import CurriculumSection, DatasetSource
from megatron_polar.config.validate import validate
from megatron_polar.data import steps
from megatron_polar.data.pair_counts import EMPTY, PAIRS, PairCounts, encode_pairs, pair_keys, read_pairs, split_keys
from megatron_polar.errors import UserError
from megatron_polar.score.pair_matrix import pairs_section
from megatron_polar.score.report import training_report
from megatron_polar.train.policy_pairs import PolicyPairs
from megatron_polar.train.replay import replay_step
from megatron_polar.train.run import train

STEPS, BATCH = 9, 8
SECTION = CurriculumSection(interval=2, half_life=2, floor=0.1, temperature=0.1, prior_comparisons=0.5)
"""Periods of two steps, and few outcomes already change what is drawn."""


def curriculum_config(corpus, directory, **changes):
    config = tiny_config(corpus, directory, train__num_steps=STEPS, checkpoint__keep=0, optimizer__lr=1e-2)
    return change(config, **{"data__contrast": "by_difficulty", "data__curriculum": SECTION} | changes)


def config_of(run, **changes):
    return change(load_config(Path(run) / "config.yaml"), run__directory=str(run), **changes)


def train_and_watch(config) -> dict:
    """Train on this rank; returns a hash of what was drawn in every step, the weights it was drawn with, and what this
    rank has counted."""
    seen: dict = {"drawn": {}, "weights": {}, "outcomes": []}
    build_step, add = steps.build_step, PolicyPairs.add

    def watching(comparisons, indices, *, number, table=None, **keywords):
        if table is not None:  # not the evaluation
            drawn = [comparisons.comparison(index, table) for index in indices]
            parts = [repr(c.policies).encode() + c.prefix.tobytes() + b"".join(map(bytes, c.candidates)) for c in drawn]
            seen["drawn"][number] = hashlib.sha256(b"\n".join(parts)).hexdigest()
            seen["weights"][number] = dict(zip(table.keys.tolist(), table.weights.tolist(), strict=True))
        return build_step(comparisons, indices, number=number, table=table, **keywords)

    def noting(pairs, step, result):
        keys = np.concatenate([batch.policy_pairs for batch in step.micro_batches])
        if len(result.half_wins):
            seen["outcomes"].append((step.number, keys.tolist(), result.half_wins.tolist()))
        add(pairs, step, result)

    steps.build_step, PolicyPairs.add = watching, noting
    train(config)
    return seen


def pairs_of(place: Path) -> bytes:
    return (place / PAIRS).read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, trajectory_corpus):
    """A finished run of one rank, checkpoints of steps 3, 6 and 9, and what was seen of it."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    return directory, run_ranks(train_and_watch, 1, curriculum_config(trajectory_corpus, directory))[0]


# --- what is counted -------------------------------------------------------------------------------------------------


def naive_counts(outcomes, period: int) -> dict[int, list[int]]:
    """What is counted at the end of `period`, one outcome after the other and with the halving of SECTION."""
    table: dict[int, list[int]] = {}
    for number in range(period + 1):
        if number and number % SECTION.half_life == 0:
            table = {key: [won // 2, lost // 2] for key, (won, lost) in table.items()}
            table = {key: entry for key, entry in table.items() if sum(entry)}
        for step, keys, half_wins in outcomes:
            if step // SECTION.interval == number:
                for key, wins in zip(keys, half_wins, strict=True):
                    entry = table.setdefault(key, [0, 0])
                    entry[0], entry[1] = entry[0] + wins, entry[1] + 2 - wins
    return table


def test_a_period_is_drawn_with_what_was_counted_until_the_period_before_the_last(alone):
    _, seen = alone
    assert sorted(seen["weights"]) == list(range(STEPS))
    for step, weights in seen["weights"].items():
        period = step // SECTION.interval
        counted = naive_counts(seen["outcomes"], period - 2) if period >= 2 else {}
        prior = SECTION.prior_comparisons
        rates = {key: (lost + prior) / (won + lost + 2 * prior) for key, (won, lost) in counted.items()}
        expected = {key: rate ** (1 / SECTION.temperature) for key, rate in rates.items()}
        assert set(weights) == set(expected)
        for key, weight in weights.items():
            assert weight == pytest.approx(expected[key], rel=1e-12)
    assert len({tuple(w.items()) for w in seen["weights"].values()}) == 4  # none, none, and one for each period since


def test_the_files_hold_the_counts_and_add_up_to_the_metrics(alone):
    directory, seen = alone
    assert pairs_of(directory) == pairs_of(checkpoint_of(directory, STEPS))
    policies, parts = read_pairs(directory / PAIRS)
    assert policies == tuple(f"policy{i}" for i in range(5))
    last = {step: sum(won) for step, _, won in seen["outcomes"]}
    assert parts["current"].won.sum() == last[8]
    assert parts["last"].won.sum() == last[6] + last[7]
    assert parts["older"].comparisons.sum() > 0
    reference, other = split_keys(parts["last"].keys)
    assert (reference != other).all()
    for row in metric_rows(directory):
        assert row["rm/accuracy"] * BATCH * 2 == last[row["iteration"] - 1]
    assert metric_rows(directory)[-1]["pairs/seen"] > 5


def test_the_accuracy_on_the_hardest_pairs_is_measured_after_they_were_chosen(alone):
    directory, seen = alone
    row = metric_rows(directory)[-1]  # step 9, in the fifth period: pairs by the first three, measured in the last two
    prior = SECTION.prior_comparisons
    counted = naive_counts(seen["outcomes"], 2)
    hardness = sorted(counted, key=lambda key: (-(counted[key][1] + prior) / (sum(counted[key]) + 2 * prior), key))
    hardest = set(hardness[: -(-len(hardness) // 10)])
    later = [
        wins
        for step, keys, half_wins in seen["outcomes"]
        for key, wins in zip(keys, half_wins, strict=True)
        if step >= 6 and key in hardest
    ]
    assert row["pairs/hardest_decile_comparisons"] == len(later) > 0
    assert row["pairs/hardest_decile_accuracy"] == pytest.approx(sum(later) / 2 / len(later))
    assert all("pairs/hardest_decile_accuracy" not in row for row in metric_rows(directory)[:3])


@pytest.mark.parametrize("candidates", [2, 3])
def test_a_uniform_run_counts_and_draws_as_if_it_did_not(candidates, trajectory_corpus, ranking_corpus, tmp_path):
    losses, sources = {}, (DatasetSource(str(trajectory_corpus)), DatasetSource(str(ranking_corpus)))
    for record in (True, False):
        directory = tmp_path / str(record)
        config = tiny_config(
            trajectory_corpus,
            directory,
            data__train=sources,
            data__candidates_per_comparison=candidates,
            data__curriculum=CurriculumSection(record=record),
        )
        run_training(config)
        losses[record] = [row["rm/loss"] for row in metric_rows(directory)]
        assert (directory / PAIRS).exists() == record == (checkpoint_of(directory, 3) / PAIRS).exists()
        assert ("pairs/seen" in metric_rows(directory)[-1]) == record
    assert losses[True] == losses[False]
    current = read_pairs(tmp_path / "True" / PAIRS)[1]["current"]
    assert 0 < current.comparisons.sum() < 48 * (candidates - 1)  # rankings have no policies


def test_ties_of_an_untrained_head_count_half(trajectory_corpus, tmp_path):
    config = tiny_config(trajectory_corpus, tmp_path / "run", model__reward_head_init_std=0.0, train__num_steps=1)
    run_training(config)
    current = read_pairs(tmp_path / "run" / PAIRS)[1]["current"]
    assert current.won.tolist() == current.lost.tolist()
    assert current.won.sum() == BATCH


def test_a_skipped_step_is_not_counted(trajectory_corpus, tmp_path):
    run_ranks(train_with, 2, curriculum_config(trajectory_corpus, tmp_path / "run"), "gradient:9@1=nan")
    assert metric_rows(tmp_path / "run")[-1]["reliability/skipped_steps"] == 1
    assert len(read_pairs(tmp_path / "run" / PAIRS)[1]["current"]) == 0
    assert read_pairs(tmp_path / "run" / PAIRS)[1]["last"].comparisons.sum() == 2 * BATCH


# --- layouts and resuming --------------------------------------------------------------------------------------------

LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_interleaved": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory, trajectory_corpus):
    """As `alone`, with layers enough for interleaved pipelines."""
    directory = tmp_path_factory.mktemp("four_layers") / "run"
    config = curriculum_config(trajectory_corpus, directory, model__num_layers=4)
    return directory, run_ranks(train_and_watch, 1, config)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_draws_and_counts_the_same(name, four_layers, trajectory_corpus, tmp_path):
    world_size, parallel = LAYOUTS[name]
    directory, expected = four_layers
    config = curriculum_config(trajectory_corpus, tmp_path / "run", parallel=parallel, model__num_layers=4)
    for seen in run_ranks(train_and_watch, world_size, config):
        assert seen["drawn"] == expected["drawn"]
    assert pairs_of(tmp_path / "run") == pairs_of(directory)
    # Draws are functions of counts of right orders, so they are the same for as long as no margin is so close to 0 that
    # another order of sums turns it round (docs/training.md); none is in these 72 comparisons.
    np.testing.assert_allclose(
        [row["rm/loss"] for row in metric_rows(tmp_path / "run")],
        [row["rm/loss"] for row in metric_rows(directory)],
        rtol=1e-5,
    )


def test_draws_by_difficulty_differ_from_uniform_ones_once_there_are_counts(alone, trajectory_corpus, tmp_path):
    others = run_ranks(
        train_and_watch,
        1,
        curriculum_config(
            trajectory_corpus, tmp_path / "run", data__curriculum=CurriculumSection(interval=2, floor=1.0)
        ),
    )[0]["drawn"]
    drawn = alone[1]["drawn"]
    assert [drawn[step] == others[step] for step in range(STEPS)] == [True] * 4 + [False] * 5


RESUMES = {
    # ranks, sizes, changes, steps to resume from: in the middle of a period (3), and at the end of one (6)
    "workers_0": (1, {}, {}, (3, 6)),
    "workers_2": (1, {}, {"data__num_workers": 2}, (3,)),
    "dp2_workers_2": (2, {}, {"data__num_workers": 2}, (3,)),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, {}, (3,)),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_run_killed_in_the_middle_of_a_period_goes_on_bit_for_bit(name, alone, trajectory_corpus, tmp_path):
    world_size, parallel, changes, killed_at = RESUMES[name]
    whole = tmp_path / "whole"
    run_training(curriculum_config(trajectory_corpus, whole, parallel=parallel, **changes), world_size)
    assert pairs_of(whole) == pairs_of(alone[0])  # workers and layouts do not matter
    for step in killed_at:
        resumed = killed_after(whole, tmp_path / f"resumed_{step}", step=step)
        run_training(config_of(resumed), world_size)
        assert pairs_of(checkpoint_of(resumed, STEPS)) == pairs_of(checkpoint_of(whole, STEPS))
        manifests = [
            orjson.loads((checkpoint_of(run, STEPS) / "manifest.json").read_bytes()) for run in (whole, resumed)
        ]
        one, other = ({k: v for k, v in m["files"].items() if k.endswith((".distcp", "common.pt"))} for m in manifests)
        assert one == other
        for a, b in zip(metric_rows(whole), metric_rows(resumed), strict=True):
            for key in ("rm/loss", "grad-norm", "pairs/seen"):
                assert a[key] == b[key]


@needs_dali
def test_dalis_workers_draw_the_same(alone, trajectory_corpus, tmp_path):
    config = curriculum_config(trajectory_corpus, tmp_path / "run", data__loader="dali", data__num_workers=2)
    run_training(config)
    assert pairs_of(tmp_path / "run") == pairs_of(alone[0])


def test_a_run_goes_on_in_another_layout_with_the_same_draws(alone, tmp_path):
    directory, expected = alone
    run = killed_after(directory, tmp_path / "run", step=3)
    config = config_of(run, parallel={"tensor_model_parallel_size": 2}, data__num_workers=0)
    for seen in run_ranks(train_and_watch, 2, config):
        assert seen["drawn"] == {step: expected["drawn"][step] for step in range(3, STEPS)}
    assert pairs_of(run) == pairs_of(directory)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_resuming_with_another_curriculum_is_refused(alone, tmp_path):
    run = killed_after(alone[0], tmp_path / "run", step=6)
    for changes in ({"data__contrast": "uniform"}, {"data__curriculum": CurriculumSection(interval=3)}):
        (name,) = changes
        message = training_refusal(config_of(run, **changes))
        assert str(checkpoint_of(run, 6)) in message
        assert f"was trained on other comparisons: {name.replace('__', '.')} " in message


def without_pairs(checkpoint: Path) -> None:
    """Make of a checkpoint one that an earlier program could have written."""
    from megatron_polar.manifest import encode_manifest

    (checkpoint / PAIRS).unlink()
    manifest = orjson.loads((checkpoint / "manifest.json").read_bytes())
    del manifest["files"][PAIRS]
    (checkpoint / "manifest.json").write_bytes(encode_manifest(manifest))


def test_a_checkpoint_without_counts_is_refused_where_they_decide(alone, tmp_path):
    run = killed_after(alone[0], tmp_path / "run", step=6)
    without_pairs(checkpoint_of(run, 6))
    message = training_refusal(config_of(run))
    for part in (str(checkpoint_of(run, 6)), f"has no {PAIRS}", "by_difficulty", "train.init_from"):
        assert part in message
    assert "\n" not in message


def test_a_checkpoint_without_counts_starts_them_afresh_in_a_uniform_run(trajectory_corpus, tmp_path, capfd):
    run_training(tiny_config(trajectory_corpus, tmp_path / "whole"))
    run = killed_after(tmp_path / "whole", tmp_path / "run", step=3)
    without_pairs(checkpoint_of(run, 3))
    run_training(config_of(run))
    assert "has no counts of policy pairs (an earlier program wrote it); they start at 0" in capfd.readouterr().err
    assert read_pairs(run / PAIRS)[1]["current"].comparisons.sum() == 3 * BATCH
    assert read_pairs(tmp_path / "whole" / PAIRS)[1]["current"].comparisons.sum() == 6 * BATCH


def test_preferences_alone_leave_nothing_to_choose(ranking_corpus, tmp_path):
    message = training_refusal(curriculum_config(ranking_corpus, tmp_path / "run"))
    for part in ("data.contrast=by_difficulty", str(ranking_corpus), "set it to uniform"):
        assert part in message


def test_documents_of_two_policies_get_a_warning(trajectory_corpus, tmp_path, capfd):
    run_training(
        curriculum_config(trajectory_corpus, tmp_path / "a", data__candidates_per_comparison=3, train__num_steps=1)
    )
    assert "0% of the documents looked at have more than a comparison needs" in capfd.readouterr().err
    run_training(curriculum_config(trajectory_corpus, tmp_path / "b", train__num_steps=1))
    assert "documents looked at" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b'{"format": "x"}', "is no megatron_polar.pairs"),
        (None, "No such"),
    ],
)
def test_a_file_that_holds_no_counts_is_refused_in_one_line(content, part, tmp_path):
    if content is not None:
        (tmp_path / PAIRS).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_pairs(tmp_path / PAIRS)
    assert str(tmp_path / PAIRS) in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# --- replaying -------------------------------------------------------------------------------------------------------


def replay(config, step: int) -> int | str:
    faults.plan("")
    try:
        return replay_step(config, step=step)
    except UserError as error:
        return str(error)


def test_a_step_is_replayed_with_the_policies_that_met_in_it(alone, tmp_path, capfd):
    run = Path(shutil.copytree(alone[0], tmp_path / "run"))
    assert run_ranks(replay, 1, config_of(run), 6) == [0]  # from the checkpoint of step 3, in the next period
    assert "comparisons 40" in capfd.readouterr().err
    shutil.rmtree(checkpoint_of(run, 6))
    message = run_ranks(replay, 1, config_of(run), 8)[0]
    for part in ("--replay-step 8", "of step 3", "data.curriculum.interval=2", "checkpoint.save_interval"):
        assert part in message


# --- the report and the configuration --------------------------------------------------------------------------------


def write_counts(directory: Path, *, num_policies: int) -> None:
    """Policy 3 is always ranked wrongly, policy 5 half the time, all others rightly: 10 comparisons a pair."""
    numbers = np.arange(num_policies)
    reference, other = (side.reshape(-1) for side in np.meshgrid(numbers, numbers, indexing="ij"))
    reference, other = reference[reference != other], other[reference != other]
    lost = np.where((reference == 3) | (other == 3), 20, np.where((reference == 5) | (other == 5), 10, 0))
    counts = PairCounts(pair_keys(reference, other), 20 - lost, lost)
    parts = {"older": EMPTY, "last": counts, "current": EMPTY}
    names = [f"<policy {number}>" for number in numbers]
    (directory / PAIRS).write_bytes(encode_pairs(parts, policies=names, step=1))


@pytest.mark.parametrize("num_policies", [8, 150])
def test_the_report_draws_the_hardest_policies_first(num_policies, tmp_path):
    write_counts(tmp_path, num_policies=num_policies)
    body = pairs_section(tmp_path / PAIRS).body
    heat_map = body[body.index('<table class="heat') : body.index("</table>")]
    columns = re.findall(r'<th scope="col">(.*?)</th>', heat_map)
    assert columns == re.findall(r'<th scope="row">(.*?)</th>', heat_map)
    if num_policies == 8:
        assert columns[:2] == ["&lt;policy 3&gt;", "&lt;policy 5&gt;"]
        assert len(columns) == 8
    else:
        assert (columns[0], columns[-1], len(columns)) == ("1 to 3", "148 to 150", 50)
        assert "3 policies together" in body
    assert "<policy" not in body  # names are escaped
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', body)
    pairs = [row for row in rows if row[0] == "&lt;policy 3&gt;" and "title=" not in row[1]]
    assert f"{4 / (10 + 8):.4f}" in pairs[0][1]  # 4 right ones of the prior's 8 comparisons, 10 wrong ones


def test_a_report_without_counts_has_no_such_section(tmp_path):
    parts = dict.fromkeys(("older", "last", "current"), EMPTY)
    (tmp_path / PAIRS).write_bytes(encode_pairs(parts, policies=["a", "b"], step=0))
    assert pairs_section(tmp_path / PAIRS) is None


def test_the_run_has_drawn_its_pairs(alone):
    training_report(alone[0])
    page = (alone[0] / "report.html").read_text()
    assert "<h2>Pairs of policies</h2>" in page
    assert "policy4" in page


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"interval": 1}, "interval=1 must be at least 2"),
        ({"half_life": 0}, "half_life=0 must be at least 1"),
        ({"floor": 1.5}, "floor=1.5 must lie between 0 and 1"),
        ({"floor": float("nan")}, "floor=nan is no finite number"),
        ({"temperature": 0.0}, "temperature=0.0 must be at least 0.05"),
        ({"prior_comparisons": 0.0}, "prior_comparisons=0.0 must be above 0"),
        ({"record": False}, "record=false counts nothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_curriculum_that_cannot_be_is_refused_by_its_key(section, key, tmp_path):
    with pytest.raises(UserError) as caught:
        validate(curriculum_config("data", tmp_path, data__curriculum=CurriculumSection(**section)))
    assert key in str(caught.value)
