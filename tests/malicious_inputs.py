"""The rest of the corpus of malicious.py: tokenizers, datasets, work in progress, lines, and what a report reads."""

import base64
import gzip
import io
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import xxhash
import zstandard
from malicious import Attack, odd_json, odd_versions, replace
from payloads import armed_pickles, numpy_archive, numpy_object_array, torch_zip

from megatron_polar.data.storage import HEADER_FIELDS, INDEX, TOKENS
from megatron_polar.manifest import MANIFEST, block_sizes, encode_manifest, file_entry

# --- Tokenizers ------------------------------------------------------------------------------------------------------


def tokenizer_attacks(canary: Path, *, model: Path, count: int) -> list[Attack]:
    pickles = armed_pickles(canary)
    good, choose = model.read_bytes(), random.Random(3)
    models = {
        "a pickle": pickles["os.system"],
        "a torch archive": torch_zip(pickles["os.system"]),
        "empty": b"",
        "zeros": bytes(1000),
        "cut": good[: len(good) // 2],
        "an ELF file": b"\x7fELF" + bytes(500),
        "normaliser of garbage": _normaliser(good, b"\xff" * 64),
        "normaliser that points outside": _normaliser(good, b"\x00\x04\x00\x00" + b"\xff\xff\xff\x7f" * 256 + b"a\0"),
    }
    for number in range(count):
        spoilt = bytearray(good)
        for _ in range(choose.choice([1, 1, 8])):
            spoilt[choose.randrange(len(spoilt))] ^= 1 << choose.randrange(8)
        models[f"flipped bits {number}"] = bytes(spoilt)
    doors = ("preprocess", "score with it")
    attacks = replace("tokenizer.model", "tokenizer", "tokenizer.model", models, doors)
    attacks += replace("tokenizer.json", "tokenizer", "tokenizer.json", _fast_tokenizers(canary), doors)
    code = {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "evil.Evil",
        "trust_remote_code": True,
    }
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    settings: dict[str, object] = {
        "remote code": code,
        "a chat template": {"chat_template": template, "bos_token": template},
        "a class by path": {"tokenizer_class": "../evil.py", "tokenizer_file": "/etc/passwd"},
        "added tokens in a list": {"added_tokens_decoder": ["x"]},
        "an added token without a number": {"added_tokens_decoder": {"x": {"content": "y"}}},
        "an added token below 0": {"added_tokens_decoder": {"-5": {"content": "<|reward|>"}}},
        "an added token beyond memory": {"added_tokens_decoder": {"99999999999999": {"content": "y"}}},
        "an added token of 5000 digits": {"added_tokens_decoder": {"9" * 5000: {"content": "y"}}},
        "tokens that are no text": {"bos_token": ["x"], "pad_token": {"content": 7}, "add_bos_token": "x"},
        "one token for everything": {"added_tokens_decoder": {"1": {"content": "<|reward|>"}}},
    }
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        contents = odd_json(canary) | {name: orjson.dumps(content) for name, content in settings.items()}
        attacks += replace(file, "tokenizer", file, contents, doors)
    choices = {"a number": {"separator_token": 5}, "a list": {"reward_token": ["x"]}, "others": {"reward_token": "<s>"}}
    choices |= {"one": {"reward_token": "<|reward|>"}, "empty": {"reward_token": ""}}
    contents = odd_json(canary) | {name: orjson.dumps(content) for name, content in choices.items()}
    attacks += replace("polar_tokens.json", "tokenizer", "polar_tokens.json", contents, doors)
    python = f"import os\nos.system('touch {canary}')\n".encode()
    for file in ("evil.py", "__init__.py", "tokenization_evil.py", "sitecustomize.py"):
        attacks += replace("code beside a tokenizer", "tokenizer", file, {file: python}, doors)
    return attacks


def _normaliser(model: bytes, charsmap: bytes) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    proto.normalizer_spec.precompiled_charsmap = charsmap
    proto.normalizer_spec.name = "user_defined"
    return proto.SerializeToString()


def _fast_tokenizers(canary: Path) -> dict[str, bytes]:
    pieces = ["<unk>", "<|reward|>", "[UNUSED_TOKEN_130]", *"abcdefghijklmnopqrstuvwxyz "]
    bpe = {"type": "BPE", "vocab": {piece: id for id, piece in enumerate(pieces)}, "merges": [], "unk_token": "<unk>"}
    good = {"version": "1.0", "model": bpe, "added_tokens": []}
    charsmap = base64.b64encode(b"\xff" * 64).decode()
    added = {"content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    versions: dict[str, object] = {
        "good": good,
        "a model that is a list": {**good, "model": []},
        "no model": {"version": "1.0"},
        "an empty vocabulary": {**good, "model": {**bpe, "vocab": {}}},
        "numbers for pieces": {**good, "model": {**bpe, "vocab": {"a": "x"}}},
        "ids below 0": {**good, "model": {**bpe, "vocab": {**bpe["vocab"], "<|reward|>": -1}}},
        "ids beyond memory": {**good, "model": {**bpe, "vocab": {**bpe["vocab"], "z9": 4_000_000_000}}},
        "merges of nothing": {**good, "model": {**bpe, "merges": [["q", "nowhere"]]}},
        "an unknown class": {**good, "pre_tokenizer": {"type": "os.system", "args": [f"touch {canary}"]}},
        "a normaliser of garbage": {**good, "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}},
        "a costly pattern": {
            **good,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        },
        "a broken pattern": {
            **good,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated", "invert": False},
        },
        "added tokens without ids": {**good, "added_tokens": [{"content": "<x>"}]},
        "added tokens that are numbers": {**good, "added_tokens": 7},
        "an added token beyond memory": {**good, "added_tokens": [{**added, "id": 2**31, "special": True}]},
        "a processor that asks for tokens": {
            **good,
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "q", "type_id": 0}}]},
        },
    }
    return odd_json(canary) | {name: orjson.dumps(version) for name, version in versions.items()}


