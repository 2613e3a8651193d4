"""A step is a pure function of its number: workers, resumption and ranks change who prepares it, never what it is."""

import dataclasses
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Dataset

from megatron_polar.config.presets import PRESETS
from megatron_polar.config.schema import DataSection, DatasetSource
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.loader import load_steps
from megatron_polar.data.steps import RowShape, Step, StepDataset, build_step
from megatron_polar.errors import UserError

BATCH = 12


def make_dataset(path, *, rank=0, num_ranks=1, **shape) -> StepDataset:
    comparisons = ComparisonDataset(
        [DatasetSource(str(path))], seed=4, candidates_per_comparison=3, max_sequence_length=512
    )
    values = {"layout": "shared_prefix", "max_tokens": 300, "pad_to_multiple": 16, "micro_batches_multiple_of": 1}
    row_shape = RowShape(num_ranks=num_ranks, architecture=PRESETS["nano"], **(values | shape))
    return StepDataset(comparisons, global_batch_size=BATCH, rank=rank, shape=row_shape)


def section(num_workers: int, *, loader: str = "torch") -> DataSection:
    return DataSection(train=(), num_workers=num_workers, prefetch_factor=2, loader=loader)


def assert_same(one: Step, other: Step) -> None:
    def plain(step):
        return dataclasses.replace(step, micro_batches=[])

    assert plain(one) == plain(other)
    assert len(one.micro_batches) == len(other.micro_batches)
    for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def test_workers_change_nothing(trajectory_corpus):
    dataset = make_dataset(trajectory_corpus)
    alone = list(load_steps(dataset, start=0, stop=9, data=section(0)))
    helped = list(load_steps(dataset, start=0, stop=9, data=section(2)))
    assert [step.number for step in alone] == list(range(9))
    for one, other in zip(alone, helped, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_in_the_middle_gives_the_same_steps(num_workers, trajectory_corpus):
    whole = list(load_steps(make_dataset(trajectory_corpus), start=0, stop=10, data=section(0)))
    rest = list(load_steps(make_dataset(trajectory_corpus), start=7, stop=10, data=section(num_workers)))
    assert [step.number for step in rest] == [7, 8, 9]
    for one, other in zip(whole[7:], rest, strict=True):
        assert_same(one, other)


needs_dali = pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="no nvidia-dali (requirements-dev.txt)")


@needs_dali
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_dali_gives_the_same_steps_as_torch(num_workers, layout, trajectory_corpus):
    dataset = make_dataset(trajectory_corpus, layout=layout, rank=1, num_ranks=2)
    expected = list(load_steps(dataset, start=3, stop=12, data=section(0)))
    found = list(load_steps(dataset, start=3, stop=12, data=section(num_workers, loader="dali")))
    assert [step.number for step in found] == list(range(3, 12))
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


