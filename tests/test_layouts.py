"""The same weights and data give the same training in every parallel layout and every row layout."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from ranks import run_ranks

from megatron_polar.config.presets import architecture_of
from megatron_polar.config.schema import (
    DataSection,
    DatasetSource,
    FaultsSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunConfig,
    RunSection,
    TrainSection,
)
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.packing import build_micro_batch
from megatron_polar.data.steps import RowShape, build_step
from megatron_polar.data.template import TokenizedComparison
from megatron_polar.errors import UserError
from megatron_polar.model import build
from megatron_polar.model.build import BuiltModel, build_model, make_transformer_config
from megatron_polar.model.gradient_fusion import GradientFusion
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import select_device
from megatron_polar.train.gradients import GradientReduction
from megatron_polar.train.guard import StepGuard
from megatron_polar.train.optimizer import build_optimizer, build_schedule
from megatron_polar.train.step import compute_rewards, to_device, train_step

VOCAB_SIZE = 420
# The TP2 row is what a layout's name says; every other field is the single process's.
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_interleaved": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp2_sp_pp2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
    },
    "dp2": {},
    "cp2": {"context_parallel_size": 2},
    "cp2_tp2_sp": {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
}
WORLD_SIZES = {"dp2": 2} | {
    name: math.prod(size for key, size in sizes.items() if key.endswith("_size") and not key.startswith("virtual"))
    for name, sizes in LAYOUTS.items()
    if name != "dp2"
}


def make_config(corpus: str, *, parallel: dict, layout: str = "shared_prefix", **train) -> RunConfig:
    """A 4-layer model whose head is not zero, so that gradients reach every weight in the first step."""
    return RunConfig(
        run=RunSection(directory="unused", seed=7),
        model=ModelSection(
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=8,
            num_query_groups=4,
            kv_channels=8,
            rotary_base=10000.0,
            layernorm_epsilon=1e-5,
            reward_head_init_std=0.1,
            init_method_std=0.1,
        ),
        data=DataSection(
            train=(DatasetSource(corpus),), layout=layout, candidates_per_comparison=3, max_tokens_per_micro_batch=400
        ),
        train=TrainSection(global_batch_size=12, num_steps=3, **({"precision": "fp32"} | train)),
        # AdamW's first steps are about lr * sign(gradient): where a gradient is nothing but rounding, its sign is noise
        # that grows with lr. 1e-4 moves the loss by 1e-3 a step, a thousand times the tolerance, and keeps that noise
        # below it.
        optimizer=OptimizerSection(lr=1e-4, warmup_fraction=0.0, weight_decay=0.01),
        parallel=ParallelSection(**parallel),
    )


def train_three_steps(config: RunConfig) -> list[tuple[float, float]]:
    """Loss and gradient norm of three optimizer steps."""
    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(config.parallel, device=device)
    ranks.seed_ranks(topology, seed=config.run.seed)
    data = ComparisonDataset(config.data.train, seed=3, candidates_per_comparison=3, max_sequence_length=512)
    model = build_model(config, topology=topology, device=device, vocab_size=VOCAB_SIZE)
    reduction = GradientReduction(model, device=device)
    optimizer = build_optimizer(config.optimizer, model=model, reduction=reduction)
    guard = StepGuard(FaultsSection())
    schedule = build_schedule(config.optimizer, optimizer=optimizer, num_steps=3)
    shape = RowShape(
        layout=config.data.layout,
        max_tokens=config.data.max_tokens_per_micro_batch,
        pad_to_multiple=8 * topology.tp_size * topology.cp_size,
        num_ranks=topology.dp_size,
        micro_batches_multiple_of=topology.pp_size if topology.vpp_size else 1,
        architecture=model.architecture,
    )
    figures = []
    for number in range(3):
        step = build_step(data, range(12 * number, 12 * number + 12), number=number, rank=topology.dp_rank, shape=shape)
        assert len(step.micro_batches) >= 2, "gradient accumulation must take part in the comparison"
        result = train_step(
            model,
            optimizer=optimizer,
            step=step,
            reduction=reduction,
            guard=guard,
            topology=topology,
            device=device,
        )
        schedule.step(increment=1)
        figures.append((result.sums["loss"] / result.sums["pairs"], result.grad_norm))
    return figures


@pytest.fixture(scope="module")
def single_process(trajectory_corpus) -> list[tuple[float, float]]:
    return run_ranks(train_three_steps, 1, make_config(str(trajectory_corpus), parallel={}))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_parallel_layout_equals_the_single_process(name, trajectory_corpus, single_process):
    config = make_config(str(trajectory_corpus), parallel=LAYOUTS[name])
    for figures in run_ranks(train_three_steps, WORLD_SIZES[name], config):
        # fp32 sums in another order: 1e-6 relative is the bound, about ten roundings.
        np.testing.assert_allclose(figures, single_process, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["distributed", "replicated"])
def test_dp2_equals_the_single_process_with_either_optimizer(optimizer, trajectory_corpus, single_process):
    config = make_config(str(trajectory_corpus), parallel={})
    section = dataclasses.replace(config.optimizer, use_distributed_optimizer=optimizer == "distributed")
    for figures in run_ranks(train_three_steps, 2, dataclasses.replace(config, optimizer=section)):
        np.testing.assert_allclose(figures, single_process, rtol=1e-6)


@pytest.mark.parametrize("name", ["dp2", "pp2", "pp2_interleaved", "tp2_sp"])
def test_overlapped_communication_changes_nothing(name, trajectory_corpus, single_process):
    """On two data-parallel ranks, which are two times two where a layout has two of its own."""
    config = make_config(str(trajectory_corpus), parallel=LAYOUTS[name])
    section = dataclasses.replace(config.optimizer, overlap_grad_reduce=True, overlap_param_gather=True)
    world_size = 2 if name == "dp2" else 4
    for figures in run_ranks(train_three_steps, world_size, dataclasses.replace(config, optimizer=section)):
        np.testing.assert_allclose(figures, single_process, rtol=1e-6)


def train_with_buckets(config: RunConfig, bucket_size: int) -> list[tuple[float, float]]:
    """`train_three_steps`, with buckets of so many weights; a model of this size has a single one otherwise."""
    build.DistributedDataParallelConfig = functools.partial(DistributedDataParallelConfig, bucket_size=bucket_size)
    return train_three_steps(config)  # in a process of its own


@pytest.mark.parametrize("last_layer", ["reward_rows", "all_rows"])
@pytest.mark.parametrize("bucket_size", [1, 20_000])
def test_weights_that_are_gathered_bucket_by_bucket_have_arrived_when_they_are_read(
    bucket_size, last_layer, trajectory_corpus
):
    config = make_config(str(trajectory_corpus), parallel={})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, last_layer=last_layer))
    at_once = dataclasses.replace(config.optimizer, overlap_grad_reduce=True)
    overlapped = dataclasses.replace(at_once, overlap_param_gather=True)
    figures = [
        run_ranks(train_with_buckets, 2, dataclasses.replace(config, optimizer=section), bucket_size)
        for section in (at_once, overlapped)
    ]
    assert figures[0] == figures[1]


def with_bias_and_qk_norm(config: RunConfig) -> RunConfig:
    model = dataclasses.replace(config.model, add_qkv_bias=True, qk_layernorm=True)
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def single_process_with_bias_and_qk_norm(trajectory_corpus) -> list[tuple[float, float]]:
    config = with_bias_and_qk_norm(make_config(str(trajectory_corpus), parallel={}))
    return run_ranks(train_three_steps, 1, config)[0]


@pytest.mark.parametrize("name", ["tp2", "tp2_sp", "cp2"])
def test_biases_and_norms_of_queries_and_keys_train_as_in_the_single_process(
    name, trajectory_corpus, single_process_with_bias_and_qk_norm
):
    """Every tensor-parallel rank has some of the heads, and all have the norms' weights."""
    config = with_bias_and_qk_norm(make_config(str(trajectory_corpus), parallel=LAYOUTS[name]))
    for figures in run_ranks(train_three_steps, 2, config):
        np.testing.assert_allclose(figures, single_process_with_bias_and_qk_norm, rtol=1e-6)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_every_row_layout_trains_the_same(layout, trajectory_corpus, single_process):
    config = make_config(str(trajectory_corpus), parallel={}, layout=layout)
    np.testing.assert_allclose(run_ranks(train_three_steps, 1, config)[0], single_process, rtol=2e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute, trajectory_corpus, single_process):
    config = make_config(str(trajectory_corpus), parallel={}, recompute=recompute)
    assert run_ranks(train_three_steps, 1, config)[0] == single_process


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["tp2_sp", "tp2_sp_pp2"])
def test_recomputation_changes_nothing_in_parallel_layouts(name, recompute, trajectory_corpus, single_process):
    """Gathers of sequence-parallel rows are repeated, too, and so are the reward rows of the last layer."""
    config = make_config(str(trajectory_corpus), parallel=LAYOUTS[name], recompute=recompute)
    for figures in run_ranks(train_three_steps, WORLD_SIZES[name], config):
        np.testing.assert_allclose(figures, single_process, rtol=1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["single", "tp2", "tp2_sp"])
