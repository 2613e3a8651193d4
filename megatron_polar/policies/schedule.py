"""Which policies answer a prompt, and how often: a function of the seed and the prompt alone."""

import random
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_polar.policies.backends import choose, derived_seed

SCHEDULES = ("anchor", "all")


@dataclass(frozen=True)
class DrawSettings:
    """What is drawn for each prompt; part of the fingerprint that a later call must match to resume."""

    seed: int
    trajectories_per_policy: int
    policies_per_prompt: int
    prompts_per_shard: int
    wrapper: Literal["sft", "pretrain"]
    schedule: Literal["anchor", "all"] = "anchor"

    def describe(self) -> dict:
        """As settings.json has it: without a schedule it is the anchor's, as in outputs from before there were two."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("schedule", "anchor")}


def scheduled(prompt: str, *, num_policies: int, settings: DrawSettings) -> list[tuple[int, int]]:
    """Say which policies answer `prompt`, by their place in the pool, and with how many trajectories, in order.

    "anchor": policies drawn at random; only the first, the anchor, needs a pair. "all": every policy, equally often.
    """
    if settings.schedule == "all":
        return [(index, settings.trajectories_per_policy) for index in range(num_policies)]
    rng = random.Random(derived_seed("policies", settings.seed, prompt))
    drawn = choose(range(num_policies), settings.policies_per_prompt, rng)
    return [(index, 1 if place else settings.trajectories_per_policy) for place, index in enumerate(drawn)]
