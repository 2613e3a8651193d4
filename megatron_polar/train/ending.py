"""How a run ends, whichever way it does, told in `events.jsonl` and `status.json`."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_polar import log
from megatron_polar.errors import (
    DONE,
    ENVIRONMENT_ERRORS,
    FAILED,
    INTERRUPTED,
    STALLED,
    USER_ERROR,
    RunStopped,
    UserError,
    describe_missing_package,
)
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.journal import Journal
from megatron_polar.train.lock import RunLock
from megatron_polar.train.watchdog import Watchdog


@contextmanager
def written_down(lock: RunLock, *, topology: Topology, watchdog: Watchdog) -> Iterator[Journal]:
    """Write down how the run inside ends: launchers read `status.json`."""
    watchdog.words.may_write = lock.is_ours
    journal = Journal(lock.directory, writes=topology.rank == 0, may_write=lock.is_ours)
    try:
        yield journal
    except RunStopped as stop:
        journal.end("stopped", exit_status=stop.status, reason=str(stop), machine=stop.machine)
        raise
    except UserError as error:
        journal.end("refused", exit_status=USER_ERROR, reason=str(error))
        raise
    except KeyboardInterrupt:
        journal.end("interrupted", exit_status=INTERRUPTED, reason=f"interrupted after step {journal.step}")
        raise
    except RuntimeError as error:
        stop = _lost_peer(error, watchdog=watchdog)
        reason = str(stop or " ".join(str(error).split())[:500])
        journal.end("failed", exit_status=stop.status if stop else FAILED, reason=reason)
        if stop is None:
            raise
        raise stop from None
    except BaseException as error:
        known = isinstance(error, OSError) and error.errno in ENVIRONMENT_ERRORS
        known = known or (isinstance(error, ModuleNotFoundError) and describe_missing_package(error) is not None)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        journal.end("failed", exit_status=USER_ERROR if known else FAILED, reason=reason)
        raise
    journal.end("done", exit_status=DONE)


def _lost_peer(error: RuntimeError, *, watchdog: Watchdog) -> RunStopped | None:
    """If a collective failed because a rank has left it: the stop that names the rank."""
    culprit = watchdog.explain(error)
    if culprit is None:
        return None
    log.warn(f"a collective has failed: {' '.join(str(error).split())[:200]}")
    return RunStopped(culprit, status=STALLED)
