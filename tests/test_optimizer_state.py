"""What a checkpoint says is a weight's optimizer state is that weight's: else another layout would train wrong ones."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_runs import change, checkpoint_of, metric_rows, tiny_config, train_with
from torch.distributed.checkpoint import FileSystemReader, load

ARCHITECTURES = {"llama": {}, "qwen2": {"model__add_qkv_bias": True}, "qwen3": {"model__qk_layernorm": True}}
LAYOUTS = {
    "DP2": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
}


def bf16_config(corpus, directory, **changes):
    """Steps so large that norms and biases leave their initial ones and zeros, which all look alike."""
    config = tiny_config(corpus, directory, train__precision="bf16", optimizer__lr=3e-2, evaluation__interval=0)
    return change(config, **changes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_main_weights_are_saved_under_their_own_names(architecture, layout, trajectory_corpus, tmp_path):
    config = bf16_config(trajectory_corpus, tmp_path, parallel=LAYOUTS[layout], **ARCHITECTURES[architecture])
    assert run_ranks(train_with, 2, config) == [(0, "")] * 2
    weights, main = read_weights(checkpoint_of(tmp_path, 6))
    assert weights.keys() == main.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, main[name].to(weight.dtype)), name


def read_weights(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and the optimizer's fp32 copies of them, by name."""
    described = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    prefix = "optimizer.state.param."
    wanted = {
        name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in described.items()
        if hasattr(entry, "size") and (name.startswith(prefix) or not name.startswith("optimizer."))
    }
    load(wanted, storage_reader=FileSystemReader(checkpoint), no_dist=not dist.is_initialized())
    main = {name.removeprefix(prefix): tensor for name, tensor in wanted.items() if name.startswith(prefix)}
    weights = {name: wanted[name] for name in main}
    return weights, main


@pytest.mark.parametrize("layout", ["one rank", *LAYOUTS])
def test_a_bf16_run_goes_on_alike_in_another_layout(layout, trajectory_corpus, tmp_path):
    whole = bf16_config(trajectory_corpus, tmp_path / "whole", checkpoint__save_interval=3)
    run = change(whole, run__directory=str(tmp_path / "run"))
    run_ranks(train_with, 2, whole)
    run_ranks(train_with, 2, run, "after_update:3=term")
    world_size = 1 if layout == "one rank" else 2
    run_ranks(train_with, world_size, change(run, parallel=LAYOUTS.get(layout, {})))
    for before, after in zip(metric_rows(tmp_path / "whole"), metric_rows(tmp_path / "run"), strict=True):
        assert after["rm/loss"] == pytest.approx(before["rm/loss"], abs=0.02)  # bf16 sums in another order
