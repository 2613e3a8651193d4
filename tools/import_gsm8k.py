"""Import GSM8K's example_model_solutions.jsonl: ground truth, a right and a wrong solution of each problem.

    python tools/import_gsm8k.py --input example_model_solutions.jsonl --split train --output gsm8k_train.jsonl

The suite `gsm8k` of `megatron-polar evaluate` takes the same file and its held-out problems: train on --split train.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from megatron_polar.data import public
from megatron_polar.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="the published example_model_solutions.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="JSONL, gzipped where it ends in .gz")
    parser.add_argument("--split", choices=("train", "heldout", "all"), default="train")
    parser.add_argument("--pairs-per-problem", type=int, default=1, help="at most, of up to four there are")
    parser.add_argument(
        "--references", type=int, default=1, help="at most so many references a record, where there are"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    arguments, skipped = parse_arguments(), Counter()
    records = public.gsm8k_preferences(
        arguments.input,
        split=arguments.split,
        pairs_per_problem=arguments.pairs_per_problem,
        max_references=arguments.references,
        seed=arguments.seed,
        skipped=skipped,
    )
    public.import_records(records, output=arguments.output, skipped=skipped)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
