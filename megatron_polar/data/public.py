"""Published data sets, read from their publishers' own files and yielded as the input lines of `records.py`.

Every reader is a generator of plain dicts and counts what it leaves out in `skipped`, by reason. Draws depend on a
seed and on the text drawn for, never on the order of files, so that adding a file changes nothing for the prompts it
does not touch.
"""

import contextlib
import gzip
import hashlib
import heapq
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

from megatron_polar.data.lines import list_inputs, read_jsonl
from megatron_polar.data.template import prompt_text
from megatron_polar.errors import UserError
from megatron_polar.manifest import HashedFile

Record = dict[str, Any]
Messages = list[dict[str, str]]

# The publishers' own spelling of the GPT-4-turbo annotations that AlpacaEval 2 ranks by.
ALPACA_EVAL_ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
_ALPACA_EVAL_TIE = 1.5  # `preference` runs from 1 (the baseline is better) to 2 (the policy is better)
_HH_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class Answer(NamedTuple):
    """One model's answer, as a node of RMB's graph of judgements."""

    model: str
    text: str


# --- AlpacaEval -------------------------------------------------------------------------------------------------------


def alpaca_eval_trajectories(
    result_directories: Sequence[Path], *, allow_single: bool = False, skipped: Counter[str]
) -> Iterator[Record]:
    """Merge `results/` directories of several sampling runs into trajectory groups, one per instruction.

    A directory holds `<policy>/model_outputs.json`; a policy is its directory's name, the same in every run.
    AlpacaEval publishes one answer per policy and instruction, so one run alone has no same-policy pair: POLAR needs a
    second run of at least some policies. `allow_single` yields the groups all the same, for joining with further
    samples later on. Repeats of the same text by the same policy are dropped: as reference and candidate they would be
    a free win.
    """
    prompts: dict[str, list[dict[str, str]]] = {}
    datasets: dict[str, str] = {}
    for directory in result_directories:
        for policy, path in _policy_files(directory, "model_outputs.json"):
            for where, row in _json_rows(path):
                prompt = _alpaca_eval_prompt(row, where=where)
                trajectory = {"policy": policy, "text": _text(row, "output", where=where)}
                trajectories = prompts.setdefault(prompt, [])
                datasets.setdefault(prompt, str(row.get("dataset", "alpaca_eval")))
                if trajectory in trajectories:
                    skipped["trajectory repeated by its own policy"] += 1
                else:
                    trajectories.append(trajectory)
    usable = 0
    for prompt, trajectories in prompts.items():
        per_policy = Counter(trajectory["policy"] for trajectory in trajectories)
        if not allow_single and (len(per_policy) < 2 or max(per_policy.values()) < 2):
            skipped["instruction without a same-policy pair and another policy"] += 1
            continue
        usable += 1
        yield {"prompt": prompt, "trajectories": trajectories, "meta": {"dataset": datasets[prompt]}}
    if not usable:
        raise UserError(
            f"{', '.join(map(str, result_directories))}: no policy answers an instruction twice, and POLAR compares "
            "two samples of one policy; give --results once per sampling run, or --allow-single to join samples later"
        )


