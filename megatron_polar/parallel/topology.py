"""Which rank this is and with whom it talks. The only caller of initialize_model_parallel."""

import os
import random
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_polar.config.schema import ParallelSection
from megatron_polar.errors import UserError
from megatron_polar.parallel.device import Device


@dataclass(frozen=True)
class Topology:
    """Sizes, this rank's coordinates, and megatron-core's process groups (`groups.tp`, `.pp`, `.cp`, `.dp`,
    `.dp_cp`, ...)."""

    world_size: int
    rank: int
    tp_size: int
    pp_size: int
    vpp_size: int | None
    cp_size: int
    dp_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    groups: ProcessGroupCollection
    store: dist.Store
    """The key-value store through which the ranks found each other."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the reward head and sees rewards."""
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_global_rank(self) -> int:
        """Global rank of the last pipeline stage of this rank's pipeline."""
        return dist.get_global_rank(self.groups.pp, self.pp_size - 1)


def local_rank() -> int:
    """This process's index on its node, as torchrun or srun tells it; 0 on its own."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def initialize(parallel: ParallelSection, *, device: Device) -> Topology:
    """Join the other ranks and divide them into groups.

    The rendezvous is torch's env:// (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); without these variables this process
    is a world of one. Raises UserError when the world size does not fit the parallel sizes.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks, but RANK, WORLD_SIZE, MASTER_ADDR and "
            f"MASTER_PORT are not set, so each would train alone; set them (RANK=$SLURM_PROCID, "
            f"WORLD_SIZE=$SLURM_NTASKS, ...), or let one torchrun per node do it"
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    if world_size % (tp * pp * cp):
        raise UserError(
            f"world size {world_size} is not a multiple of tensor x pipeline x context parallel size "
            f"({tp} x {pp} x {cp}); start a multiple of {tp * pp * cp} ranks (torchrun --nproc-per-node), or change "
            f"the parallel section"
        )
    store = _join(device, timeout=timedelta(minutes=parallel.distributed_timeout_minutes))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=cp,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        # Nothing of ours asks for them, and each rank would hold three connections to every data-parallel replica.
        create_gloo_process_groups=False,
    )
    return Topology(
        world_size=world_size,
        rank=dist.get_rank(),
        tp_size=tp,
        pp_size=pp,
        vpp_size=parallel.virtual_pipeline_model_parallel_size,
        cp_size=cp,
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        store=store,
    )


def _join(device: Device, *, timeout: timedelta) -> dist.Store:
    """Meet the other ranks; returns the store that they share."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    store.set_timeout(timeout)
    dist.init_process_group(device.backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return store


def seed_ranks(topology: Topology, *, seed: int) -> None:
    """Seed dropout: tensor-parallel replicas share a stream; ranks with other tokens or layers differ. Python's and
    numpy's generators are seeded as well: nothing here draws from them, but checkpoints carry them."""
    own = seed + 100 * topology.pp_rank + 10007 * topology.dp_rank + 1000003 * topology.cp_rank
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)
    seed_layers(own)


def seed_layers(seed: int) -> None:
    """Seed the random states of megatron-core's layers, which must be there before a model is built on a GPU: embedding
    and Transformer Engine's attention ask for one even where they draw nothing."""
    model_parallel_cuda_manual_seed(seed)


def shut_down() -> None:
    """Leave all groups; the process may `initialize` again afterwards."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
