"""A whole run: it learns, writes what it did, evaluates the same comparisons every time, and stops where it should."""

import orjson
import pytest
from ranks import run_ranks
from tiny_runs import (
    STEPS,
    change,
    checkpoint_of,
    metric_rows,
    run_training,
    tiny_config,
    training_refusal,
    validation_rows,
)

from megatron_polar.config.load import load_config
from megatron_polar.config.presets import PRESETS
from megatron_polar.config.schema import DatasetSource
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.steps import Step, StepWork
from megatron_polar.errors import UserError
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import select_device
from megatron_polar.train.build import count_steps, open_data
from megatron_polar.train.evaluation import evaluate_held_out
from megatron_polar.train.gradients import GradientReduction
from megatron_polar.train.guard import StepGuard
from megatron_polar.train.metrics import Metrics
from megatron_polar.train.objective import SUMS
from megatron_polar.train.optimizer import build_optimizer, build_schedule, current_learning_rate
from megatron_polar.train.run import train
from megatron_polar.train.step import StepResult, train_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory, trajectory_corpus, ranking_corpus):
    """A run on two data-parallel ranks with loader workers, TensorBoard and held-out rankings."""
    directory = tmp_path_factory.mktemp("train") / "run"
    config = tiny_config(
        trajectory_corpus,
        directory,
        data__validation=(DatasetSource(str(ranking_corpus)),),
        data__num_workers=1,
        logging__tensorboard=True,
        evaluation__interval=2,
    )
    return config, run_training(config, 2)


def test_a_small_model_learns_what_distinguishes_policies(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        train__num_steps=60,
        train__global_batch_size=16,
        optimizer__lr=5e-3,
        logging__interval=20,
        data__max_tokens_per_micro_batch=2000,
        checkpoint__save_interval=1000,
    )
    run_training(config)
    rows = metric_rows(tmp_path / "run")
    assert rows[0]["rm/loss"] > 0.45
    assert rows[-1]["rm/loss"] < 0.5 * rows[0]["rm/loss"]
    assert rows[-1]["rm/accuracy"] > 0.9


def test_metrics_name_every_step_and_its_figures(finished):
    config, last = finished
    rows = metric_rows(config.run.directory)
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["consumed-samples"] for row in rows] == [8 * i for i in range(1, STEPS + 1)]
    for row in rows:
        assert row["lm loss"] == row["rm/loss"] > 0
        assert row["grad-norm"] > 0
        assert 0 <= row["rm/accuracy"] <= 1
        assert row["tokens/logical_per_s"] > 0
        assert row["rm/margin"] == pytest.approx(row["rm/reward_chosen"] - row["rm/reward_rejected"], abs=1e-12)
        assert "mfu" not in row  # the CPU's peak is not known
    assert last["iteration"] == STEPS
    assert [row["iteration"] for row in validation_rows(config.run.directory)] == [2, 4, 6]


def test_the_run_leaves_its_configuration_environment_and_event_files(finished):
    config, _ = finished
    directory = checkpoint_of(config.run.directory, STEPS).parents[1]
    assert load_config(directory / "config.yaml") == config
    environment = orjson.loads((directory / "environment.json").read_bytes())
    assert environment["world_size"] == environment["dp"] == 2
    assert list((directory / "tensorboard").glob("events*"))
    assert checkpoint_of(directory, 3).is_dir()
    assert checkpoint_of(directory, STEPS).is_dir()


def test_the_learning_rate_warms_up_from_zero_and_ends_at_its_fraction(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=20, optimizer__warmup_fraction=0.25)
    rates = run_ranks(_learning_rates, 1, config)[0]
    assert rates[:6] == pytest.approx([0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4])
    assert rates[5:] == sorted(set(rates[5:]), reverse=True)
    assert rates[20] == pytest.approx(1e-5)


def _build(config):
    from megatron_polar.model.build import build_model

    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(config.parallel, device=device)
    data = open_data(config, topology=topology)
    model = build_model(config, topology=topology, device=device, vocab_size=data.vocab_size)
    reduction = GradientReduction(model, device=device)
    return device, topology, data, model, build_optimizer(config.optimizer, model=model, reduction=reduction)


