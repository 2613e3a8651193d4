"""`sample` against a real OpenAI-compatible server on this machine: nothing lost, nothing doubled, and how fast.

First the campaign: a share of the requests fails, and the sampler is killed (SIGKILL) several times on its way and
started again. Every request must end in exactly one trajectory, and none that was finished when the kill came may be
sent again; requests that were under way then are the only ones that a server may see answered twice. Then throughput:
a straight run beside a plain asyncio loop over httpx of the same concurrency, which keeps nothing, both against a
server that takes `--delay` for an answer. The time of `sample` is that of its whole call.

`--server transformers` asks language models instead of a server that makes its texts up: sampling_campaign.py.
"""

import argparse
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import orjson
from arguments import not_negative, positive
from machine import cpu_name
from sampler import PER_PROMPT, ROOT, journal_lines, plain_loops, start

sys.path.insert(0, str(ROOT / "tests"))

import chat_server

MODELS = ("model-a", "model-b", "model-c", "model-d")
KINDS = [500, 503, 429, "hang_up", "half", "not_json", "no_choices"]


def main() -> None:
    """Run campaign and comparison, print the table; status 1 where a request was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=not_negative, default=10_000, help="a multiple of 5; 0: no campaign")
    parser.add_argument("--failures", type=float, default=0.05, help="share of requests that fail in the campaign")
    parser.add_argument("--kills", type=not_negative, default=3)
    parser.add_argument("--concurrency", type=positive, default=32)
    parser.add_argument("--delay", type=float, default=0.1, help="seconds that the server takes for an answer")
    parser.add_argument("--compared", type=not_negative, default=5000, help="requests of each run for throughput")
    parser.add_argument("--rounds", type=not_negative, default=3, help="of both, in turn; 0: no comparison")
    parser.add_argument("--server", choices=("made-up", "transformers"), default="made-up")
    parser.add_argument("--tokens", type=positive, default=12, help="of an answer at most (transformers)")
    parser.add_argument("--steps", type=positive, default=60, help="of each policy's training (transformers)")
    parser.add_argument("--policies", type=Path, help="where they are, or are to be kept; none: trained and deleted")
    parser.add_argument("--seed", type=int, default=1, help="of the failures (transformers)")
    options = parser.parse_args()
    if options.server == "transformers":
        sys.exit(run_transformers(options))
    with tempfile.TemporaryDirectory() as scratch, chat_server.running(*MODELS) as server:
        pool = write_pool(Path(scratch), server.url, options.concurrency)
        campaign = run_campaign(pool, server, Path(scratch) / "campaign", options) if options.requests else None
        speeds = compare(pool, server, Path(scratch), options) if options.rounds else None
    if campaign:
        print_campaign(campaign, options, machine=describe_machine())
    if speeds:
        print_speeds(speeds, options, machine=describe_machine())
    if campaign and (campaign["lost"] or campaign["doubled"] or campaign["finished again"]):
        sys.exit(1)


def run_transformers(options: argparse.Namespace) -> int:
    """The same against models; returns the exit status."""
    import sampling_campaign

    with tempfile.TemporaryDirectory() as scratch:
        return int(not sampling_campaign.run(Path(scratch), MODELS, options, machine=describe_machine()))


def describe_machine() -> str:
    """What the figures belong to."""
    return f"{os.cpu_count()} cores, {cpu_name()}, Python {platform.python_version()}"


def print_campaign(campaign: dict, options: argparse.Namespace, *, machine: str) -> None:
    """The first table."""
    print("| requests | failures injected | kills | answered once | lost | doubled | again: finished | under way |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    row = ("requests", "failures", "kills", "once", "lost", "doubled", "finished again", "again")
    print("| " + " | ".join(str(campaign[name]) for name in row) + " |")
    print(
        f"\n{options.concurrency} requests at a time, {options.delay:g} s an answer, {campaign['seconds']:.0f} s with "
        f"the starts of {options.kills + 1} processes; all on one machine ({machine}). Again, under way: answered "
        f"when a kill came, but not yet received; at most {options.kills} x {options.concurrency}."
    )


def print_speeds(speeds: dict[str, list[float]], options: argparse.Namespace, *, machine: str) -> None:
    """The second table."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ours = medians["sample"]
    print("\n| | requests/s, median | rounds | sample is faster by a factor of |\n|---|---:|---|---:|")
    for name, values in speeds.items():
        rounds = ", ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {medians[name]:.1f} | {rounds} | {ours / medians[name]:.3f} |")
    print(
        f"\n{options.concurrency} requests at a time, {options.delay:g} s an answer, {options.compared} requests a "
        f"round; sampler, server and other jobs on one machine ({machine}; load average {os.getloadavg()[0]:.1f})."
    )


