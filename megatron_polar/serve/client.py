"""Rewards for texts from vLLM, SGLang, LMDeploy or our own server: one client, the text path of training.

    client = RewardClient("http://127.0.0.1:8000", engine="vllm", tokenizer="export")
    rewards = client.score([RewardItem(prompt="...", reference="...", output="...")])

A reward is the engine's number or an error, never a guess: nothing is skipped, nothing is None.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import orjson

from megatron_polar import log
from megatron_polar.convert.families import LAYOUTS
from megatron_polar.data.references import mean_over_references
from megatron_polar.data.template import (
    EXPORTED_WRAPPER,
    POLAR_RESPONSE_TOKENS,
    WRAPPERS,
    Half,
    assemble_comparison,
    check_exported_tokenizer,
    encode_half,
    fitting_response_length,
    prompt_text,
)
from megatron_polar.data.tokenizer import Tokenizer, load_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.serve.export import ServedModel, read_export, response_length, sequence_length, wrapper_of
from megatron_polar.serve.official import OfficialText
from megatron_polar.serve.references import spread_references
from megatron_polar.serve.token import TOKEN_VARIABLE, read_token
from megatron_polar.serve.transport import Refused, Transport, Unanswered
from megatron_polar.serve.wire import (
    ENGINES,
    Content,
    Encoded,
    Engine,
    ItemTexts,
    Layout,
    Reply,
    RewardError,
    RewardItem,
    endpoint,
    read_reply,
    request_body,
)

__all__ = ["RewardClient", "RewardError", "RewardItem"]

# Statuses with which one item, or the size of the batch, may have spoilt a whole batch.
_WORTH_SPLITTING = (400, 413, 422)
_LARGE_BODY_BYTES = 1_500_000  # our server takes 2,000,000; TEI and others as many
_KEPT_REFERENCES = 256  # several outputs of one prompt come together; what they share is encoded once


class RewardClient:
    """Asks one or several equal servers for rewards. Threads may share one client; so may event loops.

    `tokenizer` is the directory or file that the model was trained with (an export has it); our own server needs none,
    as it encodes texts itself. A server that says that its model has another one is refused before its first request.
    Lengths are in tokens; they are the export's own where its directory is the `tokenizer`, else POLAR's, and must be
    those of the server's model. `wrapper` is for items that name none (see RewardItem). A request carries `batch_size`
    items and at most `max_concurrency` requests are under way. One attempt may take `timeout_seconds`, all of a call
    `deadline_seconds`; a request is repeated up to `retries` times, after a pause that starts at `backoff_seconds` and
    doubles; our server is waited for while it loads its model. A bearer token comes from the file `api_key_file` or, if
    it is set, from the environment variable `api_key_env`. `compat="official"` sends POLAR's published text (see
    serve/official.py).
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        engine: Engine,
        tokenizer: Path | str | None = None,
        model: str | None = None,
        layout: Layout = "internlm2",
        max_sequence_length: int | None = None,
        max_response_length: int | None = None,
        batch_size: int = 16,
        max_concurrency: int = 8,
        timeout_seconds: float = 120.0,
        deadline_seconds: float = 900.0,
        retries: int = 8,
        backoff_seconds: float = 0.5,
        api_key_env: str = TOKEN_VARIABLE,
        api_key_file: Path | str | None = None,
        compat: Literal["official"] | None = None,
        wrapper: str | None = None,
    ):
        _check_choice("engine", engine, ENGINES)
        _check_choice("layout", layout, LAYOUTS)
        _check_choice("compat", compat, (None, "official"))
        _check_choice("wrapper", wrapper, (None, *WRAPPERS))
        for name, value in (("max_sequence_length", max_sequence_length), ("max_response_length", max_response_length)):
            if value is not None:
                _check_at_least(1, **{name: value})
        _check_at_least(1, batch_size=batch_size, max_concurrency=max_concurrency)
        _check_at_least(0, retries=retries)
        _check_seconds(timeout_seconds=timeout_seconds, deadline_seconds=deadline_seconds)
        _check_seconds(backoff_seconds=backoff_seconds)
        self.engine, self.model, self.layout = engine, model, layout
        self.batch_size, self.max_concurrency, self.deadline_seconds = batch_size, max_concurrency, deadline_seconds
        self.num_truncated = self.num_duplicate_references = 0
        config, codec = _open_tokenizer(tokenizer) if tokenizer is not None else ({}, None)
        self._encode = _choose_encoder(
            engine=engine,
            tokenizer=tokenizer,
            codec=codec,
            compat=compat,
            max_sequence_length=sequence_length(config, max_sequence_length, otherwise=16384),
            max_response_length=response_length(config, max_response_length, otherwise=POLAR_RESPONSE_TOKENS),
        )
        is_native = engine == "megatron-polar"  # it joins texts itself, and knows best how
        self._wrapper = wrapper if is_native else wrapper_of(config, wrapper, where=f"{tokenizer}")
        is_guess = not (is_native or wrapper or EXPORTED_WRAPPER in config)
        inspect = codec and ServedModel(
            tokenizer, fingerprint=codec.fingerprint, guessed_wrapper=self._wrapper if is_guess else None, model=model
        )
        self._transport = Transport(
            _several(urls),
            token=read_token(api_key_file, variable=api_key_env),
            timeout_seconds=timeout_seconds,
            retries=retries,
            backoff_seconds=backoff_seconds,
            max_concurrency=max_concurrency,
            inspect=inspect,
        )

    def score(self, items: Sequence[RewardItem]) -> list[float]:
        """Rewards of the items, in their order; higher means closer to the reference. An item with several references
        gets the mean over them. Raises RewardError."""
        return _means(self.score_per_reference(items))

    async def score_async(self, items: Sequence[RewardItem]) -> list[float]:
        """As `score`, for a caller with an event loop, which goes on meanwhile."""
        return _means(await asyncio.wrap_future(self._transport.submit(self._score(list(items)))))

    def score_per_reference(self, items: Sequence[RewardItem]) -> list[list[float]]:
        """Rewards [item][reference], one for each distinct reference of an item, in order. Raises RewardError."""
        future = self._transport.submit(self._score(list(items)))
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C ends the requests, too
            raise

    def close(self) -> None:
        """Close connections; calls under way are cancelled. The client can be used again."""
        self._transport.close()

    def __enter__(self) -> "RewardClient":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    async def _score(self, items: list[RewardItem]) -> list[list[float]]:
        """Engines score against one reference: an item for each. Returns rewards [item][reference]."""
        for index, item in enumerate(items):
            if not isinstance(item, RewardItem):
                raise RewardError([index], f"it is of type {type(item).__name__}, not a RewardItem")
        spread = spread_references(items)
        if spread.duplicates and not self.num_duplicate_references:
            log.warn(
                f"{spread.duplicates} references are there twice in their item; each counts once in the mean. This is "
                "said once, `num_duplicate_references` of the client counts on"
            )
        self.num_duplicate_references += spread.duplicates
        try:
            return spread.per_item(await self._score_singles(list(spread.singles)))
        except RewardError as error:
            raise spread.in_items(error) from error

    async def _score_singles(self, items: list[RewardItem]) -> list[float]:
        """Workers share the batches; each encodes one while others wait for the server. The first error ends all."""
        deadline = time.monotonic() + self.deadline_seconds
        if self._wrapper is not None:
            items = [replace(item, wrapper=self._wrapper) if item.wrapper is None else item for item in items]
        rewards: dict[int, float] = {}
        batches = self._batches(items)
        waiting = iter(batches)
        cut_before = self.num_truncated

        async def work() -> None:
            for indices in waiting:
                encoded = await asyncio.to_thread(self._encode_all, items, indices)
                self.num_truncated += sum(item.is_truncated for item in encoded)
                contents = [item.content for item in encoded]
                rewards.update(await self._ask(indices, contents, deadline=deadline))

        workers = [asyncio.ensure_future(work()) for _ in batches[: self.max_concurrency]]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if cut_before == 0 and self.num_truncated:
            log.warn(
                f"{self.num_truncated} of {len(items)} items were too long and were cut as in training; this is said "
                "once, `num_truncated` of the client counts on"
            )
        return [rewards[index] for index in range(len(items))]

    def _batches(self, items: list[RewardItem]) -> list[tuple[int, ...]]:
        """Places of the items that go into one request. Our own server shares what outputs of one prompt and reference
        have in common, so these stay together where a batch holds them all."""
        groups: dict[object, list[int]] = {}
        for index, item in enumerate(items):
            key = repr((item.prompt, item.reference, item.wrapper)) if self.engine == "megatron-polar" else index
            groups.setdefault(key, []).append(index)
        return list(_in_batches(groups.values(), self.batch_size))

    def _encode_all(self, items: list[RewardItem], indices: Sequence[int]) -> list[Encoded]:
        encoded = []
        for index in indices:
            try:
                encoded.append(self._encode(items[index]))
            except (UserError, TypeError, KeyError, UnicodeError) as error:
                raise RewardError([index], f"it cannot be encoded ({type(error).__name__}: {error})") from error
        return encoded

    async def _ask(self, indices: Sequence[int], contents: list[Content], *, deadline: float) -> dict[int, float]:
        """Rewards of one batch by item. A batch that is refused, or large enough that servers may close the connection
        on it, is halved until it is known which item is at fault."""

        def read(reply: object) -> Reply:
            return read_reply(reply, contents=contents, engine=self.engine)

        body = request_body(contents, engine=self.engine, model=self.model)
        encoded = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        if len(encoded) > _LARGE_BODY_BYTES and len(indices) > 1:
            return await self._ask_halves(indices, contents, deadline=deadline)
        path = endpoint(self.engine, self.layout)
        try:
            reply = await self._transport.ask(path, encoded, read=read, deadline=deadline)
        except Unanswered as error:
            faulty = indices if error.position is None else [indices[error.position]]
            raise RewardError(faulty, f"{error}; is the server up, and is it {self.engine}?") from error
        except Refused as error:
            if error.status in _WORTH_SPLITTING and len(indices) > 1:
                return await self._ask_halves(indices, contents, deadline=deadline)
            raise RewardError(indices, f"{error}{_hint(error.status)}") from error
        self.num_truncated += reply.num_truncated
        return dict(zip(indices, reply.rewards, strict=True))

    async def _ask_halves(
        self, indices: Sequence[int], contents: list[Content], *, deadline: float
    ) -> dict[int, float]:
        middle = len(indices) // 2
        first = await self._ask(indices[:middle], contents[:middle], deadline=deadline)
        return first | await self._ask(indices[middle:], contents[middle:], deadline=deadline)


