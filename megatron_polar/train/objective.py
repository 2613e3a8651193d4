"""Ranking loss on rewards (paper eqs. 7 and 8). Pure torch: sums and counts, never means."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class RankingLoss:
    """`loss_sum`: differentiable sum over pairs, [] . `sums`: detached sums for the report, fp64 [len(SUMS)].
    `half_wins`: int8 [p], 2 for a pair in the right order, 1 for a tie, 0 for the wrong order."""

    loss_sum: torch.Tensor
    sums: torch.Tensor
    half_wins: torch.Tensor


SUMS = ("pairs", "loss", "correct", "margin", "reward_chosen", "reward_rejected", "reward_squared")
"""What `RankingLoss.sums` holds, in order; a tied pair counts as half correct."""


def ranking_loss(rewards: torch.Tensor, *, winners: torch.Tensor, losers: torch.Tensor) -> RankingLoss:
    """Bradley-Terry: sum over the ordered pairs of -log sigmoid(r_winner - r_loser).

    rewards [c] fp32 (or fp64); winners, losers [p] index into it. The caller divides once by the global number of
    pairs, so that every pair of a step weighs the same on whatever rank and micro-batch it is.
    """
    margin = rewards[winners] - rewards[losers]
    losses = -F.logsigmoid(margin)
    with torch.no_grad():
        correct = (margin > 0).double() + 0.5 * (margin == 0).double()
        chosen, rejected = rewards[winners].double(), rewards[losers].double()
        squares = (chosen.square() + rejected.square()).sum()
        columns = [losses.double(), correct, margin.double(), chosen, rejected]
        pairs = torch.full((), float(len(winners)), dtype=torch.float64, device=rewards.device)  # no copy to wait for
        sums = torch.stack([pairs, *(column.sum() for column in columns), squares])
    return RankingLoss(loss_sum=losses.sum(), sums=sums, half_wins=(2 * correct).to(torch.int8))
