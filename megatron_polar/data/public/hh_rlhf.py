"""HH-RLHF: pairs of transcripts, joined with references from another file."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_polar.data.public.files import Messages, Record, jsonl_rows, preference_record, text_of
from megatron_polar.data.template import prompt_text
from megatron_polar.errors import UserError

_HH_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_rlhf_preferences(path: Path, *, references: Path | None, skipped: Counter[str]) -> Iterator[Record]:
    """Turn HH-RLHF's transcript pairs into preferences with the references of another file.

    HH-RLHF holds no reference: POLAR added answers of strong models to its prompts. `references` is a JSONL file of
    `{"prompt", "reference"}` lines; pairs without one are skipped and counted. None gives every record an empty
    reference, which trains or measures a reward model without POLAR's central input: a lower bound, not POLAR. Only
    pairs that differ in their one last assistant turn are used.
    """
    texts = _read_references(references) if references is not None else None
    found = 0
    for where, row in jsonl_rows(path):
        chosen, rejected = (_hh_turns(text_of(row, side, where=where), where=where) for side in ("chosen", "rejected"))
        *conversation, last_chosen = chosen
        *other_conversation, last_rejected = rejected
        if conversation != other_conversation or {last_chosen["role"], last_rejected["role"]} != {"assistant"}:
            skipped["transcripts that differ in more than their last assistant turn"] += 1
        elif last_chosen == last_rejected:
            skipped["equal transcripts"] += 1
        elif not conversation:
            skipped["transcript without a human turn"] += 1
        else:
            reference = "" if texts is None else texts.get(prompt_text(conversation))
            if reference is None:
                skipped["prompt without a reference"] += 1
                continue
            if reference in (last_chosen["content"], last_rejected["content"]):
                skipped["answer with the text of its reference"] += 1
                continue
            found += 1
            meta = {"dataset": "hh-rlhf"} | ({"reference": "none"} if texts is None else {})
            yield preference_record(
                conversation, reference, last_chosen["content"], last_rejected["content"], meta=meta
            )
    if not found:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items()) or "it is empty"
        raise UserError(f"{path}: no pair could be used ({reasons}); a reference's prompt must equal the pair's turns")


def _hh_turns(transcript: str, *, where: str) -> Messages:
    head, *parts = _HH_TURN.split(transcript)
    if head.strip() or not parts:
        raise UserError(
            f"{where}: transcript {transcript[:40]!r} does not start with '\\n\\nHuman: '; is this HH-RLHF?"
        )
    return [{"role": _HH_ROLES[role], "content": text} for role, text in zip(parts[::2], parts[1::2], strict=True)]


def _read_references(path: Path) -> dict[str, str]:
    texts = {}
    for where, row in jsonl_rows(path):
        try:
            texts[prompt_text(row.get("prompt"))] = prompt_text(row.get("reference"))
        except TypeError as error:
            raise UserError(f"{where}: a reference line needs prompt and reference ({error})") from None
    return texts
