"""Parity of the GPU path: `CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py` on a Hopper machine with TE.

Everywhere else it is skipped: the other tests hide GPUs from themselves.
"""

import dataclasses
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic mode; read when CUDA starts

import numpy as np
import pytest
import torch
from test_layouts import VOCAB_SIZE, make_config, random_comparisons
from test_loader import make_dataset

from megatron_polar.config.schema import DataSection, FaultsSection, ParallelSection, RunConfig
from megatron_polar.data.loader import load_steps, row_shape
from megatron_polar.data.packing import build_micro_batch
from megatron_polar.data.steps import Step, lay_out
from megatron_polar.model.attention import ATTENTION_CLASSES
from megatron_polar.model.build import build_model
from megatron_polar.model.fp8_weights import is_fp8_weight
from megatron_polar.model.layer_spec import transformer_engine_problem
from megatron_polar.model.row_layout import make_row_layout
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import make_deterministic, select_device
from megatron_polar.parallel.transfer import tensors_of
from megatron_polar.train.gradients import GradientReduction
from megatron_polar.train.guard import StepGuard
from megatron_polar.train.main_weights import main_weights
from megatron_polar.train.objective import ranking_loss
from megatron_polar.train.optimizer import build_optimizer
from megatron_polar.train.state_dict import sharded_state
from megatron_polar.train.step import to_device, train_step

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or transformer_engine_problem() is not None,
    reason=f"no GPU with Transformer Engine to be seen ({transformer_engine_problem()}); see the head of the file",
)
LAYOUTS = ("shared_prefix", "packed", "padded")


@pytest.fixture(scope="module")
def place():
    device = select_device("cuda", local_rank=0)
    topology = ranks.initialize(ParallelSection(), device=device)
    ranks.seed_ranks(topology, seed=1)
    return device, topology


