"""Faults on purpose: named points in the program where a test can kill, stop or damage it.

`POLAR_FAULT` names one point, when, where and what (several with commas): `POINT[:NTH][@RANK][=ACTION]`.
`after_shard:2` kills the process the second time any rank of it passes `after_shard`; `gradient:3@1=nan` spoils rank
1's gradient of the third step. Without the variable every point costs one look at an empty dictionary. A writer in the
background is forked for every save and begins to count anew.
"""

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass

from megatron_polar.errors import UserError

POINTS = (
    # saving a checkpoint, in order; `after_shard` and the two before it happen in the writer
    "before_save",
    "before_shard",
    "in_shard",
    "after_shard",
    "before_manifest",
    "after_manifest",
    "before_publish",
    "after_publish",
    "before_latest",
    "after_latest",
    "in_prune",
    "after_save",
    # training
    "start",
    "data",
    "loss",
    "gradient",
    "before_update",
    "after_update",
    "step_end",
    "evaluation",
    # preprocess
    "unit",
    "after_unit_shard",
    "after_unit_done",
    "merge",
    "before_dataset_files",
    "before_dataset_manifest",
    "after_dataset_manifest",
)
"""Every point that `POLAR_FAULT` can name."""

_ACTIONS = ("kill", "kill_parent", "stop", "hang", "term", "usr1", "enospc", "eio", "nan", "inf", "flip", "slow")


@dataclass
class _Plan:
    nth: int
    rank: int | None
    action: str
    passed: int = 0


def _parse(text: str) -> dict[str, list[_Plan]]:
    plans: dict[str, list[_Plan]] = {}
    for item in filter(None, text.split(",")):
        place, _, action = item.partition("=")
        place, _, rank = place.partition("@")
        point, _, nth = place.partition(":")
        numbers_are_numbers = (nth or "1").isdigit() and (rank or "0").isdigit()
        if point not in POINTS or (action or "kill") not in _ACTIONS or not numbers_are_numbers:
            raise UserError(
                f"POLAR_FAULT={item!r} is not POINT[:NTH][@RANK][=ACTION]; points: {', '.join(POINTS)}; "
                f"actions: {', '.join(_ACTIONS)}"
            )
        plans.setdefault(point, []).append(_Plan(int(nth or 1), int(rank) if rank else None, action or "kill"))
    return plans


_plans = _parse(os.environ.get("POLAR_FAULT", ""))


def plan(text: str) -> None:
    """Replace what `POLAR_FAULT` asked for; for processes that are forked, not started."""
    _plans.clear()
    _plans.update(_parse(text))


def point(name: str) -> str | None:
    """Pass a fault point. Returns the action when the caller must carry it out itself (nan, inf, flip), else None.

    `slow` delays every passing from the NTH on by 50 ms; everything else happens once, at the NTH.
    """
    if name not in _plans:
        return None
    rank = int(os.environ.get("RANK", "0"))
    plans = [planned for planned in _plans[name] if planned.rank in (None, rank)]
    for planned in plans:
        planned.passed += 1
    asked = None
    for planned in plans:
        if planned.action == "slow" and planned.passed >= planned.nth:
            time.sleep(0.05)
        elif planned.passed == planned.nth:
            print(f"POLAR_FAULT: {planned.action} at {name}, passing {planned.nth}", file=sys.stderr, flush=True)
            asked = _act(planned.action, name) or asked
    return asked


def _act(action: str, name: str) -> str | None:
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
    if action in signals:
        os.kill(os.getpid(), signals[action])
    elif action == "kill_parent":  # in a background writer: its rank dies while it writes
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    elif action == "hang":
        while True:
            time.sleep(0.1)
    elif action in ("enospc", "eio"):
        number = {"enospc": errno.ENOSPC, "eio": errno.EIO}[action]
        raise OSError(number, os.strerror(number), name)
    else:
        return action
    return None
