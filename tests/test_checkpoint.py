"""A checkpoint is complete and intact or not used at all, and a resumed run is the run that was never interrupted."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from megatron.core import dist_checkpointing
from ranks import run_ranks
from tiny_runs import (
    STEPS,
    change,
    checkpoint_of,
    killed_after,
    metric_rows,
    run_training,
    tiny_config,
    training_refusal,
    validation_rows,
)

from megatron_polar.config.load import dump_config, load_config
from megatron_polar.config.schema import ParallelSection
from megatron_polar.convert.convert import to_hf
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import select_device
from megatron_polar.train.checkpoint_files import find_checkpoint, read_state, verify_checkpoint

PP2 = {"pipeline_model_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, trajectory_corpus, ranking_corpus) -> Path:
    """A finished fp32 run of one rank with checkpoints of steps 2, 4 and 6; tests copy it and leave it as it is."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    run_training(base_config(trajectory_corpus, ranking_corpus, directory))
    return directory


def base_config(corpus, validation, directory, **changes):
    from megatron_polar.config.schema import DatasetSource

    config = tiny_config(corpus, directory, checkpoint__save_interval=2, optimizer__lr=1e-2)
    return change(config, data__validation=(DatasetSource(str(validation)),), **changes)


def config_of(run, **changes):
    """The configuration that a run has written, for its (copied) directory."""
    return change(load_config(Path(run) / "config.yaml"), run__directory=str(run), **changes)


def shard_hashes(checkpoint: Path) -> dict[str, str]:
    files = orjson.loads((checkpoint / "manifest.json").read_bytes())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith((".distcp", "common.pt"))}


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- resuming --------------------------------------------------------------------------------------------------------

RESUMES = {
    "fp32": (1, {}),
    "bf16_dropout": (1, {"train__precision": "bf16", "model__hidden_dropout": 0.1}),
    "replicated_optimizer": (1, {"optimizer__use_distributed_optimizer": False}),
    "tp2_sp_dropout": (2, {"parallel": TP2_SP, "model__hidden_dropout": 0.1}),
    "dp2_bf16_dropout": (2, {"train__precision": "bf16", "model__hidden_dropout": 0.1}),
    "pp2_dropout": (2, {"parallel": PP2, "model__hidden_dropout": 0.1}),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, tmp_path, trajectory_corpus):
    world_size, changes = RESUMES[name]
    config = tiny_config(trajectory_corpus, tmp_path / "whole", **changes)
    run_training(config, world_size)
    killed_after(tmp_path / "whole", tmp_path / "resumed", step=3)
    run_training(change(config, run__directory=str(tmp_path / "resumed")), world_size)
    whole, resumed = metric_rows(tmp_path / "whole"), metric_rows(tmp_path / "resumed")
    assert [row["iteration"] for row in resumed] == list(range(1, STEPS + 1))
    for one, other in zip(whole, resumed, strict=True):
        for key in ("rm/loss", "rm/accuracy", "grad-norm", "learning-rate", "consumed-samples", "rm/reward_std"):
            assert one[key] == other[key], f"{key} of iteration {one['iteration']}"
    # Weights, optimizer and random-number states, as they lie on the disk.
    one, other = (shard_hashes(checkpoint_of(tmp_path / run, STEPS)) for run in ("whole", "resumed"))
    assert one == other
    assert one != shard_hashes(checkpoint_of(tmp_path / "whole", 3))


def test_dropout_does_something(tmp_path, trajectory_corpus):
    for name, dropout in (("without", 0.0), ("with", 0.1)):
        run_training(tiny_config(trajectory_corpus, tmp_path / name, train__num_steps=1, model__hidden_dropout=dropout))
    losses = [metric_rows(tmp_path / name)[0]["rm/loss"] for name in ("without", "with")]
    assert losses[0] != losses[1]


@pytest.fixture(scope="module")
def dp2_run(tmp_path_factory, trajectory_corpus) -> Path:
    directory = tmp_path_factory.mktemp("dp2") / "run"
    run_training(tiny_config(trajectory_corpus, directory), 2)
    return directory


@pytest.mark.parametrize(("world_size", "parallel"), [(2, TP2_SP), (1, {}), (2, PP2)], ids=["tp2_sp", "single", "pp2"])
def test_a_run_of_two_data_parallel_ranks_goes_on_in_another_layout(world_size, parallel, dp2_run, tmp_path, capfd):
    run = killed_after(dp2_run, tmp_path / "run", step=3)
    run_training(config_of(run, parallel=parallel), world_size)
    assert "resuming in another layout" in capfd.readouterr().err
    whole, resumed = ([(r["rm/loss"], r["grad-norm"]) for r in metric_rows(d)[3:]] for d in (dp2_run, run))
    # fp32 sums in another order, as between layouts that never stop (test_layouts.py).
    np.testing.assert_allclose(resumed, whole, rtol=1e-6)
    assert read_state(checkpoint_of(run, STEPS)).layout != read_state(checkpoint_of(run, 3)).layout