@needs_dali
@pytest.mark.parametrize("num_workers", [0, 1])
def test_dali_hands_an_error_over_in_one_line_and_leaves_no_process(num_workers, trajectory_corpus, tmp_path):
    dataset = make_dataset(shutil.copytree(trajectory_corpus, tmp_path / "copy"))
    damaged = tmp_path / "copy" / "corpus.bin"
    damaged.write_bytes(b"\xff" * damaged.stat().st_size)
    before = helpers()
    with pytest.raises(UserError) as error:
        list(load_steps(dataset, start=0, stop=3, data=section(num_workers, loader="dali")))
    assert "corpus.bin" in str(error.value)
    assert "Traceback" not in str(error.value)
    deadline = time.monotonic() + 20
    while helpers() - before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def helpers() -> set[int]:
    """Child processes but for multiprocessing's own, which stays."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())}


def test_without_dali_the_message_says_what_to_install(trajectory_corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"data\.loader=dali needs nvidia-dali.*requirements-gpu\.txt"):
        next(load_steps(make_dataset(trajectory_corpus), start=0, stop=1, data=section(0, loader="dali")))


class StuckAt(Dataset):
    """Steps of which one is never ready, as on storage that does not answer."""

    def __init__(self, steps: StepDataset, number: int):
        self.steps, self.number = steps, number

    def __getitem__(self, number: int) -> Step:
        if number == self.number:
            time.sleep(600)
        return self.steps[number]


def test_a_loader_that_is_closed_leaves_no_worker_not_even_a_stuck_one(trajectory_corpus, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # torch's patience, seconds
    before = helpers()
    steps = load_steps(StuckAt(make_dataset(trajectory_corpus), 1), start=0, stop=9, data=section(2))
    assert next(steps).number == 0
    assert len(helpers() - before) == 2
    steps.close()
    assert not helpers() - before


def test_a_finished_run_has_no_steps_left(trajectory_corpus):
    assert list(load_steps(make_dataset(trajectory_corpus), start=5, stop=5, data=section(2))) == []


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_all_ranks_together_hold_each_comparison_once(num_ranks, layout, trajectory_corpus):
    for number in (0, 6):
        steps = [
            make_dataset(trajectory_corpus, rank=rank, num_ranks=num_ranks, layout=layout)[number]
            for rank in range(num_ranks)
        ]
        held = [index for step in steps for part in step.indices for index in part]
        assert sorted(held) == list(range(number * BATCH, (number + 1) * BATCH))
        assert len({len(step.micro_batches) for step in steps}) == 1
        assert len({step.imbalance for step in steps}) == 1
        for step in steps:
            assert [batch.num_comparisons for batch in step.micro_batches] == [len(part) for part in step.indices]


def test_more_ranks_than_comparisons_give_padding_with_the_same_number_of_micro_batches(trajectory_corpus):
    comparisons = make_dataset(trajectory_corpus).comparisons
    shape = make_dataset(trajectory_corpus, num_ranks=4, micro_batches_multiple_of=2).shape
    steps = [build_step(comparisons, range(2), number=0, rank=rank, shape=shape) for rank in range(4)]
    assert sorted(i for step in steps for part in step.indices for i in part) == [0, 1]
    assert {len(step.micro_batches) for step in steps} == {2}
    assert sum(len(batch.reward_positions) for step in steps for batch in step.micro_batches) == 6


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 5, 20])
@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_every_rank_knows_the_work_of_all_of_them(num_ranks, layout, in_turn, trajectory_corpus):
    """With few comparisons a rank the first has far less than the mean, or nothing: no rank stands for the others."""
    shape = {"num_ranks": num_ranks, "layout": layout, "in_turn": in_turn}
    steps = [make_dataset(trajectory_corpus, rank=rank, **shape)[2] for rank in range(num_ranks)]
    batches = [batch for step in steps for batch in step.micro_batches]
    for step in steps:
        work = step.work
        assert work.physical_tokens == sum(batch.tokens.size for batch in batches)
        assert work.logical_tokens == sum(batch.num_logical_tokens for batch in batches)
        assert work.attended == sum(batch.num_attended for batch in batches)
        assert work.rewards == sum(len(batch.reward_positions) for batch in batches)
    loads = [step.work.load for step in steps]
    assert sum(loads) == pytest.approx(num_ranks)
    assert max(loads) == pytest.approx(steps[0].imbalance)
    assert (min(loads) == 0) == (num_ranks > BATCH)


def test_the_last_step_of_an_epoch_goes_on_into_the_next(trajectory_corpus):
    step = make_dataset(trajectory_corpus)[80 // BATCH]  # 80 comparisons an epoch are no multiple of 12
    assert step.num_comparisons == BATCH


def test_imbalance_is_the_heaviest_rank_over_the_mean(trajectory_corpus):
    assert make_dataset(trajectory_corpus)[0].imbalance == pytest.approx(1.0)
    assert 1.0 <= make_dataset(trajectory_corpus, num_ranks=2)[0].imbalance < 1.2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_document_is_one_line_from_whatever_process(num_workers, trajectory_corpus, tmp_path):
    copy = Path(shutil.copytree(trajectory_corpus, tmp_path / "copy"))
    tokens = np.fromfile(copy / "corpus.bin", dtype=np.int32)
    tokens[1000:1400] = 2**30  # of the right size, so opening sees nothing
    tokens.tofile(copy / "corpus.bin")
    with pytest.raises(UserError) as caught:
        list(load_steps(make_dataset(copy), start=0, stop=8, data=section(num_workers)))
    message = str(caught.value)
    assert message.startswith(str(copy / "corpus.bin"))
    assert "is damaged; run preprocess again" in message
    assert "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_leaves_the_global_random_states_alone(num_workers, trajectory_corpus):
    dataset = make_dataset(trajectory_corpus)
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(load_steps(dataset, start=0, stop=3, data=section(num_workers)))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
