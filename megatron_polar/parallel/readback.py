"""Where the host takes the result of a collective from the device.

NCCL's calls return at once: it is here, and not in the call, that a rank stands while it waits for the others. The
watchdog knows a rank that waits by its stack (train/watchdog.py), so this is a file of its own, and does nothing else.
"""

import torch


def read_back(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, to be used for what is the same on several ranks. Waits for the device and, as it
    computes with what others send, for these. On the CPU, where collectives wait themselves, it is the same tensor."""
    return tensor.cpu()
