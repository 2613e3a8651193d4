"""A corpus of malicious files: for every place from which the program opens a file, ways to spoil what lies there.

An attack copies good files, spoils one, and makes whatever vouches for it (manifest, hashes, checksums) fit again, as
somebody would who wants to be believed. `doors` are the commands with which a user would then walk in.
"""

import base64
import gzip
import io
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import torch
import xxhash
import zstandard
from payloads import PACKINGS, Evil, armed_pickles, dud_pickles, numpy_archive, numpy_object_array, torch_zip
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_polar.data.storage import HEADER_FIELDS, INDEX, TOKENS
from megatron_polar.manifest import MANIFEST, block_sizes, encode_manifest, file_entry

DEEP = b"[" * 3000 + b"]" * 3000


@dataclass(frozen=True)
class Attack:
    """`plant(directory)` spoils a fresh copy of the good files of a `kind` (faults_safety.py knows the kinds)."""

    place: str
    name: str
    kind: str
    plant: Callable[[Path], None]
    doors: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def replace(
    place: str, kind: str, file: str, contents: dict[str, bytes], doors: tuple[str, ...], **more
) -> list[Attack]:
    """An attack for each content that takes the place of a file, which need not be there yet."""

    def plant(content: bytes) -> Callable[[Path], None]:
        def write(directory: Path) -> None:
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (directory / file).write_bytes(content)

        return write

    return [Attack(place, name, kind, plant(content), doors, **more) for name, content in contents.items()]


# --- JSON that is not what it should be ------------------------------------------------------------------------------

_ODD = (None, True, -1, 2**53, 1e300, "x", "../../x", [], [[]], {}, {"a": None}, "\u202e")


def odd_versions(content: dict, *, count: int, seed: int) -> dict[str, dict]:
    """The content with one value exchanged for another kind of value, or left out."""
    choose = random.Random(seed)
    paths = [*_paths(content)]
    versions = {}
    for number in range(count):
        path, odd = choose.choice(paths), choose.choice([*_ODD, "(removed)"])
        copy = orjson.loads(orjson.dumps(content))
        inner = copy
        for step in path[:-1]:
            inner = inner[step]
        if odd == "(removed)":
            inner.pop(path[-1])
        else:
            inner[path[-1]] = odd
        versions[f"{number}: {'.'.join(map(str, path))} is {odd!r}"] = copy
    return versions


def _paths(content, start=()) -> Iterator[tuple]:
    items = content.items() if isinstance(content, dict) else enumerate(content[:2])
    for key, inner in items:
        yield (*start, key)
        if isinstance(inner, dict | list):
            yield from _paths(inner, (*start, key))


def odd_json(canary: Path) -> dict[str, bytes]:
    """Whole files that are no object of JSON, or hardly one."""
    pickles = armed_pickles(canary)
    return {
        "a pickle": pickles["os.system"],
        "a numpy pickle": numpy_object_array(pickles["os.system"]),
        "empty": b"",
        "a list": b"[]",
        "a number": b"7",
        "deep": DEEP,
        "deep inside": b'{"format": ' + DEEP + b"}",
        "not UTF-8": b'{"a": "\xff"}',
        "a lone surrogate": b'{"a": "\\ud800"}',
        "NaN": b'{"a": NaN}',
        "a number of 10000 digits": b'{"a": ' + b"9" * 10000 + b"}",
        "NUL": b"\0" * 64,
    }


# --- Checkpoints -----------------------------------------------------------------------------------------------------

LOADING = ("score", "resume", "start from it", "evaluate")


def seal_checkpoint(directory: Path) -> None:
    """Make the manifest fit the files."""
    content = orjson.loads((directory / MANIFEST).read_bytes())
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST)
    content["files"] = {path.relative_to(directory).as_posix(): file_entry(path) for path in files}
    (directory / MANIFEST).write_bytes(encode_manifest(content))


def metadata_attacks(canary: Path) -> list[Attack]:
    pickles = armed_pickles(canary) | dud_pickles(canary)
    place = "checkpoint/.metadata"
    attacks = replace(place, "checkpoint", ".metadata", pickles, LOADING)
    good_first = {"a second pickle behind the first": lambda good: good + pickles["os.system"]}
    for name, change in good_first.items():
        attacks.append(Attack(place, name, "checkpoint", _change_bytes(".metadata", change), LOADING))
    for name, change in _metadata_changes(canary).items():
        attacks.append(Attack(place, name, "checkpoint", _change_metadata(change), LOADING))
    return attacks


def _change_bytes(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def plant(directory: Path) -> None:
        (directory / file).write_bytes(change((directory / file).read_bytes()))

    return plant


def _change_metadata(change: Callable[[Metadata], object]) -> Callable[[Path], None]:
    def plant(directory: Path) -> None:
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        changed = change(metadata)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata if changed is None else changed))

    return plant


