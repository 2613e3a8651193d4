"""train(config): build, resume, loop. Reads as the table of contents of a run."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch

import megatron_polar
from megatron_polar import log
from megatron_polar.config.load import dump_config
from megatron_polar.config.presets import architecture_of
from megatron_polar.config.schema import DataSection, RunConfig
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.loader import RowShape, StepDataset, load_steps, row_shape
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.model.build import BuiltModel, build_model
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import Device, make_deterministic, select_device
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.checkpoint import (
    TrainingState,
    agree_on_checkpoint,
    layout_of,
    load_training,
    load_weights,
    read_state,
    save_checkpoint,
)
from megatron_polar.train.evaluation import evaluate_held_out
from megatron_polar.train.metrics import Metrics, StepTimer, peak_tflops
from megatron_polar.train.optimizer import (
    MegatronOptimizer,
    OptimizerParamScheduler,
    build_optimizer,
    build_schedule,
    current_learning_rate,
)
from megatron_polar.train.step import StepResult, train_step


@dataclass(frozen=True)
class Data:
    """Training and held-out comparisons, the shape of their rows, and the tokenizer that travels with checkpoints."""

    train: ComparisonDataset
    validation: ComparisonDataset | None
    shape: RowShape
    tokenizer_directory: Path
    vocab_size: int


@dataclass(frozen=True)
class Run:
    """Everything that a run is made of."""

    config: RunConfig
    device: Device
    topology: Topology
    data: Data
    model: BuiltModel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    num_steps: int

    @property
    def directory(self) -> Path:
        return Path(self.config.run.directory)


def train(config: RunConfig) -> dict[str, float]:
    """Train to the last step of `config`, resuming where the run directory stands. Returns the last row of metrics."""
    run = _build(config)
    start = _start(run)
    run.schedule.step(increment=start)
    _announce(run)
    metrics = _open_metrics(run, resumed_at=start)
    dataset = StepDataset(
        run.data.train,
        global_batch_size=config.train.global_batch_size,
        rank=run.topology.dp_rank,
        shape=run.data.shape,
    )
    with log.Progress("training", total=run.num_steps, unit="steps", quiet=not log.on_terminal()) as bar:
        bar.advance(start)
        timer = StepTimer()
        for step in load_steps(dataset, start=start, stop=run.num_steps, data=config.data):
            learning_rate = current_learning_rate(run.optimizer)
            result = train_step(
                run.model,
                optimizer=run.optimizer,
                micro_batches=step.micro_batches,
                topology=run.topology,
                device=run.device,
            )
            run.schedule.step(increment=1)
            run.device.synchronize()
            _check_finite(result, run=run, step=step.number + 1)
            metrics.add(step, result, seconds=timer.lap())
            done = step.number + 1
            if done % config.logging.interval == 0 or done == run.num_steps:
                metrics.write(
                    done,
                    learning_rate=learning_rate,
                    global_batch_size=config.train.global_batch_size,
                    memory_bytes=run.device.memory_allocated(),
                )
            if run.data.validation is not None and _due(done, config.evaluation.interval, last=run.num_steps):
                _evaluate(run, metrics=metrics, step=done)
            if _due(done, config.checkpoint.save_interval, last=run.num_steps):
                _save(run, step=done)
            bar.advance()
            timer.lap()
    metrics.close()
    return metrics.last_row


def _build(config: RunConfig) -> Run:
    device = select_device(config.run.device, local_rank=ranks.local_rank())
    if config.run.deterministic:
        make_deterministic(device)
    topology = ranks.initialize(config.parallel, device=device)
    ranks.seed_ranks(topology, seed=config.run.seed)
    data = open_data(config, topology=topology)
    num_steps = count_steps(config, data=data)
    model = build_model(config, topology=topology, device=device, vocab_size=data.vocab_size)
    optimizer = build_optimizer(config.optimizer, model=model)
    schedule = build_schedule(config.optimizer, optimizer=optimizer, num_steps=num_steps)
    return Run(config, device, topology, data, model, optimizer, schedule, num_steps)


def _open_metrics(run: Run, *, resumed_at: int) -> Metrics:
    return Metrics(
        run.directory,
        num_steps=run.num_steps,
        num_ranks=run.topology.dp_size,
        world_size=run.topology.world_size,
        architecture=run.model.architecture,
        peak_tflops=peak_tflops(run.device.name, run.config.logging.hardware_peak_tflops),
        tensorboard=run.config.logging.tensorboard,
        resumed_at=resumed_at,
    )


def _due(step: int, interval: int, *, last: int) -> bool:
    return interval > 0 and (step % interval == 0 or step == last)


def _check_finite(result: StepResult, *, run: Run, step: int) -> None:
    """Stop before a checkpoint of broken weights is written."""
    loss = result.sums["loss"]
    if not (math.isfinite(loss) and math.isfinite(result.grad_norm)):
        raise UserError(
            f"iteration {step}: loss sum {loss}, gradient norm {result.grad_norm}: not finite, so the weights are "
            f"lost; lower optimizer.lr={run.config.optimizer.lr}, then start again from the last checkpoint in "
            f"{run.directory}"
        )


def _evaluate(run: Run, *, metrics: Metrics, step: int) -> None:
    timer = StepTimer()
    sums = evaluate_held_out(
        run.model,
        comparisons=run.data.validation,
        config=run.config,
        shape=run.data.shape,
        topology=run.topology,
        device=run.device,
    )
    metrics.write_validation(step, sums, seconds=timer.lap())


def _save(run: Run, *, step: int) -> None:
    state = TrainingState(
        step=step,
        consumed_comparisons=step * run.config.train.global_batch_size,
        data_fingerprint=run.data.train.fingerprint,
        max_response_length=min(c.manifest["settings"]["max_response_length"] for c in run.data.train.corpora),
        layout=layout_of(run.topology),
        backend=run.device.backend,
    )
    save_checkpoint(
        run.directory,
        state=state,
        model=run.model,
        optimizer=run.optimizer,
        topology=run.topology,
        config_yaml=dump_config(run.config),
        tokenizer_directory=run.data.tokenizer_directory,
        keep=run.config.checkpoint.keep,
    )


def _start(run: Run) -> int:
    """Resume, start from a checkpoint's weights, or start afresh; returns the number of finished steps."""
    config = run.config
    checkpoint = agree_on_checkpoint(run.directory, topology=run.topology, required=False)
    if checkpoint is not None:
        if not config.checkpoint.resume:
            raise UserError(
                f"{run.directory} has checkpoints and checkpoint.resume=false; choose another run.directory, or resume"
            )
        _check_same_data(checkpoint, run=run)
        state = load_training(checkpoint, model=run.model, optimizer=run.optimizer, topology=run.topology)
        rest = "" if state.step < run.num_steps else "; all steps are done, nothing is left to train"
        log.info(f"resumed from {checkpoint} at step {state.step}{rest}")
        return state.step
    if config.train.init_from is not None:
        checkpoint = agree_on_checkpoint(config.train.init_from, topology=run.topology)
        tokenizer = load_tokenizer(checkpoint / "tokenizer")
        for corpus in run.data.train.corpora:
            corpus.check_tokenizer(tokenizer)
        load_weights(checkpoint, model=run.model)
        run.optimizer.reload_model_params()
        log.info(f"starting from the weights of {checkpoint}")
    return 0


