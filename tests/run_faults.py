"""`make faults`: every campaign of faults at its full size, a line for each with what was asked and what came out.

`--quick` runs the sizes of CI. `--json FILE` writes all figures. The last line sums up; the exit status is 1 when a
target was missed.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # first: it fixes the number of threads before torch is there
import faults_data
import faults_goodput
import faults_ranks
import faults_safety
import faults_training
import orjson
import torch

SEED = 20261124
ALL_RESUMES = [(k, workers, background) for k in (1, 7, 30, 59) for workers in (0, 2) for background in (False, True)]
FEW_RESUMES = [(1, 0, True), (7, 2, False), (30, 2, True), (59, 0, False)]


@dataclass(frozen=True)
class Campaign:
    """`run(workdir)` gives figures, `target` says in words what they must be, `met` whether they are."""

    name: str
    target: str
    run: Callable[[Path], dict]
    met: Callable[[dict], bool]


def campaigns(corpus: Path, validation: Path, *, quick: bool) -> list[Campaign]:
    """All campaigns, at their full size or that of CI."""
    training, data = faults_training, faults_data
    kills, corruptions, polls = (25, 40, 500) if quick else (200, 250, 10_000)
    return [
        Campaign(
            "exact resume at steps 1, 7, 30, 59 of 60 (dropout, 0 and 2 loader workers, both ways of saving)",
            "0 differing files and rows",
            partial(training.exact_resumes, corpus, cases=FEW_RESUMES if quick else ALL_RESUMES),
            lambda f: (
                f["differing_files"] == f["differing_rows"] == 0 and sorted(set(f["resumed_at"])) == [1, 7, 30, 59]
            ),
        ),
        Campaign(
            f"kill -9, {kills} times, at random and at every fault point",
            "all recover by themselves, end bit-identical, lose at most one interval",
            partial(training.kills, corpus, validation, count=kills, seed=SEED),
            lambda f: (
                f["kills"] == kills
                and f["recovered"] == f["identical"] == f["runs"]
                and f["lost_too_much"] == f["silent_restarts"] == 0
            ),
        ),
        Campaign(
            "reshard DP2 → TP2 → PP2 → DP4",
            "same samples, 0 differing tensors, losses within 1e-5",
            partial(training.reshard, corpus),
            lambda f: (
                f["same_samples"] and f["differing_tensors"] == 0 and f["largest_relative_loss_difference"] <= 1e-5
            ),
        ),
        Campaign(
            "three epochs through 10 kills and 2 reshards",
            "every document exactly once an epoch",
            partial(training.epochs_through_kills, corpus, seed=SEED),
            lambda f: f["documents_not_used_exactly_once"] == 0 and (f["kills"], f["reshards"]) == (10, 2),
        ),
        Campaign(
            f"{corruptions} corrupted checkpoints",
            "all found before the first step, named, older checkpoint taken",
            partial(training.checkpoint_corruptions, corpus, count=corruptions, seed=SEED),
            lambda f: f["found"] == f["fell_back"] == f["injected"] == corruptions and f["resumed"] == f["resumes"],
        ),
        Campaign(
            f"{corruptions} corrupted datasets (.bin, .idx, manifest, tokenizer)",
            "all found before the first step, named",
            partial(data.dataset_corruptions, corruptions, seed=SEED),
            lambda f: f["found"] == f["injected"] == corruptions,
        ),
        Campaign(
            f"{polls} looks at `latest` during saves in the background",
            "0 incomplete",
            partial(training.latest_polls, corpus, polls=polls),
            lambda f: f["polls"] == polls and f["incomplete"] == 0 and f["checkpoints_seen"] > 1,
        ),
        *(
            Campaign(
                f"full disk, saving in the {'background' if background else 'foreground'}",
                "ENOSPC and path named, old checkpoint intact, training goes on",
                partial(_disk_full, corpus, background=background),
                lambda f: (
                    f.get("skipped", False)
                    or (
                        f["exit_status"] == 0
                        and bool(f["failed_saves"])
                        and f["names_enospc_and_path"]
                        and f["old_checkpoint_intact_meanwhile"]
                        and f["saved_in_the_end"]
                    )
                ),
            )
            for background in (False, True)
        ),
        Campaign(
            "NaN on one rank of four",
            "skipped everywhere, 0 differing tensors, rank named",
            partial(training.bad_step, corpus),
            lambda f: f["exit_codes"] == [0] * 4 and f["differing_tensors"] == 0 and f["named_rank"] == 2,
        ),
        Campaign(
            "a flipped weight bit on each of four replicas in turn",
            "found within the interval of 5, rank named",
            partial(training.flipped_bits, corpus, interval=5),
            lambda f: f["found"] == f["named"] == f["flips"] == 4 and f["worst_delay_steps"] < 5,
        ),
        Campaign(
            "stopped, killed and hung ranks (time-out 3 s)",
            "job ends within 8 s, rank named, 0 orphans",
            faults_ranks.all_cases,
            lambda f: f["named"] == f["within_timeout_plus_5"] == f["cases"] and f["orphans"] == 0,
        ),
        Campaign(
            "slow ranks",
            "a rank slowed twofold reported within 20 steps, 0 false alarms in 200",
            faults_ranks.straggler_figures,
            lambda f: f["flagged"] == f["slowed"] and f["false_alarms"] == 0,
        ),
        Campaign(
            "malicious files in every place that is read",
            "0 canaries",
            faults_safety.malicious_files,
            lambda f: f["canaries"] == 0 and f["files"] > 0,
        ),
        Campaign(
            "paths and links that lead out",
            "all refused, 0 victims touched",
            faults_safety.path_attacks,
            lambda f: f["refused"] == f["attacks"] and f["victims_touched"] == 0,
        ),
        Campaign(
            f"preprocess killed {15 if quick else 50} times",
            "identical bytes",
            partial(data.preprocess_kills, 15 if quick else 50, seed=SEED),
            lambda f: f["identical"] == f["runs"] <= f["kills"],
        ),
        Campaign(
            "fuzzed JSON lines",
            "every bad line quarantined with file:line, every good one kept",
            partial(data.fuzz_lines, 2000 if quick else 20_000, seed=SEED),
            lambda f: f["quarantined"] == f["bad_lines"] > 0 and f["kept"] == f["good_lines"] and f["wrong_place"] == 0,
        ),
        Campaign(
            "cost of saving, 5M parameters",
            "hashing and stalls at most 5 % of step time at the default interval",
            partial(training.costs, corpus, saves=3 if quick else 5),
            lambda f: max(f["hashing_share_of_step_time"], f["background_stall_share_of_step_time"]) <= 0.05,
        ),
        Campaign(
            "goodput of simulated failure traces",
            "ETTR within 1 % of the simulation's own account and of the analytic one",
            partial(faults_goodput.goodput_traces, seed=SEED, num_traces=20 if quick else 60),
            lambda f: (
                f["accounts_agree"]
                and f["relative_error_to_account"] <= 0.01
                and f["relative_error_to_analytic"] <= (0.02 if quick else 0.01)
            ),
        ),
    ]


def _disk_full(corpus: Path, workdir: Path, *, background: bool) -> dict:
    found = faults_training.disk_full(corpus, workdir, background=background)
    return found if found is not None else {"skipped": True, "reason": "no tmpfs can be mounted here"}


def make_corpora(directory: Path) -> tuple[Path, Path]:
    """A dataset of 80 trajectory groups and one of 40 rankings."""
    from megatron_polar.data.preprocess import preprocess

    tokenizer = conftest.make_tokenizer(directory)
    outputs = []
    for name, write, size in (("train", conftest.write_trajectories, 80), ("held", conftest.write_rankings, 40)):
        source = write(directory / f"{name}.jsonl", num_prompts=size, seed=1)
        preprocess([source], output=directory / name, tokenizer_path=tokenizer)
        outputs.append(directory / name)
    return outputs[0], outputs[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the sizes of CI")
    parser.add_argument("--only", help="campaigns whose name contains this text")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    results, met = [], 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="polar-faults-") as name:
        work = Path(name)
        corpus, validation = make_corpora(work)
        chosen = [
            campaign
            for campaign in campaigns(corpus, validation, quick=options.quick)
            if not options.only or options.only in campaign.name
        ]
        for number, campaign in enumerate(chosen, start=1):
            workdir = work / f"campaign{number}"
            workdir.mkdir()
            begun = time.monotonic()
            figures = campaign.run(workdir=workdir) if isinstance(campaign.run, partial) else campaign.run(workdir)
            ok = bool(campaign.met(figures))
            met += ok
            seconds = time.monotonic() - begun
            results.append({"name": campaign.name, "target": campaign.target, "met": ok, "figures": figures})
            results[-1]["seconds"] = round(seconds, 1)
            print(f"[{number}/{len(chosen)}] {'met   ' if ok else 'MISSED'} {campaign.name}: {campaign.target}")
            print(f"        {orjson.dumps(figures, default=str).decode()}  ({seconds:.0f} s)", flush=True)
    if options.json:
        environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        content = {"environment": environment, "seed": SEED, "quick": options.quick, "campaigns": results}
        options.json.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2, default=str))
    print(f"faults: {met} of {len(results)} targets met in {(time.monotonic() - started) / 60:.1f} minutes")
    return 0 if met == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
