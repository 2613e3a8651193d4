"""Finished runs as the points of a scaling law: size, data, compute and held-out loss of each. No torch.

- N, `parameters`: weights without the embedding, which is looked up and not multiplied; `all_parameters` with it.
- D, `comparisons` that were trained on (steps that were skipped left out), and `tokens` (those steps included), counted
  as the paper does: every comparison as full sequences, prompt and reference once for each candidate.
- C, `flops`: what the run computed, from its own metrics: 2 per weight and physical token and the exact causal area of
  attention, three times for forward and backward (Architecture.forward_flops). Shared prefixes count once, padding
  counts, recomputation does not.
- L, `loss`: mean held-out loss of the evaluations in the last TAIL of the steps, at least the one after the last step.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from megatron_polar.config.load import load_saved_config
from megatron_polar.config.presets import architecture_of, padded_vocab_size
from megatron_polar.config.schema import DatasetSource, RunConfig
from megatron_polar.data.storage import fingerprint_of, read_dataset_manifest
from megatron_polar.errors import UserError
from megatron_polar.manifest import Damaged
from megatron_polar.scaling.items import Items, read_items
from megatron_polar.train.journal import STATUS, done_step, read_events, read_rows

TAIL = 0.05
"""Share of the steps, at their end, whose evaluations are averaged: the weights hardly move there any more."""


@dataclass(frozen=True)
class ScalingRun:
    """One point. None: not known, and laws that need it are not fitted."""

    name: str
    parameters: int
    loss: float
    all_parameters: int | None = None
    comparisons: float | None = None
    tokens: float | None = None
    flops: float | None = None
    seed: int | None = None
    num_evaluations: int | None = None
    held_out: str | None = None
    """What the loss was measured on; losses of different ones cannot be compared."""
    tokenizer: str | None = None
    train_data: str | None = None
    notes: tuple[str, ...] = ()
    items: Items | None = None


def read_run(directory: Path, *, evaluation: str | None = None) -> ScalingRun:
    """Read a run directory. `evaluation` names an output of `evaluate` inside it, whose loss goes before that of the
    training loop. Raises UserError naming the run: not finished, no held-out loss, a loss that is no number."""
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: no config.yaml in it, so it is no run directory; give directories of `train`")
    config = load_saved_config(directory / "config.yaml")
    last_step = _last_step(directory, config=config)
    environment = _read_json(directory / "environment.json")
    architecture = architecture_of(config.model)
    rows = read_rows(directory)
    if not rows or rows[-1]["iteration"] != last_step:
        raise UserError(f"{directory}: metrics.jsonl does not reach step {last_step}, the run's last; train it again")
    skipped = int(rows[-1].get("reliability/skipped_steps", 0))
    items = read_items(directory / evaluation) if evaluation is not None else None
    if items is None:
        loss, num_evaluations = _held_out_loss(directory, last_step=last_step)
        held_out = _held_out_data(directory, config=config, environment=environment)
    else:
        loss, num_evaluations, held_out = items.loss, None, items.identity
    embedding_rows = environment.get("embedding_rows") or _embedding_rows(config)
    return ScalingRun(
        name=str(directory),
        parameters=architecture.num_parameters(0),
        all_parameters=architecture.num_parameters(embedding_rows) if embedding_rows else None,
        comparisons=(last_step - skipped) * config.train.global_batch_size,
        tokens=_total(rows, "tokens/logical_per_s", directory=directory),
        flops=_flops(rows, directory=directory, environment=environment),
        loss=loss,
        seed=config.run.seed,
        num_evaluations=num_evaluations,
        held_out=held_out,
        tokenizer=environment.get("tokenizer") or _manifest(config.data.train, run=directory)["tokenizer"],
        train_data=_joined(environment.get("train_data")),
        notes=(f"{skipped} of {last_step} steps were skipped",) if skipped else (),
        items=items,
    )


def _read_json(path: Path) -> dict:
    try:
        content = orjson.loads(path.read_bytes()) if path.is_file() else {}
    except orjson.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not what `train` writes there; train the run again, or leave it out")
    return content


# --- Steps, tokens, FLOPs --------------------------------------------------------------------------------------------


def _last_step(directory: Path, *, config: RunConfig) -> int:
    """The step after which the run was done."""
    status = _read_json(directory / STATUS)
    state, step = status.get("state"), status.get("step")
    if state in ("refused", "interrupted", "failed"):  # maybe a later command, that ended before it trained anything
        done_at = done_step(read_events(directory))
        state, step = ("done", done_at) if done_at is not None else (state, step)
    wanted = config.train.num_steps
    if state != "done" or type(step) is not int or (wanted is not None and step != wanted):
        of = f" of {wanted}" if wanted is not None else ""
        where = f"its status is {state!r} at step {step}{of}" if status else f"it has no {STATUS}"
        raise UserError(
            f"{directory}: the run is not finished ({where}), and its loss is not that of a whole schedule; train it "
            f"to the end, or leave it out"
        )
    return step


def _seconds(rows: Sequence[dict]) -> list[float]:
    """Of the steps that each row stands for."""
    before = [0, *(row["iteration"] for row in rows[:-1])]
    return [row["iteration-time"] * (row["iteration"] - last) for row, last in zip(rows, before, strict=True)]


def _total(rows: Sequence[dict], rate: str, *, directory: Path, factors: Sequence[float] | None = None) -> float:
    rates = [row.get(rate) for row in rows]
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in rates):
        raise UserError(f"{directory}/metrics.jsonl: {rate} is missing or no number in some rows; train the run again")
    factors = factors or [1.0] * len(rows)
    return float(sum(r * s * f for r, s, f in zip(rates, _seconds(rows), factors, strict=True)))


def _flops(rows: Sequence[dict], *, directory: Path, environment: dict) -> float:
    """`throughput` is TFLOP/s of a rank, and a restart may have changed the number of ranks."""
    starts = [event for event in read_events(directory) if event["event"] == "start" and "world_size" in event]
    worlds = []
    for row in rows:
        before = [start["world_size"] for start in starts if start.get("step", 0) < row["iteration"]]
        worlds.append(before[-1] if before else environment.get("world_size"))
    if not all(isinstance(world, int) and world > 0 for world in worlds):
        raise UserError(f"{directory}: neither events.jsonl nor environment.json says how many ranks it ran on")
    return 1e12 * _total(rows, "throughput", directory=directory, factors=worlds)


def _embedding_rows(config: RunConfig) -> int | None:
    """Of a run that did not write it down: from the YAML, or from the dataset if it is still there."""
    model = config.model
    try:
        vocab_size = model.vocab_size or _manifest(config.data.train)["vocab_size"]
    except UserError:
        return None
    return padded_vocab_size(vocab_size, multiple=model.make_vocab_size_divisible_by)


# --- Held-out loss ---------------------------------------------------------------------------------------------------


def _held_out_loss(directory: Path, *, last_step: int) -> tuple[float, int]:
    """Mean over the evaluations of the tail, and how many they are."""
    losses: dict[int, object] = {}
    for line in (directory / "metrics.jsonl").read_bytes().splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue  # half a line, cut off by a kill
        if isinstance(row, dict) and type(row.get("iteration")) is int and "validation/rm/loss" in row:
            losses[row["iteration"]] = row["validation/rm/loss"]
    tail = {step: loss for step, loss in losses.items() if (1 - TAIL) * last_step < step <= last_step}
    if last_step not in tail:
        raise UserError(
            f"{directory}: no held-out loss after its last step {last_step}; train with data.validation and "
            f"evaluation.interval above 0, or give --evaluation NAME for an output of `evaluate` in each run"
        )
    for step, loss in tail.items():  # NaN is null in metrics.jsonl
        if not isinstance(loss, int | float) or not 0 < loss < math.inf:
            raise UserError(
                f"{directory}: held-out loss at step {step} is {'NaN' if loss is None else loss}, so the run has "
                f"diverged; leave it out, or train it again with a lower optimizer.lr"
            )
    return float(np.mean(list(tail.values()))), len(tail)


def _held_out_data(directory: Path, *, config: RunConfig, environment: dict) -> str:
    """What decides which comparisons the loss is a mean over, but for the seed of their draw."""
    data = config.data
    fingerprints = _joined(environment.get("validation_data")) or _manifest(data.validation, run=directory)["data"]
    weights = [source.weight for source in data.validation]
    parts = (
        f"data {fingerprints}",
        f"weights {weights}",
        f"K {data.candidates_per_comparison}",
        f"data.max_sequence_length {data.max_sequence_length}",
        f"evaluation.num_comparisons {config.evaluation.num_comparisons}",
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _manifest(sources: Sequence[DatasetSource], *, run: Path | None = None) -> dict:
    """Fingerprints of datasets at their places, for runs from before `environment.json` had them."""
    fingerprints, manifest = [], {}
    for source in sources:
        try:
            manifest = read_dataset_manifest(Path(source.path))
        except (Damaged, OSError) as error:
            raise UserError(
                f"{run}: environment.json does not say which data it was, and {source.path} cannot be read ({error}), "
                f"so it cannot be told whether its loss compares with others; put the data back, or give a table"
            ) from None
        fingerprints.append(fingerprint_of(manifest))
    tokenizer = manifest.get("tokenizer", {})
    return {
        "data": _joined(fingerprints),
        "tokenizer": tokenizer.get("fingerprint"),
        "vocab_size": tokenizer.get("vocab_size"),
    }


def _joined(fingerprints: object) -> str | None:
    return " ".join(map(str, fingerprints)) if isinstance(fingerprints, list) and fingerprints else None
