"""OpenRLHF loads this file by its path: --reward.remote_url reward_func.py (launch.sh beside it has the whole command).

Data: the column named by --data.label_key holds the reference, or {"prompt": ..., "reference": ...} where prompts go
through a chat template. The server and what is done to rewards come from MEGATRON_POLAR_REWARD_* variables
(docs/rl.md), which every Ray worker must see.
"""

import torch

from megatron_polar.serve import adapters


def reward_func(queries, prompts, labels, **unused):
    """Rewards as the tensors that OpenRLHF's own examples return."""
    found = adapters.reward_func(queries, prompts, labels)
    logs = {name: torch.tensor(values) for name, values in found["extra_logs"].items()}
    return {"rewards": torch.tensor(found["rewards"]), "scores": torch.tensor(found["scores"]), "extra_logs": logs}
