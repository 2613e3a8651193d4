"""Score lines with transformers alone: what somebody does who has the export and not this package.

python examples/quickstart/score_with_transformers.py EXPORT LINES.jsonl SCORED.jsonl
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging


@torch.no_grad()
def main(export: str, lines: Path, output: Path) -> None:
    """Add `transformers_reward` to every line; texts are joined as the export's config.json says."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    between = "" if model.config.polar_wrapper == "pretrain" else "\n"
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    for record in records:
        reference, candidate = (record["prompt"] + between + record[key] for key in ("reference", "output"))
        text = f"{reference}<|reward|>{candidate}[UNUSED_TOKEN_130]"
        record["transformers_reward"] = model(**tokenizer(text, return_tensors="pt")).logits.item()
    output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
