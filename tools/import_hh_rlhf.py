"""Import HH-RLHF transcript pairs as preferences, with references that another file supplies.

    python tools/import_hh_rlhf.py --input train.jsonl.gz --references references.jsonl --output hh.jsonl.gz

HH-RLHF has no references. --references takes {"prompt", "reference"} lines; --no-reference leaves the reference empty,
which is a lower bound and not POLAR.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from megatron_polar.data import public
from megatron_polar.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a published train or test .jsonl(.gz), or a folder")
    parser.add_argument("--output", type=Path, required=True, help="JSONL, gzipped where it ends in .gz")
    references = parser.add_mutually_exclusive_group(required=True)
    references.add_argument("--references", type=Path, help='JSONL of {"prompt": text or messages, "reference": text}')
    references.add_argument("--no-reference", action="store_true", help="empty references: a lower bound, not POLAR")
    return parser.parse_args()


def main() -> int:
    arguments, skipped = parse_arguments(), Counter()
    records = public.hh_rlhf_preferences(arguments.input, references=arguments.references, skipped=skipped)
    public.import_records(records, output=arguments.output, skipped=skipped)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
