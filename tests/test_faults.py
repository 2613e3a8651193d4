"""Faults while training: bad steps, spoilt replicas, what is written down; and sums in an order that layouts keep."""

import math
import shutil
from pathlib import Path

import faults_training
import numpy as np
import orjson
import pytest
import torch
from ranks import run_ranks
from tiny_runs import (
    STEPS,
    change,
    checkpoint_of,
    metric_rows,
    tiny_config,
    train_with,
    training_refusal,
    validation_rows,
)

from megatron_polar import faults
from megatron_polar.config.load import load_config
from megatron_polar.config.schema import DatasetSource, FaultsSection
from megatron_polar.errors import BAD_STEPS, MACHINE_DIFFERS, UserError
from megatron_polar.manifest import encode_manifest, file_entry
from megatron_polar.train.checkpoint_files import find_checkpoint, list_steps
from megatron_polar.train.guard import GOOD, NOT_FINITE, SPIKE, StepGuard, Verdict
from megatron_polar.train.journal import done_step, goodput_table, read_events
from megatron_polar.train.replay import replay_step

# --- fault points ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["nowhere", "after_shard:x", "after_shard=explode", "after_shard:0x1"])
def test_a_fault_that_does_not_exist_is_refused(text):
    with pytest.raises(UserError, match="POLAR_FAULT"):
        faults.plan(text)
    faults.plan("")


def test_a_fault_happens_once_at_its_turn_and_on_its_rank(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    faults.plan("gradient:2@1=nan,before_save@0=enospc")
    assert [faults.point("gradient") for _ in range(4)] == [None, "nan", None, None]
    assert faults.point("before_save") is None
    faults.plan("before_save@1=enospc")
    with pytest.raises(OSError, match="No space left"):
        faults.point("before_save")
    faults.plan("")


# --- bad steps -------------------------------------------------------------------------------------------------------


def test_a_nan_on_one_rank_of_four_is_skipped_by_all_with_unchanged_weights(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__save_interval=1, train__num_steps=4)
    outcomes = run_ranks(train_with, 4, config, "gradient:3@2=nan")
    assert outcomes == [(0, "")] * 4
    before, after = (saved_state(checkpoint_of(tmp_path / "run", step)) for step in (2, 3))
    assert before.keys() == after.keys()
    for name in before:  # weights, both moments and the optimizer's own count of steps
        assert np.array_equal(before[name], after[name]), name
    later = saved_state(checkpoint_of(tmp_path / "run", 4))
    assert any(not np.array_equal(after[name], later[name]) for name in after)
    (event,) = [event for event in read_events(tmp_path / "run") if event["event"] == "bad_step"]
    assert event["step"] == 3
    assert event["ranks"][0]["rank"] == 2
    assert event["ranks"][0]["what"] == "gradient"
    assert set(event["ranks"][0]["samples"]) <= set(range(16, 24))
    assert "nan" in event["reason"]
    row = metric_rows(tmp_path / "run")[-1]
    assert (row["reliability/skipped_steps"], row["reliability/nan_steps"]) == (1, 1)


def test_a_nan_loss_names_rank_micro_batch_and_comparisons(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=3)
    run_ranks(train_with, 2, config, "loss:2@1=nan")
    (event,) = [event for event in read_events(tmp_path / "run") if event["event"] == "bad_step"]
    (suspect,) = event["ranks"]
    assert suspect["rank"] == 1
    assert suspect["what"].startswith("loss of micro-batch")
    shown = capfd.readouterr().err
    assert f"iteration {event['step']}: skipped, weights unchanged" in shown
    assert f"comparisons {suspect['samples'][0]}" in shown


def saved_state(checkpoint: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, optimizer included, and the optimizer's count of steps."""
    return run_ranks(_saved_state, 1, checkpoint)[0]


def _saved_state(checkpoint: Path) -> dict[str, np.ndarray]:
    from megatron.core import dist_checkpointing

    from megatron_polar.config.schema import ParallelSection
    from megatron_polar.parallel import topology as ranks
    from megatron_polar.parallel.device import select_device

    ranks.initialize(ParallelSection(), device=select_device("cpu", local_rank=0))
    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint))
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    optimizer = common["optimizer"]
    groups = optimizer.get("optimizer", optimizer)["param_groups"]
    steps = {f"steps of group {i}": np.array(group.get("step", -1)) for i, group in enumerate(groups)}
    return {name: tensor.numpy() for name, tensor in tensors.items() if torch.is_tensor(tensor)} | steps


