"""Draw trajectories from a pool of policies into JSONL shards: the same bytes for any workers and any interruption."""

import hashlib
import multiprocessing
import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import orjson

from megatron_polar.data.parts import Part, locked
from megatron_polar.errors import UserError
from megatron_polar.log import Progress, info
from megatron_polar.manifest import HashedFile, sync_directory, write_durably
from megatron_polar.policies.backends import EmbeddedPolicy, EmbeddedSpec
from megatron_polar.policies.collect import WORK, Asking, Shard, collect, read_summary
from megatron_polar.policies.pool import Pool, load_pool
from megatron_polar.policies.prompts import Prompt, Wanted, find_prompts
from megatron_polar.policies.provenance import (
    QUARANTINE,
    describe_collected,
    describe_quarantine,
    facts,
    say_collected,
)
from megatron_polar.policies.schedule import SCHEDULES, DrawSettings, scheduled

FORMAT_VERSION = 1
_POLICIES_PER_PROMPT = 4
_MADE_OF = {
    "prompts_sha256": "other prompts, by --prompts, --documents, --prompt-split or --num-prompts",
    "corpus_sha256": "another corpus of the pool",
    "policies": "other policies of the pool",
    "cleaning": "another cleaning of the pool",
}
"""What keys of settings.json come from, for messages."""


@dataclass(frozen=True)
class SampleReport:
    """What one call of `sample_pool` leaves behind, a part in its own shards; num_reused shards were there before.

    is_complete: the whole output is, with its manifest.
    """

    output: Path
    num_prompts: int
    num_trajectories: int
    num_words: int
    num_shards: int
    num_reused: int
    is_complete: bool


def sample_pool(
    pool_path: Path,
    *,
    prompts: Path | None,
    output: Path,
    num_prompts: int | None = None,
    prompt_split: Literal["train", "heldout"] = "train",
    trajectories_per_policy: int = 2,
    policies_per_prompt: int | None = None,
    seed: int = 1,
    workers: int = 1,
    wrapper: Literal["sft", "pretrain"] = "pretrain",
    prompts_per_shard: int = 500,
    part: Part | None = None,
    check: bool = False,
    schedule: Literal["anchor", "all"] = "anchor",
    documents: Path | None = None,
    tokenizer: Path | None = None,
    max_prefix_tokens: int = 1024,
    asking: Asking | None = None,
) -> SampleReport | None:
    """Sample trajectories of `policies_per_prompt` policies (None: four, or all of a smaller pool) for each prompt:
    several of the first, one of each other.

    With schedule="all" every policy gives `trajectories_per_policy`. Prompts are the first `num_prompts` of a JSONL
    file with a `prompt` key (all for None), or prefixes of `documents` (up to `max_prefix_tokens` long), or else
    `num_prompts` different sentence openings of the pool's corpus; then `prompt_split` says from which side of the
    split, and the sides share no opening. `output` gets `settings.json`, `trajectories-00000.jsonl` ... and, last,
    `manifest.json`. Called again with the same settings it keeps the finished shards. With a `part` it draws that
    part's shards and no manifest; parts may run at the same time. `check`: look at the arguments, write nothing, return
    None. `asking`: for policies that are not embedded. UserError for bad input and for an output of other settings.
    """
    pool, asking = load_pool(pool_path), asking or Asking()
    if policies_per_prompt is None:
        policies_per_prompt = min(_POLICIES_PER_PROMPT, len(pool.specs))
    settings = DrawSettings(seed, trajectories_per_policy, policies_per_prompt, prompts_per_shard, wrapper, schedule)
    _check_counts(pool, settings, num_prompts=num_prompts, prompt_split=prompt_split, workers=workers)
    _check_chats(pool, settings)
    wanted = Wanted(prompts, documents, num_prompts, prompt_split, tokenizer, max_prefix_tokens)
    found = find_prompts(wanted, pool, seed=seed)
    if check:
        info(f"{output}: the arguments are right; {len(found)} prompts")
        return None
    if workers > 1 and not pool.is_embedded:
        info(
            f"workers={workers}: only embedded policies need them; others are asked as max_concurrency in the pool says"
        )
    described = _describe_settings(pool, settings, found)
    shards = [
        Shard(index, output / f"trajectories-{index:05d}.jsonl", tuple(found[start : start + prompts_per_shard]), start)
        for index, start in enumerate(range(0, len(found), prompts_per_shard))
        if part is None or part.holds(index)
    ]
    with _opened(output, described, part=part):
        has_manifest = (output / "manifest.json").exists()
        pending = [shard for shard in shards if not _is_finished(shard, pool, asking)]
        if pool.is_embedded:
            _write_shards(pool, settings, pending, workers=workers, total=sum(len(shard.prompts) for shard in pending))
        elif pending:
            collect(pool, settings, shards, suffix=_unique_suffix(), asking=asking)
        entries = [_describe_shard(shard.path) for shard in shards]
        totals = {name: sum(entry[name] for entry in entries) for name in ("prompts", "trajectories", "words")}
        manifest = {**described, **totals, "shards": entries}
        is_new = part is None and _write_manifest(manifest, pool, shards, output=output)
        if has_manifest and not (pending or is_new):
            info(f"sample: {output} is complete and was made with these settings; nothing to do")
    is_complete = part is None or (has_manifest and not pending)
    return SampleReport(output, *totals.values(), len(shards), len(shards) - len(pending), is_complete)


