"""`make faults`: every campaign of faults at its full size, a line for each with what was asked and what came out.

`--quick` runs the sizes of CI. `--json FILE` writes all figures. The last line sums up, with campaigns that cannot run
here apart; the exit status is 1 when a target was missed.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # first: it fixes the number of threads before torch is there
import faults_checkpoints
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
    """`run(workdir=...)` gives figures, `target` says in words what they must be, `met` whether they are.

    Figures with `skipped`, a reason, are those of a campaign that cannot run here: neither met nor missed.
    """

    name: str
    target: str
    run: Callable[..., dict]
    met: Callable[[dict], bool]


def campaigns(corpus: Path, validation: Path, *, quick: bool) -> list[Campaign]:
    """All campaigns, at their full size or that of CI."""
    return [
        *training_campaigns(corpus, validation, quick=quick),
        *rank_and_safety_campaigns(corpus),
        *data_campaigns(quick=quick),
    ]


def training_campaigns(corpus: Path, validation: Path, *, quick: bool) -> list[Campaign]:
    """Kills and resumes of whole runs, their checkpoints, and what saving and failures cost."""
    training, checkpoints = faults_training, faults_checkpoints
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
            "all recover by themselves, end bit-identical, lose at most one interval (two with saves in the "
            "background, as one save may be under way when the next falls due)",
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
            lambda f: (
                f["documents_not_used_exactly_once"] == 0
                and (f["kills"], f["reshards"], f["epochs"]) == (10, 2, 3)
                and not any(f["exit_codes_of_the_last"])
            ),
        ),
        Campaign(
            f"{corruptions} corrupted checkpoints",
            "all found before the first step, named, older checkpoint taken",
            partial(checkpoints.checkpoint_corruptions, corpus, count=corruptions, seed=SEED),
            lambda f: f["found"] == f["fell_back"] == f["injected"] == corruptions and f["resumed"] == f["resumes"] > 0,
        ),
        Campaign(
            f"{polls} looks at `latest` during saves in the background",
            "0 incomplete",
            partial(checkpoints.latest_polls, corpus, polls=polls),
            lambda f: f["polls"] == polls and f["incomplete"] == 0 and f["checkpoints_seen"] > 1,
        ),
        *(
            Campaign(
                f"full disk, saving in the {'background' if background else 'foreground'}",
                "ENOSPC and path named, old checkpoint intact, training goes on",
                partial(_disk_full, corpus, background=background),
                _disk_full_met,
            )
            for background in (False, True)
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


def rank_and_safety_campaigns(corpus: Path) -> list[Campaign]:
    """Ranks that compute, hang or dawdle as they should not, and files of somebody who means harm."""
    return [
        Campaign(
            "NaN on one rank of four",
            "skipped everywhere, 0 differing tensors, rank named",
            partial(faults_training.bad_step, corpus),
            lambda f: f["exit_codes"] == [0] * 4 and f["differing_tensors"] == 0 and f["named_rank"] == 2,
        ),
        Campaign(
            "a flipped weight bit on each of four replicas in turn",
            "found within the interval of 5, rank named",
            partial(faults_training.flipped_bits, corpus, interval=5),
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
            "0 canaries, 0 leaks; every file refused in one line or used harmlessly",
            faults_safety.malicious_files,
            lambda f: f["canaries"] == f["leaks"] == 0 and not f["bad"] and f["files"] == f["refused"] + f["used"] > 0,
        ),
        Campaign(
            "paths and links that lead out",
            "all refused, 0 victims touched",
            faults_safety.path_attacks,
            lambda f: f["refused"] == f["attacks"] > 0 and f["victims_touched"] == 0,
        ),
    ]


def data_campaigns(*, quick: bool) -> list[Campaign]:
    """Datasets, the lines that they are made of, and `preprocess`."""
    corruptions, kills = (40, 15) if quick else (250, 50)
    return [
        Campaign(
            f"{corruptions} corrupted datasets (.bin, .idx, manifest, tokenizer)",
            "all found before the first step, named",
            partial(faults_data.dataset_corruptions, corruptions, seed=SEED),
            lambda f: f["found"] == f["injected"] == corruptions,
        ),
        Campaign(
            f"preprocess killed {kills} times",
            "identical bytes",
            partial(faults_data.preprocess_kills, kills, seed=SEED),
            lambda f: f["identical"] == f["runs"] <= f["kills"],
        ),
        Campaign(
            "fuzzed JSON lines",
            "every bad line quarantined with file:line, every good one kept",
            partial(faults_data.fuzz_lines, 2000 if quick else 20_000, seed=SEED),
            lambda f: f["quarantined"] == f["bad_lines"] > 0 and f["kept"] == f["good_lines"] and f["wrong_place"] == 0,
        ),
    ]


def _disk_full(corpus: Path, workdir: Path, *, background: bool) -> dict:
    found = faults_checkpoints.disk_full(corpus, workdir, background=background)
    return found if found is not None else {"skipped": "no tmpfs can be mounted here"}


def _disk_full_met(figures: dict) -> bool:
    good = ("names_enospc_and_path", "old_checkpoint_intact_meanwhile", "saved_in_the_end")
    return figures["exit_status"] == 0 and bool(figures["failed_saves"]) and all(figures[name] for name in good)


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


def judge(campaign: Campaign, figures: dict) -> Literal["met", "MISSED", "skipped"]:
    """What a campaign has shown; one that says why it could not run has shown nothing."""
    if "skipped" in figures:
        return "skipped"
    return "met" if campaign.met(figures) else "MISSED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the sizes of CI")
    parser.add_argument("--only", default="", help="campaigns whose name contains this text")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    results = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="polar-faults-") as name:
        work = Path(name)
        everything = campaigns(*make_corpora(work), quick=options.quick)
        chosen = [campaign for campaign in everything if options.only in campaign.name]
        if not chosen:
            parser.error(f"--only={options.only}: no campaign's name contains this")
        for number, campaign in enumerate(chosen, start=1):
            workdir = work / f"campaign{number}"
            workdir.mkdir()
            begun = time.monotonic()
            figures = campaign.run(workdir=workdir)
            outcome = judge(campaign, figures)
            seconds = time.monotonic() - begun
            results.append({"name": campaign.name, "target": campaign.target, "outcome": outcome, "figures": figures})
            results[-1]["seconds"] = round(seconds, 1)
            print(f"[{number}/{len(chosen)}] {outcome:7} {campaign.name}: {campaign.target}")
            print(f"        {orjson.dumps(figures, default=str).decode()}  ({seconds:.0f} s)", flush=True)
    if options.json:
        environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        content = {"environment": environment, "seed": SEED, "quick": options.quick, "campaigns": results}
        options.json.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2, default=str))
    counts = Counter(result["outcome"] for result in results)
    print(
        f"faults: {counts['met']} of {len(results)} targets met, {counts['MISSED']} missed, {counts['skipped']} "
        f"skipped in {(time.monotonic() - started) / 60:.1f} minutes"
    )
    return 1 if counts["MISSED"] else 0


if __name__ == "__main__":
    sys.exit(main())