def test_recomputation_draws_the_same_dropout_masks(name, recompute):
    """In padded rows, the only ones with dropout in attention; the gradients of the first pass's masks, exactly."""
    sizes = {"single": {}, "tp2": {"tensor_model_parallel_size": 2}}.get(name, LAYOUTS["tp2_sp"])
    found = {}
    for how in ("none", recompute):
        config = make_config("unused", parallel=sizes, layout="padded", recompute=how)
        model = dataclasses.replace(config.model, hidden_dropout=0.1, attention_dropout=0.1)
        config = dataclasses.replace(config, model=model)
        found[how] = run_ranks(rewards_and_gradients, 2 if sizes else 1, config, torch.float64, 3)
    for (rewards, gradients), (again, others) in zip(found["none"], found[recompute], strict=True):
        np.testing.assert_array_equal(again, rewards)
        for key, gradient in gradients.items():
            difference = np.linalg.norm(others[key] - gradient) / np.linalg.norm(gradient)
            assert difference <= 1e-12, f"{key}: {difference:.1e}"


def three_passes(config: RunConfig) -> list[float]:
    """The first reward of one micro-batch, three times."""
    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(config.parallel, device=device)
    ranks.seed_ranks(topology, seed=1)
    model = build_model(config, topology=topology, device=device, vocab_size=VOCAB_SIZE, for_training=False)
    batch = build_micro_batch(random_comparisons(3), layout="padded", pad_id=0, pad_to_multiple=16)
    on_device = to_device(batch, model=model, device=device, topology=topology)
    core = model.cores[0]
    return [float(core(on_device.tokens, None, None, packed_seq_params=on_device.layout)[0]) for _ in range(3)]


