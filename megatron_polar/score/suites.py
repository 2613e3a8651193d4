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
from itertools import islice, permutations, zip_longest
from pathlib import Path

from megatron_polar import log
from megatron_polar.data import public
from megatron_polar.data.lines import list_inputs, read_jsonl
from megatron_polar.data.public.files import draw
from megatron_polar.data.public.reward_bench_2 import TIES
from megatron_polar.data.records import Preference, Trajectory, TrajectoryGroup, parse_record
from megatron_polar.errors import UserError
from megatron_polar.score.more_references import further_trajectories, items_with_references
from megatron_polar.score.reference_scheme import (
    OFFERED,
    POLICY,
    is_same_text,
    read_reference_answers,
    resolve_scheme,
    with_reference_answers,
)

SUITES = tuple(OFFERED)

_Parsed = Preference | TrajectoryGroup


@dataclass(frozen=True)
class EvaluationItem:
    """Candidates with known order beside a reference.

    `levels[i]` is the rank of candidate i: 0 is the best, and equal levels have no order between them. `identifier` is
    unique in its suite and the same on every machine. `wrapper` is None where that is left open (`with_wrapper`).
    `labels[i]` says what candidate i is from: a policy, or a style of RM-Bench; () where that is not known.
    `reference_label` says the same of the reference, and of the one that a suite would have with an empty reference.
    `more_references` are further ones, behind the first.
    """

    identifier: str
    prompt: str
    reference: str
    candidates: tuple[str, ...]
    levels: tuple[int, ...]
    category: str
    wrapper: str | None
    labels: tuple[str, ...] = ()
    reference_label: str = ""
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
    reference_scheme: str | None = None,
    reference_answers: Path | None = None,
    num_references: int = 1,
) -> list[EvaluationItem]:
    """Load the comparisons of a suite, at most `limit` of them, drawn by the seed and kept in the order of the files.

    - "preferences": JSONL of preferences and rankings, ours or any importer's output;
    - "policies": JSONL of trajectory groups; a trajectory is compared with one of another policy, the reference being a
      second trajectory of its own policy. `comparisons_per_group` such draws are made per prompt, without repetition;
    - "gsm8k", "gsm8k-all": OpenAI's example_model_solutions.jsonl, its held-out problems or all of them;
    - "alpaca-eval": a `results` folder of alpaca_eval with annotations;
    - "rmb", "rmb-pairwise", "rmb-bon": the published folder RMB_dataset: POLAR's trios, and both sets as published;
    - "rm-bench", "reward-bench-2", "judgebench": the published files (data/public/ says which).
    `default_wrapper` is for items that name none; None leaves it open until the model is known. `reference_scheme` is
    one of those that the suite offers (reference_scheme.py), None its own; `reference_answers` is a file of references
    for "gold" and "policy:NAME". A candidate that is the reference's text is left out where a suite builds the items.
    Items have `num_references` references each; those with fewer are left out, before `limit` is drawn.
    Raises UserError for an unknown name, unusable files, and a suite without a single comparison.
    """
    _check_request(name, limit=limit, comparisons_per_group=comparisons_per_group)
    path, skipped = Path(path), Counter[str]()
    scheme = resolve_scheme(name, reference_scheme, has_answers=reference_answers is not None)
    own = OFFERED[name][0] if reference_answers is not None else scheme
    draws = {"count": comparisons_per_group, "seed": seed, "wrapper": default_wrapper}
    draws["num_references"] = num_references
    items = _items(name, path, scheme=own, skipped=skipped, **draws)
    if reference_answers is not None:
        answers = read_reference_answers(Path(reference_answers), scheme)
        items = with_reference_answers(items, answers, scheme=scheme, skipped=skipped)
    elif scheme == "none":
        items = (replace(item, reference="", more_references=()) for item in items)
    found = list(items)
    for reason, count in skipped.most_common():
        log.info(f"suite {name}: skipped {count}: {reason}")
    if not found:
        known = ""
        if own.startswith(POLICY):
            others = _items(name, path, scheme=OFFERED[name][0], skipped=Counter(), **draws)
            policies = {label for item in others for label in (*item.labels, item.reference_label)} - {""}
            known = f"; its policies are {', '.join(sorted(policies))}"
        raise UserError(
            f"{path}: no comparison for the suite {name!r} in it, with references by the scheme {scheme!r}; check the "
            f"path, the scheme and docs/evaluation.md{known}"
        )
    found = items_with_references(found, num_references, suite=name)
    return found if limit is None else _draw_items(found, limit, seed=seed)