def _write_manifest(manifest: dict, pool: Pool, shards: Sequence[Shard], *, output: Path) -> bool:
    """Write manifest.json and the quarantine that it counts; returns False where they are there, of these shards.

    They may be of older ones: of before parts that asked again what had failed, or of before a call that was killed.
    """
    path, quarantine = output / "manifest.json", b""
    if not pool.is_embedded:
        quarantine = b"".join(shard.quarantine.read_bytes() for shard in shards)
        manifest |= {"collected": describe_collected(pool, shards), "quarantine": describe_quarantine(quarantine)}
    if _facts_of(path) == facts(manifest):
        return False
    if not pool.is_embedded:
        say_collected(manifest["collected"])
        _write_atomically(output / QUARANTINE, quarantine)
    _write_atomically(path, _encode_json(manifest))
    return True


def _facts_of(path: Path) -> list | None:
    try:
        return facts(orjson.loads(path.read_bytes()))
    except (FileNotFoundError, orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
        return None  # not there, or of no use


def _check_chats(pool: Pool, settings: DrawSettings) -> None:
    """The answers of a chat continue no text."""
    chatting = [spec.name for spec in pool.specs if getattr(spec, "api", None) == "chat"]
    if chatting and settings.wrapper == "pretrain":
        raise UserError(
            f"policy {chatting[0]} of {pool.path} chats: its answers do not continue the prompt's text; use "
            "--wrapper sft (and a pool of its own for policies that continue prefixes)"
        )


def _check_counts(
    pool: Pool, settings: DrawSettings, *, num_prompts: int | None, prompt_split: str, workers: int
) -> None:
    available = len(pool.specs)
    if settings.schedule == "anchor" and not 2 <= settings.policies_per_prompt <= available:
        raise UserError(
            f"policies_per_prompt={settings.policies_per_prompt} does not fit the {available} policies of {pool.path}; "
            f"use 2 to {available}"
        )
    lowest = {"trajectories_per_policy": 2, "prompts_per_shard": 1, "workers": 1, "num_prompts": 1}
    given = {**asdict(settings), "workers": workers, "num_prompts": num_prompts if num_prompts is not None else 1}
    for name, minimum in lowest.items():
        if given[name] < minimum:
            raise UserError(f"{name}={given[name]} is too small; use {minimum} or more")
    for name, value, allowed in (
        ("wrapper", settings.wrapper, ("pretrain", "sft")),
        ("prompt_split", prompt_split, ("train", "heldout")),
        ("schedule", settings.schedule, SCHEDULES),
    ):
        if value not in allowed:
            raise UserError(f"{name}={value!r} is not known; use {' or '.join(map(repr, allowed))}")


def _describe_settings(pool: Pool, settings: DrawSettings, prompts: Sequence[Prompt]) -> dict:
    texts = [prompt.text if pool.is_embedded or not prompt.messages else tuple(prompt) for prompt in prompts]
    described = {
        "format": FORMAT_VERSION,
        "draw": settings.describe(),
        "policies": [asdict(spec) if isinstance(spec, EmbeddedSpec) else spec.identity() for spec in pool.specs],
        "corpus_sha256": hashlib.sha256(orjson.dumps(pool.documents)).hexdigest(),
        "prompts_sha256": hashlib.sha256(orjson.dumps(texts)).hexdigest(),
    }
    if not pool.is_embedded:
        described["cleaning"] = asdict(pool.cleaning)
    encoded = orjson.dumps(described)
    # Decoded again, it equals what is read back from settings.json: lists where there were tuples.
    return {**orjson.loads(encoded), "fingerprint": hashlib.sha256(encoded).hexdigest()}


@contextmanager
def _opened(output: Path, described: dict, *, part: Part | None) -> Iterator[None]:
    """Make or recognise the output directory and lock its settings.json: that is there first, and never replaced."""
    settings, remedy = output / "settings.json", "choose another output directory or delete this one"
    if not settings.exists():
        names = os.listdir(output) if output.is_dir() else []
        begun = all(
            name.startswith(f"{settings.name}.") for name in names
        )  # by another part, or a call that was killed
        if not begun and not settings.exists():
            raise UserError(f"{output}: is not empty and not an output of `sample` (no settings.json); {remedy}")
        output.mkdir(parents=True, exist_ok=True)
        _write_unless_there(settings, _encode_json(described))
    _compare_settings(settings, described, remedy=remedy)
    with locked(settings, part=part, output=output, verb="sample"):
        if part is None:
            for stale in (*output.glob("*.partial"), *(output / WORK).glob("*.partial")):  # of a call that was killed
                stale.unlink(missing_ok=True)
        yield


def _compare_settings(path: Path, described: dict, *, remedy: str) -> None:
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; {remedy}")
    try:
        found = orjson.loads(path.read_bytes())
        changed = [name for name, value in described.items() if found.get(name) != value and name != "fingerprint"]
        if found["draw"].get("seed") != described["draw"]["seed"]:  # which draws other prompts
            changed = [name for name in changed if name != "prompts_sha256"]
        options = [
            f"--{name.replace('_', '-')} {found['draw'].get(name)} then, {value} now"
            for name, value in described["draw"].items()
            if found["draw"].get(name) != value
        ]
    except (orjson.JSONDecodeError, AttributeError, KeyError):
        raise UserError(f"{path}: not what `sample` has written; {remedy}") from None
    if changed:
        told = "; ".join(options + [_MADE_OF.get(name, name) for name in changed if name != "draw"])
        raise UserError(
            f"{path.parent}: holds trajectories of other settings ({told}); repeat those to go on, or {remedy}"
        )


def _is_finished(shard: Shard, pool: Pool, asking: Asking) -> bool:
    # A shard gets its name only when it is whole; counting the lines catches one that was cut later.
    if not pool.is_embedded:
        return asking.is_done(read_summary(shard))
    if not shard.path.exists():
        return False
    content = shard.path.read_bytes()
    return content.endswith(b"\n") and content.count(b"\n") == len(shard.prompts)


def _write_shards(pool: Pool, settings: DrawSettings, shards: Sequence[Shard], *, workers: int, total: int) -> None:
    if not shards:
        return
    with Progress("sample", total=total, unit="prompts") as bar:
        if workers == 1:
            policies = pool.fit()
            for shard in shards:
                bar.advance(_write_shard(shard, policies=policies, settings=settings))
            return
        # Spawned, not forked: a parent with threads (torch, tokenizers) must not be copied in mid-flight.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(workers, len(shards)), mp_context=context, initializer=_fit_in_worker, initargs=(pool,)
        ) as executor:
            for done in executor.map(partial(_write_shard_in_worker, settings=settings), shards):
                bar.advance(done)


