"""Records of random sentences: trajectories of few policies, and rankings."""

import gzip
import json
import random

import zstandard

SENTENCE = "the a cat dog runs sleeps under over table window bright dark and or but never always 12 7 ça\n"
WORDS = SENTENCE.split(" ")
UNIT_BYTES = 3000  # small, so that a small input makes many units


def text(generator, *, longest):
    return " ".join(generator.choices(WORDS, k=generator.randrange(1, longest)))


def record(generator, *, number):
    if number % 3 == 2:
        ranked = [f"{index} {text(generator, longest=20)}" for index in range(generator.randrange(2, 5))]
        return {"prompt": text(generator, longest=9), "reference": text(generator, longest=20), "ranked": ranked}
    policies = generator.sample([f"policy {index}" for index in range(9)], k=3)
    names = [policies[0], *policies, *generator.choices(policies, k=generator.randrange(3))]
    trajectories = [
        {"policy": name, "text": f"{index} {text(generator, longest=30)}"} for index, name in enumerate(names)
    ]
    return {
        "prompt": text(generator, longest=9),
        "trajectories": trajectories,
        "wrapper": ["sft", "pretrain"][number % 2],
    }


def lines(count, *, seed):
    generator = random.Random(seed)
    return [json.dumps(record(generator, number=number), ensure_ascii=False) for number in range(count)]


def write_lines(path, content):
    data = "".join(f"{line}\n" for line in content).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path
