"""Policies of transformers in this process: tiny random models, drawn from as servers are."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson
import pytest

from megatron_polar.data.lines import read_jsonl
from megatron_polar.errors import UserError
from megatron_polar.policies.sample import sample_pool

TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps in the warm sun "


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two language models of different weights, with a byte-level tokenizer."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("models")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT] * 10, vocab_size=300, special_tokens=["<end>"])
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for seed, name in enumerate(("one", "two")):
        PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>").save_pretrained(
            directory / name
        )
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=300, eos_token_id=0, bos_token_id=None, max_position_embeddings=256, **shape)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(directory / name)
    return directory


def write_pool(models: Path, *names: str, **settings) -> Path:
    keys = "".join(f", {key}: {value}" for key, value in {"max_tokens": 12, **settings}.items())
    path = models / "pool.yaml"
    path.write_text("policies:\n" + "".join(f"- {{name: {name}, path: {name}{keys}}}\n" for name in names))
    return path


def draw(pool: Path, output: Path, **settings):
    given = {"prompts": None, "num_prompts": 4, "schedule": "all", **settings}
    return sample_pool(pool, output=output, **given)


def lines_of(output: Path) -> list[dict]:
    return [orjson.loads(line) for _, line in read_jsonl(output)]


def test_local_models_answer_and_the_same_seed_gives_the_same_bytes(models, tmp_path):
    pool = write_pool(models, "one", "two")
    for name in ("first", "second"):
        draw(pool, tmp_path / name)
    assert lines_of(tmp_path / "first") == lines_of(tmp_path / "second")
    for line in lines_of(tmp_path / "first"):
        assert Counter(t["policy"] for t in line["trajectories"]) == {"one": 2, "two": 2}
        assert len({t["text"] for t in line["trajectories"]}) == 4
    (described, _) = json.loads((tmp_path / "first" / "manifest.json").read_text())["collected"]["policies"]
    assert described["served"] == {"model_type": "llama", "dtype": "torch.float32"}
    assert described["counts"]["answered"] == 8 and described["counts"]["tokens"] <= 8 * 12


def test_what_a_models_directory_says_of_sampling_is_not_sampled_with(models, tmp_path):
    """pool.yaml says all of it; a penalty of somebody's generation_config.json would be in no manifest."""
    own = models / "one" / "generation_config.json"
    before = own.read_text()
    pool = write_pool(models, "one", "two")
    draw(pool, tmp_path / "plain")
    own.write_text(json.dumps(json.loads(before) | {"repetition_penalty": 5.0, "do_sample": True, "min_p": 0.5}))
    try:
        draw(pool, tmp_path / "penalised")
    finally:
        own.write_text(before)
    assert lines_of(tmp_path / "plain") == lines_of(tmp_path / "penalised")


def test_an_answer_is_what_stands_behind_the_prompt(models, tmp_path):
    """Greedy (one candidate): the text is transformers' own continuation, with its first space."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    draw(write_pool(models, "one", "two", top_k=1), tmp_path / "out", num_prompts=3, trajectories_per_policy=2)
    tokenizer = AutoTokenizer.from_pretrained(models / "one")
    model = AutoModelForCausalLM.from_pretrained(models / "one").eval()
    journal = (tmp_path / "out" / ".work" / "answers-00000.ndjson").read_bytes().splitlines()
    answers = [entry for entry in map(orjson.loads, journal) if entry["policy"] == "one"]
    quarantine = [orjson.loads(line) for line in (tmp_path / "out" / "quarantine.ndjson").read_bytes().splitlines()]
    assert len(answers) == 6
    assert {entry["reason"] for entry in quarantine} == {"too few trajectories are left to compare"}, "greedy pairs"
    prompts = {entry["prompt"]: entry["text"] for entry in quarantine}
    for entry in answers:
        ids = tokenizer(prompts[entry["row"]], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            found = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0]
        whole = tokenizer.decode(found, skip_special_tokens=True)
        assert prompts[entry["row"]] + entry["text"] == whole
        assert (entry["ending"] == "stop") == (int(found[-1]) == 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), r"three: no config\.json, so policy three is no model there"),
        (
            lambda path: (path / "model.safetensors").unlink(),
            r"three cannot be loaded \(.*give a directory",
        ),
        (
            lambda path: (path / "config.json").write_text(r'{"x": [{"auto\u005fmap": {}}]}'),
            r"asks for code of its own \(auto_map\)",
        ),
        (lambda path: (path / "config.json").write_text("{"), r"three: policy three cannot be loaded \("),
    ],
)
def test_a_directory_that_cannot_be_used_is_named(models, tmp_path, damage, message):
    import shutil

    shutil.rmtree(models / "three", ignore_errors=True)
    shutil.copytree(models / "two", models / "three")
    damage(models / "three")
    with pytest.raises(UserError, match=message) as caught:
        draw(write_pool(models, "one", "three"), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_named(models, tmp_path):
    with pytest.raises(UserError, match=r"policy one cannot be loaded .*a device that is there"):
        draw(write_pool(models, "one", "two", device="tpu-9"), tmp_path / "out")


def test_two_models_load_in_a_fresh_process(models, tmp_path):
    """Elsewhere something has imported transformers already; here threads of two models would do so at once."""
    pool, output = write_pool(models, "one", "two"), tmp_path / "out"
    command = [sys.executable, "-m", "megatron_polar", "sample", "--pool", str(pool), "--num-prompts", "4"]
    done = subprocess.run(
        [*command, "--schedule", "all", "--output", str(output)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(lines_of(output)) == 4
