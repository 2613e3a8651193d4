"""Clones of three public repositories to the folder that the study reads (`make study DATA=DIR`).

prepare_data.py --alpaca-eval CLONE --grade-school-math CLONE --rmb CLONE --output DIR

The clones are of tatsu-lab/alpaca_eval, openai/grade-school-math and Zhou-Zoey/RMB-Reward-Model-Benchmark on GitHub.
AlpacaEval's prompts are divided into `train` and `eval` by a hash, one in six to `eval`; its preferences are those of
its GPT-4-turbo annotations. docs/study.md was made with another division of the prompts, so figures will differ from
it by that, too. DIR/prepared.json tells what there is.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_polar.data import public
from megatron_polar.errors import USER_ERROR, UserError
from megatron_polar.outputs import check_output_directory

MODELS = (
    *("Meta-Llama-3-8B-Instruct", "Meta-Llama-3.1-70B-Instruct-Turbo", "Mistral-7B-Instruct-v0.2"),
    *("Mixtral-8x7B-Instruct-v0.1", "Qwen-14B-Chat", "Qwen1.5-7B-Chat", "Yi-34B-Chat", "alpaca-7b"),
    *("alpaca-farm-ppo-human", "baize-v2-13b", "chatglm2-6b", "claude-2", "claude-instant-1.2"),
    *("falcon-40b-instruct", "falcon-7b-instruct", "gemma-2b-it", "gemma-7b-it", "gpt-3.5-turbo-0301"),
    *("gpt-3.5-turbo-1106", "gpt-4o-2024-05-13", "gpt35_turbo_instruct", "gpt4_0613", "gpt4_1106_preview"),
    *("guanaco-13b", "guanaco-65b", "humpback-llama2-70b", "llama-2-13b-chat-hf", "llama-2-70b-chat-hf"),
    *("minotaur-13b", "nous-hermes-13b", "oasst-sft-pythia-12b", "openchat-13b", "phi-2-sft"),
    *("pythia-12b-mix-sft", "text_davinci_001", "text_davinci_003", "tulu-2-dpo-7b", "vicuna-7b-v1.5"),
    *("wizardlm-13b", "zephyr-7b-beta"),
)
"""Whose answers the study's policies imitate."""
EVAL_ONE_IN = 6
PAIRS_PER_PROMPT = 15
FIELDS = ("instruction", "output", "generator", "dataset")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder; returns the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--alpaca-eval", type=Path, required=True, metavar="CLONE")
    options.add_argument("--grade-school-math", type=Path, required=True, metavar="CLONE")
    options.add_argument("--rmb", type=Path, required=True, metavar="CLONE")
    options.add_argument("--output", type=Path, required=True, metavar="DIR")
    options.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="of AlpacaEval's results")
    given = options.parse_args(arguments)
    try:
        print(json.dumps(prepare(given)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def prepare(given: argparse.Namespace) -> dict:
    """Look at all clones, then write everything; returns the counts. Raises UserError for what is missing."""
    results = given.alpaca_eval / "results"
    outputs = {model: results / model / "model_outputs.json" for model in given.models}
    math = [
        given.grade_school_math / "grade_school_math/data" / name
        for name in ("train.jsonl", "example_model_solutions.jsonl")
    ]
    rmb = given.rmb / "RMB_dataset"
    for path in (*outputs.values(), *math, rmb):
        if not path.exists():
            raise UserError(f"{path}: is not there; give clones of the repositories that --help names, of today")
    check_output_directory(given.output)
    if given.output.exists() and any(given.output.iterdir()):
        raise UserError(f"{given.output}: is not empty; choose another --output")
    output = given.output.with_name(given.output.name + ".partial")  # the study must not take a part for the whole
    if output.exists():
        raise UserError(f"{output}: a call that was cut off has left it; delete it, and prepare the data again")
    counts = write_alpaca(results, outputs, output / "alpaca_eval")
    (output / "gsm8k").mkdir()
    for path in math:
        shutil.copyfile(path, output / "gsm8k" / path.name)
    shutil.copytree(rmb, output / "rmb/RMB_dataset")
    (output / "prepared.json").write_text(json.dumps(counts, indent=1) + "\n")
    output.replace(given.output)
    return counts


def write_alpaca(results: Path, outputs: dict[str, Path], output: Path) -> dict:
    """Both sides of AlpacaEval: every model's outputs, and preferences."""
    counts = {"prompts": Counter(), "preferences": {}}
    for model, path in outputs.items():
        rows: dict[str, list] = {"train": [], "eval": []}
        for row in json.loads(path.read_bytes()):
            rows[side_of(row["instruction"])].append({name: row.get(name, "") for name in FIELDS})
        for side, own in rows.items():
            folder = output / side / "results" / model
            folder.mkdir(parents=True)
            (folder / "model_outputs.json").write_text(json.dumps(own))
            counts["prompts"][side] = max(counts["prompts"][side], len(own))
    skipped: Counter[str] = Counter()
    records = list(public.alpaca_eval_preferences(results, pairs_per_prompt=PAIRS_PER_PROMPT, skipped=skipped))
    for side in ("train", "eval"):
        own = [record for record in records if side_of(record["prompt"]) == side]
        counts["preferences"][side] = public.write_records(own, output=output / f"preferences_{side}.jsonl.gz")
    return counts


def side_of(prompt: str) -> str:
    """`eval` for one prompt in six, by a hash of its text."""
    return "train" if int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % EVAL_ONE_IN else "eval"


if __name__ == "__main__":
    sys.exit(main())
