"""Test sets as lists of comparisons with known order: what `megatron-polar evaluate --suite NAME --data PATH` scores.

A suite is a pure function of its files, `limit` and `seed`: the same items in the same order on every machine.
"""

import difflib
import hashlib
import heapq
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, permutations, zip_longest
from pathlib import Path

from megatron_polar import log
from megatron_polar.data import public
from megatron_polar.data.lines import list_inputs, read_jsonl
from megatron_polar.data.records import Preference, Trajectory, TrajectoryGroup, parse_record
from megatron_polar.errors import UserError
from megatron_polar.score.more_references import further_trajectories, items_with_references

SUITES = ("preferences", "policies", "gsm8k", "gsm8k-all", "rmb")

_Parsed = Preference | TrajectoryGroup


@dataclass(frozen=True)
class EvaluationItem:
    """Candidates with known order beside a reference.

    `levels[i]` is the rank of candidate i: 0 is the best, and equal levels have no order between them. `identifier` is
    unique in its suite and the same on every machine. `wrapper` is None where that is left open (`with_wrapper`).
    `more_references` are further ones, behind the first.
    """

    identifier: str
    prompt: str
    reference: str
    candidates: tuple[str, ...]
    levels: tuple[int, ...]
    category: str
    wrapper: str | None
    more_references: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        return (self.reference, *self.more_references)


def load_suite(
    name: str,
    path: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    comparisons_per_group: int = 1,
    default_wrapper: str | None = "sft",
    num_references: int = 1,
) -> list[EvaluationItem]:
    """Load the comparisons of a suite, at most `limit` of them, drawn by the seed and kept in the order of the files.

    - "preferences": JSONL of preferences and rankings, ours or any importer's output;
    - "policies": JSONL of trajectory groups; a trajectory is compared with one of another policy, the reference being a
      second trajectory of its own policy. `comparisons_per_group` such draws are made per prompt, without repetition;
    - "gsm8k", "gsm8k-all": OpenAI's example_model_solutions.jsonl, its held-out problems or all of them;
    - "rmb": the published folder RMB_dataset.
    `default_wrapper` is for items that name none; None leaves it open until the model is known. Items have
    `num_references` references each; those with fewer are left out, before `limit` is drawn.
    Raises UserError for an unknown name, unusable files, and a suite without a single comparison.
    """
    if name not in SUITES:
        nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
        raise UserError(f"suite {name!r} is unknown; did you mean {nearest!r}? There are {', '.join(SUITES)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves nothing to evaluate; give 1 or more, or none")
    if comparisons_per_group < 1:
        raise UserError(f"comparisons_per_group={comparisons_per_group} draws nothing; give 1 or more")
    path, skipped = Path(path), Counter[str]()
    parsed = partial(_parse_records, source=name.removesuffix("-all"), default_wrapper=default_wrapper)
    if name == "preferences":
        items = _preference_items(_parse_files(path, default_wrapper=default_wrapper), fallback="preferences")
    elif name == "policies":
        groups = _parse_files(path, default_wrapper=default_wrapper)
        items = _policy_items(groups, comparisons_per_group=comparisons_per_group, seed=seed, skipped=skipped)
    elif name == "rmb":
        records = public.rmb_preferences(path, max_references=num_references, skipped=skipped)
        items = _preference_items(parsed(records), fallback="rmb")
    else:
        split = "heldout" if name == "gsm8k" else "all"
        records = public.gsm8k_preferences(path, split=split, max_references=num_references, skipped=skipped)
        items = _preference_items(parsed(records), fallback="gsm8k")
    found = list(items)
    for reason, count in skipped.most_common():
        log.info(f"suite {name}: skipped {count}: {reason}")
    if not found:
        raise UserError(f"{path}: no comparison for the suite {name!r} in it; check the path and docs/evaluation.md")
    found = items_with_references(found, num_references, suite=name)
    return found if limit is None else _draw_items(found, limit, seed=seed)


def with_wrapper(items: Sequence[EvaluationItem], wrapper: str) -> list[EvaluationItem]:
    """The items, those that leave it open with this wrapper."""
    return [replace(item, wrapper=wrapper) if item.wrapper is None else item for item in items]


def _draw_items(items: list[EvaluationItem], limit: int, *, seed: int) -> list[EvaluationItem]:
    drawn = heapq.nsmallest(limit, range(len(items)), key=lambda i: _draw_key(seed, items[i].identifier))
    return [items[index] for index in sorted(drawn)]


