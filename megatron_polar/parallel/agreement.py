"""What ranks tell one another before they go on together: a fault that one of them has found, files that they check in
parts, a choice that all must have made alike. Collective, over all ranks."""

from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_polar.errors import MACHINE_DIFFERS, RunStopped, UserError
from megatron_polar.processes import node_name

Check = Callable[..., str | None]
"""`check(part=, of=)`: what is wrong with this part of the whole, None where nothing is; may raise UserError, too."""


def machines_of_ranks() -> list[str]:
    """The machine of every rank."""
    return _gather(node_name())


def raise_everywhere(problem: UserError | None) -> None:
    """Raise on every rank what one has found; where others have not, with its rank and machine. A RunStopped, which is
    no mistake of one rank, as it is."""
    everyone = _gather((node_name(), problem))
    found = [(rank, host, problem) for rank, (host, problem) in enumerate(everyone) if problem is not None]
    if not found:
        return
    for _, _, stopped in found:
        if isinstance(stopped, RunStopped):
            raise stopped
    rank, host, problem = found[0]
    if len(found) == len(everyone):
        raise problem
    others = len(everyone) - len(found)
    raise UserError(f"rank {rank} on {host}: {problem} ({others} of {len(everyone)} ranks find nothing wrong)")


def agree_on(what: str, choice: str) -> None:
    """Raise UserError on every rank, naming two of them, where not all have chosen alike."""
    everyone = _gather((node_name(), choice))
    host, first = everyone[0]
    for rank, (other, different) in enumerate(everyone):
        if different != first:
            raise UserError(
                f"{what} is {first} on rank 0 ({host}) and {different} on rank {rank} ({other}); start all nodes from "
                f"one environment, and set it, so that a rank that cannot have it says why"
            )


def check_in_parts(what: str, check: Check) -> list[str]:
    """Let each rank check its part of `what`, and say what is wrong, the same on every rank.

    What one machine finds damaged, another one reads again: bad memory or a stale mount is likelier than a damaged
    file where many machines read. Raises RunStopped (MACHINE_DIFFERS) where the two do not agree; what `check` raises,
    on every rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone = _gather((node_name(), _outcome(check, rank, size)))
    hosts = [host for host, _ in everyone]
    problems = {part: problem for part, (_, problem) in enumerate(everyone) if problem is not None}
    readers = {part: reader for part in problems if (reader := _elsewhere(hosts, part)) is not None}
    if readers:
        mine = {part: _outcome(check, part, size) for part, reader in readers.items() if reader == rank}
        again = {part: problem for one in _gather(mine) for part, problem in one.items()}
        for part, problem in again.items():
            if problem is None:
                raise RunStopped(
                    f"{what}: rank {part} on {hosts[part]} has found damage where rank {readers[part]} on "
                    f"{hosts[readers[part]]} reads the same without a fault: {problems[part]}; look at the memory and "
                    f"the mounts of {hosts[part]}, and start again without it (--exclude={hosts[part]})",
                    status=MACHINE_DIFFERS,
                    machine=hosts[part],
                )
    for problem in problems.values():
        if isinstance(problem, UserError):
            raise problem
    return list(problems.values())


def _outcome(check: Check, part: int, of: int) -> str | UserError | None:
    try:
        return check(part=part, of=of)
    except UserError as error:
        return error


def _elsewhere(hosts: Sequence[str], rank: int) -> int | None:
    """The next rank on another machine; None where there is none."""
    later = (other % len(hosts) for other in range(rank + 1, rank + len(hosts)))
    return next((other for other in later if hosts[other] != hosts[rank]), None)


def _gather(own: object) -> list:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone
