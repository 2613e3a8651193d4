"""ms-swift loads this file by its path: --external_plugins plugin.py --reward_funcs polar (command.sh beside it).

Data: every line has `messages` and a column `reference`. The server and what is done to rewards come from
MEGATRON_POLAR_REWARD_* variables (docs/rl.md).
"""

from megatron_polar.serve.adapters import swift_reward

try:
    from swift.rewards import ORM, orms  # ms-swift 4
except ImportError:
    from swift.plugin import ORM, orms  # ms-swift 3


class Polar(ORM):
    """POLAR's reward of each completion, against the reference of its prompt."""

    def __call__(self, completions, **columns) -> list[float]:
        return swift_reward(completions, **columns)


orms["polar"] = Polar
