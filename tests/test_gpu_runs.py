"""Whole runs on a GPU: `CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu_runs.py` on a Hopper machine with TE.

`train` as users start it, in processes of its own. Everywhere else this is skipped, as test_gpu.py is.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
from hugging_face_models import make_model
from test_checkpoint import shard_hashes
from test_gpu import pytestmark  # noqa: F401 (pytest reads it)
from tiny_runs import STEPS, change, checkpoint_of, killed_after, metric_rows, tiny_config

from megatron_polar.config.load import dump_config, load_saved_config
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


def command(*arguments: str | Path, device: str = DEVICE) -> str:
    """Run megatron-polar; returns what it printed. On the CPU it must see no GPU."""
    environment = os.environ | {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
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
    options = ("--device", device, "--input", records, "--output", output)
    command("score", "--checkpoint", model, *options, device=device)
    return np.array([orjson.loads(line)["reward"] for line in output.read_bytes().splitlines()])


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Lines to score: texts of several lengths."""
    path, words = tmp_path_factory.mktemp("records") / "records.jsonl", [f"word{n}" for n in range(16)]
    lines = [
        {"prompt": f"question {n}", "reference": " ".join(words[: 3 + n % 5]), "output": " ".join(words[n % 7 :])}
        for n in range(24)
    ]
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)) + b"\n")
    return path


def assert_agree(here: np.ndarray, *others: np.ndarray) -> None:
    """Within the roundings of bf16: of the layers, and of the head where that is exported."""
    assert here.std() > 0
    for there in others:
        np.testing.assert_allclose(there, here, atol=0.02 * abs(here).max())
    assert np.corrcoef([here, *others]).min() > 0.95, "texts stay apart"


def test_what_a_gpu_has_trained_scores_on_the_cpu_and_after_its_export(finished, records, tmp_path):
    here = rewards(finished, device=DEVICE, records=records, output=tmp_path / "gpu.jsonl")
    there = rewards(finished, device="cpu", records=records, output=tmp_path / "cpu.jsonl")
    layout = ("--layout", "sequence-classification")
    command("convert", "to-hf", "--checkpoint", finished, "--output", tmp_path / "export", *layout)
    exported = rewards(tmp_path / "export", device=DEVICE, records=records, output=tmp_path / "exported.jsonl")
    assert_agree(here, there, exported)


def test_weights_that_know_of_no_gpu_score_there_and_are_the_start_of_a_run(
    records, tokenizer_path, tmp_path, trajectory_corpus
):
    """A checkpoint from Hugging Face, without anything of Transformer Engine's layers: by `score`, and by
    `train.init_from`, whose first loss is that of the model and not of random weights."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path, shard="1GB", std=0.1, **shape)
    command("convert", "from-hf", "--model", source, "--output", tmp_path / "start", "--dtype", "bf16")
    start, saved = tmp_path / "start", tmp_path / "start/checkpoints/step_00000000/config.yaml"
    here, there = (
        rewards(start, device=device, records=records, output=tmp_path / f"{device}.jsonl")
        for device in (DEVICE, "cpu")
    )
    assert_agree(here, there)
    model = dataclasses.replace(load_saved_config(saved).model, transformer_impl="auto", attention="auto")
    losses = {}
    for name, init_from in (("started", str(start)), ("random", None)):
        config = gpu_config(trajectory_corpus, tmp_path / name, train__num_steps=2, train__init_from=init_from)
        losses[name] = metric_rows(train(dataclasses.replace(config, model=model)))[0]["rm/loss"]
    assert np.isfinite(list(losses.values())).all()
    assert losses["random"] == pytest.approx(np.log(2), abs=1e-5), "a head of zeros"
    assert losses["started"] != pytest.approx(np.log(2), abs=1e-4)