# --- Datasets and work in progress -----------------------------------------------------------------------------------


def seal_dataset(directory: Path) -> None:
    """Make the manifest fit the files."""
    content = orjson.loads((directory / MANIFEST).read_bytes())
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST)
    content["files"] = {path.relative_to(directory).as_posix(): file_entry(path) for path in files}
    index, tokens = (directory / INDEX).read_bytes(), (directory / TOKENS).read_bytes()
    content["invariants"]["index_xxh3_128"] = xxhash.xxh3_128(index).hexdigest()
    starts = np.cumsum([0, *block_sizes(len(tokens))])
    pairs = pairwise(starts)
    content["blocks"] = {TOKENS: [xxhash.xxh3_64(tokens[start:end]).hexdigest() for start, end in pairs]}
    (directory / MANIFEST).write_bytes(encode_manifest(content))


def dataset_attacks(canary: Path, *, dataset: Path, count: int) -> list[Attack]:
    pickles, doors = armed_pickles(canary), ("train on it", "train on it, index only", "preprocess again")
    raw = {
        "a pickle": pickles["os.system"],
        "a numpy pickle": numpy_object_array(pickles["os.system"]),
        "a numpy archive": numpy_archive(pickles["os.system"]),
        "a torch archive": torch_zip(pickles["os.system"]),
        "empty": b"",
    }
    attacks = replace("dataset/corpus.idx", "dataset", INDEX, raw, doors)
    attacks += replace("dataset/corpus.bin", "dataset", TOKENS, raw, doors)
    manifest = orjson.loads((dataset / MANIFEST).read_bytes())
    odd = {n: encode_manifest(content) for n, content in odd_versions(manifest, count=count, seed=4).items()}
    deep = orjson.dumps(manifest)[:-1] + b', "x": ' + b"[" * 300 + b"]" * 300 + b"}"
    odd["300 levels"] = deep
    attacks += replace("dataset/manifest.json", "dataset manifest", MANIFEST, odd_json(canary) | odd, doors)
    for name, documents in _documents().items():

        def plant(directory: Path, documents=documents) -> None:
            write_documents(directory, documents)

        attacks.append(Attack("dataset/documents", name, "dataset", plant, doors[:2]))
    return attacks


