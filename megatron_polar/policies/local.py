"""Policies that answer in this process: embedded ones, and models of transformers."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from megatron_polar.errors import UserError, printable
from megatron_polar.policies.answers import Answer, Ask, NoAnswer
from megatron_polar.policies.backends import EmbeddedPolicy
from megatron_polar.policies.remote import TransformersSpec

_LARGEST_CONFIG_BYTES = 64 * 1024 * 1024

_TURN = threading.Lock()
"""Models take turns: transformers' modules cannot be imported by two threads at once, it loads under a default dtype of
the whole process, and it draws from torch's one generator."""


class EmbeddedSource:
    """The embedded policies of a pool that has others, too: `policies` by their place in the pool."""

    name, concurrency = "embedded policies", 1

    def __init__(self, policies: dict[int, EmbeddedPolicy], *, wrapper: str):
        self._policies, self._wrapper = policies, wrapper

    async def check(self, *, patience: float = 0.0) -> dict:
        return {}

    async def answer(self, ask: Ask) -> Answer:
        await asyncio.sleep(0)  # endpoints have their turn between two draws
        policy, started = self._policies[ask.place.policy], time.monotonic()
        (text,) = policy.generate(ask.prompt.text, num_trajectories=1, seed=ask.seed, wrapper=self._wrapper)
        return Answer(text, "stop", seconds=time.monotonic() - started, tokens=len(text.split()))

    async def close(self) -> None:
        pass


def _refuse_code(spec: TransformersSpec) -> None:
    """Raise UserError for a model with code of its own: transformers would ask at a terminal whether to run it."""
    for file in sorted(Path(spec.path).glob("*.json")):
        if file.stat().st_size > _LARGEST_CONFIG_BYTES or not file.name.endswith("config.json"):
            continue
        with suppress(orjson.JSONDecodeError):  # transformers says what is wrong with it
            if "auto_map" in _keys(orjson.loads(file.read_bytes())):
                raise UserError(
                    f"{file}: asks for code of its own (auto_map), which is never run; serve policy {spec.name} with "
                    "an engine that you trust with it, and name its endpoint"
                )


def _keys(value: Any) -> set[str]:
    """All keys of a decoded JSON value, at any depth."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set(value if isinstance(value, dict) else ()).union(*map(_keys, children))


def _load_model(spec: TransformersSpec) -> tuple[Any, Any]:
    """Tokenizer and model of a directory, on their device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    from megatron_polar.mkl import find_kernels

    find_kernels()
    logging.disable_progress_bar()  # of a second's work; it would stand between our own lines
    tokenizer = AutoTokenizer.from_pretrained(spec.path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(spec.path, local_files_only=True, use_safetensors=True, dtype="auto")
    own = model.generation_config  # its penalties and the like would be sampled with, and no pool.yaml would say so
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return tokenizer, model.to(torch.device(spec.device)).eval()


class TransformersSource:
    """One local model: it has a thread, and one request at a time. Code from its directory is never run."""

    concurrency = 1

    def __init__(self, spec: TransformersSpec, *, wrapper: str):
        self.name, self._spec, self._wrapper = spec.path, spec, wrapper
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transformers")
        self._tokenizer: Any = None
        self._model: Any = None

    async def check(self, *, patience: float = 0.0) -> dict:
        """Load the model. Raises UserError with the path and the reason."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    def _load(self) -> dict:
        spec = self._spec
        if not (Path(spec.path) / "config.json").is_file():
            raise UserError(f"{spec.path}: no config.json, so policy {spec.name} is no model there; correct `path`")
        _refuse_code(spec)
        try:
            with _TURN:
                self._tokenizer, self._model = _load_model(spec)
        except Exception as error:  # of many kinds, by what is wrong with the directory
            reason = printable(str(error) or type(error).__name__, limit=200)
            raise UserError(
                f"{spec.path}: policy {spec.name} cannot be loaded ({reason}); give a directory with a causal language "
                "model in safetensors and its tokenizer, and a device that is there"
            ) from None
        return {spec.name: {"model_type": self._model.config.model_type, "dtype": str(self._model.dtype)}}

    async def answer(self, ask: Ask) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, ask)

    def _generate(self, ask: Ask) -> Answer:
        import torch

        spec, started = self._spec, time.monotonic()
        prompt = self._tokenizer(ask.prompt.text + "\n" * (self._wrapper == "sft"), return_tensors="pt")
        ids = prompt["input_ids"].to(self._model.device)
        if ids.shape[1] == 0:
            raise NoAnswer("a prompt without tokens for this policy")
        with _TURN, torch.inference_mode():
            torch.manual_seed(ask.seed)
            found = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=spec.temperature,
                top_p=spec.top_p,
                top_k=spec.top_k,
                max_new_tokens=spec.max_tokens,
                pad_token_id=self._pad_id(),
            )[0, ids.shape[1] :]
        text = self._continuation(ids[0], found).replace("\0", "")
        if not text.strip():
            raise NoAnswer("an empty answer")
        ending = "length" if len(found) >= spec.max_tokens and int(found[-1]) not in self._end_ids() else "stop"
        return Answer(text, ending, seconds=time.monotonic() - started, tokens=len(found))

    def _continuation(self, prompt, found) -> str:
        """Decoded behind its prompt: alone it could lose the space that separates the two."""
        before, both = (
            self._tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (prompt, [*prompt.tolist(), *found.tolist()])
        )
        return (
            both[len(before) :] if both.startswith(before) else self._tokenizer.decode(found, skip_special_tokens=True)
        )

    def _end_ids(self) -> list[int]:
        ids = self._model.generation_config.eos_token_id
        return [] if ids is None else ids if isinstance(ids, list) else [ids]

    def _pad_id(self) -> int:
        """Never seen, with one row; transformers wants one all the same."""
        own = self._tokenizer.pad_token_id
        return own if own is not None else next(iter(self._end_ids()), 0)

    async def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
