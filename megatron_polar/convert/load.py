"""Weights of a Hugging Face directory straight into a model, in any layout of ranks."""

import torch

from megatron_polar.convert.families import EMBEDDING, Entry, entries
from megatron_polar.convert.hugging_face import HuggingFaceModel
from megatron_polar.convert.tensors import padded
from megatron_polar.model.build import BuiltModel
from megatron_polar.model.initialization import fill_weights


def load_hugging_face(source: HuggingFaceModel, *, model: BuiltModel) -> None:
    """Fill a model that was built for `source` with its weights; each rank reads whole tensors and keeps its part.

    Raises UserError.
    """
    by_place = {(e.key, e.layer): e for e in entries(source.family, source.architecture, with_head=True)}
    last: tuple[Entry | None, torch.Tensor | None] = (None, None)

    def make(key: str, layer: int | None, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        nonlocal last
        entry = by_place[key, layer]
        if last[0] != entry:  # gate and up are two shards of one tensor
            last = (entry, source.read(entry))
        tensor = padded(last[1], rows=shape[0]) if key == EMBEDDING else last[1]
        return tensor.to(device)

    metadata = {"dp_cp_group": model.cores[0].pg_collection.dp_cp}
    for core in model.cores:
        fill_weights(core, make=make, metadata=metadata)