def _documents() -> dict[str, list[list[list[int]]]]:
    """Documents (header and halves) that preprocess never writes."""
    good = [[0, 1, 2, 0, 0, 1], [300, 301, 302], [300, 301, 303], [300, 301, 304]]
    preference = [[1, 0, 1, -1, -1, -1], [300, 301], [300, 302], [300, 303]]

    def with_header(*numbers: int) -> list[list[int]]:
        return [list(numbers), *good[1:]]

    return {
        "negative tokens": [[good[0], [300, -7], *good[2:]]] * 40,
        "tokens beyond the vocabulary": [[good[0], [300, 2**30], *good[2:]]] * 40,
        "an unknown kind": [with_header(7, 1, 2, 0, 0, 1)] * 40,
        "an unknown wrapper": [with_header(0, 9, 2, 0, 0, 1)] * 40,
        "a negative prompt": [with_header(0, 1, -2, 0, 0, 1)] * 40,
        "a prompt beyond the text": [with_header(0, 1, 2**30, 0, 0, 1)] * 40,
        "an unknown policy": [with_header(0, 1, 2, 0, 0, 4000)] * 40,
        "trajectories of nobody": [with_header(0, 1, 2, -1, -1, -1)] * 40,
        "trajectories of one policy": [with_header(0, 1, 2, 0, 0, 0)] * 40,
        "no policy with two trajectories": [with_header(0, 1, 2, 0, 1, 2)] * 40,
        "a header alone": [[good[0]]] * 40,
        "a header cut short": [[[0, 1], *good[1:]]] * 40,
        "an empty header": [[[], *good[1:]]] * 40,
        "empty halves": [[good[0], [], [], []]] * 40,
        "a preference of one": [[[1, 0, 1, -1], [300, 301]]] * 40,
        "a preference of two": [[[1, 0, 1, -1, -1], [300, 301], [300, 302]]] * 40,
        "halves longer than a row": [[good[0], *([300] * 5000 for _ in range(3))]] * 40,
        "a preference": [preference] * 40,
        "one document": [good],
        "no document": [],
    }


def write_documents(directory: Path, documents: list[list[list[int]]]) -> None:
    """Write .bin and .idx of these documents in Megatron's format, and the counts that go with them."""
    sequences = [ids for document in documents for ids in document]
    lengths = np.array([len(ids) for ids in sequences], np.int32)
    pointers = (
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[:-1] * 4 if sequences else np.zeros(0, np.int64)
    )
    bounds = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    header = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\x04"
    header += np.array([len(sequences), len(bounds)], "<u8").tobytes()
    (directory / INDEX).write_bytes(header + lengths.tobytes() + pointers.astype(np.int64).tobytes() + bounds.tobytes())
    (directory / TOKENS).write_bytes(np.array([id for ids in sequences for id in ids], np.int32).tobytes())
    content = orjson.loads((directory / MANIFEST).read_bytes())
    content["invariants"] |= {"sequences": len(sequences), "documents": len(documents)}
    content["counts"]["documents"] = len(documents)
    (directory / MANIFEST).write_bytes(encode_manifest(content))


