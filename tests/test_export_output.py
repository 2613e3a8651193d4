"""Where an export is written, what it promises of lengths, and whose fault it is when it cannot be written."""

import dataclasses
import json
import os

import pytest
import torch
from hugging_face_models import make_model, tensors_of
from ranks import run_ranks
from safetensors import SafetensorError

from megatron_polar import cli
from megatron_polar.config.load import load_saved_config
from megatron_polar.convert import convert, hugging_face
from megatron_polar.convert.convert import from_hf, to_hf
from megatron_polar.convert.hugging_face import config_of, open_model
from megatron_polar.errors import UserError
from megatron_polar.score import verify_export
from megatron_polar.serve.export import read_export, sequence_length
from megatron_polar.train.checkpoint_files import find_checkpoint


@pytest.fixture(scope="module")
def source(tokenizer_path, tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("export") / "source", tokenizer_path=tokenizer_path)


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "run"
    from_hf(source, output=directory)
    return directory


def export(run, output):
    return to_hf(run, output=output, layout="sequence-classification")


@pytest.mark.parametrize("place", ["link", "dot", "empty"])
def test_a_directory_that_is_there_and_empty_gets_the_files(place, run, source, tmp_path, monkeypatch):
    """A link to a scratch disk; a volume of a container, which cannot be replaced; where one stands."""
    real = tmp_path / "real"
    real.mkdir()
    before, output = real.stat().st_ino, real
    if place == "link":
        output = tmp_path / "link"
        output.symlink_to(real)
    elif place == "dot":
        monkeypatch.chdir(real)
        output = type(real)(".")
    export(run, output)
    assert real.stat().st_ino == before and [path.name for path in real.iterdir() if path.name.startswith(".")] == []
    assert all(torch.equal(tensor, tensors_of(real)[name]) for name, tensor in tensors_of(source).items())
    with pytest.raises(UserError, match="exists and is not empty"):
        export(run, output)


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left"), OSError(28, "No space left")])
def test_a_full_disk_is_not_the_checkpoints_fault(error, run, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(hugging_face, "save_file", full)
    with pytest.raises((UserError, OSError), match="No space left") as caught:
        export(run, tmp_path / "out")
    assert "checkpoint" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_step_that_was_exported_is_the_one_that_is_verified(run, tmp_path, monkeypatch):
    """A run may save another one meanwhile."""
    seen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the command does, which here would outlive it
    monkeypatch.setattr(verify_export, "verify_conversion", lambda checkpoint, *_, **__: seen.append(checkpoint) or 0)
    arguments = ["--output", str(tmp_path / "out"), "--layout", "sequence-classification", "--verify"]
    assert cli.main(["convert", "to-hf", "--checkpoint", str(run), *arguments]) == 0
    assert seen == [find_checkpoint(run)] and seen[0].name == "step_00000000"


def test_verification_runs_where_there_are_gpus(run, tmp_path):
    """It compares on the CPU, and training refuses that where it sees GPUs."""
    arguments = ["convert", "to-hf", "--checkpoint", str(run), "--output", str(tmp_path / "out"), "--verify"]
    assert run_ranks(with_a_gpu_unless_hidden, 1, [*arguments, "--layout", "sequence-classification"]) == [0]


def with_a_gpu_unless_hidden(arguments: list[str]) -> int:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    return cli.main(arguments)


def test_an_export_is_cut_where_its_checkpoint_is(run, tmp_path, monkeypatch):
    """Trained, by a version that let it, on longer texts than the model it came from had promised positions for."""
    saved = load_saved_config(find_checkpoint(run) / "config.yaml")
    model = dataclasses.replace(saved.model, max_position_embeddings=256)
    longer = dataclasses.replace(saved, model=model, data=dataclasses.replace(saved.data, max_sequence_length=768))
    monkeypatch.setattr(convert, "load_saved_config", lambda path: longer)
    exported = export(run, tmp_path / "out")
    settings = read_export(exported)
    assert settings["max_position_embeddings"] == 768
    assert sequence_length(settings, None, otherwise=1) == 768
    (exported / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 256}))  # as it once was
    read = config_of(open_model(exported), run_directory="run", dtype=torch.float32)
    assert read.data.max_sequence_length == 768
