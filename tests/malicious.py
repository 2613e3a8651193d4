"""A corpus of malicious files: for every place from which the program opens a file, ways to spoil what lies there.

An attack copies good files, spoils one, and makes whatever vouches for it (manifest, hashes, checksums) fit again, as
somebody would who wants to be believed. `doors` are the commands with which a user would then walk in.
"""

import io
import json
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import torch
from payloads import PACKINGS, Evil, armed_pickles, dud_pickles, numpy_object_array
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_polar.manifest import MANIFEST, encode_manifest, file_entry

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

LOADING = ("score", "resume", "start from it", "evaluate", "export it")


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
