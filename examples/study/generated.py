"""Generated text in the layout of the public sets, so that a test can run the study. No figure of it means anything."""

import gzip
import json
import random
from pathlib import Path

MODELS = tuple(f"model-{letter}" for letter in "abcdef")
NUM_PROMPTS = {"train": 16, "eval": 6}
NUM_PROBLEMS = 40
NUM_GRADED = 18
NUM_PREFERENCES = {"train": 24, "eval": 8}
NUM_REPEATING = 2  # of the graded problems and, further ones, of the preferences: an answer is the reference itself
THINGS = ["apples", "pears", "stones", "books", "lamps", "boats", "cups", "birds", "ropes", "bells", "chairs", "coins"]
VERBS = ["collects", "sells", "paints", "counts", "carries", "repairs", "borrows", "washes", "throws", "packs"]


def write_generated(data: Path, *, seed: int = 1) -> None:
    """Write all sets below `data`, the same bytes for the same seed."""
    rng = random.Random(seed)
    for part, count in NUM_PROMPTS.items():
        prompts = [
            f"Tell me about {rng.choice(THINGS)} and {rng.choice(THINGS)}, case {part} {i}." for i in range(count)
        ]
        for model in MODELS:
            entries = [
                {"instruction": p, "output": answer(model, rng), "generator": model, "dataset": "x"} for p in prompts
            ]
            write_json(data / f"alpaca_eval/{part}/results/{model}/model_outputs.json", entries)
    for part, count in NUM_PREFERENCES.items():
        rows = [preference(f"What does one do with {rng.choice(THINGS)} {part} {i}?", rng) for i in range(count)]
        rows = [{**row, "chosen": row["reference"]} for row in rows[:NUM_REPEATING]] + rows
        path = data / f"alpaca_eval/preferences_{part}.jsonl.gz"
        with gzip.GzipFile(path, "wb", mtime=0) as lines:
            lines.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    problems = [problem(rng, i) for i in range(NUM_PROBLEMS + NUM_GRADED)]
    write_lines(data / "gsm8k/train.jsonl", [{"question": q, "answer": a} for q, a in problems[:NUM_PROBLEMS]])
    solutions = [graded(q, a, rng) for q, a in problems[NUM_PROBLEMS:]]
    for row in solutions[:NUM_REPEATING]:
        opening = "Let us see how many there are of all. " * 20  # no ending reaches back over it
        row["right"]["solution"] = f"{opening}\n{row['ground_truth']}"
    write_lines(data / "gsm8k/example_model_solutions.jsonl", solutions)
    write_rmb(data / "rmb/RMB_dataset", rng)


def answer(model: str, rng: random.Random) -> str:
    """Sentences that begin as the model likes to."""
    habit = MODELS.index(model)
    sentences = [
        f"{THINGS[habit]} first: one {rng.choice(VERBS)} {rng.choice(THINGS)} and {rng.choice(THINGS)}."
        for _ in range(4)
    ]
    return "\n".join(f"- {s}" for s in sentences) if habit % 2 else " ".join(sentences)


def problem(rng: random.Random, index: int) -> tuple[str, str]:
    """A sum in words, and its solution as GSM8K writes it."""
    a, b = rng.randint(2, 40), rng.randint(2, 9)
    thing, verb = rng.choice(THINGS), rng.choice(VERBS)
    question = f"Case {index}: Ann {verb} {a} {thing} and Bob {verb} {b} times as many. How many {thing} are there?"
    solution = f"Bob has {a}*{b} = <<{a}*{b}={a * b}>>{a * b} {thing}.\nTogether {a * b + a} {thing}.\n#### {a * b + a}"
    return question, solution


def graded(question: str, truth: str, rng: random.Random) -> dict:
    """Two models' solutions, one right and one wrong."""
    final = int(truth.split("#### ")[1])
    texts = {
        "right": f"We add all of them up.\n#### {final}",
        "wrong": f"We guess it.\n#### {final + rng.randint(1, 9)}",
    }
    solutions = {name: {"solution": text, "is_correct": name == "right"} for name, text in texts.items()}
    return {"question": question, "ground_truth": truth} | solutions


def preference(prompt: str, rng: random.Random) -> dict:
    """A preference as the importers write it."""
    names = rng.sample(MODELS, 3)
    reference, chosen, rejected = (answer(name, rng) for name in names)
    meta = {"category": "generated"}
    return {"prompt": prompt, "reference": reference, "chosen": chosen, "rejected": rejected, "meta": meta}


def write_rmb(root: Path, rng: random.Random) -> None:
    """Judgements over three answers a conversation, which rank them."""
    rows = []
    for index in range(6):
        conversation = [{"role": "user", "content": f"Question {index} about {rng.choice(THINGS)}?"}]
        first, second, third = ({"llm_name": name, "answer": answer(name, rng) + f" ({index})"} for name in MODELS[:3])
        pairs = ((first, second), (second, third))
        rows += [{"conversation_input": conversation, "chosen": c, "reject": r} for c, r in pairs]
    write_json(root / "Pairwise_set/Helpfulness/Chat/Generated.json", rows)
    write_json(root / "BoN_set/Helpfulness/Chat/Generated.json", [])


def write_json(path: Path, value: list) -> None:
    """One JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict]) -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
