"""The ranking loss is -log sigmoid of the margin, summed over pairs, with its exact gradient."""

import math

import numpy as np
import pytest
import torch

from megatron_polar.train.metrics import rates
from megatron_polar.train.objective import SUMS, ranking_loss

PAIRS = (torch.tensor([0, 0, 1, 3]), torch.tensor([1, 2, 2, 4]))


def rewards(seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(5, dtype=torch.float64, generator=generator)


def naive(values: list[float]) -> float:
    margins = [values[w] - values[x] for w, x in zip(*(p.tolist() for p in PAIRS), strict=True)]
    return sum(math.log(1 + math.exp(-margin)) for margin in margins)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_equals_the_naive_formula(seed):
    values = rewards(seed)
    found = ranking_loss(values, winners=PAIRS[0], losers=PAIRS[1])
    assert float(found.loss_sum) == pytest.approx(naive(values.tolist()), rel=1e-14)
    assert found.loss_sum.dtype == torch.float64


def test_the_gradient_equals_finite_differences():
    values = rewards().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: ranking_loss(r, winners=PAIRS[0], losers=PAIRS[1]).loss_sum, values)


def test_the_gradient_is_minus_the_probability_of_the_wrong_order():
    values = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    ranking_loss(values, winners=torch.tensor([0]), losers=torch.tensor([1])).loss_sum.backward()
    wrong = 1 / (1 + math.exp(1.5))
    np.testing.assert_allclose(values.grad, [-wrong, wrong], rtol=1e-14)


def test_huge_margins_neither_overflow_nor_lose_their_gradient():
    values = torch.tensor([-2000.0, 2000.0], requires_grad=True)
    found = ranking_loss(values, winners=torch.tensor([0]), losers=torch.tensor([1]))
    found.loss_sum.backward()
    assert float(found.loss_sum) == 4000.0
    assert values.grad.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("count", [0, 5])
def test_without_pairs_loss_and_gradient_are_zero_not_missing(count):
    weight = torch.ones(count, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    found = ranking_loss(weight * 3.0, winners=nothing, losers=nothing)
    found.loss_sum.backward()
    assert float(found.loss_sum) == 0.0
    assert found.sums.tolist() == [0.0] * len(SUMS)
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_sums_count_pairs_and_half_for_ties():
    values = torch.tensor([1.0, 1.0, -2.0, 0.5, 4.0])
    sums = dict(zip(SUMS, ranking_loss(values, winners=PAIRS[0], losers=PAIRS[1]).sums.tolist(), strict=True))
    assert sums["pairs"] == 4
    assert sums["correct"] == 0.5 + 1 + 1 + 0
    assert sums["margin"] == 0 + 3 + 3 - 3.5
    assert sums["reward_chosen"] == 1 + 1 + 1 + 0.5
    assert sums["reward_rejected"] == 1 - 2 - 2 + 4
    assert sums["reward_squared"] == 3 * 1 + 0.25 + 1 + 4 + 4 + 16


def test_sums_of_parts_add_up_to_the_sums_of_the_whole():
    values = rewards()
    whole = ranking_loss(values, winners=PAIRS[0], losers=PAIRS[1]).sums
    parts = [ranking_loss(values, winners=PAIRS[0][s], losers=PAIRS[1][s]).sums for s in (slice(0, 1), slice(1, 4))]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-14)


def test_the_report_carries_no_graph():
    assert not ranking_loss(rewards().requires_grad_(), winners=PAIRS[0], losers=PAIRS[1]).sums.requires_grad


def test_rates_are_means_over_pairs_and_the_spread_is_over_both_sides():
    values = rewards()
    sums = dict(zip(SUMS, ranking_loss(values, winners=PAIRS[0], losers=PAIRS[1]).sums.tolist(), strict=True))
    row = rates(sums)
    sides = torch.cat([values[PAIRS[0]], values[PAIRS[1]]]).numpy()
    assert row["rm/loss"] == pytest.approx(naive(values.tolist()) / 4, rel=1e-12)
    assert row["rm/reward_std"] == pytest.approx(sides.std(), rel=1e-9)
    assert row["rm/margin"] == pytest.approx(row["rm/reward_chosen"] - row["rm/reward_rejected"], rel=1e-12)