@pytest.mark.parametrize("name", ["tp2", "tp2_sp"])
def test_every_pass_draws_masks_of_its_own(name):
    sizes = {"tensor_model_parallel_size": 2} if name == "tp2" else LAYOUTS["tp2_sp"]
    config = make_config("unused", parallel=sizes, layout="padded")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_dropout=0.1))
    for rewards in run_ranks(three_passes, 2, config):
        assert len(set(rewards)) == 3


def nested_draws(config: RunConfig) -> tuple[list[float], list[str]]:
    """Numbers drawn outside of forks of the tensor-parallel generator, within one, and within one in another."""
    device = select_device("cpu", local_rank=0)
    ranks.seed_ranks(ranks.initialize(config.parallel, device=device), seed=1)
    tracker, drawn = get_cuda_rng_tracker(), []

    def draw() -> None:
        drawn.append(torch.rand(()).item())

    draw()
    with tracker.fork():
        draw()
        with tracker.fork():
            draw()
        draw()
    draw()
    with tracker.fork():
        draw()
    return drawn, list(tracker.get_states())


def test_forks_of_the_generator_may_lie_within_each_other():
    """On the CPU as in megatron-core: a fork goes on behind the one that it held, and no number comes twice."""
    ((drawn, names),) = run_ranks(nested_draws, 1, make_config("unused", parallel={}))
    assert len(set(drawn)) == 6
    assert "default-rng" not in names


