"""Parity of the GPU path: `CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py` on a Hopper machine with TE.

Everywhere else it is skipped: the other tests hide GPUs from themselves.
"""

import dataclasses

import numpy as np
import pytest
import torch
from test_layouts import VOCAB_SIZE, make_config, random_comparisons

from megatron_polar.config.schema import ParallelSection
from megatron_polar.data.packing import build_micro_batch
from megatron_polar.model.attention import ATTENTION_CLASSES
from megatron_polar.model.build import build_model
from megatron_polar.model.layer_spec import transformer_engine_problem
from megatron_polar.model.row_layout import make_row_layout
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import select_device
from megatron_polar.train.step import to_device

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
def test_fp8_gives_the_rewards_of_bf16(recipe, layers, place):
    if recipe == "delayed" and layers:
        pytest.skip("delayed scaling keeps no layer in bf16")
    config = make_config("unused", parallel={}, precision="bf16", fp8=recipe, fp8_bf16_layers=layers)
    wide = {"hidden_size": 512, "ffn_hidden_size": 1024, "kv_channels": 64}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **wide),
        data=dataclasses.replace(config.data, pad_to_multiple=128),
    )
    found, *_ = rewards_and_gradients(config, place=place, dtype=torch.bfloat16)
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, fp8="off"))
    exact, *_ = rewards_and_gradients(plain, place=place, dtype=torch.bfloat16)
    assert np.isfinite(found).all()
    assert np.abs(found - exact).max() < 0.1 * max(1.0, np.abs(exact).max())


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
