"""`sample` against language models behind a server of transformers: sampling.py --server transformers.

The campaign goes through failing_proxy.py, which lets requests fail and records every text that it gives; throughput is
measured without it. Both know every request beforehand (model, prompt, seed), so lost, doubled and foreign ones are
told by name and not by counts.
"""

import argparse
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import failing_proxy
import orjson
import psutil
from sampler import PER_PROMPT, count_journal_lines, journal_lines, plain_loops, start
from sampling_policies import serving, train_policies

from megatron_polar.policies.backends import derived_seed
from megatron_polar.policies.pool import load_pool
from megatron_polar.policies.prompts import draw_prompts
from megatron_polar.policies.sample import sample_pool
from megatron_polar.policies.schedule import DrawSettings, scheduled

SETTINGS = DrawSettings(1, 2, 4, 500, "pretrain")  # the defaults of `sample`
DRAW = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
AS_GIVEN = "cleaning: {loop_repeats: 0, cut_off: keep, near_duplicates: 0}\n"  # every text as the server gave it
WARM_UP = 100  # requests


class Request(NamedTuple):
    """What one trajectory is asked with."""

    model: str
    prompt: str
    seed: int


Place = tuple[int, int, str, int]
"""Shard, row, policy and draw of a trajectory."""


class Written(NamedTuple):
    """What `sample` has written: lines of trajectories, and those of the quarantine."""

    lines: Sequence[dict]
    quarantine: Sequence[dict]


@dataclass(frozen=True)
class Campaign:
    """What is left of a campaign; `again`: finished when a kill came and sent once more, all others were under way."""

    requests: int
    failures: dict[str, int]
    once: int
    lost: int
    doubled: int
    strangers: int
    foreign_texts: int
    again: int
    under_way: int
    in_output: int
    left_out: int
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether every request ended in exactly one answer, the server's, and the output says what became of it."""
        wrong = (self.lost, self.doubled, self.strangers, self.foreign_texts, self.again)
        return not any(wrong) and self.once == self.in_output + self.left_out == self.requests


def run(scratch: Path, models: tuple[str, ...], options: argparse.Namespace, *, machine: str) -> bool:
    """Train, serve, and print both tables; False where a request was lost, doubled or answered by nobody."""
    begun = time.monotonic()
    policies = train_policies(options.policies or scratch / "policies", models, steps=options.steps)
    print(f"{len(models)} policies, trained or found in {time.monotonic() - begun:.0f} s\n", flush=True)
    is_right = True
    with serving(policies) as (url, process):
        if options.requests:
            campaign = run_campaign(scratch, url, models, options)
            is_right = campaign.is_right
            print_campaign(campaign, options, machine=machine)
        if options.rounds:
            print_rounds(compare(scratch, url, process, models, options), options, machine=machine)
    return is_right


