"""The reward that RL frameworks are given: settings from the environment, thinking stripped, normalised where asked.

Frameworks import a function by name or by path and pass it no configuration, so that comes from environment variables:
each field of RewardSettings is MEGATRON_POLAR_REWARD_<FIELD>.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_polar.data.template import WRAPPERS, prompt_text
from megatron_polar.errors import UserError
from megatron_polar.serve.client import RewardClient, RewardError, RewardItem
from megatron_polar.serve.wire import END_TOKENS

PREFIX = "MEGATRON_POLAR_REWARD_"

Messages = str | list[dict]
References = Messages | list[Messages]
"""One reference, or a list of them, whose rewards are averaged."""
_OPENED, _CLOSED = "<think>", "</think>"
_THINK, _MALFORMED = ("optional", "required"), ("error", "keep", "penalty")
_READERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    str | None: str,
    int: int,
    float: float,
    float | None: float,
    int | None: int,
    tuple[str, ...]: lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
    Literal["optional", "required"]: str,
    Literal["error", "keep", "penalty"]: str,
}


@dataclass(frozen=True)
class RewardSettings:
    """How rewards are asked for and what is done to them; the fields up to `wrapper` are RewardClient's.

    `think="required"` takes an output without </think> for a malformed one, as that of a policy whose chat template
    opens the block is when it was cut off in its thoughts. `malformed_think` says what becomes of an output whose
    <think> block is unclosed, repeated or not at its start: an error, the whole text scored as it is, or the fixed
    reward `malformed_think_reward`. A reward becomes
    (reward - mean) / std where both are given; the paper's runs had std 10 and mean -10 (1.8B) or -5 (7B).
    `reference_column` is the column that holds references in TRL and ms-swift; `end_tokens` are cut off the end of
    OpenRLHF's answers.
    """

    url: tuple[str, ...]
    engine: str = "megatron-polar"
    tokenizer: str | None = None
    model: str | None = None
    layout: str = "internlm2"
    compat: str | None = None
    max_sequence_length: int | None = None
    max_response_length: int | None = None
    batch_size: int = 16
    max_concurrency: int = 8
    timeout_seconds: float = 120.0
    deadline_seconds: float = 900.0
    retries: int = 8
    api_key_file: str | None = None
    wrapper: str | None = None
    think: Literal["optional", "required"] = "optional"
    malformed_think: Literal["error", "keep", "penalty"] = "error"
    malformed_think_reward: float | None = None
    mean: float | None = None
    std: float | None = None
    reference_column: str = "reference"
    end_tokens: tuple[str, ...] = END_TOKENS

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("wrapper", self.wrapper or WRAPPERS[0], WRAPPERS),
            ("think", self.think, _THINK),
            ("malformed_think", self.malformed_think, _MALFORMED),
        ):
            if value not in choices:
                raise UserError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}")
        if (self.malformed_think == "penalty") != (self.malformed_think_reward is not None):
            raise UserError(
                "malformed_think_reward is what malformed outputs get where malformed_think is 'penalty'; give both or "
                "neither"
            )
        if (self.mean is None) != (self.std is None) or (self.std is not None and not self.std > 0):
            raise UserError(f"mean={self.mean} and std={self.std}: give both, std above 0, or neither")
        numbers = (self.mean, self.std, self.malformed_think_reward)
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise UserError("mean, std and malformed_think_reward must be finite numbers")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "RewardSettings":
        """Read MEGATRON_POLAR_REWARD_*; commas separate the parts of a list. Raises UserError for an unknown one."""
        readers = {
            f"{PREFIX}{field.name.upper()}": (field.name, _READERS[field.type]) for field in dataclasses.fields(cls)
        }
        values = {}
        for variable, text in environment.items():
            if not variable.startswith(PREFIX):
                continue
            if variable not in readers:
                raise UserError(f"{variable} is not known; there are {', '.join(sorted(readers))}")
            name, read = readers[variable]
            try:
                values[name] = read(text)
            except ValueError:
                raise UserError(f"{variable}={text!r} is not a number") from None
        if not values.get("url"):
            raise UserError(f"set {PREFIX}URL to the reward server's address, such as http://127.0.0.1:8000")
        return cls(**values)

    def open_client(self) -> RewardClient:
        """The client that these settings describe."""
        return RewardClient(
            self.url,
            engine=self.engine,
            tokenizer=self.tokenizer,
            model=self.model,
            layout=self.layout,
            compat=self.compat,
            max_sequence_length=self.max_sequence_length,
            max_response_length=self.max_response_length,
            batch_size=self.batch_size,
            max_concurrency=self.max_concurrency,
            timeout_seconds=self.timeout_seconds,
            deadline_seconds=self.deadline_seconds,
            retries=self.retries,
            api_key_file=self.api_key_file,
            wrapper=self.wrapper,
        )


def strip_thinking(text: str, *, is_required: bool = False) -> str | None:
    """The answer behind a <think> block, or the text itself without one; None when the block is malformed, or is
    required and not there.

    A lone </think> ends a block that the chat template opened in the prompt. Source: POLAR's RFT scores the answer
    without its thinking (polar_method.md section 2).
    """
    opened, closed = text.count(_OPENED), text.count(_CLOSED)
    if not opened and not closed:
        return None if is_required else text
    thinking, _, answer = text.partition(_CLOSED)
    if closed != 1 or opened > 1 or (opened and not thinking.lstrip().startswith(_OPENED)):
        return None
    return answer.lstrip()


class RewardFunction:
    """Rewards of outputs against references: thinking stripped, asked of a client, normalised where that is set."""

    def __init__(self, settings: RewardSettings, client: RewardClient | None = None):
        self.settings = settings
        self.client = client or settings.open_client()

    def rewards(
        self, *, prompts: Sequence[Messages], references: Sequence[References], outputs: Sequence[Messages]
    ) -> list[float]:
        """One reward per output, in order. Raises RewardError, whose indices are places in `outputs`."""
        items = self._items(prompts, references, outputs)
        try:
            found = self.client.score([item for item in items if item is not None])
        except RewardError as error:
            raise _in_places_of(items, error) from error
        return self._finish(items, found)

    async def rewards_async(
        self, *, prompts: Sequence[Messages], references: Sequence[References], outputs: Sequence[Messages]
    ) -> list[float]:
        """As `rewards`, for a framework with an event loop."""
        items = self._items(prompts, references, outputs)
        try:
            found = await self.client.score_async([item for item in items if item is not None])
        except RewardError as error:
            raise _in_places_of(items, error) from error
        return self._finish(items, found)

    def _items(
        self, prompts: Sequence[Messages], references: Sequence[References], outputs: Sequence[Messages]
    ) -> list[RewardItem | None]:
        """What to ask for; None stands for a malformed output with a fixed reward."""
        if not len(prompts) == len(references) == len(outputs):
            raise UserError(
                f"{len(prompts)} prompts, {len(references)} references and {len(outputs)} outputs; there must be as "
                "many of each"
            )
        items: list[RewardItem | None] = []
        for index, texts in enumerate(zip(prompts, references, outputs, strict=True)):
            prompt, reference, output = map(_plain, texts)
            try:
                answer = self._answer(output)
            except (TypeError, UserError) as error:
                raise RewardError([index], str(error)) from error
            items.append(None if answer is None else RewardItem(prompt, reference, answer, self.settings.wrapper))
        return items

    def _answer(self, output: Messages) -> str | None:
        turns = output if isinstance(output, list) else [{"content": output}]
        text = prompt_text(turns)
        answers = [strip_thinking(turn["content"], is_required=self.settings.think == "required") for turn in turns]
        if None not in answers:
            return "\n".join(answers)
        if self.settings.malformed_think == "error":
            raise UserError(
                f"its {_OPENED} block is unclosed, repeated, not at its start or not there; say what that is worth: "
                f"{PREFIX}MALFORMED_THINK=keep scores the whole text, =penalty gives {PREFIX}MALFORMED_THINK_REWARD"
            )
        return text if self.settings.malformed_think == "keep" else None

    def _finish(self, items: Sequence[RewardItem | None], found: Sequence[float]) -> list[float]:
        mean, std = self.settings.mean, self.settings.std
        scores = iter(found if mean is None or std is None else [(reward - mean) / std for reward in found])
        penalty = self.settings.malformed_think_reward
        return [next(scores) if item is not None else penalty for item in items]


@functools.cache
def configured() -> RewardFunction:
    """The reward function that the environment describes; made once a process."""
    return RewardFunction(RewardSettings.from_environment())


def _in_places_of(items: Sequence[RewardItem | None], error: RewardError) -> RewardError:
    """An error about the items that were asked for, told in the places of all items."""
    places = [index for index, item in enumerate(items) if item is not None]
    return RewardError([places[index] for index in error.indices], error.reason)


def _plain(value: Any) -> Any:
    """Lists for the arrays that parquet readers make of message lists, and of lists of references."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
