"""`data.loader: dali`: NVIDIA DALI's worker processes instead of torch's DataLoader, step for step the same.

DALI hands over arrays only, so a step travels as one row of 64-bit integers (`flatten`, `restore`). Its workers prepare
steps ahead in shared memory. With a GPU the row is also copied there, ahead of its step and on DALI's own stream; the
arrays of that copy stand beside those on the host (`MicroBatch.on_device`). The host waits for it only where it is not
done when its step begins.
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_polar.config.schema import DataSection
from megatron_polar.data.packing import MicroBatch
from megatron_polar.data.steps import Step, StepDataset, StepWork
from megatron_polar.errors import UserError
from megatron_polar.processes import serve_rank

_STEP, _ERROR = 0, 1
_ARRAYS = tuple(field.name for field in dataclasses.fields(MicroBatch) if field.type is np.ndarray)
_NUMBERS = tuple(field.name for field in dataclasses.fields(MicroBatch) if field.type is int)


def load_steps_with_dali(
    dataset: StepDataset, *, start: int, stop: int, data: DataSection, gpu: int | None = None
) -> Iterator[Step]:
    """See loader.load_steps. Raises UserError where nvidia-dali is not installed, too."""
    pipeline = _build_pipeline(_Source(dataset, start=start, stop=stop, owner=os.getpid()), data=data, gpu=gpu)
    try:
        for _ in range(start, stop):
            batch, *copies = pipeline.run()
            row = np.array(batch.at(0))
            yield restore(row, on_device=_take(copies[0][0], gpu=gpu) if copies else None)
    finally:
        del pipeline  # ends its workers


def _take(row, *, gpu: int):
    """DALI's row on the GPU as a tensor of torch's: DALI reuses its own memory for a later step."""
    import torch
    from nvidia.dali.plugin.pytorch import feed_ndarray

    own = torch.empty(row.shape(), dtype=torch.int64, device=f"cuda:{gpu}")
    # Naming the stream makes the copy wait there for DALI's, instead of the host.
    feed_ndarray(row, own, cuda_stream=torch.cuda.current_stream(gpu))
    return own


def _build_pipeline(source: "_Source", *, data: DataSection, gpu: int | None):
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise UserError(
            f"data.loader=dali needs nvidia-dali, which cannot be imported here ({error}); install "
            f"requirements-gpu.txt, or set data.loader=torch"
        ) from None
    is_parallel = data.num_workers > 0
    pipeline = Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=gpu,
        prefetch_queue_depth=1 if gpu is None else 2,  # the row of the next step is copied while this one computes
        py_num_workers=max(1, data.num_workers),
        py_start_method="spawn",  # a fork would take the ranks' threads and CUDA context along
    )
    ahead = {"prefetch_queue_depth": data.prefetch_factor} if is_parallel else {}
    with pipeline:
        row = fn.external_source(source, batch=False, parallel=is_parallel, dtype=types.INT64, ndim=1, **ahead)
        pipeline.set_outputs(row, *(() if gpu is None else (row.gpu(),)))
    pipeline.build()
    return pipeline


@dataclass
class _Source:
    """Called by DALI with the number of a sample, here or in a worker."""

    dataset: StepDataset
    start: int
    stop: int
    owner: int

    def __call__(self, sample) -> np.ndarray:
        if self.owner not in (os.getpid(), 0):
            serve_rank(self.owner)
            self.owner = 0
        number = self.start + sample.idx_in_epoch
        if number >= self.stop:
            raise StopIteration
        try:
            return flatten(self.dataset[number])
        except UserError as error:  # DALI would wrap it into the text of a traceback
            message = np.frombuffer(str(error).encode(), dtype=np.uint8).astype(np.int64)
            return np.concatenate([[_ERROR], message])


def flatten(step: Step) -> np.ndarray:
    """A step as int64: numbers first, then of each micro-batch its members, its numbers, and its arrays with shapes."""
    numbers = [step.number, step.num_comparisons, step.prompt_tokens_cut, step.num_rounds, len(step.micro_batches)]
    *amounts, load = dataclasses.astuple(step.work)
    floats = np.array([step.imbalance, load], dtype=np.float64).view(np.int64)
    pieces = [[_STEP, *numbers], amounts, floats]
    for batch, members in zip(step.micro_batches, step.indices, strict=True):
        pieces += [[len(members), *members], [getattr(batch, name) for name in _NUMBERS]]
        for name in _ARRAYS:
            array = getattr(batch, name)
            pieces += [[array.ndim, *array.shape], array.reshape(-1)]
    return np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])


def restore(row: np.ndarray, *, on_device: Any = None) -> Step:
    """The step again; `on_device`, a copy of the row, becomes its arrays there. Raises the UserError that stands in its
    place."""
    kind, rest = row[0], _Reader(row[1:])
    if kind == _ERROR:
        raise UserError(row[1:].astype(np.uint8).tobytes().decode())
    number, num_comparisons, cut, num_rounds, num_batches = rest.take(5).tolist()
    amounts = rest.take(len(dataclasses.fields(StepWork)) - 1).tolist()
    imbalance, load = rest.take(2).view(np.float64).tolist()
    batches, indices = [], []
    for _ in range(num_batches):
        indices.append(rest.take(rest.one()).tolist())
        fields = dict(zip(_NUMBERS, rest.take(len(_NUMBERS)).tolist(), strict=True))
        there = {}
        for name in _ARRAYS:
            shape = rest.take(rest.one()).tolist()
            place = 1 + rest.place
            fields[name] = rest.take(int(np.prod(shape))).reshape(shape)
            if on_device is not None:
                there[name] = on_device[place : 1 + rest.place].reshape(shape)
        batches.append(MicroBatch(**fields, on_device=there or None))
    work = StepWork(*amounts, load)
    return Step(number, batches, indices, num_comparisons, cut, imbalance, num_rounds, work)


class _Reader:
    """Takes values off the front of a row."""

    def __init__(self, row: np.ndarray):
        self._row, self.place = row, 0

    def take(self, count: int) -> np.ndarray:
        self.place += count
        return self._row[self.place - count : self.place]

    def one(self) -> int:
        return int(self.take(1)[0])