def _means(rewards: Sequence[Sequence[float]]) -> list[float]:
    return [mean_over_references([[reward] for reward in row])[0] for row in rewards]


class _TokenIds:
    """The ids of training and of the scorer: a literal control token in a text stays text, so it forges nothing."""

    def __init__(self, tokenizer: Tokenizer, *, max_sequence_length: int, max_response_length: int):
        self._tokenizer, self._max_length = tokenizer, max_sequence_length
        self._max_response_length = fitting_response_length(max_response_length, max_sequence_length)
        self._count = functools.lru_cache(_KEPT_REFERENCES)(lambda prompt: len(self._tokenizer.encode(prompt)))
        self._reference_half = functools.lru_cache(_KEPT_REFERENCES)(self._half)

    def __call__(self, item: RewardItem) -> Encoded:
        prompt, reference, output = map(_text, (item.prompt, item.reference, item.output))
        before = self._reference_half(prompt, reference, item.wrapper)
        after = self._half(prompt, output, item.wrapper)
        comparison = assemble_comparison(
            before, [after], levels=(0,), control=self._tokenizer.control, max_length=self._max_length
        )
        cut = comparison.prompt_tokens_cut + before.response_tokens_cut + after.response_tokens_cut
        return Encoded(np.concatenate([comparison.prefix, comparison.candidates[0]]), is_truncated=cut > 0)

    def _half(self, prompt: str, trajectory: str, wrapper: str) -> Half:
        return encode_half(
            self._tokenizer,
            prompt=prompt,
            trajectory=trajectory,
            wrapper=wrapper,
            max_response_length=self._max_response_length,
            prompt_length=self._count(prompt),
        )


