"""What is made of sampled trajectories: held-out comparisons, and the text that base models are trained on.

texts.py heldout --sampled DIR [DIR ...] --per-prompt 3 --output FILE.jsonl
texts.py real --sampled DIR --answers DIR --max-words 40 --output FILE.jsonl
texts.py base --sampled DIR [DIR ...] --answers DIR --max-words 80 --output FILE.jsonl
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from megatron_polar.data.lines import read_jsonl
from megatron_polar.data.public import write_records
from megatron_polar.errors import UserError
from megatron_polar.policies.imitation import split_tokens


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
        for _, line in read_jsonl(shard):
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
    real = _RealAnswers(options.answers, heard_only=False)
    for directory in options.sampled:
        for prompt, by_policy in groups(directory):
            rng, names = random.Random(f"{options.seed} real {prompt}"), sorted(by_policy)
            for anchor in rng.sample(names, min(options.per_prompt, len(names))):
                other = rng.choice([name for name in names if name != anchor])
                texts = [real.of(policy, prompt) for policy in (anchor, other)]
                chosen, rejected = (_cut(text or "", options.max_words) for text in texts)
                if chosen and rejected and chosen != rejected:
                    meta = {"chosen_policy": anchor, "rejected_policy": other, "category": "real answers"}
                    candidates = {"chosen": chosen, "rejected": rejected}
                    yield {"prompt": prompt, "reference": by_policy[anchor][0], **candidates, "meta": meta}


def base_documents(options: argparse.Namespace) -> Iterator[dict]:
    """Documents of a prompt and what one policy says to it, one trajectory after the other, and of a prompt and a real
    answer, twice: all that policies may hear (nothing about a held-out prompt), of the policies that were sampled.

    A model that has seen the first text can foretell some of the second, or all: what to copy is worth learning.
    """
    real = _RealAnswers(options.answers, heard_only=True)
    said: dict[tuple[str, str], None] = {}
    for directory in options.sampled:
        for prompt, by_policy in groups(directory):
            for policy, texts in sorted(by_policy.items()):
                yield {"text": "\n".join([prompt, *(text.strip() for text in texts)])}
                answer = real.of(policy, prompt)
                if answer is not None:
                    said[prompt, _cut(answer, options.max_words)] = None
    for prompt, answer in said:
        yield {"text": "\n".join([prompt, answer, answer])}


class _RealAnswers:
    """The answers that policies imitate, read when a policy is first asked for: <folder>/*/<name>.jsonl."""

    def __init__(self, folder: Path, *, heard_only: bool):
        self._folder, self._heard_only = folder, heard_only
        self._read: dict[str, dict[str, str]] = {}

    def of(self, policy: str, prompt: str) -> str | None:
        """The answer of a policy's model to a prompt; None where it has none that may be used."""
        name = policy.rpartition("@")[0]
        if name not in self._read:
            (path,) = self._folder.rglob(f"{name}.jsonl")
            rows = (orjson.loads(line) for _, line in read_jsonl(path))
            self._read[name] = {row["prompt"]: row["text"] for row in rows if row["heard"] or not self._heard_only}
        return self._read[name].get(prompt)


def _cut(text: str, max_words: int) -> str:
    return "".join(split_tokens(text)[:max_words])


if __name__ == "__main__":
    sys.exit(main())
