"""SIGTERM and SIGUSR1 ask a run to stop: it writes a checkpoint at the next step boundary and ends.

Launchers send them to every process of a job, or to one; either way all ranks stop at the same step.
"""

import signal

import torch
import torch.distributed as dist

from megatron_polar.errors import STOPPED, RunStopped
from megatron_polar.parallel.device import Device

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Takes note of the signals while it is entered; before and after, they do what they did.

    Until `wait_for_step` is called there is nothing to save, and a signal ends the run at once by RunStopped.
    """

    def __init__(self):
        self._waits = False
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_for_step(self) -> None:
        """From now on a signal waits for `agreed`."""
        self._waits = True

    def _note(self, number: int, frame) -> None:
        self._received = signal.Signals(number)
        if not self._waits:
            raise RunStopped(
                f"stopped by {self._received.name} before the run was built; start the same command again",
                status=STOPPED,
            )

    def agreed(self, device: Device) -> str | None:
        """The name of a signal that any rank has received; the same answer everywhere. Collective."""
        number = torch.tensor([self._received or 0], dtype=torch.int, device=device.torch_device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else None
