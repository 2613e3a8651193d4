"""Whose a run directory is, on every rank, and where storage answers as NFS does."""

import errno
import os
from pathlib import Path

import pytest

from megatron_polar.train.lock import TAKE_OVER, RunLock


@pytest.fixture
def lock(tmp_path):
    lock = RunLock(tmp_path / "run")
    assert lock.take() is None
    yield lock
    lock.release()


def on_another_rank(lock: RunLock) -> RunLock:
    other = RunLock(lock.directory)
    other.text = lock.text
    return other


def test_all_ranks_see_that_another_job_has_taken_over(lock, monkeypatch):
    """Also those that do not hold the file: they write last words of their own."""
    other = on_another_rank(lock)
    assert lock.is_ours()
    assert other.is_ours()
    monkeypatch.setenv(TAKE_OVER, lock.text)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    next_one = RunLock(lock.directory)
    assert next_one.take() is None
    assert next_one.is_ours()
    assert on_another_rank(next_one).is_ours()
    assert not lock.is_ours()
    assert not other.is_ours()
    (lock.directory / "config.yaml").touch()  # what is empty but for the lock would go with it
    next_one.release()


def test_a_directory_without_the_file_is_nobodys(lock):
    other = on_another_rank(lock)
    (lock.directory / "lock").unlink()
    assert not lock.is_ours()
    assert not other.is_ours()


@pytest.mark.parametrize(("number", "is_ours"), [(errno.ESTALE, False), (errno.EIO, True)])
def test_nfs_says_by_estale_that_our_file_was_replaced(number, is_ours, lock, monkeypatch):
    """A handle of a file over which another host has renamed its own is stale; storage that fails says nothing."""

    def fstat(handle: int):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fstat", fstat)
    assert lock.is_ours() is is_ours
    monkeypatch.undo()
    assert lock.is_ours()


def test_a_question_leaves_no_file_open(lock):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        lock.is_ours()
        on_another_rank(lock).is_ours()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_refused_run_leaves_nothing_that_it_has_made(tmp_path):
    lock = RunLock(tmp_path / "runs" / "deep" / "run")
    assert lock.take() is None
    (tmp_path / "runs" / "another").mkdir()  # begun meanwhile
    lock.release()
    lock.release()  # nothing more to let go
    assert os.listdir(tmp_path / "runs") == ["another"]


def test_directories_that_were_there_stay(tmp_path):
    (tmp_path / "runs").mkdir()
    lock = RunLock(tmp_path / "runs" / "run")
    assert lock.take() is None
    lock.release()
    assert (tmp_path / "runs").is_dir() and not os.listdir(tmp_path / "runs")
