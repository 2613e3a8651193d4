"""Import AlpacaEval results: trajectories of one or more sampling runs, or preferences from the published annotations.

python tools/import_alpaca_eval.py --results run1/results --results run2/results --output trajectories.jsonl
python tools/import_alpaca_eval.py --preferences --results alpaca_eval/results --output preferences.jsonl.gz
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from megatron_polar.data import public
from megatron_polar.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, action="append", required=True, help="holds <policy>/model_outputs.json"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSONL, gzipped where it ends in .gz")
    parser.add_argument("--allow-single", action="store_true", help="keep groups that lack a same-policy pair as yet")
    parser.add_argument("--preferences", action="store_true", help="read <policy>/<annotator>/annotations.json instead")
    parser.add_argument("--annotator", default=public.ALPACA_EVAL_ANNOTATOR)
    parser.add_argument("--reference-policy", help="whose answer is the reference (default: the best-liked answer's)")
    parser.add_argument("--min-margin", type=float, default=0.3, help="smallest difference of preferences, 0 to 1")
    parser.add_argument("--pairs-per-prompt", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.preferences and arguments.results[1:]:
        parser.error("--preferences takes one --results")
    return arguments


def main() -> int:
    arguments, skipped = parse_arguments(), Counter()
    if arguments.preferences:
        records = public.alpaca_eval_preferences(
            arguments.results[0],
            annotator=arguments.annotator,
            reference_policy=arguments.reference_policy,
            min_margin=arguments.min_margin,
            pairs_per_prompt=arguments.pairs_per_prompt,
            seed=arguments.seed,
            skipped=skipped,
        )
    else:
        single = arguments.allow_single
        records = public.alpaca_eval_trajectories(arguments.results, allow_single=single, skipped=skipped)
    public.import_records(records, output=arguments.output, skipped=skipped)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
