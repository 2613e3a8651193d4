"""One of our tensors ↔ the tensors of a Hugging Face model that it is made of."""

from collections.abc import Sequence

import torch

from megatron_polar.config.presets import Architecture


def join(parts: Sequence[torch.Tensor], *, key: str, architecture: Architecture) -> torch.Tensor:
    """Their tensors → ours. Query, key and value rows become q..q, k, v of each key/value group in turn (Megatron's
    linear_qkv); gate and up follow each other (linear_fc1)."""
    if len(parts) == 1:
        return parts[0]
    if ".linear_qkv." in key:
        groups, head_size = architecture.num_query_groups, architecture.kv_channels
        split = [part.reshape(groups, -1, head_size, *part.shape[1:]) for part in parts]
        return torch.cat(split, dim=1).flatten(0, 2)
    return torch.cat(list(parts))


def padded(embedding: torch.Tensor, *, rows: int) -> torch.Tensor:
    """The embedding with the rows of zeros that training adds."""
    return torch.nn.functional.pad(embedding, (0, 0, 0, rows - embedding.size(0)))


def separate(tensor: torch.Tensor, *, key: str, count: int, architecture: Architecture) -> list[torch.Tensor]:
    """Ours → `count` of theirs: the reverse of `join`."""
    if count == 1:
        return [tensor]
    if ".linear_qkv." in key:
        groups, head_size = architecture.num_query_groups, architecture.kv_channels
        queries = architecture.num_attention_heads // groups
        by_group = tensor.reshape(groups, queries + 2, head_size, *tensor.shape[1:])
        return [part.flatten(0, 2) for part in by_group.split([queries, 1, 1], dim=1)]
    return list(tensor.chunk(count))
