"""What is known of the model behind a server: from the directory that a client is given, and from /v1/models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from megatron_polar import log
from megatron_polar.data.template import (
    EXPORTED_RESPONSE_LENGTH,
    EXPORTED_SEQUENCE_LENGTH,
    EXPORTED_TOKENIZER,
    EXPORTED_WRAPPER,
    WRAPPERS,
    exported_wrapper,
)
from megatron_polar.errors import UserError, printable

_OURS = "megatron-polar"


def read_export(directory: Path | str) -> dict[str, Any]:
    """The config.json of an export; {} where there is none that can be read."""
    path = Path(directory) / "config.json"
    try:
        config = orjson.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def sequence_length(config: Mapping[str, Any], given: int | None, *, otherwise: int) -> int:
    """Tokens of the longest sequence. Raises UserError where a user's number is not the export's."""
    return _length(config, EXPORTED_SEQUENCE_LENGTH, given, name="max_sequence_length", otherwise=otherwise)


def response_length(config: Mapping[str, Any], given: int | None, *, otherwise: int) -> int:
    """Tokens kept of an answer. Raises UserError where a user's number is not the export's."""
    return _length(config, EXPORTED_RESPONSE_LENGTH, given, name="max_response_length", otherwise=otherwise)


def _length(config: Mapping[str, Any], key: str, given: int | None, *, name: str, otherwise: int) -> int:
    saved = config.get(key)
    saved = saved if type(saved) is int and saved > 0 else None
    if given is not None and saved is not None and given != saved:
        raise UserError(f"{name}={given}, and the export was trained with {saved}; leave it out")
    return given or saved or otherwise


def wrapper_of(config: Mapping[str, Any], given: str | None, *, where: str) -> str:
    """The wrapper of items that name none, for an engine: a user's, else the export's, else sft. Warns where the first
    two differ."""
    saved = exported_wrapper(config, where=where)
    if given and saved and given != saved:
        log.warn(f"wrapper={given!r}: the model of {where} was trained with {saved!r}; its rewards will be others")
    return given or saved or WRAPPERS[0]


class ServedModel:
    """Compares what a server says of its model in GET /v1/models with a client's tokenizer, given as `path`.

    `guessed_wrapper`: what items that name none are joined with, where nobody has said so. `model`: the name that the
    client asks for.
    """

    def __init__(self, path: Path | str, *, fingerprint: str, guessed_wrapper: str | None, model: str | None):
        self._path, self._fingerprint, self._wrapper, self._model = path, fingerprint, guessed_wrapper, model

    def __call__(self, url: str, reply: Any) -> None:
        """Raise UserError where the server's tokenizer is another one; what it does not say is no obstacle."""
        known = [known for entry in self._entries(reply) if (known := _facts(entry))]
        made_with = [facts[EXPORTED_TOKENIZER] for facts in known]
        if made_with and self._fingerprint not in made_with:
            raise UserError(
                f"{url}: its model was trained with tokenizer {printable(made_with[0], limit=12)}, and the client was "
                f"given {self._path}, which is {self._fingerprint[:12]}; give the directory of the served export"
            )
        wrapper = known[0].get(EXPORTED_WRAPPER) if known else None
        if self._wrapper and wrapper in WRAPPERS and wrapper != self._wrapper:
            log.warn(
                f"{url}: its model was trained with {wrapper!r}, and items that name no wrapper are joined as "
                f"{self._wrapper!r}; give wrapper={wrapper!r}, or the export's directory as tokenizer"
            )

    def _entries(self, reply: Any) -> list[dict]:
        entries = reply.get("data") if isinstance(reply, dict) else None
        entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        return [entry for entry in entries if entry.get("id") == self._model] or entries


def _facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of an export for one model of a server: our own says them, of an engine's model the directory does, where
    it can be read here."""
    if entry.get("owned_by") == _OURS:
        facts = {EXPORTED_TOKENIZER: entry.get("tokenizer"), EXPORTED_WRAPPER: entry.get("wrapper")}
    else:
        place = entry.get("root") or entry.get("id")
        facts = read_export(place) if isinstance(place, str) else {}
    return facts if isinstance(facts.get(EXPORTED_TOKENIZER), str) else {}
