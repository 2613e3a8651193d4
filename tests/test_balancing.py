"""A step's comparisons are dealt to ranks and micro-batches whole, evenly, and always in the same way."""

import itertools

import numpy as np
import pytest

from megatron_polar.config.presets import PRESETS
from megatron_polar.data.balancing import karmarkar_karp, plan_step, step_costs
from megatron_polar.data.packing import attended_pairs, build_micro_batch, physical_tokens
from megatron_polar.data.template import TokenizedComparison

LAYOUTS = ["shared_prefix", "packed", "padded"]
SHAPE = PRESETS["nano"]


def batch_of(seed: int, *, count: int) -> list[TokenizedComparison]:
    """Comparisons of 2 to 5 candidates with lengths of 1 to 30 tokens."""
    generator = np.random.default_rng(seed)

    def tokens() -> np.ndarray:
        return np.zeros(generator.integers(1, 31), dtype=np.int32)

    return [
        TokenizedComparison(tokens(), tuple(tokens() for _ in range(k)), (0,) + (1,) * (k - 1), 0)
        for k in generator.integers(2, 6, count)
    ]


# --- planning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_ranks", "multiple_of"), [(1, 1), (2, 1), (3, 2), (8, 4)])
@pytest.mark.parametrize("max_tokens", [1, 150, 500, 10**6])
def test_plans_lose_and_repeat_nothing_and_keep_to_the_limits(layout, num_ranks, multiple_of, max_tokens):
    comparisons = batch_of(8, count=21)
    plan = plan_step(
        comparisons,
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        layout=layout,
        architecture=SHAPE,
        multiple_of=multiple_of,
    )
    assert len(plan) == num_ranks
    assert sorted(i for parts in plan for part in parts for i in part) == list(range(21))
    counts = {len(parts) for parts in plan}
    assert len(counts) == 1
    assert counts.pop() % multiple_of == 0
    for part in itertools.chain(*plan):
        if len(part) > 1:
            chosen = [comparisons[i] for i in part]
            size = build_micro_batch(chosen, layout=layout, pad_id=0, pad_to_multiple=1).tokens.size
            assert size <= max_tokens


def test_no_more_micro_batches_than_comparisons_when_each_is_above_the_limit():
    plan = plan_step(batch_of(9, count=4), num_ranks=1, max_tokens=2, layout="packed", architecture=SHAPE)
    assert sorted(plan[0]) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_tokens", [400, 900, 2000])
def test_with_one_micro_batch_less_some_would_be_too_long(layout, max_tokens):
    comparisons = batch_of(13, count=60)
    keywords = {"layout": layout, "architecture": SHAPE}
    costs, *_ = step_costs(comparisons, **keywords)
    (plan,) = plan_step(comparisons, num_ranks=1, max_tokens=max_tokens, **keywords)
    parts = karmarkar_karp(costs, len(plan) - 1)

    def length(part: list[int]) -> int:
        chosen = [comparisons[i] for i in part]
        return build_micro_batch(chosen, layout=layout, pad_id=0, pad_to_multiple=1).tokens.size

    assert any(len(part) > 1 and length(part) > max_tokens for part in parts)


def test_micro_batches_go_from_the_most_to_the_least_expensive():
    comparisons = batch_of(10, count=30)
    costs, *_ = step_costs(comparisons, layout="shared_prefix", architecture=SHAPE)
    plan = plan_step(comparisons, num_ranks=2, max_tokens=300, layout="shared_prefix", architecture=SHAPE)
    for parts in plan:
        loads = [sum(costs[i] for i in part) for part in parts]
        assert loads == sorted(loads, reverse=True)
        assert len(loads) > 2


def test_a_plan_is_a_function_of_its_input():
    comparisons = batch_of(11, count=17)
    keywords = {"num_ranks": 3, "max_tokens": 200, "layout": "shared_prefix", "architecture": SHAPE}
    assert plan_step(comparisons, **keywords) == plan_step(list(comparisons), **keywords)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["nano", "polar_72b"])