_policies_of_worker: list[EmbeddedPolicy] = []


def _fit_in_worker(pool: Pool) -> None:
    _policies_of_worker[:] = pool.fit()


def _write_shard_in_worker(shard: Shard, *, settings: DrawSettings) -> int:
    return _write_shard(shard, policies=_policies_of_worker, settings=settings)


def _write_shard(shard: Shard, *, policies: Sequence[EmbeddedPolicy], settings: DrawSettings) -> int:
    lines = [orjson.dumps(_draw_group(prompt.text, policies, settings)) + b"\n" for prompt in shard.prompts]
    _write_atomically(shard.path, b"".join(lines))
    return len(lines)


def _draw_group(prompt: str, policies: Sequence[EmbeddedPolicy], settings: DrawSettings) -> dict:
    trajectories = []
    for index, count in scheduled(prompt, num_policies=len(policies), settings=settings):
        texts = policies[index].generate(prompt, num_trajectories=count, seed=settings.seed, wrapper=settings.wrapper)
        trajectories.extend({"policy": policies[index].name, "text": text} for text in texts)
    return {"prompt": prompt, "trajectories": trajectories, "wrapper": settings.wrapper}


def _describe_shard(path: Path) -> dict:
    content = path.read_bytes()
    try:
        groups = [orjson.loads(line) for line in content.splitlines()]
        texts = [trajectory["text"] for group in groups for trajectory in group["trajectories"]]
        num_words = sum(len(text.split()) for text in texts)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not what `sample` has written; delete it, and it is drawn again") from None
    return {
        "file": path.name,
        "prompts": len(groups),
        "trajectories": len(texts),
        "words": num_words,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _encode_json(value: dict) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n"


def _write_unless_there(path: Path, content: bytes) -> None:
    """Of several processes that come at once one writes: a link, unlike a rename, takes no other file's place."""
    temporary = path.with_name(path.name + _unique_suffix())
    with HashedFile(temporary) as file:
        file.write(content)
    with suppress(FileExistsError, FileNotFoundError):  # not found: removed as stale by the one that was first
        os.link(temporary, path)
    temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def _write_atomically(path: Path, content: bytes) -> None:
    write_durably(path, content, suffix=_unique_suffix())


def _unique_suffix() -> str:
    return f".{secrets.token_hex(8)}.partial"
