"""Against Hugging Face + TRL's RewardTrainer: the same weights, pairs, optimizer and threads; comparisons per second
and the loss of every step.

Both sides really train: ours through `train_step` (schedule, clipping, AdamW), once with shared prefixes and once with
whole sequences packed, so that the table tells what sharing gains and what the rest does; TRL's through
`RewardTrainer.train()` at several `per_device_train_batch_size`, which decide how much it pads (it offers no packing).
The length mix is that of layouts.py. Of every comparison the reference and the better candidate use one half of the
vocabulary, the worse one the other, so that there is something to learn. Each run is a process of its own; runs take
turns, and process CPU time is what counts on the CPU. On a GPU both compute in bf16 from fp32 weights: ours as Megatron
does, TRL by autocast. The last layer computes all rows here, as it is one of few:
`model.last_layer: reward_rows` gains a further 3 to 4 % at 24 to 32 layers, and far too much at one or two.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import torch
from arguments import not_negative, positive
from layouts import VOCAB_SIZE, draw
from machine import cpu_name

from megatron_polar.data.template import TokenizedComparison

LEARNING_RATE, BETAS, EPSILON, CLIP = 1e-4, (0.9, 0.95), 1e-8, 1.0
PLACE = Path(__file__).parent
OURS = {"ours": "ours, shared prefixes", "packed": "ours, packed sequences"}


def main() -> None:
    """Run both sides in turns and write the table and the loss curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--steps", type=positive, default=12 if has_gpu else 4)
    parser.add_argument("--warm-up", type=not_negative, default=4 if has_gpu else 1, help="steps that are not timed")
    parser.add_argument("--global-batch-size", type=positive, default=8, help="comparisons per step")
    parser.add_argument(
        "--trl-batch-sizes", type=positive, nargs="+", default=[1, 4, 8], metavar="PAIRS", help="its own: 8"
    )
    parser.add_argument("--repeats", type=positive, default=2)
    parser.add_argument("--layers", type=positive, default=1)
    parser.add_argument("--hidden-size", type=positive, default=1024, help="heads of 128; FFN four times as wide")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PLACE / "trl_reward_trainer.md")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.side:
        run = train_with_trl if options.side.startswith("trl") else train_here
        print(json.dumps(run(options)))
        return
    with tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        make_model(options)
        sides = ["ours", "packed", *(f"trl{size}" for size in options.trl_batch_sizes)]
        runs = {side: [] for side in sides}
        for repeat in range(options.repeats):
            for side in sides[repeat % len(sides) :] + sides[: repeat % len(sides)]:
                if side not in runs:
                    continue
                run = run_side(side, options)
                if run is None:
                    del runs[side]
                    print(f"{side}: out of memory", file=sys.stderr, flush=True)
                    continue
                runs[side].append(run)
                seconds = statistics.median(runs[side][-1]["seconds"])
                print(f"{side}: {seconds:.2f} s a step", file=sys.stderr, flush=True)
    text = report(runs, options)
    options.output.write_text(text)
    draw_losses(runs, options.output.with_suffix(".svg"))
    print(text)


def run_side(side: str, options: argparse.Namespace) -> dict | None:
    """One run in a process of its own: {"seconds": of each timed step, "losses": of every step}; None where the GPU's
    memory does not hold it."""
    command = [sys.executable, __file__, "--side", side, "--work", str(options.work)]
    for name in ("steps", "global_batch_size", "layers", "hidden_size", "seed", "warm_up"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_model(options: argparse.Namespace) -> None:
    """Random weights in Hugging Face's format, from which both sides start."""
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, set_seed

    set_seed(options.seed)
    heads = options.hidden_size // 128
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=options.hidden_size, intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=16384, rms_norm_eps=1e-5, num_labels=1, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(options.work / "model")
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>").save_pretrained(
        options.work / "model"
    )


def comparisons_of(options: argparse.Namespace) -> list[TokenizedComparison]:
    """The pairs of all steps, in order. Token ids keep clear of the padding."""
    generator = np.random.default_rng([options.seed, 2])
    half = (VOCAB_SIZE - 5) // 2
    comparisons = []
    for _ in range(options.steps):
        for comparison in draw(2, count=options.global_batch_size, generator=generator):
            side = int(generator.integers(2))  # which half of the vocabulary is the reference's
            ids = [5 + (tokens - 5) % half + half * (side ^ worse)
                   for tokens, worse in ((comparison.prefix, 0), (comparison.candidates[0], 0),
                                         (comparison.candidates[1], 1))]  # fmt: skip
            comparisons.append(TokenizedComparison(ids[0], (ids[1], ids[2]), (0, 1), 0))
    return comparisons


# --- Ours ------------------------------------------------------------------------------------------------------------


def train_here(options: argparse.Namespace) -> dict:
    """Our trainer's step over the same pairs, `side` "ours" or "packed"."""
    from dataclasses import replace

    from trainer import Trainer, constant_rate

    from megatron_polar.config.schema import DataSection, DatasetSource
    from megatron_polar.convert.hugging_face import config_of, open_model
    from megatron_polar.convert.load import load_hugging_face

    source = open_model(options.work / "model")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = config_of(source, run_directory="unused", dtype=dtype)
    optimizer = constant_rate(LEARNING_RATE, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_eps=EPSILON, clip_grad=CLIP)
    config = replace(
        config,
        model=replace(config.model, last_layer="all_rows"),
        data=DataSection(
            train=(DatasetSource("unused"),),
            max_tokens_per_micro_batch=16384,
            layout="packed" if options.side == "packed" else "shared_prefix",
        ),
        optimizer=optimizer,
    )
    trainer, pairs, size = Trainer(config, vocab_size=VOCAB_SIZE), comparisons_of(options), options.global_batch_size
    load_hugging_face(source, model=trainer.model)
    seconds, losses = [], []
    for number in range(options.steps):
        result, _, elapsed = trainer.step(pairs[number * size : (number + 1) * size])
        seconds.append(elapsed)
        losses.append(result.sums["loss"] / result.sums["pairs"])
    return {"seconds": seconds[options.warm_up :], "losses": losses}


