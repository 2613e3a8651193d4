"""Checkpoints: megatron-core's torch_dist shards, complete when their manifest verifies, in any layout.

<run>/checkpoints/step_00000100/   shards, common.pt, .metadata, metadata.json   (megatron-core's)
                                   config.yaml, tokenizer/, state.json           (what is needed to use it)
                                   manifest.json                                 (SHA-256 of every file; written last)
<run>/checkpoints/latest           name of the newest complete step
"""

import hashlib
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_polar import log
from megatron_polar.errors import UserError
from megatron_polar.model.build import BuiltModel
from megatron_polar.parallel.topology import Topology

MANIFEST = "manifest.json"
_STEP_PREFIX = "step_"
_CONFIGURED = ("lr", "max_lr", "min_lr", "weight_decay", "wd_mult", "lr_mult", "betas", "eps")
"""Entries of the optimizer's parameter groups that come from the `optimizer` section."""


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands, independent of the layout; `state.json` of a checkpoint."""

    step: int
    consumed_comparisons: int
    data_fingerprint: str
    max_response_length: int
    """Tokens that were kept of an answer when the training data were made; scoring cuts at the same place."""
    layout: dict[str, int]
    backend: str
    """gloo or nccl: random-number states of one device mean nothing on another."""


def step_directory(run_directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return run_directory / "checkpoints" / f"{_STEP_PREFIX}{step:08d}"


def layout_of(topology: Topology) -> dict[str, int]:
    """The parallel sizes that decide whether a resume is bit-exact."""
    return {"tp": topology.tp_size, "pp": topology.pp_size, "vpp": topology.vpp_size or 1, "cp": topology.cp_size} | {
        "dp": topology.dp_size
    }


# --- Saving ----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    run_directory: Path,
    *,
    state: TrainingState,
    model: BuiltModel,
    optimizer: MegatronOptimizer,
    topology: Topology,
    config_yaml: str,
    tokenizer_directory: Path,
    keep: int,
) -> Path:
    """Write the checkpoint of `state.step` and make it the latest; every rank takes part. Returns its directory."""
    target = step_directory(run_directory, state.step)
    if topology.rank == 0:
        if target.exists():  # left by a killed save: only complete ones are ever resumed from
            shutil.rmtree(target)
        target.mkdir(parents=True)
    dist.barrier()
    _finish_param_gather(model)
    tensors = _sharded_state(model, optimizer=optimizer, topology=topology, is_loading=False)
    dist_checkpointing.save(tensors, str(target), content_metadata=_content_metadata())
    if topology.rank == 0:
        (target / "config.yaml").write_text(config_yaml)
        (target / "state.json").write_bytes(orjson.dumps(asdict(state), option=orjson.OPT_INDENT_2))
        shutil.copytree(tokenizer_directory, target / "tokenizer")
    dist.barrier()
    hashes = _hash_own_files(target, topology=topology)
    gathered: list[dict[str, dict]] = [{} for _ in range(topology.world_size)]
    dist.all_gather_object(gathered, hashes)
    if topology.rank == 0:
        files = {name: entry for part in gathered for name, entry in part.items()}
        _write_durably(target / MANIFEST, {"format": 1, "step": state.step, "files": dict(sorted(files.items()))})
        _point_latest(target)
        _prune(target.parent, keep=keep, newest=target)
    dist.barrier()
    return target


def _finish_param_gather(model: BuiltModel) -> None:
    """With `overlap_param_gather` other ranks' updated weights arrive only in the next forward pass: fetch them."""
    for chunk in model.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _hash_own_files(directory: Path, *, topology: Topology) -> dict[str, dict]:
    """Each rank hashes the shards that it wrote (`__<rank>_<n>.distcp`), the first rank everything else."""
    entries = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        writer = int(name.split("_")[2]) if name.startswith("__") else 0
        if writer == topology.rank:
            entries[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    return entries


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_slow(file)
        )


