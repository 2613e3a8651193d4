import gzip
import hashlib
import json

import pytest
import zstandard

from megatron_polar.data.records import (
    Preference,
    RecordError,
    Trajectory,
    TrajectoryGroup,
    drop_duplicates,
    list_inputs,
    parse_record,
    read_jsonl,
)
from megatron_polar.errors import UserError

GROUP = {
    "prompt": "Count to three.",
    "trajectories": [{"policy": "a", "text": "1 2 3"}, {"policy": "a", "text": "one"}, {"policy": "b", "text": "3"}],
}
PREFERENCE = {"prompt": "Hi", "reference": "Hello!", "chosen": "Hey", "rejected": "Go away"}


def parse(value, *, line_number=7, default_wrapper="sft"):
    line = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_record(line, source="in.jsonl", line_number=line_number, default_wrapper=default_wrapper)


def changed(base, **keys):
    return {**base, **keys}


def without(base, key):
    return {name: value for name, value in base.items() if name != key}


def test_a_trajectory_line_becomes_a_group_and_keeps_unknown_keys():
    group = parse({**GROUP, "wrapper": "pretrain", "id": 12, "tags": ["x"]})
    assert group == TrajectoryGroup(
        prompt="Count to three.",
        trajectories=(Trajectory("a", "1 2 3"), Trajectory("a", "one"), Trajectory("b", "3")),
        wrapper="pretrain",
        meta={"id": 12, "tags": ["x"]},
    )


def test_preference_and_ranking_lines_give_candidates_best_first():
    pair = parse(PREFERENCE, default_wrapper="pretrain")
    assert pair == Preference("Hi", "Hello!", ("Hey", "Go away"), "pretrain", {})
    ranking = parse({"prompt": "Hi", "reference": "r", "ranked": ["1", "2", "3"], "source": "s"})
    assert ranking == Preference("Hi", "r", ("1", "2", "3"), "sft", {"source": "s"})


def test_messages_are_joined_by_newlines_without_roles_everywhere():
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    answer = [{"role": "assistant", "content": "D"}]
    pair = parse({"prompt": turns, "reference": answer, "chosen": answer, "rejected": [*answer, *answer]})
    assert pair == Preference("A\nB\nC", "D", ("D", "D\nD"), "sft", {})


def test_an_empty_answer_is_a_legal_answer():
    assert parse(changed(PREFERENCE, rejected="")).candidates == ("Hey", "")