def always_nan(config, good_losses: int = 3) -> tuple[int, str]:
    """Every loss after the first `good_losses` micro-batches is not a number."""
    passed = [0]

    def spoiled(name: str) -> str | None:
        passed[0] += name == "loss"
        return "nan" if name == "loss" and passed[0] > good_losses else None

    faults.point = spoiled
    return train_with(config)


def test_too_many_bad_steps_stop_with_a_report_and_a_command_that_replays(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        train__num_steps=20,
        data__max_tokens_per_micro_batch=4000,
        faults__max_consecutive_bad_steps=2,
    )
    (status, message) = run_ranks(always_nan, 1, config)[0]
    assert status == BAD_STEPS
    assert "3 steps in a row were skipped" in message
    report = orjson.loads((tmp_path / "run" / "bad_steps.json").read_bytes())
    assert [event["step"] for event in report["steps"]] == [4, 5, 6]
    assert report["replay"] in message
    assert report["replay"].endswith(f"train {tmp_path / 'run'}/config.yaml --replay-step 4")
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", 6)
    assert orjson.loads((tmp_path / "run" / "status.json").read_bytes())["exit_status"] == BAD_STEPS
    capfd.readouterr()
    assert run_ranks(replay_step_4, 1, config, "")[0] == 0  # nothing is wrong with the data
    assert "does not fail by itself" in capfd.readouterr().err
    assert run_ranks(replay_step_4, 1, config, "loss=nan")[0] == 1
    assert "BAD rank 0 micro-batch 0" in capfd.readouterr().err
    (checkpoint_of(tmp_path / "run", 6) / "state.json").write_bytes(b"{")  # damaged: an older one is taken
    assert run_ranks(replay_step_4, 1, config, "")[0] == 0
    assert "step_00000003" in capfd.readouterr().err


@pytest.mark.parametrize("sharded", [True, False])
def test_a_run_none_of_whose_steps_was_taken_ends_as_one_whose_steps_were(sharded, tmp_path, trajectory_corpus):
    """Weights that are NaN from the start, say: when the last good ones are saved, the optimizer has no moments yet."""
    changes = {"faults__max_consecutive_bad_steps": 2, "optimizer__use_distributed_optimizer": sharded}
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=20, **changes)
    (status, message) = run_ranks(always_nan, 1, config, 0)[0]
    assert status == BAD_STEPS and "3 steps in a row were skipped" in message
    report = orjson.loads((tmp_path / "run" / "bad_steps.json").read_bytes())
    assert [event["step"] for event in report["steps"]] == [1, 2, 3]
    assert find_checkpoint(tmp_path / "run").name == "step_00000003"


@pytest.mark.parametrize("sharded", [True, False])
def test_a_checkpoint_from_before_the_first_step_taken_resumes(sharded, tmp_path, trajectory_corpus):
    changes = {"checkpoint__save_interval": 1, "optimizer__use_distributed_optimizer": sharded}
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=3, **changes)
    assert run_ranks(train_with, 1, config, "loss:1=nan") == [(0, "")]
    wanted = saved_state(checkpoint_of(tmp_path / "run", 3))
    for step in (2, 3):
        shutil.rmtree(checkpoint_of(tmp_path / "run", step))
    assert run_ranks(train_with, 1, config, "") == [(0, "")]
    found = saved_state(checkpoint_of(tmp_path / "run", 3))
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert np.array_equal(found[name], wanted[name]), name


def test_a_step_of_an_interleaved_pipeline_is_replayed(tmp_path, trajectory_corpus, capfd):
    parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    config = tiny_config(trajectory_corpus, tmp_path / "run", model__num_layers=4, parallel=parallel)
    run_ranks(train_with, 2, config, "")
    assert run_ranks(replay_step_4, 2, config, "") == [0, 0]
    assert "does not fail by itself" in capfd.readouterr().err


def replay_step_4(config, fault: str) -> int:
    faults.plan(fault)
    return replay_step(config, step=4)


