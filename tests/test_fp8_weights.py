"""Weights in FP8: what reads and writes them never works on a copy by mistake, and what is saved has all digits.

Transformer Engine's tensors need a GPU. Here stands one with the same rules in their place: operations see a
dequantised copy, and only copying into the tensor itself changes it.
"""

import pytest
import torch
from megatron.core import fp8_utils
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from ranks import run_ranks
from test_layouts import VOCAB_SIZE, make_config

from megatron_polar.config.schema import FaultsSection
from megatron_polar.data.comparisons import ComparisonDataset
from megatron_polar.data.loader import row_shape
from megatron_polar.data.steps import build_step
from megatron_polar.model.build import build_model
from megatron_polar.model.fp8_weights import assign, is_fp8_weight, plain
from megatron_polar.model.initialization import fill_weights
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import select_device
from megatron_polar.train.gradients import GradientReduction
from megatron_polar.train.guard import StepGuard
from megatron_polar.train.main_weights import main_weights, take_main_weights
from megatron_polar.train.optimizer import build_optimizer
from megatron_polar.train.state_dict import sharded_state
from megatron_polar.train.step import train_step


class Fp8Weight(torch.Tensor):
    """bf16 to look at, FP8 with one scale inside."""

    @staticmethod
    def __new__(cls, value: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        self.quantize(value)
        return self

    def quantize(self, value: torch.Tensor) -> None:
        self.scale = value.float().abs().max().clamp(min=1e-12) / 448
        self.raw = (value.float() / self.scale).to(torch.float8_e4m3fn)

    def dequantize(self) -> torch.Tensor:
        return (self.raw.float() * self.scale).to(self.dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.detach.default:
            return arguments[0]
        plain_ones = [x.dequantize() if isinstance(x, cls) else x for x in arguments]
        if function is torch.ops.aten.copy_.default and isinstance(arguments[0], cls):
            arguments[0].quantize(plain_ones[1])
            return arguments[0]
        return function(*plain_ones, **(keywords or {}))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(fp8_utils, "is_float8tensor", lambda tensor: isinstance(tensor, Fp8Weight))
    monkeypatch.setattr(fp8_utils, "dequantize_fp8_tensor", Fp8Weight.dequantize)


def test_the_stand_in_loses_what_is_written_through_a_view():
    """Else the tests below would prove nothing."""
    weight = Fp8Weight(torch.zeros(4, 4, dtype=torch.bfloat16))
    weight.chunk(2)[0].copy_(torch.ones(2, 4))
    assert not weight.dequantize().any()
    weight.copy_(torch.ones(4, 4))
    assert plain(weight).eq(1).all()


class OneLayer:
    """A model of three weights: one in FP8, one in FP8 whose halves are saved apart (SwiGLU's), one in bf16."""

    def __init__(self):
        self.whole, self.halves = (Fp8Weight(torch.zeros(4, 4, dtype=torch.bfloat16)) for _ in range(2))
        self.bf16 = torch.zeros(4, 4, dtype=torch.bfloat16)
        self.whole.get_high_precision_init_val = lambda: self.whole._high_precision_init_val

    def sharded_state_dict(self, metadata):
        weights = {"whole": self.whole, "halves": self.halves, "bf16": self.bf16}
        state = {key: ShardedTensor.from_rank_offsets(key, weight) for key, weight in weights.items()}
        state["halves"] = apply_swiglu_sharded_factory(state["halves"], ())
        return state


def test_weights_in_fp8_are_filled_as_others_are():
    model, drawn = OneLayer(), {}

    def make(name, layer, shape, device):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).to(torch.bfloat16)
        return drawn.setdefault(name, values)

    fill_weights(model, make=make, metadata={})
    assert torch.equal(model.bf16, drawn["bf16"])
    for name in ("whole", "halves"):
        # E4M3 keeps 4 digits of the significand: 2**-4 at most is lost of a number, and as much of the smallest ones.
        torch.testing.assert_close(plain(getattr(model, name)), drawn[name], rtol=2**-4, atol=2**-4)
        assert plain(getattr(model, name)).any()
    # What the optimizer makes its fp32 weight from has lost nothing.
    assert torch.equal(model.whole.get_high_precision_init_val(), drawn["whole"])


def test_a_weight_in_fp8_is_told_from_others():
    weight = Fp8Weight(torch.ones(2, 2, dtype=torch.bfloat16))
    assert is_fp8_weight(weight)
    assert not is_fp8_weight(plain(weight))
    assign(weight, torch.full((2, 2), 3.0, dtype=torch.bfloat16))
    assert plain(weight).eq(3).all()


# --- The optimizer's weights -----------------------------------------------------------------------------------------


def trained(corpus: str) -> tuple:
    """A bf16 model after one step of the distributed optimizer."""
    config = make_config(corpus, parallel={}, precision="bf16")
    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(config.parallel, device=device)
    ranks.seed_ranks(topology, seed=1)
    model = build_model(config, topology=topology, device=device, vocab_size=VOCAB_SIZE)
    reduction = GradientReduction(model, device=device)
    optimizer = build_optimizer(config.optimizer, model=model, reduction=reduction)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    data = ComparisonDataset(config.data.train, seed=3, candidates_per_comparison=3, max_sequence_length=512)
    shape = row_shape(config.data, topology=topology, architecture=model.architecture)
    step = build_step(data, range(12), number=0, rank=topology.dp_rank, shape=shape)
    guard = StepGuard(FaultsSection())
    train_step(
        model, optimizer=optimizer, step=step, reduction=reduction, guard=guard, topology=topology, device=device
    )
    return model, optimizer, topology


def compare_main_weights(corpus: str) -> dict[str, bool]:
    model, optimizer, _ = trained(corpus)
    named = {name: p for name, p in model.cores[0].named_parameters() if p.dtype == torch.bfloat16}
    before = {name: p.clone() for name, p in named.items()}
    found = main_weights(optimizer, named.values())
    same = {name: torch.equal(found[p], p) for name, p in named.items()}

    # As if the model's weights had lost digits: what the checkpoint gets comes from the optimizer nevertheless.
    for p in named.values():
        p.data.mul_(1.5)
    found = main_weights(optimizer, named.values())
    same |= {f"{name}, spoilt": torch.equal(found[p], before[name]) for name, p in named.items()}
    take_main_weights(optimizer, {p: p.data for p in named.values()})
    found = main_weights(optimizer, named.values())
    return same | {f"{name}, taken": torch.equal(found[p], p) for name, p in named.items()}


def test_the_optimizers_weights_rounded_are_the_models(trajectory_corpus):
    """Bit for bit, put together from the parts of two data-parallel ranks."""
    for same in run_ranks(compare_main_weights, 2, str(trajectory_corpus)):
        assert len(same) > 3 * 20
        assert all(same.values()), [name for name, value in same.items() if not value]


def saved_with_fp8_weights(corpus: str) -> tuple[bool, bool]:
    """What a checkpoint would hold if two of the weights were in FP8."""
    model, optimizer, topology = trained(corpus)
    core = model.cores[0]
    in_fp8 = [layer.mlp.linear_fc1.weight for layer in list(core.decoder.layers)[1:3]]
    before = [weight.clone() for weight in in_fp8]
    chosen = {id(weight) for weight in in_fp8}
    fp8_utils.is_float8tensor = lambda tensor: id(tensor) in chosen
    fp8_utils.dequantize_fp8_tensor = lambda tensor: torch.full_like(tensor.detach(), 9.0)
    held = []
    for is_loading in (False, True):
        state = sharded_state(model, optimizer=optimizer, topology=topology, is_loading=is_loading)["model"]
        entries = [state[f"decoder.layers.{number}.mlp.linear_fc1.weight"].data for number in (1, 2)]
        held.append(entries)
    saved = all(torch.equal(one, other) for one, other in zip(held[0], before, strict=True))
    return saved, all(entry.eq(9).all().item() for entry in held[1])


def test_a_checkpoint_holds_the_optimizers_weights_in_the_place_of_those_in_fp8(trajectory_corpus):
    """And room of an ordinary kind where it is loaded."""
    assert run_ranks(saved_with_fp8_weights, 2, str(trajectory_corpus)) == [(True, True)] * 2
