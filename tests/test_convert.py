"""Conversion moves weights and changes nothing: bit by bit through any layout of ranks, reward by reward elsewhere."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hugging_face_models import (
    ALL_MODELS,
    REWARD_MODELS,
    internlm2_reward,
    make_model,
    tensors_of,
)
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_runs import checkpoint_of, run_training, tiny_config, training_refusal

from megatron_polar import cli
from megatron_polar.config.load import dump_config, load_saved_config
from megatron_polar.config.schema import ParallelSection
from megatron_polar.convert.convert import from_hf, to_hf
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.data.tokenizer_training import train_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.score import verify_export
from megatron_polar.score.requests import ScoreRequest
from megatron_polar.score.scorer import load_scorer
from megatron_polar.score.verify_export import score_with_transformers
from megatron_polar.train.build import build_run, join_ranks
from megatron_polar.train.checkpoint import Checkpointer
from megatron_polar.train.checkpoint_files import TrainingState, find_checkpoint
from megatron_polar.train.lock import RunLock
from megatron_polar.train.state_dict import layout_of, load_weights

SPLIT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
REQUESTS = [
    ScoreRequest("red green blue", "red red", ("green", "blue blue blue", ""), "sft"),
    ScoreRequest("one <|reward|> two", "", ("three [UNUSED_TOKEN_130]", "四五六 🙂"), "pretrain"),
    ScoreRequest("a longer prompt. " * 6, "short", ("long " * 20, "short"), "sft"),
]


def layout_for(name: str) -> str:
    return "internlm2" if name.startswith("internlm2") else "sequence-classification"


# --- Bitwise there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_tensor_comes_back_bitwise_through_tp2_pp2(name, trajectory_corpus, tokenizer_path, tmp_path):
    dtype = torch.bfloat16 if "qwen2" in name else torch.float32
    source = make_model(name, tmp_path / "source", tokenizer_path=tokenizer_path, dtype=dtype)
    from_hf(source, output=tmp_path / "converted")
    world_size = 2 if "one key/value head" in name else 4
    parallel = dict(SPLIT) if world_size == 4 else {"pipeline_model_parallel_size": 2}
    run_ranks(resave, world_size, tmp_path / "converted", trajectory_corpus, tmp_path / "run", parallel)
    to_hf(tmp_path / "run", output=tmp_path / "back", layout=layout_for(name), max_shard_bytes=20_000)
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    head = "v_head.weight" if name.startswith("internlm2") else "score.weight"
    if "language model" in name:
        assert not after.pop(head).any()
        before = {key: tensor for key, tensor in before.items() if key not in ("lm_head.weight", "output.weight")}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 1


def resave(converted: Path, corpus: Path, run_directory: Path, parallel: dict) -> None:
    """Load in a layout of four ranks and save from there."""
    checkpoint = find_checkpoint(converted)
    saved = load_saved_config(checkpoint / "config.yaml")
    config = tiny_config(corpus, run_directory, parallel=parallel, train__precision=saved.train.precision)
    config = dataclasses.replace(config, model=saved.model)
    run = build_run(config, *join_ranks(config))
    load_weights(checkpoint, model=run.model, optimizer=run.optimizer)
    state = TrainingState(1, 8, run.data.train.fingerprint, 128, layout_of(run.topology), "gloo", saved.train.precision)
    Checkpointer(
        run_directory,
        section=config.checkpoint,
        model=run.model,
        optimizer=run.optimizer,
        topology=run.topology,
        config_yaml=dump_config(config),
        tokenizer_directory=run.data.tokenizer_directory,
        lock=RunLock(run_directory),
    ).save(state, blocking=True)


# --- Rewards ---------------------------------------------------------------------------------------------------------


def rewards_here(directory: Path, parallel: dict) -> list[float]:
    scorer = load_scorer(directory, parallel=ParallelSection(**parallel), device_kind="cpu")
    return [reward for rewards in scorer.score(REQUESTS) for reward in rewards]


def sequences_here(directory: Path) -> list[list[int]]:
    scorer = load_scorer(directory, device_kind="cpu")
    comparisons = [scorer.tokenize(request) for request in REQUESTS]
    return [c.sequence(i).tolist() for c in comparisons for i in range(len(c.places))]


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_rewards_are_the_same_here_and_in_transformers(name, tokenizer_path, tmp_path):
    source = make_model(name, tmp_path / "source", tokenizer_path=tokenizer_path)
    from_hf(source, output=tmp_path / "run")
    split = {"pipeline_model_parallel_size": 2} if "one key/value head" in name else SPLIT
    here = run_ranks(rewards_here, 1, tmp_path / "run", {})[0]
    (sequences,) = run_ranks(sequences_here, 1, tmp_path / "run")
    found = {
        "TP1": here,
        "split": run_ranks(rewards_here, 2 if "one key" in name else 4, tmp_path / "run", split)[0],
        "straight from the source": run_ranks(rewards_here, 1, source, {})[0],
    }
    layouts = ["sequence-classification"]
    if (name.startswith("llama") and "own size" not in name and "3.1" not in name) or name == "internlm2":
        layouts.append("internlm2")
    for layout in layouts:
        to_hf(tmp_path / "run", output=tmp_path / layout, layout=layout)
        found[f"{layout} in transformers"] = score_with_transformers(tmp_path / layout, sequences)
        found[f"{layout} here"] = run_ranks(rewards_here, 1, tmp_path / layout, {})[0]
    if name == "internlm2":
        tensors = tensors_of(source)
        found["definition"] = [internlm2_reward(tensors, ids, theta=1e6) for ids in sequences]
    else:
        found["source in transformers"] = score_with_transformers(source, sequences)
    assert np.ptp(here) > 0.05, "equal rewards would prove nothing"
    for rewards in found.values():
        np.testing.assert_allclose(rewards, here, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_rewards_in_bf16_differ_by_little(name, tokenizer_path, tmp_path):
    source = make_model(name, tmp_path / "source", tokenizer_path=tokenizer_path, dtype=torch.bfloat16)
    from_hf(source, output=tmp_path / "run")
    here = run_ranks(rewards_here, 1, tmp_path / "run", {})[0]
    (sequences,) = run_ranks(sequences_here, 1, tmp_path / "run")
    to_hf(tmp_path / "run", output=tmp_path / "export", layout=layout_for(name))
    there = score_with_transformers(tmp_path / "export", sequences)
    # As --verify allows: bf16 keeps 8 bits, and beside rewards that lie close together 0.05 would prove nothing.
    assert np.abs(np.subtract(here, there)).max() <= min(0.05, np.ptp(here) / 4)


def test_the_internlm2_export_is_loaded_by_transformers_own_classes(tokenizer_path, tmp_path):
    """With remote code, as users load POLAR's checkpoints, from text, padded on either side."""
    source = make_model("internlm2", tmp_path / "source", tokenizer_path=tokenizer_path)
    from_hf(source, output=tmp_path / "run")
    to_hf(tmp_path / "run", output=tmp_path / "export", layout="internlm2")
    program = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
