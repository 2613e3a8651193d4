"""Megatron-Core's torch_dist files, written with their hashes and read without trust.

Writing: one file per rank, hashed on its way to the disk, by this process or, in the background, by a forked one.
Reading: DCP unpickles `.metadata` and saved objects with full trust; here both go through allow-lists, so that no code
can come out of a checkpoint.
"""

import dataclasses
import io
import math
import mmap
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, Metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import _wrap_exception
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_polar import faults
from megatron_polar.errors import UserError
from megatron_polar.manifest import Damaged, HashedFile
from megatron_polar.processes import serve_rank

# --- Writing ---------------------------------------------------------------------------------------------------------

_WAITING, _WRITTEN, _FAILED = 0, 1, 2
_HEADER = 3  # state, errno, size


class ShardReport:
    """What became of a rank's file, in memory that a forked writer shares with its parent: no queue, no helper."""

    def __init__(self, num_items: int):
        self._memory = mmap.mmap(-1, 8 * (_HEADER + 2 * num_items) + 32)
        numbers = np.frombuffer(self._memory, np.int64, _HEADER + 2 * num_items)
        self._header, self.places = numbers[:_HEADER], numbers[_HEADER:].reshape(num_items, 2)
        self._digest = np.frombuffer(self._memory, np.uint8, 32, offset=8 * len(numbers))

    def succeed(self, file: HashedFile) -> None:
        self._digest[:] = np.frombuffer(bytes.fromhex(file.sha256), np.uint8)
        self._header[1:] = 0, file.size
        self._header[0] = _WRITTEN

    def fail(self, number: int) -> None:
        self._header[:2] = _FAILED, number

    @property
    def num_written(self) -> int:
        """Items that are in the file so far."""
        return int((self.places[:, 1] > 0).sum())

    @property
    def entry(self) -> dict:
        """The file's entry in the manifest."""
        return {"size": int(self._header[2]), "sha256": bytes(self._digest).hex()}

    def problem(self, path: str) -> OSError | None:
        """Why there is no such file; None when it was written."""
        state, number = int(self._header[0]), int(self._header[1])
        if state == _WRITTEN:
            return None
        if state == _WAITING:
            return OSError(0, "the writing process died (killed for memory?)", path)
        return OSError(number, os.strerror(number) if number else "the writing process failed", path)


class HashedWriter(FileSystemWriterAsync):
    """mcore's writer, with one file for each rank and its SHA-256 taken on the way. `entries` and `error` tell after
    the save what this rank wrote.

    It holds what it brought into host memory until the file is written: tensors from a GPU lie in pinned memory, which
    a forked process shares instead of copying on write, and what is let go there is given to the next micro-batch.
    """

    def __init__(self, directory: str, *, after_each: Callable[[], None]):
        super().__init__(directory, thread_count=1)
        self._after_each = after_each
        self.report = ShardReport(0)
        self.error: OSError | None = None
        self._staged: list = []

    def prepare_write_data(self, plan, planner) -> None:
        """Collect what to write; nothing is copied yet."""
        name = f"{plan.storage_data.prefix}0.distcp"
        items = sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO)
        data = [(item, planner.resolve_data(item)) for item in items]
        path = os.path.join(self.checkpoint_dir, name)
        self.write_buckets = [(path, name, data)] if data else []
        self.report = ShardReport(len(data))

    def get_save_function_and_args(self):
        """The function that writes, the one that brings tensors into host memory first, and arguments."""
        if not self.write_buckets:
            return None, None, []
        arguments = [os.getpid(), self.write_buckets, self.report, self._after_each]
        return _write_shard, self._to_host, arguments

    def _to_host(self) -> list:
        path, name, data = self.write_buckets[0]
        staged = [
            (item, x if isinstance(x, io.BytesIO) else x.detach().to("cpu", non_blocking=True)) for item, x in data
        ]
        torch.cuda.synchronize()
        self._staged = [(path, name, staged)]
        return self._staged

    def retrieve_write_results(self):
        """DCP's results, for `.metadata`; a failure becomes a value that every rank is told of."""
        self._staged = []
        if not self.write_buckets:
            return []
        path, name, data = self.write_buckets[0]
        self.error = self.report.problem(path)
        if self.error is not None:
            return _wrap_exception(self.error)
        places = self.report.places.tolist()
        return [
            WriteResult(item.index, length, _StorageInfo(name, offset, length))
            for (item, _), (offset, length) in zip(data, places, strict=True)
        ]

    def finish(self, metadata: Metadata, results) -> None:
        """Write `.metadata` on the first rank; a failure must not leave the other ranks waiting in a collective."""
        try:
            super().finish(metadata, results)
        except OSError as error:
            self.error = error

    @property
    def entries(self) -> dict[str, dict]:
        """Manifest entry of this rank's file, if it has one."""
        return {self.write_buckets[0][1]: self.report.entry} if self.write_buckets else {}


