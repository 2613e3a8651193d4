"""The console command and its verbs. Each verb imports what it needs: a login node starts in under a second."""

import argparse
import os
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import megatron_polar
from megatron_polar import log
from megatron_polar.cli_launch import add_plan, add_preflight
from megatron_polar.cli_models import add_convert, add_serve
from megatron_polar.cli_scaling import add_fit
from megatron_polar.cli_score import add_evaluate, add_report, add_score
from megatron_polar.errors import (
    ENVIRONMENT_ERRORS,
    INTERRUPTED,
    STALLED,
    USER_ERROR,
    RunStopped,
    UserError,
    describe_missing_package,
    describe_os_error,
)
from megatron_polar.outputs import check_output_directory, check_output_file

_OPEN_FILES = 65536
_GO_ON = ("sample", "preprocess", "train")
"""Verbs that, started again, keep what an interrupted call has finished."""


def _allow_many_open_files() -> None:
    """Raise the soft limit, often 1,024: the first of 512 ranks holds two connections to each of the others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status (errors.py): 0 done, 1 a check failed, 2 the user can mend it."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not ("overrides" in options and all("=" in word and not word.startswith("-") for word in rest)):
        hint = _hint_at_overrides(rest) if "overrides" in options else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:  # argparse gives up on positional arguments behind an option: train a.yaml --dry-run a.b=c
        options.overrides = [*options.overrides, *rest]
    _allow_many_open_files()
    try:
        return options.run(options) or 0
    except RunStopped as stop:
        if log.is_first_rank() or stop.status == STALLED:  # the first rank may be the one that is lost
            print(stop, file=sys.stderr, flush=True)
        return stop.status
    except UserError as error:
        print(f"error{_rank()}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except ModuleNotFoundError as error:
        problem = describe_missing_package(error)
        if problem is None:
            raise
        print(f"error{_rank()}: {problem}", file=sys.stderr, flush=True)
        return USER_ERROR
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        print(f"error: {describe_os_error(error, otherwise=options.verb)}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        if log.is_first_rank():
            goes_on = ": nothing is lost, the same command goes on from here" if options.verb in _GO_ON else ""
            print(str(interrupt) or f"interrupted{goes_on}", file=sys.stderr, flush=True)
        return INTERRUPTED


def _rank() -> str:
    """Which rank speaks, unless it is the first."""
    return "" if log.is_first_rank() else f" [rank {os.environ.get('RANK', '?')}]"


def _hint_at_overrides(words: Sequence[str]) -> str:
    """What to write instead of `--train.num_steps=4`."""
    dashed = next((word for word in words if re.match(r"--?[a-z_]+\.[a-z_]+", word)), None)
    if dashed is None:
        return ""
    key, _, value = dashed.lstrip("-").partition("=")
    return f"; overrides are written without dashes: {key}={value or 'VALUE'}"


class _Parser(argparse.ArgumentParser):
    """Takes options by their whole names: `--gpus` shall not mean `--gpus-per-node`. Verbs get the same class."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, allow_abbrev=False, **keywords)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megatron-polar", description=megatron_polar.__doc__)
    parser.add_argument("--version", action="version", version=megatron_polar.__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", dest="verb")
    for add in (
        _add_sample,
        _add_tokenizer,
        _add_preprocess,
        add_plan,
        add_preflight,
        _add_train,
        add_evaluate,
        add_score,
        add_report,
        add_fit,
        add_convert,
        add_serve,
    ):
        add(verbs)
    return parser


# --- sample ----------------------------------------------------------------------------------------------------------


def _add_sample(verbs) -> None:
    verb = verbs.add_parser("sample", help="draw trajectories from a pool of policies")
    verb.add_argument("--pool", type=Path, required=True, help="pool.yaml (docs/policies.md)")
    verb.add_argument(
        "--prompts", type=Path, help="JSONL with a `prompt` key; default: sentence openings of the pool's corpus"
    )
    verb.add_argument(
        "--documents",
        type=Path,
        help="JSONL with a `text` key: prompts are prefixes of these, of random length",
    )
    verb.add_argument("--tokenizer", type=Path, help="counts the tokens of prefixes; default: words are counted")
    verb.add_argument("--max-prefix-tokens", type=int, default=1024, help="longest prefix of a document")
    verb.add_argument("--output", type=Path, required=True, help="directory for the trajectories")
    verb.add_argument("--num-prompts", type=int, help="how many prompts (default: all of --prompts)")
    verb.add_argument(
        "--prompt-split", choices=("train", "heldout"), default="train", help="side of the corpus's prompts"
    )
    verb.add_argument(
        "--trajectories-per-policy", type=int, default=2, help="trajectories of each prompt's first policy"
    )
    verb.add_argument(
        "--schedule",
        choices=("anchor", "all"),
        default="anchor",
        help="anchor: several trajectories of one policy, one each of others; all: equally many of every policy",
    )
    verb.add_argument("--policies-per-prompt", type=int, help="that answer each prompt (default: 4, or all of fewer)")
    verb.add_argument(
        "--wrapper",
        choices=("sft", "pretrain"),
        default="pretrain",
        help="pretrain: trajectories continue the prompt; sft: they answer it, on a line of their own",
    )
    verb.add_argument("--seed", type=int, default=1, help="draws other prompts, policies and trajectories")
    verb.add_argument("--workers", type=int, default=1, help="processes; only pools of embedded policies need them")
    verb.add_argument("--prompts-per-shard", type=int, default=500, help="what a part of an array takes at a time")
    verb.add_argument(
        "--wait-for-servers", type=float, default=0.0, metavar="SECONDS", help="that they may take to start"
    )
    verb.add_argument("--retry-failed", action="store_true", help="send requests that failed for good once more")
    _add_part(verb, "only every N-th shard, from shard I on; then once without --part")
    verb.set_defaults(run=_sample)


def _add_part(verb: argparse.ArgumentParser, what: str) -> None:
    verb.add_argument("--part", metavar="I/N", help=f"for an array of N jobs, I from 0 to N-1: {what}")
    verb.add_argument("--check", action="store_true", help="look at the arguments and inputs, write nothing")


def _part(options: argparse.Namespace):
    from megatron_polar.data.parts import parse_part

    return None if options.part is None else parse_part(options.part)


def _sample(options: argparse.Namespace) -> None:
    from megatron_polar.policies.collect import Asking
    from megatron_polar.policies.sample import sample_pool

    check_output_directory(options.output)
    part = _part(options)
    report = sample_pool(
        options.pool,
        prompts=options.prompts,
        output=options.output,
        num_prompts=options.num_prompts,
        prompt_split=options.prompt_split,
        trajectories_per_policy=options.trajectories_per_policy,
        policies_per_prompt=options.policies_per_prompt,
        seed=options.seed,
        workers=options.workers,
        wrapper=options.wrapper,
        part=part,
        check=options.check,
        schedule=options.schedule,
        documents=options.documents,
        tokenizer=options.tokenizer,
        max_prefix_tokens=options.max_prefix_tokens,
        prompts_per_shard=options.prompts_per_shard,
        asking=Asking(patience=options.wait_for_servers, retry_failed=options.retry_failed),
    )
    if report is None:
        return
    who = "" if part is None else f"part {part}: "
    rest = "" if report.is_complete else "; the same command without --part draws what is missing and ends the output"
    log.info(f"{report.output}: {who}{report.num_trajectories} trajectories for {report.num_prompts} prompts{rest}")


# --- train-tokenizer and preprocess ----------------------------------------------------------------------------------


def _add_tokenizer(verbs) -> None:
    verb = verbs.add_parser("train-tokenizer", help="a small sentencepiece tokenizer with POLAR's control tokens")
    verb.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="JSONL files or directories of records")
    verb.add_argument("--output", type=Path, required=True, help="the .model file to write")
    verb.add_argument("--vocab-size", type=int, default=1024)
    verb.add_argument("--max-texts", type=int, default=200_000, help="prompts and answers read, from the first on")
    verb.set_defaults(run=_train_tokenizer)