def _metadata_changes(canary: Path) -> dict[str, Callable[[Metadata], object]]:
    """Honest descriptions of a checkpoint with something nested in them."""
    evil = Evil(canary)

    def with_attribute(name: str, content) -> Callable[[Metadata], object]:
        return lambda metadata: setattr(metadata, name, content)

    def every_place(**changes) -> Callable[[Metadata], object]:
        def change(metadata: Metadata) -> None:
            for place in metadata.storage_data.values():
                for key, content in changes.items():
                    object.__setattr__(place, key, content)

        return change

    def every_tensor(key: str, content) -> Callable[[Metadata], object]:
        def change(metadata: Metadata) -> None:
            for entry in metadata.state_dict_metadata.values():
                if not isinstance(entry, BytesStorageMetadata):
                    setattr(entry, key, content)

        return change

    paths = ("..", ".", "", "/etc/passwd", "../../config.yaml", "tokenizer/tokenizer.model", "a\0b", "/dev/zero", b"..")
    paths += (None, 7, "state.json", "latest", "missing.distcp")
    return {
        "evil planner data": with_attribute("planner_data", evil),
        "evil plans": with_attribute("all_local_plans", [evil]),
        "an evil module": lambda m: m.storage_meta.modules.append(evil),
        "an evil place": lambda m: m.storage_data.update({MetadataIndex("x"): evil}),
        "an evil tensor": lambda m: m.state_dict_metadata.update(x=evil),
        "an evil path": every_place(relative_path=evil),
        "an evil dtype": every_tensor("properties", evil),
        **{f"files at {path!r}": every_place(relative_path=path) for path in paths},
        "places before the start": every_place(offset=-4096),
        "places behind the end": every_place(offset=2**62),
        "endless places": every_place(length=2**62),
        "an unknown transform": every_place(transform_descriptors=["exec"]),
        "a known transform": every_place(transform_descriptors=["stream.zstd"]),
        "transforms that are no list": every_place(transform_descriptors=7),
        "a list": lambda m: [m],
        "a dictionary": lambda m: dict(m.__dict__),
        "no tensors": with_attribute("state_dict_metadata", {}),
        "tensors in a list": with_attribute("state_dict_metadata", []),
        "tensors that are numbers": with_attribute("state_dict_metadata", {"x": 7}),
        "names that are numbers": lambda m: setattr(
            m, "state_dict_metadata", dict(enumerate(m.state_dict_metadata.values()))
        ),
        "no places": with_attribute("storage_data", {}),
        "places that are numbers": lambda m: setattr(m, "storage_data", dict.fromkeys(m.storage_data, 7)),
        "places in a list": with_attribute("storage_data", []),
        "no chunks": every_tensor("chunks", []),
        "chunks that are numbers": every_tensor("chunks", [7]),
        "a huge tensor": every_tensor("size", torch.Size([2**40, 2**20])),
        "a size that is no size": every_tensor("size", "x"),
        "nothing built": lambda m: Metadata.__new__(Metadata),
    }


def torch_file_attacks(canary: Path) -> list[Attack]:
    """common.pt, and items inside of the shards: what torch.load reads."""
    armed = armed_pickles(canary)
    chosen = [armed[key] for key in ("os.system", "builtins.exec", "memo", "builtins of _get_layout", "io.open")]
    packed = {
        f"{packing}, payload {number}": pack(payload)
        for packing, pack in PACKINGS.items()
        for number, payload in enumerate(chosen)
    }
    unlike = {
        "a list": [1],
        "a tensor": torch.zeros(3),
        "empty": {},
        "text for the optimizer": {"optimizer": "x"},
        "an optimizer of numbers": {"optimizer": {"optimizer": {"param_groups": 7}, "param_state_sharding_type": 1}},
        "weights that are no weights": {"model": {"decoder": 7}},
        "numbers for names": {1: {2: 3}},
        "deep": _deep(100),
    }
    attacks = replace("checkpoint/common.pt", "checkpoint", "common.pt", packed | _saved(unlike), ("resume", *LOADING))
    # Users of other Megatron checkpoints have this set.
    careless = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    attacks += replace(
        "checkpoint/common.pt, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1",
        "checkpoint",
        "common.pt",
        {key: packed[f"{key}, payload 0"] for key in PACKINGS},
        LOADING,
        environment=careless,
    )
    for name, content in packed.items():
        place = "checkpoint/shards, tensors"
        attacks.append(Attack(place, name, "checkpoint", _change_item("model", content), LOADING))
        place = "checkpoint/shards, objects"
        attacks.append(Attack(place, name, "checkpoint", _change_item("rng_state", content), ("resume",)))
    for environment, name in ((careless, "zip, payload 0"), (careless, "legacy, payload 0")):
        for key, items in (("model", "tensors"), ("rng_state", "objects")):
            plant = _change_item(key, packed[name])
            place = f"checkpoint/shards, {items}, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"
            attacks.append(Attack(place, name, "checkpoint", plant, ("resume",), environment))
    state = {"python": (3, (1,) * 625, None), "numpy": {}, "torch": torch.zeros(5056, dtype=torch.uint8)}
    odd = {
        "a number": 7,
        "empty": {},
        "texts": dict.fromkeys(("python", "numpy", "torch", "tensor_parallel"), "x"),
        "a numpy generator that does not exist": {**state, "numpy": {"bit_generator": "os.system", "state": {}}},
        "a torch state of other kind": {**state, "torch": torch.zeros(3)},
        "deep": _deep(100),
    }
    for name, content in _saved(odd).items():
        plant = _change_item("rng_state", content)
        attacks.append(Attack("checkpoint/shards, objects", name, "checkpoint", plant, ("resume",)))
    other = {
        "a list": [1],
        "a scalar": torch.tensor(1.0),
        "another shape": torch.zeros(7),
        "complex": torch.zeros(3) * 1j,
    }
    for name, content in _saved(other).items():
        plant = _change_item("model", content)
        attacks.append(Attack("checkpoint/shards, tensors", name, "checkpoint", plant, LOADING))
    return attacks