texts = ["red green\\nred<|reward|>red green\\nblue[UNUSED_TOKEN_130]", "a\\nb<|reward|>a\\nc[UNUSED_TOKEN_130]"]
alone = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
for side in ("left", "right"):
    tokenizer.padding_side = side
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    together = model(**batch).logits.flatten()
    assert (together - torch.tensor(alone)).abs().max() < 1e-5, side
without_mask = model(tokenizer(texts[0], return_tensors="pt").input_ids).logits.item()
assert abs(without_mask - alone[0]) < 1e-6
print(*alone)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "export")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    requests = [ScoreRequest("red green", "red", ("blue",), "sft"), ScoreRequest("a", "b", ("c",), "sft")]
    here = run_ranks(score_requests, 1, tmp_path / "run", requests)[0]
    np.testing.assert_allclose(list(map(float, done.stdout.split())), np.ravel(here), rtol=0, atol=1e-5)


def test_verification_sees_nan_and_rewards_that_tell_nothing(tokenizer_path, tmp_path, monkeypatch, capsys):
    source = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path)
    from_hf(source, output=tmp_path / "run")
    to_hf(tmp_path / "run", output=tmp_path / "export", layout="sequence-classification")
    assert run_ranks(verify_with, 1, tmp_path / "run", tmp_path / "export", None) == [0]
    assert run_ranks(verify_with, 1, tmp_path / "run", tmp_path / "export", float("nan")) == [1]
    assert run_ranks(verify_with, 1, tmp_path / "run", tmp_path / "export", 0.5) == [1]
    from_hf(source, output=tmp_path / "zero", head="init")
    to_hf(tmp_path / "zero", output=tmp_path / "zero export", layout="sequence-classification")
    assert run_ranks(verify_with, 1, tmp_path / "zero", tmp_path / "zero export", None) == [1]


