"""Shared by all tests: one thread, warm imports for forked ranks, tiny corpora made once a session."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: see ranks.py
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# A shell's background jobs, as `make test` may be, inherit that Ctrl-C is ignored; programs under test do not.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def the_test_process_stays_clean():
    """See ranks.py: what a test leaves behind here, every rank and server that is forked later would begin with."""
    yield
    device = sys.modules.get("megatron_polar.parallel.device")
    assert device is None or device._active_mode is None, "the CUDA substitution belongs into a rank: run_ranks"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    """A small sentencepiece tokenizer with POLAR's control tokens."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_tokenizer(directory: Path) -> Path:
    """Train the tests' tokenizer into `directory`."""
    from megatron_polar.data.tokenizer_training import train_tokenizer

    generator = np.random.default_rng(5)
    texts = [" ".join(_words(generator, 30)) for _ in range(400)]
    return train_tokenizer(texts, vocab_size=420, output=directory / "tokenizer.model")


def _words(generator: np.random.Generator, count: int) -> list[str]:
    syllables = ["ba", "ke", "li", "mo", "nu", "ra", "si", "to", "ve", "zo"]
    return ["".join(generator.choice(syllables, generator.integers(1, 4))) for _ in range(count)]


def write_trajectories(path: Path, *, num_prompts: int, seed: int, policies: int = 5) -> Path:
    """Trajectory records: three policies per prompt, the first with two trajectories; each policy loves one word."""
    generator = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(num_prompts):
            chosen = generator.choice(policies, 3, replace=False)
            trajectories = []
            for policy in [chosen[0], *chosen]:
                words = _words(generator, int(generator.integers(4, 14)))
                words[::3] = [f"love{policy}"] * len(words[::3])
                trajectories.append({"policy": f"policy{policy}", "text": " " + " ".join(words)})
            prompt = " ".join(_words(generator, int(generator.integers(2, 8))))
            file.write(json.dumps({"prompt": prompt, "trajectories": trajectories, "wrapper": "pretrain"}) + "\n")
    return path


def write_rankings(path: Path, *, num_prompts: int, seed: int, candidates: int = 4) -> Path:
    """Rankings: the better a candidate, the more of the reference's words it repeats."""
    generator = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(num_prompts):
            reference = _words(generator, 10)
            ranked = [" ".join(reference[: 8 - 2 * k] + _words(generator, 3)) for k in range(candidates)]
            record = {"prompt": " ".join(_words(generator, 5)), "reference": " ".join(reference), "ranked": ranked}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="session")
def trajectory_corpus(tmp_path_factory, tokenizer_path) -> Path:
    """A preprocessed dataset of 80 trajectory groups."""
    from megatron_polar.data.preprocess import preprocess

    directory = tmp_path_factory.mktemp("trajectories")
    source = write_trajectories(directory / "input.jsonl", num_prompts=80, seed=1)
    preprocess([source], output=directory / "dataset", tokenizer_path=tokenizer_path)
    return directory / "dataset"


@pytest.fixture(scope="session")
def ranking_corpus(tmp_path_factory, tokenizer_path) -> Path:
    """A preprocessed dataset of 40 rankings of four candidates."""
    from megatron_polar.data.preprocess import preprocess

    directory = tmp_path_factory.mktemp("rankings")
    source = write_rankings(directory / "input.jsonl", num_prompts=40, seed=2)
    preprocess([source], output=directory / "dataset", tokenizer_path=tokenizer_path)
    return directory / "dataset"


@pytest.fixture(scope="session")
def sentence_tokenizer(tmp_path_factory) -> Path:
    """A tokenizer of 400 tokens, trained on the records of sentences.py."""
    from sentences import lines

    from megatron_polar.data.tokenizer_training import train_tokenizer

    directory = tmp_path_factory.mktemp("sentence_tokenizer")
    return train_tokenizer(lines(50, seed=1), vocab_size=400, output=directory / "t.model")


@pytest.fixture(scope="session")
def sentence_files(tmp_path_factory) -> Path:
    """A directory with 120 records in three files, plain, gzip and zstandard."""
    from sentences import lines, write_lines

    directory = tmp_path_factory.mktemp("sentence_files")
    for index, name in enumerate(("b.jsonl", "a.jsonl.gz", "c.jsonl.zst")):
        write_lines(directory / name, lines(40, seed=index))
    return directory


@pytest.fixture(scope="session")
def sentence_corpus(tmp_path_factory, sentence_files, sentence_tokenizer) -> Path:
    """The dataset of `sentence_files`."""
    from sentences import UNIT_BYTES

    from megatron_polar.data.preprocess import preprocess

    output = tmp_path_factory.mktemp("sentence_corpus") / "out"
    preprocess([sentence_files], output=output, tokenizer_path=sentence_tokenizer, unit_bytes=UNIT_BYTES)
    return output


@pytest.fixture
def client_of(tokenizer_path):
    """Make clients with short pauses; they are closed after the test."""
    from megatron_polar.serve.client import RewardClient

    made = []

    def make(urls, engine="vllm", **options):
        defaults = {"tokenizer": tokenizer_path, "batch_size": 4, "max_concurrency": 3, "backoff_seconds": 0.01}
        client = RewardClient(urls, engine=engine, **(defaults | options))
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()
