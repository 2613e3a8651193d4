"""Sentencepiece models and Hugging Face tokenizers behind one small interface, without transformers and without remote
code.

POLAR needs two control tokens: a separator between the halves of a comparison and the reward token at its end. User
text that spells one of them (or another special token) stays text: its ids never contain a control id.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_polar.data.template import ControlTokens
from megatron_polar.errors import UserError

SEPARATOR_TOKEN = "<|reward|>"
REWARD_TOKEN = "[UNUSED_TOKEN_130]"

_SAVED_CHOICE = "polar_tokens.json"
_FILES = ("tokenizer.json", "tokenizer.model")
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# Text long enough to meet a tokenizer that treats the first word of a text apart from the first word after a control
# token.
_BOUNDARY_PROBE = "Hello world"
_MAX_IDS = 2**31  # datasets hold int32


class Tokenizer:
    """Text <-> ids of one tokenizer and its control tokens; build it with `load_tokenizer`.

    Every id is below `vocab_size`. `bos_id` is None where the tokenizer starts texts without one. `fingerprint` is the
    SHA-256 of what defines the ids, the chosen control tokens included. `halves_are_independent` is False for the few
    tokenizers that write the first word of a text differently from the first word after a control token: there the
    candidate half has other ids than a serving engine that is given the whole text would see.
    """

    def __init__(self, codec: "_SentencePiece | _HuggingFace", *, separator_token: str, reward_token: str):
        self._codec = codec
        self.kind = codec.kind
        self.separator_token, self.reward_token = separator_token, reward_token
        self.vocab_size = codec.vocab_size
        if self.vocab_size > _MAX_IDS:
            raise UserError(f"{codec.path}: ids up to {self.vocab_size - 1} do not fit 32 bits; fetch the file again")
        self.separator_id = _control_id(codec, separator_token, role="separator")
        self.reward_id = _control_id(codec, reward_token, role="reward")
        if self.separator_id == self.reward_id:
            raise UserError(
                f"{codec.path}: separator and reward token are the same id {self.reward_id}; choose two tokens"
            )
        self.bos_id, self.pad_id = codec.bos_id, codec.pad_id
        self._never_from_text = {self.separator_id, self.reward_id}
        if self.bos_id is not None:
            self._never_from_text.add(self.bos_id)
        codec.protect(self._never_from_text)
        self._literals = sorted(filter(None, map(codec.literal, self._never_from_text)))
        chosen = [self.kind, self.vocab_size, self.bos_id, self.separator_id, self.reward_id]
        self.fingerprint = hashlib.sha256(codec.definition() + orjson.dumps(chosen)).hexdigest()
        self.halves_are_independent = codec.halves_are_independent(separator_token)

    @property
    def control(self) -> ControlTokens:
        """The ids that the template needs."""
        return ControlTokens(
            bos_id=self.bos_id, separator_id=self.separator_id, reward_id=self.reward_id, pad_id=self.pad_id
        )

    @property
    def added_tokens(self) -> dict[str, int]:
        """Names that tokenizer_config.json gives to ids, beside those of the vocabulary."""
        return self._codec.added_tokens

    def encode(self, text: str) -> list[int]:
        """Encode plain text: no BOS, and never a control id, whatever the text spells."""
        encoded, waiting = [], [text]
        while waiting:
            part = waiting.pop()
            ids = self._codec.encode(part)
            if self._never_from_text.isdisjoint(ids):
                encoded += ids
            else:
                waiting += reversed(self._apart(part))
        return encoded

    def _apart(self, text: str) -> tuple[str, str]:
        """Split text in which the library itself sees a control token inside the literal; perhaps not the last time."""
        if len(text) < 2:
            raise UserError(f"tokenizer gives a control id for the text {text!r}; choose tokens that no text maps to")
        # A control token that is spelled otherwise (a normaliser's doing) is closed in on by halving the text.
        middle = len(text) // 2
        for literal in self._literals:
            place = text.find(literal)
            if place >= 0 and len(literal) > 1:
                middle = place + len(literal) // 2
                break
        return text[:middle], text[middle:]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; control ids are skipped."""
        return self._codec.decode([int(id) for id in ids if int(id) not in self._never_from_text])

    def save(self, directory: Path) -> None:
        """Copy into `directory` all that `load_tokenizer` needs to give this tokenizer again."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._codec.save(directory)
        choice = {"separator_token": self.separator_token, "reward_token": self.reward_token}
        choice["file"] = self._codec.path.name if self._codec.path.suffix == ".json" else "tokenizer.model"
        (directory / _SAVED_CHOICE).write_text(json.dumps(choice, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_tokenizer(
    path: Path | str, *, separator_token: str | None = None, reward_token: str | None = None
) -> Tokenizer:
    """Load a sentencepiece `.model` file, or a directory with tokenizer.json or tokenizer.model and its configuration.

    Control tokens that are not given are those the directory was saved with, else POLAR's: `<|reward|>` and
    `[UNUSED_TOKEN_130]`. Raises UserError when the path is no tokenizer or lacks a control token.
    """
    path = Path(path)
    if path.is_dir():
        saved = _read_json(path / _SAVED_CHOICE) or {}
        if not all(isinstance(token, str) and token for token in saved.values()):
            raise UserError(f"{path / _SAVED_CHOICE}: tokens that are no text; delete it, or make the dataset again")
        separator_token = separator_token or saved.get("separator_token")
        reward_token = reward_token or saved.get("reward_token")
        # An export has both: what it was made from, which gives the ids of training, and what engines read.
        names = [name for name in _FILES if name == saved.get("file")] or _FILES
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            raise UserError(
                f"{path}: neither tokenizer.json nor tokenizer.model in this directory; give a tokenizer's directory"
            )
    elif path.is_file():
        file = path
    else:
        raise UserError(
            f"{path}: no such tokenizer; give a sentencepiece .model file or a directory with tokenizer.json"
        )
    if file.suffix not in (".json", ".model"):
        raise UserError(f"{path}: not a tokenizer by its name; give a sentencepiece .model file or a directory")
    settings = _Settings.read(file.parent) if path.is_dir() or file.name == "tokenizer.json" else _Settings.none()
    codec = _HuggingFace(file, settings) if file.suffix == ".json" else _SentencePiece(file, settings)
    return Tokenizer(
        codec, separator_token=separator_token or SEPARATOR_TOKEN, reward_token=reward_token or REWARD_TOKEN
    )


# ---------------------------------------------------------------- the two kinds


@dataclass(frozen=True)
class _Settings:
    """What tokenizer_config.json and special_tokens_map.json say, as far as ids depend on it."""

    bos_token: str | None
    pad_token: str | None
    eos_token: str | None
    add_bos_token: bool | None
    added_tokens: dict[str, int]

    @classmethod
    def none(cls) -> "_Settings":
        return cls(bos_token=None, pad_token=None, eos_token=None, add_bos_token=None, added_tokens={})

    @classmethod
    def read(cls, directory: Path) -> "_Settings":
        values: dict[str, Any] = {}
        for name in reversed(_CONFIG_FILES):
            values.update(_read_json(directory / name) or {})
        decoder = values.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict) or not all(re.fullmatch("[0-9]{1,9}", id) for id in decoder):
            raise UserError(f"{directory}: added_tokens_decoder does not map ids to tokens; fetch the tokenizer again")
        added = {
            entry["content"]: int(id)
            for id, entry in decoder.items()
            if isinstance(entry, dict) and isinstance(entry.get("content"), str)
        }
        names = {key: _token_text(values.get(key)) for key in ("bos_token", "pad_token", "eos_token")}
        add_bos = values.get("add_bos_token")
        return cls(**names, add_bos_token=add_bos if isinstance(add_bos, bool) else None, added_tokens=added)


class _SentencePiece:
    """A sentencepiece model; tokens renamed or added by tokenizer_config.json count (POLAR's own tokenizer does so)."""

    kind = "sentencepiece"

    def __init__(self, path: Path, settings: _Settings):
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        self.path, self._settings, self.added_tokens = path, settings, settings.added_tokens
        self._bytes = path.read_bytes()
        self._model = sentencepiece_model_pb2.ModelProto()
        try:
            self._model.ParseFromString(self._bytes)
            self._processor = SentencePieceProcessor(model_proto=self._bytes)
            self._processor.id_to_piece(0)
        except (
            Exception
        ) as error:  # protobuf's DecodeError is defined in several places, sentencepiece raises RuntimeError
            raise UserError(f"{path}: not a sentencepiece model ({type(error).__name__}); check the file") from error
        self.vocab_size = max(self._processor.vocab_size(), *(id + 1 for id in settings.added_tokens.values()), 1)
        self.bos_id = self._bos_id()
        fallbacks = (self._processor.pad_id(), self._processor.eos_id(), 0)
        chosen = self.token_id(settings.pad_token) if settings.pad_token else None
        self.pad_id = chosen if chosen is not None else next(id for id in fallbacks if id >= 0)

    def _bos_id(self) -> int | None:
        if self._settings.add_bos_token is False:
            return None
        named = self.token_id(self._settings.bos_token) if self._settings.bos_token else None
        id = named if named is not None else self._processor.bos_id()
        return id if id >= 0 else None

    def token_id(self, token: str) -> int | None:
        if token in self._settings.added_tokens:
            return self._settings.added_tokens[token]
        id = self._processor.piece_to_id(token)
        return id if self._processor.id_to_piece(id) == token else None

    def literal(self, id: int) -> str:
        return self._processor.id_to_piece(id) if id < self._processor.vocab_size() else ""

    def protect(self, ids: set[int]) -> None:
        """Turn pieces that text could spell (user-defined symbols) into control pieces, which text never reaches."""
        control = self._model.SentencePiece.Type.CONTROL
        for id in ids:
            if id < len(self._model.pieces):
                self._model.pieces[id].type = control
        self._processor.LoadFromSerializedProto(self._model.SerializeToString())

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([id for id in ids if id < self._processor.vocab_size()])

    def definition(self) -> bytes:
        added = sorted(self._settings.added_tokens.items())
        return hashlib.sha256(self._bytes).digest() + orjson.dumps(added)

    def halves_are_independent(self, separator_token: str) -> bool:
        return True  # POLAR's text path encodes the texts between control tokens one by one

    def save(self, directory: Path) -> None:
        if self.path.parent.resolve() == directory.resolve() and self.path.name == "tokenizer.model":
            return
        (directory / "tokenizer.model").write_bytes(self._bytes)
        if self._settings != _Settings.none():
            _copy_configs(self.path.parent, directory)


class _HuggingFace:
    """A tokenizer.json of the `tokenizers` library."""

    kind = "huggingface"

    def __init__(self, path: Path, settings: _Settings):
        self.path, self._settings, self.added_tokens = path, settings, settings.added_tokens
        self._bytes = path.read_bytes()
        try:
            self._json = orjson.loads(self._bytes)
            self._tokenizer = self._build()
            self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # `tokenizers` raises plain Exception, and panics are not even that
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{path}: not a tokenizer.json that `tokenizers` can read ({reason}); check the file"
            ) from error
        self.bos_id = self._bos_id()
        named = (settings.pad_token, settings.eos_token)
        self.pad_id = next((id for id in map(self.token_id, filter(None, named)) if id is not None), 0)

    def _build(self):
        from tokenizers import Tokenizer as Fast

        # A length limit, padding or BPE dropout stored in the file would change ids silently.
        model = {**self._json["model"], **({"dropout": None} if "dropout" in self._json["model"] else {})}
        plain = {**self._json, "truncation": None, "padding": None, "model": model}
        tokenizer = Fast.from_str(orjson.dumps(plain).decode("utf-8"))
        tokenizer.encode_special_tokens = True  # special tokens spelled in text are text
        return tokenizer

    def _bos_id(self) -> int | None:
        """The id that the tokenizer itself puts before a text: by its configuration, else by its post-processor."""
        named = self.token_id(self._settings.bos_token) if self._settings.bos_token else None
        if self._settings.add_bos_token is not None:
            return named if self._settings.add_bos_token else None
        plain = self._tokenizer.encode(_BOUNDARY_PROBE, add_special_tokens=False).ids
        processed = self._tokenizer.encode(_BOUNDARY_PROBE, add_special_tokens=True).ids
        starts_plain = processed[: len(plain)] == plain
        return None if starts_plain or not processed else processed[0]

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def literal(self, id: int) -> str:
        return self._tokenizer.id_to_token(id) or ""

    def protect(self, ids: set[int]) -> None:
        """Mark added tokens with these ids as special, the kind that `encode_special_tokens` leaves in the text."""
        for entry in self._json.get("added_tokens") or []:
            if entry["id"] in ids:
                entry["special"] = True
        self._tokenizer = self._build()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def definition(self) -> bytes:
        ids_only = {
            key: value for key, value in self._json.items() if key not in ("truncation", "padding", "post_processor")
        }
        return hashlib.sha256(orjson.dumps(ids_only, option=orjson.OPT_SORT_KEYS)).digest()

    def halves_are_independent(self, separator_token: str) -> bool:
        self._tokenizer.encode_special_tokens = False
        whole = self.encode(_BOUNDARY_PROBE + separator_token + _BOUNDARY_PROBE)
        self._tokenizer.encode_special_tokens = True
        half = self.encode(_BOUNDARY_PROBE)
        return whole == [*half, self.token_id(separator_token), *half]

    def save(self, directory: Path) -> None:
        if self.path.parent.resolve() == directory.resolve() and self.path.name == "tokenizer.json":
            return
        (directory / "tokenizer.json").write_bytes(self._bytes)
        if self.path.name == "tokenizer.json":  # of another name they were not read
            _copy_configs(self.path.parent, directory)


def _control_id(codec: _SentencePiece | _HuggingFace, token: str, *, role: str) -> int:
    id = codec.token_id(token)
    if id is None:
        raise UserError(
            f"{codec.path}: has no {role} token {token!r}; add it to the tokenizer, or give the name of an unused "
            f"special token that it has by --{role}-token"
        )
    return id


def _copy_configs(source: Path, directory: Path) -> None:
    for name in _CONFIG_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _token_text(value: Any) -> str | None:
    """A token in a configuration is a string or an object with its `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _read_json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        value = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: malformed JSON ({' '.join(str(error).split())}); fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; fetch the file again")
    return value
