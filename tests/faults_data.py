"""Faults of data: killed preprocessing, broken input lines, damaged datasets. `make faults` counts high, tests low.

Every function returns a small dict of figures, prints nothing, and draws all its choices from `seed`.
"""

import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import zstandard
from record_lines import (
    LINE_LIMIT,
    MUTATIONS,
    VARIATIONS,
    encode_record,
    is_record,
    make_record,
    make_text,
    split_lines,
    strip_newline,
)

from megatron_polar import faults
from megatron_polar.data.corpus import Corpus
from megatron_polar.data.preprocess import PreprocessReport, preprocess
from megatron_polar.data.tokenizer_training import train_tokenizer
from megatron_polar.errors import UserError

FORK = multiprocessing.get_context("fork")
PACK = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}


def make_tokenizer(workdir: Path, *, seed: int, vocab_size: int = 400) -> Path:
    choose = random.Random(f"tokenizer {seed}")
    texts = [make_text(choose, longest=30) for _ in range(100)]
    return train_tokenizer(texts, vocab_size=vocab_size, output=workdir / f"tokenizer-{vocab_size}.model")


def preprocess_quietly(**call) -> PreprocessReport:
    with contextlib.redirect_stderr(io.StringIO()):
        return preprocess(**call)


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, hidden ones too."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- Killed preprocessing --------------------------------------------------------------------------------------------

UNIT_POINTS = ("unit", "after_unit_shard", "after_unit_done", "merge")
FINAL_POINTS = ("before_dataset_files", "before_dataset_manifest", "after_dataset_manifest")


