"""Public data to the study's inputs: what policies imitate, prompts, pools, and what is fine-tuned on.

sources.py --data DIR --output INPUTS --size cpu

DIR holds the publishers' own files: alpaca_eval/{train,eval}/results/<model>/model_outputs.json and
alpaca_eval/preferences_{train,eval}.jsonl.gz, gsm8k/{train,example_model_solutions}.jsonl, rmb/RMB_dataset. No text
about a held-out prompt, of an unseen policy or of a fine-tuning problem gets into what pre-training reads.
"""

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sizes import SIZES, Size

from megatron_polar.data.lines import read_jsonl
from megatron_polar.data.public import gsm8k_preferences, write_records
from megatron_polar.errors import UserError
from megatron_polar.policies.imitation import split_tokens

NUM_UNSEEN_MODELS = 8
HELD_OUT_ONE_IN = 6
"""Of GSM8K's problems; AlpacaEval's held-out prompts are those of its own `eval` folder."""
TOP_P, TOP_K, TEMPERATURE = 0.9, 50, 1.0  # the paper's (appendix D.1.1)
ORDER = 3
CORPUS_FRACTION = {"alpaca": 0.5, "gsm8k": 0.1}

SLIPS: dict[str, Callable[[int], int]] = {
    "one-more": lambda n: n + 1,
    "ten-more": lambda n: n + 10,
    "doubles": lambda n: 2 * n,
    "triples": lambda n: 3 * n,
    "two-more": lambda n: n + 2,
    "reverses": lambda n: int(str(n)[::-1]),
}
"""Writers who miscalculate, each in a way of its own, every number that the problem does not state."""
MIX_UPS = {"mix-up-1": 1, "mix-up-2": 2, "mix-up-3": 3, "mix-up-5": 5, "mix-up-7": 7, "mix-up-11": 11}
"""Writers who solve another problem of the same side instead: the one that comes so many later."""
RESULTS: dict[str, Callable[[int], int]] = {
    **{f"result-plus-{n}": n.__add__ for n in (7, 11, 16, 23, 34, 45, 58, 76, 89, 120, 250, 365)},
    **{f"result-times-{n}": n.__mul__ for n in (2, 3, 4, 5, 6, 10)},
}
"""Writers who work rightly and then write down another result. They are many, so that to compare two results is less
to learn than to know each writer by himself; a wrong result is what solutions of models differ by. Most of a result's
digits, which are tokens, change."""
EXACT = "exact"
"""The writer whose solutions are those published."""
WRITERS = (EXACT, *SLIPS, *MIX_UPS, *RESULTS)
UNSEEN_WRITERS = (
    *("two-more", "reverses", "mix-up-7", "mix-up-11"),
    *("result-plus-16", "result-plus-58", "result-plus-250", "result-times-4"),
)
TEXTS = ("reference", "chosen", "rejected")
_ANNOTATION = re.compile(r"<<[^>]*>>")
"""What GSM8K's calculator has left in solutions: <<48/2=24>>."""
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_LAST_NUMBER = re.compile(r"(?<![\d.,])-?\d+(?![\d.,])(?=\D*$)")
_WHOLE_NUMBER = re.compile(r"(?<![\d.,])\d+(?!\d|[.,]\d)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write all inputs; returns the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--size", choices=sorted(SIZES), required=True)
    given = options.parse_args(arguments)
    try:
        write_inputs(given.data, given.output, size=SIZES[given.size])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def source_files(data: Path) -> list[Path]:
    """Every public file that the study reads, sorted. Raises UserError where one of the sets is missing."""
    patterns = {
        "AlpacaEval's outputs": "alpaca_eval/*/results/*/model_outputs.json",
        "AlpacaEval's preferences": "alpaca_eval/preferences_*.jsonl.gz",
        "GSM8K": "gsm8k/*.jsonl",
        "RMB": "rmb/RMB_dataset/**/*.json",
    }
    files = []
    for what, pattern in patterns.items():
        found = sorted(data.glob(pattern))
        if not found:
            raise UserError(f"{data}: no {pattern} in it ({what}); --data names the folder with the public sets")
        files += found
    return files


