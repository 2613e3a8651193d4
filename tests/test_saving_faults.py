"""Saves that fail, are killed or find no room, and checkpoints that cannot be read or do not fit."""

import weakref
from types import SimpleNamespace

import faults_training
import orjson
import pytest
import torch
from faults_training import shards
from ranks import run_ranks
from tiny_runs import STEPS, change, checkpoint_of, tiny_config, train_with, training_refusal
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_polar import faults
from megatron_polar.errors import CANNOT_SAVE
from megatron_polar.parallel.device import select_device
from megatron_polar.train.checkpoint_files import find_checkpoint, list_steps, verify_checkpoint
from megatron_polar.train.journal import read_events
from megatron_polar.train.shard_files import HashedWriter, ShardReport


@pytest.mark.parametrize(
    ("point", "background"),
    [(p, False) for p in ("before_shard", "in_shard", "before_manifest", "before_publish")]
    + [("before_manifest", True), ("before_publish", True)],
)
def test_a_save_that_fails_is_a_warning_with_errno_and_path(point, background, tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__async_save=background)
    assert run_ranks(train_with, 1, config, f"{point}:1=enospc")[0] == (0, "")
    shown = capfd.readouterr().err
    assert "the checkpoint of step 3 could not be written: rank 0: [Errno 28] No space left on device" in shown
    assert "training goes on" in shown
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", STEPS)
    events = [event for event in read_events(tmp_path / "run") if event["event"] == "save"]
    assert [bool(event["problem"]) for event in events] == [True, False]


