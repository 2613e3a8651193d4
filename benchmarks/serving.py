"""Latency and rewards per second of `megatron-polar serve`, alone or beside another server (vLLM, SGLang, LMDeploy) of
the same model.

One load generator asks all servers, one after the other within every round, so that a noisy machine hits all alike; the
order turns from round to round, and no prompt is asked twice of a server. Without --checkpoint a small Llama reward
model is made up; `--make-model DIR` only writes it, for another server to be started with.

    python benchmarks/serving.py
    python benchmarks/serving.py --make-model /tmp/model     # start the other server with it, then:
    python benchmarks/serving.py --checkpoint /tmp/model --url http://127.0.0.1:8001 --engine vllm \
        --layout sequence-classification
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import httpx
import orjson
import psutil
from arguments import positive

from megatron_polar.convert.families import LAYOUTS
from megatron_polar.data.template import join_text
from megatron_polar.data.tokenizer import REWARD_TOKEN, SEPARATOR_TOKEN
from megatron_polar.data.tokenizer_training import train_tokenizer
from megatron_polar.serve.wire import ENGINES, ItemTexts, endpoint, read_reply, request_body

OUTPUT = Path(__file__).with_suffix(".md")
PROMPT_WORDS = {"short": 30, "long": 700}
"""Words of a prompt; a word is about 1.4 tokens. A reference has 60 words, an output 40."""


@dataclass(frozen=True)
class Server:
    """A server to be measured, and the shape it is asked in."""

    name: str
    url: str
    engine: str
    layout: str
    model: str | None


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    prompt: str
    num_outputs: int
    num_clients: int


@dataclass
class Measured:
    """Latencies in seconds of all requests of a case, over all rounds."""

    latencies: list[float] = field(default_factory=list)
    num_rewards: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def rewards_per_second(self) -> float:
        return self.num_rewards / self.seconds

    def milliseconds(self, share: float) -> float:
        """The latency below which this share of requests lies."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    """Measure, print the table and write it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="run, checkpoint or Hugging Face directory for our server")
    parser.add_argument("--make-model", type=Path, metavar="DIR", help="write the made-up model there, and stop")
    parser.add_argument("--url", help="another server to measure in turns with ours")
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="what that other server is")
    parser.add_argument("--layout", choices=LAYOUTS, default="sequence-classification", help="of its model")
    parser.add_argument("--model-name", help="what the other server calls its model")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 8])
    parser.add_argument("--outputs", type=positive, nargs="+", default=[1, 8], help="outputs per prompt and request")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case and round")
    parser.add_argument(
        "--threads", type=positive, default=1, help="of our server; more than there are idle cores is noise"
    )
    parser.add_argument("--max-batch-tokens", type=positive, default=4096, help="of our server; GPUs want more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="markdown file to write")
    options = parser.parse_args()
    if options.make_model:
        make_model(options.make_model)
        return
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.checkpoint or make_model(Path(scratch) / "model")
        with our_server(checkpoint, threads=options.threads, max_batch_tokens=options.max_batch_tokens) as ours:
            servers = [ours]
            if options.url:
                servers.append(Server(options.engine, options.url, options.engine, options.layout, options.model_name))
            text = asyncio.run(measure(servers, options))
    print(text)
    options.output.write_text(text, encoding="utf-8")


# --- The model and our server ----------------------------------------------------------------------------------------


def words(choose: random.Random, count: int) -> str:
    """Text of made-up words."""
    syllables = ["ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te"]
    return " ".join("".join(choose.choices(syllables, k=choose.randrange(1, 4))) for _ in range(count))


def make_model(directory: Path) -> Path:
    """Write a random Llama reward model of 4 layers and 5 million parameters, with POLAR's control tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from megatron_polar.convert.tokenizer import export_tokenizer
    from megatron_polar.data.tokenizer import load_tokenizer

    choose = random.Random(0)
    directory.mkdir(parents=True, exist_ok=True)
    texts = [words(choose, 100) for _ in range(200)]
    trained = train_tokenizer(texts, vocab_size=512, output=directory / "tokenizer.model")
    tokenizer = load_tokenizer(trained)
    export_tokenizer(tokenizer, directory, max_length=8192)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        num_labels=1,
        problem_type="regression",  # vLLM then applies no sigmoid
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        initializer_range=0.1,
    )
    LlamaForSequenceClassification(config).save_pretrained(directory)
    return directory


@contextlib.contextmanager
def our_server(checkpoint: Path, *, threads: int, max_batch_tokens: int) -> Iterator[Server]:
    """Start `megatron-polar serve` on a free port and end it afterwards."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", "-m", "megatron_polar", "serve", "--checkpoint", str(checkpoint)]
    command += ["--port", "0", "--max-batch-tokens", str(max_batch_tokens)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
        try:
            url = wait_until_ready(process, log)
            yield Server("megatron-polar", url, "megatron-polar", "internlm2", None)
        finally:
            process.terminate()
            process.wait()


def wait_until_ready(process: subprocess.Popen, log) -> str:
    """The server's address, once it can be asked."""
    while process.poll() is None:
        log.seek(0)
        found = re.search(r"(http://\S+:\d+): loading", log.read())
        if found and httpx.get(f"{found[1]}/ready", trust_env=False).status_code == 200:
            return found[1]
        time.sleep(0.1)
    log.seek(0)
    raise SystemExit(f"our server did not start:\n{log.read()}")


# --- Load ------------------------------------------------------------------------------------------------------------


async def measure(servers: Sequence[Server], options: argparse.Namespace) -> str:
    """Ask every server in turn, round after round; returns the table."""
    cases = [Case(p, n, c) for p in PROMPT_WORDS for n in options.outputs for c in options.clients]
    found = {(server.name, case): Measured() for server in servers for case in cases}
    start_load = os.getloadavg()[0]
    difference = await compare(servers)
    for number in range(options.rounds):
        for case in cases:
            turn = number % len(servers)
            for server in [*servers[turn:], *servers[:turn]]:
                await ask_for(options.seconds, server, case, seed=options.seed + number, into=found[server.name, case])
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return report(servers, cases, found, options=options, difference=difference, start_load=start_load)


async def ask_for(seconds: float, server: Server, case: Case, *, seed: int, into: Measured) -> None:
    """Let the case's clients ask, each one request after the other, until the time is over."""
    choose = random.Random(f"{seed} {case}")
    limits = httpx.Limits(max_connections=case.num_clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=300.0, limits=limits, trust_env=False) as http:
        await ask(http, server, draw(choose, case))  # opens the connection, warms caches for shapes
        start, cpu_start = time.perf_counter(), cpu_seconds(server.url)

        async def client() -> None:
            while time.perf_counter() < start + seconds:
                items = draw(choose, case)
                begin = time.perf_counter()
                rewards = await ask(http, server, items)
                into.latencies.append(time.perf_counter() - begin)
                into.num_rewards += len(rewards)

        await asyncio.gather(*(client() for _ in range(case.num_clients)))
        into.seconds += time.perf_counter() - start
        into.cpu_seconds += cpu_seconds(server.url) - cpu_start


def cpu_seconds(url: str) -> float:
    """CPU time so far of the process that listens at the address, and of all its children."""
    port = httpx.URL(url).port
    open_ports = psutil.net_connections("tcp")
    listening = [entry.pid for entry in open_ports if entry.status == psutil.CONN_LISTEN and entry.laddr.port == port]
    if not listening or listening[0] is None:
        raise SystemExit(f"no process of this machine listens at {url}; run the other server here")
    root = psutil.Process(listening[0])
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(entry.user + entry.system for entry in times)


def draw(choose: random.Random, case: Case) -> list[ItemTexts]:
    """One prompt and reference with several outputs."""
    prompt, reference = words(choose, PROMPT_WORDS[case.prompt]), words(choose, 60)
    return [ItemTexts(prompt, reference, words(choose, 40), "sft") for _ in range(case.num_outputs)]


async def ask(http: httpx.AsyncClient, server: Server, items: list[ItemTexts]) -> tuple[float, ...]:
    """Rewards of the items, in one request."""
    contents = items if server.engine == "megatron-polar" else [whole_text(item) for item in items]
    body = orjson.dumps(request_body(contents, engine=server.engine, model=server.model))
    path = endpoint(server.engine, server.layout)
    response = await http.post(path, content=body, headers={"content-type": "application/json"})
    if response.status_code != 200:
        raise SystemExit(f"{server.name} answered {response.status_code}: {response.text[:500]}")
    return read_reply(orjson.loads(response.content), contents=contents, engine=server.engine).rewards


def whole_text(item: ItemTexts) -> str:
    """The POLAR text that engines are given."""
    halves = [join_text(prompt=item.prompt, trajectory=t, wrapper=item.wrapper) for t in (item.reference, item.output)]
    return SEPARATOR_TOKEN.join(halves) + REWARD_TOKEN


async def compare(servers: Sequence[Server]) -> float:
    """The largest difference of rewards between servers: they must serve the same model."""
    choose = random.Random(1)
    samples = [draw(choose, Case(prompt, 4, 1)) for prompt in PROMPT_WORDS]
    rewards = []
    for server in servers:
        async with httpx.AsyncClient(base_url=server.url, timeout=300.0, trust_env=False) as http:
            rewards.append([reward for items in samples for reward in await ask(http, server, items)])
    pairs = [pair for other in rewards[1:] for pair in zip(rewards[0], other, strict=True)]
    return max((abs(a - b) for a, b in pairs), default=0.0)


# --- Table -----------------------------------------------------------------------------------------------------------


def report(servers, cases, found, *, options, difference: float, start_load: float) -> str:
    """The figures as markdown."""
    lines = [
        "# Serving",
        "",
        f"`python benchmarks/serving.py` ({options.rounds} rounds of {options.seconds:g} s a case): latency of a "
        "request for one prompt with n outputs, rewards per second, and the server's CPU time per reward, which other "
        "jobs of the machine change least. Each client asks one request after the other.",
        "",
        "| server | prompt | n | clients | requests | p50 ms | p99 ms | rewards/s | CPU ms/reward |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        for server in servers:
            one = found[server.name, case]
            figures = f"{one.milliseconds(0.5):.0f} | {one.milliseconds(0.99):.0f} | {one.rewards_per_second:.1f}"
            figures += f" | {1000 * one.cpu_seconds / one.num_rewards:.0f}"
            place = f"{case.prompt} | {case.num_outputs} | {case.num_clients}"
            lines.append(f"| {server.name} | {place} | {len(one.latencies)} | {figures} |")
    lines.append("")
    for server, prompt in itertools.product(servers, PROMPT_WORDS):
        gains = [gain(found, server, prompt, clients, options.outputs) for clients in options.clients]
        lines.append(
            f"- {server.name}, {prompt} prompts: with {max(options.outputs)} outputs a request a reward takes "
            f"1/{statistics.mean(gains):.1f} of the CPU time that it takes with {min(options.outputs)}"
        )
    if len(servers) > 1:
        lines.append(f"- largest difference of rewards between the servers: {difference:.1e}")
    sizes = ", ".join(f"{name} prompts {count}" for name, count in PROMPT_WORDS.items())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "starlette", "uvicorn"))
    model = "" if options.checkpoint else "Model: made up, 4 layers, hidden 256, fp32. "
    lines += [
        "",
        f"Words: {sizes}, references 60, outputs 40; a prompt stands twice in a sequence. {model}"
        f"{os.cpu_count()} cores, shared with the load generator and other jobs; our server: {options.threads} thread, "
        f"{options.max_batch_tokens} tokens a batch; load average {start_load:.1f} before, {os.getloadavg()[0]:.1f} "
        f"after; Python {platform.python_version()}, {versions}.",
        "",
    ]
    return "\n".join(lines)


def gain(found, server: Server, prompt: str, clients: int, outputs: Sequence[int]) -> float:
    """How much less CPU time a reward takes when there are many outputs a request, instead of few."""
    few, many = (found[server.name, Case(prompt, n, clients)] for n in (min(outputs), max(outputs)))
    return (few.cpu_seconds / few.num_rewards) / (many.cpu_seconds / many.num_rewards)


if __name__ == "__main__":
    main()