def verify_with(checkpoint: Path, export: Path, spoilt: float | None) -> int:
    """The check, with the fifth reward of transformers replaced."""
    original = verify_export.score_with_transformers

    def score(*arguments):
        rewards = original(*arguments)
        return rewards if spoilt is None else [*rewards[:4], spoilt, *rewards[5:]]

    verify_export.score_with_transformers = score
    return verify_export.verify_conversion(checkpoint, export, with_texts=True)


def test_what_came_in_is_verified_against_its_source(tokenizer_path, tmp_path, capsys):
    """Through the command, as users do; the source says nothing of a padding token."""
    source = make_model("qwen3", tmp_path / "source", tokenizer_path=tokenizer_path)
    change_config(pad_token_id=None)(source)
    arguments = ["convert", "from-hf", "--model", str(source), "--verify", "--output"]
    assert run_ranks(cli.main, 1, [*arguments, str(tmp_path / "run")]) == [0]
    assert run_ranks(cli.main, 1, [*arguments, str(tmp_path / "zero"), "--head", "init"]) == [2]
    assert not (tmp_path / "zero").exists()


def test_a_tokenizer_beside_the_models_own_is_compared_with_it(tokenizer_path, tmp_path, capfd):
    source = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path)
    from_hf(source, output=tmp_path / "same", tokenizer=tokenizer_path)
    assert "own tokenizer" not in capfd.readouterr().err
    texts = [f"{chr(97 + n % 26)}{chr(98 + n % 25)} hello world {n}" for n in range(300)]
    other = train_tokenizer(texts, vocab_size=420, output=tmp_path / "other.model")
    from_hf(source, output=tmp_path / "other", tokenizer=other)
    assert "differently from" in capfd.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(tokenizer_path, tmp_path):
    source = make_model("internlm2", tmp_path / "source", tokenizer_path=tokenizer_path)
    from_hf(source, output=tmp_path / "run")
    to_hf(tmp_path / "run", output=tmp_path / "export", layout="internlm2")
    change_config(reward_token_id=12)(tmp_path / "export")
    with pytest.raises(UserError, match=r"config\.json has reward_token_id 12"):
        from_hf(tmp_path / "export", output=tmp_path / "again")
    assert "config.json has reward_token_id 12" in run_ranks(refusal_of_scorer, 1, tmp_path / "export")[0]


def score_requests(directory: Path, requests: list) -> list:
    return load_scorer(directory, device_kind="cpu").score(requests)


# --- Tokenizer, head, precision --------------------------------------------------------------------------------------


def test_an_export_has_the_tokenizer_of_training_in_two_forms(tokenizer_path, tmp_path):
    from transformers import AutoTokenizer

    source = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path)
    from_hf(source, output=tmp_path / "run")
    to_hf(tmp_path / "run", output=tmp_path / "export", layout="sequence-classification")
    ours, again = load_tokenizer(tokenizer_path), load_tokenizer(tmp_path / "export")
    assert again.fingerprint == ours.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    generator = np.random.default_rng(5)
    alphabet = [*"abc XYZ  \n\t.,0123é東🙂", "word", " the", "ing"]
    for _ in range(300):
        half = "".join(generator.choice(alphabet, size=generator.integers(0, 40)))
        ids = theirs(half + ours.separator_token + half + ours.reward_token).input_ids
        assert ids == [ours.bos_id, *ours.encode(half), ours.separator_id, *ours.encode(half), ours.reward_id]


def test_a_reward_token_that_pads_is_refused_where_it_would_not_be_read(tokenizer_path, tmp_path):
    """transformers' classifiers read the last token that is no padding."""
    source = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path)
    assert load_tokenizer(source, reward_token="<pad>").reward_id == load_tokenizer(source).pad_id
    from_hf(source, output=tmp_path / "run", reward_token="<pad>")
    with pytest.raises(UserError, match=r"the reward token '<pad>' is also the padding token.*--layout internlm2"):
        to_hf(tmp_path / "run", output=tmp_path / "export", layout="sequence-classification")
    assert not (tmp_path / "export").exists()
    export = to_hf(tmp_path / "run", output=tmp_path / "export", layout="internlm2")
    (sequences,) = run_ranks(sequences_here, 1, tmp_path / "run")
    here = run_ranks(rewards_here, 1, tmp_path / "run", {})[0]
    np.testing.assert_allclose(score_with_transformers(export, sequences), here, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reward_id", [0, 1, 9])
def test_padding_for_the_comparison_is_never_the_reward_token(reward_id, tokenizer_path, tmp_path):
    model = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path)
    sequences = [[20, 30, reward_id], [40, 50, 60, 70, reward_id]]
    change_config(pad_token_id=15)(model)
    wanted = score_with_transformers(model, sequences)
    change_config(pad_token_id=None)(model)
    np.testing.assert_allclose(score_with_transformers(model, sequences), wanted, rtol=0, atol=1e-6)