def _check_same_data(checkpoint: Path, *, run: Run) -> None:
    state = read_state(checkpoint)
    consumed = state.step * run.config.train.global_batch_size
    if state.data_fingerprint != run.data.train.fingerprint or state.consumed_comparisons != consumed:
        raise UserError(
            f"{checkpoint}: was trained on other data, or with another seed or batch size (data fingerprint "
            f"{state.data_fingerprint[:12]}, now {run.data.train.fingerprint[:12]}; {state.consumed_comparisons} "
            f"comparisons consumed, now {consumed}); use {checkpoint}/config.yaml, or start a new run with "
            f"train.init_from"
        )


def _announce(run: Run) -> None:
    """Say once what runs, and write the resolved configuration: the file that rebuilds the run."""
    config, model, layout = run.config, run.model, layout_of(run.topology)
    if run.topology.rank == 0:
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / "config.yaml").write_text(dump_config(config))
        environment = {
            "megatron_polar": megatron_polar.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": run.device.name,
            "world_size": run.topology.world_size,
        }
        (run.directory / "environment.json").write_bytes(orjson.dumps(environment | layout, option=orjson.OPT_INDENT_2))
    torch.distributed.barrier()
    parameters = model.architecture.num_parameters(model.vocab_size)
    optimizer = "distributed AdamW" if config.optimizer.use_distributed_optimizer else "AdamW"
    log.info(
        f"model: {parameters / 1e6:.2f}M parameters, {config.train.precision}; layers: {model.transformer_impl}; "
        f"attention: {model.attention}; optimizer: {optimizer}"
    )
    log.info(
        f"ranks: {run.topology.world_size} x {run.device.name} over {run.device.backend}; "
        f"{', '.join(f'{name}={size}' for name, size in layout.items())}"
    )
    log.info(
        f"data: {len(run.data.train)} comparisons an epoch, layout {config.data.layout}, {config.data.num_workers} "
        f"loader workers; {run.num_steps} steps of {config.train.global_batch_size} comparisons"
    )


