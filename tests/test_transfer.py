"""One copy for many tensors: packing loses nothing, and what is built of them is built again."""

import dataclasses
import weakref

import pytest
import torch
from test_attention import batch_of

from megatron_polar.model.row_layout import RowLayout, make_row_layout
from megatron_polar.parallel import transfer
from megatron_polar.parallel.device import Device
from megatron_polar.parallel.transfer import move, pack, tensors_of, unpack, with_tensors
from megatron_polar.train.step import moved_when_asked

CPU = Device("cpu", torch.device("cpu"), "gloo", "cpu")


def layout_of(kind: str) -> RowLayout:
    return make_row_layout(batch_of(3, layout=kind), device=torch.device("cpu"), spread_over=4)


@pytest.mark.parametrize("kind", ["shared_prefix", "packed", "padded"])
def test_all_tensors_of_a_layout_survive_packing(kind):
    """Types, shapes and values, in whatever order they lie."""
    tensors = list(tensors_of(layout_of(kind)))
    assert len({tensor.dtype for tensor in tensors}) > 1 or kind == "padded"
    block = pack(tensors)
    for one, other in zip(tensors, unpack(block, like=tensors), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert other.untyped_storage().data_ptr() == block.untyped_storage().data_ptr(), "views: one copy is enough"


def test_odd_sizes_and_empty_tensors_are_packed():
    tensors = [
        torch.arange(3, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor(2.5, dtype=torch.float64),
        torch.arange(10).view(2, 5).t(),
    ]
    for one, other in zip(tensors, unpack(pack(tensors), like=tensors), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["shared_prefix", "packed", "padded"])
def test_a_layout_is_rebuilt_around_other_tensors(kind):
    layout = layout_of(kind)
    again = with_tensors(layout, iter([tensor + 1 for tensor in tensors_of(layout)]))
    assert type(again) is RowLayout
    for one, other in zip(tensors_of(layout), tensors_of(again), strict=True):
        assert torch.equal(one + 1, other)
    for field in dataclasses.fields(layout):
        if not list(tensors_of(getattr(layout, field.name))):
            assert getattr(again, field.name) == getattr(layout, field.name), field.name


def test_on_the_cpu_nothing_moves():
    layout = layout_of("shared_prefix")
    assert move(layout, CPU) is layout


def test_a_tensor_in_several_places_is_copied_once(monkeypatch):
    """The reward rows share the gathered rows, the largest index of a layout, with the layout itself."""
    layout, uploaded = layout_of("shared_prefix"), []

    def upload(tensors, place):
        uploaded.extend(tensors)
        return [tensor.clone() for tensor in tensors]

    monkeypatch.setattr(transfer, "_upload", upload)
    moved = move(layout, Device("cuda", torch.device("cpu"), "nccl", "cuda"))
    assert len(uploaded) == len({id(tensor) for tensor in uploaded}) < len(list(tensors_of(layout)))
    assert moved.reward_rows.kv_rows is moved.kv_rows is not layout.kv_rows
    for one, other in zip(tensors_of(layout), tensors_of(moved), strict=True):
        assert torch.equal(one, other)


def test_micro_batches_are_moved_in_turn_when_they_are_asked_for_and_kept_no_longer_than_needed():
    class Batch:
        pass

    moved = []

    def move_one(number: int) -> Batch:
        batch = Batch()
        moved.append(weakref.ref(batch))
        return batch

    first, second = moved_when_asked([10, 20, 30], move_one, num_chunks=2)  # as of an interleaved pipeline
    assert not moved
    held = [next(first), next(first)]
    held.append(next(second))
    assert held[0] is held[2]
    held.clear()
    assert [reference() is None for reference in moved] == [True, False]  # the second chunk wants the other one still
    assert len(list(second)) == 2
    assert len(list(first)) == 1
    assert [reference() is None for reference in moved] == [True, True, True]