BAD = {
    "malformed JSON": (b'{"prompt": "x", ', "malformed JSON"),
    "not an object": (["prompt"], "a JSON array"),
    "no form": ({"text": "x"}, "make no record"),
    "missing key": (without(PREFERENCE, "rejected"), "missing key 'rejected'"),
    "missing prompt": (without(GROUP, "prompt"), "missing key 'prompt'"),
    "empty prompt": (changed(GROUP, prompt=" \n"), "'prompt' is empty"),
    "prompt of another type": (changed(GROUP, prompt=3), "'prompt' is a JSON number 3"),
    "message without content": (changed(GROUP, prompt=[{"role": "user"}]), '"content"'),
    "empty message list": (changed(GROUP, prompt=[]), "'prompt' is a JSON array []"),
    "null answer": (changed(PREFERENCE, chosen=None), "'chosen' is a JSON null"),
    "unknown wrapper": (changed(GROUP, wrapper="chat"), "use one of sft, pretrain"),
    "trajectory without policy": (changed(GROUP, trajectories=[{"text": "x"}]), "trajectories[0]"),
    "empty policy": (changed(GROUP, trajectories=[{"policy": "", "text": "x"}]), "trajectories[0].policy"),
    "no trajectories": (changed(GROUP, trajectories=[]), "'trajectories' is empty"),
    "no same-policy pair": (changed(GROUP, trajectories=GROUP["trajectories"][1:]), "no policy has two trajectories"),
    "one policy": (changed(GROUP, trajectories=GROUP["trajectories"][:2]), "all trajectories are of one policy"),
    "ranking of one": ({"prompt": "p", "reference": "r", "ranked": ["1"]}, "two or more answers"),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', "not UTF-8 (byte 15: 0xe9)"),
    "lone surrogate": (b'{"prompt": "\\ud800"}', "malformed JSON"),
    "NaN": (b'{"prompt": NaN}', "malformed JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_gives_one_line_with_file_line_and_reason(name):
    line, reason = BAD[name]
    with pytest.raises(UserError) as caught:
        parse(line)
    message = str(caught.value)
    assert message.startswith("in.jsonl:7: ")
    assert reason in message
    assert "\n" not in message


def test_a_policy_name_with_a_newline_does_not_break_the_message():
    with pytest.raises(UserError) as caught:
        parse(changed(GROUP, trajectories=[{"policy": "a\nb", "text": "1"}, {"policy": "c", "text": "1"}]))
    assert "\n" not in str(caught.value)


def test_duplicates_are_dropped_and_counted():
    repeated = changed(GROUP, trajectories=[GROUP["trajectories"][0], *GROUP["trajectories"]])
    group, dropped = drop_duplicates(parse(repeated), source="f", line_number=1)
    assert (group, dropped) == (parse(GROUP), 1)
    ranking = parse({"prompt": "p", "reference": "r", "ranked": ["1", "2", "1", "3"]})
    ranking, dropped = drop_duplicates(ranking, source="f", line_number=1)
    assert (ranking.candidates, dropped) == (("1", "2", "3"), 1)
    assert drop_duplicates(parse(GROUP), source="f", line_number=1) == (parse(GROUP), 0)


def test_the_same_text_of_two_policies_is_no_duplicate():
    items = [{"policy": "a", "text": "1"}, {"policy": "a", "text": "2"}, {"policy": "b", "text": "1"}]
    group = parse(changed(GROUP, trajectories=items))
    assert drop_duplicates(group, source="f", line_number=1) == (group, 0)


@pytest.mark.parametrize(
    "record",
    [
        changed(PREFERENCE, rejected="Hey"),
        changed(GROUP, trajectories=[GROUP["trajectories"][0]] * 2 + GROUP["trajectories"][2:]),
    ],
)
def test_a_record_that_duplicates_make_unusable_is_an_error(record):
    with pytest.raises(RecordError, match=r"^f\.jsonl:3: "):
        drop_duplicates(parse(record), source="f.jsonl", line_number=3)


# ---------------------------------------------------------------- files


LINES = [b'{"n": 1}', b'{"n": 2}', b'{"n": "' + b"x" * 500_000 + b'"}']
TEXT = LINES[0] + b"\n\n" + LINES[1] + b"\r\n" + LINES[2]
PACKED = {
    ".jsonl": lambda data: data,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACKED)
def test_every_kind_of_file_gives_the_same_numbered_lines(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKED[suffix](TEXT))
    meter = hashlib.sha256()
    assert list(read_jsonl(path, meter=meter)) == [(1, LINES[0]), (3, LINES[1]), (4, LINES[2])]
    assert meter.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_archives_of_several_parts_are_read_to_the_end(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKED[suffix](LINES[0] + b"\n") + PACKED[suffix](LINES[1] + b"\n"))
    assert list(read_jsonl(path)) == [(1, LINES[0]), (2, LINES[1])]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: b"plain text\n"])
def test_a_truncated_or_damaged_archive_is_an_error_with_its_place(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damage(PACKED[suffix](TEXT)))
    with pytest.raises(UserError, match=rf"a{suffix}:\d+: damaged or truncated archive"):
        list(read_jsonl(path))


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES[0])
    assert list(read_jsonl(path)) == [(1, LINES[0])]


def test_a_file_without_newlines_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_polar.data.records.MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b"x" * 101)
    with pytest.raises(UserError, match=r"a\.jsonl:2: line is longer"):
        list(read_jsonl(path))


def test_directories_become_their_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.jsonl.zst", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    names = [path.relative_to(tmp_path).as_posix() for path in list_inputs([tmp_path])]
    assert names == ["a.jsonl.gz", "b.jsonl", "sub/c.jsonl.zst"]


def test_inputs_that_cannot_be_meant_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("")
    (tmp_path / "empty").mkdir()
    for paths in ([tmp_path / "none.jsonl"], [tmp_path / "x.csv"], [tmp_path / "empty"], []):
        with pytest.raises(UserError):
            list_inputs(paths)