def _learning_rates(config) -> list[float]:
    *_, optimizer = _build(config)
    schedule = build_schedule(config.optimizer, optimizer=optimizer, num_steps=config.train.num_steps)
    rates = [current_learning_rate(optimizer)]
    for _ in range(config.train.num_steps):
        schedule.step(increment=1)
        rates.append(current_learning_rate(optimizer))
    return rates


def test_weight_decay_spares_norms_biases_and_the_head(tmp_path, trajectory_corpus):
    config = tiny_config(
        trajectory_corpus, tmp_path, optimizer__weight_decay=0.5, optimizer__lr=1e-1, model__add_qkv_bias=True
    )
    shrunk = run_ranks(_weights_after_a_step_without_gradient, 1, config)[0]
    assert {name for name, ratio in shrunk.items() if ratio < 0.99} == {
        name for name in shrunk if not name.endswith("bias") and "norm" not in name and "output_layer" not in name
    }
    assert any("norm" in name for name in shrunk)


def _weights_after_a_step_without_gradient(config) -> dict[str, float]:
    *_, model, optimizer = _build(config)
    schedule = build_schedule(config.optimizer, optimizer=optimizer, num_steps=10)
    for _ in range(4):
        schedule.step(increment=1)
    core = model.cores[0]
    for name, parameter in core.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(1.0)
    optimizer.reload_model_params()
    before = {name: float(parameter.norm()) for name, parameter in core.named_parameters()}
    model.chunks[0].zero_grad_buffer()
    optimizer.zero_grad()
    optimizer.step()
    return {name: float(parameter.norm()) / before[name] for name, parameter in core.named_parameters()}


def test_held_out_figures_do_not_depend_on_when_or_on_how_many_ranks(tmp_path, trajectory_corpus, ranking_corpus):
    config = tiny_config(
        trajectory_corpus,
        tmp_path / "run",
        data__validation=(DatasetSource(str(ranking_corpus)),),
        data__candidates_per_comparison=3,
        evaluation__num_comparisons=33,
    )
    first, second = run_ranks(_evaluate_twice, 1, config)[0]
    assert first == second
    assert first["pairs"] == 33 * 3
    for one, _ in run_ranks(_evaluate_twice, 2, config):
        assert one == pytest.approx(first, rel=1e-5)  # fp32 rows in other micro-batches


def _evaluate_twice(config) -> list[dict[str, float]]:
    device, topology, data, model, _ = _build(config)
    keywords = {"config": config, "shape": data.shape, "topology": topology, "device": device}
    return [evaluate_held_out(model, comparisons=data.validation, **keywords) for _ in range(2)]


def test_evaluating_in_between_changes_nothing_in_training(tmp_path, trajectory_corpus, ranking_corpus):
    losses = []
    for name, validation in (("with", (DatasetSource(str(ranking_corpus)),)), ("without", ())):
        config = tiny_config(
            trajectory_corpus,
            tmp_path / name,
            data__validation=validation,
            evaluation__interval=1,
            model__hidden_dropout=0.1,
            train__num_steps=3,
        )
        run_training(config)
        losses.append([row["rm/loss"] for row in metric_rows(tmp_path / name)])
    assert losses[0] == losses[1]


def test_epochs_become_steps_and_less_than_one_step_is_refused(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path, train__num_steps=None, train__num_epochs=2.5)
    assert run_ranks(_count_steps, 1, config) == [25]
    message = training_refusal(change(config, train__num_epochs=0.05))
    for part in ("train.num_epochs=0.05", "80 comparisons", "train.global_batch_size=8"):
        assert part in message


def _count_steps(config) -> int:
    topology = ranks.initialize(config.parallel, device=select_device("cpu", local_rank=0))
    return count_steps(config, data=open_data(config, topology=topology))


def test_a_row_counts_the_work_of_all_ranks(tmp_path):
    """Not that of the rank that writes it, times their number: it may have no comparison at all."""
    sums = dict.fromkeys(SUMS, 1.0)
    work = StepWork(physical_tokens=64, logical_tokens=100, attended=500, rewards=6, load=0.0)
    metrics = Metrics(
        tmp_path, num_steps=1, world_size=2, architecture=PRESETS["nano"], peak_tflops=1e-6, tensorboard=False,
        global_batch_size=3, resumed_at=0, started_at=0.0,
    )  # fmt: skip
    metrics.add(
        Step(0, [], [], 3, 0, imbalance=2.0, num_rounds=1, work=work), StepResult(sums, grad_norm=1.0),
        seconds=2.0, waited_seconds=0.0, learning_rate=1.0,
    )  # fmt: skip
    row = metrics._summarise(1, memory_bytes=0)
    assert (row["tokens/physical_per_s"], row["tokens/logical_per_s"]) == (32, 50)
    flops = 3 * PRESETS["nano"].forward_flops(tokens=64, attended=500, rewards=6, reward_keys=100)
    assert row["throughput"] == pytest.approx(flops / 2 / 2 / 1e12)
    assert row["mfu"] == pytest.approx(row["throughput"] / 1e-6)


