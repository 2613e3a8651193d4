"""make quickstart: from nothing to an evaluated reward model and a report, with the commands that a real run uses.

Every step prints its command and can be run by hand. Finished steps are kept: a second run resumes, it does not start
again.
"""

import contextlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_polar.errors import INTERRUPTED

HERE = Path("examples/quickstart")
RUN = Path("runs/quickstart")
DATA, EXPORT = RUN / "data", RUN / "export"
EVALUATIONS = {
    "New prompts, policies seen in training": RUN / "evaluate-heldout",
    "New prompts, policies never seen": RUN / "evaluate-unseen",
}
END_SECONDS = 30
"""How long a step may take to end by itself after Ctrl-C: torchrun waits for its ranks."""


def main() -> int:
    """Run all steps; returns the exit status of the first that fails, or 130 after Ctrl-C."""
    try:
        return run_steps()
    except KeyboardInterrupt:
        print("interrupted; `make quickstart` goes on behind the last finished step or checkpoint", file=sys.stderr)
        return INTERRUPTED


def run_steps() -> int:
    """Run one step after the other, and sum up; returns the exit status of the first that fails."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same figures everywhere, and two ranks where there is one GPU
    start = time.monotonic()
    shutil.rmtree(EXPORT, ignore_errors=True)  # of an earlier run; nothing is ever exported over something else
    for title, *command in steps():
        print(f"\n== {title}\n$ {shlex.join(command).replace(sys.executable, 'python')}", flush=True)
        status = run_step(command)
        if status:
            print(f"error: the step {title!r} failed with exit status {status}; its message is above", file=sys.stderr)
            return status
    summary = write_summary()
    subprocess.run([sys.executable, *report_command()[1:]], check=True)
    print_example()
    print(f"\n== Done in {time.monotonic() - start:.0f} s\n{json.dumps(summary, indent=2)}")
    print(f"\nOpen {RUN / 'report.html'} in a browser. `source .venv/bin/activate` gives you the commands above, and")
    print(f"`tensorboard --logdir {RUN}`.")
    return 0


def run_step(command: Sequence[str]) -> int:
    """Run the command of a step; returns its exit status. Ctrl-C reaches the step, too: it is given time to end."""
    process = subprocess.Popen([sys.executable, *command[1:]])
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=END_SECONDS)
        process.terminate()  # does nothing to one that has ended
        raise


def steps() -> list[tuple[str, ...]]:
    """Title and command of every step."""
    polar = ("python", "-m", "megatron_polar")
    seen, unseen = str(HERE / "pool.yaml"), str(HERE / "unseen_pool.yaml")
    model, data = str(DATA / "tokenizer.model"), str(DATA)
    train_text, heldout_text, unseen_text = (f"{data}/text/{name}" for name in ("train", "heldout", "unseen"))
    held_out = ("--prompt-split", "heldout", "--num-prompts", "700", "--policies-per-prompt", "2")
    heldout_report, unseen_report = map(str, EVALUATIONS.values())
    torchrun = ("python", "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_polar")
    return [
        (
            "Sample trajectories of 64 policies",
            *(*polar, "sample", "--pool", seen, "--output", train_text),
            *("--num-prompts", "8000", "--policies-per-prompt", "2"),
        ),
        (
            "The same policies on held-out prompts",
            *polar,
            "sample",
            "--pool",
            seen,
            "--output",
            heldout_text,
            *held_out,
        ),
        ("16 policies nobody has seen", *polar, "sample", "--pool", unseen, "--output", unseen_text, *held_out),
        ("Train a tokenizer", *polar, "train-tokenizer", train_text, "--output", model, "--vocab-size", "1024"),
        ("Tokenise", *polar, "preprocess", train_text, "--output", f"{data}/train", "--tokenizer", model),
        ("Tokenise", *polar, "preprocess", heldout_text, "--output", f"{data}/heldout", "--tokenizer", model),
        ("Pre-train, tensor-parallel on two ranks", *torchrun, "train", str(HERE / "pretrain.yaml")),
        ("Evaluate on held-out prompts", *evaluate(polar, heldout_text, heldout_report)),
        ("Evaluate on unseen policies", *evaluate(polar, unseen_text, unseen_report)),
        (
            "Take six held-out prompts",
            "python",
            str(HERE / "make_example.py"),
            heldout_text,
            str(RUN / "example.jsonl"),
        ),
        (
            "Score them",
            *(*polar, "score", "--checkpoint", str(RUN)),
            *("--input", str(RUN / "example.jsonl"), "--output", str(RUN / "example_scores.jsonl")),
        ),
        (
            "Export to Hugging Face",
            *(*polar, "convert", "to-hf", "--checkpoint", str(RUN), "--layout", "sequence-classification"),
            *("--output", str(EXPORT)),
        ),
        (
            "Score the same lines with transformers alone",
            *("python", str(HERE / "score_with_transformers.py"), str(EXPORT)),
            *(str(RUN / "example_scores.jsonl"), str(RUN / "example_both.jsonl")),
        ),
    ]


def evaluate(polar: tuple[str, ...], data: str, output: str) -> tuple[str, ...]:
    """The evaluate command for one set of trajectories."""
    return (*polar, "evaluate", "--checkpoint", str(RUN), "--suite", "policies", "--data", data, "--output", output)


def report_command() -> tuple[str, ...]:
    """The report command: the run's curves with both evaluations."""
    evaluations = [f"--evaluation={title}={directory}" for title, directory in EVALUATIONS.items()]
    return ("python", "-m", "megatron_polar", "report", str(RUN), *evaluations)


