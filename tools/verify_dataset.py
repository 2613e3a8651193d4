"""Check datasets made by `megatron-polar preprocess`: manifest, file sizes and index; with --deep every byte."""

import argparse
import sys
from pathlib import Path

from megatron_polar import log
from megatron_polar.data.corpus import Corpus
from megatron_polar.errors import DONE, USER_ERROR, UserError


def main() -> int:
    """Check every dataset; returns 2 when one of them is not right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("datasets", nargs="+", type=Path, metavar="DIR", help="directory with manifest.json")
    parser.add_argument("--deep", action="store_true", help="also recompute every SHA-256 and read every document")
    arguments = parser.parse_args()
    status = DONE
    for dataset in arguments.datasets:
        try:
            verify(dataset, deep=arguments.deep)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = USER_ERROR
    return status


def verify(dataset: Path, *, deep: bool) -> None:
    """Check one dataset and say what it holds. Raises UserError."""
    corpus = Corpus(dataset)
    if deep:
        corpus.verify_hashes()
    counts, checked = corpus.manifest["counts"], "hashes and documents" if deep else "sizes and index"
    log.info(
        f"{dataset}: {checked} are right; {len(corpus)} documents, {counts['halves']} halves, "
        f"{counts['tokens']} tokens, {len(corpus.policies)} policies; fingerprint {corpus.fingerprint[:12]}"
    )


if __name__ == "__main__":
    sys.exit(main())