# --- TRL -------------------------------------------------------------------------------------------------------------


def train_with_trl(options: argparse.Namespace) -> dict:
    """TRL's RewardTrainer over the same pairs in the same order, `side` "trlN" with N pairs a forward pass."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    pairs = min(int(options.side.removeprefix("trl")), options.global_batch_size)
    rows = [
        {name: np.concatenate([c.prefix, candidate]).tolist() for name, candidate in zip(
            ("chosen_ids", "rejected_ids"), c.candidates, strict=True)}
        for c in comparisons_of(options)
    ]  # fmt: skip
    seconds, losses, started = [], [], []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **keywords):
            started.append(now())

        def on_step_end(self, *arguments, **keywords):
            seconds.append(now() - started[-1])

        def on_log(self, args, state, control, logs=None, **keywords):
            if "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(RewardTrainer):
        def _get_train_sampler(self, *arguments, **keywords):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=AutoModelForSequenceClassification.from_pretrained(options.work / "model", dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(options.work / "model"),
        args=RewardConfig(
            output_dir=str(options.work / "trl"), per_device_train_batch_size=pairs, max_steps=options.steps,
            gradient_accumulation_steps=options.global_batch_size // pairs, max_length=None, logging_steps=1,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1],
            adam_epsilon=EPSILON, weight_decay=0.0, max_grad_norm=CLIP, optim="adamw_torch", save_strategy="no",
            report_to=[], bf16=torch.cuda.is_available(), gradient_checkpointing=False, disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return {"seconds": seconds[options.warm_up :], "losses": losses}


# --- The report ------------------------------------------------------------------------------------------------------


def report(runs: dict[str, list[dict]], options: argparse.Namespace) -> str:
    """The tables as Markdown."""
    size = options.global_batch_size
    spent = {side: [sum(run["seconds"]) for run in found] for side, found in runs.items()}
    steps = sum(len(run["seconds"]) for run in runs["ours"])
    speed = {side: size * steps / sum(seconds) for side, seconds in spent.items()}
    ratios = {side: [theirs / ours for ours, theirs in zip(spent["ours"], spent[side], strict=True)] for side in runs}
    lines = [
        "# Against TRL's RewardTrainer",
        "",
        f"`{' '.join(['python benchmarks/trl_reward_trainer.py', *sys.argv[1:]])}`: {options.steps} steps of {size} "
        f"comparisons (K = 2) on the same weights, pairs and optimizer; {options.repeats} run(s) of each side in turn, "
        f"{options.warm_up} step(s) of warm-up not timed.",
        "",
        "| trainer | comparisons/s | ours is faster by | largest difference of a step's loss |",
        "|---|---:|---:|---:|",
    ]
    expected = runs["ours"][0]["losses"]
    for side, found in runs.items():
        name = OURS.get(side, f"TRL, {side.removeprefix('trl')} pairs a forward pass")
        difference = max(abs(a - b) for run in found for a, b in zip(run["losses"], expected, strict=True))
        whole, least, most = speed["ours"] / speed[side], min(ratios[side]), max(ratios[side])
        ratio = "" if side == "ours" else f"**{whole:.2f}x** ({least:.2f} to {most:.2f})"
        lines.append(f"| {name} | {speed[side]:.3f} | {ratio} | {'' if side == 'ours' else f'{difference:.1e}'} |")
    missing = [str(size) for size in options.trl_batch_sizes if f"trl{size}" not in runs]
    if missing:
        lines += ["", f"TRL did not fit the GPU's memory at {', '.join(missing)} pairs a forward pass."]
    losses = ", ".join(f"{loss:.4f}" for loss in expected)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()}, 1 thread"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers", "trl"))
    lines += [
        "",
        f"Losses of our steps: {losses}. Curves: `{options.output.with_suffix('.svg').name}`.",
        "",
        "Rates over all runs together; in brackets the range over the runs.",
        "",
        "TRL's own default is 8 pairs a forward pass. A single pair pads least, and leaves a GPU idle.",
        "",
        f"{options.layers} layer(s), hidden {options.hidden_size}, {'bf16' if torch.cuda.is_available() else 'fp32'}, "
        f"{device}, "
        f"{'wall' if torch.cuda.is_available() else 'process CPU'} time; {packages}, Python "
        f"{platform.python_version()}, seed {options.seed}. TRL pads every forward pass to its longest sequence and "
        f"has no packing for rewards. The last layer computes all rows on both sides.",
        "",
    ]
    return "\n".join(lines)


def draw_losses(runs: dict[str, list[dict]], path: Path) -> None:
    """Loss curves of all sides in one picture."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for number, (side, found) in enumerate(runs.items()):
        losses, name = found[0]["losses"], OURS.get(side, side.replace("trl", "TRL, pairs a pass: "))
        style = {"linewidth": 5, "alpha": 0.35} if side == "ours" else {"linewidth": 1.2, "linestyle": (number, (4, 3))}
        axes.plot(range(1, len(losses) + 1), losses, label=name, **style)
    axes.set_xticks(range(1, len(runs["ours"][0]["losses"]) + 1))
    axes.set(xlabel="step", ylabel="loss", title="The same pairs, the same weights")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
