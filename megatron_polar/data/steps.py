"""Steps of training data for one rank: which comparisons, in which rows.

A step is a pure function of its number: every rank reads the step's comparisons, makes the same plan, and builds its
own micro-batches. So a loader has no state to save: the number of the next step is the cursor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_polar.config.presets import Architecture
from megatron_polar.data.balancing import plan_step, step_costs
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.curriculum import DifficultyTable, DifficultyTables
from megatron_polar.data.packing import Layout, MicroBatch, build_micro_batch, row_tokens
from megatron_polar.data.template import TokenizedComparison


@dataclass(frozen=True)
class RowShape:
    """How comparisons are laid into rows: what the data section, the model and the topology say together."""

    layout: Layout
    max_tokens: int
    pad_to_multiple: int
    num_ranks: int
    micro_batches_multiple_of: int
    architecture: Architecture
    in_turn: bool = False
    """Plan for one rank and deal its micro-batches in turn (`train.canonical_reduction`), instead of balancing."""


@dataclass(frozen=True)
class StepWork:
    """What the data-parallel ranks have to do in one step, all of them together, which each knows from the plan.

    Tokens in rows, padding included; tokens without sharing and padding, which are also the keys that the rewards see;
    query-key pairs inside the mask; rewards. `load` is this rank's FLOPs over the mean of the ranks.
    """

    physical_tokens: int
    logical_tokens: int
    attended: int
    rewards: int
    load: float


@dataclass(frozen=True)
class Step:
    """One rank's share of one optimizer step, and what is known about the whole step.

    `indices[m]` are the comparison indices of micro-batch m; `imbalance` is the heaviest rank's FLOPs over the mean;
    `num_rounds` the most micro-batches that any rank has.
    """

    number: int
    micro_batches: list[MicroBatch]
    indices: list[list[int]]
    num_comparisons: int
    prompt_tokens_cut: int
    imbalance: float
    num_rounds: int
    work: StepWork


class StepDataset:
    """Map-style dataset of steps for data-parallel rank `rank`: `dataset[n]` is step n, which uses the comparisons
    [n * global_batch_size, (n + 1) * global_batch_size). Where they are drawn by difficulty, `tables` says how hard
    which pairs of policies are."""

    def __init__(
        self,
        comparisons: ComparisonDataset,
        *,
        global_batch_size: int,
        rank: int,
        shape: RowShape,
        tables: DifficultyTables | None = None,
    ):
        self.comparisons, self.global_batch_size, self.rank, self.shape = comparisons, global_batch_size, rank, shape
        self.tables = tables

    def __getitem__(self, number: int) -> Step:
        start = number * self.global_batch_size
        indices = range(start, start + self.global_batch_size)
        table = None if self.tables is None else self.tables.of_step(number)
        return build_step(self.comparisons, indices, number=number, rank=self.rank, shape=self.shape, table=table)


def build_step(
    comparisons: ComparisonDataset,
    indices: range,
    *,
    number: int,
    rank: int,
    shape: RowShape,
    table: DifficultyTable | None = None,
) -> Step:
    """Draw the comparisons `indices`, plan them over all ranks and build this rank's micro-batches."""
    drawn = [comparisons.comparison(index, table) for index in indices]
    rows = lay_out(drawn, shape=shape, rank=rank, pad_id=comparisons.control.pad_id)
    return Step(
        number=number,
        micro_batches=rows.micro_batches,
        indices=[[indices[i] for i in part] for part in rows.members],
        num_comparisons=len(drawn),
        prompt_tokens_cut=sum(c.prompt_tokens_cut for c in drawn),
        imbalance=rows.imbalance,
        num_rounds=rows.num_rounds,
        work=rows.work,
    )


@dataclass(frozen=True)
class Rows:
    """One rank's micro-batches of some comparisons; `members[m]` says which of them micro-batch m holds."""

    micro_batches: list[MicroBatch]
    members: list[list[int]]
    imbalance: float
    num_rounds: int
    work: StepWork


def lay_out(comparisons: Sequence[TokenizedComparison], *, shape: RowShape, rank: int, pad_id: int) -> Rows:
    """Plan comparisons over all data-parallel ranks and build the micro-batches of one."""
    plan = plan_step(
        comparisons,
        num_ranks=1 if shape.in_turn else shape.num_ranks,
        max_tokens=shape.max_tokens,
        layout=shape.layout,
        architecture=shape.architecture,
        multiple_of=shape.micro_batches_multiple_of,
    )
    if shape.in_turn:
        plan = [plan[0][first :: shape.num_ranks] for first in range(shape.num_ranks)]
    costs = step_costs(comparisons, layout=shape.layout, architecture=shape.architecture)
    loads = [sum(costs.flops[i] for part in parts for i in part) for parts in plan]
    mean = sum(loads) / len(loads)
    placed = {"layout": shape.layout, "pad_to_multiple": shape.pad_to_multiple}
    work = StepWork(
        physical_tokens=sum(row_tokens([comparisons[i] for i in part], **placed) for parts in plan for part in parts),
        logical_tokens=sum(costs.logical_tokens),
        attended=sum(costs.attended),
        rewards=sum(len(comparison.candidates) for comparison in comparisons),
        load=loads[rank] / mean,
    )
    batches = [build_micro_batch([comparisons[i] for i in part], pad_id=pad_id, **placed) for part in plan[rank]]
    return Rows(batches, plan[rank], imbalance=max(loads) / mean, num_rounds=max(map(len, plan)), work=work)
