"""Four small Llamas, trained in seconds, and transformers' own server of the RFT study around them."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "examples" / "study"
_START_SECONDS = 120.0
_LAST_FILE = "trained"
_LEAST_TOKENS = 4  # of an answer: `sample` refuses empty ones, and those with a NUL; that would look like one lost
_PROMPT_WORDS, _ANSWER_WORDS = 4, 24


def train_policies(directory: Path, names: tuple[str, ...], *, steps: int) -> dict[str, Path]:
    """Fit one Llama a name on its own share of Python's language reference: Hugging Face directories.

    Those that are there are taken as they are. In a process of its own: whoever measures the sampler's processor time
    has no torch in its memory.
    """
    wanted = {name: directory / name for name in names}
    if not all((path / _LAST_FILE).exists() for path in wanted.values()):
        process = multiprocessing.get_context("spawn").Process(target=_train, args=(directory, names, steps))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit("error: the policies could not be trained; the message is above")
    return wanted


def _train(directory: Path, names: tuple[str, ...], steps: int) -> None:
    sys.path.insert(0, str(STUDY))
    import rft_policies as policies
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    from megatron_polar.policies.ngram import join_words, read_documents

    torch.set_num_threads(1)
    documents = read_documents(None)
    tokenizer = policies.train_tokenizer([join_words(document) for document in documents], directory / "tokenizer")
    width = _PROMPT_WORDS + _ANSWER_WORDS
    for number, name in enumerate(names):
        pieces = [
            document[first : first + width]
            for document in documents[number :: len(names)]
            for first in range(0, len(document) - width, width)
        ]
        pairs = [(join_words(piece[:_PROMPT_WORDS]), " " + join_words(piece[_PROMPT_WORDS:])) for piece in pieces]
        shape = policies.Shape(hidden_size=64, num_layers=2)
        start = policies.new_model(tokenizer, shape, seed=number, output=directory / f"{name}-random")
        how = policies.Fit(steps=steps, batch=16, lr=4e-3, on_prompts=True)
        policies.fit(start, pairs, how, seed=number, device="cpu", outputs={directory / name: steps})
        rules = GenerationConfig.from_pretrained(directory / name)
        rules.min_new_tokens = _LEAST_TOKENS
        rules.suppress_tokens = AutoTokenizer.from_pretrained(tokenizer)("\0")["input_ids"]
        rules.save_pretrained(directory / name)
        (directory / name / _LAST_FILE).touch()


@contextlib.contextmanager
def serving(directories: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """examples/study/rft_server.py in a process of its own while the block lasts; gives its URL and its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    policies = [f"{name}={path}" for name, path in directories.items()]
    command = [sys.executable, str(STUDY / "rft_server.py"), *policies, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, env=environment) as process:
        try:
            _wait_for(process, f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.kill()


def _wait_for(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/v1/models", trust_env=False).status_code == 200:
                return
        time.sleep(0.05)
    sys.exit(f"error: the server did not answer within {_START_SECONDS:.0f} s, or ended; its message is above")