def test_a_finished_run_that_is_started_again_does_nothing(finished, tmp_path, capfd):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = (run / "metrics.jsonl").read_bytes(), shard_hashes(checkpoint_of(run, STEPS))
    run_training(config_of(run))
    assert f"at step {STEPS}" in capfd.readouterr().err
    assert ((run / "metrics.jsonl").read_bytes(), shard_hashes(checkpoint_of(run, STEPS))) == before


def test_rows_of_metrics_beyond_the_resumed_step_are_cut(finished, tmp_path):
    run = killed_after(finished, tmp_path / "run", step=2)
    assert [row["iteration"] for row in metric_rows(finished)] == [1, 2, 3, 4, 5, 6]
    run_training(config_of(run, train__num_steps=3))
    assert [row["iteration"] for row in metric_rows(run)] == [1, 2, 3]
    assert [row["iteration"] for row in validation_rows(run)] == [3]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train__global_batch_size": 16}, ("train.global_batch_size=8, now 16", "32 comparisons consumed, now 64")),
        ({"run__seed": 8}, ("was trained on other comparisons: run.seed 7 before and 8 now;",)),
        (
            {"data__candidates_per_comparison": 3, "data__max_sequence_length": 99},
            ("_comparison 2 before and 3 now, data.max_sequence_length ", " before and 99 now;", "train.init_from"),
        ),
    ],
    ids=["batch_size", "seed", "candidates"],
)
def test_resuming_with_other_data_or_batches_is_refused(changes, parts, finished, tmp_path):
    run = killed_after(finished, tmp_path / "run", step=4)
    message = training_refusal(config_of(run, **changes))
    for part in (str(checkpoint_of(run, 4)), *parts):
        assert part in message
    assert "\n" not in message


def test_resuming_with_another_dataset_is_refused(finished, ranking_corpus, tmp_path):
    from megatron_polar.config.schema import DatasetSource

    run = killed_after(finished, tmp_path / "run", step=4)
    message = training_refusal(config_of(run, data__train=(DatasetSource(str(ranking_corpus)),)))
    assert "was trained on other data" in message


def test_a_directory_with_checkpoints_is_refused_when_resuming_is_off(finished, tmp_path):
    run = killed_after(finished, tmp_path / "run", step=4)
    assert "checkpoint.resume=false" in training_refusal(config_of(run, checkpoint__resume=False))


def test_a_model_of_another_shape_is_refused_with_both_shapes(finished, tmp_path):
    run = killed_after(finished, tmp_path / "run", step=4)
    message = training_refusal(config_of(run, model__ffn_hidden_size=96))
    for part in (str(checkpoint_of(run, 4)), "mlp.linear", "config.yaml"):
        assert part in message
    shapes = re.search(r"has shape \((.*)\) in the checkpoint and \((.*)\) in this model", message).groups()
    saved, here = (math.prod(int(size) for size in shape.split(", ")) for shape in shapes)
    assert 96 * saved == 64 * here


def test_a_model_of_another_depth_is_refused_with_both_shapes(finished, tmp_path):
    run = killed_after(finished, tmp_path / "run", step=4)
    message = training_refusal(config_of(run, model__num_layers=1))
    assert "(2, " in message
    assert "(1, " in message


# --- trust -----------------------------------------------------------------------------------------------------------


def test_every_kept_checkpoint_verifies_and_latest_names_the_newest(finished):
    steps = sorted(path.name for path in (finished / "checkpoints").glob("step_*"))
    assert steps == ["step_00000002", "step_00000004", "step_00000006"]
    assert all(verify_checkpoint(finished / "checkpoints" / step) is None for step in steps)
    assert (finished / "checkpoints" / "latest").read_text().strip() == steps[-1]
    assert find_checkpoint(finished) == finished / "checkpoints" / steps[-1]
    assert find_checkpoint(checkpoint_of(finished, 4)) == checkpoint_of(finished, 4)


def test_the_manifest_covers_every_file(finished):
    newest = checkpoint_of(finished, STEPS)
    files = orjson.loads((newest / "manifest.json").read_bytes())["files"]
    present = {p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file()}
    assert set(files) == present - {"manifest.json"}


def test_any_flipped_byte_is_noticed_and_named(finished, tmp_path):
    newest = checkpoint_of(finished, STEPS)
    for name in orjson.loads((newest / "manifest.json").read_bytes())["files"]:
        copy = Path(shutil.copytree(newest, tmp_path / "copy" / newest.name))
        flip_byte(copy / name)
        assert verify_checkpoint(copy).startswith(name)
        shutil.rmtree(copy)