def _train_tokenizer(options: argparse.Namespace) -> None:
    from megatron_polar.data.lines import list_inputs
    from megatron_polar.data.records import read_texts
    from megatron_polar.data.tokenizer_training import train_tokenizer

    check_output_file(options.output)
    texts = read_texts(list_inputs(options.inputs))
    path = train_tokenizer(texts, vocab_size=options.vocab_size, output=options.output, max_texts=options.max_texts)
    log.info(f"{path}: {options.vocab_size} pieces")


def _add_preprocess(verbs) -> None:
    verb = verbs.add_parser("preprocess", help="JSONL records to a tokenised indexed dataset")
    verb.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help=".jsonl[.gz|.zst] files or directories of them"
    )
    verb.add_argument("--output", type=Path, required=True, help="dataset directory")
    verb.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model or Hugging Face directory")
    verb.add_argument("--separator-token", help="control token between the halves (default: POLAR's <|reward|>)")
    verb.add_argument("--reward-token", help="control token of the reward (default: POLAR's [UNUSED_TOKEN_130])")
    verb.add_argument("--workers", type=int, default=1)
    verb.add_argument("--wrapper", choices=("sft", "pretrain"), default="sft", help="for records that name none")
    verb.add_argument(
        "--max-response-length",
        type=int,
        default=4096,
        help="tokens kept of a trajectory (paper: 5120 for pre-training)",
    )
    verb.add_argument(
        "--max-bad-fraction", type=float, default=0.0, help="share of bad lines to quarantine instead of failing"
    )
    _add_part(verb, "only every N-th work unit, from unit I on; then once without --part")
    verb.set_defaults(run=_preprocess)