def test_costs_of_a_step_are_those_of_its_comparisons(layout, preset):
    comparisons = batch_of(12, count=25)
    shape = PRESETS[preset]
    costs, tokens, *_ = step_costs(comparisons, layout=layout, architecture=shape)
    assert costs == [
        shape.forward_flops(
            tokens=physical_tokens(c, layout=layout),
            attended=attended_pairs(c, layout=layout),
            rewards=len(c.candidates),
            reward_keys=physical_tokens(c, layout="packed"),
        )
        for c in comparisons
    ]
    assert tokens == [physical_tokens(c, layout=layout) for c in comparisons]


# --- Karmarkar-Karp --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 40])
def test_karmarkar_karp_puts_every_item_into_one_part(num_parts, count):
    costs = np.random.default_rng(count).integers(0, 1000, count).tolist()
    parts = karmarkar_karp(costs, num_parts)
    assert len(parts) == num_parts
    assert sorted(i for part in parts for i in part) == list(range(count))


def textbook_karmarkar_karp(costs: list[int], num_parts: int) -> list[list[int]]:
    """The method as it is written down: partitions of `num_parts` parts, empty ones included, no short cuts."""
    partitions = [[(0, [])] * (num_parts - 1) + [(cost, [index])] for index, cost in enumerate(costs)]
    while len(partitions) > 1:
        partitions.sort(key=lambda parts: parts[0][0] - parts[-1][0])
        first, second, *rest = partitions
        added = [(a + b, x + y) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        partitions = [*rest, sorted(added, key=lambda part: part[0])]
    return [members for _, members in partitions[0]]


@pytest.mark.parametrize("num_parts", [2, 3, 8, 50])
@pytest.mark.parametrize("distribution", ["lognormal", "uniform", "few_large"])
def test_karmarkar_karp_is_the_textbooks(num_parts, distribution):
    generator = np.random.default_rng(num_parts)
    for count in (3, 8, 9, 50, 51, 200):
        draw = {"lognormal": generator.lognormal(6, 0.8, count), "uniform": generator.uniform(0, 1, count)}
        costs = draw.get(distribution, np.where(np.arange(count) < 3, 50.0, draw["uniform"]))
        costs = (costs * 10**12).astype(int) + generator.permutation(
            count
        )  # no two are equal, so that there is one result
        expected = textbook_karmarkar_karp(costs.tolist(), num_parts)
        found = karmarkar_karp(costs.tolist(), num_parts)
        assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_karmarkar_karp_of_equal_costs_gives_equal_parts(num_parts):
    assert {len(part) for part in karmarkar_karp([7] * (5 * num_parts), num_parts)} == {5}


@pytest.mark.parametrize("num_parts", [2, 3])
def test_karmarkar_karp_stays_within_its_known_bound_of_the_optimum(num_parts):
    generator = np.random.default_rng(3)
    # Fischetti & Martello (1987) for 2 parts, Michiels et al. (2003) for more: LDM's largest part is at most
    # 4/3 - 1/(3(m-1)) times the optimal one for m >= 3 parts, and at most 7/6 times for m = 2.
    bound = 7 / 6 if num_parts == 2 else 4 / 3 - 1 / (3 * (num_parts - 1))
    for _ in range(30):
        costs = generator.integers(1, 60, 7).tolist()
        best = min(
            max(sum(c for c, part in zip(costs, choice, strict=True) if part == p) for p in range(num_parts))
            for choice in itertools.product(range(num_parts), repeat=len(costs))
        )
        largest = max(sum(costs[i] for i in part) for part in karmarkar_karp(costs, num_parts))
        assert best <= largest <= bound * best + 1e-9


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
@pytest.mark.parametrize("seed", range(3))
def test_lognormal_mixes_are_balanced_to_two_percent_over_eight_ranks(layout, seed):
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(6.0, 0.8, (1024, 3)), 8, 8000).astype(int)
    comparisons = [
        TokenizedComparison(np.zeros(p, np.int32), (np.zeros(a, np.int32), np.zeros(b, np.int32)), (0, 1), 0)
        for p, a, b in lengths
    ]
    shape = PRESETS["polar_1_8b"]
    plan = plan_step(comparisons, num_ranks=8, max_tokens=32768, layout=layout, architecture=shape)
    costs, *_ = step_costs(comparisons, layout=layout, architecture=shape)
    loads = [sum(costs[i] for part in parts for i in part) for parts in plan]
    assert max(loads) * 8 / sum(loads) <= 1.02
