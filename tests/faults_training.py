"""Campaigns of faults against whole training runs: kills, resumes, reshards, bad steps; what saving costs.

Each function is deterministic by its seed, prints nothing and returns figures; tests call it with small counts,
`make faults` with the full ones.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
from ranks import become_rank, free_port, run_ranks
from tiny_runs import change, checkpoint_of, metric_rows, tiny_config

from megatron_polar import faults
from megatron_polar.config.schema import ParallelSection, RunConfig
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.corpus import Corpus
from megatron_polar.errors import MACHINE_DIFFERS, RunStopped, UserError
from megatron_polar.manifest import MANIFEST, file_entry
from megatron_polar.train import run as run_module
from megatron_polar.train.build import build_run, join_ranks
from megatron_polar.train.checkpoint import Checkpointer
from megatron_polar.train.checkpoint_files import find_checkpoint, list_steps, read_state
from megatron_polar.train.journal import read_events
from megatron_polar.train.lock import RunLock
from megatron_polar.train.state_dict import load_training

_FORK = multiprocessing.get_context("fork")
LAYOUT_CHAIN = (
    ("DP2", 2, {}),
    ("TP2", 2, {"tensor_model_parallel_size": 2}),
    ("PP2", 2, {"pipeline_model_parallel_size": 2}),
    ("DP4", 4, {}),
)


# --- A job that may die ----------------------------------------------------------------------------------------------


def start_job(config: RunConfig, *, world_size: int = 1, fault: str = "", body=None) -> list:
    """Fork the ranks of one training job with a planned fault; returns their processes."""
    port = free_port()
    processes = [
        _FORK.Process(target=_rank, args=(config, fault, rank, world_size, port, body)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def run_job(config: RunConfig, *, world_size: int = 1, fault: str = "", kill_after: float | None = None, body=None):
    """Run a job to its end or its death (`kill_after` seconds, all ranks at once); returns the exit codes."""
    processes = start_job(config, world_size=world_size, fault=fault, body=body)
    deadline = time.monotonic() + (kill_after if kill_after is not None else 120)
    while any(process.is_alive() for process in processes):
        dead = any(process.exitcode not in (None, 0) for process in processes)
        if dead and kill_after is None:
            deadline = min(deadline, time.monotonic() + 10)  # the others notice, or a launcher would end them
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.005)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _rank(config: RunConfig, fault: str, rank: int, world_size: int, port: int, body) -> None:
    become_rank(rank, world_size, port)
    log = log_of(config)
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = log.open("a", buffering=1)  # pytest has its own in their place
    for descriptor in (1, 2):
        os.dup2(sys.stderr.fileno(), descriptor)
    try:
        faults.plan(fault)
        (body or run_module.train)(config)
        status = 0
    except RunStopped as stop:
        print(stop, file=sys.stderr)
        status = stop.status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 1
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def log_of(config: RunConfig) -> Path:
    """Where the ranks' output goes: beside the run directory, or beside the small disk that it is on."""
    run = Path(config.run.directory)
    return (run.parent if os.path.ismount(run.parent) else run).with_suffix(".log")


