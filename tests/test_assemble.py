"""From answers to trajectories: what is kept, what is dropped, and that the same answers give the same bytes."""

import orjson
import pytest

from megatron_polar.policies.answers import Answer, NoAnswer, Place
from megatron_polar.policies.assemble import assemble
from megatron_polar.policies.clean import Cleaning
from megatron_polar.policies.prompts import Prompt
from megatron_polar.policies.schedule import DrawSettings, scheduled

POLICIES = ["a", "b", "c"]
SETTINGS = DrawSettings(1, 2, 3, 10, "pretrain")
PROMPT = Prompt("the start")
ANCHOR, SECOND, THIRD = (index for index, _ in scheduled(PROMPT.text, num_policies=3, settings=SETTINGS))
PLACES = [Place(0, ANCHOR, 0), Place(0, ANCHOR, 1), Place(0, SECOND, 0), Place(0, THIRD, 0)]


def made(outcomes: dict[Place, Answer | NoAnswer], *, prompts=(PROMPT,), settings=SETTINGS):
    return assemble(prompts, outcomes, policies=POLICIES, settings=settings, cleaning=Cleaning(), first_row=100)


def texts_for(*failed: int) -> dict[Place, Answer | NoAnswer]:
    words = ("alpha beta gamma", "delta epsilon", "zeta eta theta", "iota kappa")
    return {
        place: NoAnswer("HTTP 400", attempts=2) if number in failed else Answer(words[number], "stop", tokens=3)
        for number, place in enumerate(PLACES)
    }


@pytest.mark.parametrize(
    ("failed", "is_kept"),
    [((), True), ((3,), True), ((2,), True), ((0,), False), ((1,), False), ((2, 3), False), ((0, 1, 2, 3), False)],
)
def test_a_group_needs_a_pair_and_another_policy(failed, is_kept):
    found = made(texts_for(*failed))
    lines = [orjson.loads(line) for line in found.content.splitlines()]
    assert len(lines) == is_kept
    assert found.counts["cleaning"]["dropped_groups"] == (not is_kept)
    quarantine = [orjson.loads(line) for line in found.quarantine.splitlines()]
    assert [(e["prompt"], e["policy"], e["reason"], e["attempts"]) for e in quarantine if "policy" in e] == [
        (100, POLICIES[PLACES[number].policy], "HTTP 400", 2) for number in failed
    ]
    assert [entry["left"] for entry in quarantine if "left" in entry] == (
        []
        if is_kept
        else [
            {POLICIES[p]: n for p in (ANCHOR, SECOND, THIRD) if (n := _left(p, failed))},
        ]
    )


def _left(policy: int, failed: tuple[int, ...]) -> int:
    return sum(place.policy == policy and number not in failed for number, place in enumerate(PLACES))


def test_the_order_of_answers_changes_nothing():
    outcomes = texts_for(3)
    backwards = dict(reversed(outcomes.items()))
    assert made(outcomes) == made(backwards)


def test_trajectories_stand_in_the_order_of_the_schedule():
    (line,) = made(texts_for()).content.splitlines()
    assert [t["text"] for t in orjson.loads(line)["trajectories"]] == [a.text for a in texts_for().values()]


def test_every_request_is_counted_once():
    counts = made(texts_for(1, 3)).counts["policies"]
    totals = {name: sum(policy[name] for policy in counts.values()) for name in ("requests", "answered", "failed")}
    assert totals == {"requests": 4, "answered": 2, "failed": 2}
    assert sum(policy["attempts"] for policy in counts.values()) == 2 + 2 * 2
    assert sum(policy["tokens"] for policy in counts.values()) == 6


def test_duplicates_of_two_policies_are_counted_for_the_pair_and_those_of_one_are_not():
    outcomes = texts_for()
    outcomes[PLACES[2]] = outcomes[PLACES[0]]
    pair = sorted((POLICIES[ANCHOR], POLICIES[SECOND]))
    pairs = {tuple(names): (met, alike) for *names, met, alike in made(outcomes).counts["pairs"]}
    assert pairs.pop(tuple(pair)) == (1, 1)
    assert set(pairs.values()) == {(1, 0)}
    outcomes = texts_for()
    outcomes[PLACES[1]] = outcomes[PLACES[0]]
    assert all(alike == 0 for *_, alike in made(outcomes).counts["pairs"])
    assert made(outcomes).content == b"", "the pair is gone"


def test_a_prompt_counts_once_however_many_duplicates_it_has():
    settings = DrawSettings(1, 3, 3, 10, "pretrain", "all")
    outcomes = {
        Place(0, policy, draw): Answer(f"text {policy if policy == 2 else 0} of draw {draw}", "stop", tokens=3)
        for policy in range(3)
        for draw in range(3)
    }
    pairs = {tuple(names): (met, alike) for *names, met, alike in made(outcomes, settings=settings).counts["pairs"]}
    assert pairs == {("a", "b"): (1, 1), ("a", "c"): (1, 0), ("b", "c"): (1, 0)}
