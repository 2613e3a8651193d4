"""SIGTERM and SIGUSR1 ask a run to stop: it writes a checkpoint at the next step boundary and ends.

Launchers send them to every process of a job, or to one; either way all ranks stop at the same step.
"""

import os
import signal

import torch
import torch.distributed as dist

from megatron_polar.errors import STOPPED, RunStopped
from megatron_polar.parallel.device import Device
from megatron_polar.parallel.readback import read_back

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def outlive_late_signals() -> None:
    """From here to the end of the process the signals change nothing, but for what `StopSignals` makes of them.

    For programs that draw a report when the last step is saved: a signal then must not make a failure of a run that is
    done. To be called just before `train`.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Takes note of the signals while it is entered; before and after, they do what they did.

    Until `wait_for_step` is called there is nothing to save, and a signal ends the run at once by RunStopped.
    """

    def __init__(self):
        self._waits = False
        # torchrun's workers outlive it when it is killed: they stop at the next step, as if it had told them to.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:  # a process that fails is about to end, with a status that a late signal must not change
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
        """The name of a signal that any rank has received (SIGHUP: its launcher has died); the same answer everywhere.
        Collective."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self._received = signal.SIGHUP
        number = torch.tensor([self._received or 0], dtype=torch.int, device=device.torch_device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        agreed = int(read_back(number))
        return signal.Signals(agreed).name if agreed else None