def _preprocess(options: argparse.Namespace) -> None:
    from megatron_polar.data.preprocess import preprocess

    check_output_directory(options.output)
    preprocess(
        options.inputs,
        output=options.output,
        tokenizer_path=options.tokenizer,
        num_workers=options.workers,
        wrapper=options.wrapper,
        max_response_length=options.max_response_length,
        max_bad_fraction=options.max_bad_fraction,
        separator_token=options.separator_token,
        reward_token=options.reward_token,
        part=_part(options),
        check=options.check,
    )


# --- train -----------------------------------------------------------------------------------------------------------


def _add_train(verbs) -> None:
    verb = verbs.add_parser("train", help="pre-training and fine-tuning from a YAML")
    verb.add_argument("config", type=Path, metavar="CONFIG.yaml")
    # A default of its own: without it argparse calls them required.
    verb.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="on top of the YAML")
    verb.add_argument("--dry-run", action="store_true", help="check and print the resolved configuration, then stop")
    verb.add_argument(
        "--replay-step", type=int, metavar="N", help="repeat step N micro-batch by micro-batch, change nothing"
    )
    verb.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int | None:
    from megatron_polar.config.load import dump_config, load_config

    config = load_config(options.config, options.overrides)
    _refuse_another_place(options, run_directory=Path(config.run.directory))
    check_output_directory(Path(config.run.directory), name="run.directory")
    if options.dry_run:
        print(dump_config(config), end="")
        return None
    log.info("starting: loading torch and megatron-core")  # 7 to 20 seconds
    if options.replay_step is not None:
        from megatron_polar.train.replay import replay_step

        return replay_step(config, step=options.replay_step)
    from megatron_polar.train.run import train
    from megatron_polar.train.signals import outlive_late_signals

    outlive_late_signals()
    train(config)
    if log.is_first_rank():
        from megatron_polar.score.report import has_report, training_report

        directory = Path(config.run.directory)
        if not has_report(directory):  # one of a run that was done stays: it may show evaluations
            log.info(f"report: {training_report(directory)}")
    return None


def _refuse_another_place(options: argparse.Namespace, *, run_directory: Path) -> None:
    """A run directory that was moved or copied still names its old place, where the run would start over."""
    home = options.config.parent
    home = home.parent.parent if home.parent.name == "checkpoints" else home
    is_of_a_run = options.config.name == "config.yaml" and (home / "checkpoints").is_dir()
    is_chosen = any(override.startswith("run.directory=") for override in options.overrides)
    if is_of_a_run and not is_chosen and run_directory.resolve() != home.resolve():
        raise UserError(
            f"{options.config}: names run.directory={run_directory}, and lies in {home}; add run.directory={home} to "
            f"go on there, or another directory to start a new run"
        )