@pytest.mark.parametrize("name", ["tp2_sp", "dp2"])
def test_bf16_layouts_agree_to_bf16_rounding(name, trajectory_corpus):
    config = make_config(str(trajectory_corpus), parallel={}, precision="bf16")
    reference = run_ranks(train_three_steps, 1, config)[0]
    other = dataclasses.replace(config, parallel=ParallelSection(**LAYOUTS[name]))
    for figures in run_ranks(train_three_steps, 2, other):
        # bf16 has 8 bits of mantissa: activations differ by 2^-8 where tensor-parallel sums are taken in another order.
        np.testing.assert_allclose(figures, reference, rtol=3e-2)


# --- Row layouts: rewards and every parameter's gradient -----------------------------------------------------------


def random_comparisons(num_candidates: int) -> list[TokenizedComparison]:
    generator = np.random.default_rng(num_candidates)

    def tokens(low: int, high: int) -> np.ndarray:
        return generator.integers(5, VOCAB_SIZE, generator.integers(low, high)).astype(np.int32)

    levels = (0,) + (1,) * (num_candidates - 1)
    return [
        TokenizedComparison(tokens(3, 60), tuple(tokens(1, 40) for _ in range(num_candidates)), levels, 0)
        for _ in range(5)
    ]


def rewards_and_gradients(config: RunConfig, dtype: torch.dtype, num_candidates: int):
    """Rewards, and the gradient of every parameter of this rank, for one micro-batch in the config's row layout."""
    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(config.parallel, device=device)
    ranks.seed_ranks(topology, seed=1)
    torch.set_default_dtype(dtype)
    model = build_model(
        config, topology=topology, device=device, vocab_size=VOCAB_SIZE, dtype=dtype, for_training=False
    )
    batch = build_micro_batch(
        random_comparisons(num_candidates), layout=config.data.layout, pad_id=0, pad_to_multiple=16
    )
    on_device = to_device(batch, model=model, device=device, topology=topology)
    core = model.cores[0]
    rewards = core(on_device.tokens, None, None, packed_seq_params=on_device.layout)
    loss = -torch.nn.functional.logsigmoid(rewards[on_device.winners] - rewards[on_device.losers]).sum()
    loss.backward()
    for parameter in core.parameters():
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=topology.groups.tp)
    gradients = {name: parameter.grad.numpy() for name, parameter in core.named_parameters()}
    return rewards.detach().numpy(), gradients


@pytest.mark.parametrize("parallel", ["single", "tp2_sp"])
@pytest.mark.parametrize("num_candidates", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_shared_packed_and_padded_give_the_same_rewards_and_gradients(dtype, tolerance, num_candidates, parallel):
    sizes, world_size = (LAYOUTS["tp2_sp"], 2) if parallel == "tp2_sp" else ({}, 1)
    results = {}
    for layout in ("padded", "packed", "shared_prefix"):
        config = make_config("unused", parallel=sizes, layout=layout)
        results[layout] = run_ranks(rewards_and_gradients, world_size, config, dtype, num_candidates)
    for layout in ("packed", "shared_prefix"):
        for (rewards, gradients), (expected_rewards, expected) in zip(results[layout], results["padded"], strict=True):
            assert np.abs(rewards - expected_rewards).max() <= tolerance * max(1.0, np.abs(expected_rewards).max())
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                difference = np.linalg.norm(gradient - expected[name]) / np.linalg.norm(expected[name])
                assert difference <= tolerance, f"{layout} {name}: {difference:.1e}"


def test_sdpa_equals_the_dense_mask():
    results = []
    for attention in ("dense", "sdpa"):
        config = make_config("unused", parallel={})
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
        results.append(run_ranks(rewards_and_gradients, 1, config, torch.float64, 4)[0])
    (rewards, gradients), (expected_rewards, expected) = results
    np.testing.assert_allclose(rewards, expected_rewards, rtol=1e-12, atol=1e-13)
    for name in expected:
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("parallel", ["single", "tp2", "tp2_sp"])
@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("bias_and_norm", [False, True], ids=["llama", "bias_and_qk_norm"])
def test_the_last_layer_needs_no_other_rows_than_the_rewards(layout, parallel, bias_and_norm):
    """The slow twin computes all rows; only rounding may tell them apart."""
    config = make_config("unused", parallel=LAYOUTS.get(parallel, {}), layout=layout)
    results = {}
    for last_layer in ("reward_rows", "all_rows"):
        model = dataclasses.replace(
            config.model, last_layer=last_layer, add_qkv_bias=bias_and_norm, qk_layernorm=bias_and_norm
        )
        twin = dataclasses.replace(config, model=model)
        results[last_layer] = run_ranks(rewards_and_gradients, WORLD_SIZES.get(parallel, 1), twin, torch.float64, 3)
    for (rewards, gradients), (expected_rewards, expected) in zip(*results.values(), strict=True):
        np.testing.assert_allclose(rewards, expected_rewards, rtol=1e-12, atol=1e-13)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, expected[name], rtol=1e-9, atol=1e-13, err_msg=name)


