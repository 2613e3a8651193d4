import errno
import gzip
import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from megatron_polar.data.lines import InputLine, RecordError, list_inputs, read_jsonl, read_lines
from megatron_polar.data.records import Distinct, Preference, Trajectory, TrajectoryGroup, drop_duplicates, parse_record
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
    "NUL bytes": (b"\0" * 20, "malformed JSON"),
    "NUL in a text": (changed(PREFERENCE, chosen="a\0"), "'chosen' contains a NUL character"),
    "NUL in a message": (
        changed(GROUP, prompt=[{"role": "user", "content": "\0"}]),
        "'prompt' contains a NUL character",
    ),
    "NUL in a policy": (
        changed(GROUP, trajectories=[{"policy": "\0", "text": "x"}]),
        "trajectories[0].policy' contains",
    ),
    "deeper than the parser": (b'{"prompt": ' + b"[" * 100_000, "depth limit"),
    "deeper than the writer": (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "nested deeper than 100 levels"),
    "a huge number": (b'{"prompt": ' + b"9" * 5000 + b"}", "malformed JSON (number is infinity"),
    "a large number": (changed(PREFERENCE, chosen=2**64), "'chosen' is a JSON number"),
    "a key twice": (b'{"prompt": "a", "x": 1, "prompt": "b"}', '7: the key "prompt" is there twice'),
    "a key twice, once escaped": (b'{"prompt": "a", "\\u0070rompt": "b"}', "is there twice"),
    "a key of a trajectory twice": (b'{"trajectories": [{"text": "a", "text": "a"}]}', "is there twice"),
    "a byte order mark within the file": (b'\xef\xbb\xbf{"prompt": "x"}', "byte order mark"),
    "nested wrapper": (changed(GROUP, wrapper=[["x"]]), "use one of sft, pretrain"),
    "many keys": ({f"key {number}": 1 for number in range(10_000)}, "..."),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_gives_one_line_with_file_line_and_reason(name):
    line, reason = BAD[name]
    with pytest.raises(UserError) as caught:
        parse(line)
    message = str(caught.value)
    assert message.startswith("in.jsonl:7: ")
    assert reason in message
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize("mark", ["\n", "\u2028", "\x1b[2J", "\x9b", "long " * 1000])
def test_text_of_the_data_does_not_break_the_message(mark):
    group = changed(GROUP, trajectories=[{"policy": f"a{mark}b", "text": "1"}, {"policy": "c", "text": "1"}])
    for record in (group, changed(GROUP, prompt=[mark]), {mark: 1}, changed(GROUP, wrapper=mark)):
        with pytest.raises(UserError) as caught:
            parse(record)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_duplicates_are_dropped_and_counted():
    repeated = changed(GROUP, trajectories=[GROUP["trajectories"][0], *GROUP["trajectories"]])
    found = drop_duplicates(parse(repeated), source="f", line_number=1)
    assert found == Distinct(parse(GROUP), duplicates=1, identical=0)
    ranking = parse({"prompt": "p", "reference": "r", "ranked": ["1", "2", "1", "3"]})
    found = drop_duplicates(ranking, source="f", line_number=1)
    assert (found.record.candidates, found.duplicates) == (("1", "2", "3"), 1)
    assert drop_duplicates(parse(GROUP), source="f", line_number=1) == Distinct(parse(GROUP), duplicates=0, identical=0)


def test_a_candidate_that_is_a_reference_is_dropped_and_counted():
    """Beside the reference's own text every other answer is worse for no reason, and it better than all for none."""
    for given in ({"reference": "1"}, {"references": ["9", "1"]}):
        ranking = parse({"prompt": "p", **given, "ranked": ["2", "1", "3"]})
        found = drop_duplicates(ranking, source="f", line_number=1)
        assert (found.record.candidates, found.duplicates) == (("2", "3"), 1)
    with pytest.raises(RecordError, match=r"^f:1: beside the reference's own text fewer than two candidates are left"):
        drop_duplicates(parse(changed(PREFERENCE, chosen=PREFERENCE["reference"])), source="f", line_number=1)


def test_a_text_of_an_earlier_policy_is_dropped_and_counted_apart():
    pairs = [("a", "1"), ("a", "2"), ("b", "1"), ("b", "1"), ("c", "2"), ("c", "3"), ("a", "3")]
    items = [{"policy": policy, "text": text} for policy, text in pairs]
    found = drop_duplicates(parse(changed(GROUP, trajectories=items)), source="f", line_number=1)
    kept = [(trajectory.policy, trajectory.text) for trajectory in found.record.trajectories]
    assert kept == [("a", "1"), ("a", "2"), ("c", "3")]
    assert (found.duplicates, found.identical) == (1, 3)