def test_missing_and_cut_files_are_noticed_and_named(finished, tmp_path):
    copy = Path(shutil.copytree(checkpoint_of(finished, STEPS), tmp_path / "step_00000006"))
    data = (copy / "common.pt").read_bytes()
    (copy / "common.pt").write_bytes(data[:-1])
    assert f"common.pt is truncated: {len(data) - 1} bytes instead of {len(data)}" in verify_checkpoint(copy)
    (copy / "common.pt").unlink()
    assert "common.pt is missing" in verify_checkpoint(copy)
    (copy / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in verify_checkpoint(copy)
    (copy / "manifest.json").unlink()
    assert "manifest.json is missing" in verify_checkpoint(copy)


def test_a_damaged_newest_step_is_skipped_by_name_and_the_older_one_goes_on(finished, tmp_path, capfd):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shard = next(checkpoint_of(run, STEPS).glob("*.distcp"))
    flip_byte(shard)
    run_training(config_of(run))
    shown = capfd.readouterr().err
    assert f"warning: {checkpoint_of(run, STEPS)}: skipped: {shard.name} has SHA-256" in shown
    assert f"resumed from {checkpoint_of(run, 4)} at step 4" in shown
    assert shard_hashes(checkpoint_of(run, STEPS)) == shard_hashes(checkpoint_of(finished, STEPS))  # written again
    assert verify_checkpoint(checkpoint_of(run, STEPS)) is None


def test_settings_that_changed_since_the_checkpoint_are_named(finished, tmp_path, capfd):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    run_training(config_of(run, optimizer__lr=5e-3))
    assert "checkpoint was trained with: optimizer.lr 0.01 before and 0.005 now" in capfd.readouterr().err
    run_training(config_of(run, optimizer__lr=1e-2))
    assert "checkpoint was trained with" not in capfd.readouterr().err


def test_a_half_written_newest_step_is_skipped_and_written_again(finished, tmp_path, capfd):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (checkpoint_of(run, STEPS) / "manifest.json").unlink()
    next(checkpoint_of(run, STEPS).glob("*.distcp")).unlink()
    run_training(config_of(run))
    assert "manifest.json is missing" in capfd.readouterr().err
    assert verify_checkpoint(checkpoint_of(run, STEPS)) is None
    set_aside = list((run / "checkpoints").glob("damaged-step_00000006-*"))
    assert len(set_aside) == 1  # kept for a person to look at


def test_without_an_intact_checkpoint_the_run_stops_instead_of_starting_over(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for step in (2, 4, 6):
        flip_byte(checkpoint_of(run, step) / "state.json")
    message = training_refusal(config_of(run))
    assert "none of its 3 checkpoints is complete and intact" in message
    assert str(run) in message
    assert len(metric_rows(run)) == STEPS  # nothing was thrown away


def test_a_finished_run_keeps_the_configuration_that_it_was_trained_with(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    run_training(config_of(run))  # in its new place
    before = (run / "config.yaml").read_bytes()
    run_training(config_of(run, optimizer__lr=0.5, logging__interval=3))
    assert (run / "config.yaml").read_bytes() == before


def test_an_export_names_the_checkpoint_that_it_is_of(finished, tmp_path, capfd):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    flip_byte(checkpoint_of(run, 6) / "state.json")
    to_hf(run, output=tmp_path / "export", layout="internlm2")
    said = capfd.readouterr().err
    assert f"{checkpoint_of(run, 6)}: skipped: state.json" in said
    assert re.search(rf"{tmp_path / 'export'}: \d+ tensors of {checkpoint_of(run, 4)}, ", said)


def test_a_path_without_checkpoints_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no checkpoint here"):
        find_checkpoint(tmp_path)


def test_a_directory_beside_a_runs_checkpoints_leads_to_the_run(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    aside = checkpoints / "damaged-step_00000006-0a1b2c3d"
    for path in (aside, checkpoints / "step_00000004"):
        path.mkdir(parents=True)
    for path, why in ((aside, "was set aside because it did not verify"), (checkpoints, "holds the checkpoints")):
        with pytest.raises(UserError, match=f"{path}: {why}.*; give the run directory, {tmp_path / 'run'}$"):
            find_checkpoint(path)


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [4, 6]), (0, [2, 4, 6])])
def test_only_the_newest_checkpoints_are_kept(keep, left, finished, tmp_path):
    run = killed_after(finished, tmp_path / "run", step=4)
    run_training(config_of(run, checkpoint__keep=keep))
    assert sorted((run / "checkpoints").glob("step_*")) == [checkpoint_of(run, step) for step in left]


# --- what travels along ----------------------------------------------------------------------------------------------


def test_tokenizer_and_configuration_travel_with_the_checkpoint(finished, trajectory_corpus):
    newest = checkpoint_of(finished, STEPS)
    carried = load_tokenizer(newest / "tokenizer")
    assert carried.fingerprint == load_tokenizer(trajectory_corpus / "tokenizer").fingerprint
    assert load_config(newest / "config.yaml") == load_config(finished / "config.yaml")
    assert (newest / "config.yaml").read_text() == dump_config(load_config(newest / "config.yaml"))


def test_the_state_says_where_the_run_stands(finished):
    state = read_state(checkpoint_of(finished, 4))
    assert (state.step, state.consumed_comparisons) == (4, 32)
    assert state.layout == {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1}


# --- starting from weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_init_from_starts_with_the_checkpoints_weights(precision, finished, ranking_corpus, tmp_path):
    config = base_config(
        ranking_corpus,
        ranking_corpus,
        tmp_path / "next",
        train__init_from=str(finished),
        train__num_steps=1,
        train__precision=precision,
        evaluation__interval=1,
        optimizer__lr=1e-12,  # the evaluation after the step sees the weights before it
        optimizer__warmup_fraction=0.0,
    )
    run_training(config)
    # `finished` was evaluated on the same comparisons (seed + 1) after its last step.
    found, wanted = (validation_rows(run)[-1]["validation/rm/loss"] for run in (tmp_path / "next", finished))
    # bf16 rounds weights and activations to 8 bits.
    assert found == pytest.approx(wanted, rel=1e-6 if precision == "fp32" else 1e-2)
    assert metric_rows(tmp_path / "next")[0]["iteration"] == 1
    fresh = change(config, train__init_from=None, run__directory=str(tmp_path / "fresh"))
    run_training(fresh)
    other = validation_rows(tmp_path / "fresh")[-1]["validation/rm/loss"]
    if precision == "fp32":
        assert abs(other - wanted) > 1e-4 * wanted


def test_init_from_a_checkpoint_of_another_shape_is_refused_with_both_shapes(finished, trajectory_corpus, tmp_path):
    config = tiny_config(
        trajectory_corpus, tmp_path / "next", train__init_from=str(finished), model__ffn_hidden_size=96
    )
    message = training_refusal(config)
    for part in (f"train.init_from: {checkpoint_of(finished, STEPS)}", "in the checkpoint", "in this model"):
        assert part in message
    assert not (tmp_path / "next").exists()


def test_init_from_a_place_without_checkpoints_is_refused(trajectory_corpus, tmp_path):
    config = tiny_config(trajectory_corpus, tmp_path / "next", train__init_from=str(tmp_path / "nowhere"))
    assert f"train.init_from: {tmp_path / 'nowhere'}: no checkpoint here" in training_refusal(config)


def test_the_configured_optimizer_settings_hold_after_a_resume(finished, tmp_path):
    """megatron-core restores the learning rate and the betas that were saved; what the YAML says now must count."""
    run = killed_after(finished, tmp_path / "run", step=3)
    run_training(config_of(run, optimizer__lr=5e-3, optimizer__lr_decay_style="constant"))
    assert metric_rows(run)[-1]["learning-rate"] == pytest.approx(5e-3)


def saved_weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """Full weight tensors of a checkpoint, whatever shards they are in (the optimizer's left out)."""
    device = select_device("cpu", local_rank=0)
    ranks.initialize(ParallelSection(), device=device)
    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return {name: t.numpy() for name, t in tensors.items() if not name.startswith("optimizer") and torch.is_tensor(t)}


def test_overlapped_parameter_gathering_saves_the_updated_weights(tmp_path, trajectory_corpus):
    changes = {"evaluation__interval": 0, "optimizer__overlap_grad_reduce": True}
    weights = []
    for overlap in (False, True):
        directory = tmp_path / str(overlap)
        config = tiny_config(trajectory_corpus, directory, optimizer__overlap_param_gather=overlap, **changes)
        run_training(config, world_size=2)
        weights.append(run_ranks(saved_weights, 1, checkpoint_of(directory, STEPS))[0])
    assert len(weights[0]) > 5
    for name, tensor in weights[0].items():
        assert np.array_equal(tensor, weights[1][name]), name


def test_a_run_killed_in_its_first_save_starts_afresh(finished, tmp_path):
    run = killed_after(finished, tmp_path / "run", step=2)
    (checkpoint_of(run, 2) / "manifest.json").unlink()
    checkpoint_of(run, 2).rename(run / "checkpoints" / ".saving-step_00000002-0123abcd")
    (run / "checkpoints" / "latest").unlink()
    (run / "events.jsonl").unlink()  # of the run that this one is made from, which did save
    run_training(config_of(run))
    assert find_checkpoint(run) == checkpoint_of(run, STEPS)
    assert not list((run / "checkpoints").glob(".*"))  # the remains are gone, too