def preprocess_kills(count: int, workdir: Path, seed: int) -> dict:
    """Kill preprocess at `count` outputs, each up to three times, run it to its end and compare all bytes.

    A kill is SIGKILL, first at a fault point, then there or at a random moment; most runs have one worker, every
    twelfth has two. `redone` counts units that were finished when the last kill came and still were done again.
    """
    choose = random.Random(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    lines = [encode_record(make_record(choose)) for _ in range(200)]
    for number in range(5, 200, 60):
        lines[number] = b"{broken"
    (workdir / "a.jsonl").write_bytes(b"\n".join(lines[:100]))
    (workdir / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[100:]), mtime=0))
    call = {
        "inputs": [str(workdir / "a.jsonl"), str(workdir / "b.jsonl.gz")],
        "tokenizer_path": str(make_tokenizer(workdir, seed=seed)),
        "unit_bytes": sum(map(len, lines)) // 20,
        "max_bad_fraction": 0.1,
    }
    num_units = count_units(lines, unit_bytes=call["unit_bytes"])
    figures: Counter = Counter(kills=0, identical=0, redone=0, runs_of_two_workers=0)
    expected, seconds = None, {}
    for workers in (2, 1):
        undisturbed = {**call, "output": str(workdir / f"expected-{workers}"), "num_workers": workers}
        start = time.monotonic()
        assert attempt(undisturbed) == 0
        seconds[workers] = time.monotonic() - start
        found = hashes(Path(undisturbed["output"]))
        assert expected in (None, found), "the bytes depend on the number of workers"
        expected = found
    for run in range(count):
        output = workdir / f"out-{run}"
        workers = 2 if run % 12 == 5 else 1
        figures["runs_of_two_workers"] += workers == 2
        again = {**call, "output": str(output), "num_workers": workers}
        kills = 0
        for number in range(choose.randrange(1, 4)):
            at_point = number == 0 or choose.random() < 0.3
            left = num_units - len(list((output / ".work").glob("*.done")))
            fault = choose_fault(choose, num_units, left=-(-left // workers), kills=figures) if at_point else ""
            status = attempt(again, fault=fault, seconds=60 if at_point else choose.uniform(0, seconds[workers]))
            worker_killed = status == 2 and workers == 2 and at_point  # its parent said so
            assert status in (0, -signal.SIGKILL) or worker_killed, f"{fault}: preprocess ended with status {status}"
            if status:
                kills += 1
                figures[fault.split(":")[0] or "random_moment"] += 1
        before = len(list((output / ".work").glob("*.done")))
        report = preprocess_quietly(**{**call, "output": str(output)})
        figures["kills"] += kills
        figures["identical"] += hashes(output) == expected
        figures["redone"] += 0 if report.already_complete else max(0, before - report.units_resumed)
        shutil.rmtree(output)
    return {"runs": count, **figures}


def count_units(lines: list[bytes], *, unit_bytes: int) -> int:
    count = size = 0
    for line in lines:
        size += len(line)
        if size >= unit_bytes:
            count, size = count + 1, 0
    return count + (size > 0)


def choose_fault(choose: random.Random, num_units: int, *, left: int, kills: Counter) -> str:
    """The point with the fewest kills so far, at a passing that the next run will come to; `left` units are to do, for
    each worker."""
    point = min([*UNIT_POINTS, *FINAL_POINTS] if left > 0 else ["merge", *FINAL_POINTS], key=lambda name: kills[name])
    last = num_units if point == "merge" else left if point in UNIT_POINTS else 1
    return f"{point}:{choose.randrange(1, last + 1)}=kill"


def attempt(call: dict, *, fault: str = "", seconds: float = 60) -> int:
    """Run preprocess in a process of its own and kill it after `seconds`; returns its status, -9 for killed.

    A fork of this warm process for one worker. Two workers are interpreters anyway, so their parent is one as well.
    """
    if call["num_workers"] == 1:
        process = FORK.Process(target=run_child, args=(call, fault))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode
    code = "import json, sys; from faults_data import run_child; run_child(json.loads(sys.argv[1]), '')"
    here = Path(__file__).resolve()
    environment = {**os.environ, "POLAR_FAULT": fault, "PYTHONPATH": f"{here.parent}:{here.parents[1]}"}
    command = [sys.executable, "-c", code, json.dumps(call)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def run_child(call: dict, fault: str) -> None:
    """Body of a process that `attempt` starts."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if fault:
        faults.plan(fault)
    try:
        preprocess(**call)
    except UserError:
        os._exit(2)
    except BaseException:
        os._exit(1)
    os._exit(0)


# --- Broken lines ----------------------------------------------------------------------------------------------------


def fuzz_lines(count: int, workdir: Path, seed: int) -> dict:
    """Preprocess `count` mutated lines among good ones, and compare the quarantine with what a second reading of the
    files says: a parser built on the standard library that knows docs/data.md and none of our code."""
    choose = random.Random(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    kinds = list(MUTATIONS)
    contents: dict[str, list[bytes]] = {f"{name}{suffix}": [] for name, suffix in zip("abc", PACK, strict=True)}
    for number in range(count):
        lines = contents[choose.choice(list(contents))]
        if choose.random() < 0.3:
            lines.append(VARIATIONS[choose.choice(list(VARIATIONS))](make_record(choose), choose))
        lines.append(MUTATIONS[kinds[number % len(kinds)]](make_record(choose), choose))
    files = {}
    for name, lines in contents.items():
        start = b"\xef\xbb\xbf" if choose.random() < 0.5 else b""
        ends = (choose.choice([b"\n", b"\n", b"\r\n", b"\n\n", b"\n \t\r\n"]) for _ in lines)
        good = encode_record(make_record(choose)) + b"\n"
        files[name] = start + good + b"".join(line + end for line, end in zip(lines, ends, strict=True)) + good[:-1]
        (workdir / name).write_bytes(PACK[name[1:]](files[name]))
    expected, good = set(), 0
    for name, content in files.items():
        for line, offset, raw in split_lines(content):
            if len(raw) > LINE_LIMIT or not is_record(strip_newline(raw)):
                expected.add((name, line, offset, hashlib.sha256(strip_newline(raw)).hexdigest()))
            else:
                good += 1
    with mock.patch("megatron_polar.data.lines.MAX_LINE_BYTES", LINE_LIMIT):
        report = preprocess_quietly(
            inputs=[workdir / name for name in files],
            output=workdir / "out",
            tokenizer_path=make_tokenizer(workdir, seed=seed),
            max_bad_fraction=1.0,
            unit_bytes=50_000,
        )
    entries = [json.loads(line) for line in (workdir / "out" / "quarantine.ndjson").read_text().splitlines()]
    found = {(entry["file"], entry["line"], entry["byte_offset"], entry["sha256"]) for entry in entries}
    assert report.lines == report.documents + report.bad_lines
    assert len(Corpus(workdir / "out")) == report.documents
    assert all(entry["reason"].isprintable() and 10 < len(entry["reason"]) < 500 for entry in entries)
    return {
        "bad_lines": len(expected),
        "quarantined": len(entries),
        "good_lines": good,
        "kept": report.documents,
        "wrong_place": len(found ^ expected),
        "kinds": len(kinds),
    }


# --- Damaged datasets ------------------------------------------------------------------------------------------------

SMALL_BLOCK = 4096
"""Stands in for the 64 MiB of a real run, so that a small dataset has several blocks."""


def dataset_corruptions(count: int, workdir: Path, seed: int) -> dict:
    """Damage a dataset `count` times, one fault at a time, and do what the trainer does at its start on two ranks.

    A fault is found when the error names a file of it; where only content changed, it must give both hashes too.
    """
    choose = random.Random(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    missed, kinds = [], list(DAMAGES)
    with mock.patch("megatron_polar.manifest.BLOCK_BYTES", SMALL_BLOCK):
        datasets = make_datasets(workdir, seed=seed)
        whole = sum(path.stat().st_size for path in datasets[0].rglob("*") if path.is_file())
        assert open_as_trainer(datasets[0]) == whole - (datasets[0] / "manifest.json").stat().st_size
        for number in range(count):
            kind = kinds[number % len(kinds)]
            copy = Path(shutil.copytree(datasets[0], workdir / "copy"))
            names = DAMAGES[kind](copy, choose.choice(datasets[1:]), choose)
            same_size = sizes(copy) == sizes(datasets[0])
            try:
                open_as_trainer(copy)
                missed.append(f"{kind} of {names}")
            except UserError as error:
                said = str(error).replace(str(copy), "")
                hashed = re.search(r"([0-9a-f]{12})\S* instead of ([0-9a-f]{12})", said)
                needs_hashes = kind in ("flipped bit", "zeroed page", "another dataset's") and same_size
                needs_hashes = needs_hashes and names != ["manifest.json"]
                if not any(name in said for name in names) or (needs_hashes and not hashed) or "\n" in said:
                    missed.append(f"{kind} of {names}: {said}")
            shutil.rmtree(copy)
    return {"injected": count, "found": count - len(missed), "missed": missed, "kinds": len(kinds)}


def make_datasets(workdir: Path, *, seed: int) -> list[Path]:
    """Three datasets: one, the same documents in another order (so files of the same sizes), and another one."""
    choose = random.Random(f"datasets {seed}")
    lines = [encode_record(make_record(choose)) for _ in range(60)] + [b"{broken"]
    others = [encode_record(make_record(choose)) for _ in range(60)] + [b"{broken"]
    datasets = []
    for number, content in enumerate((lines, [*lines[-2::-1], lines[-1]], others)):
        source = workdir / f"in-{number}.jsonl"
        source.write_bytes(b"\n".join(content))
        tokenizer = make_tokenizer(workdir, seed=seed, vocab_size=400 if number < 2 else 410)
        datasets.append(workdir / f"dataset-{number}")
        preprocess_quietly(inputs=[source], output=datasets[-1], tokenizer_path=tokenizer, max_bad_fraction=0.1)
    return datasets


def sizes(dataset: Path) -> dict[str, int]:
    return {str(path.relative_to(dataset)): path.lstat().st_size for path in dataset.rglob("*") if path.is_file()}


def open_as_trainer(dataset: Path) -> int:
    """Open a dataset and check its content as two ranks do; returns the bytes read."""
    return sum(Corpus(dataset).verify_tokens(rank, 2) for rank in range(2))


def _some_file(dataset: Path, choose: random.Random) -> str:
    """A file of the dataset; the tokens come twice as often as others."""
    names = [path.relative_to(dataset).as_posix() for path in sorted(dataset.rglob("*")) if path.is_file()]
    return choose.choice([*names, "corpus.bin"])


def _changing_content(change: Callable[[bytearray, random.Random], None]):
    def damage(dataset: Path, other: Path, choose: random.Random) -> list[str]:
        name = _some_file(dataset, choose)
        before = (dataset / name).read_bytes()
        after = bytearray(before)
        while after == before:
            change(after, choose)
        (dataset / name).write_bytes(after)
        return [name]

    return damage


def _flip_bit(content: bytearray, choose: random.Random) -> None:
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)


def _zero_page(content: bytearray, choose: random.Random) -> None:
    start = 512 * choose.randrange(1 + (len(content) - 1) // 512)
    content[start : start + 512] = bytes(len(content[start : start + 512]))


def _truncate(content: bytearray, choose: random.Random) -> None:
    del content[choose.choice([0, len(content) - 1, choose.randrange(len(content))]) :]


def _append(content: bytearray, choose: random.Random) -> None:
    content += choose.choice([b"\0", b"\n", bytes(4), choose.randbytes(100), bytes(SMALL_BLOCK)])


def _remove(dataset: Path, other: Path, choose: random.Random) -> list[str]:
    name = _some_file(dataset, choose)
    (dataset / name).unlink()
    return [name]


def _swap(dataset: Path, other: Path, choose: random.Random) -> list[str]:
    """One file or two of another dataset; the same tokenizer is no damage."""
    names = [
        "corpus.bin",
        "corpus.idx",
        *(path.relative_to(other).as_posix() for path in (other / "tokenizer").iterdir()),
    ]
    differ = [name for name in names if (other / name).read_bytes() != (dataset / name).read_bytes()]
    chosen = choose.choice([["corpus.bin", "corpus.idx"], [choose.choice(differ)]])
    for name in chosen:
        shutil.copyfile(other / name, dataset / name)
    return chosen


def _add(dataset: Path, other: Path, choose: random.Random) -> list[str]:
    name = choose.choice(["notes.txt", "corpus.bin.bak", ".hidden", "tokenizer/added.json", "sub/file", "link", "pipe"])
    (dataset / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (dataset / name).symlink_to("corpus.bin")
    elif name == "pipe":
        os.mkfifo(dataset / name)
    else:
        (dataset / name).write_bytes(b"x")
    return [name]


def _use_stale_manifest(dataset: Path, other: Path, choose: random.Random) -> list[str]:
    shutil.copyfile(other / "manifest.json", dataset / "manifest.json")
    return ["manifest.json", "corpus.bin", "corpus.idx", "tokenizer/tokenizer.model"]


def _link_out(dataset: Path, other: Path, choose: random.Random) -> list[str]:
    """A link to the very same bytes outside of the directory: a file, or the tokenizer's directory."""
    name = choose.choice([_some_file(dataset, choose), "tokenizer"])
    outside = dataset.with_name("outside")
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    (dataset / name).rename(outside / "moved")
    target = outside / "moved"
    (dataset / name).symlink_to(target if choose.random() < 0.5 else os.path.relpath(target, (dataset / name).parent))
    return [name]


DAMAGES: dict[str, Callable[[Path, Path, random.Random], list[str]]] = {
    "flipped bit": _changing_content(_flip_bit),
    "zeroed page": _changing_content(_zero_page),
    "truncation": _changing_content(_truncate),
    "appended bytes": _changing_content(_append),
    "another dataset's": _swap,
    "missing file": _remove,
    "extra file": _add,
    "stale manifest": _use_stale_manifest,
    "link out": _link_out,
}
