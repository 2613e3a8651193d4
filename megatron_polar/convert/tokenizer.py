"""A checkpoint's tokenizer in the form that transformers, vLLM, SGLang and LMDeploy read: tokenizer.json."""

import shutil
import tempfile
from pathlib import Path

import orjson

from megatron_polar import log
from megatron_polar.data.tokenizer import Tokenizer, load_tokenizer
from megatron_polar.errors import UserError

_PROBES = ("Hello world", " two  spaces", "line\nbreak\n\n", "Zürich 東京 🙂", "x = 1234.5e-6;\t# tab", "")
_CLASS = "PreTrainedTokenizerFast"
"""What transformers 4 and 5 both load; 5 writes TokenizersBackend, which 4 does not know."""
_NEVER = -1e4
"""A score with which a piece is in no text."""
_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def export_tokenizer(tokenizer: Tokenizer, target: Path, *, max_length: int) -> None:
    """Write a tokenizer into an export. Its control tokens are active in text there, and BOS comes by itself, as in
    POLAR's own. Warns when transformers encodes a probe differently from training. Raises UserError for a tokenizer
    that the export's files cannot express."""
    from transformers import AutoTokenizer

    tokenizer.save(target)
    if tokenizer.kind == "sentencepiece":
        _write_fast(tokenizer, target, max_length=max_length)
        if load_tokenizer(target).fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{target}: the exported tokenizer is not that of the checkpoint; give it as tokenizer.json"
            )
    else:
        _name_class(target / "tokenizer_config.json")
    fast = AutoTokenizer.from_pretrained(target)  # as engines do it
    different = [probe for probe in _PROBES if not _agrees(fast, tokenizer, probe)]
    if different:
        log.warn(
            f"{target}: transformers encodes {different[0]!r} differently from training; send token ids to engines, as "
            f"the client of this package does"
        )


def warn_of_another_tokenizer(tokenizer: Tokenizer, *, given: Path, model: Path) -> None:
    """Warn when the tokenizer that a user gives encodes a probe differently from the one beside the weights."""
    tokens = {"separator_token": tokenizer.separator_token, "reward_token": tokenizer.reward_token}
    try:
        own = load_tokenizer(model, **tokens)
    except UserError:
        return  # it has none, or none that could be used: that is why another is given
    different = [probe for probe in _PROBES if own.encode(probe) != tokenizer.encode(probe)]
    if different:
        log.warn(
            f"{given}: encodes {different[0]!r} differently from {model}'s own tokenizer, with which it was trained"
        )


def _name_class(path: Path) -> None:
    """Let tokenizer.json speak for itself: a class of its own (`auto_map`) is Python of somebody else's, which is not
    in the export, and which an engine that trusts the export's own model code would fetch and run."""
    config = orjson.loads(path.read_bytes()) if path.is_file() else {}
    config.pop("auto_map", None)
    path.write_bytes(orjson.dumps(config | {"tokenizer_class": _CLASS}, option=orjson.OPT_INDENT_2))


def _write_fast(tokenizer: Tokenizer, target: Path, *, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json beside a sentencepiece model; engines need no sentencepiece then."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as bare:  # its own configuration may name a class that is remote code
        shutil.copyfile(target / "tokenizer.model", Path(bare) / "tokenizer.model")
        content = orjson.loads(AutoTokenizer.from_pretrained(bare).backend_tokenizer.to_str())
    names = _rename_pieces(content["model"], tokenizer.added_tokens)
    named = [id for id in (tokenizer.bos_id, tokenizer.pad_id) if id is not None]
    special = {*tokenizer.added_tokens.values(), tokenizer.separator_id, tokenizer.reward_id, *named}
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] not in special]
    content["added_tokens"] += [{"id": id, "content": names[id], **_SPECIAL} for id in special]
    content["added_tokens"].sort(key=lambda entry: entry["id"])
    content |= {"truncation": None, "padding": None}
    backend = Backend.from_str(orjson.dumps(content).decode())
    if tokenizer.bos_id is not None:
        bos = names[tokenizer.bos_id]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=names.get(tokenizer.bos_id),
        pad_token=names[tokenizer.pad_id],
        model_max_length=max_length,
        padding_side="left",
    ).save_pretrained(target)
    _add_what_ids_depend_on(tokenizer, target / "tokenizer_config.json")


def _rename_pieces(model: dict, added_tokens: dict[str, int]) -> dict[int, str]:
    """Give ids of a tokenizer.json's model their added names; returns the names of all ids."""
    added = {id: token for token, id in added_tokens.items()}
    if model["type"] == "Unigram":  # pieces with scores, in the order of their ids
        pieces = model["vocab"]
        pieces += [["", _NEVER] for _ in range(len(pieces), max(added, default=-1) + 1)]
        for id, token in added.items():
            pieces[id][0] = token
        return {id: token for id, (token, _) in enumerate(pieces)}
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id not in added} | added_tokens
    return {id: token for token, id in model["vocab"].items()}


def _add_what_ids_depend_on(tokenizer: Tokenizer, path: Path) -> None:
    """transformers has written its own configuration over the tokenizer's; tokenizer.model alone needs these of it."""
    config = orjson.loads(path.read_bytes()) | {"tokenizer_class": _CLASS}
    if tokenizer.added_tokens:
        named = {str(id): {"content": token, **_SPECIAL} for token, id in tokenizer.added_tokens.items()}
        config["added_tokens_decoder"] = named
    if tokenizer.bos_id is None:
        config["add_bos_token"] = False
    path.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))


def _agrees(fast, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a whole text of two halves has the ids that training gives it."""
    whole = text + tokenizer.separator_token + text + tokenizer.reward_token
    bos = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    half = tokenizer.encode(text)
    return fast(whole).input_ids == [*bos, *half, tokenizer.separator_id, *half, tokenizer.reward_id]
