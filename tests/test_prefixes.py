"""Prompts that are prefixes of documents: random length, seeded, and always the document's own beginning."""

from collections import Counter
from pathlib import Path

import orjson
import pytest

from megatron_polar import cli
from megatron_polar.data.records import read_texts
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.data.tokenizer_training import train_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.policies.prompts import cut_prefixes


def write_documents(path: Path, texts) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return path


def documents(count: int, words: int = 1500) -> list[str]:
    return [
        f"Document {number}:\n" + " ".join(f"word{number}-{place}" for place in range(words)) for number in range(count)
    ]


def test_lengths_are_uniform_from_one_to_the_longest(tmp_path):
    texts = documents(2000, words=70)
    path = write_documents(tmp_path / "d.jsonl", [text.partition("\n")[2] for text in texts])
    lengths = Counter(len(prefix.split()) for prefix in cut_prefixes(path, limit=None, seed=1, max_tokens=64))
    assert set(lengths) == set(range(1, 65))
    assert max(lengths.values()) < 2.2 * 2000 / 64, "a mean of 31 a length, with a standard deviation of 6"


def test_a_prefix_is_the_documents_own_beginning_and_leaves_something_to_say(tmp_path):
    texts = ["one", "one two", "  leading\nlines and\tspaces  kept ", "", "   ", *documents(20)]
    path = write_documents(tmp_path / "d.jsonl", texts)
    prefixes = list(cut_prefixes(path, limit=None, seed=1))
    assert prefixes[0] == "one", "of two words one is left"
    assert len(prefixes) == 22
    for prefix in prefixes:
        assert any(text.lstrip().startswith(prefix) and len(prefix) < len(text.strip()) for text in texts)
        assert 1 <= len(prefix.split()) <= 1024


def test_another_seed_cuts_elsewhere_and_the_same_seed_does_not(tmp_path):
    path = write_documents(tmp_path / "d.jsonl", documents(30))
    one, again, other = (list(cut_prefixes(path, limit=None, seed=seed)) for seed in (1, 1, 2))
    assert one == again and sum(a == b for a, b in zip(one, other, strict=True)) <= 2


def test_prefixes_are_different(tmp_path):
    path = write_documents(tmp_path / "d.jsonl", ["the same words again and again"] * 50 + documents(1))
    prefixes = list(cut_prefixes(path, limit=None, seed=1))
    assert len(set(prefixes)) == len(prefixes) <= 6


def test_tokens_are_counted_with_a_tokenizer(tmp_path):
    texts = [f"{text} ünïcödé 文字 🙂" * 3 for text in documents(40, words=60)]
    records = tmp_path / "records.jsonl"
    trajectories = [{"policy": name, "text": "x y"} for name in "aab"]
    records.write_bytes(b"".join(orjson.dumps({"prompt": t, "trajectories": trajectories}) + b"\n" for t in texts))
    codec = load_tokenizer(train_tokenizer(read_texts([records]), vocab_size=340, output=tmp_path / "tokenizer.model"))
    path = write_documents(tmp_path / "d.jsonl", texts)
    prefixes = list(cut_prefixes(path, limit=None, seed=1, codec=codec, max_tokens=32))
    lengths = [len(codec.encode(prefix)) for prefix in prefixes]
    assert len(prefixes) > 30 and max(lengths) <= 34 and min(lengths) >= 1
    assert all("\ufffd" not in prefix for prefix in prefixes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": 3}\n', r"d\.jsonl:2: cannot be read \(`text` is no string\)"),
        ('{"prompt": "x"}\n', r"d\.jsonl:2: has no key `text`; each line is an object"),
        ("{\n", r"d\.jsonl:2: cannot be read"),
        ("", r"gives 1 different prefixes, num_prompts=2 are asked for; lower num_prompts or add documents"),
    ],
)
def test_bad_documents_are_named(tmp_path, content, message):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a good line"}\n' + content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        list(cut_prefixes(path, limit=2, seed=1))


def test_the_command(tmp_path, capsys):
    pool = tmp_path / "pool.yaml"
    pool.write_text("embedded: {num_policies: 4}\nsampling: {corpus_fraction: 0.1}\n", encoding="utf-8")
    path = write_documents(tmp_path / "d.jsonl", documents(12))
    command = ["sample", "--pool", str(pool), "--documents", str(path), "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--num-prompts", "10", "--max-prefix-tokens", "5"]) == 0
    lines = (tmp_path / "out" / "trajectories-00000.jsonl").read_bytes().splitlines()
    assert len(lines) == 10 and all(len(orjson.loads(line)["prompt"].split()) <= 5 for line in lines)
    for more, message in (
        (["--prompts", str(path)], "--prompts and --documents exclude each other"),
        (["--max-prefix-tokens", "0"], "max_prefix_tokens=0 is too small"),
        (["--tokenizer", str(tmp_path / "none.model")], "none.model: no such tokenizer"),
    ):
        assert cli.main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    del command[3:5]
    assert cli.main([*command, "--tokenizer", "t.model", "--num-prompts", "1"]) == 2
    assert "--tokenizer counts the tokens of prefixes: give --documents" in capsys.readouterr().err