def work_attacks(canary: Path, *, count: int) -> list[Attack]:
    """Shards and done files that an interrupted preprocess finds; checksum and hash in the done file fit."""
    evil, numbers, doors = armed_pickles(canary)["os.system"], np.arange(4, dtype=np.int32), ("preprocess again",)

    def arrays(*contents) -> bytes:
        buffer = io.BytesIO()
        for content in contents:
            np.save(buffer, content, allow_pickle=True)
        return buffer.getvalue()

    header = np.array([0, 1, 1, 0, 0, 1], np.int32)
    shards = {
        "a pickle": evil,
        "a numpy pickle": numpy_object_array(evil) * 3,
        "a numpy archive": numpy_archive(evil),
        "empty": b"",
        "one array": arrays(numbers),
        "texts": arrays(*[np.array(["x"])] * 3),
        "floats": arrays(*[np.ones(4)] * 3),
        "more lengths than tokens": arrays(numbers, np.array([2**30], np.int32), np.array([1], np.int32)),
        "negative lengths": arrays(numbers, np.array([-4, 8], np.int32), np.array([2], np.int32)),
        "more documents than sequences": arrays(numbers, np.array([4], np.int32), np.array([2**30], np.int32)),
        "negative documents": arrays(numbers, np.array([4], np.int32), np.array([-1], np.int32)),
        "a header cut short": arrays(numbers[:2], np.array([1, 1], np.int32), np.array([2], np.int32)),
        "a policy beyond the names": arrays(
            np.concatenate([header[:HEADER_FIELDS], [2**30]]).astype(np.int32),
            np.array([HEADER_FIELDS + 1], np.int32),
            np.array([1], np.int32),
        ),
        "numbers in two dimensions": arrays(*[numbers.reshape(2, 2)] * 3),
    }

    def plant_shard(content: bytes) -> Callable[[Path], None]:
        def plant(directory: Path) -> None:
            shard = next((directory / ".work").glob("*.shard"))
            shard.write_bytes(content)
            done = orjson.loads(shard.with_suffix(".done").read_bytes())
            done["shard"] = xxhash.xxh3_128(content).hexdigest()
            shard.with_suffix(".done").write_bytes(encode_manifest(done))

        return plant

    attacks = [Attack(".work/*.shard", n, "work", plant_shard(content), doors) for n, content in shards.items()]

    def plant_done(number: int) -> Callable[[Path], None]:
        def plant(directory: Path) -> None:
            file = next((directory / ".work").glob("*.done"))
            versions = odd_versions(orjson.loads(file.read_bytes()), count=count, seed=5)
            file.write_bytes(encode_manifest([*versions.values()][number]))

        return plant

    attacks += [Attack(".work/*.done", f"version {n}", "work", plant_done(n), doors) for n in range(count)]
    for name, content in odd_json(canary).items():

        def plant_json(directory: Path, content=content) -> None:
            next((directory / ".work").glob("*.done")).write_bytes(content)

        attacks.append(Attack(".work/*.done", name, "work", plant_json, doors))
    return attacks


# --- Lines, and what a run and a report read --------------------------------------------------------------------------


def line_attacks(canary: Path) -> list[Attack]:
    record = {"prompt": "ba", "reference": "ke", "chosen": "li", "rejected": "mo"}
    score = {"prompt": "ba", "reference": "ke", "output": "li"}
    deep = {"x": orjson.loads(b"[" * 500 + b"]" * 500)}
    lines: dict[str, bytes] = {
        **odd_json(canary),
        "500 levels": json.dumps(record | {"meta": deep}).encode(),
        "500 levels in a line to score": json.dumps(score | deep).encode(),
        "300 levels in a line to score": json.dumps(score | {"x": orjson.loads(b"[" * 300 + b"]" * 300)}).encode(),
        "control tokens": orjson.dumps(record | {"chosen": "<|reward|>[UNUSED_TOKEN_130]<s></s>" * 50}),
        "an unknown wrapper": orjson.dumps(score | {"wrapper": ["sft"]}),
        "a path for a prompt": orjson.dumps(score | {"prompt": {"path": "/etc/passwd"}}),
        "messages of no role": orjson.dumps(score | {"prompt": [{"role": 7, "content": ["x"]}]}),
        "an escape sequence": b'{"prompt": "\x1b]0;x\x07"}',
        "huge numbers": b'{"prompt": 1e99999, "reference": 1, "output": 2}',
        "a line without an end": b'{"prompt": "' + b"x" * (1 << 20),
        "10,000 outputs": orjson.dumps({"prompt": "a", "reference": "b", "outputs": ["c"] * 200}),
    }
    doors = ("preprocess lines", "score lines", "evaluate lines", "train-tokenizer", "sample lines")
    attacks = replace("JSONL", "lines", "lines.jsonl", lines, doors)
    bomb = b"x" * (70 << 20)
    packed = {
        "gz: 70 MiB in one line": ("lines.jsonl.gz", gzip.compress(bomb, 1)),
        "gz: a pickle": ("lines.jsonl.gz", lines["a pickle"]),
        "gz: cut": ("lines.jsonl.gz", gzip.compress(lines["500 levels"])[:-9]),
        "zst: 70 MiB in one line": ("lines.jsonl.zst", zstandard.compress(bomb)),
        "zst: a pickle": ("lines.jsonl.zst", lines["a pickle"]),
    }
    for name, (file, content) in packed.items():
        attacks += replace("JSONL", "lines", file, {name: content}, doors[:3])
    return attacks