def _write_shard(parent: int, buckets: list, report: ShardReport, after_each: Callable[[], None]) -> None:
    """Write one file, here or in a forked process; tells the outcome through `report` and never raises. `after_each`
    item it calls, which means something only here."""
    if os.getpid() != parent:
        serve_rank(parent)
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and waiting for them would never end
    path, _, data = buckets[0]
    try:
        faults.point("before_shard")
        with HashedFile(Path(path)) as file:
            for number, (_, value) in enumerate(data):
                start = file.tell()
                if isinstance(value, io.BytesIO):
                    file.write(value.getbuffer())
                else:
                    torch.save(_without_the_rest_of_its_storage(value), file)
                report.places[number] = start, file.tell() - start
                after_each()
                if number == len(data) // 2:
                    file.flush()
                    faults.point("in_shard")
        faults.point("after_shard")
    except Exception as error:  # torch.save wraps what the file raises; whatever it is, the other ranks wait for us
        cause = error if isinstance(error, OSError) else error.__context__
        report.fail(cause.errno or 0 if isinstance(cause, OSError) else 0)
    else:
        report.succeed(file)


def _without_the_rest_of_its_storage(tensor: torch.Tensor) -> torch.Tensor:
    """torch.save writes the whole storage that a view looks into."""
    is_view = tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize
    return tensor.clone() if is_view else tensor


class HashedSave(mcore_torch.TorchDistSaveShardedStrategy):
    """mcore's torch_dist strategy over HashedWriter; `writer` belongs to the last save."""

    writer: HashedWriter

    def __init__(self, *, after_each: Callable[[], None]):
        super().__init__("torch_dist", 1, thread_count=1)
        self._after_each = after_each

    def async_save(self, sharded_state_dict, checkpoint_dir) -> AsyncRequest:
        """Plan the save (collective); the request that is returned writes and finalises."""
        state, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        self.writer = HashedWriter(str(checkpoint_dir), after_each=self._after_each)
        planner = mcore_torch.MCoreSavePlanner(
            dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
        )
        planned, *_ = save_state_dict_async_plan(
            mcore_torch.mcore_to_pyt_state_dict(state, False), self.writer, None, 0, planner=planner
        )
        return self._get_save_and_finalize_callbacks(self.writer, planned)


# --- Reading ---------------------------------------------------------------------------------------------------------

_DCP = "torch.distributed.checkpoint."
_METADATA_CLASSES = {
    f"{_DCP}metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    f"{_DCP}filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}
"""All that `.metadata` of a checkpoint of ours is made of."""


class _MetadataUnpickler(pickle._Unpickler):
    """Python's own unpickler, since nobody can forbid the one in C to set attributes of classes and functions, which
    would outlive the file."""

    def find_class(self, module: str, name: str):
        if name not in _METADATA_CLASSES.get(module, ()):
            raise Damaged(f".metadata asks for {module}.{name}, which no checkpoint needs: do not use it")
        return getattr(sys.modules[module], name)

    def load_build(self) -> None:
        target = self.stack[-2]
        if isinstance(target, type) or not dataclasses.is_dataclass(target):
            raise Damaged(f".metadata changes a {type(target).__name__}, which no checkpoint needs: do not use it")
        super().load_build()

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}


