"""A step's comparisons → data-parallel ranks and micro-batches of about equal work. Pure numpy.

Every rank plans the whole step, at any number of ranks, so that this must cost little beside the step itself:
benchmarks/balance.py measures both.
"""

import bisect
import heapq
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from megatron_polar.config.presets import Architecture
from megatron_polar.data.packing import Layout, row_tokens
from megatron_polar.data.template import TokenizedComparison

Part = tuple[int, int]
"""Cost, and a number that no other part has: below the number of items it is an item."""


def plan_step(
    comparisons: Sequence[TokenizedComparison],
    *,
    num_ranks: int,
    max_tokens: int,
    layout: Layout,
    architecture: Architecture,
    multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Deal a step's comparisons to data-parallel ranks and micro-batches: `plan[rank][micro_batch]` lists indices.

    Every rank gets the same number of micro-batches (a multiple of `multiple_of`, for interleaved pipelines), balanced
    by FLOPs over ranks and within each rank, and none exceeds `max_tokens` unless it holds a single comparison.
    Micro-batches are sorted by cost, so that the k-th ones of all ranks take about the same time.
    """
    costs, tokens, *_ = step_costs(comparisons, layout=layout, architecture=architecture)
    ranks = karmarkar_karp(costs, num_ranks)

    def size(members: list[int]) -> int:
        if layout == "padded":
            return row_tokens([comparisons[i] for i in members], layout=layout, pad_to_multiple=1)
        return sum([tokens[i] for i in members])

    def split(members: list[int], count: int) -> list[list[int]]:
        if count == 1:
            return [members]
        return [[members[j] for j in part] for part in karmarkar_karp([costs[i] for i in members], count)]

    def fits(parts: list[list[int]]) -> bool:
        return all(len(part) <= 1 or size(part) <= max_tokens for part in parts)

    most = max(1, *map(len, ranks))

    def deal(count: int) -> list[list[list[int]]] | None:
        plan = [split(members, count * multiple_of) for members in ranks]
        return plan if all(map(fits, plan)) or count * multiple_of >= most else None

    # The fewest that fit: one more than is known to be too few, further and further up, then by halves in between.
    needed = max(1, *(-(-sum([tokens[i] for i in members]) // max_tokens) for members in ranks))
    too_few, step = -(-min(needed, most) // multiple_of) - 1, 1
    while (plan := deal(too_few + step)) is None:
        too_few, step = too_few + step, 2 * step
    while step > 1:
        step //= 2
        if (fewer := deal(too_few + step)) is None:
            too_few += step
        else:
            plan = fewer
    return [sorted(parts, key=lambda part: -sum([costs[i] for i in part])) for parts in plan]


class StepCosts(NamedTuple):
    """Of every comparison: forward FLOPs, by which rows are balanced, physical tokens, query-key pairs inside the mask,
    and tokens without sharing; all without padding."""

    flops: list[int]
    tokens: list[int]
    attended: list[int]
    logical_tokens: list[int]


def step_costs(comparisons: Sequence[TokenizedComparison], *, layout: Layout, architecture: Architecture) -> StepCosts:
    """What every comparison costs in this layout."""
    prefixes = np.array([len(c.prefix) for c in comparisons], dtype=np.int64)
    counts = np.array([len(c.candidates) for c in comparisons], dtype=np.int64)
    lengths = np.array([len(candidate) for c in comparisons for candidate in c.candidates], dtype=np.int64)
    starts = np.cumsum(counts) - counts
    candidates = np.add.reduceat(lengths, starts)
    repeats = 1 if layout == "shared_prefix" else counts
    tokens, logical = repeats * prefixes + candidates, counts * prefixes + candidates
    attended = np.add.reduceat(lengths * (lengths + 1) // 2, starts) + prefixes * candidates
    attended += repeats * (prefixes * (prefixes + 1) // 2)
    flops = architecture.forward_flops(tokens=tokens, attended=attended, rewards=counts, reward_keys=logical)
    return StepCosts(flops.tolist(), tokens.tolist(), attended.tolist(), logical.tolist())


def karmarkar_karp(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Split items, whose costs are 0 or more, into parts of nearly equal cost by the largest differencing method
    (Karmarkar & Karp 1982).

    Returns the item indices of each part. Always combines the two partitions whose parts differ most, heaviest with
    lightest; the result depends on nothing but the costs and their order.
    """
    if num_parts == 1 or not costs:
        return [list(range(len(costs)))] + [[] for _ in range(num_parts - 1)]
    joined = []  # what parts consist of: `joined[n]` are the two that became part number len(costs) + n
    numbers, order = itertools.count(len(costs)), itertools.count()

    def join(first: Part, second: Part) -> Part:
        joined.append((first[1], second[1]))
        return first[0] + second[0], next(numbers)

    # A partition lists its parts that are not empty, ascending. Most are much shorter than `num_parts`. An item that is
    # still alone differs by its cost; these are not in the heap, but taken in order, many by the same partition: all
    # at once while it has empty parts, since its spread is that of its heaviest then. This is what makes it fast.
    descending = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)  # equal ones stay in their order
    items = [(costs[index], index) for index in descending]
    alone = [cost for cost, _ in items] + [-1, -1]
    heap, taken, count = [], 0, len(items)
    while taken < count or len(heap) > 1:
        if len(heap) > 1 and -min(heap[1:3])[0] > alone[taken]:
            parts = _combine(heapq.heappop(heap)[2], heapq.heappop(heap)[2], num_parts=num_parts, join=join)
        else:
            parts = heapq.heappop(heap)[2] if heap and -heap[0][0] > alone[taken + 1] else []
            next_spread = -heap[0][0] if heap else -1
            spread = math.inf  # the first item is always taken: nothing in the heap differs more
            if len(parts) < num_parts:
                end = bisect.bisect_right(alone, -next_spread, taken, count, key=operator.neg)
                end = min(end, taken + num_parts - len(parts))
                parts = sorted(parts + items[taken:end])
                taken, spread = end, _spread(parts, num_parts)
            while taken < count and spread >= alone[taken + 1] and min(spread, alone[taken]) >= next_spread:
                bisect.insort(parts, join(parts.pop(0), items[taken]))
                taken += 1
                spread = _spread(parts, num_parts)
        heapq.heappush(heap, (-_spread(parts, num_parts), next(order), parts))
    parts = _members([number for _, number in heap[0][2]], joined, len(costs))
    return [[] for _ in range(num_parts - len(parts))] + parts


def _spread(parts: list[Part], num_parts: int) -> int:
    return parts[-1][0] - (parts[0][0] if len(parts) == num_parts else 0)


def _combine(
    first: list[Part], second: list[Part], *, num_parts: int, join: Callable[[Part, Part], Part]
) -> list[Part]:
    """Add two partitions, the heaviest part of one to the lightest of the other; empty parts take the heaviest."""
    if len(first) < len(second):
        first, second = second, first
    shared = max(0, len(first) + len(second) - num_parts)  # so many lightest parts of both find no empty one
    return sorted(first[shared:] + second[shared:] + list(map(join, first[:shared], reversed(second[:shared]))))


def _members(numbers: list[int], joined: list[tuple[int, int]], num_items: int) -> list[list[int]]:
    """Items of each part, ascending. From the last join to the first: what a part consists of has lower numbers."""
    members = [[] for _ in numbers]
    part_of = [members] * (num_items + len(joined))  # every place is written before it is read
    for number, part in zip(numbers, members, strict=True):
        part_of[number] = part
    for number in range(len(joined) - 1, -1, -1):
        first, second = joined[number]
        part_of[first] = part_of[second] = part_of[num_items + number]
    for index in range(num_items):
        part_of[index].append(index)
    return members