def alpaca_eval_preferences(
    results: Path,
    *,
    annotator: str = ALPACA_EVAL_ANNOTATOR,
    reference_policy: str | None = None,
    min_margin: float = 0.3,
    pairs_per_prompt: int = 1,
    seed: int = 0,
    skipped: Counter[str],
) -> Iterator[Record]:
    """Turn the published annotations into preferences: of two answers to an instruction, the annotator liked one more.

    Reads `<policy>/<annotator>/annotations.json`. Each annotation is a policy against the same baseline, so two
    policies are ordered by how strongly each is preferred to the baseline (1..2; the baseline itself is at 1.5); pairs
    closer than `min_margin` are left out. The reference is the answer of `reference_policy`, or the best-liked answer
    of the instruction, which is POLAR's protocol; it is never one of the pair.
    """
    files = list(_policy_files(results, f"{annotator}/annotations.json"))
    prompts: dict[str, dict[str, tuple[float, str]]] = {}  # instruction -> policy -> (preference, answer)
    baseline = None
    for policy, path in files:
        for where, row in _json_rows(path):
            prompt = _alpaca_eval_prompt(row, where=where)
            preference = row.get("preference")
            if not isinstance(preference, int | float):
                skipped["annotation without a preference"] += 1
                continue
            if baseline is None:
                baseline = row.get("generator_1")
            if row.get("generator_1") != baseline:
                raise UserError(
                    f"{where}: generator_1 is {row.get('generator_1')!r}, but earlier files were annotated against "
                    f"{baseline!r}; preferences against different baselines cannot be compared, import them separately"
                )
            answers = prompts.setdefault(prompt, {})
            answers[str(baseline)] = (_ALPACA_EVAL_TIE, _text(row, "output_1", where=where))
            answers[policy] = (float(preference), _text(row, "output_2", where=where))
    if reference_policy is not None and not any(reference_policy in answers for answers in prompts.values()):
        known = sorted({policy for answers in prompts.values() for policy in answers})
        raise UserError(f"{results}: no annotations of --reference-policy {reference_policy!r}; there are {known}")
    for prompt, answers in prompts.items():
        reference = reference_policy or max(answers, key=lambda policy: (answers[policy][0], policy))
        if reference not in answers:
            skipped["instruction without an answer of the reference policy"] += 1
            continue
        others = sorted((value, policy) for policy, (value, _) in answers.items() if policy != reference)
        pairs = [(b, w) for (low, w), (high, b) in combinations(others, 2) if high - low >= min_margin]
        pairs = [pair for pair in pairs if len({answers[policy][1] for policy in (reference, *pair)}) == 3]
        if not pairs:
            skipped["instruction without a pair of the margin asked for"] += 1
        for better, worse in _draw(pairs, pairs_per_prompt, seed=seed, text=prompt):
            margin = round(answers[better][0] - answers[worse][0], 6)
            policies = {"reference_policy": reference, "chosen_policy": better, "rejected_policy": worse}
            texts = (answers[policy][1] for policy in (reference, better, worse))
            yield _preference(prompt, *texts, meta=policies | {"margin": margin})


def _alpaca_eval_prompt(row: Record, *, where: str) -> str:
    instruction = _text(row, "instruction", where=where)
    return f"{instruction}\n\n{row['input']}" if row.get("input") else instruction


# --- GSM8K ------------------------------------------------------------------------------------------------------------


def gsm8k_split(question: str, *, heldout_fraction: float = 0.2) -> str:
    """Say which split a problem belongs to, "train" or "heldout": a property of its text, whatever the seed or file."""
    return "heldout" if _unit_draw("gsm8k split", question) < heldout_fraction else "train"


def gsm8k_preferences(
    path: Path,
    *,
    split: str = "all",
    heldout_fraction: float = 0.2,
    pairs_per_problem: int = 1,
    max_references: int = 1,
    seed: int = 0,
    skipped: Counter[str],
) -> Iterator[Record]:
    """Yield, from `example_model_solutions.jsonl`, the ground truth as reference, a right and a wrong solution.

    Further references, up to `max_references`, are the other right solutions.

    `split`: "train", "heldout" or "all" (`gsm8k_split`). Problems that every model solved, or none, have no pair.
    Texts stay as published, the calculator's `<<2*9=18>>` included: they are part of what the models wrote.
    """
    for where, row in _jsonl_rows(path):
        question, truth = _text(row, "question", where=where), _text(row, "ground_truth", where=where)
        if split not in ("all", gsm8k_split(question, heldout_fraction=heldout_fraction)):
            skipped[f"problem outside the split {split!r}"] += 1
            continue
        solutions: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
        for model, entry in row.items():
            if isinstance(entry, dict):
                correct = entry.get("is_correct")
                if not isinstance(correct, bool):
                    raise UserError(
                        f"{where}: {model}.is_correct is {correct!r}, not a boolean; is this OpenAI's file?"
                    )
                solutions[correct].append((model, _text(entry, "solution", where=f"{where}: {model}")))
        pairs = [(r, w) for r, w in product(solutions[True], solutions[False]) if len({truth, r[1], w[1]}) == 3]
        if not pairs:
            skipped["problem without both a right and a wrong solution"] += 1
        category = f"{len(solutions[True])} of {len(solutions[True]) + len(solutions[False])} models right"
        for right, wrong in _draw(pairs, pairs_per_problem, seed=seed, text=question):
            meta = {"chosen_policy": right[0], "rejected_policy": wrong[0], "category": category}
            others = _draw(solutions[True], len(solutions[True]), seed=seed, text=f"references\n{question}")
            further = _further([text for _, text in others], used=(truth, right[1], wrong[1]), count=max_references - 1)
            yield _preference(question, truth, right[1], wrong[1], meta=meta, further=further)