def _sha256_slow(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _write_durably(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _point_latest(target: Path) -> None:
    pointer = target.parent / "latest"
    temporary = pointer.with_suffix(".tmp")
    temporary.write_text(target.name + "\n")
    temporary.replace(pointer)


def _prune(checkpoints: Path, *, keep: int, newest: Path) -> None:
    complete = sorted(p for p in checkpoints.glob(f"{_STEP_PREFIX}*") if (p / MANIFEST).exists())
    for old in complete[:-keep] if keep else []:
        if old != newest:
            (old / MANIFEST).unlink()  # from now on it counts as incomplete, whatever happens to the rest
            shutil.rmtree(old)


# --- Finding and verifying -------------------------------------------------------------------------------------------


def verify_checkpoint(directory: Path) -> str | None:
    """Why the checkpoint cannot be trusted, in one line; None when every file has its size and SHA-256."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing: the save was not finished"
    try:
        files = orjson.loads(manifest.read_bytes())["files"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if (found := _sha256(path)) != entry["sha256"]:
            return f"{name} has SHA-256 {found[:12]}... instead of {entry['sha256'][:12]}..."
    return None


def agree_on_checkpoint(path: str | Path, *, topology: Topology, required: bool = True) -> Path | None:
    """`find_checkpoint` for all ranks: the first one reads and hashes, the others are told which it is, or why none.

    Not `required`: None for a directory in which no save was ever finished.
    """
    answer: list[Path | UserError | None] = [None]
    if topology.rank == 0:
        try:
            answer = [find_checkpoint(path) if required or has_checkpoints(Path(path)) else None]
        except UserError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def find_checkpoint(path: str | Path) -> Path:
    """The newest complete step of a run directory, or the step itself; says which steps it skips and why.

    Raises UserError when there is no checkpoint, or none that verifies: a run never starts over silently.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        candidates = sorted((path / "checkpoints").glob(f"{_STEP_PREFIX}*"), reverse=True)
    elif path.name.startswith(_STEP_PREFIX) and path.is_dir():
        candidates = [path]
    else:
        raise UserError(
            f"{path}: no checkpoint here; give a run directory or one of its checkpoints/step_... directories"
        )
    for candidate in candidates:
        problem = verify_checkpoint(candidate)
        if problem is None:
            return candidate
        log.warn(f"{candidate}: skipped: {problem}")
    raise UserError(
        f"{path}: none of its {len(candidates)} checkpoints is complete and intact; restore one, or remove the "
        f"directory to start again"
    )


def has_checkpoints(run_directory: Path) -> bool:
    """Whether a save was ever finished here; what a run killed in its first save has left behind does not count."""
    checkpoints = run_directory / "checkpoints"
    return (checkpoints / "latest").exists() or any(checkpoints.glob(f"{_STEP_PREFIX}*/{MANIFEST}"))


# --- Loading ---------------------------------------------------------------------------------------------------------


def read_state(directory: Path) -> TrainingState:
    """Read `state.json` of a checkpoint."""
    return TrainingState(**orjson.loads((directory / "state.json").read_bytes()))


def load_weights(directory: Path, *, model: BuiltModel) -> None:
    """Load the weights alone, saved in any layout."""
    _check_shapes(directory, model=model)
    loaded = dist_checkpointing.load(_sharded_weights(model), str(directory))
    _install_weights(model, loaded)


def load_training(
    directory: Path, *, model: BuiltModel, optimizer: MegatronOptimizer, topology: Topology
) -> TrainingState:
    """Load weights, optimizer and, in the layout they were saved in, the random-number states."""
    state = read_state(directory)
    _check_shapes(directory, model=model)
    same_layout = state.layout == layout_of(topology) and state.backend == dist.get_backend()
    request = _sharded_state(model, optimizer=optimizer, topology=topology, is_loading=True)
    if not same_layout:
        del request["rng"]
        log.info(
            f"resuming in another layout: saved {state.layout}, now {layout_of(topology)}; dropout seeds start afresh"
        )
    loaded = dist_checkpointing.load(request, str(directory))
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
        if tensor.key in saved and tuple(saved[tensor.key].global_shape) != tuple(tensor.global_shape):
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


def _content_metadata() -> dict:
    # megatron-core's default optimizer format is broken in 0.16.1; this one reshards over every layout.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _sharded_weights(model: BuiltModel) -> dict:
    groups = model.cores[0].pg_collection
    metadata = _content_metadata() | {"dp_cp_group": groups.dp_cp}
    names = ["model"] if len(model.cores) == 1 else [f"model{i}" for i in range(len(model.cores))]
    states = [core.sharded_state_dict(metadata=metadata) for core in model.cores]
    # Transformer Engine adds an (empty) FP8 state to every layer, which the local layers do not have: weights alone
    # travel.
    weights = [{key: value for key, value in s.items() if not key.endswith("_extra_state")} for s in states]
    return dict(zip(names, weights, strict=True))


def _sharded_state(model: BuiltModel, *, optimizer: MegatronOptimizer, topology: Topology, is_loading: bool) -> dict:
    weights = _sharded_weights(model)
    metadata = _content_metadata() | {"dp_cp_group": topology.groups.dp_cp}
    shards = weights.get("model", weights)  # interleaved chunks stay apart, each under its name
    optimizer_state = optimizer.sharded_state_dict(shards, is_loading=is_loading, metadata=metadata)
    rng = ShardedObject("rng_state", _rng_state(), (topology.world_size,), (topology.rank,), replica_id=0)
    return weights | {"optimizer": optimizer_state, "rng": rng}


def _install_weights(model: BuiltModel, loaded: dict) -> None:
    for i, core in enumerate(model.cores):
        core.load_state_dict(loaded["model" if len(model.cores) == 1 else f"model{i}"], strict=False)


def _rng_state() -> dict:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state | {"tensor_parallel": get_cuda_rng_tracker().get_states()}


def _restore_rng(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tensor_parallel"])
