"""What a finished output says of the models that it comes from: settings, counts, what was left out, who is alike."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import megatron_polar
from megatron_polar.errors import UserError
from megatron_polar.log import info, warn
from megatron_polar.policies.collect import Shard, read_served, read_summary
from megatron_polar.policies.pool import Pool

QUARANTINE = "quarantine.ndjson"  # not .jsonl: `preprocess` reads all of these in a directory
_ALIKE_SHARE, _LEAST_MEETINGS = 0.5, 20
_MOST_WARNINGS = 5


def describe_collected(pool: Pool, shards: Sequence[Shard]) -> dict:
    """Add up the summaries of finished shards. Keys of APIs are not in it, nor in what it is made of."""
    summaries, said = [_summary_of(shard) for shard in shards], read_served(shards[0].path.parent)
    policies = {spec.name: Counter() for spec in pool.specs}
    cleaning, meetings, alike = Counter(), Counter(), Counter()
    for summary in summaries:
        cleaning.update(summary["counts"]["cleaning"])
        for name, counts in summary["counts"]["policies"].items():
            policies[name].update(counts)
        for one, other, met, equal in summary["counts"]["pairs"]:
            meetings[one, other] += met
            alike[one, other] += equal
    described = []
    for spec in pool.specs:
        counts = dict(policies[spec.name])
        counts["retries"] = counts["attempts"] - counts["requests"]
        settings = {key: value for key, value in asdict(spec).items() if key != "api_key_env"}
        source = getattr(spec, "endpoint", None) or getattr(spec, "path", "")
        served = said.get(source, {}).get(getattr(spec, "model", spec.name), {})
        described.append({"name": spec.name, "settings": settings, "counts": counts, "served": served})
    return {
        "version": megatron_polar.__version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "policies": described,
        "cleaning": dict(cleaning),
        "alike": [
            {"policies": list(pair), "prompts": met, "duplicates": alike[pair], "share": round(alike[pair] / met, 4)}
            for pair, met in sorted(meetings.items())
            if alike[pair]
        ],
    }


def _summary_of(shard: Shard) -> dict:
    summary = read_summary(shard)
    if summary is None:
        raise UserError(f"{shard.path}: changed while `sample` ran; start the same command again, and it is made anew")
    return summary


def say_collected(collected: dict) -> None:
    """Say in a few lines what failed and what was left out, and warn of policies too alike to tell apart."""
    policies = collected["policies"]
    requests, failed, retries = (sum(p["counts"][name] for p in policies) for name in ("requests", "failed", "retries"))
    info(f"sample: {requests} requests, {retries} retries, {failed} failed for good ({QUARANTINE})")
    done = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in collected["cleaning"].items() if count)
    info(f"sample: cleaning: {done or 'nothing to do'}")
    suspects = [p for p in collected["alike"] if p["share"] >= _ALIKE_SHARE and p["prompts"] >= _LEAST_MEETINGS]
    for pair in suspects[:_MOST_WARNINGS]:
        one, other = pair["policies"]
        warn(
            f"policies {one} and {other} gave the same or nearly the same answer to {pair['duplicates']} of "
            f"{pair['prompts']} prompts: too alike to tell apart; leave one of them out of the pool"
        )
    if len(suspects) > _MOST_WARNINGS:
        warn(f"and {len(suspects) - _MOST_WARNINGS} more pairs (`alike` in manifest.json)")


def describe_quarantine(content: bytes) -> dict:
    """Name, size and SHA-256 of the quarantines of all shards in one file."""
    return {"file": QUARANTINE, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def facts(manifest: dict) -> list:
    """What a manifest says of an output's files and answers, without when and by whom."""
    collected = manifest.get("collected", {})
    counts = [policy["counts"] for policy in collected.get("policies", ())]
    return [manifest["shards"], manifest.get("quarantine"), counts, collected.get("cleaning")]
