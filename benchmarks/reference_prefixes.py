"""What it would save to compute the prompt once for all references of an item, in tokens of the model's rows.

    python benchmarks/reference_prefixes.py --tokenizer tokenizer.model records.jsonl ...

Records are preprocess' input lines. Of each record the first answers serve as references and the next as outputs; where
it has too few, answers are taken again, because only their lengths count. docs/evaluation.md holds what came out.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from arguments import positive

from megatron_polar.data.lines import list_inputs, read_jsonl
from megatron_polar.data.packing import physical_tokens
from megatron_polar.data.records import Preference, parse_record
from megatron_polar.data.template import (
    POLAR_RESPONSE_TOKENS,
    TokenizedComparison,
    _common_prefix,
    assemble_comparison,
    encode_half,
)
from megatron_polar.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Tokens:
    """Tokens of an item's rows: nothing shared, the prefix of outputs shared (what is done), and the prompt as well."""

    apart: int
    shared: int
    nested: int


def count_tokens(
    tokenizer: Tokenizer, prompt: str, *, references: Sequence[str], outputs: Sequence[str], wrapper: str
) -> Tokens:
    """Lay out one item with several references, nothing cut."""

    def half(text: str):
        return encode_half(
            tokenizer, prompt=prompt, trajectory=text, wrapper=wrapper, max_response_length=POLAR_RESPONSE_TOKENS
        )

    candidates = [half(text) for text in outputs]
    comparisons: list[TokenizedComparison] = [
        assemble_comparison(
            half(text), candidates, levels=(0,) * len(outputs), control=tokenizer.control, max_length=1 << 30
        )
        for text in references
    ]
    apart, shared = (
        sum(physical_tokens(comparison, layout=layout) for comparison in comparisons)
        for layout in ("packed", "shared_prefix")
    )
    prompt_tokens = _common_prefix([comparison.prefix for comparison in comparisons])
    return Tokens(apart, shared, shared - (len(references) - 1) * prompt_tokens)


def read_answers(paths: Sequence[Path]) -> Iterator[tuple[str, str, list[str]]]:
    """Prompt, wrapper and answers of each record."""
    for path in list_inputs(paths):
        for number, line in read_jsonl(path):
            record = parse_record(line, source=str(path), line_number=number)
            if isinstance(record, Preference):
                yield record.prompt, record.wrapper or "sft", [*record.references, *record.candidates]
            else:
                yield record.prompt, record.wrapper or "sft", [each.text for each in record.trajectories]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--references", type=positive, default=4)
    parser.add_argument("--outputs", type=positive, nargs="+", default=[1, 2, 8])
    parser.add_argument("--limit", type=positive, default=300, help="records")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    records = list(islice(read_answers(options.records), options.limit))
    print("| references | outputs | tokens, nothing shared | shared as is done | that saves | prompt too would save |")
    print("|---|---|---|---|---|---|")
    for num_outputs in options.outputs:
        total = np.zeros(3, dtype=np.int64)
        for prompt, wrapper, answers in records:
            taken = list(islice(cycle(answers), options.references + num_outputs))
            references, outputs = taken[: options.references], taken[options.references :]
            found = count_tokens(tokenizer, prompt, references=references, outputs=outputs, wrapper=wrapper)
            total += (found.apart, found.shared, found.nested)
        apart, shared, nested = total.tolist()
        saved, more = 1 - shared / apart, 1 - nested / shared
        print(f"| {options.references} | {num_outputs} | {apart} | {shared} | {saved:.1%} | {more:.1%} |")


if __name__ == "__main__":
    main()
