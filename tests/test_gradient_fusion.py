"""Which layers add up weight gradients inside their GEMMs: whatever libraries there are, none where none can."""

import pytest
import torch
from ranks import run_ranks
from test_layouts import VOCAB_SIZE, make_config

from megatron_polar.errors import UserError
from megatron_polar.model import gradient_fusion
from megatron_polar.model.build import build_model
from megatron_polar.model.gradient_fusion import fuse_transformer_engine_layers, resolve_gradient_fusion
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import select_device

GPU_CASES = [
    # layers, Apex, asked for: fused in megatron-core's own layers, in Transformer Engine's, and what the log says
    ("transformer_engine", True, "auto", (True, True, "fused (Apex's kernel)")),
    ("transformer_engine", False, "auto", (False, True, "fused (by Transformer Engine's layers; no Apex)")),
    ("transformer_engine", False, True, (False, True, "fused (by Transformer Engine's layers; no Apex)")),
    ("transformer_engine", True, False, (False, False, "not fused (train.gradient_accumulation_fusion=false)")),
    ("local", True, "auto", (True, False, "fused (Apex's kernel)")),
    ("local", True, True, (True, False, "fused (Apex's kernel)")),
    (
        "local",
        False,
        "auto",
        (False, False, "not fused (neither Transformer Engine's layers nor Apex's kernel)"),
    ),
]


@pytest.mark.parametrize(("impl", "has_apex", "requested", "expected"), GPU_CASES)
def test_a_gpu_fuses_with_whatever_is_there(impl, has_apex, requested, expected, monkeypatch):
    monkeypatch.setattr(gradient_fusion, "has_apex_kernel", lambda: has_apex)
    found = resolve_gradient_fusion(requested, for_training=True, device_kind="cuda", transformer_impl=impl)
    assert (found.megatron, found.transformer_engine, str(found)) == expected


@pytest.mark.parametrize(("kind", "missing"), [("cuda", "neither Transformer Engine's"), ("cpu", "there is no GPU")])
def test_what_is_asked_for_and_not_there_is_refused(kind, missing, monkeypatch):
    monkeypatch.setattr(gradient_fusion, "has_apex_kernel", lambda: kind == "cpu")
    with pytest.raises(UserError, match=missing) as caught:
        resolve_gradient_fusion(True, for_training=True, device_kind=kind, transformer_impl="local")
    assert "set it to auto or false" in str(caught.value)


def test_without_training_there_is_no_buffer_to_add_to(monkeypatch):
    monkeypatch.setattr(gradient_fusion, "has_apex_kernel", lambda: True)
    found = resolve_gradient_fusion(True, for_training=False, device_kind="cuda", transformer_impl="local")
    assert not found.megatron


def built_here(requested) -> tuple:
    config = make_config("unused", parallel={}, gradient_accumulation_fusion=requested)
    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(config.parallel, device=device)
    model = build_model(config, topology=topology, device=device, vocab_size=VOCAB_SIZE)
    return str(model.gradient_fusion), model.transformer_config.gradient_accumulation_fusion


def test_the_cpu_fuses_nothing():
    assert run_ranks(built_here, 1, "auto") == [("not fused (no GPU)", False)]


def test_only_layers_that_know_fusion_are_told_of_it():
    engines, own = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    engines.fuse_wgrad_accumulation = False
    fuse_transformer_engine_layers(torch.nn.Sequential(engines, own))
    assert engines.fuse_wgrad_accumulation
    assert not hasattr(own, "fuse_wgrad_accumulation")
