"""`compat="official"`: the text that POLAR's published client sends, byte for byte, with its quirks.

Source: `RewardModelClient` of InternLM/POLAR, src/polar/reward_func.py, as polar_method.md section 2 describes it. What
differs from the path of training:

- special tokens spelled in a text are read as such, count as one token and are dropped, cut or not;
- every length includes BOS; four tokens are set aside besides;
- an empty answer follows its prompt with a newline all the same;
- a prompt budget of 0 keeps the whole prompt, and a negative one drops as many tokens from its head;
- a wrapper that is not "pretrain" counts as "sft"; an empty list of messages is an empty text;
- the engine gets text and encodes it as it likes.
"""

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import orjson

from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.serve.wire import Encoded, RewardItem

_RESERVED_TOKENS = 4
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class OfficialText:
    """Encodes items as the published client does; answers keep their head, as its `response_cut_side="right"`."""

    def __init__(self, tokenizer: Path | str, *, max_sequence_length: int, max_response_length: int):
        ours = load_tokenizer(tokenizer)
        self._separator, self._reward = ours.separator_token, ours.reward_token
        self._bos = [] if ours.bos_id is None else [ours.bos_id]
        self._max_length, self._max_response_length = max_sequence_length - _RESERVED_TOKENS, max_response_length
        self._codec = _open_codec(Path(tokenizer), control_tokens=(self._separator, self._reward))

    def __call__(self, item: RewardItem) -> Encoded:
        """Return the text to send for an item. Raises UserError or TypeError for what is no text."""
        prompt, reference, output = (
            self._bos + self._codec.encode(_joined(text)) for text in (item.prompt, item.reference, item.output)
        )
        cut = max(len(reference), len(output)) > self._max_response_length
        reference, output = reference[: self._max_response_length], output[: self._max_response_length]
        budget = (self._max_length - len(reference) - len(output)) // 2
        if len(prompt) > budget:
            prompt, cut = prompt[-budget:], True
        before, after, candidate = (self._codec.decode(ids) for ids in (prompt, reference, output))
        between = "" if item.wrapper == "pretrain" else "\n"
        text = f"{before}{between}{after}{self._separator}{before}{between}{candidate}{self._reward}"
        return Encoded(text, is_truncated=cut)


def _joined(text: str | list[dict]) -> str:
    contents = [message["content"] for message in text] if isinstance(text, list) else [text]
    if not all(isinstance(content, str) for content in contents):
        raise TypeError('give a string or a list of {"role", "content"} messages')
    text = "\n".join(contents)
    text.encode("utf-8")  # raises UnicodeEncodeError for lone surrogates, which tokenizers fail on in their own ways
    return text


# ---------------------------------------------------------------- tokenizers in which special tokens are active


def _open_codec(path: Path, *, control_tokens: tuple[str, str]) -> "_HuggingFace | _SentencePiece":
    """Open what transformers would open: tokenizer.json where there is one, else the sentencepiece model."""
    if path.is_dir():
        file = path / "tokenizer.json" if (path / "tokenizer.json").is_file() else path / "tokenizer.model"
    else:
        file = path
    # As load_tokenizer: a sentencepiece file that is named itself stands for itself, whatever lies beside it.
    special = _Special.read(file.parent) if path.is_dir() or file.name == "tokenizer.json" else _Special((), ())
    special = _Special((*special.names, *control_tokens), special.ids)
    return _HuggingFace(file, special) if file.suffix == ".json" else _SentencePiece(file, special)


@dataclass(frozen=True)
class _Special:
    """Special tokens of tokenizer_config.json: `names`, and (name, id) of those that it gives ids to."""

    names: tuple[str, ...]
    ids: tuple[tuple[str, int], ...]

    @classmethod
    def read(cls, directory: Path) -> "_Special":
        file = directory / "tokenizer_config.json"
        config = orjson.loads(file.read_bytes()) if file.is_file() else {}  # load_tokenizer has checked it
        named = [config.get(key) for key in _NAMED_TOKENS]
        named = [token.get("content") if isinstance(token, dict) else token for token in named]
        decoder = (config.get("added_tokens_decoder") or {}).items()
        ids = tuple((entry["content"], int(id)) for id, entry in decoder if entry.get("special"))
        return cls(tuple(token for token in named if token), ids)


class _HuggingFace:
    def __init__(self, file: Path, special: _Special):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names = [*special.names, *(name for name, _ in special.ids)]
        known = [name for name in names if self._tokenizer.token_to_id(name) is not None]
        self._tokenizer.add_special_tokens(known)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class _SentencePiece:
    """A sentencepiece model as transformers' fast tokenizers use one: texts are split at special tokens first, the
    leftmost and longest ones, and bytes that make no UTF-8 become one replacement sign each."""

    def __init__(self, file: Path, special: _Special):
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(file.read_bytes())
        self._starts_with_space = model.normalizer_spec.add_dummy_prefix
        self._processor = processor = SentencePieceProcessor(model_file=str(file))
        pieces = range(processor.vocab_size())
        ids = {processor.id_to_piece(id): id for id in pieces if processor.is_control(id) or processor.is_unknown(id)}
        found = {name: processor.piece_to_id(name) for name in special.names}
        ids |= {name: id for name, id in found.items() if processor.id_to_piece(id) == name}
        self._ids = ids | dict(special.ids)
        names = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, names))})")
        self._special = set(self._ids.values())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in filter(None, self._pattern.split(text)):
            ids += [self._ids[piece]] if piece in self._ids else self._processor.encode(piece)
        return ids

    def decode(self, ids: list[int]) -> str:
        plain = [id for id in ids if id not in self._special]
        parts = []
        for is_byte, run in groupby(plain, key=self._processor.is_byte):
            names = [self._processor.id_to_piece(id) for id in run]
            parts.append(_text_of_bytes(names) if is_byte else "".join(names).replace("\u2581", " "))
        text = "".join(parts)
        return text.removeprefix(" ") if self._starts_with_space else text


def _text_of_bytes(names: list[str]) -> str:
    """The text of pieces such as <0xE3>."""
    try:
        return bytes(int(name[3:-1], 16) for name in names).decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(names)
