"""Policies of a pool that are not embedded: models behind OpenAI-compatible servers, and in local directories."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from megatron_polar.errors import UserError
from megatron_polar.policies.keys import TEXT, WORD, Key, check_section, integer, number, one_of

_OF_THE_ENDPOINT = ("api_key_env", "max_concurrency", "requests_per_minute")
_HOW_IT_IS_ASKED = ("endpoint", *_OF_THE_ENDPOINT, "timeout_seconds", "retries", "backoff_seconds", "device")
"""Keys that may change between two calls for one output: no answer depends on them."""


@dataclass(frozen=True)
class HttpSpec:
    """A model behind an endpoint (a base URL without /v1), how it samples, and how it may be asked.

    top_k=0 sends none: it is no key of OpenAI's own API. `extra`: keys of requests beside these, as the server knows
    them. requests_per_minute=0 is no limit. api_key_env names an environment variable; the key itself is in no field.
    """

    name: str
    endpoint: str
    model: str
    api: Literal["completions", "chat"]
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    extra: dict[str, Any]
    api_key_env: str
    max_concurrency: int
    requests_per_minute: int
    timeout_seconds: float
    retries: int
    backoff_seconds: float

    def identity(self) -> dict:
        """What answers depend on: a later call with another identity must not continue this output."""
        identity = _identity(self, backend="http")
        return identity if self.extra else {key: value for key, value in identity.items() if key != "extra"}


@dataclass(frozen=True)
class TransformersSpec:
    """A local directory with a Hugging Face model (safetensors), asked in this process."""

    name: str
    path: str
    device: str
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int

    def identity(self) -> dict:
        """As HttpSpec.identity."""
        return _identity(self, backend="transformers")


def _identity(spec: HttpSpec | TransformersSpec, *, backend: str) -> dict:
    return {"backend": backend} | {k: value for k, value in asdict(spec).items() if k not in _HOW_IT_IS_ASKED}


# --- reading a pool --------------------------------------------------------------------------------------------------

_SAMPLING = {
    "temperature": number(1.0, 0, 10, open_low=True),
    "top_p": number(0.9, 0, 1, open_low=True),
    "top_k": integer(50, 0),
    "max_tokens": integer(4096, 1),
}
_OURS = ("model", "prompt", "messages", "temperature", "top_p", "max_tokens", "seed", "n", "stream", "stream_options")
"""Keys of requests that are no one else's."""


def _is_extra(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


_HTTP_KEYS = {
    "name": WORD,
    "backend": TEXT._replace(default="http"),
    "endpoint": TEXT,
    "model": TEXT,
    "api": one_of("completions", "chat"),
    **_SAMPLING,
    "extra": Key({}, "a mapping of other keys of requests", _is_extra),
    "api_key_env": Key("", "the name of an environment variable", lambda value: isinstance(value, str)),
    "max_concurrency": integer(16, 1, 4096),
    "requests_per_minute": integer(0, 0),
    "timeout_seconds": number(600, 0, 86400, open_low=True),
    "retries": integer(8, 0, 100),
    "backoff_seconds": number(0.5, 0, 60),
}
_TRANSFORMERS_KEYS = {
    "name": WORD,
    "backend": TEXT._replace(default="transformers"),
    "path": TEXT,
    "device": TEXT._replace(default="cpu"),
    **_SAMPLING,
}


def read_http(entry: dict[str, Any], sampling: dict[str, Any], *, where: str) -> HttpSpec:
    """Check and complete an entry of `policies:` with an endpoint. Raises UserError."""
    variable = entry.get("api_key_env")
    if variable is not None and not (
        isinstance(variable, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", variable)
    ):
        # Not shown: it may be the key itself.
        raise UserError(
            f"{where}: api_key_env is not the name of an environment variable; put the key into one (export "
            "MY_KEY=...) and name it here: a pool file holds no keys"
        )
    policy = check_section(entry, _with_defaults(_HTTP_KEYS, sampling), where=where)
    policy.pop("backend")
    policy["endpoint"] = _base_url(policy["endpoint"], where=where)
    taken = [key for key in policy["extra"] if key in _OURS or (key == "top_k" and policy["top_k"])]
    if taken:
        raise UserError(
            f"{where}: extra has {taken[0]}, which `sample` sets in every request; take it out"
            + (", or set top_k: 0" if taken[0] == "top_k" else "")
        )
    for name in ("temperature", "top_p", "timeout_seconds", "backoff_seconds"):
        policy[name] = float(policy[name])
    return HttpSpec(**policy)


def read_transformers(
    entry: dict[str, Any], sampling: dict[str, Any], *, directory: Path, where: str
) -> TransformersSpec:
    """Check and complete an entry of `policies:` with a path, relative to `directory`. Raises UserError."""
    policy = check_section(entry, _with_defaults(_TRANSFORMERS_KEYS, sampling), where=where)
    policy.pop("backend")
    policy |= {name: float(policy[name]) for name in ("temperature", "top_p")}
    return TransformersSpec(**{**policy, "path": str(directory / policy["path"])})


def _with_defaults(keys: dict[str, Key], sampling: dict[str, Any]) -> dict[str, Key]:
    return {name: key._replace(default=sampling.get(name, key.default)) for name, key in keys.items()}


def _base_url(text: str, *, where: str) -> str:
    """An endpoint without its last slash and without /v1, which requests add."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.userinfo:
        raise UserError(
            f"{where}: endpoint has a user or password in it (of {url.host}); put the key into an environment variable "
            "and name it: api_key_env"
        )
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UserError(
            f"{where}: endpoint={text[:60]!r} is no base URL of a server; give one such as http://node7:8000/v1"
        )
    return str(url).rstrip("/").removesuffix("/v1")


def check_together(specs: Sequence[Any], *, where: str) -> None:
    """Policies of one endpoint share its limits and its key. Raises UserError where they contradict each other."""
    first: dict[str, HttpSpec] = {}
    for spec in specs:
        if not isinstance(spec, HttpSpec):
            continue
        other = first.setdefault(spec.endpoint, spec)
        for key in _OF_THE_ENDPOINT:
            if getattr(spec, key) != getattr(other, key):
                raise UserError(
                    f"{where}: {key}={getattr(spec, key)!r} of {spec.name} and {getattr(other, key)!r} of {other.name} "
                    f"are for one endpoint, {spec.endpoint}; give both policies one value"
                )


def read_key(spec: HttpSpec) -> str | None:
    """The API key from the environment; it appears in no message. Raises UserError for one that cannot be sent."""
    if not spec.api_key_env:
        return None
    key = os.environ.get(spec.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        problem = "not one word of printable ASCII" if key else "not set or empty"
        raise UserError(
            f"{spec.endpoint}: the environment variable {spec.api_key_env} with its API key (policy {spec.name}) is "
            f"{problem}; export it, or take api_key_env out of the pool"
        )
    return key
