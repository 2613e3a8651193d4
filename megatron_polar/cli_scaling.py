"""Scaling studies: the verb fit, and plan's --ladder. Part of cli.py."""

import argparse
import math
import re
import shlex
from pathlib import Path

from megatron_polar import log
from megatron_polar.errors import UserError
from megatron_polar.outputs import check_output_directory

# --- fit -------------------------------------------------------------------------------------------------------------

_COUNTS = {"non-embedding": "parameters", "all": "all_parameters"}


def add_fit(verbs) -> None:
    verb = verbs.add_parser("fit", help="scaling laws over finished runs, with intervals and plots")
    verb.add_argument(
        "inputs", nargs="+", type=Path, metavar="RUN_DIR", help="run directories, or tables of runs (.csv, .jsonl)"
    )
    verb.add_argument("--output", type=Path, required=True, help="directory for fit.json and report.html")
    verb.add_argument("--evaluation", metavar="NAME", help="take losses from RUN_DIR/NAME, an output of `evaluate`")
    verb.add_argument(
        "--parameters", choices=tuple(_COUNTS), default="non-embedding", help="what N counts (default: non-embedding)"
    )
    verb.add_argument("--data-unit", choices=("tokens", "comparisons"), default="tokens", help="what D counts")
    verb.add_argument("--replicates", type=int, default=1000, help="of the bootstrap (default: 1000)")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--skip-unusable", action="store_true", help="leave out runs that cannot be used, and say so")
    verb.set_defaults(run=_fit)


