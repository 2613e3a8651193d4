"""How often the model ranks each pair of policies rightly, counted while it trains: no extra forward pass.

Counts are whole numbers, so their sum over ranks does not depend on any order. They travel with checkpoints, say which
pairs are hard (`data.contrast: by_difficulty`), and are drawn in the report.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_polar import log
from megatron_polar.config.schema import CurriculumSection
from megatron_polar.data.curriculum import DifficultyTables
from megatron_polar.data.pair_counts import (
    EMPTY,
    PAIRS,
    PARTS,
    PairCounts,
    add_counts,
    count_pairs,
    encode_pairs,
    error_rates,
    halve,
    keep_most_compared,
    read_pairs,
)
from megatron_polar.data.steps import Step
from megatron_polar.errors import UserError
from megatron_polar.manifest import write_durably
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.step import StepResult


class PolicyPairs:
    """Counts of a run, by periods of `data.curriculum.interval` steps.

    `older` holds what was counted up to the end of the period before the last, halved every `half_life` periods, `last`
    the last period and `current` the running one. Period p is drawn with `older`, period p + 1 with `older` and `last`:
    both are fixed when p begins. `gather` and `end_step` are collective.
    """

    def __init__(self, section: CurriculumSection, *, is_drawing: bool, policies: Sequence[str], topology: Topology):
        self.section, self.is_drawing, self.policies = section, is_drawing, tuple(policies)
        self._topology = topology
        self.older = self.last = self.current = EMPTY
        self._own: list[tuple[np.ndarray, np.ndarray]] = []
        self._tables: DifficultyTables | None = None
        self.steps_done = 0

    @property
    def is_recording(self) -> bool:
        """Whether anything is counted: data without names of policies has nothing to count."""
        return self.section.record and len(self.policies) > 1

    def add(self, step: Step, result: StepResult) -> None:
        """Take note of a step's outcomes on this rank; of ranks that see the same rewards the first counts."""
        topology = self._topology
        if not self.is_recording or result.skipped is not None or not topology.is_last_stage:
            return
        if topology.tp_rank == 0 and topology.cp_rank == 0:
            keys = [EMPTY.keys, *(batch.policy_pairs for batch in step.micro_batches)]  # a rank may have no micro-batch
            self._own.append((np.concatenate(keys), result.half_wins))

    def gather(self) -> None:
        """Move what the ranks have counted into `current`, the same on all of them. Collective."""
        if not self.is_recording:
            return
        own = add_counts(count_pairs(keys, half_wins) for keys, half_wins in self._own)
        self._own = []
        gathered: list = [None] * self._topology.world_size
        dist.all_gather_object(gathered, (own.keys, own.won, own.lost))
        self.current = add_counts([self.current, *(PairCounts(*part) for part in gathered)])

    def end_step(self, done: int) -> None:
        """After `done` steps: end a period where one ends, and fix what the period after the next is drawn with."""
        self.steps_done = done
        if not self.is_recording or done % self.section.interval:
            return
        self.gather()
        period = done // self.section.interval  # the one that begins
        self.older, self.last, self.current = self._with_last(period - 2), self.current, EMPTY
        if self._tables is not None:
            self._tables.publish(period + 1, self._with_last(period - 1))

    def _with_last(self, number: int) -> PairCounts:
        """`older` together with `last`, the counts of period `number`."""
        kept = halve(self.older) if number % self.section.half_life == 0 else self.older
        return keep_most_compared(add_counts([kept, self.last]))

    @contextmanager
    def handing_over(self) -> Iterator[DifficultyTables | None]:
        """Tables for the loader from the present step on; None where comparisons are drawn uniformly."""
        if not self.is_drawing:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="megatron_polar_") as directory:
            self._tables = DifficultyTables(self.section, directory=Path(directory))
            period = self.steps_done // self.section.interval
            self._tables.publish(period, self.older)
            self._tables.publish(period + 1, self._with_last(period - 1))
            try:
                yield self._tables
            finally:
                self._tables = None

    # --- Files and figures -------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """All that was counted up to the last `gather`, as `pairs.json` of a checkpoint or of the run directory."""
        parts = {name: getattr(self, name) for name in PARTS}
        return encode_pairs(parts, policies=self.policies, step=self.steps_done)

    def restore(self, checkpoint: Path, *, step: int) -> None:
        """Continue from a checkpoint of `step` steps. Raises UserError where it cannot be continued from."""
        self.steps_done = step
        if not self.is_recording:
            return
        path = checkpoint / PAIRS
        if not path.is_file():
            if self.is_drawing:
                raise UserError(
                    f"{checkpoint}: has no {PAIRS}, by which data.contrast=by_difficulty draws; use another "
                    f"checkpoint, or start a new run from its weights with train.init_from"
                )
            log.info(f"{checkpoint}: has no counts of policy pairs (an earlier program wrote it); they start at 0")
            return
        policies, parts = read_pairs(path)
        if policies != self.policies:
            raise UserError(f"{path}: counts other policies than those of the training data; use another checkpoint")
        self.older, self.last, self.current = (parts[name] for name in PARTS)

    def write(self, directory: Path) -> None:
        """Write `pairs.json` for the report; a full disk does not stop the run."""
        try:
            write_durably(directory / PAIRS, self.encode())
        except OSError as error:
            log.warn(f"{directory / PAIRS}: cannot be written now ({error.strerror or error})")

    def figures(self) -> dict[str, float]:
        """Accuracy on the tenth of pairs that was hardest up to the period before the last, measured since then: pairs
        and outcomes share no comparison, so there is no selection effect. Nothing before there are such pairs."""
        recent = add_counts([self.last, self.current])
        figures: dict[str, float] = {"pairs/seen": len(add_counts([self.older, recent]))} if self.is_recording else {}
        rates = error_rates(self.older, prior_comparisons=self.section.prior_comparisons)
        hardest = np.sort(self.older.keys[np.argsort(-rates, kind="stable")[: -(-len(self.older) // 10)]])
        places = np.isin(recent.keys, hardest)
        won, lost = int(recent.won[places].sum()), int(recent.lost[places].sum())
        if won + lost:
            figures["pairs/hardest_decile_accuracy"] = won / (won + lost)
            figures["pairs/hardest_decile_comparisons"] = (won + lost) / 2
        return figures