def attention_gradients(name: str, tensors, gradient, *, layout, config, topology):
    """Output and gradients of query, key and value of one attention kernel."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    kernel = ATTENTION_CLASSES[name](
        config=config, layer_number=1, attn_mask_type=None, attention_type="self", cp_comm_type=None,
        softmax_scale=None, pg_collection=topology.groups,
    )  # fmt: skip
    output = kernel(*tensors, None, packed_seq_params=layout)
    output.backward(gradient.to(output.dtype))
    return [output.detach(), *(x.grad for x in tensors)]


@pytest.mark.parametrize("rows", ["all", "reward"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_candidates", [2, 4])
def test_te_attention_in_bf16_equals_the_fp64_oracle(num_candidates, layout, rows, place):
    """Grouped-query attention with unequal query and key lengths, forward and backward."""
    device, topology = place
    config = make_config("unused", parallel={}, layout=layout, precision="bf16")
    wide = dataclasses.replace(config.model, kv_channels=64, hidden_size=512)
    model = build_model(
        dataclasses.replace(config, model=wide), topology=topology, device=device, vocab_size=VOCAB_SIZE,
        for_training=False,
    )  # fmt: skip
    batch = build_micro_batch(random_comparisons(num_candidates), layout=layout, pad_id=0, pad_to_multiple=16)
    whole = make_row_layout(batch, device=device.torch_device, spread_over=16)
    generator = torch.Generator(device.torch_device).manual_seed(num_candidates)
    b, s = batch.tokens.shape

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device.torch_device, dtype=torch.float64)

    queries = len(whole.reward_rows.tokens) if rows == "reward" else s
    columns = 1 if rows == "reward" else b
    tensors = [draw(queries, columns, 8, 64), draw(s, b, 4, 64), draw(s, b, 4, 64)]
    gradient = draw(queries, columns, 8 * 64)
    used = whole.reward_rows if rows == "reward" else whole
    settings = {"layout": used, "config": model.transformer_config, "topology": topology}
    exact = attention_gradients(
        "dense" if rows == "all" or layout != "padded" else "sdpa", tensors, gradient, **settings
    )
    narrow = [x.to(torch.bfloat16) for x in tensors]
    found = attention_gradients("te", narrow, gradient, **settings)
    for name, one, other in zip(("output", "dq", "dk", "dv"), found, exact, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 2e-2, f"{name}: {error:.1e}"


def rewards_and_gradients(config, *, place, dtype):
    device, topology = place
    model = build_model(
        config, topology=topology, device=device, vocab_size=VOCAB_SIZE, dtype=dtype, for_training=False
    )
    multiple = config.data.pad_to_multiple
    batch = build_micro_batch(random_comparisons(3), layout=config.data.layout, pad_id=0, pad_to_multiple=multiple)
    moved = to_device(batch, model=model, device=device, topology=topology)
    rewards = model.chunks[0](moved.tokens, None, None, packed_seq_params=moved.layout)
    (-torch.nn.functional.logsigmoid(rewards[moved.winners] - rewards[moved.losers]).sum()).backward()
    names = {name: p.grad.double().cpu().numpy() for name, p in model.cores[0].named_parameters() if p.grad is not None}
    return rewards.detach().double().cpu().numpy(), names, model


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "delayed"])
def test_fp8_gives_the_rewards_and_gradients_of_bf16(recipe, layers, place):
    """As far as FP8's three bits of mantissa allow: rounding weights and inputs of all layers moved these rewards by
    9 % (per tensor, on the CPU). Wider initial weights would multiply that with every layer."""
    if recipe == "delayed" and layers:
        pytest.skip("delayed scaling keeps no layer in bf16")
    config = make_config("unused", parallel={}, precision="bf16", fp8=recipe, fp8_bf16_layers=layers)
    wide = {"hidden_size": 512, "ffn_hidden_size": 1024, "kv_channels": 64, "init_method_std": 0.02}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **wide),
        data=dataclasses.replace(config.data, pad_to_multiple=128),
    )
    found, gradients, _ = rewards_and_gradients(config, place=place, dtype=torch.bfloat16)
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, fp8="off"))
    exact, expected, _ = rewards_and_gradients(plain, place=place, dtype=torch.bfloat16)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact - exact.mean())
    assert 1e-3 < error < 0.2  # no difference at all would mean that FP8 was ignored
    for name, one in gradients.items():
        other = expected[name]
        cosine = (one.ravel() @ other.ravel()) / np.linalg.norm(one) / np.linalg.norm(other)
        assert cosine > 0.9, f"{name}: {cosine:.3f}"


@pytest.mark.parametrize("last_layer", ["reward_rows", "all_rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformer_engines_layers_give_the_rewards_of_the_local_ones(layout, last_layer, place):
    """bf16 with TE against fp64 with local layers, the same weights by name."""
    config = make_config("unused", parallel={}, layout=layout, precision="bf16")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, last_layer=last_layer))
    found, gradients, model = rewards_and_gradients(config, place=place, dtype=torch.bfloat16)
    assert model.transformer_impl == "transformer_engine"
    local = dataclasses.replace(config.model, transformer_impl="local", attention="sdpa")
    exact, expected, _ = rewards_and_gradients(
        dataclasses.replace(config, model=local), place=place, dtype=torch.float64
    )
    assert np.abs(found - exact).max() < 0.05 * max(1.0, np.abs(exact).max())
    embedding = "embedding.word_embeddings.weight"
    one, other = gradients[embedding].ravel(), expected[embedding].ravel()
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99


# --- Training --------------------------------------------------------------------------------------------------------


def wide_config(**train) -> RunConfig:
    """Wide enough for FP8 kernels and for a fused accumulation."""
    config = make_config("unused", parallel={}, **({"precision": "bf16"} | train))
    wide = {"hidden_size": 512, "ffn_hidden_size": 1024, "kv_channels": 64}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **wide),
        data=dataclasses.replace(config.data, pad_to_multiple=128, max_tokens_per_micro_batch=256),
        optimizer=dataclasses.replace(config.optimizer, lr=1e-6),  # else all is learnt in two steps
    )


def train_steps(config: RunConfig, *, place, steps: int):
    """A model, its optimizer and the losses of some steps, each on comparisons of its own."""
    device, topology = place
    model = build_model(config, topology=topology, device=device, vocab_size=VOCAB_SIZE)
    reduction = GradientReduction(model, device=device)
    optimizer = build_optimizer(config.optimizer, model=model, reduction=reduction)
    shape = row_shape(config.data, topology=topology, architecture=model.architecture)
    losses = []
    for number in range(steps):
        rows = lay_out(random_comparisons(3), shape=shape, rank=0, pad_id=0)
        step = Step(number, rows.micro_batches, rows.members, 1, 0, rows.imbalance, rows.num_rounds, rows.work)
        result = train_step(
            model, optimizer=optimizer, step=step, reduction=reduction, guard=StepGuard(FaultsSection()),
            topology=topology, device=device,
        )  # fmt: skip
        losses.append(result.sums["loss"] / result.sums["pairs"])
    return model, optimizer, losses


def test_gradients_added_up_inside_gemms_are_those_added_up_after_them(place):
    """Several micro-batches, so that there is something to add to."""
    found = {}
    for requested in ("auto", False):
        model, _, _ = train_steps(wide_config(gradient_accumulation_fusion=requested), place=place, steps=1)
        assert model.gradient_fusion.transformer_engine == (requested == "auto")
        found[requested] = {name: p.main_grad.clone() for name, p in model.cores[0].named_parameters()}
    for name, gradient in found[False].items():
        error = (found["auto"][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-2, f"{name}: {error:.1e}"


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_weights_kept_in_fp8_train_as_copies_in_fp8_do(recipe, place):
    """Both multiply the same FP8 numbers; checkpoints hold the optimizer's weights in bf16."""
    _, _, plain = train_steps(wide_config(fp8=recipe), place=place, steps=4)
    model, optimizer, kept = train_steps(wide_config(fp8=recipe, fp8_param_gather=True), place=place, steps=4)
    np.testing.assert_allclose(kept, plain, rtol=2e-2)
    in_fp8 = [p for p in model.cores[0].parameters() if is_fp8_weight(p)]
    assert len(in_fp8) == 4 * (4 - 2)  # four matrices a layer, and a layer at each end in bf16
    expected = main_weights(optimizer, in_fp8)
    state = sharded_state(model, optimizer=optimizer, topology=place[1], is_loading=False)["model"]
    saved = {
        name: entry.data for name, entry in state.items() if isinstance(getattr(entry, "data", None), torch.Tensor)
    }
    assert not any(is_fp8_weight(value) for value in saved.values())
    for name, weight in model.cores[0].named_parameters():
        if is_fp8_weight(weight):
            assert torch.equal(saved[name], expected[weight])
            # Within FP8's rounding: the scale is of the whole matrix, or of a block.
            assert (weight.dequantize() - expected[weight]).abs().max() < 0.1 * expected[weight].abs().max()


