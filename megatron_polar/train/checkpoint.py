"""Checkpoints: megatron-core's torch_dist shards, in any layout, saved in the foreground or the background.

What is saved is in state_dict.py, which files a checkpoint has and when it counts in checkpoint_files.py, how shards
are written and read in shard_files.py; here are the steps of a save, and of finding a checkpoint, that all ranks take
together.
"""

import io
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import orjson
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_polar import faults, log
from megatron_polar.config.schema import CheckpointSection
from megatron_polar.errors import CANNOT_SAVE, RunStopped, UserError
from megatron_polar.manifest import HashedFile, file_entry, sync_file
from megatron_polar.model.build import BuiltModel
from megatron_polar.parallel.agreement import check_in_parts
from megatron_polar.parallel.topology import Topology
from megatron_polar.train.checkpoint_files import (
    UNREADABLE,
    TrainingState,
    candidates,
    encode_state,
    has_checkpoints,
    none_verifies,
    prune,
    publish,
    saving_directory,
    verify_checkpoint,
)
from megatron_polar.train.gradients import gather_updated_weights
from megatron_polar.train.lock import RunLock
from megatron_polar.train.shard_files import HashedSave
from megatron_polar.train.state_dict import content_metadata, sharded_state

# --- Saving ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaveReport:
    """A save that has ended: `problem` is None when the checkpoint counts. Seconds from its start to its end, and of
    those the seconds in which training stood still."""

    step: int
    problem: str | None
    seconds: float
    stalled_seconds: float


@dataclass
class _Pending:
    """A save under way."""

    state: TrainingState
    directory: Path
    strategy: HashedSave
    request: AsyncRequest
    entries: dict[str, dict]
    error: OSError | None
    started: float
    stalled: float = 0.0


