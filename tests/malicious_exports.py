"""The rest of the corpus of malicious.py: Hugging Face directories, as they come from anywhere."""

import json
import struct
from pathlib import Path

import orjson
from malicious import DEEP, Attack, odd_json, odd_versions, replace
from payloads import armed_pickles, numpy_archive, torch_legacy, torch_zip

DOORS = ("score an export", "convert it")


def export_attacks(canary: Path, *, export: Path, count: int) -> list[Attack]:
    """config.json, weights, code and the tokenizer's choice of an export in the internlm2 layout."""
    config = orjson.loads((export / "config.json").read_bytes())
    evil = f"import os\nos.system('touch {canary}')\nclass Evil: pass\n".encode()
    code = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    configs = {
        "remote code": json.dumps(config | code | {"trust_remote_code": True}).encode(),
        "code on the hub": json.dumps(config | {"auto_map": {"AutoModel": "evil/repository--evil.Evil"}}).encode(),
        "a template": json.dumps(config | {"architectures": ["{{ cycler.__init__.__globals__.os }}"]}).encode(),
        **odd_json(canary),
        **{name: orjson.dumps(odd) for name, odd in odd_versions(config, count=count, seed=7).items()},
    }
    choice = orjson.loads((export / "polar_tokens.json").read_bytes())
    choices = {name: orjson.dumps(odd) for name, odd in odd_versions(choice, count=count, seed=8).items()}
    choices["a file outside"] = orjson.dumps(choice | {"file": "../../../etc/passwd"})
    weights = _weights(canary, (export / "model.safetensors").read_bytes())
    index = {"a file outside": {"weight_map": {"model.norm.weight": "../../scene/run/lock"}}}
    index |= {"no map": {"weight_map": 7}, "a device": {"weight_map": {"model.norm.weight": "/dev/zero"}}}
    indices = {name: orjson.dumps(content) for name, content in index.items()} | odd_json(canary)
    attacks = replace("config.json of a model", "export", "config.json", configs, DOORS)
    attacks += replace("weights of a model", "export", "model.safetensors", weights, DOORS)
    attacks += replace("index of weights", "export", "model.safetensors.index.json", indices, DOORS)
    attacks += replace("polar_tokens.json", "export", "polar_tokens.json", choices, DOORS)
    for name in ("modeling_internlm2.py", "configuration_internlm2.py", "tokenization_internlm2.py", "evil.py"):
        attacks += replace("code of a model", "export", name, {f"in {name}": evil}, DOORS)
    pickles = {name: torch_zip(payload) for name, payload in list(armed_pickles(canary).items())[:4]}
    attacks += replace("pickled weights", "export", "pytorch_model.bin", pickles, DOORS)
    return attacks


def _weights(canary: Path, good: bytes) -> dict[str, bytes]:
    """Files that are no safetensors, and some whose header lies."""
    (length,) = struct.unpack("<Q", good[:8])
    header = orjson.loads(good[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    pickle = armed_pickles(canary)["os.system"]

    def lie(**changes) -> bytes:
        spoilt = orjson.dumps(header | {name: header[name] | changes})
        return struct.pack("<Q", len(spoilt)) + spoilt + good[8 + length :]

    return {
        "a pickle": pickle,
        "a torch archive": torch_zip(pickle),
        "an old torch file": torch_legacy(pickle),
        "a numpy archive": numpy_archive(pickle),
        "empty": b"",
        "cut": good[: len(good) // 2],
        "a header without end": struct.pack("<Q", 2**62) + good[8:],
        "a deep header": struct.pack("<Q", len(DEEP)) + DEEP,
        "a pickle as header": struct.pack("<Q", len(pickle)) + pickle,
        "offsets outside": lie(data_offsets=[0, 2**50]),
        "offsets backwards": lie(data_offsets=[64, 0]),
        "a shape below zero": lie(shape=[-1, 4]),
        "a shape beyond memory": lie(shape=[2**40, 2**20]),
        "an unknown type": lie(dtype="os.system"),
    }