# --- RMB --------------------------------------------------------------------------------------------------------------


def rmb_preferences(
    directory: Path,
    *,
    trios_per_conversation: int | None = 1,
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
    independent of each other). Further references, up to `max_references`, are other answers that could be the
    reference of the same two.
    """
    root = directory / "RMB_dataset" if (directory / "RMB_dataset").is_dir() else directory
    for part in ("Pairwise_set", "BoN_set"):
        if not (root / part).is_dir():
            raise UserError(f"{root}: no folder {part} in it; give the folder RMB_dataset of the published repository")
    for (category, messages), (wins, subcategory) in _rmb_judgements(root, skipped=skipped).items():
        trios = _rmb_trios(wins)
        if not trios:
            skipped["conversation whose judgements rank no three answers"] += 1
            continue
        conversation = [{"role": role, "content": content} for role, content in messages]
        text = f"{category}\n{conversation}"
        trios.sort(key=lambda trio: (trio[0], _draw_key(seed, text, repr(trio[1]))))
        for (beaten, indirect), (reference, second, third) in trios[:trios_per_conversation]:
            meta = {"category": category, "subcategory": subcategory, "judged_directly": indirect == 0}
            meta |= {"reference_policy": reference.model, "chosen_policy": second.model, "rejected_policy": third.model}
            meta["answers_below_reference"] = -beaten
            others = [answer.text for _, (answer, *compared) in trios if compared == [second, third]]
            used = (reference.text, second.text, third.text)
            further = _further(others, used=used, count=max_references - 1)
            yield _preference(conversation, *used, meta=meta, further=further)


def _rmb_judgements(root: Path, *, skipped: Counter[str]) -> dict[Any, tuple[dict[Answer, set[Answer]], str]]:
    """Read both sets: (category, conversation) -> (answer -> answers judged worse, subcategory)."""
    conversations: dict[Any, tuple[dict[Answer, set[Answer]], str]] = {}
    for path in sorted(root.glob("*_set/**/*.json")):
        part, *folders = path.relative_to(root).parts[:-1]
        for where, row in _json_rows(path):
            best, losers = (
                ("chosen", [row.get("reject")]) if part == "Pairwise_set" else ("bon_best", row.get("loser_list"))
            )
            if not isinstance(row.get("conversation_input"), list) or not isinstance(losers, list):
                raise UserError(f"{where}: this is not an RMB {part} entry; its keys are {sorted(row)}")
            turns = row["conversation_input"]
            messages = tuple((_text(turn, "role", where=where), _text(turn, "content", where=where)) for turn in turns)
            wins, _ = conversations.setdefault(("/".join(folders), messages), ({}, path.stem))
            winner, *worse = (_rmb_answer(entry, where=where) for entry in (row.get(best), *losers))
            for loser in worse:
                if winner.text == loser.text or not winner.text.strip() or not loser.text.strip():
                    skipped["judgement between equal or empty answers"] += 1
                else:
                    wins.setdefault(winner, set()).add(loser)
    return conversations


def _rmb_answer(entry: Any, *, where: str) -> Answer:
    return Answer(_text(entry, "llm_name", where=where), _text(entry, "answer", where=where))


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


# --- HH-RLHF ----------------------------------------------------------------------------------------------------------


def hh_rlhf_preferences(path: Path, *, references: Path | None, skipped: Counter[str]) -> Iterator[Record]:
    """Turn HH-RLHF's transcript pairs into preferences with the references of another file.

    HH-RLHF holds no reference: POLAR added answers of strong models to its prompts. `references` is a JSONL file of
    `{"prompt", "reference"}` lines; pairs without one are skipped and counted. None gives every record an empty
    reference, which trains or measures a reward model without POLAR's central input: a lower bound, not POLAR. Only
    pairs that differ in their one last assistant turn are used.
    """
    texts = _read_references(references) if references is not None else None
    found = 0
    for where, row in _jsonl_rows(path):
        chosen, rejected = (_hh_turns(_text(row, side, where=where), where=where) for side in ("chosen", "rejected"))
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
            found += 1
            meta = {"dataset": "hh-rlhf"} | ({"reference": "none"} if texts is None else {})
            yield _preference(conversation, reference, last_chosen["content"], last_rejected["content"], meta=meta)
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
    for where, row in _jsonl_rows(path):
        try:
            texts[prompt_text(row.get("prompt"))] = prompt_text(row.get("reference"))
        except TypeError as error:
            raise UserError(f"{where}: a reference line needs prompt and reference ({error})") from None
    return texts


# --- shared -----------------------------------------------------------------------------------------------------------


def write_records(records: Iterable[Record], *, output: Path) -> int:
    """Write records as JSONL (gzip when `output` ends in .gz), complete or not at all; return how many there were."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with contextlib.ExitStack() as stack:
            stream: Any = stack.enter_context(HashedFile(temporary))
            if output.suffix == ".gz":  # no name and no time inside: the same records are the same bytes
                stream = stack.enter_context(gzip.GzipFile(filename="", fileobj=stream, mode="wb", mtime=0))
            for record in records:
                # "replace": published JSON may escape half a surrogate pair, which no UTF-8 file can hold.
                stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
                count += 1
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def describe_import(count: int, output: Path, skipped: Counter[str]) -> str:
    """Say in one line what an import wrote and what it left out."""
    left_out = "".join(f"; skipped {number}: {reason}" for reason, number in skipped.most_common())
    return f"{output}: {count} records{left_out}"


