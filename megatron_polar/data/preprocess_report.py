"""What `preprocess` says at its end."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import orjson

from megatron_polar import log
from megatron_polar.data.parts import Part

_MOST_KINDS = 1000


@dataclass(frozen=True)
class PreprocessReport:
    """What a run wrote, in documents (prompts), halves (prompt + one answer) and tokens; see docs/data.md."""

    output: Path
    already_complete: bool
    units_resumed: int
    lines: int
    bad_lines: int
    documents: int
    trajectory_groups: int
    preferences: int
    halves: int
    tokens: int
    policies: int
    responses_cut: int
    response_tokens_cut: int
    duplicates_dropped: int
    identical_candidates: int

    @classmethod
    def of_manifest(
        cls, manifest: dict, *, output: Path, already_complete: bool, units_resumed: int
    ) -> "PreprocessReport":
        counts = manifest["counts"]
        copied = ("lines", "bad_lines", "documents", "trajectory_groups", "preferences", "halves", "tokens")
        copied += ("responses_cut", "response_tokens_cut", "identical_candidates")
        return cls(
            output=output,
            already_complete=already_complete,
            units_resumed=units_resumed,
            **{name: counts[name] for name in copied},
            policies=len(manifest["policies"]),
            duplicates_dropped=counts["duplicate_trajectories"] + counts["duplicate_candidates"],
        )


@dataclass(frozen=True)
class PartReport:
    """What a run of one part has left in `output/.work`: its work units, made now or found made already."""

    output: Path
    part: Part
    already_complete: bool
    units_made: int
    units_resumed: int


def say_what_a_part_made(report: PartReport) -> None:
    """One line of figures, and what to do next."""
    log.info(
        f"{report.output}: part {report.part}: {report.units_made} units made, {report.units_resumed} found made "
        "already; the same command without --part merges all parts"
    )


def say_what_was_made(report: PreprocessReport, *, quarantine: Path) -> None:
    """One line of figures; with bad lines, a second about them."""
    log.info(
        f"{report.output}: {report.documents} documents, {report.halves} halves, {report.tokens} tokens, "
        f"{report.policies} policies; {report.responses_cut} answers cut by {report.response_tokens_cut} tokens, "
        f"{report.duplicates_dropped} duplicates and {report.identical_candidates} texts of an earlier policy dropped, "
        f"{report.bad_lines} of {report.lines} lines quarantined"
    )
    if report.bad_lines:
        _warn_of_quarantine(quarantine, report=report)


def _warn_of_quarantine(quarantine: Path, *, report: PreprocessReport) -> None:
    """Say how many lines are not in the dataset, and the two most frequent kinds of reasons."""
    kinds: Counter = Counter()
    with quarantine.open("rb") as file:
        for line in file:
            kind = re.split(r" \(|; ", orjson.loads(line)["reason"], maxsplit=1)[0]  # without details and remedy
            if kind in kinds or len(kinds) < _MOST_KINDS:  # in constant memory
                kinds[kind] += 1
    often = ", ".join(f"{kind} ({count} times)" for kind, count in kinds.most_common(2))
    log.warn(f"{quarantine}: {report.bad_lines} of {report.lines} lines are not in the dataset; most often: {often}")
