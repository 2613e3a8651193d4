"""Input lines for tests: good ones, ways to break them, and a reading of docs/data.md that knows none of our code."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator

SENTENCE = "the a cat dog runs sleeps under over table window bright dark and or but never always 12 7 ça 猫"
WORDS = SENTENCE.split(" ")
LINE_LIMIT = 4000
"""Stands in for the 64 MiB of a real run."""


def make_text(choose: random.Random, *, longest: int = 20) -> str:
    return " ".join(choose.choices(WORDS, k=choose.randrange(1, longest)))


def make_record(choose: random.Random) -> dict:
    """A good line: trajectories of three policies, a preference or a ranking; no two texts are equal."""
    record: dict = {"prompt": make_text(choose)}
    texts = [f"{index} {make_text(choose)}" for index in range(5)]
    form = choose.randrange(3)
    if form == 0:
        names = choose.sample([f"policy {index}" for index in range(9)], k=3)
        pairs = zip([names[0], *names, choose.choice(names)], texts, strict=True)
        record["trajectories"] = [{"policy": policy, "text": text} for policy, text in pairs]
    elif form == 1:
        record |= {"reference": texts[0], "chosen": texts[1], "rejected": texts[2]}
    else:
        record |= {"reference": texts[0], "ranked": texts[1 : choose.randrange(3, 6)]}
    return record


def encode_record(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


# --- What a line ought to be ---------------------------------------------------------------------------------------


def split_lines(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number, byte offset, raw line) of the lines of a file that are not blank."""
    offset = 0
    for number, raw in enumerate(re.findall(rb"[^\n]*\n|[^\n]+\Z", content)):
        start = 3 if number == 0 and len(raw) <= LINE_LIMIT and raw.startswith(b"\xef\xbb\xbf") else 0
        if raw[start:].strip():
            yield number + 1, offset + start, raw[start:]
        offset += len(raw)


def strip_newline(raw: bytes) -> bytes:
    return re.sub(rb"\r?\n\Z", b"", raw)


def is_record(line: bytes) -> bool:
    """Whether a line is one that docs/data.md allows."""
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, **_NUMBERS)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # refuses lone surrogates
        return depth(value) <= 100 and _fits(value)
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def _unique(pairs: list) -> dict:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _refuse(number: str) -> float:
    raise ValueError(f"{number} is no JSON")


def _finite(number: str) -> float:
    value = float(number)
    return value if abs(value) != float("inf") else _refuse(number)


_NUMBERS = {"parse_int": _finite, "parse_float": _finite}


def depth(value) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, dict | list) + max(map(depth, children), default=0)


def _fits(record: dict) -> bool:
    if not _read_text(record["prompt"]).strip() or record.get("wrapper", "sft") not in ("sft", "pretrain"):
        return False
    if "trajectories" in record:
        first: dict[str, str] = {}
        for item in record["trajectories"]:
            if not isinstance(item["policy"], str) or not item["policy"] or "\0" in item["policy"]:
                return False
            first.setdefault(_read_text(item["text"]), item["policy"])
        policies = Counter(first.values())
        return len(policies) > 1 and max(policies.values()) > 1
    _read_text(record["reference"])
    if "ranked" in record:
        return isinstance(record["ranked"], list) and len(set(map(_read_text, record["ranked"]))) > 1
    return _read_text(record["chosen"]) != _read_text(record["rejected"])


def _read_text(value) -> str:
    if isinstance(value, list) and value:
        contents = [message["content"] for message in value]
        value = "\n".join(contents)
    if not isinstance(value, str) or "\0" in value:
        raise TypeError("no text")
    return value


# --- Lines that are broken, and lines that only look so ------------------------------------------------------------

Mutation = Callable[[dict, random.Random], bytes]


def _any_text(record: dict, choose: random.Random) -> tuple[dict | list, str | int]:
    """Where a random text of the record stands: (container, key)."""
    places: list = [(record, "prompt")]
    places += [(record, key) for key in ("reference", "chosen", "rejected") if key in record]
    places += [(record["ranked"], index) for index in range(len(record.get("ranked", [])))]
    places += [(item, key) for item in record.get("trajectories", []) for key in ("text", "policy")]
    return choose.choice(places)


def put(value) -> Mutation:
    """Put a value in the place of some text."""

    def mutate(record: dict, choose: random.Random) -> bytes:
        container, key = _any_text(record, choose)
        container[key] = value
        return json.dumps(record, ensure_ascii=choose.random() < 0.5).encode("utf-8", "surrogatepass")

    return mutate


def within(data: bytes) -> Mutation:
    """Put bytes somewhere into some text of the line."""

    def mutate(record: dict, choose: random.Random) -> bytes:
        container, key = _any_text(record, choose)
        container[key] = f"{container[key]}@@@{make_text(choose)}"
        return encode_record(record).replace(b"@@@", data)

    return mutate


def edit_bytes(record: dict, choose: random.Random) -> bytes:
    """A few random bytes changed, put in or taken out, anywhere; some of these lines stay good."""
    line = bytearray(encode_record(record))
    for _ in range(choose.randrange(1, 5)):
        place = choose.randrange(len(line))
        line[place : place + choose.randrange(2)] = choose.randbytes(choose.randrange(3))
    return bytes(line)


def flip_bit(record: dict, choose: random.Random) -> bytes:
    line = bytearray(encode_record(record))
    line[choose.randrange(len(line))] ^= 1 << choose.randrange(8)
    return bytes(line)


def drop_key(record: dict, choose: random.Random) -> bytes:
    del record[choose.choice(list(record))]
    return encode_record(record)


