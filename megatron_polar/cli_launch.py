"""The verbs before a run on a cluster: plan and preflight. Part of cli.py."""

import argparse
from pathlib import Path

from megatron_polar.cli_scaling import add_ladder_options, amount, refuse_ladder_options, write_ladder
from megatron_polar.errors import DONE, UserError

# --- plan ------------------------------------------------------------------------------------------------------------


def add_plan(verbs) -> None:
    verb = verbs.add_parser("plan", help="memory, batch and paths of a run, before a GPU hour is spent")
    verb.add_argument("config", type=Path, metavar="CONFIG.yaml")
    verb.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="on top of the YAML")
    verb.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    verb.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="default: 8; with run.device=cpu processes, default: 1"
    )
    verb.add_argument("--gpu", choices=("h100", "h200"), default="h100", help="for memory and time (default: h100)")
    verb.add_argument("--gpu-memory-gb", type=float, help="of one GPU, in GB (10^9 bytes; default: what --gpu has)")
    verb.add_argument("--search", action="store_true", help="also list the fastest layouts that fit, by the estimates")
    verb.add_argument("--prompt-tokens", type=float, metavar="N", help="mean length, for the time of a step")
    verb.add_argument(
        "--answer-tokens",
        type=float,
        metavar="N",
        help="likewise; both or none (default: the data's, else 325 and 400)",
    )
    verb.add_argument("--no-paths", action="store_true", help="open no dataset, tokenizer or checkpoint")
    verb.add_argument(
        "--base-tokens", type=amount, metavar="N", help="tokens the base model was pre-trained on, for the law: 4T"
    )
    verb.add_argument(
        "--reward-tokens",
        type=amount,
        metavar="N",
        help="tokens of the reward-model data, where there is none to read or for --ladder",
    )
    add_ladder_options(verb)
    verb.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from megatron_polar.config.load import load_config
    from megatron_polar.scaling.hardware import GPUS
    from megatron_polar.scaling.plan import Cluster, make_plan
    from megatron_polar.scaling.search import search_layouts
    from megatron_polar.scaling.table import render_plan, render_search

    if options.config.suffix == ".sh":
        raise UserError(
            f"{options.config}: a job script; give its YAML, or run slurm/launch.sh --dry-run {options.config}"
        )
    gpu = GPUS[options.gpu]
    memory = gpu.memory_gb if options.gpu_memory_gb is None else options.gpu_memory_gb
    config = load_config(options.config, options.overrides)
    usual = 1 if config.run.device == "cpu" else 8
    per_node = usual if options.gpus_per_node is None else options.gpus_per_node
    cluster = Cluster(options.nodes, gpus_per_node=per_node, gpu_memory_gb=memory, gpu=gpu)
    if options.ladder is not None:
        write_ladder(options, config=config, cluster=cluster, lengths=_lengths(options))
        return
    refuse_ladder_options(options)
    if options.search and config.run.device == "cpu":
        raise UserError("plan: --search is for GPUs, and run.device=cpu; leave it out, or plan with run.device=cuda")
    plan = make_plan(config, cluster=cluster, with_paths=not options.no_paths, lengths=_lengths(options))
    print(render_plan(plan, base_tokens=options.base_tokens, reward_tokens=options.reward_tokens), flush=True)
    if options.search and plan.embedding_rows is not None:
        longest = plan.paths.longest_response if plan.paths else None
        found = search_layouts(
            config, cluster=cluster, work=plan.work, embedding_rows=plan.embedding_rows, longest_response=longest
        )
        print(f"\n{render_search(found)}", flush=True)
    if refusal := plan.refusal(str(options.config)):
        raise refusal


def _lengths(options: argparse.Namespace):
    """Mean lengths as the user gives them; None: as the data say."""
    from megatron_polar.scaling.step_time import Lengths

    given = {"--prompt-tokens": options.prompt_tokens, "--answer-tokens": options.answer_tokens}
    if all(value is None for value in given.values()):
        return None
    for name, value in given.items():
        if value is None:
            raise UserError(f"plan: {name} is missing; give both lengths, or none")
        if not 0 < value < float("inf"):
            raise UserError(f"plan: {name} {value:g} must be above 0")
    return Lengths(prompt=options.prompt_tokens, answer=options.answer_tokens)


# --- preflight -------------------------------------------------------------------------------------------------------


def add_preflight(verbs) -> None:
    verb = verbs.add_parser("preflight", help="look at the nodes of a job before it trains; run it by srun, then judge")
    verb.add_argument("config", type=Path, metavar="CONFIG.yaml", help="or, with --judge, the --output of a preflight")
    verb.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="on top of the YAML")
    verb.add_argument("--output", type=Path, metavar="DIR", help="directory for one report per node, shared by all")
    verb.add_argument("--timeout-seconds", type=float, default=300.0, metavar="N", help="limit of each single wait")
    verb.add_argument("--no-all-reduce", action="store_true", help="only look at each node by itself")
    verb.add_argument("--judge", action="store_true", help="read the reports, print a table, write DIR/bad_nodes")
    verb.add_argument("--nodes", metavar="N|NAMES", help="with --judge: how many, or $SLURM_JOB_NODELIST")
    verb.add_argument("--min-free-gb", type=float, default=1.0, metavar="F", help="in run.directory and TMPDIR")
    verb.add_argument("--min-bandwidth-gb-s", type=float, default=0.0, metavar="F", help="bus bandwidth over all ranks")
    verb.set_defaults(run=_preflight)


def _preflight(options: argparse.Namespace) -> int:
    from megatron_polar.launch.judge import Limits
    from megatron_polar.launch.preflight import judge_directory, look_at_node, parse_nodes

    limits = Limits(min_free_gb=options.min_free_gb, min_bandwidth_gb_s=options.min_bandwidth_gb_s)
    expected = None if options.nodes is None else parse_nodes(options.nodes)
    if options.judge:
        return judge_directory(options.output or options.config, expected=expected, limits=limits)
    if options.output is None or not options.timeout_seconds > 0:
        raise UserError(
            f"preflight: --output {options.output}, --timeout-seconds {options.timeout_seconds:g}: it needs a "
            f"directory for the reports that all nodes share, and a limit above 0"
        )
    from megatron_polar.config.load import load_config

    place = look_at_node(
        load_config(options.config, options.overrides),
        output=options.output,
        timeout_seconds=options.timeout_seconds,
        with_all_reduce=not options.no_all_reduce,
    )
    if place.world_size > 1:  # more nodes than this may have to be judged, and by somebody who cannot hang
        return DONE
    return judge_directory(options.output, expected=(place.node,), limits=limits)
