"""From a shard's answers to its trajectories: cleaned, in the order of the schedule, with all that was left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import orjson

from megatron_polar.policies.answers import Answer, NoAnswer, Place
from megatron_polar.policies.clean import Cleaning, Draft, clean_text, find_duplicates
from megatron_polar.policies.prompts import Prompt
from megatron_polar.policies.schedule import DrawSettings, scheduled


@dataclass(frozen=True)
class Assembled:
    """A shard's file, its share of the quarantine, and its counts (of JSON)."""

    content: bytes
    quarantine: bytes
    counts: dict


class _Tally:
    """Counts of one shard on the way."""

    def __init__(self, policies: Sequence[str]):
        self.policies = {
            name: dict.fromkeys(("requests", "answered", "failed", "attempts", "tokens", "seconds"), 0)
            for name in policies
        }
        names = ("loop", "trimmed", "cut_off", "dropped", "exact_duplicates", "near_duplicates", "dropped_groups")
        self.cleaning = dict.fromkeys(names, 0)
        self.pairs: Counter = Counter()
        self.alike: Counter = Counter()

    def request(self, policy: str, outcome: Answer | NoAnswer) -> None:
        counts = self.policies[policy]
        counts["requests"] += 1
        counts["attempts"] += outcome.attempts
        if isinstance(outcome, NoAnswer):
            counts["failed"] += 1
        else:
            counts["answered"] += 1
            counts["tokens"] += outcome.tokens
            counts["seconds"] = round(counts["seconds"] + outcome.seconds, 4)


def assemble(
    prompts: Sequence[Prompt],
    outcomes: Mapping[Place, Answer | NoAnswer],
    *,
    policies: Sequence[str],
    settings: DrawSettings,
    cleaning: Cleaning,
    first_row: int,
) -> Assembled:
    """Make the lines that `preprocess` reads, and those of the quarantine; `outcomes` has one for every request.

    The same answers give the same bytes. A prompt that is left without two trajectories of one policy and one of
    another is dropped and counted. first_row: the number of the first prompt among all.
    """
    tally, lines, quarantine = _Tally(policies), [], []
    for row, prompt in enumerate(prompts):
        drafts: list[Draft] = []
        for policy, count in scheduled(prompt.text, num_policies=len(policies), settings=settings):
            for draw in range(count):
                outcome, name = outcomes[Place(row, policy, draw)], policies[policy]
                tally.request(name, outcome)
                if isinstance(outcome, NoAnswer):
                    entry = {"prompt": first_row + row, "policy": name, "draw": draw, "reason": outcome.reason}
                    quarantine.append({**entry, "attempts": outcome.attempts})
                else:
                    drafts.append(Draft(name, outcome.text, outcome.ending == "length"))
        kept = _clean_group(drafts, cleaning, tally)
        counts = Counter(entry["policy"] for entry in kept)
        if len(counts) < 2 or max(counts.values()) < 2:
            tally.cleaning["dropped_groups"] += 1
            reason = "too few trajectories are left to compare"
            quarantine.append({"prompt": first_row + row, "text": prompt.text, "reason": reason, "left": dict(counts)})
        else:
            lines.append({"prompt": prompt.text, "trajectories": kept, "wrapper": settings.wrapper})
    pairs = [[*pair, seen, tally.alike[pair]] for pair, seen in sorted(tally.pairs.items())]
    found = {"policies": tally.policies, "cleaning": tally.cleaning, "pairs": pairs}
    return Assembled(_encode(lines), _encode(quarantine), found)


def _encode(lines: Sequence[dict]) -> bytes:
    return b"".join(orjson.dumps(line) + b"\n" for line in lines)


def _clean_group(drafts: Sequence[Draft], cleaning: Cleaning, tally: _Tally) -> list[dict]:
    """Trajectories of one prompt after cleaning; one that still is cut off says so: {"cut_off": true}."""
    cleaned = []
    for draft in drafts:
        text, done = clean_text(draft, cleaning)
        if done:
            tally.cleaning[done] += 1
        if done != "dropped":
            cleaned.append(Draft(draft.policy, text, done == "cut_off"))
    _count_pairs(cleaned, tally)
    duplicates = {found.place: found for found in find_duplicates(cleaned, cleaning)}
    alike = set()  # a prompt counts once, however many of its trajectories are the same
    for place, found in duplicates.items():
        tally.cleaning["exact_duplicates" if found.is_exact else "near_duplicates"] += 1
        pair = tuple(sorted((cleaned[place].policy, cleaned[found.of].policy)))
        if pair[0] != pair[1]:
            alike.add(pair)
    tally.alike.update(alike)
    kept = [draft for place, draft in enumerate(cleaned) if place not in duplicates]
    return [
        {"policy": draft.policy, "text": draft.text} | ({"cut_off": True} if draft.is_cut_off else {}) for draft in kept
    ]


def _count_pairs(drafts: Sequence[Draft], tally: _Tally) -> None:
    """How often two policies answered one prompt: what their duplicates are measured against."""
    names = sorted({draft.policy for draft in drafts})
    tally.pairs.update(combinations(names, 2))
