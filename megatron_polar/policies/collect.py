"""Ask endpoints and local models for a pool's trajectories, shard after shard, and remember every answer."""

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_polar.data.parts import held_alone
from megatron_polar.errors import UserError
from megatron_polar.log import info, warn
from megatron_polar.manifest import write_durably
from megatron_polar.policies.answers import Answer, Ask, Journal, NoAnswer, Place, Source
from megatron_polar.policies.assemble import assemble
from megatron_polar.policies.backends import EmbeddedPolicy, EmbeddedSpec, derived_seed
from megatron_polar.policies.clean import warm_up
from megatron_polar.policies.endpoint import Endpoint
from megatron_polar.policies.imitation import ImitationPolicy, ImitationSpec
from megatron_polar.policies.live import LiveProgress
from megatron_polar.policies.local import EmbeddedSource, TransformersSource
from megatron_polar.policies.pool import Pool
from megatron_polar.policies.prompts import Prompt
from megatron_polar.policies.remote import HttpSpec
from megatron_polar.policies.schedule import DrawSettings, scheduled

WORK = ".work"
"""Below an output: the journals, and what is known of finished shards."""
_SYNC_SECONDS = 5.0
_DRAIN_SECONDS = 10.0  # for requests under way when something ends the run
_MOST_REFUSALS = 20  # of a policy that has answered nothing yet: then it is the pool that is wrong, not the prompts
_SEED_BITS = 31  # what every server takes


@dataclass(frozen=True)
class Shard:
    """Consecutive prompts and the file of their trajectories; first_row is the first prompt's place among all."""

    index: int
    path: Path
    prompts: tuple[Prompt, ...]
    first_row: int

    @property
    def summary(self) -> Path:
        return self.path.parent / WORK / f"shard-{self.index:05d}.json"

    @property
    def quarantine(self) -> Path:
        return self.path.parent / WORK / f"quarantine-{self.index:05d}.ndjson"


@dataclass
class _Pending:
    """A shard on its way: the trajectories that it wants, and those whose requests are finished."""

    shard: Shard
    places: list[Place]
    done: set[Place] = field(default_factory=set)


def read_summary(shard: Shard) -> dict | None:
    """What is known of a shard if its files are as they were written, else None: then it is made again."""
    try:
        summary = orjson.loads(shard.summary.read_bytes())
        for path, name in ((shard.path, "sha256"), (shard.quarantine, "quarantine_sha256")):
            if _hash_of(path.read_bytes()) != summary[name]:
                return None
        return summary if summary["counts_sha256"] == _hash_of(orjson.dumps(summary["counts"])) else None
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None


def _hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Asking:
    """How a call asks: seconds that servers may take to start, and whether failed requests are sent once more."""

    patience: float = 0.0
    retry_failed: bool = False

    def is_done(self, summary: dict | None) -> bool:
        """Whether a shard with this summary has nothing left to ask."""
        if summary is None or not self.retry_failed:
            return summary is not None
        return not any(counts["failed"] for counts in summary["counts"]["policies"].values())


def collect(pool: Pool, settings: DrawSettings, shards: Sequence[Shard], *, suffix: str, asking: Asking) -> None:
    """Make those of a call's shards that are not there: send each request that no journal has, then assemble the files.

    `suffix`: of files while they are written. Raises UserError for a source that cannot be asked, after the others have
    been; what is finished is kept in any case. UserError, too, where another call asks for one of these shards.
    """
    output = shards[0].path.parent
    work = output / WORK
    if work.is_symlink():
        raise UserError(f"{work}: a link; delete it, or choose another output directory")
    work.mkdir(exist_ok=True)
    taken = (
        f"{output}: another sample asks for shards of this part (the same --part, or one of another number of parts); "
        "wait for it, so that no request is sent twice"
    )
    with held_alone(work / "asked.lock", (shard.index for shard in shards), taken=taken):
        asyncio.run(_Collector(pool, settings, work=work, suffix=suffix, asking=asking).run(shards))


