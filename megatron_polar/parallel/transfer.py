"""Many small tensors to the device in one copy that nobody waits for.

A micro-batch has some twenty tensors of indices beside its tokens. They are packed into one block of pinned memory,
copied on a stream of their own, and unpacked as views of the block's copy; the stream that computes waits for that
copy, and the host for nothing.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

import torch

from megatron_polar.parallel.device import Device

T = TypeVar("T")
_ALIGNMENT = 16
"""Bytes: a view of a packed block in another type must start at a multiple of the type's size."""


def move(value: T, device: Device) -> T:
    """A dataclass, tuple or list, or any nesting of them, with its tensors on the device; a new one, or on the CPU the
    same. Tensors that are there already stay as they are; one that stands in several places is copied once."""
    if device.kind == "cpu":
        return value
    waiting = {id(tensor): tensor for tensor in tensors_of(value) if tensor.device.type == "cpu"}
    moved = dict(zip(waiting, _upload(list(waiting.values()), device.torch_device), strict=True))
    return with_tensors(value, iter([moved[id(t)] if t.device.type == "cpu" else t for t in tensors_of(value)]))


def _upload(tensors: Sequence[torch.Tensor], place: torch.device) -> list[torch.Tensor]:
    if not tensors:
        return []
    stream = _copy_stream(place)
    block = pack(tensors).pin_memory()
    with torch.cuda.stream(stream):
        copied = block.to(place, non_blocking=True)
    computing = torch.cuda.current_stream(place)
    computing.wait_stream(stream)
    copied.record_stream(computing)  # else its memory could be given away as soon as the copy stream is done with it
    return unpack(copied, like=tensors)


@cache
def _copy_stream(place: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(place)


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All tensors' bytes in one block, each from an aligned place on."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    block = torch.zeros(sum(map(_aligned, sizes)), dtype=torch.uint8)
    start = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        block[start : start + size] = tensor.contiguous().reshape(-1).view(torch.uint8)
        start += _aligned(size)
    return block


def unpack(block: torch.Tensor, *, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a packed block as views of it, with types and shapes of `like`."""
    found, start = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        found.append(block[start : start + size].view(tensor.dtype).view(tensor.shape))
        start += _aligned(size)
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a nesting of dataclasses, tuples and lists, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)


def with_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same nesting with other tensors, in the order of `tensors_of`."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: with_tensors(getattr(value, name), tensors) for name in names})
    if isinstance(value, tuple | list):
        return type(value)(with_tensors(item, tensors) for item in value)
    return value