SCRIPT = "<script>alert(1)</script>"


def run_attacks(canary: Path, *, run: Path, count: int) -> list[Attack]:
    """metrics.jsonl and events.jsonl as a resume and a report find them, and what else a report reads."""
    attacks = []
    for file in ("metrics.jsonl", "events.jsonl"):
        rows = (run / file).read_bytes().splitlines()
        first = orjson.loads(rows[0])
        odd = [orjson.dumps(v) for v in odd_versions(first, count=count, seed=6).values()]
        names = ("iteration", "iteration-time") if file == "metrics.jsonl" else ("time", "event", "step")
        pairs = [(name, value) for name in names for value in ("x", None, [], {}, -1, 1e300, True)]
        odd += [orjson.dumps(first | {name: value}) for name, value in pairs]
        contents = {
            f"row {n}: {line[:90].decode(errors='replace')}": line + b"\n" + rows[-1] + b"\n"
            for n, line in enumerate(odd)
        }
        contents |= {name: content + b"\n" + rows[-1] + b"\n" for name, content in odd_json(canary).items()}
        markup = orjson.dumps(first | {SCRIPT: 0.5, f"rm/{SCRIPT}": 1.5, "iteration": 1, "reason": SCRIPT})
        contents["markup"] = markup + b"\n" + rows[-1] + b"\n"
        attacks += replace(
            file, "run", file, contents, ("resume", "report") if file == "metrics.jsonl" else ("resume",)
        )
    words = orjson.dumps({"suite": SCRIPT, SCRIPT: SCRIPT, "accuracy": [1], "x": "$\\frac{"})
    attacks += replace(
        "summary.json of a run", "run", "summary.json", odd_json(canary) | {"markup": words}, ("report",)
    )
    page = {"markup": f"run: {SCRIPT}\n".encode(), "not UTF-8": b"\xff\xfe\x00"}
    attacks += replace("config.yaml of a run", "run", "config.yaml", page, ("report",))
    for file in ("summary.json", "rewards.jsonl"):
        content = orjson.loads(
            (run / "evaluation" / file).read_bytes().splitlines()[0]
            if file == "rewards.jsonl"
            else (run / "evaluation" / file).read_bytes()
        )
        odd_files = {n: orjson.dumps(v) for n, v in odd_versions(content, count=count, seed=7).items()}
        odd_files["markup"] = orjson.dumps(content | {"suite": SCRIPT, "swap_check": SCRIPT, "category": SCRIPT})
        attacks += replace(
            f"{file} of an evaluation", "run", f"evaluation/{file}", odd_json(canary) | odd_files, ("report with it",)
        )
    return attacks


def sample_attacks(canary: Path, *, output: Path, count: int) -> list[Attack]:
    """What an interrupted `sample` finds in its output."""
    settings = orjson.loads((output / "settings.json").read_bytes())
    versions = {n: orjson.dumps(v) for n, v in odd_versions(settings, count=count, seed=8).items()}
    attacks = replace(
        "settings.json of sample", "sampled", "settings.json", odd_json(canary) | versions, ("sample again",)
    )
    shard = "trajectories-00000.jsonl"
    count_lines = (output / shard).read_bytes().count(b"\n")
    lines = {n: (c.replace(b"\n", b"") + b"\n") * count_lines for n, c in odd_json(canary).items()}
    lines["no trajectories"] = b'{"prompt": "x"}\n' * count_lines
    lines["trajectories of numbers"] = b'{"trajectories": [7]}\n' * count_lines
    lines["texts of numbers"] = b'{"trajectories": [{"text": 7}]}\n' * count_lines
    return attacks + replace("shards of sample", "sampled", shard, lines, ("sample again",))


def suite_attacks(canary: Path) -> list[Attack]:
    """Published test sets, which come as JSON."""
    return [
        *replace("gsm8k", "lines", "gsm8k.jsonl", odd_json(canary), ("evaluate gsm8k",)),
        *replace("rmb", "rmb", "RMB/Pairwise_set/Harmlessness/x.json", odd_json(canary), ("evaluate rmb",)),
    ]
