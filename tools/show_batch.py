"""Print one training step as the model sees it: rows, segments, text, pairs. `show_batch.py CONFIG.yaml [--step N]`

Micro-batches are those of a run on one data-parallel rank.
"""

import argparse
import sys
from pathlib import Path

from megatron_polar.config.load import load_config
from megatron_polar.config.presets import architecture_of
from megatron_polar.config.schema import CurriculumSection
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.curriculum import DifficultyTable, difficulty_table
from megatron_polar.data.pair_counts import EMPTY
from megatron_polar.data.steps import RowShape, build_step
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.errors import UserError


def first_table(curriculum: CurriculumSection, *, step: int) -> DifficultyTable:
    """What the steps of the first two periods are drawn by; later ones depend on what the run has found."""
    if step >= 2 * curriculum.interval:
        raise UserError(
            f"--step {step}: from step {2 * curriculum.interval} on data.contrast=by_difficulty draws by what the run "
            f"has counted; megatron-polar train RUN/config.yaml --replay-step {step + 1} repeats it from a checkpoint"
        )
    return difficulty_table(EMPTY, curriculum)


def main() -> int:
    """Print the first micro-batch of a step, segment by segment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--step", type=int, default=0)
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    section = config.data
    curriculum = section.curriculum if section.contrast == "by_difficulty" else None
    table = None if curriculum is None else first_table(curriculum, step=options.step)
    comparisons = ComparisonDataset(
        section.train,
        seed=config.run.seed,
        candidates_per_comparison=section.candidates_per_comparison,
        max_sequence_length=section.max_sequence_length,
        curriculum=curriculum,
    )
    shape = RowShape(
        layout=section.layout,
        max_tokens=section.max_tokens_per_micro_batch,
        pad_to_multiple=section.pad_to_multiple,
        num_ranks=1,
        micro_batches_multiple_of=1,
        architecture=architecture_of(config.model),
    )
    size = config.train.global_batch_size
    indices = range(options.step * size, (options.step + 1) * size)
    step = build_step(comparisons, indices, number=options.step, rank=0, shape=shape, table=table)
    tokenizer = load_tokenizer(Path(section.train[0].path) / "tokenizer")
    batch = step.micro_batches[0]
    shapes = ", ".join(str(list(b.tokens.shape)) for b in step.micro_batches)
    print(f"step {options.step}: {step.num_comparisons} comparisons in micro-batches {shapes}; here is the first")
    print(
        f"{batch.num_logical_tokens} logical tokens, {batch.tokens.size} physical, {len(batch.winners)} ordered pairs"
    )
    for start, length, prefix, shared in zip(
        batch.segment_starts, batch.segment_lengths, batch.prefix_starts, batch.prefix_lengths, strict=True
    ):
        text = tokenizer.decode(batch.tokens[0, start : start + length].tolist())
        after = f"after [{prefix}, {prefix + shared})" if shared else "on its own"
        print(f"  [{start:5d}, {start + length:5d}) {after:>22s}: {text!r}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
