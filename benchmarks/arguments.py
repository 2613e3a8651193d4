"""Types of the benchmarks' options: a value that measures nothing is refused by argparse, in one line."""

import argparse


def positive(text: str) -> int:
    """A whole number above 0."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """0 or a whole number above it."""
    return _at_least(0, text)


def share(text: str) -> float:
    """Above 0, and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and at most 1")
    return value


def _at_least(lowest: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if value < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {lowest}")
    return value