def read_served(output: Path) -> dict[str, dict]:
    """What sources said of their models when last asked, by this call or another: {source: {model: facts}}."""
    notes = [orjson.loads(path.read_bytes()) for path in sorted((output / WORK).glob("served-*.json"))]
    return {note["source"]: note["served"] for note in notes}


def build_sources(pool: Pool, *, wrapper: str) -> list[tuple[Source, set[int]]]:
    """Who answers for which policies (by their places): one source an endpoint, one a local model."""
    sources: list[tuple[Source, set[int]]] = []
    by_endpoint: dict[str, dict[int, HttpSpec]] = {}
    embedded: dict[int, EmbeddedPolicy | ImitationPolicy] = {}
    fitted = iter(pool.fit())
    for place, spec in enumerate(pool.specs):
        if isinstance(spec, EmbeddedSpec | ImitationSpec):
            embedded[place] = next(fitted)
        elif isinstance(spec, HttpSpec):
            by_endpoint.setdefault(spec.endpoint, {})[place] = spec
        else:
            sources.append((TransformersSource(spec, wrapper=wrapper), {place}))
    if embedded:
        sources.append((EmbeddedSource(embedded, wrapper=wrapper), set(embedded)))
    return [(Endpoint(specs, wrapper=wrapper), set(specs)) for specs in by_endpoint.values()] + sources


