"""Whole runs on a GPU: `CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu_runs.py` on a Hopper machine with TE.

`train` as users start it, in processes of its own. Everywhere else this is skipped, as test_gpu.py is.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
from test_checkpoint import shard_hashes
from test_gpu import pytestmark  # noqa: F401 (pytest reads it)
from tiny_runs import STEPS, change, checkpoint_of, killed_after, metric_rows, tiny_config

from megatron_polar.config.load import dump_config
from megatron_polar.config.schema import RunConfig

DEVICE = "cuda"
WIDE = {"num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 8, "num_query_groups": 4}
TENSORWISE = {"train__fp8": "tensorwise"}
BLOCKWISE = {"train__fp8": "blockwise"}
RESUMES = {
    "bf16": {},
    "dropout": {"model__hidden_dropout": 0.1},
    "saved in the background": {"checkpoint__async_save": True},
    "tensorwise": TENSORWISE,
    "weights in tensorwise FP8": TENSORWISE | {"train__fp8_param_gather": True},
    "weights in blockwise FP8": BLOCKWISE | {"train__fp8_param_gather": True},
}


def gpu_config(corpus: Path, directory: Path, **changes) -> RunConfig:
    """Six bf16 steps of a model wide enough for FP8 kernels, with deterministic kernels."""
    settings = {
        "run__device": DEVICE,
        "run__deterministic": True,
        "model__init_method_std": 0.02,
        "train__precision": "bf16",
        "data__pad_to_multiple": 128,
        "data__max_tokens_per_micro_batch": 1024,
    }
    wide = {f"model__{key}": value for key, value in WIDE.items()}
    return tiny_config(corpus, directory, **(settings | wide | changes))


def command(*arguments: str | Path) -> str:
    """Run megatron-polar; returns what it printed."""
    environment = os.environ | {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_polar", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def train(config: RunConfig) -> Path:
    directory = Path(config.run.directory)
    written = directory.with_suffix(".yaml")
    written.write_text(dump_config(config))
    command("train", written)
    return directory


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, tmp_path, trajectory_corpus):
    config = gpu_config(trajectory_corpus, tmp_path / "whole", **RESUMES[name])
    whole = train(config)
    killed = killed_after(whole, tmp_path / "resumed", step=3)
    resumed = train(change(config, run__directory=str(killed)))
    rows, again = metric_rows(whole), metric_rows(resumed)
    assert [row["iteration"] for row in again] == list(range(1, STEPS + 1))
    for one, other in zip(rows, again, strict=True):
        for key in ("rm/loss", "grad-norm", "rm/reward_std"):
            assert one[key] == other[key], f"{key} of iteration {one['iteration']}"
    one, other = (shard_hashes(checkpoint_of(run, STEPS)) for run in (whole, resumed))
    assert one == other
    assert one != shard_hashes(checkpoint_of(whole, 3))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, trajectory_corpus) -> Path:
    """A run with weights in FP8, the form that is farthest from what a checkpoint holds."""
    changes = RESUMES["weights in tensorwise FP8"]
    return train(gpu_config(trajectory_corpus, tmp_path_factory.mktemp("finished") / "run", **changes))


def rewards(model: Path, *, device: str, records: Path, output: Path) -> np.ndarray:
    command("score", "--checkpoint", model, "--device", device, "--input", records, "--output", output)
    return np.array([orjson.loads(line)["reward"] for line in output.read_bytes().splitlines()])


def test_what_a_gpu_has_trained_scores_on_the_cpu_and_after_its_export(finished, tmp_path):
    """Within the roundings of bf16: of the layers, and of the head that is exported."""
    records = tmp_path / "records.jsonl"
    words = [f"word{n}" for n in range(16)]
    lines = [
        {"prompt": f"question {n}", "reference": " ".join(words[: 3 + n % 5]), "output": " ".join(words[n % 7 :])}
        for n in range(24)
    ]
    records.write_bytes(b"\n".join(map(orjson.dumps, lines)) + b"\n")
    here = rewards(finished, device=DEVICE, records=records, output=tmp_path / "gpu.jsonl")
    there = rewards(finished, device="cpu", records=records, output=tmp_path / "cpu.jsonl")
    layout = ("--layout", "sequence-classification")
    command("convert", "to-hf", "--checkpoint", finished, "--output", tmp_path / "export", *layout)
    exported = rewards(tmp_path / "export", device=DEVICE, records=records, output=tmp_path / "exported.jsonl")
    assert here.std() > 0
    np.testing.assert_allclose(there, here, atol=0.02 * abs(here).max())
    np.testing.assert_allclose(exported, here, atol=0.02 * abs(here).max())
    assert np.corrcoef([here, there, exported]).min() > 0.95, "texts stay apart"


def test_weights_of_a_cpu_run_are_the_start_of_one_on_a_gpu(finished, tmp_path, trajectory_corpus):
    """`train.init_from` from a checkpoint that knows nothing of Transformer Engine's layers; the first loss agrees."""
    steps = {"train__num_steps": 2, "checkpoint__save_interval": 2}
    start = train(gpu_config(trajectory_corpus, tmp_path / "cpu", run__device="cpu", **steps))
    first = {}
    for device in ("cpu", DEVICE):
        config = gpu_config(trajectory_corpus, tmp_path / f"from_{device}", **steps)
        run = train(change(config, run__device=device, train__init_from=str(start)))
        first[device] = metric_rows(run)[0]["rm/loss"]
    assert first[DEVICE] == pytest.approx(first["cpu"], rel=2e-2)
