"""What a checkpoint holds: weights, optimizer and random numbers as shards of global tensors, and how they come back,
in the layout they were saved in or another."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_polar import log
from megatron_polar.errors import UserError
from megatron_polar.manifest import Damaged
from megatron_polar.model.build import BuiltModel
from megatron_polar.model.fp8_weights import is_fp8_weight, plain
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.checkpoint_files import TrainingState, read_state
from megatron_polar.train.main_weights import main_weights, take_main_weights
from megatron_polar.train.shard_files import load_shards, refusing_what_is_wrong

_CONFIGURED = ("lr", "max_lr", "min_lr", "weight_decay", "wd_mult", "lr_mult", "betas", "eps")
"""Entries of the optimizer's parameter groups that come from the `optimizer` section."""
_TORCH_ADAM = torch.optim.Adam, torch.optim.AdamW
"""These count steps for every parameter; Transformer Engine's does for every group."""


def layout_of(topology: Topology) -> dict[str, int]:
    """The parallel sizes that decide whether a resume is bit-exact."""
    return {"tp": topology.tp_size, "pp": topology.pp_size, "vpp": topology.vpp_size or 1, "cp": topology.cp_size} | {
        "dp": topology.dp_size
    }


# --- Loading ---------------------------------------------------------------------------------------------------------


