"""Trains a small sentencepiece tokenizer with POLAR's control tokens."""

import io
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from megatron_polar import log
from megatron_polar.data.tokenizer import REWARD_TOKEN, SEPARATOR_TOKEN
from megatron_polar.errors import UserError
from megatron_polar.manifest import write_durably

_SENTENCE_CHARACTERS = 4096
_LEAST = 256 + 6 + 1  # bytes, special tokens and one piece


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, output: Path, max_texts: int = 200_000) -> Path:
    """Train a small sentencepiece BPE with byte fallback and POLAR's control tokens; write and return `output`
    (.model).

    Text comes back byte for byte (identity normalisation, no dummy prefix), but for U+2581, sentencepiece's own sign
    for a space. Deterministic: the first `max_texts` in their order, one thread; warns where there are more. Raises
    UserError when there is no text, when `vocab_size` cannot hold the 256 bytes, the special pieces and the text's
    letters, or is more than the texts can fill, and for an `output` that is there and would change: datasets may have
    been made with it.
    """
    import sentencepiece

    output = Path(output)
    if vocab_size < _LEAST:
        raise UserError(f"--vocab-size {vocab_size}: bytes and special tokens alone need {_LEAST}; ask for more")
    texts = iter(texts)
    sentences = list(_sentences(texts, limit=max_texts))  # a broken line is the data's fault, not the vocabulary's
    if next(texts, None) is not None:
        log.warn(
            f"train-tokenizer: the first {max_texts:,} texts are used, and what comes behind them is not looked at; "
            f"mix the inputs, or raise --max-texts"
        )
    if not any(sentences):
        raise UserError("train-tokenizer: the inputs hold no text; check the paths")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=[SEPARATOR_TOKEN, REWARD_TOKEN],
            max_sentence_length=8 * _SENTENCE_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"--vocab-size {vocab_size}: {_what_is_wrong(str(error))}") from error
    if output.exists() and output.read_bytes() != model.getvalue():
        raise UserError(
            f"{output}: is there and would become another tokenizer, and datasets may have been made with it; choose "
            f"another --output or delete this one"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output, model.getvalue())
    return output


def _what_is_wrong(said: str) -> str:
    """sentencepiece's message about a size, in our words where it is a known one."""
    if most := re.search(r"set it to a value <= (\d+)", said):
        return f"this text has pieces for at most {most[1]}; ask for that or less, or give more text"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", said):
        return f"this text needs at least {least[1]}, for its different letters alone; ask for more"
    return f"sentencepiece cannot use it ({' '.join(said.split())[-200:]}); choose another size"


def _sentences(texts: Iterable[str], *, limit: int) -> Iterable[str]:
    """Cut the first `limit` texts into pieces that sentencepiece does not skip for their length."""
    for text in islice(texts, limit):
        yield from (text[start : start + _SENTENCE_CHARACTERS] for start in range(0, len(text), _SENTENCE_CHARACTERS))
