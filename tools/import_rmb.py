"""Import RMB as POLAR's trios: the best answer is the reference, two others with a judged order are compared.

python tools/import_rmb.py --input RMB_dataset --output rmb.jsonl
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from megatron_polar.data import public
from megatron_polar.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="the published folder RMB_dataset")
    parser.add_argument("--output", type=Path, required=True, help="JSONL, gzipped where it ends in .gz")
    parser.add_argument(
        "--all-trios", action="store_true", help="every trio of a conversation, not the best judged one"
    )
    parser.add_argument(
        "--references", type=int, default=1, help="at most so many references a record, where there are"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    arguments, skipped = parse_arguments(), Counter()
    trios = None if arguments.all_trios else 1
    records = public.rmb_preferences(
        arguments.input,
        trios_per_conversation=trios,
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
