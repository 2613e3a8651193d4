"""Rewards of checkpoints: the verbs evaluate, score and report. Part of cli.py."""

import argparse
import os
from pathlib import Path

from megatron_polar import log
from megatron_polar.cli_models import add_wrapper
from megatron_polar.errors import UserError
from megatron_polar.outputs import check_output_directory, check_output_file

# --- evaluate and score ----------------------------------------------------------------------------------------------


def _add_checkpoint_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--checkpoint", type=Path, required=True, help="run directory, or one step of it")
    verb.add_argument("--tensor-model-parallel-size", type=int, default=1)
    verb.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    verb.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")


def _load_scorer(options: argparse.Namespace):
    from megatron_polar.config.schema import ParallelSection
    from megatron_polar.score.scorer import load_scorer

    parallel = ParallelSection(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    return load_scorer(options.checkpoint, parallel=parallel, device_kind=options.device)


def add_evaluate(verbs) -> None:
    verb = verbs.add_parser("evaluate", help="accuracy on a suite, with intervals and self-checks")
    _add_checkpoint_options(verb)
    verb.add_argument(
        "--suite", required=True, help="preferences, policies, gsm8k, rmb, rm-bench, ... (docs/evaluation.md)"
    )
    verb.add_argument("--data", type=Path, required=True, help="the suite's file or directory")
    verb.add_argument(
        "--output", type=Path, required=True, help="directory for summary.json, rewards.jsonl, report.html"
    )
    verb.add_argument("--limit", type=int, help="draw this many items (seeded)")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--reference-scheme", help="gold, policy:NAME, leave-one-out or none (default: the suite's own)")
    verb.add_argument("--reference-answers", type=Path, help="JSONL of references, for gold and policy:NAME")
    verb.add_argument("--comparisons-per-prompt", type=int, default=1, help="draws of the suite policies (1)")
    verb.add_argument(
        "--references",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="references per item, whose rewards are averaged; several numbers (1 2 4) are compared on the same items",
    )
    add_wrapper(verb, of="records")
    verb.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_polar.score.evaluate import evaluate, exit_status
    from megatron_polar.score.reference_counts import check_counts
    from megatron_polar.score.reference_scheme import resolve_scheme
    from megatron_polar.score.suites import load_suite, with_wrapper

    check_output_directory(options.output)
    _refuse_foreign_files(options.output)
    counts, has_answers = check_counts(options.references), options.reference_answers is not None
    items = load_suite(
        options.suite,
        options.data,
        limit=options.limit,
        seed=options.seed,
        comparisons_per_group=options.comparisons_per_prompt,
        default_wrapper=options.wrapper,
        reference_scheme=options.reference_scheme,
        reference_answers=options.reference_answers,
        num_references=counts[-1],
    )
    scorer = _load_scorer(options)
    summary = evaluate(
        scorer,
        with_wrapper(items, scorer.default_wrapper(options.wrapper)),
        output=options.output,
        suite=options.suite,
        seed=options.seed,
        checkpoint=str(scorer.checkpoint),
        reference_scheme=resolve_scheme(options.suite, options.reference_scheme, has_answers=has_answers),
        references=counts,
    )
    if log.is_first_rank():
        from megatron_polar.score.report import evaluation_report

        rewards = options.output / "rewards.jsonl"
        log.info(f"report: {evaluation_report(summary, rewards=rewards, output=options.output / 'report.html')}")
    return exit_status(summary)


def _refuse_foreign_files(output: Path) -> None:
    """A run, too, has a report.html: only what an evaluation has left is written over."""
    names = os.listdir(output) if output.is_dir() else []
    if names and not any(name.startswith("rewards.jsonl") for name in names):
        raise UserError(
            f"{output}: is not empty, and no earlier evaluation (there is no rewards.jsonl); choose another --output, "
            f"such as {output / 'evaluate'}"
        )


def add_score(verbs) -> None:
    verb = verbs.add_parser("score", help="rewards for {prompt, reference, output} lines")
    _add_checkpoint_options(verb)
    verb.add_argument(
        "--input",
        type=Path,
        required=True,
        help="JSONL: prompt, reference (or references: [...]), output (or outputs: [...])",
    )
    verb.add_argument("--output", type=Path, required=True, help="the same lines with `reward` (or `rewards`) added")
    verb.add_argument("--per-reference", action="store_true", help="add the rewards against each reference, too")
    add_wrapper(verb, of="lines")
    verb.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> None:
    from megatron_polar.data.lines import list_inputs
    from megatron_polar.score.score_file import read_requests, score_file

    check_output_file(options.output)
    read_requests(options.input)  # refuse a bad file before the model is loaded
    inputs = list_inputs([options.input]) if options.input.is_dir() else [options.input]
    if options.output.exists() and any(map(options.output.samefile, inputs)):
        raise UserError(
            f"{options.output}: is one of the files to score, which stay as they are; give another --output"
        )
    scorer = _load_scorer(options)
    wrapper = scorer.default_wrapper(options.wrapper)
    count = score_file(
        scorer, options.input, output=options.output, default_wrapper=wrapper, per_reference=options.per_reference
    )
    log.info(f"{options.output}: {count} lines scored")


# --- report ----------------------------------------------------------------------------------------------------------


def add_report(verbs) -> None:
    verb = verbs.add_parser("report", help="redraw a run's report.html")
    verb.add_argument("run_directory", type=Path, metavar="RUN_DIR")
    verb.add_argument(
        "--evaluation", action="append", default=[], metavar="HEADING=DIR", help="add an `evaluate` output"
    )
    verb.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from megatron_polar.score.report import training_report

    evaluations = {}
    for entry in options.evaluation:
        heading, separator, directory = entry.partition("=")
        if not separator:
            raise UserError(f"--evaluation {entry!r} is not of the form HEADING=DIR")
        evaluations[heading] = Path(directory)
    log.info(f"report: {training_report(options.run_directory, evaluations=evaluations)}")