def read_metadata(directory: Path) -> Metadata:
    """Read `.metadata` of a torch_dist checkpoint without running what it may ask for. Raises Damaged."""
    try:
        with (directory / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise Damaged(".metadata holds no description of a checkpoint")
        for place in metadata.storage_data.values():
            path = place.relative_path
            if not path.endswith(".distcp") or os.path.basename(path) != path:
                raise Damaged(f".metadata names {path!r}, which is no shard of the checkpoint")
        for name, entry in metadata.state_dict_metadata.items():
            parts = [math.prod(chunk.sizes) for chunk in entry.chunks] if hasattr(entry, "chunks") else []
            if hasattr(entry, "chunks") and sum(parts) != math.prod(entry.size):
                raise Damaged(f".metadata describes {sum(parts)} of {math.prod(entry.size)} numbers of {name}")
    except (Damaged, OSError):
        raise
    except Exception as error:  # a broken pickle may raise nearly anything
        raise Damaged(f".metadata cannot be read ({type(error).__name__})") from error
    return metadata


class _Reader(FileSystemReader):
    """DCP's reader over `read_metadata`, which is read once; tells `load_shards`'s caller of every tensor."""

    after_each: Callable[[], None] = staticmethod(lambda: None)

    def read_metadata(self, *arguments, **keywords) -> Metadata:
        if not hasattr(self, "_read"):
            self._read = read_metadata(Path(self.path))
        return self._read

    def read_data(self, plan, planner):
        commit = planner.commit_tensor

        def commit_and_tell(read_item, tensor) -> None:
            commit(read_item, tensor)
            _Reader.after_each()

        planner.commit_tensor = commit_and_tell
        return super().read_data(plan, planner)


def _load_bytes(self, read_item, value: io.BytesIO) -> None:
    """DefaultLoadPlanner.load_bytes, which says weights_only=False."""
    name, loaded = read_item.dest_index.fqn, torch.load(value, weights_only=True)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


# mcore offers no parameter for either: its load strategy makes reader and planner itself.
mcore_torch._get_filesystem_reader = lambda directory, cache_metadata=False: _Reader(directory)
mcore_torch.MCoreLoadPlanner.load_bytes = _load_bytes


class _CommonFile(TorchCommonLoadStrategy):
    """mcore's reader of common.pt, which leaves `weights_only` to an environment variable of torch's."""

    def load_common(self, checkpoint_dir: str) -> dict:
        try:
            content = torch.load(Path(checkpoint_dir) / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken archive may raise nearly anything
            raise Damaged(f"{COMMON_STATE_FNAME} cannot be read ({_one_line(error)})") from error
        if not isinstance(content, dict):
            raise Damaged(f"{COMMON_STATE_FNAME} holds a {type(content).__name__} instead of a dict")
        return content


def load_shards(wanted: dict, directory: Path, *, after_each: Callable[[], None]) -> dict:
    """Load what a sharded state dict describes, calling `after_each` tensor; collective. To be called inside
    `refusing_what_is_wrong`."""
    _Reader.after_each = staticmethod(after_each)
    return dist_checkpointing.load(wanted, str(directory), common_strategy=_CommonFile())


@contextmanager
def refusing_what_is_wrong(directory: Path) -> Iterator[None]:
    """One line for a checkpoint whose hashes fit and whose content does not: whoever changes a file can hash it, too.

    Raises UserError. A RuntimeError passes: that is how a collective says that it has lost a rank.
    """
    try:
        yield
    except UserError:
        raise
    except CheckpointException as error:  # of torch, and no Exception: what every rank has met
        cause = next(iter(error.failures.values()))[0]
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
            raise
        cause = error
    else:
        return
    if isinstance(cause, Damaged):
        raise UserError(f"{directory}: {_one_line(cause, name=False)}") from cause
    raise UserError(
        f"{directory}: its hashes fit, but it is not what training writes ({_one_line(cause)}); use another checkpoint"
    ) from cause


def _one_line(error: BaseException, *, name: bool = True) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:200] + "..."
    return f"{type(error).__name__}: {text}" if name else text
