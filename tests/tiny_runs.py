"""Whole training runs of a model with 40 thousand parameters, on forked ranks."""

import dataclasses
import shutil
from pathlib import Path

import orjson
from ranks import run_ranks

from megatron_polar import faults
from megatron_polar.config.schema import (
    CheckpointSection,
    DataSection,
    DatasetSource,
    EvaluationSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunConfig,
    RunSection,
    TrainSection,
)
from megatron_polar.errors import RunStopped, UserError
from megatron_polar.train.run import train

STEPS = 6


def tiny_config(corpus, directory, **changes) -> RunConfig:
    """Six steps of eight comparisons, a checkpoint every three; `changes` are `section__key=value`."""
    config = RunConfig(
        run=RunSection(directory=str(directory), seed=7),
        model=ModelSection(
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2,
            reward_head_init_std=0.1,
            init_method_std=0.1,
        ),
        data=DataSection(
            train=(DatasetSource(str(corpus)),),
            max_tokens_per_micro_batch=300,
            max_sequence_length=256,
            num_workers=0,
        ),
        train=TrainSection(global_batch_size=8, num_steps=STEPS, precision="fp32"),
        # As in test_layouts.py: the larger the rate, the more AdamW's first steps amplify roundings.
        optimizer=OptimizerSection(lr=1e-4, warmup_fraction=0.4),
        checkpoint=CheckpointSection(save_interval=3),
        evaluation=EvaluationSection(interval=3, num_comparisons=20),
        logging=LoggingSection(interval=1, tensorboard=False),
    )
    return change(config, **changes)


def change(config: RunConfig, **changes) -> RunConfig:
    """Replace `section__key=value`; `parallel` is a mapping of sizes."""
    for name, value in changes.items():
        section, _, key = name.partition("__")
        new = ParallelSection(**value) if not key else dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: new})
    return config


def run_training(config: RunConfig, world_size: int = 1) -> dict[str, float]:
    """Train on `world_size` ranks; returns the first rank's last row of metrics."""
    return run_ranks(train, world_size, config)[0]


def train_with(config: RunConfig, fault: str = "") -> tuple[int, str]:
    """Train on this rank, a fork, with a planned fault; returns exit status and message."""
    faults.plan(fault)
    try:
        train(config)
    except RunStopped as stop:
        return stop.status, str(stop)
    return 0, ""


def training_refusal(config: RunConfig, world_size: int = 1) -> str:
    """The message of the UserError with which the run ends on every rank."""
    messages = run_ranks(_refusal, world_size, config)
    assert all(messages), "the run was not refused"
    return messages[0]


def _refusal(config: RunConfig) -> str | None:
    try:
        train(config)
    except UserError as error:
        return str(error)
    return None


def metric_rows(directory) -> list[dict]:
    """Rows of metrics.jsonl with training figures."""
    rows = [orjson.loads(line) for line in (Path(directory) / "metrics.jsonl").read_bytes().splitlines()]
    return [row for row in rows if "rm/loss" in row]


def validation_rows(directory) -> list[dict]:
    """Rows of metrics.jsonl with held-out figures."""
    rows = [orjson.loads(line) for line in (Path(directory) / "metrics.jsonl").read_bytes().splitlines()]
    return [row for row in rows if "validation/rm/loss" in row]


def checkpoint_of(directory, step: int) -> Path:
    return Path(directory) / "checkpoints" / f"step_{step:08d}"


def killed_after(source, target, *, step: int) -> Path:
    """A copy of a run as a kill would leave it: checkpoints up to `step`, metrics beyond it, half a line at the end."""
    shutil.copytree(source, target)
    for path in (Path(target) / "checkpoints").glob("step_*"):
        if path.name > checkpoint_of(target, step).name:
            shutil.rmtree(path)
    (Path(target) / "checkpoints" / "latest").write_text(checkpoint_of(target, step).name + "\n")
    with (Path(target) / "metrics.jsonl").open("ab") as file:
        file.write(b'{"iteration": 7, "rm/lo')
    return Path(target)