def _preference(
    prompt: str | Messages, reference: str, chosen: str, rejected: str, *, meta: Record, further: Sequence[str] = ()
) -> Record:
    given = {"references": [reference, *further]} if further else {"reference": reference}
    return {"prompt": prompt, **given, "chosen": chosen, "rejected": rejected, "meta": meta}


def _further(texts: Iterable[str], *, used: Collection[str], count: int) -> list[str]:
    """The first `count` distinct ones that are in no other use."""
    return [text for text in dict.fromkeys(texts) if text not in used][: max(0, count)]


def _policy_files(directory: Path, name: str) -> list[tuple[str, Path]]:
    """Find `<policy>/<name>` under a results directory, in order of the policies' names."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a `results` directory of the alpaca_eval repository")
    files = [(folder.name, folder / name) for folder in sorted(directory.iterdir()) if (folder / name).is_file()]
    if not files:
        raise UserError(
            f"{directory}: no <policy>/{name} in it; give a `results` directory of the alpaca_eval repository"
        )
    return files


def _json_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield ("path: entry i", object) of a file that is one JSON list of objects."""
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors alike
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a JSON {type(rows).__name__}, not the published list of entries")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {index} is {type(row).__name__}, not an object")
        yield f"{path}: entry {index}", row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", object) of a JSONL file or of a directory of them."""
    for file in list_inputs([path]):
        for number, line in read_jsonl(file):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number}: not valid JSON ({error}); fetch the file again") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: a JSON {type(row).__name__}, not an object; is this published data?")
            yield f"{file}:{number}", row


def _text(row: Any, key: str, *, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: {str(row)[:60]!r} is not an object with the key {key!r}; is this the published file?"
        )
    value = row.get(key)
    if not isinstance(value, str):
        problem = f"{key} is {value!r}, not text" if key in row else f"no key {key!r} among {sorted(row)}"
        raise UserError(f"{where}: {problem}; is this the published file?")
    return value


def _draw_key(seed: int, text: str, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{text}\0{name}".encode("utf-8", errors="replace"), digest_size=8).digest()


def _unit_draw(salt: str, text: str) -> float:
    return int.from_bytes(_draw_key(0, salt, text), "big") / 2**64


def _draw(choices: Sequence[Any], count: int, *, seed: int, text: str) -> list[Any]:
    """Draw `count` of the choices, as a function of the seed, the text drawn for and the choices themselves."""
    return heapq.nsmallest(count, choices, key=lambda choice: _draw_key(seed, text, repr(choice)))
