"""Check a Slurm job and submit it: what slurm/launch.sh does. No torch.

Checked before a GPU hour is spent: configuration, divisibility, memory by the estimate of `megatron-polar plan`, the
environment, datasets and checkpoints that are named, and what Slurm itself says (sbatch --test-only). Everything that
is wrong is said at once.
"""

import argparse
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from megatron_polar.config.load import load_config
from megatron_polar.config.schema import RunConfig
from megatron_polar.errors import DONE, USER_ERROR, UserError
from megatron_polar.launch.job import BAD_NODES
from megatron_polar.launch.node import installed_version
from megatron_polar.launch.request import Request, Shape, minutes_of, parse_request, shape_of
from megatron_polar.scaling.plan import Cluster, make_plan
from megatron_polar.scaling.table import render_plan

USAGE = """\
Check a job and submit it.
  slurm/launch.sh [--dry-run] [--no-paths] [--chain N] [options of sbatch] JOB.sh|CONFIG.yaml [section.key=value ...]

--dry-run   checks and prints what would be submitted, and stops
--no-paths  opens no dataset, tokenizer or checkpoint: to try account, partition and sizes before there are any
--chain N   N jobs, each of which goes on where the one before it stopped, in place of one that is requeued
Options of sbatch are written as one word: --time=12:00:00, --account=my_project."""
_CHAIN_VARIABLES = ("POLAR_CHAIN", "POLAR_REQUEUE")
_UNREACHABLE = ("Could not establish a configuration source", "Unable to contact slurm controller", "resolve_ctls")


@dataclasses.dataclass(frozen=True)
class Site:
    """What slurm/common.sh knows of the site: how ranks are started, in what, and what a GPU holds."""

    launcher: str
    runtime: str
    ranks_per_node: int | None
    gpu_memory_gb: float
    cpu_partition: str


def submit(request: Request, site: Site) -> None:
    """Check and submit, or in a dry run say what would be submitted. Raises UserError with all that is wrong."""
    if request.config is None:
        _submit_other(request, site)
        return
    shape = shape_of(request, launcher=site.launcher, ranks_per_node=site.ranks_per_node)
    config = load_config(request.config, request.overrides)
    cluster = Cluster(shape.num_nodes, gpus_per_node=shape.num_ranks, gpu_memory_gb=site.gpu_memory_gb)
    plan = make_plan(config, cluster=cluster, with_paths=request.with_paths)
    print(render_plan(plan), flush=True)
    run = Path(config.run.directory).resolve()
    chain = f"polar-{run.name}-{zlib.crc32(os.fsencode(run))}" if request.chain else None
    options = _options(request, shape, site=site, run=run, chain=chain)
    problems = [*plan.problems, *_environment_problems(config, shape, site=site)]
    problems += _ask_slurm(request, options)
    if request.dry_run:
        _say_what_would_be_submitted(request, options)
    refusal = dataclasses.replace(plan, problems=tuple(problems)).refusal(str(request.config))
    if refusal:
        raise refusal
    if request.dry_run:
        return
    series = dict(zip(_CHAIN_VARIABLES, (f"{chain}.{int(time.time())}", "0"), strict=True)) if chain else {}
    for _ in range(request.chain or 1):
        _sbatch([*options, str(request.job), *request.arguments], series)
    print(f"log: slurm/logs/; run: {run}; to stop with a checkpoint: touch {run}/STOP")


def _submit_other(request: Request, site: Site) -> None:
    """A job that trains nothing, with the site's account and the partition for jobs without GPUs."""
    options = list(request.options)
    is_named = any(option.startswith(("--partition=", "-p")) for option in options)
    if site.cpu_partition and request.script.directive("gpus-per-node") is None and not is_named:
        options.append(f"--partition={site.cpu_partition}")
    problems = _ask_slurm(request, options)
    if request.dry_run:
        _say_what_would_be_submitted(request, options)
    if problems:
        raise UserError(f"{request.job}: {problems[0]}")
    if not request.dry_run:
        _sbatch([*options, str(request.job), *request.arguments], {})


# --- Options of sbatch -----------------------------------------------------------------------------------------------