def _check_request(name: str, *, limit: int | None, comparisons_per_group: int) -> None:
    if name not in SUITES:
        nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
        raise UserError(f"suite {name!r} is unknown; did you mean {nearest!r}? There are {', '.join(SUITES)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves nothing to evaluate; give 1 or more, or none")
    if comparisons_per_group < 1:
        raise UserError(f"comparisons_per_group={comparisons_per_group} draws nothing; give 1 or more")
    if comparisons_per_group > 1 and name != "policies":
        raise UserError(f"several comparisons per prompt are drawn in the suite 'policies' only, not in {name!r}")


def _items(
    name: str,
    path: Path,
    *,
    scheme: str,
    count: int,
    seed: int,
    wrapper: str | None,
    num_references: int,
    skipped: Counter[str],
) -> Iterator[EvaluationItem]:
    """The items of a suite by one of its own schemes; "none" still has the references that the suite would have."""
    several = {"max_references": num_references, "skipped": skipped}
    policy = scheme.removeprefix(POLICY) if scheme.startswith(POLICY) else None
    if name == "preferences":
        return _preference_items(_parse_files(path, default_wrapper=wrapper), fallback="preferences")
    if name == "policies":
        groups = _parse_files(path, default_wrapper=wrapper)
        return _policy_items(groups, count=count, reference_policy=policy, seed=seed, skipped=skipped)
    if name in ("rmb-pairwise", "rmb-bon", "rm-bench", "reward-bench-2", "judgebench"):
        judged = _judged(name, path, skipped=skipped)
        drawn = {"seed": seed, "wrapper": wrapper, "num_references": num_references}
        return _judged_items(judged, scheme=scheme, skipped=skipped, **drawn)
    if name == "rmb":
        records = public.rmb_preferences(path, reference_policy=policy, **several)
    elif name == "alpaca-eval":
        records = public.alpaca_eval_preferences(path, reference_policy=policy, skipped=skipped)
    else:
        split, reference = "heldout" if name == "gsm8k" else "all", "gold" if scheme == "none" else scheme
        records = public.gsm8k_preferences(path, split=split, reference=reference, **several)
    source = name.removesuffix("-all")
    return _preference_items(_parse_records(records, source=source, default_wrapper=wrapper), fallback=source)


def _judged(name: str, path: Path, *, skipped: Counter[str]) -> Iterator[public.JudgedAnswers]:
    if name == "rm-bench":
        return public.rm_bench_answers(path)
    if name == "reward-bench-2":
        return public.reward_bench_2_answers(path, skipped=skipped)
    if name == "judgebench":
        return public.judgebench_answers(path, skipped=skipped)
    part = "Pairwise_set" if name == "rmb-pairwise" else "BoN_set"
    return public.rmb_published(path, part, skipped=skipped)


def with_wrapper(items: Sequence[EvaluationItem], wrapper: str) -> list[EvaluationItem]:
    """The items, those that leave it open with this wrapper."""
    return [replace(item, wrapper=wrapper) if item.wrapper is None else item for item in items]


def _draw_items(items: list[EvaluationItem], limit: int, *, seed: int) -> list[EvaluationItem]:
    drawn = heapq.nsmallest(limit, range(len(items)), key=lambda i: _draw_key(seed, _drawn_as(items[i])))
    return [items[index] for index in sorted(drawn)]


def _drawn_as(item: EvaluationItem) -> str:
    """Two prompts of RewardBench 2's Ties, ref:7 and tied:7, are scored together, and so drawn one after the other."""
    if item.category != TIES:
        return item.identifier
    source, _, number = item.identifier.rpartition(":")
    return f"{source.removesuffix('/ref').removesuffix('/tied')}/tie:{number}"


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


def _metas(record: _Parsed) -> tuple[dict, dict]:
    """What a line says of itself: its further keys, and its `meta` object, as importers write it."""
    inner = record.meta.get("meta")
    return record.meta, inner if isinstance(inner, dict) else {}


def _category(record: _Parsed, *, fallback: str) -> str:
    """Take the category from the line or from its `meta`; a data set's name serves as one."""
    for meta in _metas(record):
        for key in ("category", "dataset"):
            if isinstance(meta.get(key), str) and meta[key]:
                return meta[key]
    return fallback