def _deep(levels: int) -> dict:
    content: dict = {}
    for _ in range(levels):
        content = {"x": content}
    return content


def _saved(contents: dict[str, object]) -> dict[str, bytes]:
    found = {}
    for name, content in contents.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        found[name] = buffer.getvalue()
    return found


def _change_item(key: str, content: bytes) -> Callable[[Path], None]:
    """Let the items of a shard file whose name starts like this (weights: all but optimizer and rng) be `content`."""

    def plant(directory: Path) -> None:
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        shard = next(directory.glob("*.distcp"))
        offset = shard.stat().st_size
        with shard.open("ab") as file:
            file.write(content)
        for index, place in metadata.storage_data.items():
            is_weight = not index.fqn.startswith(("optimizer", "rng_state"))
            if index.fqn.startswith(key) or (key == "model" and is_weight):
                place.offset, place.length = offset, len(content)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return plant


def checkpoint_text_attacks(canary: Path, *, checkpoint: Path, count: int) -> list[Attack]:
    """metadata.json, state.json, manifest.json and config.yaml of a checkpoint."""
    backends = {
        f"backend {backend}": orjson.dumps({"sharded_backend": backend, "common_backend": common})
        for backend, common in (("zarr", "torch"), ("torch_dist", "zarr"), ("os", "system"), (["x"], "torch"))
    }
    more = {
        "another version": orjson.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 9}),
        "unknown keys": orjson.dumps({"sharded_backend": "torch_dist", "__class__": "os"}),
    }
    attacks = replace(
        "checkpoint/metadata.json", "checkpoint", "metadata.json", odd_json(canary) | backends | more, LOADING
    )
    state = orjson.loads((checkpoint / "state.json").read_bytes())
    states = {name: orjson.dumps(content) for name, content in odd_versions(state, count=count, seed=1).items()}
    attacks += replace(
        "checkpoint/state.json", "checkpoint", "state.json", odd_json(canary) | states, ("resume", "score")
    )
    manifest = orjson.loads((checkpoint / MANIFEST).read_bytes())
    manifests = {n: encode_manifest(content) for n, content in odd_versions(manifest, count=count, seed=2).items()}
    attacks += replace(
        "checkpoint/manifest.json", "manifest", MANIFEST, odd_json(canary) | manifests, ("score", "resume", "evaluate")
    )
    good = (checkpoint / "config.yaml").read_text()
    configs = odd_yaml(canary, good) | {
        f"{old} becomes {new}": good.replace(old, new).encode()
        for old, new in (
            ("hidden_size: 32", "hidden_size: 1000000000000"),
            ("num_layers: 2", "num_layers: 1000000000"),
            ("num_layers: 2", "num_layers: -2"),
            ("hidden_size: 32", "hidden_size: 33"),
            ("num_attention_heads: 4", "num_attention_heads: 0"),
            ("kv_channels: null", "kv_channels: 7"),
            ("rotary_base: null", "rotary_base: .nan"),
            ("layernorm_epsilon: null", "layernorm_epsilon: -1.0"),
            ("vocab_size: null", "vocab_size: 1000000000000"),
            ("make_vocab_size_divisible_by: 128", "make_vocab_size_divisible_by: 1000000000000"),
            ("max_sequence_length: 256", "max_sequence_length: 1000000000000000"),
            ("max_tokens_per_micro_batch: 300", "max_tokens_per_micro_batch: 1"),
            ("attention: auto", "attention: os.system"),
            ("precision: fp32", "precision: bf16"),
        )
    }
    for name, content in configs.items():
        if content == good.encode():
            raise AssertionError(f"{name}: nothing to change in\n{good}")
    return attacks + replace("checkpoint/config.yaml", "checkpoint", "config.yaml", configs, ("score", "evaluate"))