def _fit(options: argparse.Namespace) -> None:
    import orjson

    from megatron_polar.manifest import write_durably
    from megatron_polar.scaling.fit import Settings, fit_runs
    from megatron_polar.scaling.fit_table import as_json, render_fit
    from megatron_polar.scaling.gather import gather_runs
    from megatron_polar.score.scaling_report import scaling_report

    check_output_directory(options.output)
    if options.replicates < 100:
        raise UserError(f"fit: --replicates {options.replicates} must be at least 100 for percentiles")
    if options.seed < 0:
        raise UserError(f"fit: --seed {options.seed} must not be negative")
    gathered = gather_runs(options.inputs, evaluation=options.evaluation, skip_unusable=options.skip_unusable)
    settings = Settings(
        count=_COUNTS[options.parameters],
        data_unit=options.data_unit,
        replicates=options.replicates,
        seed=options.seed,
    )
    fit = fit_runs(gathered.runs, settings)
    print(render_fit(fit, gathered), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    content = orjson.dumps(as_json(fit, gathered), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    write_durably(options.output / "fit.json", content)
    log.info(f"report: {scaling_report(fit, gathered, output=options.output / 'report.html')}")


# --- plan --ladder ---------------------------------------------------------------------------------------------------

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def add_ladder_options(verb: argparse.ArgumentParser) -> None:
    """Options of `plan` that make a scaling study out of one YAML."""
    group = verb.add_argument_group("a scaling study, from CONFIG.yaml as its base (docs/scaling.md)")
    group.add_argument("--ladder", type=Path, metavar="DIR", help="write the YAMLs of all sizes into DIR")
    group.add_argument("--sizes", metavar="N,N,...|MIN..MAX", help="weights without the embedding: 50M,100M or 50M..1B")
    group.add_argument("--num-sizes", type=int, default=5, metavar="N", help="of MIN..MAX (default: 5)")
    group.add_argument(
        "--flops", metavar="C,C,...", help="budgets, each for all sizes; or --reward-tokens, for each run"
    )
    group.add_argument(
        "--hyper-parameters",
        choices=("paper", "base"),
        default="paper",
        help="learning rate and batch: by the paper's laws, or CONFIG.yaml's for all sizes",
    )
    group.add_argument("--seeds", metavar="S,S,...", help="a run for each (default: run.seed)")


def refuse_ladder_options(options: argparse.Namespace) -> None:
    """Raise UserError for options of --ladder without it."""
    for name in ("sizes", "flops", "seeds"):
        if getattr(options, name) is not None:
            raise UserError(f"plan: --{name} is for --ladder DIR, which is missing; give both, or leave it out")


def write_ladder(options: argparse.Namespace, *, config, cluster, lengths) -> None:
    """`plan --ladder`: write the study and print its table."""
    from megatron_polar.scaling.ladder import LadderRequest, make_ladder
    from megatron_polar.scaling.ladder_files import render_ladder
    from megatron_polar.scaling.ladder_files import write_ladder as write_files

    check_output_directory(options.ladder, name="--ladder")
    if options.sizes is None:
        raise UserError("--ladder: --sizes is missing; give 50M,100M,200M or 50M..1B")
    request = LadderRequest(
        sizes=parse_sizes(options.sizes, num_sizes=options.num_sizes),
        budgets=tuple(_number(text, option="--flops") for text in (options.flops or "").split(",") if text.strip()),
        reward_tokens=options.reward_tokens,
        base_tokens=options.base_tokens,
        hyper_parameters=options.hyper_parameters,
        seeds=tuple(_seed(text) for text in (options.seeds or "").split(",") if text.strip()),
    )
    ladder = make_ladder(config, request, cluster=cluster, lengths=lengths, with_paths=not options.no_paths)
    files = write_files(ladder, options.ladder, command=_command(options))
    print(render_ladder(ladder), flush=True)
    log.info(f"{options.ladder}: {len(files) - 2} YAMLs; README.md there says how to train and fit them")


def parse_sizes(text: str, *, num_sizes: int) -> tuple[float, ...]:
    """`50M,100M,1B`, or `50M..1B`: `num_sizes` of them, evenly spaced as logarithms. Raises UserError."""
    if ".." not in text:
        sizes = tuple(_number(part, option="--sizes") for part in text.split(",") if part.strip())
    else:
        low, high = (_number(part, option="--sizes") for part in text.split("..", 1))
        if num_sizes < 2 or not low < high:
            raise UserError(
                f"--sizes {text} with --num-sizes {num_sizes}: the first must be the smaller, and two sizes"
            )
        ratio = (high / low) ** (1 / (num_sizes - 1))
        sizes = tuple(low * ratio**rung for rung in range(num_sizes))
    if len(set(sizes)) < len(sizes) or not sizes:
        raise UserError(f"--sizes {text}: give different sizes, such as 50M,100M,200M")
    return sizes


def _number(text: str, *, option: str) -> float:
    found = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)([kmbt]?)", text.strip().lower())
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{option}: {text.strip()!r} is no number above 0; write 50M, 1.5B or 1e17")
    return value


def amount(text: str) -> float:
    """An argparse type: a number above 0, also as 50M, 1.5B or 3.6T."""
    try:
        return _number(text, option="number")
    except UserError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0; write 50M, 1.5B, 3.6T or 1e17") from None


def _seed(text: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"--seeds: {text.strip()!r} is no seed; give whole numbers, such as 1,2,3")
    return int(text)


def _command(options: argparse.Namespace) -> str:
    """The command line as it can be given again; the same request gives the same files."""
    words = ["megatron-polar", "plan", str(options.config), *options.overrides, "--ladder", str(options.ladder)]
    words += ["--sizes", options.sizes]
    if ".." in options.sizes:
        words += ["--num-sizes", str(options.num_sizes)]
    given = {
        "--flops": options.flops,
        "--reward-tokens": options.reward_tokens,
        "--base-tokens": options.base_tokens,
        "--hyper-parameters": options.hyper_parameters if options.hyper_parameters != "paper" else None,
        "--seeds": options.seeds,
        "--prompt-tokens": options.prompt_tokens,
        "--answer-tokens": options.answer_tokens,
        "--nodes": options.nodes if options.nodes != 1 else None,
        "--gpus-per-node": options.gpus_per_node,
        "--gpu": options.gpu if options.gpu != "h100" else None,
        "--gpu-memory-gb": options.gpu_memory_gb,
    }
    for option, value in given.items():
        if value is not None:
            words += [option, str(value)]
    if options.no_paths:
        words.append("--no-paths")
    return shlex.join(words)