def write_inputs(data: Path, output: Path, *, size: Size) -> None:
    """Write everything below `output`; UserError for data that are not as published."""
    alpaca = read_alpaca(data)
    seen, unseen = split_models(alpaca["train"])
    write_alpaca(alpaca, output, size=size, seen=seen, unseen=unseen)
    num_problems = write_gsm8k(data, output, size=size)
    write_finetuning(data, output, size=size)
    facts = {
        "policies": {
            "seen": len(seen) + len(WRITERS) - len(UNSEEN_WRITERS),
            "unseen": len(unseen) + len(UNSEEN_WRITERS),
            "seen_models": seen,
            "unseen_models": unseen,
            "seen_writers": [name for name in WRITERS if name not in UNSEEN_WRITERS],
            "unseen_writers": list(UNSEEN_WRITERS),
        },
        "prompts": num_problems,
    }
    (output / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


# --- AlpacaEval: real models, imitated from their answers ------------------------------------------------------------


def read_alpaca(data: Path) -> dict[str, dict[str, list[dict]]]:
    """Part ("train" or "eval") -> model -> its published entries."""
    parts: dict[str, dict[str, list[dict]]] = {}
    for part in ("train", "eval"):
        files = sorted((data / "alpaca_eval" / part / "results").glob("*/model_outputs.json"))
        parts[part] = {file.parent.name: json.loads(file.read_bytes()) for file in files}
    prompts = [{entry["instruction"] for entries in models.values() for entry in entries} for models in parts.values()]
    if prompts[0] & prompts[1]:
        raise UserError(f"{data}: AlpacaEval's train and eval folders share a prompt, so nothing would be held out")
    return parts


def split_models(models: Iterable[str]) -> tuple[list[str], list[str]]:
    """Seen and unseen models, by a hash of their names alone; a fifth is unseen where there are few."""
    ranked = sorted(models, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    num_unseen = min(NUM_UNSEEN_MODELS, len(ranked) // 3)
    return sorted(ranked[num_unseen:]), sorted(ranked[:num_unseen])


def write_alpaca(
    alpaca: dict[str, dict[str, list[dict]]], output: Path, *, size: Size, seen: list[str], unseen: list[str]
) -> None:
    """Answers of every model, the prompts of both sides, and two pools."""
    for model in (*seen, *unseen):
        rows = [
            {"prompt": entry["instruction"], "text": entry["output"], "heard": part == "train"}
            for part, models in alpaca.items()
            for entry in models.get(model, [])
            if entry["output"].strip()
        ]
        write_records(rows, output=output / "answers" / "alpaca" / f"{model}.jsonl")
    for part, name in (("train", "train"), ("eval", "heldout")):
        texts = dict.fromkeys(entry["instruction"] for entries in alpaca[part].values() for entry in entries)
        short = [text for text in texts if len(text.split()) <= size.alpaca_prompt_words]
        write_records([{"prompt": text} for text in short], output=output / "prompts" / f"alpaca_{name}.jsonl")
    for name, models in (("seen", seen), ("unseen", unseen)):
        write_pool(
            output / f"alpaca_{name}.yaml",
            {model: f"answers/alpaca/{model}.jsonl" for model in models},
            fidelity=size.alpaca_fidelity,
            max_words=size.alpaca_max_words,
            corpus_fraction=CORPUS_FRACTION["alpaca"],
        )


def write_pool(path: Path, answers: dict[str, str], *, fidelity: float, max_words: int, corpus_fraction: float) -> None:
    """A pool of imitations (docs/policies.md); JSON is YAML."""
    sampling = {"top_p": TOP_P, "top_k": TOP_K, "corpus_fraction": corpus_fraction, "max_words": max_words}
    policies = [
        {"name": f"{name}@n{ORDER}", "answers": file, "order": ORDER, "temperature": TEMPERATURE, "fidelity": fidelity}
        for name, file in answers.items()
    ]
    path.write_text(json.dumps({"seed": 1, "sampling": sampling, "policies": policies}, indent=1) + "\n")


# --- GSM8K: one writer of solutions, and others that slip ------------------------------------------------------------


def is_held_out(question: str) -> bool:
    """The side of one of GSM8K's training problems: a hash of its text."""
    return int(hashlib.sha256(question.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def ending(solution: str, *, max_words: int) -> str:
    """How a solution ends: its last whole lines of at most `max_words` words and marks, and its last line in any case.

    The calculator's annotations and the commas in 12,000 are left out, and the result's line is "A: ...", as models
    write it.
    """
    plain = _THOUSANDS.sub("", _ANNOTATION.sub("", solution))
    lines = plain.strip().replace("#### ", "A: ").split("\n")
    first = len(lines) - 1
    while first and len(split_tokens("\n".join(lines[first - 1 :]))) <= max_words:
        first -= 1
    return "\n".join(lines[first:])


def slip(text: str, *, question: str, writer: str) -> str:
    """The solution as `writer` has it: the same words, but whole numbers that the problem does not state are wrong."""
    stated = set(re.findall(r"\d+", question))
    wrong = SLIPS[writer]
    return _WHOLE_NUMBER.sub(lambda found: found[0] if found[0] in stated else str(wrong(int(found[0]))), text)


def solutions(problems: Sequence[dict], *, writer: str) -> list[str]:
    """What `writer` answers to every problem."""
    own = [problem["answer"] for problem in problems]
    if writer in MIX_UPS:
        return [own[(place + MIX_UPS[writer]) % len(own)] for place in range(len(own))]
    if writer == EXACT:
        return own
    if writer in RESULTS:
        return [_LAST_NUMBER.sub(lambda found: str(RESULTS[writer](int(found[0]))), text) for text in own]
    return [slip(text, question=row["question"], writer=writer) for text, row in zip(own, problems, strict=True)]


def write_gsm8k(data: Path, output: Path, *, size: Size) -> dict[str, int]:
    """Answers of every writer, the prompts of both sides, and two pools; returns how many prompts there are."""
    rows = [json.loads(line) for _, line in read_jsonl(data / "gsm8k" / "train.jsonl")]
    rows = [row | {"answer": ending(row["answer"], max_words=size.gsm8k_answer_words)} for row in rows]
    fitting = [row for row in rows if len(row["question"].split()) <= size.gsm8k_prompt_words]
    heldout = [row for row in fitting if is_held_out(row["question"])][: size.gsm8k_heldout_prompts]
    train = [row for row in fitting if not is_held_out(row["question"])][: size.gsm8k_prompts]
    if not train or not heldout:
        raise UserError(f"{data}/gsm8k/train.jsonl: {len(train)} problems to train on and {len(heldout)} held out")
    for name, part in (("train", train), ("heldout", heldout)):
        prompts = [{"prompt": row["question"]} for row in part]
        write_records(prompts, output=output / "prompts" / f"gsm8k_{name}.jsonl")
    for writer in WRITERS:
        answers = [
            {"prompt": row["question"], "text": text, "heard": part is train}
            for part in (train, heldout)
            for row, text in zip(part, solutions(part, writer=writer), strict=True)
        ]
        write_records(answers, output=output / "answers" / "gsm8k" / f"{writer}.jsonl")
    for name in ("seen", "unseen"):
        writers = [writer for writer in WRITERS if (writer in UNSEEN_WRITERS) == (name == "unseen")]
        write_pool(
            output / f"gsm8k_{name}.yaml",
            {writer: f"answers/gsm8k/{writer}.jsonl" for writer in writers},
            fidelity=size.gsm8k_fidelity,
            max_words=size.gsm8k_max_words,
            corpus_fraction=CORPUS_FRACTION["gsm8k"],
        )
    return {"gsm8k_train": len(train), "gsm8k_heldout": len(heldout)}


# --- Fine-tuning -----------------------------------------------------------------------------------------------------


def fold_of(question: str, *, num_folds: int) -> int:
    """Which fold a GSM8K problem is in: a hash of its text."""
    return int(hashlib.sha256(f"fold {question}".encode()).hexdigest(), 16) % num_folds


def write_finetuning(data: Path, output: Path, *, size: Size) -> None:
    """Preferences for every fold of GSM8K's graded solutions and for AlpacaEval, with and without references.

    Of solutions there is the ending, as of the trajectories. A record in which two of the three texts are the same is
    left out: there is no preference, or an answer is the reference itself. `preprocess` would leave it out, too, but
    only of the arms with references.
    """
    skipped: Counter[str] = Counter()
    solutions = data / "gsm8k" / "example_model_solutions.jsonl"
    pairs = [
        pair | {name: ending(pair[name], max_words=size.gsm8k_answer_words) for name in TEXTS}
        for pair in gsm8k_preferences(solutions, pairs_per_problem=size.gsm8k_pairs, skipped=skipped)
    ]
    pairs = list(filter(are_distinct, pairs))
    write_both(pairs, output / "finetune" / "gsm8k", "all")
    folds = [fold_of(pair["prompt"], num_folds=size.gsm8k_folds) for pair in pairs]
    for fold in range(size.gsm8k_folds):
        for name, is_wanted in (("train", fold.__ne__), ("heldout", fold.__eq__)):
            chosen = [pair for pair, own in zip(pairs, folds, strict=True) if is_wanted(own)]
            write_both(chosen, output / "finetune" / "gsm8k", f"fold{fold}_{name}")
    for part, name in (("train", "train"), ("eval", "heldout")):
        rows = list(filter(are_distinct, read_preferences(data / "alpaca_eval" / f"preferences_{part}.jsonl.gz")))
        write_both(rows[: size.preference_limit], output / "finetune" / "alpaca_eval", name)


def are_distinct(record: dict) -> bool:
    """Whether reference and answers are three texts."""
    reference, chosen, rejected = (record[name] for name in TEXTS)
    return reference != chosen != rejected != reference


def read_preferences(path: Path) -> Iterator[dict]:
    """Lines of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_both(records: Sequence[dict], directory: Path, name: str) -> None:
    """The records as they are, and with empty references, for a reward model that sees none."""
    if not records:
        raise UserError(f"{directory}: no record for {name}; the public files have too few to be split")
    write_records(records, output=directory / "reference" / f"{name}.jsonl")
    write_records([record | {"reference": ""} for record in records], output=directory / "none" / f"{name}.jsonl")


if __name__ == "__main__":
    sys.exit(main())