def _options(request: Request, shape: Shape, *, site: Site, run: Path, chain: str | None) -> list[str]:
    """The user's options, and those that follow from the run: its bad nodes, a short job's signal, a chain's name."""
    options = [f"--nodes={shape.num_nodes}"]
    options += [option for option in request.options if not option.startswith(("--nodes=", "--exclude="))]
    if site.launcher == "torchrun" and request.option("ntasks-per-node") is None:
        options.append("--ntasks-per-node=1")
    minutes = minutes_of(request.option("time"))
    is_short = minutes is not None and minutes < 60  # the scripts' signal, 15 minutes before the end, comes at once
    if is_short and request.option("signal") is None:
        options.append(f"--signal=B:USR1@{max(minutes * 15, 30)}")
    excluded = [*filter(None, [request.option("exclude")]), *_bad_nodes(run)]
    if excluded:
        options.append(f"--exclude={','.join(excluded)}")
    if chain is not None:  # jobs of one name and user run one after the other
        options += ["--dependency=singleton", f"--job-name={chain}", "--no-requeue", *_exports(request)]
    return options


def _exports(request: Request) -> list[str]:
    """What brings a chain's variables to its jobs where a site, or its user, keeps those of a shell out of jobs."""
    given = request.option("export") or os.environ.get("SBATCH_EXPORT") or "ALL"
    match given.upper().split(",")[0]:
        case "ALL":
            return []
        case "NONE":  # which, alone, has the login environment read on the node
            return [f"--export={','.join(_CHAIN_VARIABLES)}", "--get-user-env"]
        case "NIL":
            return [f"--export={','.join(_CHAIN_VARIABLES)}"]
        case _:
            return [f"--export={given},{','.join(_CHAIN_VARIABLES)}"]


def _bad_nodes(run: Path) -> list[str]:
    """Nodes that this run has found bad and that Slurm knows: it refuses names that are gone."""
    try:
        bad = sorted(set((run / BAD_NODES).read_text().split()))
        known = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%N"], capture_output=True, text=True, check=False
        )
    except OSError:
        return []
    return [node for node in bad if node in known.stdout.split()]


# --- What is wrong ---------------------------------------------------------------------------------------------------


def _environment_problems(config: RunConfig, shape: Shape, *, site: Site) -> list[str]:
    if not shape.num_gpus:
        return []
    if config.run.device == "cpu":
        print("note: run.device=cpu, so the GPUs of the job will be idle")
        return []
    if site.runtime != "venv":
        return []
    remedy = "set POLAR_VENV to an environment with requirements-gpu.txt, or a container"
    version = installed_version("torch")
    if "+cpu" in (version or ""):
        what = f"torch {version} of {sys.prefix} knows no GPU, and the job would train on CPUs"
        return [f"environment: {what}; {remedy} (for a run on CPUs: run.device=cpu)"]
    insists = config.model.transformer_impl == "transformer_engine"
    if version and insists and not installed_version("transformer-engine"):
        what = f"{sys.prefix} has no transformer-engine, and model.transformer_impl=transformer_engine"
        return [f"environment: {what}; {remedy} (for megatron-core's own layers: model.transformer_impl=local)"]
    return []


def _ask_slurm(request: Request, options: Sequence[str]) -> list[str]:
    Path("slurm/logs").mkdir(parents=True, exist_ok=True)
    command = ["sbatch", "--test-only", *options, str(request.job), *request.arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ["Slurm: there is no sbatch here; run this on a login node of the cluster"]
    said = "; ".join(line for line in (done.stdout + done.stderr).splitlines() if line.strip())
    if done.returncode == 0:
        print(said)
        return []
    if any(words in said for words in _UNREACHABLE):
        return [f"Slurm cannot be reached from here; run this on a login node of the cluster ({said})"]
    hint = ""
    if re.search("account|partition", said, re.IGNORECASE):
        hint = " (slurm/site.env sets SBATCH_ACCOUNT and SBATCH_PARTITION)"
    return [f"Slurm refuses it: {said}{hint}"]


def _say_what_would_be_submitted(request: Request, options: Sequence[str]) -> None:
    times = f" {request.chain} times" if request.chain else ""
    print(f"dry run; would submit{times}: {shlex.join(['sbatch', *options, str(request.job), *request.arguments])}")


def _sbatch(arguments: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(["sbatch", *arguments], env=os.environ | environment, check=False)
    if done.returncode:
        raise UserError(f"sbatch {shlex.join(arguments)}: refused with status {done.returncode}, as it says above")


# --- The command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Called by slurm/launch.sh, from the top of the repository; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m megatron_polar.launch.submit", description=__doc__)
    parser.add_argument("--launcher", default="srun")
    parser.add_argument("--runtime", default="venv")
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--gpu-memory-gb", type=float, default=80.0)
    parser.add_argument("--cpu-partition", default="")
    parser.add_argument("words", nargs="*", help="what slurm/launch.sh was given, after --")
    site = vars(parser.parse_args(arguments))
    words = site.pop("words")
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if words else sys.stderr)
        return DONE if words else USER_ERROR
    try:
        submit(parse_request(words), Site(**site))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main())
