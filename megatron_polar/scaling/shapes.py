"""Models of a wanted size: width, depth, heads and feed-forward width that keep their proportions. No torch.

- Proportions: hidden / layers = 32 (hidden / 128)^0.4, which goes through POLAR-7B's 4096 / 32 and near POLAR-1.8B's
  2048 / 24; at 512 it gives 56, at 128 it gives 32. Layers are even from 8 on, so that pipelines of 2 divide them.
- Feed-forward width 3.5 times hidden, as in POLAR-7B (1.8B: 4).
- From hidden 2048 on, heads of 128 and 8 key/value heads, as POLAR has them; 4 of these for 2560 and 3584, which other
  shapes do not come near. Below, the largest heads up to 64 that are at least four and even in number, and half as many
  key/value heads; from 1024 on hidden is a multiple of 256, so that TP of 2 divides both.
- init_method_std 1 / sqrt(hidden): 0.02 near hidden 2500, larger for small models, which learn slowly from 0.02.

Size is the weights without the embedding, as in the laws that are fitted. Taken is the shape with the least sum of
squares of the deviation from the proportions and of twice that from the size, both as logarithms. From 10M parameters
on sizes come out within 16 % and mostly within 5 %, proportions within 31 % and mostly within 15 %; below, where shapes
are few, further off. A law takes the size that came out, so that it costs little to miss the one that was asked for.
"""

import dataclasses
import math
from collections.abc import Iterator

from megatron_polar.config.presets import Architecture
from megatron_polar.errors import UserError

_SIZE_WEIGHT = 2.0
_FEWEST_LAYERS = 2
"""Of the last one only the rows of rewards are computed, so that a single layer would hardly compute at all."""
_LARGEST_HIDDEN = 16384
_HIDDEN_STEPS = ((128, 32), (512, 64), (1024, 128), (2048, 256), (4096, 512), (_LARGEST_HIDDEN + 1, 1024))


def shape_of_size(num_parameters: float, *, like: Architecture) -> Architecture:
    """The shape for `num_parameters` weights without the embedding; what is no size (RoPE, biases, norms) is as in
    `like`. Raises UserError for sizes that no shape comes near."""
    shapes = list(_shapes(like))
    best = min(
        shapes,
        key=lambda shape: math.hypot(_SIZE_WEIGHT * _size_error(shape, num_parameters), _proportion_error(shape)),
    )
    if _size_error(best, num_parameters) > math.log(1.5):
        smallest, largest = (pick(shape.num_parameters(0) for shape in shapes) for pick in (min, max))
        raise UserError(
            f"--sizes: {num_parameters:.3g} parameters without the embedding: shapes reach from {smallest:,} to "
            f"{largest:,}, and none is near; choose another size"
        )
    return best


def _shapes(like: Architecture) -> Iterator[Architecture]:
    hidden = 32
    while hidden <= _LARGEST_HIDDEN:
        head = _head_size(hidden)
        for layers in _depths(hidden):
            yield dataclasses.replace(
                like,
                num_layers=layers,
                hidden_size=hidden,
                ffn_hidden_size=7 * hidden // 2,
                num_attention_heads=hidden // head,
                num_query_groups=_query_groups(hidden),
                kv_channels=head,
                init_method_std=round(hidden**-0.5, 4),
            )
        hidden += next(step for below, step in _HIDDEN_STEPS if hidden < below)


def _head_size(hidden: int) -> int:
    if hidden >= 2048:
        return 128
    return next(head for head in (64, 32, 16) if hidden % (2 * head) == 0 and (hidden >= 4 * head or head == 16))


def _query_groups(hidden: int) -> int:
    heads = hidden // _head_size(hidden)
    if hidden < 2048:
        return heads // 2
    return 8 if heads % 8 == 0 else 4


def _depths(hidden: int) -> list[int]:
    """From two thirds to one and a half of the depth that the proportions want."""
    wanted = hidden / _proportion(hidden)
    low, high = max(_FEWEST_LAYERS, math.floor(wanted / 1.5)), math.ceil(wanted * 1.5)
    return [layers for layers in range(low, high + 1) if layers < 8 or layers % 2 == 0]


def _proportion(hidden: int) -> float:
    """Wanted hidden / layers."""
    return 32 * (hidden / 128) ** 0.4


def _proportion_error(shape: Architecture) -> float:
    return abs(math.log(shape.hidden_size / shape.num_layers / _proportion(shape.hidden_size)))


def _size_error(shape: Architecture, wanted: float) -> float:
    return abs(math.log(shape.num_parameters(0) / wanted))