def test_a_group_that_identical_texts_make_unusable_is_an_error_that_says_why():
    items = [{"policy": "a", "text": "1"}, {"policy": "a", "text": "2"}, {"policy": "b", "text": "1"}]
    with pytest.raises(RecordError, match=r"^f:1: all trajectories are of one policy once 1 text\(s\) identical to an"):
        drop_duplicates(parse(changed(GROUP, trajectories=items)), source="f", line_number=1)


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
@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: b"plain text\n", lambda data: b""])
def test_a_truncated_or_damaged_archive_is_an_error_with_its_place(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damage(PACKED[suffix](TEXT)))
    with pytest.raises(UserError, match=rf"a{suffix}:\d+: damaged or truncated archive"):
        list(read_jsonl(path))


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES[0])
    assert list(read_jsonl(path)) == [(1, LINES[0])]


def test_a_line_that_is_too_long_stops_a_reader_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_polar.data.lines.MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b"x" * 101)
    with pytest.raises(UserError, match=r"a\.jsonl:2: the line is longer than 100 bytes"):
        list(read_jsonl(path))


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("suffix", PACKED)
def test_every_line_has_its_place_and_a_line_that_is_too_long_its_hash(tmp_path, monkeypatch, suffix, newline):
    monkeypatch.setattr("megatron_polar.data.lines.MAX_LINE_BYTES", 100)
    monkeypatch.setattr("megatron_polar.data.lines._READ_BYTES", 64)
    path = tmp_path / f"a{suffix}"
    lines = [
        b"a",
        b"",
        b"x" * 100,
        b"b" * 90,
        b"y" * 99 + b"\r\r\ry",
        *(b"z" * size for size in range(150, 300)),
        b"end",
    ]
    content = b"\xef\xbb\xbf" + newline.join(lines)
    path.write_bytes(PACKED[suffix](content))
    found = list(read_lines(path))
    expected, offset = [], 3
    for number, line in enumerate(lines, start=1):
        if len(line + newline) > 100:
            expected.append(InputLine(number, offset, b"", hashlib.sha256(line).hexdigest()))
        elif line:
            expected.append(InputLine(number, offset, line))
        offset += len(line + newline)
    assert found == expected


def test_lines_that_are_too_long_take_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_polar.data.lines.MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(100 << 20)  # a hole of NUL bytes
        file.seek(0, 2)
        file.write(b'\n{"n": 1}\n')
    tracemalloc.start()
    numbers = [line.number for line in read_lines(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == [1, 2]
    assert peak < 5 << 20


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
    for paths in ([tmp_path / "none.jsonl"], [tmp_path / "x.csv"], [tmp_path / "empty"], [], [Path("a\0.jsonl")]):
        with pytest.raises(UserError):
            list_inputs(paths)


def _pipe(path):
    os.mkfifo(path)


NO_FILES = {
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": _pipe,
    "link to a pipe": lambda path: (_pipe(path.with_name("pipe")), path.symlink_to("pipe")),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_an_input_that_is_no_regular_file_is_refused_and_not_left_out(tmp_path, name):
    NO_FILES[name](tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"{}")
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(UserError, match=r"a\.jsonl: (not a regular file|no such file)"):
            list_inputs([path])


def test_links_to_directories_are_followed_and_each_directory_is_read_once(tmp_path):
    for name in ("in/real", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_text("{}")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "real" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "a").symlink_to("real")  # what lies here itself keeps its own name
    found = [path.relative_to(tmp_path).as_posix() for path in list_inputs([tmp_path / "in"])]
    assert found == ["in/link/deep/a.jsonl", "in/real/a.jsonl"]


def test_a_directory_that_cannot_be_read_is_refused_and_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jsonl").write_text("{}")
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)  # the tests may run as root, whom no permission stops
    with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\); check its permissions"):
        list_inputs([tmp_path])


def test_an_archive_that_takes_too_much_memory_is_said_to_be_that(tmp_path):
    settings = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    data = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(data.compress(TEXT) + data.flush())
    with pytest.raises(UserError, match=r"a\.jsonl\.zst:1: .*compress it again without"):
        list(read_jsonl(tmp_path / "a.jsonl.zst"))


def test_a_link_to_a_file_and_a_directory_with_a_files_name_are_inputs(tmp_path):
    (tmp_path / "inner.jsonl").mkdir()
    (tmp_path / "inner.jsonl" / "a.jsonl").write_bytes(b"{}")
    (tmp_path / "b.jsonl").symlink_to("inner.jsonl/a.jsonl")
    assert list_inputs([tmp_path]) == [tmp_path / "b.jsonl", tmp_path / "inner.jsonl" / "a.jsonl"]


@pytest.mark.parametrize("name", [b"a\n.jsonl", b"\x1b[31m.jsonl", b"caf\xe9.jsonl"])
def test_a_name_that_no_message_and_no_manifest_can_hold_is_refused(tmp_path, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes(b"{}")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.jsonl").symlink_to(path)
    for given in (path, tmp_path, tmp_path / "linked"):
        with pytest.raises(UserError, match="rename it") as caught:
            list_inputs([given])
        assert str(caught.value).isprintable()