def test_a_step_without_any_pair_leaves_the_weights_alone(tmp_path, trajectory_corpus):
    assert run_ranks(_step_without_pairs, 1, tiny_config(trajectory_corpus, tmp_path)) == [(0.0, 0.0, 0.0)]


def _step_without_pairs(config) -> tuple[float, float, float]:
    from megatron_polar.data.packing import build_micro_batch

    device, topology, _, model, optimizer = _build(config)
    before = [parameter.detach().clone() for parameter in model.cores[0].parameters()]
    empty = build_micro_batch([], layout="shared_prefix", pad_id=0, pad_to_multiple=16)
    result = train_step(
        model,
        optimizer=optimizer,
        step=Step(0, [empty], [[]], 0, 0, imbalance=1.0, num_rounds=1, work=StepWork(16, 0, 0, 0, load=1.0)),
        reduction=model.transformer_config.finalize_model_grads_func,
        guard=StepGuard(config.faults),
        topology=topology,
        device=device,
    )
    moved = max(float((a - b).abs().max()) for a, b in zip(before, model.cores[0].parameters(), strict=True))
    return result.sums["pairs"], result.grad_norm, moved


def test_a_dataset_made_with_another_tokenizer_is_refused(tmp_path, trajectory_corpus, tokenizer_path):
    from conftest import write_trajectories

    from megatron_polar.data.preprocess import preprocess
    from megatron_polar.data.tokenizer_training import train_tokenizer

    other = train_tokenizer(["quite other words"] * 50, vocab_size=290, output=tmp_path / "tokenizer.model")
    source = write_trajectories(tmp_path / "in.jsonl", num_prompts=8, seed=9)
    preprocess([source], output=tmp_path / "other", tokenizer_path=other)
    for key, value in (
        ("data__validation", (DatasetSource(str(tmp_path / "other")),)),
        ("data__tokenizer", str(other)),
    ):
        message = training_refusal(tiny_config(trajectory_corpus, tmp_path / "run", **{key: value}))
        assert "made with tokenizer" in message
        assert "preprocess again" in message
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_process_after_shutting_down(tmp_path, trajectory_corpus):
    losses = run_ranks(_train_twice, 1, tiny_config(trajectory_corpus, tmp_path, train__num_steps=2))[0]
    assert losses[0] == losses[1]


def _train_twice(config) -> list[float]:
    import os

    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name)  # a process on its own needs no launcher
    losses = []
    for name in ("one", "two"):
        losses.append(train(change(config, run__directory=f"{config.run.directory}/{name}"))["rm/loss"])
        ranks.shut_down()
    return losses


def test_comparisons_of_training_and_validation_are_drawn_with_different_seeds(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path, data__validation=(DatasetSource(str(trajectory_corpus)),))
    seeds = run_ranks(_seeds, 1, config)[0]
    assert seeds[0] != seeds[1]


def _seeds(config) -> tuple[int, int]:
    topology = ranks.initialize(config.parallel, device=select_device("cpu", local_rank=0))
    data = open_data(config, topology=topology)
    assert isinstance(data.train, ComparisonDataset)
    return data.train.seed, data.validation.seed


def refuse_with_engine(config) -> str:
    from megatron_polar.parallel import device

    device.HAVE_APEX_OR_TE = True
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


def test_training_on_the_cpu_is_refused_where_the_optimizer_is_for_gpus(trajectory_corpus, tmp_path):
    """With Transformer Engine installed and GPUs hidden, as on a login node."""
    config = tiny_config(trajectory_corpus, tmp_path / "run")
    (message,) = run_ranks(refuse_with_engine, 1, config)
    assert "whose optimizer runs on GPUs alone" in message
    assert not (tmp_path / "run").exists()
