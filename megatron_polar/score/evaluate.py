"""Score a suite, check the scoring against itself with the labels swapped, and write the figures."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_polar import log
from megatron_polar.data.references import mean_over_references
from megatron_polar.errors import UserError
from megatron_polar.manifest import write_durably
from megatron_polar.score.analysis import Analysis, analyse, headline
from megatron_polar.score.more_references import items_with_references
from megatron_polar.score.policy_pairs import policy_pairs_csv
from megatron_polar.score.reference_counts import EachReward, check_counts, compare_reference_counts
from megatron_polar.score.requests import Scorer, ScoreRequest, check_finite, for_references, outputs_cut
from megatron_polar.score.statistics import Accuracy, compute_statistics, measure_accuracy, ordered_pairs
from megatron_polar.score.suites import EvaluationItem

# A margin below this share of the rewards' spread may change its sign when the batch changes: bf16 keeps about 8 bits.
NEAR_TIE = 0.02


def evaluate(
    scorer: Scorer,
    items: Sequence[EvaluationItem],
    *,
    output: Path,
    suite: str,
    seed: int = 0,
    items_per_request: int = 256,
    checkpoint: str | None = None,
    reference_scheme: str = "as given",
    references: Sequence[int] = (1,),
) -> dict[str, Any]:
    """Score all items, once as they are and once for the label-swap self-check; write and return the summary.

    Writes `output/rewards.jsonl` (one line per item), for policies `output/policy_pairs.csv`, and then
    `output/summary.json`, each complete or not at all. `reference_scheme` names where the references are from. The
    self-check reverses the candidates and swaps their labels, so the accuracy must become 1 - accuracy; a scorer that
    looks at positions instead of texts does not pass. `summary["swap_check"]` is "passed" or starts with "FAILED";
    `exit_status(summary)` is what a command returns. `references`: how many of the items' references to use; of several
    numbers the largest gives the figures, all of them are compared under `summary["references"]`. Raises UserError for
    rewards that are not finite, and for items with fewer references.
    """
    if not items:
        raise UserError(f"suite {suite!r}: no items to evaluate; check --data and --limit")
    counts = check_counts(references)
    items = items_with_references(items, counts[-1], suite=suite)
    each, cut, seconds = _score_and_time(scorer, items, suite=suite, items_per_request=items_per_request)
    swapped_items = [swap_labels(item) for item in items]
    swapped_each = _score_items(
        scorer, swapped_items, description=f"{suite}: label-swap check", items_per_request=items_per_request
    )
    rewards, swapped_rewards = ([mean_over_references(rows) for rows in found] for found in (each, swapped_each))
    if log.is_first_rank():  # of an earlier evaluation: it must not stand beside rewards that it does not tell of
        (output / "summary.json").unlink(missing_ok=True)
    _write_atomically(output / "rewards.jsonl", _reward_lines(items, rewards, each))
    statistics = compute_statistics(items, rewards, seed=seed)
    figures = dataclasses.asdict(statistics)
    analysis = analyse(items, rewards, suite=suite, scheme=reference_scheme, seed=seed)
    _write_policy_pairs(analysis, output / "policy_pairs.csv")
    summary = {
        "suite": suite,
        "checkpoint": checkpoint,
        "num_items": len(items),
        "items_sha256": _hash_of(items),
        "num_references": counts[-1],
        **{name: figures["micro"][name] for name in ("num_pairs", "num_ties", "accuracy", "low", "high")},
        **{name: value for name, value in figures.items() if name not in ("micro", "categories")},
        **_self_check(items, rewards, swapped_items, swapped_rewards, accuracy=statistics.micro),
        **_oddities(items),
        "outputs_cut": cut,
        "seconds": seconds,
        "items_per_second": len(items) / seconds if seconds > 0 else None,
        **analysis.figures,
        "categories": figures["categories"],
    }
    if counts[-1] > 1:
        summary["references"] = compare_reference_counts(items, each, counts=counts, seed=seed)
    _write_atomically(output / "summary.json", [json.dumps(summary, indent=2, ensure_ascii=False)])
    log.info(_one_line(summary, also=headline(analysis)))
    _warn(summary)
    return summary


def _hash_of(items: Sequence[EvaluationItem]) -> str:
    """What was scored: a hash over all texts, references and levels."""
    found = hashlib.sha256()
    for item in items:
        texts = (item.prompt, item.wrapper, *item.references, "candidates", *item.candidates, item.levels)
        found.update(json.dumps(texts).encode() + b"\n")
    return found.hexdigest()


def _write_policy_pairs(analysis: Analysis, file: Path) -> None:
    if analysis.policy_pairs is not None:
        _write_atomically(file, policy_pairs_csv(analysis.policy_pairs))
    elif log.is_first_rank():  # of an earlier evaluation into this directory
        file.unlink(missing_ok=True)


def _oddities(items: Sequence[EvaluationItem]) -> dict[str, int]:
    """How many items compare what is hardly a comparison."""
    return {
        "items_with_reference_among_candidates": sum(
            not set(item.references).isdisjoint(item.candidates) for item in items
        ),
        "items_with_equal_candidates": sum(len(set(item.candidates)) < len(item.candidates) for item in items),
    }


def _warn(summary: dict[str, Any]) -> None:
    suite, cut = summary["suite"], summary["outputs_cut"]
    if cut:
        log.warn(f"{suite}: {cut} candidates were cut as in training; those that are the same then count as ties")
    if same := summary["items_with_reference_among_candidates"]:
        log.warn(
            f"{suite}: {same} of {summary['num_items']} items have their reference among the candidates, which takes "
            f"no judgement to find; leave them out for a fair figure"
        )
    if exit_status(summary):
        log.warn(f"{suite}: label-swap check {summary['swap_check']}")


def exit_status(summary: dict[str, Any]) -> int:
    """Return 0 when the evaluation may be trusted, 1 when its self-check failed."""
    return 0 if summary["swap_check"] == "passed" else 1


def swap_labels(item: EvaluationItem) -> EvaluationItem:
    """Reverse the candidates and call the worst the best: what is right on the result is wrong on `item`."""
    highest, lowest = max(item.levels), min(item.levels)
    levels = tuple(highest + lowest - level for level in reversed(item.levels))
    return dataclasses.replace(item, candidates=item.candidates[::-1], levels=levels, labels=item.labels[::-1])


def _score_and_time(
    scorer: Scorer, items: Sequence[EvaluationItem], *, suite: str, items_per_request: int
) -> tuple[list[list[list[float]]], int, float]:
    """What `_score_items` returns, how many candidates were cut for it, and its seconds."""
    start, cut_before = time.monotonic(), outputs_cut(scorer)
    each = _score_items(scorer, items, description=f"{suite}: scoring", items_per_request=items_per_request)
    return each, outputs_cut(scorer) - cut_before, time.monotonic() - start


def _score_items(
    scorer: Scorer, items: Sequence[EvaluationItem], *, description: str, items_per_request: int
) -> list[list[list[float]]]:
    """Rewards [item][reference][candidate]."""
    rewards: list[list[list[float]]] = []
    with log.Progress(description, total=len(items), unit="items") as bar:
        for first in range(0, len(items), items_per_request):
            chunk = items[first : first + items_per_request]
            requests = [request for item in chunk for request in _requests(item)]
            scored = scorer.score(requests)
            if [len(row) for row in scored] != [len(request.outputs) for request in requests]:
                raise ValueError(
                    f"the scorer returned {len(scored)} lists of rewards for {len(requests)} requests, or wrong ones"
                )
            rows = iter(scored)
            for item in chunk:
                found = [[float(reward) for reward in next(rows)] for _ in item.references]
                for row in found:
                    check_finite(row, where=item.identifier)
                rewards.append(found)
            bar.advance(len(chunk))
    return rewards


def _requests(item: EvaluationItem) -> tuple[ScoreRequest, ...]:
    return for_references(item.prompt, item.references, item.candidates, wrapper=item.wrapper)


def _self_check(
    items: Sequence[EvaluationItem],
    rewards: Sequence[Sequence[float]],
    swapped_items: Sequence[EvaluationItem],
    swapped_rewards: Sequence[Sequence[float]],
    *,
    accuracy: Accuracy,
) -> dict[str, Any]:
    swapped = measure_accuracy(ordered_pairs(swapped_items, swapped_rewards))
    return {
        "swapped_accuracy": swapped.accuracy,
        "swap_check": _swap_check(items, rewards, accuracy=accuracy, swapped=swapped),
        "swap_largest_reward_difference": _largest_difference(rewards, swapped_rewards),
    }


def _swap_check(
    items: Sequence[EvaluationItem], rewards: Sequence[Sequence[float]], *, accuracy: Accuracy, swapped: Accuracy
) -> str:
    """Compare the swapped accuracy with 1 - accuracy; only pairs too close to call may account for a difference."""
    margins = np.abs(ordered_pairs(items, rewards).margin)
    spread = float(np.std([reward for row in rewards for reward in row]))
    allowed = float(np.mean(margins <= NEAR_TIE * spread))
    deviation = abs(accuracy.accuracy + swapped.accuracy - 1)
    if deviation <= allowed + 1e-9:
        return "passed"
    return (
        f"FAILED: accuracy {accuracy.accuracy:.4f} became {swapped.accuracy:.4f} with the labels swapped, not "
        f"{1 - accuracy.accuracy:.4f}, and near ties explain at most {allowed:.4f}: rewards depend on the order of the "
        "candidates, do not use these figures"
    )


def _largest_difference(rewards: Sequence[Sequence[float]], swapped_rewards: Sequence[Sequence[float]]) -> float:
    """How far the rewards of the same text differ between the two passes: 0 for a scorer that ignores the batch."""
    return max(float(np.max(np.abs(np.subtract(a, b[::-1])))) for a, b in zip(rewards, swapped_rewards, strict=True))


def _reward_lines(
    items: Sequence[EvaluationItem], rewards: Sequence[Sequence[float]], each: Sequence[EachReward]
) -> Iterable[str]:
    for item, row, rows in zip(items, rewards, each, strict=True):
        line = {"identifier": item.identifier, "category": item.category, "levels": item.levels, "rewards": row}
        if len(rows) > 1:
            line["per_reference"] = rows
        if item.labels:
            line |= {"labels": item.labels, "reference_label": item.reference_label}
        yield json.dumps(line, ensure_ascii=False)


def _write_atomically(path: Path, lines: Iterable[str]) -> None:
    if not log.is_first_rank():  # every rank has all rewards; one writes
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, "".join(f"{line}\n" for line in lines).encode(), suffix=f".{os.getpid()}.tmp")


def _one_line(summary: dict[str, Any], *, also: str) -> str:
    check = summary["swap_check"].split(":")[0]
    categories = len(summary["categories"])
    macro = f"macro {summary['macro_accuracy']:.4f} over {categories} categories, " if categories > 1 else ""
    what = f"{summary['suite']}, reference {summary['reference_scheme']}"
    between = f"95 % {summary['low']:.4f} to {summary['high']:.4f}, {summary['num_pairs']} pairs"
    return (
        f"{what}: accuracy {summary['accuracy']:.4f} ({between}){also}, "
        f"{macro}ties {summary['tie_rate']:.4f}, swapped {summary['swapped_accuracy']:.4f} ({check}); for comparison: "
        f"the longer answer {summary['length_only_accuracy']:.4f}, word overlap with the reference "
        f"{summary['word_overlap_accuracy']:.4f}{_references_in_words(summary)}"
    )


def _references_in_words(summary: dict[str, Any]) -> str:
    found = summary.get("references")
    if found is None:
        return ""
    counts = ", ".join(f"{entry['references']}: {entry['accuracy']:.4f}" for entry in found["by_count"])
    return f"; accuracy by number of references {counts}, mean of each alone {found['single']['accuracy']:.4f}"