class Checkpointer:
    """Saves checkpoints of one run. Every method is collective: all ranks call it at the same place.

    A save that fails (a full disk, an I/O error) is a warning, and training goes on; more than
    `checkpoint.max_failed_saves` in a row raise RunStopped, and so does a run directory that is no longer ours by
    `lock`. `on_end` is told of every save that has ended; `after_each` is called while one gets on.
    """

    def __init__(
        self,
        run_directory: Path,
        *,
        section: CheckpointSection,
        model: BuiltModel,
        optimizer: MegatronOptimizer,
        topology: Topology,
        config_yaml: str,
        tokenizer_directory: Path,
        lock: RunLock,
        on_end: Callable[[SaveReport], None] = lambda report: None,
        after_each: Callable[[], None] = lambda: None,
    ):
        self.run_directory, self.section, self.topology = run_directory, section, topology
        self.model, self.optimizer = model, optimizer
        self.config_yaml = config_yaml
        # Read once: whatever becomes of the dataset's directory, checkpoints keep the tokenizer that was checked.
        files = sorted(tokenizer_directory.iterdir()) if topology.rank == 0 else []
        self._tokenizer = {f"tokenizer/{path.name}": path.read_bytes() for path in files}
        self.failed_in_a_row = 0
        self._lock, self._on_end, self._after_each = lock, on_end, after_each
        self._pending: _Pending | None = None
        self._writer = TemporalAsyncCaller()

    def save(self, state: TrainingState, *, others: Mapping[str, bytes] | None = None, blocking: bool = False) -> None:
        """Save the checkpoint of `state.step`: at once, or with `checkpoint.async_save` and not `blocking` in the
        background, in which case `poll` finishes it. `others` are small files that lie in it, by their names."""
        self.finish()
        faults.point("before_save")
        started = time.monotonic()
        pending = self._start(state, others=others or {}, started=started)
        if pending is None:
            return
        if self.section.async_save and not blocking:
            # Forked: the writer sees the weights as they are now, and the run may go on to change its own copy.
            try:
                self._writer.schedule_async_call(pending.request)
            except OSError as error:  # no memory for another process
                pending.error = error
            pending.stalled = time.monotonic() - started
            self._pending = pending
        else:
            _write_now(pending.request)
            pending.stalled = time.monotonic() - started
            self._complete(pending)

    def poll(self) -> None:
        """Publish the save in the background if all ranks have written their part."""
        if self._pending is not None:
            started = time.monotonic()
            done = self._writer.is_current_async_call_done(blocking=False)
            self._pending.stalled += time.monotonic() - started
            if done:
                self._complete(self._pending)

    def finish(self) -> None:
        """Wait for the save in the background, if there is one."""
        if self._pending is not None:
            started, written = time.monotonic(), -1
            # For this rank's own writer first, and then in a collective for the others': so the watchdog can tell the
            # rank whose writer hangs from those that wait for it, and only a writer that gets on keeps it quiet.
            while self._is_writing:
                if (now := self._pending.strategy.writer.report.num_written) != written:
                    written = now
                    self._after_each()
                time.sleep(0.02)
            self._writer.is_current_async_call_done(blocking=True)
            self._pending.stalled += time.monotonic() - started
            self._complete(self._pending)

    @property
    def _is_writing(self) -> bool:
        """Whether this rank's own writer is at work."""
        return self._writer.process is not None and self._writer.process.is_alive()

    def _start(self, state: TrainingState, *, others: Mapping[str, bytes], started: float) -> _Pending | None:
        """Plan the save and write the first rank's small files."""
        place: list[Path | str | RunStopped | None] = [None]
        if self.topology.rank == 0:
            try:
                is_ours = self._lock.is_ours()
                place = [saving_directory(self.run_directory, state.step) if is_ours else self._lock.taken_over()]
            except OSError as error:
                place = [_describe(error)]
        dist.broadcast_object_list(place, src=0)
        directory = place[0]
        if isinstance(directory, RunStopped):
            raise directory
        if isinstance(directory, str):
            self._end(state.step, problem=directory, started=started, stalled=time.monotonic() - started)
            return None
        gather_updated_weights(self.model)
        tensors = sharded_state(self.model, optimizer=self.optimizer, topology=self.topology, is_loading=False)
        tensors["content_metadata"] = content_metadata()
        sharded, common = save_preprocess(tensors, True, None)
        strategy = HashedSave(after_each=self._after_each)
        request = strategy.async_save(sharded, directory)
        entries, error = {}, None
        if self.topology.rank == 0:
            try:
                contents = {**others, "state.json": encode_state(state), "config.yaml": self.config_yaml.encode()}
                entries = self._write_small_files(directory, contents=contents, common=common, strategy=strategy)
            except OSError as problem:
                error = problem
        return _Pending(state, directory, strategy, request, entries, error, started)

    def _write_small_files(
        self, directory: Path, *, contents: Mapping[str, bytes], common: dict, strategy: HashedSave
    ) -> dict:
        buffer = io.BytesIO()
        torch.save(common, buffer)
        formats = CheckpointingConfig(strategy.backend, strategy.version)
        contents = {"common.pt": buffer.getbuffer(), "metadata.json": orjson.dumps(formats)} | dict(contents)
        (directory / "tokenizer").mkdir()
        contents |= self._tokenizer
        entries = {}
        for name, content in contents.items():
            with HashedFile(directory / name) as file:
                file.write(content)
            entries[name] = file.entry
        return entries

    def _complete(self, pending: _Pending) -> None:
        """All ranks have written, or failed to: agree, write the manifest, publish, forget old checkpoints."""
        self._pending = None
        started = time.monotonic()
        writer = pending.strategy.writer
        try:
            for finalize in pending.request.finalize_fns:
                finalize()
        except CheckpointException:
            pass  # some rank could not write: which, and why, is gathered below
        error = pending.error or writer.error
        mine = _describe(error) if error else pending.entries | writer.entries
        gathered: list = [None] * self.topology.world_size
        dist.all_gather_object(gathered, mine)
        problems = [f"rank {rank}: {part}" for rank, part in enumerate(gathered) if isinstance(part, str)]
        outcome: list[str | RunStopped | None] = [problems[0] if problems else None]
        if self.topology.rank == 0:
            if not problems:
                outcome = [self._publish(pending, entries={k: v for part in gathered for k, v in part.items()})]
            if outcome[0] is not None:
                shutil.rmtree(pending.directory, ignore_errors=True)
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], RunStopped):
            raise outcome[0]
        stalled = pending.stalled + time.monotonic() - started
        self._end(pending.state.step, problem=outcome[0], started=pending.started, stalled=stalled)

    def _publish(self, pending: _Pending, *, entries: dict) -> str | RunStopped | None:
        if not self._lock.is_ours():
            return self._lock.taken_over()
        try:
            sync_file(pending.directory / ".metadata")
            entries[".metadata"] = file_entry(pending.directory / ".metadata")
            newest = publish(pending.directory, step=pending.state.step, entries=entries)
        except OSError as error:
            return f"rank 0: {_describe(error)}"
        try:
            prune(self.run_directory, newest=newest, keep=self.section.keep, keep_every=self.section.keep_every)
        except OSError as error:
            log.warn(f"old checkpoints of {self.run_directory} could not be deleted: {_describe(error)}")
        faults.point("after_save")
        return None

    def _end(self, step: int, *, problem: str | None, started: float, stalled: float) -> None:
        self._on_end(SaveReport(step, problem, time.monotonic() - started, stalled))
        if problem is None:
            self.failed_in_a_row = 0
            return
        self.failed_in_a_row += 1
        limit = self.section.max_failed_saves
        message = f"the checkpoint of step {step} could not be written: {problem}"
        if self.failed_in_a_row > limit:
            raise RunStopped(
                f"{message}; {self.failed_in_a_row} saves in a row failed, more than checkpoint.max_failed_saves="
                f"{limit}; make room or choose another run.directory, then start again",
                status=CANNOT_SAVE,
            )
        if self.topology.rank == 0:
            log.warn(
                f"{message}; training goes on without it ({self.failed_in_a_row} of {limit} failures in a row allowed)"
            )