def repeat_key(record: dict, choose: random.Random) -> bytes:
    key = choose.choice(list(record))
    spelled = json.dumps(key) if choose.random() < 0.5 else '"' + "".join(f"\\u{ord(mark):04x}" for mark in key) + '"'
    return encode_record(record)[:-1] + f", {spelled}: {json.dumps(record[key])}}}".encode()


def cut(record: dict, choose: random.Random) -> bytes:
    line = encode_record(record)
    return line[: choose.randrange(1, len(line))]


def one_policy(record: dict, choose: random.Random) -> bytes:
    items = [{"policy": "a", "text": make_text(choose)} for _ in range(choose.randrange(4))]
    return encode_record({"prompt": record["prompt"], "trajectories": items})


def identical_texts(record: dict, choose: random.Random) -> bytes:
    items = [{"policy": policy, "text": "the same"} for policy in choose.sample(["a", "a", "b", "c"], k=4)]
    return encode_record({"prompt": record["prompt"], "trajectories": items})


def nested(levels: int) -> Mutation:
    def mutate(record: dict, choose: random.Random) -> bytes:
        inner = choose.choice([b"[" * levels + b"]" * levels, b'{"a":' * levels + b"1" + b"}" * levels])
        return encode_record(record)[:-1] + b', "extra": ' + inner + b"}"

    return mutate


def constant(*lines: bytes) -> Mutation:
    return lambda record, choose: choose.choice(lines)


def around(before: bytes, after: bytes) -> Mutation:
    return lambda record, choose: before + encode_record(record) + after


def extra(value: bytes) -> Mutation:
    return lambda record, choose: encode_record(record)[:-1] + b', "extra": ' + value + b"}"


MUTATIONS: dict[str, Mutation] = {
    "cut JSON": cut,
    "flipped bit": flip_bit,
    "edited bytes": edit_bytes,
    "random bytes": lambda record, choose: choose.randbytes(choose.randrange(1, 200)),
    "bad UTF-8": within(b"caf\xe9"),
    "overlong UTF-8": within(b"\xc0\xaf"),
    "UTF-16": lambda record, choose: json.dumps(record).encode("utf-16").replace(b"\n", b""),
    "raw lone surrogate": within(b"\xed\xa0\x80"),
    "escaped lone surrogate": within(b"\\ud800"),
    "swapped surrogates": within(b"\\ude00\\ud83d"),
    "raw NUL": within(b"\0"),
    "NUL bytes only": lambda record, choose: bytes(choose.randrange(1, 300)),
    "escaped NUL": within(b"\\u0000"),
    "raw control character": within(b"\x1b[2J"),
    "unknown escape": within(b"\\x"),
    "number for text": put(7),
    "boolean for text": put(True),
    "null for text": put(None),
    "huge number for text": put(10**400),
    "object for text": put({"text": "a"}),
    "empty list for text": put([]),
    "list of numbers for text": put([1, 2]),
    "deep list for text": put(json.loads("[" * 300 + "]" * 300)),
    "message without content": put([{"role": "user"}]),
    "message with a number": put([{"role": "user", "content": 3}]),
    "huge number elsewhere": extra(b"9" * 400),
    "exponent elsewhere": extra(b"1e999"),
    "NaN elsewhere": extra(b"NaN"),
    "leading zero elsewhere": extra(b"01"),
    "missing key": drop_key,
    "repeated key": repeat_key,
    "no object": constant(b"{}", b"[]", b"null", b"3", b'"text"', b"[{}]", b'{"prompt": "p"}'),
    "no record": constant(b'{"text": "a"}', b'{"prompt": "p", "trajectories": {}}', b'{"prompt": "p", "ranked": 1}'),
    "blank prompt": lambda record, choose: encode_record({**record, "prompt": choose.choice(["", " ", "\n\t"])}),
    "unknown wrapper": lambda record, choose: encode_record({**record, "wrapper": choose.choice(["chat", [], {}, 1])}),
    "one policy": one_policy,
    "identical texts": identical_texts,
    "deeper than we allow": nested(100),
    "deeper than orjson writes": nested(600),
    "deeper than orjson reads": nested(1500),
    "two objects": around(b"{}", b""),
    "trailing comma": around(b"", b","),
    "comment": around(b"// ", b""),
    "byte order mark": around(b"\xef\xbb\xbf", b""),
    "too long": lambda record, choose: encode_record(record)[:-1] + b" " * choose.randrange(LINE_LIMIT, 600_000) + b"}",
    "too long without an end": lambda record, choose: b"x" * choose.randrange(LINE_LIMIT, 600_000),
}

VARIATIONS: dict[str, Mutation] = {
    "plain": lambda record, choose: encode_record(record),
    "escaped": lambda record, choose: json.dumps(record).encode(),
    "spaced": lambda record, choose: b" \t" + json.dumps(record, indent=3).encode().replace(b"\n", b" ") + b"\r ",
    "unknown keys": extra(b'{"NUL": "\\u0000", "text": [1e308, 18446744073709551616, null, {"prompt": {}}]}'),
    "nested": nested(99),
    "astral text": within("\\ud83d\\ude00 \U0001f408 \u2028 \ufeff \ufffd \x7f".encode()),
    "control tokens": within(b"<|reward|>[UNUSED_TOKEN_130]<s>"),
    "messages": lambda record, choose: encode_record(
        {**record, "prompt": [{"role": "user", "content": record["prompt"]}]}
    ),
    "wrapper": lambda record, choose: encode_record({**record, "wrapper": "pretrain"}),
}