def _plain_texts(item: RewardItem) -> Encoded:
    if item.wrapper not in (None, *WRAPPERS):
        raise UserError(f"wrapper={item.wrapper!r} is unknown; use one of {', '.join(WRAPPERS)}")
    texts = map(_text, (item.prompt, item.reference, item.output))
    return Encoded(ItemTexts(*texts, wrapper=item.wrapper), is_truncated=False)


def _text(side: str | list[dict]) -> str:
    text = prompt_text(side)
    text.encode("utf-8")  # a lone surrogate has no place in JSON, and tokenizers fail on it in ways of their own
    return text


def _open_tokenizer(path: Path | str) -> tuple[dict, Tokenizer]:
    """What the export that holds the tokenizer says (nothing, if none does), and the tokenizer, checked against it."""
    config, codec = read_export(path), load_tokenizer(path)
    check_exported_tokenizer(config, codec.fingerprint, where=f"{path}")
    return config, codec


def _several(urls: str | Sequence[str]) -> tuple[str, ...]:
    urls = (urls,) if isinstance(urls, str) else tuple(urls)
    if not urls:
        raise UserError("urls is empty; give at least one server, such as http://127.0.0.1:8000")
    return urls


def _choose_encoder(
    *,
    engine: Engine,
    tokenizer: Path | str | None,
    codec: Tokenizer | None,
    compat: str | None,
    max_sequence_length: int,
    max_response_length: int,
) -> Callable[[RewardItem], Encoded]:
    if engine == "megatron-polar":
        if compat:
            raise UserError(
                "compat='official' sends whole texts, which /v1/score of our own server does not take; use engine "
                "'vllm', 'sglang' or 'lmdeploy', whose requests it takes too"
            )
        return _plain_texts
    if tokenizer is None or codec is None:
        raise UserError(
            f"engine={engine!r} is sent token ids and needs `tokenizer`; give the directory of the served export"
        )
    lengths = {"max_sequence_length": max_sequence_length, "max_response_length": max_response_length}
    return OfficialText(tokenizer, **lengths) if compat else _TokenIds(codec, **lengths)


def _in_batches(groups: Iterable[list[int]], size: int) -> Iterator[tuple[int, ...]]:
    """Fill batches with whole groups; only a group larger than a batch is cut."""
    batch: list[int] = []
    for group in groups:
        for start in range(0, len(group), size):
            piece = group[start : start + size]
            if len(batch) + len(piece) > size:
                yield tuple(batch)
                batch = []
            batch += piece
    if batch:
        yield tuple(batch)


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise UserError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}")


def _check_at_least(least: int, **numbers: object) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name}={value!r} must be a whole number of at least {least}")


def _check_seconds(**durations: object) -> None:
    for name, value in durations.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError(f"{name}={value!r} must be a positive number of seconds")


def _hint(status: int) -> str:
    hints = {
        401: "; put the server's API key into a file or an environment variable (api_key_file, api_key_env)",
        403: "; is the API key the right one (api_key_file, api_key_env)?",
        404: "; is `engine` right, is the URL the server's base URL, and is `model` a name that it serves?",
        413: "; the item alone is too large for the server: lower max_sequence_length, or raise the server's limit",
    }
    return hints.get(status, "")