def _write_now(request: AsyncRequest) -> None:
    if request.async_fn is not None:
        process, _, *rest = request.async_fn_args
        request.async_fn(process, request.preload_fn(), *rest)


def _describe(error: OSError) -> str:
    name = error.filename or "a file"
    kind = f"[Errno {error.errno}] " if error.errno else ""
    return f"{kind}{error.strerror or error}: {name}"


# --- Finding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The checkpoint to load, and the newer ones that are damaged beyond doubt, with the reasons."""

    path: Path
    damaged: dict[Path, str]


def agree_on_checkpoint(
    path: str | Path, *, topology: Topology, required: bool = True, after_each: Callable[[], None] = lambda: None
) -> Found | None:
    """The newest checkpoint of `path` that verifies, the same on every rank; the ranks share the hashing, and call
    `after_each` MiB of it.

    Says which it skips and why. Not `required`: None for a directory in which no save was ever finished. Raises
    UserError when there is none, or none that verifies, and RunStopped when it is one machine that reads it wrongly.
    """
    found: list = [None]
    if topology.rank == 0:
        try:
            found = [candidates(path) if required or has_checkpoints(Path(path)) else None]
        except UserError as error:
            found = [error]
        except OSError as error:
            found = [UserError(f"{path}: cannot be read ({error.strerror or error}); check the file system")]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    if found[0] is None:
        return None
    damaged = {}
    for candidate in found[0]:
        problems = check_in_parts(str(candidate), partial(verify_checkpoint, candidate, after_each=after_each))
        if not problems:
            return Found(candidate, damaged)
        if not any(text.startswith(UNREADABLE) for text in problems):
            damaged[candidate] = problems[0]
        if topology.rank == 0:
            log.warn(f"{candidate}: skipped: {problems[0]}")
    raise none_verifies(path, len(found[0]), to_resume=not required)