class _Collector:
    """State of one run: which requests are finished, who has answered at all, what is being written."""

    def __init__(self, pool: Pool, settings: DrawSettings, *, work: Path, suffix: str, asking: Asking):
        self._pool, self._settings, self._suffix, self._asking = pool, settings, suffix, asking
        self._names = [spec.name for spec in pool.specs]
        self._journal = Journal(work, policies=self._names)
        self._todo: dict[int, Shard] = {}
        self._open_shards: dict[int, _Pending] = {}
        self._has_answered: set[int] = set()
        self._held: dict[int, list[tuple[Ask, NoAnswer]]] = {}
        self._work_dir = work
        self._tasks: dict[str, list[asyncio.Task]] = {}
        self._given_up: dict[str, UserError] = {}
        self._writing: set[asyncio.Task] = set()
        self._failed_write: BaseException | None = None
        self._one_at_a_time = asyncio.Lock()
        self._is_stopping = False

    async def run(self, shards: Sequence[Shard]) -> None:
        """Answer everything that is open, and write what is complete."""
        for shard in shards:
            if summary := read_summary(shard):
                counts = summary["counts"]["policies"]
                self._has_answered |= {n for n, name in enumerate(self._names) if counts[name]["answered"]}
                if self._asking.is_done(summary):
                    continue
            self._todo[shard.index] = shard
            if self._journal.path(shard.index).exists():
                self._opened(shard.index)
        sources = build_sources(self._pool, wrapper=self._settings.wrapper)
        try:
            busy = [(source, policies) for source, policies in sources if any(self._asks(policies))]
            await self._check([source for source, _ in busy])
            with self._progress() as self._live:
                for state in list(self._open_shards.values()):
                    self._write_if_complete(state)
                await self._ask_all(busy)
                await self._finish_writing()
        finally:
            for task in self._writing:
                task.cancel()
            self._journal.sync()
            self._journal.close()
            for source, _ in sources:
                await source.close()

    def _places(self, shard: Shard) -> Iterator[Place]:
        for row, prompt in enumerate(shard.prompts):
            for policy, count in scheduled(prompt.text, num_policies=len(self._names), settings=self._settings):
                yield from (Place(row, policy, draw) for draw in range(count))

    def _opened(self, index: int) -> _Pending | None:
        """A shard with what is finished of it; None when it is written already, or being written."""
        if index not in self._open_shards and index in self._todo:
            shard, outcomes = self._todo[index], self._journal.read(index)
            if self._asking.retry_failed:
                outcomes = {place: one for place, one in outcomes.items() if isinstance(one, Answer)}
            self._has_answered |= {place.policy for place, outcome in outcomes.items() if isinstance(outcome, Answer)}
            self._open_shards[index] = _Pending(shard, list(self._places(shard)), set(outcomes))
        return self._open_shards.get(index)

    def _progress(self) -> LiveProgress:
        totals, begun = [0] * len(self._names), [0] * len(self._names)
        for shard in self._todo.values():
            done = self._open_shards[shard.index].done if shard.index in self._open_shards else ()
            for place in self._places(shard):
                totals[place.policy] += 1
                begun[place.policy] += place in done
        if sum(begun):
            info(f"sample: {sum(begun)} of {sum(totals)} requests were finished before and are not sent again")
        return LiveProgress(self._names, totals=totals, begun=begun)

    async def _check(self, sources: Sequence[Source]) -> None:
        """Ask every source whether it is there, and note what it serves; UserError for the first in the pool's order
        that is not."""
        checks = (source.check(patience=self._asking.patience) for source in sources)
        found = await asyncio.gather(*checks, return_exceptions=True)
        failed = [result for result in found if isinstance(result, BaseException)]
        if failed:
            more = f" (and {len(failed) - 1} more sources that cannot be asked)" if len(failed) > 1 else ""
            raise UserError(f"{failed[0]}{more}") if isinstance(failed[0], UserError) else failed[0]
        for source, served in zip(sources, found, strict=True):
            path = self._work_dir / f"served-{_hash_of(source.name.encode())[:16]}.json"
            note = orjson.dumps({"source": source.name, "served": served}) + b"\n"
            if served:
                write_durably(path, note, suffix=self._suffix)

    # --- asking ------------------------------------------------------------------------------------------------------

    def _asks(self, policies: set[int]) -> Iterator[Ask]:
        """The open requests of some policies, in the order of the shards."""
        for index in list(self._todo):
            state = self._opened(index)
            for place in state.places if state else ():
                if place.policy in policies and place not in state.done:
                    prompt = state.shard.prompts[place.row]
                    yield Ask(index, place, prompt, self._seed(state.shard.first_row + place.row, place, prompt))

    def _seed(self, number: int, place: Place, prompt: Prompt) -> int:
        path = ("ask", self._pool.seed, self._settings.seed, self._names[place.policy], number, prompt.text, place.draw)
        return derived_seed(*path) % 2**_SEED_BITS

    async def _ask_all(self, sources: Sequence[tuple[Source, set[int]]]) -> None:
        """Let each source's workers share its requests. A source that answers nobody leaves the others to end theirs;
        any other error ends all, but requests under way have 10 s."""
        for source, policies in sources:
            asks = self._asks(policies)
            self._tasks[source.name] = [
                asyncio.create_task(self._work(source, asks)) for _ in range(source.concurrency)
            ]
        tasks = [task for of_source in self._tasks.values() for task in of_source]
        aside = [asyncio.create_task(self._sync_now_and_then())]
        aside.append(asyncio.create_task(asyncio.to_thread(warm_up, self._pool.cleaning)))
        try:
            if tasks:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            self._is_stopping = True
            running = [task for task in tasks if not task.done()]
            if running:
                await asyncio.wait(running, timeout=_DRAIN_SECONDS)
            for task in (*tasks, aside[0]):
                task.cancel()
            results = await asyncio.gather(*tasks, *aside, return_exceptions=True)
        failed = [r for r in results if isinstance(r, BaseException) and not isinstance(r, asyncio.CancelledError)]
        if failed:
            raise failed[0]
        if self._given_up:
            error, *others = self._given_up.values()
            raise UserError(f"{error} (and {len(others)} more sources were given up)") if others else error
        for policy, held in self._held.items():
            self._refuse(policy, held)

    async def _work(self, source: Source, asks: Iterator[Ask]) -> None:
        for ask in asks:
            try:
                try:
                    outcome: Answer | NoAnswer = await source.answer(ask)
                except NoAnswer as failure:
                    outcome = failure
                self._record(ask, outcome)
            except UserError as error:
                await self._give_up(source, error)
                return
            if self._failed_write:
                raise self._failed_write
            if self._is_stopping or source.name in self._given_up:
                return

    async def _give_up(self, source: Source, error: UserError) -> None:
        """Let what is under way at a source end, 10 s long, and the other sources go on."""
        if source.name in self._given_up or self._is_stopping:
            return
        self._given_up[source.name] = error
        if any(not task.done() for name, tasks in self._tasks.items() if name not in self._given_up for task in tasks):
            warn(f"{error} (the other sources go on)")
        rest = [task for task in self._tasks[source.name] if not task.done() and task is not asyncio.current_task()]
        if rest:
            await asyncio.wait(rest, timeout=_DRAIN_SECONDS)
        for task in rest:
            task.cancel()

    def _record(self, ask: Ask, outcome: Answer | NoAnswer) -> None:
        """Failures of a policy wait until it has answered once: a wrong pool must not become 10,000 poison rows."""
        policy = ask.place.policy
        if isinstance(outcome, NoAnswer) and policy not in self._has_answered:
            held = self._held.setdefault(policy, [])
            held.append((ask, outcome))
            if len(held) >= _MOST_REFUSALS:
                self._refuse(policy, held)
            return
        self._has_answered.add(policy)
        for earlier in self._held.pop(policy, []):
            self._note(*earlier)
        self._note(ask, outcome)

    def _refuse(self, policy: int, held: Sequence[tuple[Ask, NoAnswer]]) -> None:
        raise UserError(
            f"policy {self._names[policy]}: none of its {len(held)} requests was answered, first: {held[0][1].reason}; "
            "mend the pool or the server, then start the same command again: finished requests are kept"
        )

    def _note(self, ask: Ask, outcome: Answer | NoAnswer) -> None:
        self._journal.append(ask, outcome)
        state = self._open_shards[ask.shard]
        state.done.add(ask.place)
        failed = isinstance(outcome, NoAnswer)
        self._live.count(ask.place.policy, retries=outcome.attempts - 1, is_failed=failed)
        self._write_if_complete(state)

    async def _sync_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            await asyncio.to_thread(self._journal.sync)

    # --- writing -----------------------------------------------------------------------------------------------------

    def _write_if_complete(self, state: _Pending) -> None:
        if len(state.done) == len(state.places):
            del self._todo[state.shard.index], self._open_shards[state.shard.index]
            self._journal.close(state.shard.index)
            task = asyncio.create_task(self._write(state.shard))
            self._writing.add(task)
            task.add_done_callback(self._written)

    def _written(self, task: asyncio.Task) -> None:
        """A disk that is full is known at the next answer, not after the last."""
        if not task.cancelled() and task.exception() is not None:
            self._failed_write = task.exception()
        else:
            self._writing.discard(task)

    async def _write(self, shard: Shard) -> None:
        async with self._one_at_a_time:  # a shard's answers are in memory while it is written
            await asyncio.to_thread(self._write_shard, shard)

    async def _finish_writing(self) -> None:
        await asyncio.gather(*self._writing)

    def _write_shard(self, shard: Shard) -> None:
        """Trajectories and quarantine first, the summary that vouches for them last."""
        made = assemble(
            shard.prompts,
            self._journal.read(shard.index),
            policies=self._names,
            settings=self._settings,
            cleaning=self._pool.cleaning,
            first_row=shard.first_row,
        )
        summary: dict[str, Any] = {"counts": made.counts, "counts_sha256": _hash_of(orjson.dumps(made.counts))}
        for path, content, name in (
            (shard.path, made.content, "sha256"),
            (shard.quarantine, made.quarantine, "quarantine_sha256"),
        ):
            write_durably(path, content, suffix=self._suffix)
            summary[name] = _hash_of(content)
        write_durably(shard.summary, orjson.dumps(summary) + b"\n", suffix=self._suffix)