def test_latest_is_a_hint_whose_failure_fails_no_save(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    assert run_ranks(train_with, 1, config, "before_latest:2=enospc")[0] == (0, "")
    assert "latest: cannot be moved to step_00000006 (No space left on device)" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000003\n"
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", STEPS)


def test_a_stop_whose_save_fails_says_so_by_its_status(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    ((status, message),) = run_ranks(
        train_with, 1, config, "data:2@0=term," + ",".join(f"before_publish:{n}=enospc" for n in (1, 2, 3))
    )
    assert status == CANNOT_SAVE
    assert "after step 3 of 6; no step is saved" in message


def test_room_taken_by_killed_saves_is_freed_before_the_next(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    faults_training.run_job(config, fault="before_publish:2=kill")
    assert len(list((tmp_path / "run" / "checkpoints").glob(".saving-*"))) == 1
    run_ranks(train_with, 1, config, "after_update:1=term")
    assert not list((tmp_path / "run" / "checkpoints").glob(".saving-*"))


def test_a_checkpoint_that_cannot_be_read_now_is_skipped_and_kept(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    run_ranks(train_with, 1, config, "")
    again = change(config, checkpoint__keep=1, checkpoint__save_interval=2, train__num_steps=5)
    assert run_ranks(train_while_the_newest_is_unreadable, 1, again) == [(0, "")]
    assert "step_00000006: skipped: cannot be read now" in capfd.readouterr().err
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*step_*"))
    assert left == ["step_00000005", "step_00000006"]  # what was just written is kept, however little is to be kept


def train_while_the_newest_is_unreadable(config) -> tuple[int, str]:
    from megatron_polar.train import checkpoint_files

    original = checkpoint_files.check_hash

    def check_hash(directory, name, entry, **options):
        if directory.name == "step_00000006":
            raise OSError(5, "Input/output error", str(directory / name))
        original(directory, name, entry, **options)

    checkpoint_files.check_hash = check_hash
    return train_with(config)


def test_resuming_in_another_precision_is_refused(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    run_ranks(train_with, 1, config, "after_update:2=term")
    message = training_refusal(change(config, train__precision="bf16"))
    assert "was trained with train.precision=fp32, now bf16" in message
    recorded = orjson.loads((tmp_path / "run" / "status.json").read_bytes())
    assert (recorded["state"], recorded["exit_status"]) == ("refused", 2)


def test_a_background_writer_works_beside_many_openmp_threads(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__async_save=True, model__hidden_size=256)
    assert run_ranks(train_on_two_threads, 1, config) == [(0, "")]
    assert find_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", STEPS)


def train_on_two_threads(config) -> tuple[int, str]:
    torch.set_num_threads(2)
    return train_with(config)


@pytest.mark.parametrize("point", ["before_shard", "in_shard"])
def test_a_writer_in_the_background_reports_errno_and_path(point, tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__async_save=True)
    assert run_ranks(train_with, 1, config, f"{point}:1=enospc")[0][0] == CANNOT_SAVE
    assert "could not be written: rank 0: [Errno 28] No space left on device" in capfd.readouterr().err
    assert not list_steps(tmp_path / "run")  # each save forks a writer, and each inherits the plan


def test_a_failed_save_on_one_rank_fails_it_on_all(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    assert run_ranks(train_with, 2, config, "in_shard:1@1=eio") == [(0, "")] * 2
    assert "step 3 could not be written: rank 1: [Errno 5] Input/output error" in capfd.readouterr().err
    assert [path.name for path in list_steps(tmp_path / "run")] == ["step_00000006"]


def disk_full_for_ever(config) -> tuple[int, str]:
    def point(name: str) -> None:
        if name == "before_manifest":
            raise OSError(28, "No space left on device", name)

    faults.point = point
    return train_with(config)


def test_too_many_failed_saves_in_a_row_stop_the_run(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus, tmp_path / "run", checkpoint__save_interval=1, checkpoint__max_failed_saves=2
    )
    ((status, message),) = run_ranks(disk_full_for_ever, 1, config)
    assert status == CANNOT_SAVE
    assert "3 saves in a row failed" in message
    assert "checkpoint.max_failed_saves=2" in message


def test_a_killed_writer_in_the_background_is_a_failed_save(tmp_path, trajectory_corpus, capfd):
    config = tiny_config(trajectory_corpus, tmp_path / "run", checkpoint__async_save=True)
    ((status, message),) = run_ranks(train_with, 1, config, "in_shard:1=kill")
    assert status == CANNOT_SAVE
    assert message.startswith("all 6 steps are done, but the last checkpoint could not be written (step 0 is saved)")
    assert "the writing process died" in capfd.readouterr().err
    # The plan is inherited by every forked writer, so the second save dies as well; nothing incomplete is published.
    assert not list_steps(tmp_path / "run")


def test_keep_every_spares_its_multiples(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        checkpoint__save_interval=1,
        checkpoint__keep=1,
        checkpoint__keep_every=2,
    )
    run_ranks(train_with, 1, config, "")
    assert [path.name[-1] for path in list_steps(tmp_path / "run")] == ["6", "4", "2"]


def test_saving_in_the_background_writes_the_same_bytes(tmp_path, trajectory_corpus):
    hashes = []
    for background in (False, True):
        config = tiny_config(
            trajectory_corpus,
            tmp_path / str(background),
            checkpoint__async_save=background,
            checkpoint__save_interval=2,
            model__hidden_dropout=0.1,
        )
        run_ranks(train_with, 2, config, "")
        steps = list_steps(tmp_path / str(background))
        assert [verify_checkpoint(path) for path in steps] == [None] * 3
        hashes.append([shards(path) for path in steps])
    assert hashes[0] == hashes[1]


def held_until_written(directory: str) -> list[bool]:
    """Whether what was brought into host memory is still held: as a writer is forked, and once it is done."""
    select_device("cpu", local_rank=0)  # says what there is to wait for
    writer = HashedWriter(directory, after_each=lambda: None)
    item = SimpleNamespace(index="weight", type=WriteItemType.TENSOR)
    writer.write_buckets = [(f"{directory}/shard", "shard", [(item, torch.ones(4))])]
    writer.report = ShardReport(1)
    write, stage, (process, _, *rest) = writer.get_save_function_and_args()
    staged = stage()
    tensor = weakref.ref(staged[0][2][0][1])
    write(process, staged, *rest)
    del staged  # as schedule_async_call lets its arguments go once the writer is forked
    held = [tensor() is not None]
    (result,) = writer.retrieve_write_results()
    assert result.index == "weight"
    return [*held, tensor() is not None]


def test_what_was_brought_into_host_memory_is_held_until_it_is_written(tmp_path):
    """From a GPU it lies in pinned memory, which a forked writer shares: given back, it would take the next batch."""
    assert run_ranks(held_until_written, 1, str(tmp_path)) == [[True, False]]