def _draw_key(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", errors="replace"), digest_size=8).digest()


def _parse_files(path: Path, *, default_wrapper: str | None) -> Iterator[tuple[str, _Parsed]]:
    """Yield ("file:line", record); the identifier holds a file's path below `path`, so that it is the same anywhere."""
    for file in list_inputs([path]):
        source = file.name if file == path else file.relative_to(path).as_posix()
        for number, line in read_jsonl(file):
            record = parse_record(line, source=str(file), line_number=number, default_wrapper=default_wrapper)
            yield f"{source}:{number}", record


def _parse_records(
    records: Iterable[public.Record], *, source: str, default_wrapper: str | None
) -> Iterator[tuple[str, _Parsed]]:
    for number, record in enumerate(records, start=1):
        parsed = parse_record(json.dumps(record), source=source, line_number=number, default_wrapper=default_wrapper)
        yield f"{source}:{number}", parsed


def _category(record: _Parsed, *, fallback: str) -> str:
    """Take the category from the line or from its `meta`, as importers write it; a data set's name serves as one."""
    inner = record.meta.get("meta")
    for meta in (record.meta, inner if isinstance(inner, dict) else {}):
        for key in ("category", "dataset"):
            if isinstance(meta.get(key), str) and meta[key]:
                return meta[key]
    return fallback


def _preference_items(records: Iterable[tuple[str, _Parsed]], *, fallback: str) -> Iterator[EvaluationItem]:
    for identifier, record in records:
        if not isinstance(record, Preference):
            raise UserError(
                f"{identifier}: this line holds trajectories, not a preference; use --suite policies for it"
            )
        yield EvaluationItem(
            identifier=identifier,
            prompt=record.prompt,
            reference=record.reference,
            candidates=record.candidates,
            levels=tuple(range(len(record.candidates))),
            category=_category(record, fallback=fallback),
            wrapper=record.wrapper,
            more_references=record.more_references,
        )


def _policy_items(
    records: Iterable[tuple[str, _Parsed]], *, comparisons_per_group: int, seed: int, skipped: Counter[str]
) -> Iterator[EvaluationItem]:
    for identifier, group in records:
        if not isinstance(group, TrajectoryGroup):
            raise UserError(f"{identifier}: this line holds no trajectories; use --suite preferences for it")
        triples = _draw_triples(group, comparisons_per_group, seed=seed, name=identifier)
        if not triples:
            skipped["prompt whose trajectories of one policy, or of two, are the same text"] += 1
        for number, (reference, same, other) in enumerate(triples):
            name = identifier if comparisons_per_group == 1 else f"{identifier}#{number}"
            own = [trajectory.text for trajectory in group.trajectories if trajectory.policy == reference.policy]
            used = (reference.text, same.text, other.text)
            yield EvaluationItem(
                identifier=name,
                prompt=group.prompt,
                reference=reference.text,
                candidates=(same.text, other.text),
                levels=(0, 1),
                category=_category(group, fallback="policy"),
                wrapper=group.wrapper,
                more_references=further_trajectories(own, used=used, seed=seed, name=name),
            )


def _draw_triples(
    group: TrajectoryGroup, count: int, *, seed: int, name: str
) -> list[tuple[Trajectory, Trajectory, Trajectory]]:
    """Draw (reference, same policy, other policy); every pair of policies is used once before any is used again.

    Policies are drawn before trajectories, so that a policy's number of samples gives it no weight. Equal texts are
    left out: a candidate equal to the reference is a free win, and equal candidates have no order.
    """
    by_policy: dict[str, list[Trajectory]] = {}
    for trajectory in dict.fromkeys(group.trajectories):
        by_policy.setdefault(trajectory.policy, []).append(trajectory)
    draw = random.Random(f"{seed}\0{name}")  # random() of a text seed is the same in every Python version
    pairs = [pair for pair in permutations(by_policy, 2) if len(by_policy[pair[0]]) >= 2]
    pairs.sort(key=lambda _: draw.random())
    drawn: list[tuple[Trajectory, Trajectory, Trajectory]] = []
    waiting: list[list[tuple[Trajectory, Trajectory, Trajectory]]] = []
    for own, other in pairs:  # the first round, and the further draws of each pair for later rounds
        if len(drawn) == count:
            return drawn
        triples = [
            (reference, same, negative)
            for reference, same in permutations(by_policy[own], 2)
            for negative in by_policy[other]
            if len({reference.text, same.text, negative.text}) == 3
        ]
        triples.sort(key=lambda _: draw.random())
        drawn += triples[:1]
        waiting.append(triples[1:])
    rounds = (triple for triples in zip_longest(*waiting) for triple in triples if triple is not None)
    return drawn + list(islice(rounds, count - len(drawn)))