def test_a_head_is_never_dropped_or_made_up_silently(tokenizer_path, tmp_path, capsys):
    language = make_model("llama language model", tmp_path / "lm", tokenizer_path=tokenizer_path)
    reward = make_model("llama", tmp_path / "rm", tokenizer_path=tokenizer_path)
    from_hf(language, output=tmp_path / "a")
    assert "no reward head; it starts at zero" in capsys.readouterr().err
    with pytest.raises(UserError, match="no reward head to load"):
        from_hf(language, output=tmp_path / "b", head="load")
    from_hf(reward, output=tmp_path / "c", head="init")
    assert "is replaced by zeros" in capsys.readouterr().err
    to_hf(tmp_path / "c", output=tmp_path / "d", layout="sequence-classification")
    assert not tensors_of(tmp_path / "d")["score.weight"].any()
    assert "has no reward head, so it cannot score" in run_ranks(refusal_of_scorer, 1, language)[0]


def refusal_of_scorer(directory: Path) -> str:
    try:
        load_scorer(directory, device_kind="cpu")
    except UserError as error:
        return str(error)
    return "accepted"


def test_fp16_is_written_where_it_fits_and_refused_where_it_overflows(tokenizer_path, tmp_path):
    source = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path)
    from_hf(source, output=tmp_path / "run")
    to_hf(tmp_path / "run", output=tmp_path / "half", layout="sequence-classification", dtype="fp16")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"
    spoil(source, "model.layers.1.mlp.down_proj.weight", 70000.0)
    from_hf(source, output=tmp_path / "large")
    with pytest.raises(UserError, match=r"down_proj.weight: has values up to 7e\+04, more than float16 can hold"):
        to_hf(tmp_path / "large", output=tmp_path / "no", layout="sequence-classification", dtype="fp16")
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no*"))


def spoil(directory: Path, name: str, value: float) -> None:
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(-1)[3] = value
            save_file(tensors, file, metadata={"format": "pt"})


# --- Training goes on from it ----------------------------------------------------------------------------------------


def test_a_run_starts_from_a_converted_model(tokenizer_path, trajectory_corpus, tmp_path):
    source = make_model("llama language model", tmp_path / "source", tokenizer_path=tokenizer_path)
    from_hf(source, output=tmp_path / "base")
    model = load_saved_config(tmp_path / "base/checkpoints/step_00000000/config.yaml").model
    config = tiny_config(
        trajectory_corpus, tmp_path / "run", train__init_from=str(tmp_path / "base"), train__num_steps=3
    )
    config = dataclasses.replace(config, model=model)
    run_training(config)
    assert checkpoint_of(tmp_path / "run", 3).is_dir()
    other = dataclasses.replace(model, rotary_base=5e5)
    config = tiny_config(trajectory_corpus, tmp_path / "other", train__init_from=str(tmp_path / "base"))
    message = training_refusal(dataclasses.replace(config, model=other))
    assert "model.rotary_base=10000.0" in message and "500000.0" in message


# --- What cannot be converted ----------------------------------------------------------------------------------------