def print_example() -> None:
    """Rewards of the example, side by side: the same policy's trajectory should mostly get the higher one, and
    transformers should give what this package gives."""
    lines = [json.loads(line) for line in (RUN / "example_both.jsonl").read_text().splitlines()]
    print(f"\n{'':34s} {'same policy':^25s} {'another':^25s}")
    print(f"{'prompt':34s}" + 2 * f" {'here':>12s} {'transformers':>12s}")
    for same, other in zip(lines[::2], lines[1::2], strict=True):
        rewards = [line[key] for line in (same, other) for key in ("reward", "transformers_reward")]
        verdict = "" if same["reward"] > other["reward"] else "  wrong"
        print(f"{same['prompt'][:34]:34s}" + "".join(f" {reward:12.6f}" for reward in rewards) + verdict)


def largest_difference() -> float:
    """How far the export's rewards in transformers are from those of the checkpoint here."""
    lines = [json.loads(line) for line in (RUN / "example_both.jsonl").read_text().splitlines()]
    return max(abs(line["reward"] - line["transformers_reward"]) for line in lines)


def in_words(seen: dict, unseen: dict) -> str:
    """What the accuracies mean."""
    return (
        f"Of two candidates the model finds the one whose policy wrote the reference in {seen['accuracy']:.1%} of "
        f"{seen['num_pairs']} comparisons on new prompts, and in {unseen['accuracy']:.1%} of {unseen['num_pairs']} of "
        f"policies that training never saw. Guessing has 50 %; counting words that reference and candidate share has "
        f"{seen['word_overlap_accuracy']:.1%} and {unseen['word_overlap_accuracy']:.1%}. With labels swapped an "
        "accuracy must be what is missing to 100 %."
    )


def write_summary() -> dict:
    """Write runs/quickstart/summary.json from what the steps left behind."""
    seen, unseen = (json.loads((directory / "summary.json").read_text()) for directory in EVALUATIONS.values())
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "iteration-time" in row]
    intervals = [b["iteration"] - a["iteration"] for a, b in zip([{"iteration": 0}, *training], training, strict=False)]
    summary = {
        "in_words": in_words(seen, unseen),
        "heldout_accuracy": seen["accuracy"],
        "heldout_comparisons": seen["num_pairs"],
        "heldout_word_overlap_accuracy": seen["word_overlap_accuracy"],
        "swapped_accuracy": seen["swapped_accuracy"],
        "unseen_policy_accuracy": unseen["accuracy"],
        "unseen_policy_comparisons": unseen["num_pairs"],
        "unseen_policy_word_overlap_accuracy": unseen["word_overlap_accuracy"],
        "largest_difference_to_transformers": largest_difference(),
        "train_seconds": sum(n * row["iteration-time"] for n, row in zip(intervals, training, strict=True)),
        "comparisons_per_second": statistics.median(row["comparisons/s"] for row in training),
    }
    temporary = RUN / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.replace(RUN / "summary.json")
    return summary


if __name__ == "__main__":
    sys.exit(main())