def _named_policy(record: Preference, role: str) -> str:
    names = [meta.get(f"{role}_policy") for meta in _metas(record)]
    return next((name for name in names if isinstance(name, str)), "")


def _preference_items(records: Iterable[tuple[str, _Parsed]], *, fallback: str) -> Iterator[EvaluationItem]:
    for identifier, record in records:
        if not isinstance(record, Preference):
            raise UserError(
                f"{identifier}: this line holds trajectories, not a preference; use --suite policies for it"
            )
        labels = (_named_policy(record, "chosen"), _named_policy(record, "rejected"))
        yield EvaluationItem(
            identifier=identifier,
            prompt=record.prompt,
            reference=record.reference,
            candidates=record.candidates,
            levels=tuple(range(len(record.candidates))),
            category=_category(record, fallback=fallback),
            wrapper=record.wrapper,
            labels=labels if all(labels) and len(record.candidates) == 2 else (),
            reference_label=_named_policy(record, "reference"),
            more_references=record.more_references,
        )


def _judged_items(
    judged: Iterable[public.JudgedAnswers],
    *,
    scheme: str,
    seed: int,
    wrapper: str | None,
    num_references: int,
    skipped: Counter[str],
) -> Iterator[EvaluationItem]:
    for item in judged:
        references = _references(item, scheme=scheme, seed=seed)
        if not references:
            skipped[f"item without a reference by the scheme {scheme}"] += 1
        further = draw(item.best, num_references, seed=seed, text=item.prompt)[1:] if scheme == "gold" else []
        for number, reference in enumerate(references):
            kept = [i for i, answer in enumerate(item.answers) if not is_same_text(reference.text, answer.text)]
            levels = tuple(item.levels[i] for i in kept)
            if len(set(levels)) < 2:
                skipped["item without an order among the candidates that are not the reference"] += 1
                continue
            labels = tuple(item.answers[i].model for i in kept)
            yield EvaluationItem(
                identifier=item.identifier if len(references) == 1 else f"{item.identifier}#{number}",
                prompt=item.prompt,
                reference=reference.text,
                candidates=tuple(item.answers[i].text for i in kept),
                levels=levels,
                category=item.category,
                wrapper=wrapper,
                labels=labels if any(labels) else (),
                reference_label=reference.model,
                more_references=tuple(answer.text for answer in further),
            )


def _references(item: public.JudgedAnswers, *, scheme: str, seed: int) -> list[public.Answer]:
    """The references of an item by a scheme: one; with leave-one-out each of the best answers in turn; or none."""
    if scheme == "none":
        return [public.Answer("", "")]
    if scheme == "gold":
        return draw(item.best, 1, seed=seed, text=item.prompt)
    if scheme == "leave-one-out":
        best = [answer for answer, level in zip(item.answers, item.levels, strict=True) if level == min(item.levels)]
        return best if len(best) > 1 else []
    name = scheme.removeprefix(POLICY)
    named = [answer for answer in (*item.best, *item.others, *item.answers) if answer.model == name]
    return [answer for answer in named if answer.text.strip()][:1]


def _policy_items(
    records: Iterable[tuple[str, _Parsed]],
    *,
    count: int,
    reference_policy: str | None,
    seed: int,
    skipped: Counter[str],
) -> Iterator[EvaluationItem]:
    for identifier, group in records:
        if not isinstance(group, TrajectoryGroup):
            raise UserError(f"{identifier}: this line holds no trajectories; use --suite preferences for it")
        triples = _draw_triples(group, count, reference_policy=reference_policy, seed=seed, name=identifier)
        if not triples:
            of = f" of {reference_policy}" if reference_policy else ""
            skipped[f"prompt without two trajectories of one policy{of} and one of another that all differ"] += 1
        for number, (reference, same, other) in enumerate(triples):
            name = identifier if count == 1 else f"{identifier}#{number}"
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
                labels=(same.policy, other.policy),
                reference_label=reference.policy,
                more_references=further_trajectories(own, used=used, seed=seed, name=name),
            )


def _draw_triples(
    group: TrajectoryGroup, count: int, *, reference_policy: str | None = None, seed: int, name: str
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
    pairs = [pair for pair in pairs if reference_policy in (None, pair[0])]
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
