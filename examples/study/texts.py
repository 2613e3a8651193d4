"""What is made of sampled trajectories: held-out comparisons, and the text that base models are trained on.

texts.py heldout --sampled DIR [DIR ...] --per-prompt 3 --output FILE.jsonl
texts.py real --sampled DIR --answers DIR --max-words 40 --output FILE.jsonl
texts.py base --sampled DIR [DIR ...] --answers DIR --max-words 40 --output FILE.jsonl
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from megatron_polar.data.public import write_records
from megatron_polar.errors import UserError
from megatron_polar.policies.imitation import split_tokens

ANSWERS_PER_DOCUMENT = 6
ANSWER_FILES_PER_PROMPT = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the three; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("heldout", "real", "base"))
    parser.add_argument("--sampled", type=Path, nargs="+", required=True, help="outputs of `sample`")
    parser.add_argument("--answers", type=Path, help="folder with the answers that policies imitate")
    parser.add_argument("--per-prompt", type=int, default=3, help="comparisons a prompt")
    parser.add_argument("--max-words", type=int, default=40, help="where real answers are cut, in words and marks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    make = {"heldout": held_out_comparisons, "real": real_comparisons, "base": base_documents}[options.what]
    try:
        records = list(make(options))
        if not records:
            raise UserError(f"{options.sampled[0]}: gives nothing for {options.output}")
        print(f"{options.output}: {write_records(records, output=options.output)} lines", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def groups(directory: Path) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Prompt and policy -> texts of every line that `sample` has written."""
    for shard in sorted(directory.glob("trajectories-*.jsonl")):
        for line in shard.read_bytes().splitlines():
            record, by_policy = orjson.loads(line), {}
            for trajectory in record["trajectories"]:
                by_policy.setdefault(trajectory["policy"], []).append(trajectory["text"])
            yield record["prompt"], by_policy


def held_out_comparisons(options: argparse.Namespace) -> Iterator[dict]:
    """For every prompt some (reference, same policy, other policy), as lines of trajectories for the suite `policies`.

    Policies are drawn without repetition; the folder's first part (alpaca-..., gsm8k-...) is the line's data set.
    """
    for directory in options.sampled:
        for prompt, by_policy in groups(directory):
            rng = random.Random(f"{options.seed} {prompt}")
            names = sorted(by_policy)
            anchors = [name for name in names if len(set(by_policy[name])) >= 2]
            rng.shuffle(anchors)
            for anchor in anchors[: options.per_prompt]:
                reference, same = rng.sample(sorted(set(by_policy[anchor])), 2)
                other = rng.choice([name for name in names if name != anchor])
                text = rng.choice(by_policy[other])
                if text in (reference, same):
                    continue  # nothing could tell them apart
                drawn = [(anchor, reference), (anchor, same), (other, text)]
                trajectories = [{"policy": policy, "text": text} for policy, text in drawn]
                yield {"prompt": prompt, "trajectories": trajectories, "dataset": directory.name.split("-")[0]}


def real_comparisons(options: argparse.Namespace) -> Iterator[dict]:
    """The same question about real answers: an imitation's trajectory as reference, its model's own answer over another
    model's, both cut to the length of trajectories."""
    (directory,) = options.sampled
    real: dict[str, dict[str, str]] = {}
    for prompt, by_policy in groups(directory):
        for policy in by_policy:
            name = policy.split("@")[0]
            real.setdefault(name, {}) or real[name].update(read_answers(options.answers / f"{name}.jsonl"))
        rng = random.Random(f"{options.seed} real {prompt}")
        for anchor in rng.sample(sorted(by_policy), min(options.per_prompt, len(by_policy))):
            other = rng.choice([name for name in sorted(by_policy) if name != anchor])
            texts = [real[policy.split("@")[0]].get(prompt) for policy in (anchor, other)]
            if None in texts or texts[0] == texts[1]:
                continue
            chosen, rejected = ("".join(split_tokens(text)[: options.max_words]) for text in texts)
            if chosen != rejected:
                meta = {"chosen_policy": anchor, "rejected_policy": other, "category": "real answers"}
                yield {
                    "prompt": prompt,
                    "reference": by_policy[anchor][0],
                    "chosen": chosen,
                    "rejected": rejected,
                    "meta": meta,
                }


def read_answers(path: Path) -> dict[str, str]:
    """Prompt -> answer of one file of answers."""
    rows = map(orjson.loads, path.read_bytes().splitlines())
    return {row["prompt"]: row["text"] for row in rows}


def base_documents(options: argparse.Namespace) -> Iterator[dict]:
    """Documents of a prompt with several answers behind it, one after the other: sampled ones, and those imitated.

    Only answers that policies may hear (none of a held-out prompt), and of the policies that were sampled.
    """
    rng = random.Random(options.seed)
    names = set()
    for directory in options.sampled:
        for prompt, by_policy in groups(directory):
            texts = [text.strip() for found in by_policy.values() for text in found]
            names.update((directory.name.split("-")[0], policy.split("@")[0]) for policy in by_policy)
            rng.shuffle(texts)
            for start in range(0, len(texts), ANSWERS_PER_DOCUMENT):
                yield {"text": "\n".join([prompt, *texts[start : start + ANSWERS_PER_DOCUMENT]])}
    real: dict[str, list[str]] = {}
    for dataset, name in sorted(names):
        if dataset == "gsm8k" and name != "exact":
            continue  # the others' texts are the same but for their slips
        for line in (options.answers / dataset / f"{name}.jsonl").read_bytes().splitlines():
            row = json.loads(line)
            if row["heard"]:
                real.setdefault(row["prompt"], []).append(row["text"])
    for prompt, texts in real.items():
        rng.shuffle(texts)
        for start in range(0, len(texts), ANSWER_FILES_PER_PROMPT):
            cut = ["".join(split_tokens(t)[: 2 * options.max_words]) for t in texts[start : start + 4]]
            yield {"text": "\n".join([prompt, *cut])}


if __name__ == "__main__":
    sys.exit(main())
