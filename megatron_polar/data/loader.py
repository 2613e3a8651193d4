"""Steps prepared ahead by worker processes, of torch or of DALI."""

import multiprocessing
import os
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_polar.config.presets import Architecture
from megatron_polar.config.schema import DataSection
from megatron_polar.data.steps import RowShape, Step, StepDataset
from megatron_polar.errors import UserError
from megatron_polar.parallel.topology import Topology
from megatron_polar.processes import serve_rank


def row_shape(
    section: DataSection, *, topology: Topology, architecture: Architecture, in_turn: bool = False
) -> RowShape:
    """The shape of rows that the data section asks for, in this layout of ranks."""
    return RowShape(
        layout=section.layout,
        max_tokens=section.max_tokens_per_micro_batch,
        pad_to_multiple=section.pad_to_multiple * topology.tp_size * topology.cp_size,
        num_ranks=topology.dp_size,
        micro_batches_multiple_of=topology.pp_size if topology.vpp_size else 1,
        architecture=architecture,
        in_turn=in_turn,
    )


def load_steps(
    dataset: StepDataset, *, start: int, stop: int, data: DataSection, gpu: int | None = None
) -> Iterator[Step]:
    """Yield steps start..stop-1 in order, prepared ahead by `data.num_workers` processes.

    With `gpu`, the number of this rank's, DALI copies their arrays there as well; the steps are the same. Raises
    UserError (a document that is damaged or does not fit), on one line from whatever process it comes. To be closed
    where it is not read to its end: then no process is left.
    """
    if data.loader == "dali":
        from megatron_polar.data.dali import load_steps_with_dali

        yield from load_steps_with_dali(dataset, start=start, stop=stop, data=data, gpu=gpu)
        return
    loader = DataLoader(
        _Guarded(dataset),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor if data.num_workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_start_worker, os.getpid()),
        # A generator of its own: the default would draw from torch's global RNG and spoil bit-exact resume.
        generator=torch.Generator(),
    )
    others = multiprocessing.active_children()
    items = iter(loader)  # starts the workers
    for worker in multiprocessing.active_children():
        if worker not in others:
            # How torch ends a worker that is stuck: a SIGTERM, which it leaves to the rank (processes.py).
            worker.terminate = worker.kill
    try:
        for item in items:
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        del items  # torch ends its workers


def _start_worker(rank_process: int, worker: int) -> None:
    serve_rank(rank_process)


class _Guarded(Dataset):
    """Hands a UserError over as a value: torch would wrap what a worker process raises into the text of a traceback."""

    def __init__(self, steps: StepDataset):
        self.steps = steps

    def __getitem__(self, number: int) -> Step | UserError:
        try:
            return self.steps[number]
        except UserError as error:
            return error


def _as_it_is(item: Step | UserError) -> Step | UserError:
    return item