def open_data(config: RunConfig, *, topology: Topology) -> Data:
    """Open the datasets, check that they were made with one tokenizer, and derive the shape of rows."""
    section = config.data
    train_data = _comparisons(section, section.train, seed=config.run.seed)
    validation = _comparisons(section, section.validation, seed=config.run.seed + 1) if section.validation else None
    tokenizer_directory = Path(section.train[0].path) / "tokenizer"
    tokenizer = load_tokenizer(section.tokenizer or tokenizer_directory)
    for dataset in [train_data] + ([validation] if validation else []):
        for corpus in dataset.corpora:
            corpus.check_tokenizer(tokenizer)
    _check_lengths([train_data, *([validation] if validation else [])], section.max_sequence_length)
    shape = row_shape(section, topology=topology, architecture=architecture_of(config.model))
    return Data(train_data, validation, shape, tokenizer_directory, tokenizer.vocab_size)


def _check_lengths(datasets: Sequence[ComparisonDataset], max_sequence_length: int) -> None:
    """Two answers and the control tokens must fit, or some comparison would fail in the middle of the run."""
    corpora = [corpus for dataset in datasets for corpus in dataset.corpora]
    corpus = max(corpora, key=lambda corpus: corpus.manifest["invariants"]["longest_response"])
    longest = corpus.manifest["invariants"]["longest_response"]
    if 2 * longest + 4 > max_sequence_length:
        raise UserError(
            f"data.max_sequence_length={max_sequence_length} cannot hold two answers of {corpus.path}, whose longest "
            f"has {longest} tokens; set at least {2 * longest + 4}, or preprocess with a smaller --max-response-length"
        )


def _comparisons(section: DataSection, sources, *, seed: int) -> ComparisonDataset:
    return ComparisonDataset(
        sources,
        seed=seed,
        candidates_per_comparison=section.candidates_per_comparison,
        max_sequence_length=section.max_sequence_length,
    )


def count_steps(config: RunConfig, *, data: Data) -> int:
    """Optimizer steps of the run: `train.num_steps`, or `train.num_epochs` over the training comparisons."""
    if config.train.num_steps is not None:
        return config.train.num_steps
    steps = int(config.train.num_epochs * len(data.train) / config.train.global_batch_size)
    if steps < 1:
        raise UserError(
            f"train.num_epochs={config.train.num_epochs} over {len(data.train)} comparisons is less than one step of "
            f"train.global_batch_size={config.train.global_batch_size}; lower the batch size or add data"
        )
    return steps
