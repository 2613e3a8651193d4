"""`data.contrast: by_difficulty`: contrasts that the model finds hard are drawn more often, with exact resume.

A run is divided into periods of `data.curriculum.interval` steps. What is drawn in a period depends on the index of the
comparison and on counts of right and wrong orders up to the end of the period before the last, which every rank knows
one whole period ahead. So the draw is a pure function of the index and a table that never changes; loader workers get
the table through a file, and no step waits for another rank.
"""

import io
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_polar.config.schema import CurriculumSection
from megatron_polar.data.pair_counts import PairCounts, error_rates, pair_keys
from megatron_polar.errors import UserError

_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class DifficultyTable:
    """What a period is drawn with: `weights` float64 [n] of the pairs `keys` int64 [n] (ascending), and of all others.

    The weight of a pair is its expected error rate (pair_counts.error_rates) to the power 1 / `temperature`.
    """

    keys: np.ndarray
    weights: np.ndarray
    weight_of_others: float
    floor: float

    def weights_of(self, references: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Weights [a, b] of the pairs of policies `references` [a] and `others` [b]."""
        wanted = pair_keys(references[:, None], others[None, :])
        if not len(self.keys):
            return np.full(wanted.shape, self.weight_of_others)
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[places] == wanted, self.weights[places], self.weight_of_others)


def difficulty_table(counts: PairCounts, section: CurriculumSection) -> DifficultyTable:
    """The table of weights from counts."""
    rates = error_rates(counts, prior_comparisons=section.prior_comparisons)
    exponent = 1.0 / section.temperature
    weights = rates if exponent == 1.0 else rates**exponent
    return DifficultyTable(counts.keys, weights, 0.5**exponent, section.floor)


def draw_hard_contrast(
    policy_ids: np.ndarray, *, table: DifficultyTable, count: int, generator: np.random.Generator
) -> tuple[int, list[int], tuple[int, ...]]:
    """Reference and candidate 1 of one policy, the others of as many others as there are, hard pairs more often.

    policy_ids [n] of the trajectories, in the numbering of `table`. The first pair (A, B) is drawn among the pairs of
    the document with probability (1 - floor) * u w / sum(u w) + floor * u, where u is its probability in a uniform
    draw and w its weight; further policies likewise, given A, without replacement. Which of a policy's trajectories
    is taken is uniform. Returns reference, candidates and levels, as comparisons._draw_contrast.
    """
    policies, sizes = np.unique(policy_ids, return_counts=True)
    anchors = np.flatnonzero(sizes >= 2)
    # A uniform draw takes any anchor, then any trajectory of the other policies.
    uniform = (
        np.where(anchors[:, None] == np.arange(len(policies)), 0.0, sizes) / (len(policy_ids) - sizes[anchors])[:, None]
    )
    weights = table.weights_of(policies[anchors], policies)
    row, first = divmod(_choose(uniform, weights, floor=table.floor, generator=generator), len(policies))
    anchor = anchors[row]
    reference, same = generator.permutation(np.flatnonzero(policy_ids == policies[anchor]))[:2]
    # The n-th trajectory of every policy comes before anyone's (n+1)-th: policies stay as different as possible.
    left = np.where(np.arange(len(policies)) == anchor, 0, sizes)
    drawn = [first]
    left[first] -= 1
    this_round = np.where(left > 0, uniform[row], 0.0)
    this_round[first] = 0.0
    while len(drawn) < count - 1 and left.any():
        if not this_round.any():
            this_round = np.where(left > 0, uniform[row], 0.0)
        policy = _choose(this_round, weights[row], floor=table.floor, generator=generator)
        drawn.append(policy)
        left[policy] -= 1
        this_round[policy] = 0.0
    orders = {
        policy: generator.permutation(np.flatnonzero(policy_ids == policies[policy])) for policy in sorted({*drawn})
    }
    seen = dict.fromkeys(orders, 0)
    chosen = []
    for policy in drawn:
        chosen.append(int(orders[policy][seen[policy]]))
        seen[policy] += 1
    return int(reference), [int(same), *chosen], (0,) + (1,) * len(chosen)


def _choose(uniform: np.ndarray, weights: np.ndarray, *, floor: float, generator: np.random.Generator) -> int:
    """Draw a place of the flattened arrays. Sums are running sums, whose order no library may change."""
    shares, products = uniform.reshape(-1), (uniform * weights).reshape(-1)
    probabilities = (1 - floor) * products / np.cumsum(products)[-1] + floor * shares / np.cumsum(shares)[-1]
    ends = np.cumsum(probabilities)
    place = int(np.searchsorted(ends, generator.random() * ends[-1], side="right"))
    return min(place, int(np.flatnonzero(probabilities)[-1]))


# --- From the training process to the loader's workers ---------------------------------------------------------------


class DifficultyTables:
    """Tables of the periods by their number. The process that makes this object publishes them; its workers, forked or
    unpickled, read a table from its file, and wait for it where they run that far ahead.

    Steps of a period only need steps of earlier periods, and workers prepare steps in order, so the wait ends: with the
    table, or, when the run ends before it, with the directory, which the run deletes before it closes its loader.
    """

    def __init__(self, section: CurriculumSection, *, directory: Path):
        self.section, self.directory = section, directory
        self._owner = os.getpid()
        self._known: dict[int, DifficultyTable] = {}

    def publish(self, period: int, counts: PairCounts) -> None:
        """Fix what `period` is drawn with; tables from before the period before it are forgotten."""
        buffer = io.BytesIO()
        np.savez(buffer, keys=counts.keys, won=counts.won, lost=counts.lost)
        temporary = self._file(period).with_suffix(".tmp")
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(self._file(period))
        self._known[period] = difficulty_table(counts, self.section)
        for old in [number for number in self._known if number < period - 1]:
            del self._known[old]
            self._file(old).unlink(missing_ok=True)

    def has(self, step: int) -> bool:
        """Whether the table of step `step` (from 0) is published."""
        return step // self.section.interval in self._known

    def of_step(self, step: int) -> DifficultyTable:
        """The table that step `step` (from 0) is drawn with. In a worker it may take until it is published. Raises
        UserError there when it will never be."""
        period = step // self.section.interval
        if period not in self._known:
            if os.getpid() == self._owner:
                raise LookupError(f"step {step} is drawn with the table of period {period}, which nobody has published")
            self._known = {number: table for number, table in self._known.items() if number >= period - 1}
            self._known[period] = difficulty_table(self._wait_for(period), self.section)
        return self._known[period]

    def _wait_for(self, period: int) -> PairCounts:
        while True:
            try:
                with np.load(io.BytesIO(self._file(period).read_bytes()), allow_pickle=False) as arrays:
                    return PairCounts(arrays["keys"], arrays["won"], arrays["lost"])
            except FileNotFoundError:
                if not self.directory.is_dir():  # nobody reads this if the run deleted it
                    raise UserError(
                        f"{self.directory}: is gone, and with it the tables by which data.contrast=by_difficulty "
                        f"draws; something else than the run has deleted it; start the same command again"
                    ) from None
                time.sleep(_POLL_SECONDS)

    def _file(self, period: int) -> Path:
        return self.directory / f"period_{period:08d}.npz"