# --- YAML ------------------------------------------------------------------------------------------------------------


def odd_yaml(canary: Path, good: str) -> dict[str, bytes]:
    """Configurations with tags, interpolations and other things that YAML can do; `good` is one without."""
    command, line = f"touch {canary}", good.splitlines()[0]
    tags = {
        "apply": f'!!python/object/apply:os.system ["{command}"]',
        "new": f"!!python/object/new:os.system [{command}]",
        "new with state": "!!python/object/new:type {args: [x, [], {}], state: {__init__: !!python/name:os.system}}",
        "object": "!!python/object:subprocess.Popen {args: x}",
        "name": "!!python/name:os.system",
        "module": "!!python/module:os",
        "subprocess": f"!!python/object/apply:subprocess.check_output [[touch, {canary}]]",
        "path": "!!python/object/apply:pathlib.PosixPath [/etc/passwd]",
        "tuple": "!!python/tuple [1, 2]",
        "include": "!include /etc/passwd",
        "binary": "!!binary gANjb3MKc3lzdGVtCg==",
        "an impossible date": "2024-99-99",
        "a number of 5000 digits": "9" * 5000,
    }
    interpolations = {
        "oc.env": "${oc.env:PLANTED_SECRET}",
        "oc.env with another": "${oc.env:MISSING,${oc.env:PLANTED_SECRET}}",
        "oc.decode": "${oc.decode:\"__import__('os').system('x')\"}",
        "oc.create": "${oc.create:{a: 1}}",
        "oc.select": "${oc.select:run.seed}",
        "an unknown resolver": "${eval:1}",
        "itself": "${run.directory}",
        "nested": "${oc.env:${oc.env:PLANTED_SECRET}}",
        "attributes": "${__class__.__init__.__globals__}",
    }
    rest = good.removeprefix(line + "\n")
    found = {
        f"tag {name}": f"{line}\n  device: {text}\n{rest.replace('device: auto', 'seed: 1')}"
        for name, text in tags.items()
    }
    found |= {f"tag {name} at the top": f"{text}\n" for name, text in list(tags.items())[:7]}
    found |= {f"tag {name} as a key": f"{good}\n? {text}\n: 1\n" for name, text in list(tags.items())[:6]}
    for name, text in interpolations.items():
        changed = "\n".join(
            f"  directory: {json.dumps(text)}" if row.startswith("  directory:") else row for row in good.splitlines()
        )
        found[f"interpolation {name}"] = changed + "\n"
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 8))
    found |= {
        "_target_": good + f"_target_: os.system\n_args_: [{command}]\n",
        "a list that holds itself": good + "a: &a [*a]\n",
        "a mapping that holds itself": "&a\n" + good + "b: *a\n",
        "millions of references": bomb + good,
        "deep": "a: " + "[" * 3000 + "]" * 3000,
        "two documents": good + "---\n" + good,
        "a merge of itself": good.replace(line, f"{line}\n  <<: {{seed: 3}}"),
        "NUL": good + "\0",
        "a directive": "%TAG ! tag:yaml.org,2002:python/\n---\n" + f"run: !object/apply:os.system [{command}]\n",
        "text": "os.system",
        "a list": "[1, 2]",
        "nothing": "",
        "a list as key": good + "? [1]\n: 2\n",
    }
    contents = {name: text.encode() for name, text in found.items()}
    return contents | {"UTF-16": good.encode("utf-16"), "a pickle": armed_pickles(canary)["os.system"]}


def config_attacks(canary: Path, good: str) -> list[Attack]:
    """A run's YAML, given to `train`."""
    attacks = replace("config.yaml of a user", "config", "run.yaml", odd_yaml(canary, good), ("dry run",))
    pool = "seed: 1\npolicies:\n  - {name: a, order: 1}\n  - {name: b, order: 2}\n"
    pools = {name: text.replace(b"  device:", b"seed:") for name, text in odd_yaml(canary, pool).items()}
    pools |= {
        "a device as corpus": (pool + "corpus: /dev/zero\n").encode(),
        "another device as corpus": (pool + "corpus: [/dev/stdin]\n").encode(),
        "a program as backend": pool.replace("order: 1", "backend: os.system").encode(),
        "a corpus that is a pickle": (pool + "corpus: evil.pkl\n").encode(),
    }
    return attacks + replace("pool.yaml", "pool", "pool.yaml", pools, ("sample",))


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


def copy_of(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, symlinks=True))
