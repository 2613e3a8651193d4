"""Where the reference of an evaluation comes from: a named choice, which every report repeats.

A POLAR reward says how alike a candidate and the reference are (arXiv 2507.05197, equation 6), so that an accuracy
means nothing before it is said what the candidates were compared with.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_polar.data.lines import list_inputs, read_jsonl
from megatron_polar.data.template import prompt_text
from megatron_polar.errors import UserError, printable

if TYPE_CHECKING:
    from megatron_polar.score.suites import EvaluationItem

POLICY = "policy:"
_POLICY_NAME = "policy:NAME"

MEANINGS = {
    "gold": "the best answer or the ground truth",
    POLICY: "the answer of one named policy",
    "leave-one-out": "another answer of the candidate's own policy or of the same best level, never the candidate",
    "none": "empty: what the model makes of the candidates alone, without POLAR's central input",
    "as given": "what the caller put into the items",
}

OFFERED = {  # the first is the default: what the set's publisher does, or POLAR's own protocol
    "preferences": ("gold", "none"),
    "policies": ("leave-one-out", _POLICY_NAME, "none"),
    "gsm8k": ("gold", "leave-one-out", _POLICY_NAME, "none"),
    "gsm8k-all": ("gold", "leave-one-out", _POLICY_NAME, "none"),
    "alpaca-eval": ("gold", _POLICY_NAME, "none"),
    "rmb": ("gold", _POLICY_NAME, "none"),
    "rmb-pairwise": ("none", "gold", _POLICY_NAME),
    "rmb-bon": ("none", "gold", _POLICY_NAME),
    "rm-bench": ("none", "leave-one-out"),
    "reward-bench-2": ("none",),
    "judgebench": ("none",),
}


def resolve_scheme(suite: str, scheme: str | None, *, has_answers: bool = False) -> str:
    """The scheme to use with a suite: the one asked for, or the suite's own.

    `has_answers`: whether the user brings the reference answers, for "gold" or "policy:NAME". Raises UserError for a
    scheme that does not exist or that the suite cannot offer, and for answers that no scheme asks for.
    """
    offered = OFFERED[suite]
    if scheme is None and not has_answers:
        return offered[0]
    if scheme is None:
        raise UserError(
            "reference answers are given and no scheme for them: say --reference-scheme gold or policy:NAME"
        )
    kind = _POLICY_NAME if scheme.startswith(POLICY) else scheme
    if kind not in ("gold", _POLICY_NAME, "leave-one-out", "none") or scheme == POLICY:
        raise UserError(f"reference scheme {scheme!r} is unknown; use gold, policy:NAME, leave-one-out or none")
    if has_answers and (suite == "policies" or kind not in ("gold", _POLICY_NAME)):
        why = "the references of the suite 'policies' are its own" if suite == "policies" else f"{scheme!r} takes none"
        raise UserError(f"reference answers are for the schemes gold and policy:NAME, and {why}; leave them out")
    if kind not in offered and not has_answers:
        also = "" if suite == "policies" else "; gold and policy:NAME work with answers from --reference-answers too"
        raise UserError(
            f"suite {suite!r} has no references for the scheme {scheme!r}; it offers {', '.join(offered)}{also}"
        )
    return scheme


def meaning(scheme: str) -> str:
    """One line about a scheme, for reports."""
    return MEANINGS[POLICY if scheme.startswith(POLICY) else scheme]


def is_same_text(first: str, second: str) -> bool:
    """Whether a candidate is the reference but for surrounding white space, which makes it a free win."""
    return bool(first.strip()) and first.strip() == second.strip()


def read_reference_answers(path: Path, scheme: str) -> dict[str, list[str]]:
    """Read prompt -> reference answers from JSONL, in the order of the lines.

    "gold" takes `{"prompt", "reference"}`, "policy:NAME" the answers of that policy in `{"prompt", "trajectories":
    [{"policy", "text"}]}`, which is what `sample` writes. Prompts may be message lists; they are matched by their text.
    Raises UserError with file and line for other lines, and where no line has such an answer.
    """
    answers: dict[str, list[str]] = {}
    policies: set[str] = set()
    for file in list_inputs([path]):
        for number, line in read_jsonl(file):
            try:
                row = json.loads(line)
                prompt = prompt_text(row["prompt"])
                named = list(_named_texts(row, scheme))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                form = '{"prompt", "reference"}' if scheme == "gold" else '{"prompt", "trajectories"}'
                raise UserError(
                    f"{file}:{number}: not a line of the form {form} ({printable(str(error), limit=120)})"
                ) from None
            policies |= {policy for policy, _ in named}
            found = [text for policy, text in named if scheme in ("gold", f"{POLICY}{policy}")]
            answers.setdefault(prompt, []).extend(found)
    if not any(answers.values()):
        known = f"; there are answers of {', '.join(sorted(policies)[:20])}" if policies else ""
        raise UserError(f"{path}: no answer for the scheme {scheme!r} in it{known}")
    return answers


def _named_texts(row: dict, scheme: str) -> Iterator[tuple[str, str]]:
    if scheme == "gold":
        yield "", prompt_text(row["reference"])
        return
    for trajectory in row["trajectories"]:
        yield str(trajectory["policy"]), prompt_text(trajectory["text"])


def with_reference_answers(
    items: "Iterable[EvaluationItem]", answers: dict[str, list[str]], *, scheme: str, skipped: Counter[str]
) -> "Iterator[EvaluationItem]":
    """The items with the references of `answers` for their prompt that are none of their candidates, one at least."""
    for item in items:
        texts = [text for text in answers.get(item.prompt, ()) if text.strip()]
        usable = [text for text in texts if not any(is_same_text(text, other) for other in item.candidates)]
        if usable:
            first, *more = dict.fromkeys(usable)
            label = scheme.removeprefix(POLICY)
            yield replace(item, reference=first, more_references=tuple(more), reference_label=label)
        elif texts:
            skipped["item whose only reference answer is one of its candidates"] += 1
        else:
            skipped["item without a reference answer for its prompt"] += 1
