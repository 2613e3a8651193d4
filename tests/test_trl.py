"""TRL's GRPOTrainer trains a tiny policy on the rewards of a real reward model behind our server, and they rise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import _words
from servers import serving
from tiny_runs import STEPS, run_training, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/rl/trl/train.py"
WORDS = ["<pad>", "<eos>", *(f"love{policy}" for policy in range(5)), "ba", "ke", "li", "mo", "nu", "ra", "si", "to"]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, trajectory_corpus) -> Path:
    """A run directory with a reward model of 40 thousand parameters."""
    directory = tmp_path_factory.mktemp("trl") / "reward_model"
    run_training(
        tiny_config(trajectory_corpus, directory, optimizer__lr=1e-2, checkpoint__save_interval=STEPS), world_size=1
    )
    return directory


def make_policy(directory: Path) -> Path:
    """A random Llama with one layer and one token a word."""
    words = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    ).save_pretrained(directory)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_data(path: Path, count: int = 64) -> Path:
    generator = np.random.default_rng(4)
    rows = []
    for _ in range(count):
        prompt = " ".join(generator.choice(WORDS[7:], 3))
        reference = " ".join(["love2" if k % 3 == 0 else word for k, word in enumerate(_words(generator, 8))])
        rows.append({"prompt": prompt, "reference": reference})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(tmp_path: Path, *options: str, url: str, retries: int = 8) -> subprocess.CompletedProcess:
    """Run the example as its reader would."""
    settings = {"MEGATRON_POLAR_REWARD_URL": url, "MEGATRON_POLAR_REWARD_RETRIES": str(retries)}
    environment = {**os.environ, **settings}
    policy = make_policy(tmp_path / "policy")
    arguments = ["--model", policy, "--data", write_data(tmp_path / "data.jsonl"), "--output", tmp_path / "trained"]
    arguments += ["--cpu", "--batch-size", "32", "--max-completion-length", "8", "--learning-rate", "2e-2", *options]
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)


def test_the_mean_reward_of_a_policy_rises(reward_model, tmp_path):
    with serving(reward_model, directory=tmp_path) as server:
        result = train(tmp_path, "--max-steps", "30", url=server.url)
    assert result.returncode == 0, result.stderr[-3000:]
    history = json.loads((tmp_path / "trained/trainer_state.json").read_text())["log_history"]
    rewards = [row["rewards/trl_reward/mean"] for row in history if "rewards/trl_reward/mean" in row]
    spread = history[0]["rewards/trl_reward/std"]
    assert len(rewards) == 30
    # Answers of the trained policy are better than those of the random one by more than these differ among themselves.
    assert np.mean(rewards[-5:]) - np.mean(rewards[:3]) > spread > 0
    assert (tmp_path / "trained/model.safetensors").exists()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "error: set MEGATRON_POLAR_REWARD_URL to the reward server's address, such as http://127.0.0.1:8000"),
        ({"URL": "http://127.0.0.1:9", "STD": "0"}, "error: mean=None and std=0.0: give both, std above 0, or neither"),
    ],
)
def test_wrong_variables_are_said_at_the_start(variables, said, tmp_path):
    """Before TRL is loaded, and before the model and the data are looked at."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MEGATRON_POLAR_REWARD_")}
    environment |= {f"MEGATRON_POLAR_REWARD_{name}": value for name, value in variables.items()}
    command = [sys.executable, str(EXAMPLE), "--model", "none", "--data", "none", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode != 0
    assert result.stderr.splitlines() == [said]


def test_a_run_whose_rewards_cannot_be_had_ends_with_the_reason(tmp_path):
    result = train(tmp_path, "--max-steps", "2", url="http://127.0.0.1:9", retries=1)
    assert result.returncode != 0
    assert re.search(r"RewardError: no reward for item \d+ .*no connection .*2 attempts", result.stderr)
