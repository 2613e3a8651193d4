"""Peak memory and minutes of `convert` for a model with the shape of POLAR-7B, made up, from Hugging Face and back.

Each direction runs as a process of its own, whose peak resident memory is what the kernel says at its end. Weights are
random bf16 in files of 2 GiB. The round trip is compared by the SHA-256 of every tensor. Needs three times the model on
the disk (45 GB for 7B); `--preset tiny` needs seconds.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from machine import cpu_name
from safetensors import safe_open

from megatron_polar import log
from megatron_polar.config.presets import PRESETS
from megatron_polar.convert.families import INTERNLM2, entries, export_config, shape_of
from megatron_polar.convert.hugging_face import plan_shards, write_tensors
from megatron_polar.convert.tensors import separate
from megatron_polar.data.tokenizer_training import train_tokenizer

ROWS = {"polar_7b": 92544, "polar_1_8b": 92544}
FILE_BYTES = 2 * 2**30
WORDS = "the reward model reads two answers and says which of them the policy would have written"


def make_model(directory: Path, *, preset: str) -> tuple[int, int]:
    """Write an InternLM2 reward model of random weights; returns its bytes, and those of its largest tensor."""
    architecture, rows = PRESETS[preset], ROWS.get(preset, 1024)
    wanted = list(entries(INTERNLM2, architecture, with_head=True))
    generator = torch.Generator().manual_seed(1)

    def shapes():
        for entry in wanted:
            whole = torch.empty(shape_of(entry.key, architecture, vocab_size=rows), device="meta")
            parts = separate(whole, key=entry.key, count=len(entry.names), architecture=architecture)
            yield from zip(entry.names, (part.shape for part in parts), strict=True)

    def tensors():
        with log.Progress("making the model", total=sum(len(e.names) for e in wanted), unit="tensors") as bar:
            for name, shape in shapes():
                numbers = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
                yield name, (numbers & ~0x4000).view(torch.bfloat16)  # the highest bit of the exponent off: finite
                bar.advance()

    sizes = [(name, 2 * shape.numel()) for name, shape in shapes()]
    shards = plan_shards(sizes, max_bytes=FILE_BYTES)
    write_tensors(directory, tensors(), shards=shards)
    config = export_config(
        INTERNLM2, architecture, vocab_size=rows, max_positions=32768, dtype="bfloat16", ids={"reward": 5}
    )
    (directory / "config.json").write_text(json.dumps(config))
    train_tokenizer([WORDS] * 50, vocab_size=300, output=directory / "tokenizer.model")
    return sum(shard.size for shard in shards), max(size for _, size in sizes)


# The kernel's account for a child (rusage) begins with what its parent had when it was forked; VmHWM does not.
MEASURED = """
import re, sys
from megatron_polar import cli
status = cli.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(status)
"""


def measure(*arguments: str) -> tuple[float, float]:
    """Run one `megatron-polar` command; returns seconds and peak resident GB."""
    started = time.monotonic()
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.monotonic() - started, int(done.stdout.split()[-1]) * 1024 / 1e9


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a model directory."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                data = file.get_tensor(name).contiguous().view(torch.uint8).numpy()
                found[name] = hashlib.sha256(data).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="polar_7b")
    parser.add_argument("--output", type=Path, help="also write the table to this markdown file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="polar-convert-") as name:
        work = Path(name)
        (work / "source").mkdir()
        size, largest = make_model(work / "source", preset=options.preset)
        run, back = str(work / "run"), str(work / "back")
        there = measure("convert", "from-hf", "--model", str(work / "source"), "--output", run)
        again = measure("convert", "to-hf", "--checkpoint", run, "--output", back, "--layout", "internlm2")
        equal = hashes(work / "source") == hashes(work / "back")
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "megatron-core", "safetensors"))
    lines = [
        f"{options.preset}, {size / 1e9:.1f} GB of bf16 weights; one process each way; `python benchmarks/convert.py`; "
        f"{versions}, Python {platform.python_version()}, {os.cpu_count()} shared cores of {cpu_name()}.",
        "",
        "| direction | minutes | MB/s | peak resident memory | share of the model |",
        "|---|---|---|---|---|",
        *(
            f"| {label} | {seconds / 60:.1f} | {size / 1e6 / seconds:.0f} | {peak:.2f} GB | {peak * 1e9 / size:.0%} |"
            for label, (seconds, peak) in (("from Hugging Face", there), ("to Hugging Face", again))
        ),
        "",
        f"Every tensor bitwise equal after both: {'yes' if equal else 'NO'}. The largest tensor has "
        f"{largest / 1e9:.2f} GB, a file at most {FILE_BYTES / 1e9:.2f} GB; torch and megatron-core take 0.4 GB before "
        f"anything is read.",
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("# Conversion of a large model\n\n" + "\n".join(lines) + "\n")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