def shards(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of everything in a checkpoint that training has written: weights, optimizer, generators."""
    files = orjson.loads((checkpoint / MANIFEST).read_bytes())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith((".distcp", "common.pt"))}


def curve(directory: Path) -> list[tuple]:
    """What metrics.jsonl says of every step, but for times."""
    keys = ("iteration", "rm/loss", "rm/accuracy", "grad-norm", "learning-rate", "consumed-samples")
    return [tuple(row[key] for key in keys) for row in metric_rows(directory)]


def last_start(directory: Path) -> int:
    """The step from which the newest process of a run went on."""
    return [event["step"] for event in read_events(directory) if event["event"] == "start"][-1]


# --- Exact resume ----------------------------------------------------------------------------------------------------


def exact_resumes(corpus: Path, workdir: Path, *, cases: list[tuple[int, int, bool]], steps: int = 60) -> dict:
    """Kill a run behind a checkpoint of step k, resume, and compare all bits with the run that was never interrupted.

    `cases` are (k, loader workers, background saves); dropout is on throughout.
    """
    config = tiny_config(
        corpus,
        workdir / "whole",
        train__num_steps=steps,
        model__hidden_dropout=0.1,
        checkpoint__save_interval=1000,
        evaluation__interval=0,
    )
    run_job(config)
    wanted, wanted_curve = shards(checkpoint_of(workdir / "whole", steps)), curve(workdir / "whole")
    figures = {"resumes": 0, "differing_files": 0, "differing_rows": 0, "resumed_at": []}
    for number, (stop, workers, background) in enumerate(cases):
        changes = {"data__num_workers": workers, "checkpoint__async_save": background}
        stopped = change(config, run__directory=str(workdir / f"case{number}"), **changes)
        saving = change(stopped, checkpoint__save_interval=stop)
        run_job(saving, fault="before_save:2=kill")  # the first save, of step k, has been published by then
        run_job(stopped)
        directory = workdir / f"case{number}"
        found = shards(checkpoint_of(directory, steps))
        figures["resumes"] += 1
        figures["differing_files"] += sum(found.get(name) != digest for name, digest in wanted.items())
        figures["differing_rows"] += sum(a != b for a, b in zip(wanted_curve, curve(directory), strict=True))
        figures["resumed_at"].append(last_start(directory))
        shutil.rmtree(directory)
    return figures


# --- Kills -----------------------------------------------------------------------------------------------------------

STEPS, INTERVAL = 12, 3
_WRITING = ("before_save", "before_shard", "in_shard", "after_shard", "before_manifest", "after_manifest")
_PUBLISHING = ("before_publish", "after_publish", "before_latest", "after_latest", "in_prune", "after_save")
_TRAINING = ("start", "data", "loss", "gradient", "before_update", "after_update", "step_end", "evaluation")


def kills(corpus: Path, validation: Path, workdir: Path, *, count: int, seed: int) -> dict:
    """Kill training `count` times with SIGKILL, each time start it again, and compare the end with an undisturbed run.

    A run that ends before its random moment is compared as well, but is not one of the `count`.
    Of ten kills four hit the writing of a checkpoint, two its publication, one a write in the background, one the rest
    of training, and two a random moment. Jobs have one rank, every fourth has two.
    """
    choose = random.Random(seed)
    wanted = {}
    seconds = {}
    for world_size in (1, 2):
        config = _kill_config(corpus, validation, workdir / f"whole{world_size}", background=False)
        started = time.monotonic()
        run_job(config, world_size=world_size)
        seconds[world_size] = time.monotonic() - started
        directory = workdir / f"whole{world_size}"
        wanted[world_size] = (shards(checkpoint_of(directory, STEPS)), curve(directory))
    figures = Counter(
        runs=0, kills=0, recovered=0, identical=0, lost_too_much=0, silent_restarts=0, in_writing=0, in_publishing=0
    )
    figures.update(in_background=0, in_training=0, at_random=0)
    figures.update(most_steps_lost_foreground=0, most_steps_lost_background=0)
    failures: list[str] = []
    while figures["kills"] < count and figures["runs"] < 2 * count:
        number = figures["runs"]
        world_size = 2 if number % 4 == 3 else 1
        kind, fault, moment, background = _choose_kill(choose, number, typical=seconds[world_size])
        directory = workdir / f"kill{number}"
        config = _kill_config(corpus, validation, directory, background=background)
        codes = run_job(config, world_size=world_size, fault=fault, kill_after=moment)
        landed = moment is not None or _planned_kills(config) > 0  # else it hung, and the harness ended it
        landed = landed and -signal.SIGKILL in codes
        figures["kills"] += landed
        figures[kind] += landed
        before = _published(directory)
        again = run_job(config, world_size=world_size)
        figures["recovered"] += not any(again)
        figures["runs"] += 1
        if any(again):
            failures.append(f"{number}, {kind} {fault}: {again}: {log_of(config).read_text()[-500:]}")
            continue
        found = (shards(checkpoint_of(directory, STEPS)), curve(directory))
        figures["identical"] += found == wanted[world_size]
        starts = [event for event in read_events(directory) if event["event"] == "start"]
        if len(starts) > 1:
            lost, most = starts[-1].get("lost_steps", 0), f"most_steps_lost_{'back' if background else 'fore'}ground"
            figures[most] = max(figures[most], lost)
            # In the background one more save may have been under way when the next fell due.
            figures["lost_too_much"] += lost > INTERVAL * (2 if background else 1)
            figures["silent_restarts"] += starts[-1]["step"] < before
        shutil.rmtree(directory)
    return {**figures, "interval": INTERVAL, "failures": failures}


def _planned_kills(config: RunConfig) -> int:
    """How many ranks and writers of a run's jobs have come to a planned kill so far."""
    return log_of(config).read_text().count("POLAR_FAULT: kill")


def _kill_config(corpus: Path, validation: Path, directory: Path, *, background: bool) -> RunConfig:
    from megatron_polar.config.schema import DatasetSource

    return tiny_config(
        corpus,
        directory,
        data__validation=(DatasetSource(str(validation)),),
        train__num_steps=STEPS,
        model__hidden_dropout=0.1,
        checkpoint__save_interval=INTERVAL,
        checkpoint__keep=2,
        checkpoint__async_save=background,
        evaluation__interval=5,
    )


def _choose_kill(choose: random.Random, number: int, *, typical: float) -> tuple[str, str, float | None, bool]:
    """Kind of kill, planned fault, random moment in seconds, saves in the background."""
    turn = number % 10
    rank = "@0" if turn in (4, 5) else ""
    if turn < 4:
        return "in_writing", f"{choose.choice(_WRITING)}:{choose.randint(1, 4)}=kill", None, False
    if turn < 6:
        return "in_publishing", f"{choose.choice(_PUBLISHING)}:{choose.randint(1, 4)}{rank}=kill", None, turn == 5
    if turn == 6:
        return "in_background", f"{choose.choice(_WRITING[1:4])}:1=kill_parent", None, True
    if turn == 7:
        point = choose.choice(_TRAINING)
        return (
            "in_training",
            f"{point}:{1 if point in ('start', 'evaluation') else choose.randint(1, 9)}=kill",
            None,
            False,
        )
    return "at_random", "", choose.uniform(0.0, 1.1 * typical), choose.random() < 0.5


def _published(directory: Path) -> int:
    steps = list_steps(directory)
    return int(steps[0].name.removeprefix("step_")) if steps else 0


# --- Other layouts ---------------------------------------------------------------------------------------------------


def reshard(corpus: Path, workdir: Path) -> dict:
    """DP2 → TP2 → PP2 → DP4, three steps in each: weights and optimizer after loading, comparisons, and losses against
    the run that stays with DP2."""
    steps = 3 * len(LAYOUT_CHAIN)
    base = tiny_config(corpus, workdir / "whole", train__num_steps=steps, data__max_tokens_per_micro_batch=4000)
    run_job(base, world_size=2, body=_with_ledger)
    moving = change(base, run__directory=str(workdir / "moving"))
    differing = 0
    for number, (_, world_size, sizes) in enumerate(LAYOUT_CHAIN):
        config = change(moving, parallel=sizes)
        if number:
            saved = find_checkpoint(workdir / "moving")
            again = workdir / f"again{number}"
            run_ranks(_load_and_save, world_size, config, saved, again)
            differing += _differing_tensors(saved, find_checkpoint(again))
        last = 3 * (number + 1)
        fault = "after_update:3=term" if last < steps else ""
        run_job(config, world_size=world_size, fault=fault, body=_with_ledger)
    one, other = (curve(workdir / name) for name in ("whole", "moving"))
    losses = np.array([[a[1], b[1]] for a, b in zip(one, other, strict=True)])
    return {
        "reshards": len(LAYOUT_CHAIN) - 1,
        "differing_tensors": differing,
        "same_samples": read_ledger(workdir / "whole") == read_ledger(workdir / "moving"),
        "largest_relative_loss_difference": float(np.abs(losses[:, 1] / losses[:, 0] - 1).max()),
    }


def _load_and_save(config: RunConfig, saved: Path, target: Path) -> None:
    """Load a checkpoint in this layout and save it again without a step."""
    run = build_run(config, *join_ranks(config))
    with contextlib.redirect_stderr(io.StringIO()):
        load_training(saved, model=run.model, optimizer=run.optimizer, topology=run.topology)
    Checkpointer(
        target,
        section=config.checkpoint,
        model=run.model,
        optimizer=run.optimizer,
        topology=run.topology,
        config_yaml="",
        tokenizer_directory=run.data.tokenizer_directory,
        lock=RunLock(target),
    ).save(read_state(saved), blocking=True)


def _differing_tensors(one: Path, other: Path) -> int:
    first, second = (run_ranks(plain_tensors, 1, path)[0] for path in (one, other))
    assert first.keys() == second.keys()
    return sum(first[name].tobytes() != second[name].tobytes() for name in first)


def plain_tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    """All full tensors of a checkpoint, whatever shards they are in."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_polar.parallel import topology as ranks
    from megatron_polar.parallel.device import select_device

    ranks.initialize(ParallelSection(), device=select_device("cpu", local_rank=0))
    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return {name: tensor.numpy() for name, tensor in tensors.items() if torch.is_tensor(tensor)}


def _with_ledger(config: RunConfig) -> None:
    """Train, and write down which comparisons every finished step of this rank used."""
    original = run_module.train_step
    path = Path(f"{config.run.directory}.ledger.{os.environ['RANK']}")

    def train_step(*arguments, step, **keywords):
        result = original(*arguments, step=step, **keywords)
        with path.open("ab") as file:
            file.write(orjson.dumps({"step": step.number, "indices": step.indices}) + b"\n")
        return result

    run_module.train_step = train_step
    run_module.train(config)


def read_ledger(directory: Path) -> dict[int, list[int]]:
    """Comparisons of each step over all ranks (tensor-parallel ones share theirs); of a step that was done twice, the
    last time counts."""
    steps: dict[int, dict[str, list[int]]] = {}
    for path in sorted(directory.parent.glob(f"{directory.name}.ledger.*")):
        for line in path.read_bytes().splitlines():
            entry = orjson.loads(line)
            used = [index for part in entry["indices"] for index in part]
            steps.setdefault(entry["step"], {}).setdefault(path.suffix, []).append(sorted(used))
    return {step: sorted({index for times in parts.values() for index in times[-1]}) for step, parts in steps.items()}


def epochs_through_kills(corpus: Path, workdir: Path, *, num_kills: int = 10, seed: int = 0) -> dict:
    """Three epochs through `num_kills` kills and two changes of layout: how often was each document used?

    `kills` counts the jobs that a planned kill ended, `reshards` the changes of layout behind which a job went on from
    a checkpoint.
    """
    choose = random.Random(seed)
    length = len(Corpus(corpus))
    steps = 3 * length // 8
    config = tiny_config(
        corpus,
        workdir / "run",
        train__num_steps=steps,
        data__max_tokens_per_micro_batch=4000,
        checkpoint__save_interval=2,
        evaluation__interval=0,
    )
    layouts = [LAYOUT_CHAIN[0], LAYOUT_CHAIN[1], ("single", 1, {})]
    used: dict[int, list[int]] = {}
    landed = reshards = planned = 0
    exit_codes: list[int] = []
    before = layouts[0]
    for number in range(num_kills + 1):
        layout = layouts[number * len(layouts) // (num_kills + 1)]
        _, world_size, sizes = layout
        point = choose.choice(("after_update", "in_shard", "before_publish", "before_latest"))
        passing = choose.randint(2, 4) if point == "after_update" else choose.randint(1, 2)
        fault = f"{point}:{passing}=kill" if number < num_kills else ""
        exit_codes = run_job(change(config, parallel=sizes), world_size=world_size, fault=fault, body=_with_ledger)
        landed += -signal.SIGKILL in exit_codes and _planned_kills(config) > planned
        planned = _planned_kills(config)
        reshards += layout != before and last_start(workdir / "run") > 0
        before = layout
        ledger = read_ledger(workdir / "run")
        if ledger:  # from the step it resumed at; what was done beyond it before is lost
            used = {step: indices for step, indices in used.items() if step < min(ledger)} | ledger
        for path in workdir.glob("run.ledger.*"):
            path.unlink()
    documents = _documents(config, sorted(index for indices in used.values() for index in indices))
    epochs = [Counter(documents[start : start + length]) for start in range(0, len(documents), length)]
    return {
        "kills": landed,
        "exit_codes_of_the_last": exit_codes,
        "reshards": reshards,
        "epochs": len(epochs),
        "documents_not_used_exactly_once": sum(epoch[d] != 1 for epoch in epochs for d in range(length)),
        "orders_differ": documents[:length] != documents[length : 2 * length],
    }


def _documents(config: RunConfig, indices: list[int]) -> list[int]:
    """Which document of the (only) corpus each comparison reads."""
    comparisons = ComparisonDataset(
        config.data.train,
        seed=config.run.seed,
        candidates_per_comparison=2,
        max_sequence_length=config.data.max_sequence_length,
    )
    found: list[int] = []
    corpus = comparisons.corpora[0]
    read = corpus.document

    def document(index: int):
        found.append(index)
        return read(index)

    corpus.document = document
    for index in indices:
        comparisons.comparison(index)
    return found


# --- Bad steps and replicas ------------------------------------------------------------------------------------------


def bad_step(corpus: Path, workdir: Path) -> dict:
    """A NaN in one of four ranks' gradients: skipped by all, every weight and moment as before."""
    config = tiny_config(corpus, workdir / "run", checkpoint__save_interval=1, train__num_steps=4)
    codes = run_job(config, world_size=4, fault="gradient:3@2=nan")
    before, after = (run_ranks(plain_tensors, 1, checkpoint_of(workdir / "run", step))[0] for step in (2, 3))
    (event,) = [event for event in read_events(workdir / "run") if event["event"] == "bad_step"]
    return {
        "exit_codes": codes,
        "tensors": len(before),
        "differing_tensors": sum(before[name].tobytes() != after[name].tobytes() for name in before),
        "named_rank": event["ranks"][0]["rank"],
        "named_step": event["step"],
    }


def flipped_bits(corpus: Path, workdir: Path, *, interval: int = 5) -> dict:
    """A flipped weight bit on one of four replicas, once on each rank: found within the interval, rank named."""
    figures = {"flips": 0, "found": 0, "named": 0, "worst_delay_steps": 0}
    for rank in range(4):
        config = tiny_config(
            corpus,
            workdir / f"run{rank}",
            train__num_steps=3 * interval,
            optimizer__use_distributed_optimizer=False,
            faults__replica_check_interval=interval,
            checkpoint__save_interval=1000,
            evaluation__interval=0,
        )
        flipped = interval + 1 + rank
        codes = run_job(config, world_size=4, fault=f"step_end:{flipped}@{rank}=flip")
        shown = log_of(config).read_text()
        found_at = int(shown.split("weights that must be equal")[0].rsplit("iteration ", 1)[1].split(":")[0])
        figures["flips"] += 1
        figures["found"] += codes == [MACHINE_DIFFERS] * 4
        figures["named"] += f"of rank {rank};" in shown
        figures["worst_delay_steps"] = max(figures["worst_delay_steps"], found_at - flipped)
    return figures


# --- What it costs ---------------------------------------------------------------------------------------------------


def costs(corpus: Path, workdir: Path, *, saves: int = 5) -> dict:
    """Seconds of saving, of hashing within it, and of standing still, beside the seconds of a step.

    A model of 5M parameters, one rank; the default interval is 1,000 steps.
    """
    shape = {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 1024}
    figures = {}
    for background in (False, True):
        config = tiny_config(
            corpus,
            workdir / f"run{background}",
            checkpoint__save_interval=4,
            checkpoint__async_save=background,
            train__num_steps=4 * saves,
            train__global_batch_size=32,
            data__max_tokens_per_micro_batch=4000,
            evaluation__interval=0,
            faults__replica_check_interval=1,
        )
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **shape))
        run_job(config)
        events = [event for event in read_events(workdir / f"run{background}") if event["event"] == "save"]
        name = "background" if background else "foreground"
        figures[f"{name}_save_seconds"] = float(np.median([event["seconds"] for event in events[1:]]))
        figures[f"{name}_stalled_seconds"] = float(np.median([event["stalled_seconds"] for event in events[1:-1]]))
        rows = metric_rows(workdir / f"run{background}")
        figures["step_seconds"] = float(np.median([row["iteration-time"] for row in rows]))
    newest = find_checkpoint(workdir / "runFalse")
    files = orjson.loads((newest / MANIFEST).read_bytes())["files"]
    started = time.perf_counter()
    for name in files:
        file_entry(newest / name)
    hashing = time.perf_counter() - started
    size = sum(entry["size"] for entry in files.values())
    return figures | {
        "checkpoint_bytes": size,
        "hashing_seconds": hashing,
        "hashing_share_of_step_time": hashing / (1000 * figures["step_seconds"]),
        "background_stall_share_of_step_time": figures["background_stalled_seconds"] / (1000 * figures["step_seconds"]),
    }
