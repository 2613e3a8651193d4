"""The campaigns of `make faults` against training, in small."""

import faults_checkpoints
import faults_training
import pytest


def test_a_killed_run_goes_on_bit_for_bit(trajectory_corpus, tmp_path):
    cases = [(1, 0, True), (7, 2, False), (30, 2, True), (59, 0, False)]
    figures = faults_training.exact_resumes(trajectory_corpus, tmp_path, cases=cases)
    assert (figures["differing_files"], figures["differing_rows"]) == (0, 0)
    assert figures["resumed_at"] == [1, 7, 30, 59]


def test_kills_at_every_kind_of_moment_are_survived(trajectory_corpus, ranking_corpus, tmp_path):
    figures = faults_training.kills(trajectory_corpus, ranking_corpus, tmp_path, count=25, seed=3)
    assert figures["kills"] == 25
    assert figures["recovered"] == figures["identical"] == figures["runs"]
    assert figures["lost_too_much"] == figures["silent_restarts"] == 0
    assert figures["most_steps_lost_foreground"] <= figures["interval"]
    assert figures["most_steps_lost_background"] <= 2 * figures["interval"]
    assert min(figures[kind] for kind in ("in_writing", "in_publishing", "in_background", "in_training")) > 0


def test_every_corrupted_checkpoint_is_found_and_the_older_one_taken(trajectory_corpus, tmp_path):
    figures = faults_checkpoints.checkpoint_corruptions(trajectory_corpus, tmp_path, count=60, seed=4)
    assert figures["missed"] == []
    assert figures["found"] == figures["fell_back"] == figures["injected"] == 60
    assert figures["resumed"] == figures["resumes"] > 0


def test_latest_never_names_an_incomplete_checkpoint(trajectory_corpus, tmp_path):
    figures = faults_checkpoints.latest_polls(trajectory_corpus, tmp_path, polls=800)
    assert (figures["polls"], figures["incomplete"]) == (800, 0)
    assert figures["checkpoints_seen"] > 1


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_stops_nothing(background, trajectory_corpus, tmp_path):
    figures = faults_checkpoints.disk_full(trajectory_corpus, tmp_path, background=background)
    if figures is None:
        pytest.skip("no tmpfs can be mounted here")
    assert figures["exit_status"] == 0
    assert figures["failed_saves"]
    assert figures["names_enospc_and_path"]
    assert figures["old_checkpoint_intact_meanwhile"]
    assert figures["saved_in_the_end"]
    assert figures["remains"] == 0


def test_weights_optimizer_samples_and_losses_survive_three_changes_of_layout(trajectory_corpus, tmp_path):
    figures = faults_training.reshard(trajectory_corpus, tmp_path)
    assert figures["differing_tensors"] == 0
    assert figures["same_samples"]
    assert figures["largest_relative_loss_difference"] <= 1e-5


def test_every_document_is_used_once_an_epoch_through_kills_and_reshards(trajectory_corpus, tmp_path):
    figures = faults_training.epochs_through_kills(trajectory_corpus, tmp_path, seed=1)
    assert figures["documents_not_used_exactly_once"] == 0
    assert (figures["kills"], figures["reshards"], figures["epochs"]) == (10, 2, 3)
    assert figures["exit_codes_of_the_last"] == [0]
    assert figures["orders_differ"]
