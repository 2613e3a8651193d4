"""Check a dataset made by `megatron-polar preprocess`: its manifest, file sizes and index; with --deep every byte."""

import argparse
import sys
from pathlib import Path

from megatron_polar import log
from megatron_polar.data.corpus import Corpus
from megatron_polar.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, help="directory with manifest.json")
    parser.add_argument("--deep", action="store_true", help="also recompute every SHA-256 and read every document")
    arguments = parser.parse_args()
    try:
        corpus = Corpus(arguments.dataset)
        if arguments.deep:
            corpus.verify_hashes()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts, checked = corpus.manifest["counts"], "hashes and documents" if arguments.deep else "sizes and index"
    log.info(
        f"{arguments.dataset}: {checked} are right; {len(corpus)} documents, {counts['halves']} halves, "
        f"{counts['tokens']} tokens, {len(corpus.policies)} policies; fingerprint {corpus.fingerprint[:12]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