def load_weights(
    directory: Path,
    *,
    model: BuiltModel,
    optimizer: MegatronOptimizer | None = None,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Load the weights alone, saved in any layout, and hand them to the `optimizer`, if there is one; `after_each`
    tensor it calls."""
    with refusing_what_is_wrong(directory):
        _check_shapes(directory, model=model)
        wanted = _sharded_weights(model)
        _hold_main_weights(wanted, model=model, optimizer=None)
        loaded = load_shards(wanted, directory, after_each=after_each)
        _install_weights(model, loaded)
    if optimizer is not None:
        optimizer.reload_model_params()
        if values := _loaded_fp8_weights(model, loaded):
            take_main_weights(optimizer, values)


def load_training(
    directory: Path,
    *,
    model: BuiltModel,
    optimizer: MegatronOptimizer,
    topology: Topology,
    after_each: Callable[[], None] = lambda: None,
) -> TrainingState:
    """Load weights, optimizer and, in the layout they were saved in, the random-number states; `after_each` tensor it
    calls."""
    state = read_state(directory)
    with refusing_what_is_wrong(directory):
        _check_shapes(directory, model=model)
    same_layout = state.layout == layout_of(topology) and state.backend == dist.get_backend()
    request = sharded_state(model, optimizer=optimizer, topology=topology, is_loading=True)
    if not same_layout:
        del request["rng"]
        log.info(
            f"resuming in another layout: saved {state.layout}, now {layout_of(topology)}; dropout seeds start afresh"
        )
    with refusing_what_is_wrong(directory):
        loaded = load_shards(request, directory, after_each=after_each)
        _install_weights(model, loaded)
        configured = [
            {key: value for key, value in group.items() if key in _CONFIGURED} for group in optimizer.param_groups
        ]
        optimizer.load_state_dict(loaded["optimizer"])
        for group, values in zip(optimizer.param_groups, configured, strict=True):
            group.update(values)  # the configuration decides, not what the checkpoint was trained with
        if same_layout:
            _restore_rng(loaded["rng"])
    return state


def _check_shapes(directory: Path, *, model: BuiltModel) -> None:
    saved = dist_checkpointing.load_tensors_metadata(str(directory))
    for tensor in _flat_shards(_sharded_weights(model)):
        if tensor.key not in saved:
            raise UserError(
                f"{directory}: has no {tensor.key}, which this model has; use the model section of "
                f"{directory}/config.yaml"
            )
        if tuple(saved[tensor.key].global_shape) != tuple(tensor.global_shape):
            raise UserError(
                f"{directory}: {tensor.key} has shape {tuple(saved[tensor.key].global_shape)} in the checkpoint and "
                f"{tuple(tensor.global_shape)} in this model; use the model section of {directory}/config.yaml"
            )


def _flat_shards(tree):
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, dict | list):
            yield from _flat_shards(value)
        elif hasattr(value, "build"):
            yield from value.build()
        elif hasattr(value, "global_shape") and hasattr(value, "prepend_axis_num"):
            yield value


# --- The state dict --------------------------------------------------------------------------------------------------


def content_metadata() -> dict:
    # megatron-core's default optimizer format is broken in 0.16.1; this one reshards over every layout.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _sharded_weights(model: BuiltModel) -> dict:
    groups = model.cores[0].pg_collection
    metadata = content_metadata() | {"dp_cp_group": groups.dp_cp}
    names = ["model"] if len(model.cores) == 1 else [f"model{i}" for i in range(len(model.cores))]
    states = [core.sharded_state_dict(metadata=metadata) for core in model.cores]
    # Transformer Engine adds an (empty) FP8 state to every layer, which the local layers do not have: weights alone
    # travel.
    weights = [{key: value for key, value in s.items() if not key.endswith("_extra_state")} for s in states]
    return dict(zip(names, weights, strict=True))


def sharded_state(model: BuiltModel, *, optimizer: MegatronOptimizer, topology: Topology, is_loading: bool) -> dict:
    weights = _sharded_weights(model)
    metadata = content_metadata() | {"dp_cp_group": topology.groups.dp_cp}
    shards = weights.get("model", weights)  # interleaved chunks stay apart, each under its name
    _begin_moments(optimizer)
    optimizer_state = optimizer.sharded_state_dict(shards, is_loading=is_loading, metadata=metadata)
    _keep_step_zero(optimizer_state, optimizer=optimizer)
    _hold_main_weights(weights, model=model, optimizer=None if is_loading else optimizer)
    rng = ShardedObject("rng_state", _rng_state(), (topology.world_size,), (topology.rank,), replica_id=0)
    return weights | {"optimizer": optimizer_state, "rng": rng}


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _begin_moments(optimizer: MegatronOptimizer) -> None:
    """Zero moments where no step has been taken yet, be it that the first ones were skipped: megatron-core can save no
    optimizer without a state, and loads into one that is there."""
    for part in _parts(optimizer):
        adam = part.optimizer
        if adam is None or any(adam.state.values()):
            continue
        part.init_state_fn(adam, part.config)
        if isinstance(adam, _TORCH_ADAM):
            for state in adam.state.values():
                state["step"] = torch.tensor(0.0)


def _keep_step_zero(optimizer_state: dict, *, optimizer: MegatronOptimizer) -> None:
    """Without the distributed optimizer megatron-core saves the number of steps apart, and none where it is 0."""
    moments = optimizer_state.get("optimizer", optimizer_state).get("state")
    if moments and all(isinstance(part.optimizer, _TORCH_ADAM) for part in _parts(optimizer)):
        moments.setdefault("common_step", torch.tensor(0.0))


def _hold_main_weights(weights: dict, *, model: BuiltModel, optimizer: MegatronOptimizer | None) -> None:
    """Put ordinary tensors in the place of weights in FP8: what the optimizer knows of them, or room to load into.

    After the optimizer has been asked for its state: it finds a weight's entry by the weight.
    """
    in_fp8 = [weight for core in model.cores for weight in core.parameters() if is_fp8_weight(weight)]
    if not in_fp8:
        return
    values = main_weights(optimizer, in_fp8) if optimizer is not None else {w: plain(w) for w in in_fp8}
    for entries in weights.values():
        for entry in entries.values():
            data = getattr(entry, "data", None)
            if isinstance(data, torch.Tensor) and data in values:
                entry.data = values[data]


def _install_weights(model: BuiltModel, loaded: dict) -> None:
    for i, core in enumerate(model.cores):
        core.load_state_dict(loaded["model" if len(model.cores) == 1 else f"model{i}"], strict=False)


def _loaded_fp8_weights(model: BuiltModel, loaded: dict) -> dict[torch.Tensor, torch.Tensor]:
    """The loaded values of weights in FP8, which have lost digits of them."""
    found = {}
    for i, core in enumerate(model.cores):
        values = loaded["model" if len(model.cores) == 1 else f"model{i}"]
        found |= {weight: values[name] for name, weight in core.named_parameters() if is_fp8_weight(weight)}
    return found


def _rng_state() -> dict:
    """All generators of this rank, in types that load without running code (hence no numpy array)."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"] = {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state | {"tensor_parallel": get_cuda_rng_tracker().get_states()}


def _restore_rng(state: dict) -> None:
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        get_cuda_rng_tracker().set_states(state["tensor_parallel"])
    except Exception as error:  # each generator complains in its own way
        raise Damaged(f"the states of random-number generators cannot be used ({type(error).__name__})") from error
