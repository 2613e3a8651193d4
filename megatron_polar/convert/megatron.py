"""Megatron-Core checkpoints, tensor by tensor: a 70B model passes through the memory of a login node.

The format is that of a checkpoint of training (torch_dist), with one chunk a layer and tensor, so that a run reads it
in any layout.
"""

import io
from pathlib import Path

import orjson
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_polar.manifest import Damaged, HashedFile
from megatron_polar.train.shard_files import HashedSave, read_metadata
from megatron_polar.train.state_dict import content_metadata

_FILE_BYTES = 4 * 2**30
"""Larger shards are split, so that many ranks share the hashing when a run starts from them."""


class SavedTensors:
    """Reads the tensors of a checkpoint that was saved in any layout; one tensor of one layer is in memory at a time.

    Raises Damaged where the checkpoint is not what training writes.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._metadata = read_metadata(directory)

    def has(self, key: str) -> bool:
        return isinstance(self._metadata.state_dict_metadata.get(key), TensorStorageMetadata)

    def shape(self, key: str, *, is_layered: bool) -> tuple[int, ...]:
        """Shape of a tensor in one layer."""
        return tuple(self._metadata.state_dict_metadata[key].size)[is_layered:]

    def dtype(self, key: str) -> torch.dtype:
        return self._metadata.state_dict_metadata[key].properties.dtype

    def read(self, key: str, *, layer: int | None = None) -> torch.Tensor:
        """A tensor, whole: of one layer where megatron-core stacks layers."""
        stored: TensorStorageMetadata = self._metadata.state_dict_metadata[key]
        shape = tuple(stored.size)
        target = torch.empty(shape if layer is None else (1, *shape[1:]), dtype=stored.properties.dtype)
        first = 0 if layer is None else layer
        missing = target.numel()
        for chunk in stored.chunks:
            start, stop = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            low, high = max(start, first), min(stop, first + target.size(0))
            if low >= high:
                continue
            values = self._read_chunk(key, chunk)[low - start : high - start]
            window = [slice(low - first, high - first)]
            window += [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            target[tuple(window)] = values
            missing -= values.numel()
        if missing:
            raise Damaged(f".metadata describes {target.numel() - missing} of {target.numel()} numbers of {key}")
        return target if layer is None else target[0]

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        with (self.directory / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        try:
            values = torch.load(content, weights_only=True)
        except Exception as error:  # a broken archive may raise nearly anything
            raise Damaged(f"{place.relative_path}: {key} cannot be read ({type(error).__name__})") from error
        if not isinstance(values, torch.Tensor):
            raise Damaged(f"{place.relative_path} has a {type(values).__name__} in the place of {key}")
        if tuple(values.shape) != tuple(chunk.sizes):
            raise Damaged(f"{place.relative_path} has {tuple(values.shape)} of {key} where .metadata has {chunk.sizes}")
        return values


class TensorWriter:
    """Writes a checkpoint's tensors in any order, then `finish`; `entries` are the manifest's, of the files written."""

    def __init__(self, directory: Path, *, num_layers: int):
        self.directory, self.num_layers = directory, num_layers
        self.entries: dict[str, dict] = {}
        self._metadata = Metadata(state_dict_metadata={}, storage_data={})
        self._file: HashedFile | None = None

    def add(self, key: str, tensor: torch.Tensor, *, layer: int | None = None) -> None:
        """Append a tensor, of one layer where megatron-core stacks layers. Raises OSError."""
        if layer is not None:
            tensor = tensor[None]
        offsets = torch.Size([layer or 0] + [0] * (tensor.dim() - 1))
        size = torch.Size([self.num_layers if layer is not None else tensor.size(0), *tensor.shape[1:]])
        stored = self._metadata.state_dict_metadata.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [])
        )
        stored.chunks.append(ChunkStorageMetadata(offsets, tensor.shape))
        file = self._current_file()
        start = file.tell()
        torch.save(tensor.detach().contiguous().clone(), file)  # a view would be saved with all that it looks into
        place = _StorageInfo(file.path.name, start, file.tell() - start)
        self._metadata.storage_data[MetadataIndex(key, offsets)] = place

    def _current_file(self) -> HashedFile:
        if self._file is not None and self._file.tell() < _FILE_BYTES:
            return self._file
        self._close()
        self._file = HashedFile(self.directory / f"__0_{len(self.entries)}.distcp")
        return self._file.__enter__()

    def _close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
            self.entries[self._file.path.name] = self._file.entry
            self._file = None

    def finish(self) -> None:
        """Write what describes the tensors."""
        import pickle

        self._close()
        buffer = io.BytesIO()
        torch.save({"content_metadata": content_metadata()}, buffer)
        strategy = HashedSave(after_each=lambda: None)
        files = {
            ".metadata": pickle.dumps(self._metadata),
            "common.pt": buffer.getvalue(),
            "metadata.json": orjson.dumps(CheckpointingConfig(strategy.backend, strategy.version)),
        }
        for name, content in files.items():
            with HashedFile(self.directory / name) as file:
                file.write(content)
            self.entries[name] = file.entry