def change_config(**changes):
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def drop_tensor(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.self_attn.k_proj.weight"]
    index.write_text(json.dumps(content))


def point_outside(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../../secret.safetensors"
    index.write_text(json.dumps(content))


def cut_file(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def remove_file(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[1].unlink()


def only_pickles(directory: Path) -> None:
    for path in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"pickle")


def add_tensor(directory: Path) -> None:
    save_file({"score.bias": torch.zeros(1)}, directory / "more.safetensors")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["score.bias"] = "more.safetensors"
    index.write_text(json.dumps(content))


def deepen_head(directory: Path) -> None:
    """As Qwen2's own reward models: a layer, an activation, a layer."""
    save_file({f"score.{place}.weight": torch.zeros(4, 4) for place in (0, 2)}, directory / "head.safetensors")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["score.weight"]
    content["weight_map"] |= {f"score.{place}.weight": "head.safetensors" for place in (0, 2)}
    index.write_text(json.dumps(content))


REFUSED = {
    "no model": (lambda d: (d / "config.json").unlink(), "no config.json here"),
    "broken json": (lambda d: (d / "config.json").write_text("{"), "config.json: cannot be read"),
    "another family": (change_config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel', which cannot be converted"),
    "no family": (change_config(architectures=None), "architectures is None"),
    "another type": (change_config(model_type="gpt2"), "model_type is 'gpt2'"),
    "a size that is none": (change_config(hidden_size="big"), "hidden_size is 'big'"),
    "a size that does not fit": (change_config(intermediate_size=64), "does not fit config.json"),
    "bias on all projections": (change_config(attention_bias=True), "attention_bias is True"),
    "another activation": (change_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "two scalings": (change_config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling disagree"),
    "two scalings of a kind": (
        change_config(rope_parameters={"rope_theta": 1e4}, rope_scaling={"rope_theta": 1e6}),
        "rope_scaling disagree",
    ),
    "quantised weights": (change_config(quantization_config={"quant_method": "fp8"}), "quantization_config is set"),
    "scaled positions": (change_config(rope_parameters={"rope_type": "yarn"}), "RoPE scaling"),
    "a missing tensor": (drop_tensor, "has no tensor model.layers.1.self_attn.k_proj.weight"),
    "a head of several layers": (deepen_head, "its head has several layers, POLAR's has one: take another model"),
    "an additional tensor": (add_tensor, "such as score.bias"),
    "a file outside": (point_outside, "does not map tensors to files of this directory"),
    "a cut file": (cut_file, "fetch"),
    "a missing file": (remove_file, "is missing"),
    "pickles only": (only_pickles, "is a pickle, which could run code"),
    "NaN": (lambda d: spoil(d, "model.norm.weight", float("nan")), "model.norm.weight: holds NaN or infinity"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "neither tokenizer.json nor tokenizer.model"),
    "a smaller vocabulary": (change_config(vocab_size=100), "the tokenizer has ids up to"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_in_one_line_and_leaves_nothing(name, tokenizer_path, tmp_path, capsys):
    damage, reason = REFUSED[name]
    source = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path)
    damage(source)
    status = cli.main(["convert", "from-hf", "--model", str(source), "--output", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(lines) == 1 and reason in lines[0]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_nothing_is_overwritten(tokenizer_path, tmp_path):
    source = make_model("llama", tmp_path / "source", tokenizer_path=tokenizer_path)
    from_hf(source, output=tmp_path / "run")
    with pytest.raises(UserError, match="has checkpoints already"):
        from_hf(source, output=tmp_path / "run")
    with pytest.raises(UserError, match="exists and is not empty"):
        to_hf(tmp_path / "run", output=source, layout="sequence-classification")


def test_a_kill_in_the_middle_leaves_no_directory_that_looks_finished(tokenizer_path, tmp_path):
    source = make_model("qwen3", tmp_path / "source", tokenizer_path=tokenizer_path)
    from_hf(source, output=tmp_path / "run")
    layout = ["--layout", "sequence-classification"]
    for arguments in (
        ["from-hf", "--model", str(source), "--output", str(tmp_path / "again")],
        ["to-hf", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "export"), *layout],
    ):
        program = (
            "import os, sys, signal\nfrom megatron_polar import cli\nfrom megatron_polar.convert import convert\n"
            "real, seen = convert._in_range, []\n"
            "def dies(*a, **k):\n    seen.append(1)\n"
            "    if len(seen) == 9: os.kill(os.getpid(), signal.SIGKILL)\n    return real(*a, **k)\n"
            "convert._in_range = dies\ncli.main(sys.argv[1:])\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, "convert", *arguments], capture_output=True, check=False
        )
        assert done.returncode == -9, done.stderr[-1000:]
    assert not (tmp_path / "export").exists()
    with pytest.raises(UserError, match="none of its 0"):
        find_checkpoint(tmp_path / "again")
    from_hf(source, output=tmp_path / "again")
    to_hf(tmp_path / "again", output=tmp_path / "export", layout="sequence-classification")
    assert all(torch.equal(a, tensors_of(tmp_path / "export")[n]) for n, a in tensors_of(source).items())