def write_inputs(directory: Path, url: str, models: Sequence[str], options: argparse.Namespace, *, requests: int):
    """A pool of the models at one endpoint and a file of prompts; returns both, and what will be asked."""
    directory.mkdir(parents=True)
    entries = [
        f"- {{name: policy-{model}, endpoint: '{url}/v1', model: {model}, api: completions, "
        f"max_tokens: {options.tokens}, max_concurrency: {options.concurrency}, backoff_seconds: 0.02, "
        f"timeout_seconds: 60}}\n"
        for model in models
    ]
    pool = directory / "pool.yaml"
    pool.write_text("policies:\n" + "".join(entries), encoding="utf-8")
    texts = draw_prompts(load_pool(pool), num_prompts=requests // PER_PROMPT, split="train", seed=1)
    prompts = directory / "prompts.jsonl"
    prompts.write_bytes(b"".join(orjson.dumps({"prompt": text}) + b"\n" for text in texts))
    return pool, prompts, wanted(load_pool(pool).seed, texts, models)


def wanted(pool_seed: int, prompts: Sequence[str], models: Sequence[str]) -> dict[Place, Request]:
    """Every request of a call, in the order of the prompts: known before the first is sent."""
    found: dict[Place, Request] = {}
    for number, prompt in enumerate(prompts):
        shard, row = divmod(number, SETTINGS.prompts_per_shard)
        for policy, count in scheduled(prompt, num_policies=len(models), settings=SETTINGS):
            name = f"policy-{models[policy]}"
            for draw in range(count):
                seed = derived_seed("ask", pool_seed, SETTINGS.seed, name, number, prompt, draw) % 2**31
                found[shard, row, name, draw] = Request(models[policy], prompt, seed)
    return found


# --- nothing lost, nothing doubled -----------------------------------------------------------------------------------


def run_campaign(scratch: Path, url: str, models: tuple[str, ...], options: argparse.Namespace) -> Campaign:
    """Sample with failures and kills, then hold the output, the journals and the proxy's record against each other."""
    output, begun = scratch / "campaign", time.monotonic()
    with failing_proxy.running(url, failures=options.failures, seed=options.seed) as proxy:
        pool, prompts, asked = write_inputs(scratch / "faulty", proxy.url, models, options, requests=options.requests)
        pool.write_text(pool.read_text() + AS_GIVEN)
        finished: dict[str, int] = {}
        for number in range(options.kills):
            process, goal = start(pool, output, "--prompts", str(prompts)), len(asked) * (number + 1)
            while count_journal_lines(output) < goal // (options.kills + 1):
                assert process.poll() is None, "the sampler ended before it was killed"
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            finished |= finished_attempts(asked, journal_lines(output), wait_until_quiet(proxy))
        if start(pool, output, "--prompts", str(prompts)).wait():
            raise SystemExit("error: the last call of the sampler failed")
        record = proxy.record()
    seconds = time.monotonic() - begun
    written = Written(read_lines(sorted(output.glob("*.jsonl"))), read_lines([output / "quarantine.ndjson"]))
    return judge(asked, journal_lines(output), record, written, finished=finished, seconds=seconds)


def read_lines(paths: Sequence[Path]) -> list[dict]:
    """JSON lines of some files."""
    return [orjson.loads(line) for path in paths for line in path.read_bytes().splitlines()]


def wait_until_quiet(proxy: failing_proxy.Remote) -> dict:
    """The proxy's record when the server has answered all that a killed sampler had asked for."""
    while True:
        time.sleep(0.3)
        record = proxy.record()
        if not record["under_way"]:
            return record


def finished_attempts(asked: Mapping[Place, Request], journal: Sequence[dict], record: dict) -> dict[str, int]:
    """Attempts so far of every request that a journal has."""
    keys = [failing_proxy.key_of(*asked[place_of(line)]) for line in journal]
    return {key: record["requests"][key]["attempts"] for key in keys}


def place_of(line: dict) -> Place:
    """Which trajectory a line of a journal is about."""
    return line["shard"], line["row"], line["policy"], line["draw"]


def judge(
    asked: Mapping[Place, Request],
    journal: Sequence[dict],
    record: dict,
    written: Written,
    *,
    finished: Mapping[str, int],
    seconds: float,
) -> Campaign:
    """Count what is not as it should be.

    `record` is the proxy's; `finished` are the attempts of requests that had a line in a journal at a kill, counted
    then.
    """
    seen, places = record["requests"], Counter(map(place_of, journal))
    keys = {place: failing_proxy.key_of(*request) for place, request in asked.items()}
    answers = {place_of(line): line["text"] for line in journal if "text" in line and place_of(line) in keys}
    foreign = sum(text not in seen.get(keys[place], {"given": ()})["given"] for place, text in answers.items())
    output = compare_output(asked, answers, written)
    return Campaign(
        requests=len(asked),
        failures=record["failed"],
        once=sum(places[place] == 1 and place in answers for place in asked),
        lost=sum(place not in answers for place in asked),
        doubled=sum(count - 1 for count in places.values()),
        strangers=len(set(seen) - set(keys.values())) + len(set(places) - set(asked)),
        foreign_texts=foreign + output["foreign"],
        again=sum(seen[key]["attempts"] != attempts for key, attempts in finished.items()),
        under_way=sum(len(one["given"]) - 1 for one in seen.values() if one["given"]),
        in_output=output["kept"],
        left_out=output["equal"] + output["dropped"],
        seconds=seconds,
    )


def compare_output(asked: Mapping[Place, Request], answers: Mapping[Place, str], written: Written) -> Counter:
    """What became of every answer: "kept" in the output, left out as "equal" to one there, "dropped" with its prompt.

    "foreign" are trajectories of the output that are no answer.
    """
    found, open_answers = Counter(), {request.prompt: Counter() for request in asked.values()}
    for place, text in answers.items():
        open_answers[asked[place].prompt][place[2], text] += 1
    for line in written.lines:
        rest = open_answers.get(line["prompt"], Counter())
        for trajectory in line["trajectories"]:
            name = trajectory["policy"], trajectory["text"]
            found["kept" if rest[name] > 0 else "foreign"] += 1
            rest[name] -= 1
        texts = [trajectory["text"].split() for trajectory in line["trajectories"]]
        found["equal"] += sum(max(0, count) for (_, text), count in rest.items() if text.split() in texts)
    for entry in written.quarantine:
        found["dropped"] += sum(open_answers.get(entry.get("text"), Counter()).values())
    return found


# --- throughput ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """One run of one contestant: requests/s, and processor seconds of the client and of the server."""

    rate: float
    client: float
    server: float


def compare(scratch: Path, url: str, process: int, models: tuple[str, ...], options: argparse.Namespace):
    """`sample` and two plain loops ask the same requests in turn; the order turns, too. A small warm-up comes first."""
    speeds: dict[str, list[Speed]] = {}
    for number in range(-1, options.rounds):
        requests = options.compared if number >= 0 else min(WARM_UP, options.compared)
        inputs = write_inputs(scratch / f"round{number}", url, models, options, requests=requests)
        runs = list(contestants(url, inputs, scratch / f"straight{number}", options).items())
        for name, run_it in runs[number % 3 :] + runs[: number % 3]:
            speed = timed(run_it, requests=requests, server=psutil.Process(process))
            if number >= 0:
                speeds.setdefault(name, []).append(speed)
                spent = f"CPU {speed.client:.2f} s, of the server {speed.server:.2f} s"
                print(f"round {number + 1}: {name}: {speed.rate:.1f} requests/s, {spent}", file=sys.stderr, flush=True)
    return speeds


def contestants(url: str, inputs: tuple, output: Path, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """`sample` as a call in this process, and the loops."""
    pool, prompts, asked = inputs
    bodies = [{**request._asdict(), **DRAW, "max_tokens": options.tokens} for request in asked.values()]
    return {
        "sample": lambda: sample_pool(pool, prompts=prompts, output=output),
        **plain_loops(url, bodies, slots=options.concurrency),
    }


def timed(run_it: Callable[[], object], *, requests: int, server: psutil.Process) -> Speed:
    """Run one contestant in this process."""
    served, spent, begun = sum(server.cpu_times()[:2]), _processor_seconds(), time.perf_counter()
    run_it()
    seconds = time.perf_counter() - begun
    return Speed(requests / seconds, _processor_seconds() - spent, sum(server.cpu_times()[:2]) - served)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --- tables ----------------------------------------------------------------------------------------------------------


def print_campaign(campaign: Campaign, options: argparse.Namespace, *, machine: str) -> None:
    """The first table."""
    print(
        "| requests | failures injected | kills | answered once | lost | doubled | not the server's text "
        "| again: finished | under way |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    counts = (campaign.requests, sum(campaign.failures.values()), options.kills, campaign.once, campaign.lost)
    counts += (campaign.doubled, campaign.foreign_texts + campaign.strangers, campaign.again, campaign.under_way)
    print("| " + " | ".join(map(str, counts)) + " |")
    kinds = ", ".join(f"{name} {count}" for name, count in campaign.failures.items())
    print(
        f"\n{options.concurrency} requests at a time of {options.tokens} tokens at most, {campaign.seconds:.0f} s with "
        f"the starts of {options.kills + 1} processes ({machine}). Failures: {kinds}. The output has "
        f"{campaign.in_output} trajectories; {campaign.left_out} answers are left out, as equal to another one of "
        f"their prompt, or with a prompt that has too few left. Under way: at most {options.kills} x "
        f"{options.concurrency}.\n",
        flush=True,
    )


def print_rounds(speeds: dict[str, list[Speed]], options: argparse.Namespace, *, machine: str) -> None:
    """The second table."""
    ours, count = speeds["sample"], options.compared
    print(
        "| | requests/s: median | range | `sample`/this, paired: median | range | client, CPU ms a request | server |"
    )
    print("|---|---:|---|---:|---|---:|---:|")
    for name, runs in speeds.items():
        rates, ratios = [run.rate for run in runs], [our.rate / run.rate for our, run in zip(ours, runs, strict=True)]
        client, server = (statistics.median(getattr(run, side) for run in runs) for side in ("client", "server"))
        print(
            f"| {name} | {statistics.median(rates):.1f} | {min(rates):.1f} to {max(rates):.1f} "
            f"| {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} "
            f"| {1e3 * client / count:.2f} | {1e3 * server / count:.2f} |"
        )
    print(
        f"\n{options.rounds} rounds of {count} requests, the order turning; {options.concurrency} at a time of "
        f"{options.tokens} tokens at most; client and server on one machine ({machine})."
    )
