"""Entry points with the signatures of verl, OpenRLHF, TRL and ms-swift, over one reward function.

docs/rl.md and examples/rl/ show how each framework is told of them. Wherever one reference may stand, a list of them
may: the reward is the mean over them. A reward that cannot be had raises RewardError; no
framework is ever handed None or a made-up number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_polar.data.references import KEYS
from megatron_polar.errors import UserError
from megatron_polar.serve.client import RewardError
from megatron_polar.serve.reward_function import PREFIX, Messages, References, RewardFunction, configured
from megatron_polar.serve.shapes import sigmoid
from megatron_polar.serve.wire import without_end

# --- verl --------------------------------------------------------------------------------------------------------


def compute_score(
    data_source: str, solution_str: str, ground_truth: References, extra_info: dict | None = None, **unused: Any
) -> dict[str, float]:
    """verl's custom reward function for one answer: reference = `ground_truth`, prompt = `extra_info["prompt"]`."""
    return compute_score_batch([data_source], [solution_str], [ground_truth], [extra_info])[0]


def compute_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[References],
    extra_infos: Sequence[dict | None],
    **unused: Any,
) -> list[dict[str, float]]:
    """verl's custom reward function for its `batch` reward manager: one request serves many answers."""
    prompts = _verl_prompts(extra_infos)
    found = configured().rewards(prompts=prompts, references=ground_truths, outputs=solution_strs)
    return [{"score": reward} for reward in found]


async def compute_score_async(
    data_source: str, solution_str: str, ground_truth: References, extra_info: dict | None = None, **unused: Any
) -> dict[str, float]:
    """As `compute_score`, for verl's reward workers, which await coroutines."""
    prompts = _verl_prompts([extra_info])
    found = await configured().rewards_async(prompts=prompts, references=[ground_truth], outputs=[solution_str])
    return {"score": found[0]}


def _verl_prompts(extra_infos: Sequence[dict | None]) -> list[Messages]:
    for index, extra in enumerate(extra_infos):
        if not extra or extra.get("prompt") is None:
            raise RewardError([index], 'extra_info has no "prompt"; write the prompt there when preparing the data')
    return [extra["prompt"] for extra in extra_infos if extra]


# --- OpenRLHF ----------------------------------------------------------------------------------------------------


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **unused: Any) -> dict[str, Any]:
    """OpenRLHF's reward function: a query is prompt + answer, a label the reference (or a list of them).

    A label {"prompt", "reference"}, or {"prompt", "references"}, gives the prompt in POLAR's form, where `prompts` went
    through a chat template. `scores` are the logistic function of the rewards: OpenRLHF filters by numbers from 0 to 1.
    """
    reward = configured()
    outputs, references, own_prompts = [], [], []
    for index, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True)):
        if not query.startswith(prompt):
            raise RewardError(
                [index],
                "the query does not begin with its prompt, so the answer in it cannot be told; was the prompt cut? "
                "raise --data.max_len, or lower the number of generated tokens",
            )
        if label is None or label == "":  # OpenRLHF passes "" where no column is named
            raise RewardError([index], "it has no label; name the column with references: --data.label_key")
        keys = [key for key in KEYS if isinstance(label, dict) and key in label]
        if len(keys) > 1:
            raise RewardError([index], "its label has both 'reference' and 'references'; give one of the two")
        is_pair = bool(keys)
        references.append(label[keys[0]] if is_pair else label)
        own_prompts.append(label.get("prompt", prompt) if is_pair else prompt)
        outputs.append(without_end(query[len(prompt) :], reward.settings.end_tokens))
    found = reward.rewards(prompts=own_prompts, references=references, outputs=outputs)
    scores = [sigmoid(value) for value in found]
    return {"rewards": found, "scores": scores, "extra_logs": {"polar_reward": found}}


# --- TRL and ms-swift --------------------------------------------------------------------------------------------


def trl_reward(prompts: Sequence[Messages], completions: Sequence[Messages], **columns: Any) -> list[float]:
    """TRL's `reward_funcs`, configured by the environment; texts and conversations alike."""
    return _trl_rewards(configured(), prompts, completions, columns)


def make_trl_reward(function: RewardFunction, *, name: str = "polar_reward") -> Callable[..., list[float]]:
    """A reward function for TRL's `reward_funcs` out of one that was made in the script.

    TRL logs by function names: give several their own.
    """

    def polar_reward(prompts: Sequence[Messages], completions: Sequence[Messages], **columns: Any) -> list[float]:
        return _trl_rewards(function, prompts, completions, columns)

    polar_reward.__name__ = name
    return polar_reward


def swift_reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """What an ms-swift ORM's `__call__` returns; its column `messages` is the prompt with the completion at its end."""
    if "messages" not in columns:
        raise UserError(f"ms-swift passed no `messages` (only {_names(columns)}); its dataset must have them")
    prompts = []
    for index, (messages, completion) in enumerate(zip(columns["messages"], completions, strict=True)):
        if len(messages) < 2 or messages[-1].get("content") != completion:
            raise RewardError([index], "its messages do not end with the completion, so the prompt cannot be told")
        prompts.append(messages[:-1])
    reward = configured()
    return reward.rewards(prompts=prompts, references=_references(reward, columns), outputs=completions)


def _trl_rewards(
    function: RewardFunction, prompts: Sequence[Messages], completions: Sequence[Messages], columns: dict[str, Any]
) -> list[float]:
    return function.rewards(prompts=prompts, references=_references(function, columns), outputs=completions)


def _references(function: RewardFunction, columns: Mapping[str, Any]) -> Sequence[References]:
    name = function.settings.reference_column
    if name not in columns:
        raise UserError(
            f"the dataset has no column {name!r} (it has {_names(columns)}); POLAR needs a reference per prompt: add "
            f"it, or name the column with {PREFIX}REFERENCE_COLUMN"
        )
    return columns[name]


def _names(columns: Mapping[str, Any]) -> str:
    return ", ".join(sorted(columns)) or "none"