def write_pool(directory: Path, url: str, concurrency: int) -> Path:
    """A pool of four policies at one endpoint."""
    entries = [
        f"- {{name: policy-{model}, endpoint: '{url}/v1', model: {model}, api: completions, max_tokens: 64, "
        f"max_concurrency: {concurrency}, backoff_seconds: 0.02, timeout_seconds: 20}}\n"
        for model in MODELS
    ]
    path = directory / "pool.yaml"
    path.write_text("policies:\n" + "".join(entries), encoding="utf-8")
    return path


def journaled(output: Path) -> list[tuple]:
    """(shard, row, policy, draw) of every line that a journal has."""
    return [(line["shard"], line["row"], line["policy"], line["draw"]) for line in journal_lines(output)]


def run_campaign(pool: Path, server: chat_server.Remote, output: Path, options: argparse.Namespace) -> dict:
    """Sample with failures and kills, then count what the server answered and what the output holds."""
    server.forget()
    server.behave(fail=options.failures, kinds=KINDS, delay=options.delay, retry_after="0.02")
    again, begun, prompts = 0, time.monotonic(), ("--num-prompts", str(options.requests // PER_PROMPT))
    for number in range(options.kills):
        process, wanted = start(pool, output, *prompts), options.requests * (number + 1) // (options.kills + 1)
        while len(set(journaled(output))) < wanted:
            assert process.poll() is None, "the sampler ended before it was killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(2 * options.delay + 0.2)  # what was under way is answered into nowhere
        answered, kept = server.counts()["answered"], len(set(journaled(output)))
        again = sum(answered.values()) - kept
    if start(pool, output, *prompts).wait():
        sys.exit("the last run failed")
    counts = server.counts()
    repeated = sum(count - 1 for count in counts["answered"].values())  # all of it was under way at a kill, or was not
    lines = [orjson.loads(line) for path in sorted(output.glob("*.jsonl")) for line in path.read_bytes().splitlines()]
    places = Counter(journaled(output))
    texts = sum(len(line["trajectories"]) for line in lines)
    return {
        "requests": options.requests,
        "failures": counts["failed"],
        "kills": options.kills,
        "once": sum(count == 1 for count in places.values()),
        "lost": options.requests - min(len(places), texts, len(counts["answered"])),
        "doubled": sum(count - 1 for count in places.values()),
        "again": again,
        "finished again": repeated - again,
        "seconds": time.monotonic() - begun,
    }


# --- throughput ------------------------------------------------------------------------------------------------------


def compare(pool: Path, server: chat_server.Remote, scratch: Path, options: argparse.Namespace) -> dict:
    """Requests per second of `sample` and of the two plain loops, round by round."""
    from megatron_polar.policies import sample

    prompts = scratch / "prompts.jsonl"
    prompts.write_bytes(b"".join(b'{"prompt": "prompt %d"}\n' % n for n in range(options.compared // PER_PROMPT)))
    outputs = iter(range(options.rounds))
    contestants = {
        "sample": lambda: sample.sample_pool(pool, prompts=prompts, output=scratch / f"straight-{next(outputs)}"),
        **plain_loops(server.url, request_bodies(options.compared), slots=options.concurrency),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, run in contestants.items():
            server.forget()
            server.behave(delay=options.delay)
            begun = time.perf_counter()
            run()
            seconds = time.perf_counter() - begun
            speeds[name].append(len(server.counts()["answered"]) / seconds)
    return speeds


def request_bodies(count: int) -> list[dict]:
    """What the plain loop asks."""
    draw = {"max_tokens": 64, "top_k": 50}
    return [{"model": MODELS[n % len(MODELS)], "prompt": f"prompt {n}", "seed": n, **draw} for n in range(count)]


if __name__ == "__main__":
    main()