def test_spikes_are_skipped_and_a_nan_does_not_poison_the_statistics():
    generator = np.random.default_rng(3)
    guard = StepGuard(FaultsSection(spike_sigmas=6.0, spike_window=64))
    losses = generator.normal(0.6, 0.02, 200)
    assert not any(guard.judge(loss=loss, grad_norm=1.0 + 0.1 * loss).code for loss in losses)
    for _ in range(5):
        assert guard.judge(loss=math.nan, grad_norm=1.0).code == NOT_FINITE
        assert guard.judge(loss=0.6, grad_norm=math.inf).code == NOT_FINITE
    assert guard.judge(loss=0.61, grad_norm=1.06).code == GOOD  # as before: no NaN has got into the window
    spikes = [guard.judge(loss=3.0, grad_norm=1.06), guard.judge(loss=0.6, grad_norm=50.0)]
    assert [spike.code for spike in spikes] == [SPIKE, SPIKE]
    assert spikes[0].reason.startswith("loss 3 is above")
    assert spikes[1].reason.startswith("grad_norm 50 is above")
    assert guard.judge(loss=0.6, grad_norm=1.06).code == GOOD


def test_one_rank_that_finds_a_step_bad_makes_all_ranks_count_it():
    assert run_ranks(_count_verdicts, 2) == [(2, 1, 0), (2, 1, 0)]


def _count_verdicts() -> tuple[int, int, int]:
    from megatron_polar.config.schema import ParallelSection
    from megatron_polar.parallel import topology as ranks
    from megatron_polar.parallel.device import select_device

    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(ParallelSection(), device=device)
    guard = StepGuard(FaultsSection())
    codes = [(GOOD, NOT_FINITE), (SPIKE, GOOD), (GOOD, GOOD)]
    reasons = [guard.agree(Verdict(step[topology.rank], "mine"), device=device) for step in codes]
    assert reasons[2] is None
    assert all(reasons[:2])
    return guard.skipped, guard.nonfinite, guard.in_a_row


def test_a_level_that_has_risen_for_good_is_accepted_in_the_end():
    guard = StepGuard(FaultsSection(spike_sigmas=6.0, spike_window=32))
    generator = np.random.default_rng(4)
    for loss in generator.normal(0.5, 0.02, 64):
        guard.judge(loss=loss, grad_norm=1.0)
    refused = [guard.judge(loss=loss, grad_norm=1.0).code == SPIKE for loss in generator.normal(1.0, 0.02, 64)]
    assert refused[0]
    assert not any(refused[-16:])


def test_the_guard_judges_after_a_resume_as_if_nothing_had_happened():
    one, other = (StepGuard(FaultsSection(spike_sigmas=3.0, spike_window=16)) for _ in range(2))
    values = np.random.default_rng(5).lognormal(0, 1, 60).tolist()
    for value in values[:30]:
        one.judge(loss=value, grad_norm=value)
    other.restore(orjson.loads(orjson.dumps(one.state())))
    for value in values[30:]:
        assert one.judge(loss=value, grad_norm=value) == other.judge(loss=value, grad_norm=value)
    assert one.state() == other.state()


# --- replicas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 3])
def test_a_flipped_bit_on_one_replica_is_found_within_the_interval_with_its_rank(rank, tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        faults__replica_check_interval=2,
        optimizer__use_distributed_optimizer=False,
        checkpoint__save_interval=100,
    )
    for status, message in run_ranks(train_with, 4, config, f"step_end:3@{rank}=flip"):
        assert status == MACHINE_DIFFERS
        assert message.startswith("iteration 4: weights that must be equal on all replicas differ:")
        assert f"of rank {rank};" in message
    assert not list_steps(tmp_path / "run")  # spoilt weights are never saved


def test_no_save_evades_the_comparison_of_replicas(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        optimizer__use_distributed_optimizer=False,
        checkpoint__save_interval=100,
    )
    outcomes = run_ranks(train_with, 3, config, "step_end:3@1=flip,after_update:3@0=term")
    assert {status for status, _ in outcomes} == {MACHINE_DIFFERS}
    assert not list_steps(tmp_path / "run")