def test_the_deterministic_mode_repeats_gradients_bit_for_bit(place, monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    config = dataclasses.replace(wide_config(), run=dataclasses.replace(wide_config().run, deterministic=True))
    make_deterministic(place[0])
    try:
        (_, one, _), (_, other, _) = (rewards_and_gradients(config, place=place, dtype=torch.bfloat16) for _ in "ab")
    finally:
        torch.use_deterministic_algorithms(False)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# --- Copies to the device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_copied_asynchronously_arrives(layout, place):
    device, topology = place
    config = make_config("unused", parallel={}, layout=layout, precision="bf16")
    model = build_model(config, topology=topology, device=device, vocab_size=VOCAB_SIZE, for_training=False)
    batch = build_micro_batch(random_comparisons(3), layout=layout, pad_id=0, pad_to_multiple=16)
    spread_over = model.reward_rows_multiple if model.reward_rows else None
    expected = make_row_layout(batch, device=torch.device("cpu"), spread_over=spread_over)
    for _ in range(20):  # memory of earlier copies is taken again
        moved = to_device(batch, model=model, device=device, topology=topology)
        torch.testing.assert_close(moved.tokens.cpu(), torch.from_numpy(batch.tokens), rtol=0, atol=0)
        for one, other in zip(tensors_of(moved.layout), tensors_of(expected), strict=True):
            assert one.is_cuda
            assert torch.equal(one.cpu(), other)


def test_forward_and_backward_never_wait_for_the_gpu(place):
    """From the copy of a micro-batch to its gradients: torch raises where the host would wait."""
    device, topology = place
    model = build_model(wide_config(), topology=topology, device=device, vocab_size=VOCAB_SIZE, for_training=False)
    batch = build_micro_batch(random_comparisons(3), layout="shared_prefix", pad_id=0, pad_to_multiple=128)

    def run() -> None:
        moved = to_device(batch, model=model, device=device, topology=topology)
        rewards = model.chunks[0](moved.tokens, None, None, packed_seq_params=moved.layout)
        ranking_loss(rewards, winners=moved.winners, losers=moved.losers).loss_sum.backward()

    run()  # kernels are chosen and compiled once
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_dalis_copies_on_the_gpu_equal_its_steps_and_torchs(num_workers, trajectory_corpus):
    pytest.importorskip("nvidia.dali")
    dataset = make_dataset(trajectory_corpus)
    expected = load_steps(dataset, start=0, stop=6, data=DataSection(train=(), num_workers=0))
    data = DataSection(train=(), num_workers=num_workers, prefetch_factor=2, loader="dali")
    found = load_steps(dataset, start=0, stop=6, data=data, gpu=0)
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            for name, there in b.on_device.items():
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
                assert there.is_cuda
                np.testing.assert_array_equal(getattr(a, name), there.cpu().numpy(), err_msg=name)