def test_the_last_layer_trains_the_same_whatever_rows_it_computes(trajectory_corpus, single_process):
    config = make_config(str(trajectory_corpus), parallel={})
    every_row = dataclasses.replace(config, model=dataclasses.replace(config.model, last_layer="all_rows"))
    np.testing.assert_allclose(run_ranks(train_three_steps, 1, every_row)[0], single_process, rtol=1e-6)


def fp8_settings(recipe: str, layers: int) -> tuple:
    config = make_config("unused", parallel={}, precision="bf16", fp8=recipe, fp8_bf16_layers=layers)
    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(config.parallel, device=device)
    settings = make_transformer_config(
        config, architecture=architecture_of(config.model), topology=topology, device=device, dtype=torch.bfloat16,
        transformer_impl="local",
    )  # fmt: skip
    try:
        build_model(config, topology=topology, device=device, vocab_size=VOCAB_SIZE)
    except UserError as error:
        refusal = str(error)
    built = BuiltModel([], settings, None, 0, "", "", True, GradientFusion(False, False, ""))
    ends = (settings.first_last_layers_bf16, settings.num_layers_at_start_in_bf16, settings.num_layers_at_end_in_bf16)
    return settings.fp8, str(settings.fp8_recipe), ends, built.reward_rows_multiple, refusal


@pytest.mark.parametrize(
    ("recipe", "layers", "expected"),
    [
        ("tensorwise", 2, ("hybrid", "tensorwise", (True, 2, 2), 1)),
        ("tensorwise", 0, ("hybrid", "tensorwise", (False, 0, 0), 128)),
        ("blockwise", 1, ("e4m3", "blockwise", (True, 1, 1), 1)),
        ("delayed", 0, ("hybrid", "delayed", (False, 1, 1), 128)),
    ],
)
def test_fp8_is_told_to_megatron_and_refused_where_it_would_be_ignored(recipe, layers, expected):
    *found, refusal = run_ranks(fp8_settings, 1, recipe, layers)[0]
    assert tuple(found) == expected
    assert f"train.fp8={recipe} needs Transformer Engine's layers" in refusal


def pipeline_rewards(config: RunConfig) -> list[np.ndarray]:
    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(config.parallel, device=device)
    ranks.seed_ranks(topology, seed=1)
    model = build_model(config, topology=topology, device=device, vocab_size=VOCAB_SIZE, for_training=False)
    comparisons = random_comparisons(3)
    batches = [
        build_micro_batch(part, layout="shared_prefix", pad_id=0, pad_to_multiple=16)
        for part in (comparisons[:2], comparisons[2:], [], comparisons[:1])
    ]
    return [r.numpy() for r in compute_rewards(model, micro_batches=batches, topology=topology, device=device)]


@pytest.mark.parametrize("name", ["pp2", "pp2_interleaved"])
def test_pipeline_rewards_reach_every_stage_and_empty_batches_are_harmless(name):
    expected = run_ranks(pipeline_rewards, 1, make_config("unused", parallel={}))[0]
    for rewards in run_ranks(pipeline_rewards, 2, make_config("unused", parallel=LAYOUTS[name])):
        assert [len(r) for r in rewards] == [6, 9, 0, 3]
        for found, wanted in zip(rewards, expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