def test_healthy_replicas_raise_no_alarm(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", faults__replica_check_interval=1)
    assert run_ranks(train_with, 2, config, "") == [(0, "")] * 2


# --- what is written down ---


def status_of(run: Path) -> tuple[str, int, int]:
    content = orjson.loads((run / "status.json").read_bytes())
    return content["state"], content["exit_status"], content["step"]


def events_of(run: Path) -> list[str]:
    return [event["event"] for event in read_events(run)]


def test_status_says_how_a_run_ended_whichever_way(tmp_path, trajectory_corpus):
    run = tmp_path / "run"
    config = tiny_config(trajectory_corpus, run)
    faults_training.run_job(config, fault="after_save:2=kill")
    assert orjson.loads((run / "status.json").read_bytes())["state"] == "running"
    run_ranks(train_with, 1, config, "")  # finds nothing left to do
    assert status_of(run) == ("done", 0, STEPS)
    run_ranks(train_with, 1, config, "")
    assert events_of(run).count("done") == 1
    nowhere = tiny_config(tmp_path / "nowhere", run)
    assert "no such directory" in training_refusal(nowhere)
    assert status_of(run) == ("refused", 2, STEPS)
    more = change(config, train__num_steps=STEPS + 6)
    assert faults_training.run_job(more, fault="data:2=eio") == [1]
    assert status_of(run) == ("failed", 2, STEPS + 2)
    assert events_of(run)[-3:] == ["refused", "start", "failed"]


def test_a_run_that_is_extended_is_done_again_and_one_whose_extension_failed_is_what_it_was(
    tmp_path, trajectory_corpus
):
    run = tmp_path / "run"
    config = tiny_config(trajectory_corpus, run)
    run_ranks(train_with, 1, config, "")
    more = change(config, train__num_steps=STEPS + 2)
    assert faults_training.run_job(more, fault="data:1=eio") == [1]  # before a step of it was saved
    assert load_config(run / "config.yaml").train.num_steps == STEPS + 2
    assert done_step(read_events(run)) is None
    run_ranks(train_with, 1, config, "")
    assert load_config(run / "config.yaml").train.num_steps == STEPS
    assert done_step(read_events(run)) == STEPS
    run_ranks(train_with, 1, more, "")
    assert done_step(read_events(run)) == STEPS + 2
    assert events_of(run).count("done") == 3


def test_a_refused_start_in_a_fresh_directory_leaves_nothing(tmp_path):
    message = training_refusal(tiny_config(tmp_path / "nowhere", tmp_path / "run"))
    assert f"data.train: {tmp_path / 'nowhere'}: no such directory" in message
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_under_another_name_is_not_trusted(tmp_path, trajectory_corpus, capfd):
    run = tmp_path / "run"
    config = tiny_config(trajectory_corpus, run)
    run_ranks(train_with, 1, config, "")
    for name in ("step_00000098", "step_00000099"):
        shutil.copytree(checkpoint_of(run, 3), run / "checkpoints" / name)
    run_ranks(train_with, 1, change(config, train__num_steps=9, checkpoint__keep=2), "")
    assert "step_00000099: skipped: holds step 3 under the name of step 99" in capfd.readouterr().err
    assert find_checkpoint(run) == checkpoint_of(run, 9)
    damaged = [event for event in read_events(run) if event["event"] == "damaged"]
    assert [event["name"][:21] for event in damaged] == ["damaged-step_00000099", "damaged-step_00000098"]


def test_a_checkpoint_of_another_run_is_said_to_be_one(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "long", train__num_steps=9)
    run_ranks(train_with, 1, config, "")
    run_ranks(train_with, 1, change(config, run__directory=str(tmp_path / "run"), train__num_steps=3), "")
    shutil.copytree(checkpoint_of(tmp_path / "long", 9), checkpoint_of(tmp_path / "run", 9))
    run_ranks(train_with, 1, change(config, run__directory=str(tmp_path / "run"), train__num_steps=12), "")
    assert "resumes at step 9, and metrics.jsonl ends at 3" in capfd.readouterr().err
    assert [event.get("lost_steps") for event in read_events(tmp_path / "run") if event["event"] == "start"][-1] == 0


def test_another_optimizer_and_a_newer_program_are_named(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    run_ranks(train_with, 1, config, "")
    message = training_refusal(change(config, optimizer__use_distributed_optimizer=False))
    assert "saved by the distributed optimizer, and optimizer.use_distributed_optimizer now asks" in message
    path = checkpoint_of(tmp_path / "run", STEPS) / "manifest.json"
    state = path.with_name("state.json")
    state.write_bytes(state.read_bytes().replace(b"distributed, head apart", b"distributed"))
    manifest = orjson.loads(path.read_bytes())
    manifest["files"]["state.json"] = file_entry(state)
    path.write_bytes(encode_manifest(manifest))
    assert "an earlier program, whose optimizer state may stand under wrong names" in training_refusal(config)
    path.write_bytes(encode_manifest(orjson.loads(path.read_bytes()) | {"format_version": 99}))
    assert "has format_version=99" in training_refusal(config)
    assert checkpoint_of(tmp_path / "run", STEPS).is_dir()


def test_skipped_steps_of_an_undone_timeline_do_not_count(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__save_interval=4)
    faults_training.run_job(config, fault="gradient:3=nan,step_end:3=kill")
    run_ranks(train_with, 1, config, "gradient:3=nan")
    assert goodput_table(tmp_path / "run")["skipped_steps"] == 1


# --- one order of sums -----------------------------------------------------------------------------------------------


def test_canonical_reduction_is_bitwise_equal_over_data_parallel_sizes_and_a_resume(tmp_path, trajectory_corpus):
    states, losses = [], []
    for world_size in (1, 2, 4):
        config = tiny_config(
            trajectory_corpus,
            tmp_path / str(world_size),
            train__canonical_reduction=True,
            optimizer__use_distributed_optimizer=False,
            optimizer__lr=1e-2,
            train__global_batch_size=20,
        )
        if world_size == 4:  # the first half on two ranks
            run_ranks(train_with, 2, config, "after_update:3=term")
        run_ranks(train_with, world_size, config, "")
        states.append(saved_state(checkpoint_of(tmp_path / str(world_size), STEPS)))
        losses.append([row["rm/loss"] for row in metric_rows(tmp_path / str(world_size))])
    for other in states[1:]:
        assert all(np.array_equal(states[0][name], other[name]) for name in states[0])
    assert losses[0] == losses[1] == losses[2]


def test_the_usual_reduction_is_not_bitwise_equal(tmp_path, trajectory_corpus):
    """What canonical_reduction is for: without it the last bits depend on the number of ranks."""
    states = []
    for world_size in (1, 2):
        config = tiny_config(
            trajectory_corpus,
            tmp_path / str(world_size),
            optimizer__use_distributed_optimizer=False,
            optimizer__lr=1e-2,
            train__global_batch_size=20,
        )
        run_ranks(train_with, world_size, config, "")
        states.append(saved_state(checkpoint_of(tmp_path / str(world_size), STEPS)))
    assert any(not np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_canonical_reduction_evaluates_and_blames_on_more_ranks_than_micro_batches(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        data__validation=(DatasetSource(str(trajectory_corpus)),),
        data__max_tokens_per_micro_batch=4000,
        train__canonical_reduction=True,
        optimizer__use_distributed_optimizer=False,
        evaluation__num_comparisons=2,
    )
    assert run_ranks(train_with, 4, config, "gradient:1@0=nan") == [(0, "")] * 4
    assert len(validation_rows(tmp_path / "run")) == 2
    (bad,) = [event for event in read_events(tmp_path / "run") if event["event"] == "bad_step"]
    assert [suspect["rank"] for suspect in bad["ranks"]] == [0]


@pytest.mark.parametrize("parallel", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_a_gradient_that_only_one_model_parallel_rank_has_bad_skips_its_step(parallel, tmp_path, trajectory_corpus):
    """Tensor-parallel ranks all have the norms' weights, and their gradient norm counts those of the first alone."""
    config = tiny_config(trajectory_corpus, tmp_path / "run", parallel=parallel)
    assert run_ranks(train_with, 2, config, "gradient:3@1=nan") == [(0, "")] * 2
    (bad,) = [event for event in read_events(tmp_path / "run") if event["event"] == "bad_step"]
    assert (bad["step"], [suspect["rank"] for suspect in bad["ranks"]]) == (3, [1])


def test_canonical_reduction_names_the_rank_whose_gradient_is_bad(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        train__canonical_reduction=True,
        optimizer__use_distributed_optimizer=False,
    )
    assert run_ranks(train_with, 2, config, "gradient:1@1=nan") == [(0, "")] * 2
    (bad,) = [event for event in read_events(tmp_path / "run") if event["event"] == "bad_step"]
    assert [suspect["rank"] for suspect in bad["ranks"]] == [1]
