"""RMB: single judgements and best-of-N lists over answers of named models (arXiv 2410.09893)."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_polar.data.public.files import (
    Messages,
    Record,
    draw_key,
    further_references,
    json_rows,
    preference_record,
    text_of,
)
from megatron_polar.data.public.judged import Answer, JudgedAnswers, unique_identifiers
from megatron_polar.data.template import prompt_text
from megatron_polar.errors import UserError

Part = Literal["Pairwise_set", "BoN_set"]
_Messages = tuple[tuple[str, str], ...]  # (role, content)


class _Judgement(NamedTuple):
    """An entry of either set: `best` was judged better than each of `losers`, which are in no order."""

    part: str
    category: str  # the folders: the goal and, under Helpfulness, the kind of task
    subcategory: str
    messages: _Messages
    identifier: str
    best: Answer
    losers: list[Answer]


def rmb_preferences(
    directory: Path,
    *,
    trios_per_conversation: int | None = 1,
    reference_policy: str | None = None,
    max_references: int = 1,
    seed: int = 0,
    skipped: Counter[str],
) -> Iterator[Record]:
    """Derive POLAR's trios from RMB: the best answer is the reference, two others with a judged order are compared.

    RMB publishes no rankings: the Pairwise set has single judgements, the BoN set a best answer with losers in no
    order. Both are joined into a graph of judgements per conversation. The reference is an answer that no judgement
    puts below another; second > third is one published judgement; both lie below the reference, directly or through a
    chain of judgements. Of the trios of a conversation those whose reference beats most answers come first, then those
    with the most direct judgements, then a seeded draw; `trios_per_conversation` None yields all of them (not
    independent of each other). `reference_policy` keeps the trios whose reference that model wrote. Further
    references, up to `max_references`, are other answers that could be the reference of the same two.
    """
    for (category, messages), (wins, subcategory) in _graphs(_judgements(directory), skipped=skipped).items():
        trios = _rmb_trios(wins)
        if not trios:
            skipped["conversation whose judgements rank no three answers"] += 1
            continue
        if reference_policy is not None:
            trios = [trio for trio in trios if trio[1][0].model == reference_policy]
            if not trios:
                skipped["conversation without a trio whose reference the policy wrote"] += 1
        conversation = _conversation(messages)
        text = f"{category}\n{conversation}"
        trios.sort(key=lambda trio: (trio[0], draw_key(seed, text, repr(trio[1]))))
        for (beaten, indirect), (reference, second, third) in trios[:trios_per_conversation]:
            meta = {"category": category, "subcategory": subcategory, "judged_directly": indirect == 0}
            meta |= {"reference_policy": reference.model, "chosen_policy": second.model, "rejected_policy": third.model}
            meta["answers_below_reference"] = -beaten
            used = (reference.text, second.text, third.text)
            others = [answer.text for _, (answer, *compared) in trios if compared == [second, third]]
            further = further_references(others, used=used, count=max_references - 1)
            yield preference_record(conversation, *used, meta=meta, further=further)


def rmb_published(directory: Path, part: Part, *, skipped: Counter[str]) -> Iterator[JudgedAnswers]:
    """Yield the entries of one set as they are published: the best answer (level 0) and its losers (level 1).

    The publishers score answers without a reference. For those who want one, `best` holds the answers to the
    conversation that are above all of an entry's by other judgements of either set and below none, and `others` all
    further ones, whose model can be named. Losers whose text is the best answer's are left out.
    """
    entries = list(_judgements(directory))
    graphs = _graphs(entries, skipped=Counter())
    return unique_identifiers(_published(entries, graphs, part=part, skipped=skipped))


def _published(entries: list[_Judgement], graphs: Any, *, part: Part, skipped: Counter[str]) -> Iterator[JudgedAnswers]:
    for entry in entries:
        if entry.part != part:
            continue
        losers = [loser for loser in entry.losers if loser.text != entry.best.text]
        if len(losers) < len(entry.losers):
            skipped["loser whose text is the better answer's"] += len(entry.losers) - len(losers)
        if not losers:
            continue
        wins, _ = graphs[entry.category, entry.messages]
        texts = {entry.best.text, *(loser.text for loser in losers)}
        beaten = set().union(*wins.values())
        further = sorted(answer for answer in wins.keys() | beaten if answer.text not in texts)
        best = [answer for answer in further if answer not in beaten and entry.best in _reachable(answer, wins)]
        yield JudgedAnswers(
            identifier=f"{entry.category}/{entry.identifier}",
            prompt=prompt_text(_conversation(entry.messages)),
            answers=(entry.best, *losers),
            levels=(0,) + (1,) * len(losers),
            category=entry.category,
            best=tuple(best),
            others=tuple(answer for answer in further if answer not in best),
        )


def _judgements(directory: Path) -> Iterator[_Judgement]:
    """Read both sets in order of their paths."""
    root = directory / "RMB_dataset" if (directory / "RMB_dataset").is_dir() else directory
    for part in ("Pairwise_set", "BoN_set"):
        if not (root / part).is_dir():
            raise UserError(f"{root}: no folder {part} in it; give the folder RMB_dataset of the published repository")
    for path in sorted(root.glob("*_set/**/*.json")):
        part, *folders = path.relative_to(root).parts[:-1]
        for where, row in json_rows(path):
            best, losers, uid = (
                ("chosen", [row.get("reject")], "pair_uid")
                if part == "Pairwise_set"
                else ("bon_best", row.get("loser_list"), "bon_uid")
            )
            if not isinstance(row.get("conversation_input"), list) or not isinstance(losers, list):
                raise UserError(f"{where}: this is not an RMB {part} entry; its keys are {sorted(row)}")
            turns = row["conversation_input"]
            messages = tuple(
                (text_of(turn, "role", where=where), text_of(turn, "content", where=where)) for turn in turns
            )
            winner, *worse = (_rmb_answer(entry, where=where) for entry in (row.get(best), *losers))
            yield _Judgement(part, "/".join(folders), path.stem, messages, str(row.get(uid)), winner, worse)


def _graphs(
    entries: Iterable[_Judgement], *, skipped: Counter[str]
) -> dict[tuple[str, _Messages], tuple[dict[Answer, set[Answer]], str]]:
    """Join both sets: (category, conversation) -> (answer -> answers judged worse, subcategory)."""
    conversations: dict[tuple[str, _Messages], tuple[dict[Answer, set[Answer]], str]] = {}
    for entry in entries:
        wins, _ = conversations.setdefault((entry.category, entry.messages), ({}, entry.subcategory))
        for loser in entry.losers:
            if entry.best.text == loser.text or not entry.best.text.strip() or not loser.text.strip():
                skipped["judgement between equal or empty answers"] += 1
            else:
                wins.setdefault(entry.best, set()).add(loser)
    return conversations


def _conversation(messages: _Messages) -> Messages:
    return [{"role": role, "content": content} for role, content in messages]


def _rmb_answer(entry: Any, *, where: str) -> Answer:
    return Answer(text_of(entry, "llm_name", where=where), text_of(entry, "answer", where=where))


def _rmb_trios(wins: dict[Answer, set[Answer]]) -> list[tuple[tuple[int, int], tuple[Answer, Answer, Answer]]]:
    """List ((-answers below the reference, chained judgements), (reference, second, third)) of one conversation."""
    losers = set().union(*wins.values()) if wins else set()
    below = {answer: _reachable(answer, wins) for answer in wins}
    trios = []
    for reference in wins.keys() - losers:
        for second in below[reference] & wins.keys():
            for third in wins[second]:
                contradicted = second in below.get(third, ())
                if not contradicted and len({reference.text, second.text, third.text}) == 3:
                    indirect = (second not in wins[reference]) + (third not in wins[reference])
                    trios.append(((-len(below[reference]), indirect), (reference, second, third)))
    return trios


def _reachable(start: Answer, wins: dict[Answer, set[Answer]]) -> set[Answer]:
    found: set[Answer] = set()
    todo = list(wins.get(start, ()))
    while todo:
        answer = todo.pop()
        if answer not in found:
            found.add(answer)
            todo.extend(wins.get(answer, ()))
    return found
