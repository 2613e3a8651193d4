"""verl loads this file by its path: reward.custom_reward_function.path (launch.sh beside it has the whole command).

Data: `reward_model.ground_truth` holds the reference and `extra_info.prompt` the prompt, each a text or a list of
messages. The server and what is done to rewards come from MEGATRON_POLAR_REWARD_* variables (docs/rl.md), which
every Ray worker must see.
"""

from megatron_polar.serve.adapters import compute_score, compute_score_async, compute_score_batch

__all__ = ["compute_score", "compute_score_async", "compute_score_batch"]
