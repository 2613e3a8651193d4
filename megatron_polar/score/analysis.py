"""What an evaluation says beside its accuracies: references, the publishers' scores, policies, calibration, length."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_polar.score.calibration import calibration
from megatron_polar.score.length_bias import length_bias
from megatron_polar.score.policy_pairs import PolicyPairs, policy_pairs
from megatron_polar.score.published import PublishedScores, published_scores
from megatron_polar.score.reference_scheme import is_same_text, meaning
from megatron_polar.score.statistics import measure_accuracy, ordered_pairs
from megatron_polar.score.suites import EvaluationItem


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Further entries of `summary.json`, and two of them as objects; None where they do not apply."""

    figures: dict[str, Any]
    policy_pairs: PolicyPairs | None
    published: PublishedScores | None


def analyse(
    items: Sequence[EvaluationItem], rewards: Sequence[Sequence[float]], *, suite: str, scheme: str, seed: int = 0
) -> Analysis:
    """Compute the further figures; `scheme` says where the references are from (reference_scheme.py)."""
    pairs = policy_pairs(items, rewards, seed=seed)
    published = published_scores(suite, items, rewards, seed=seed)
    figures = {
        "reference_scheme": scheme,
        "reference_scheme_meaning": meaning(scheme),
        "free_wins": _free_wins(items, rewards),
        "published": None if published is None else dataclasses.asdict(published),
        "policy_pairs": None if pairs is None else dataclasses.asdict(pairs),
        "calibration": dataclasses.asdict(calibration(ordered_pairs(items, rewards), seed=seed)),
        "length_bias": dataclasses.asdict(length_bias(items, rewards, seed=seed)),
    }
    return Analysis(figures, pairs, published)


def headline(analysis: Analysis) -> str:
    """The publishers' score and the AUC of policies for the one line on the console; "" where there is neither."""
    parts = []
    if analysis.published is not None:
        score = analysis.published.scores[analysis.published.headline]
        if score.score is not None:
            parts.append(f"as published ({analysis.published.headline}) {score.score:.4f}")
    if analysis.policy_pairs is not None and analysis.policy_pairs.macro_auc.auc is not None:
        parts.append(f"AUC of same against other policy {analysis.policy_pairs.macro_auc.auc:.4f}")
    return "".join(f", {part}" for part in parts)


def _free_wins(items: Sequence[EvaluationItem], rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How many candidates are the reference's own text, and the accuracy over the pairs that have none of them."""
    is_free = [
        [any(is_same_text(reference, candidate) for reference in item.references) for candidate in item.candidates]
        for item in items
    ]
    pairs = ordered_pairs(items, rewards)
    # A difference of two of these markers is 0 exactly where neither candidate is the reference, or both are.
    touched = ordered_pairs(items, [[float(free) for free in row] for row in is_free]).margin != 0
    return {
        "num_candidates": sum(map(sum, is_free)),
        "num_pairs": int(np.sum(touched)),
        "without": dataclasses.asdict(measure_accuracy(pairs, ~touched)),
    }
