"""Hashes taken while writing are those of the file, an interrupted write leaves the old content, and a manifest in
which anything was changed is not believed."""

import hashlib
import os
import random
from pathlib import Path

import orjson
import pytest
import xxhash

from megatron_polar import manifest
from megatron_polar.manifest import (
    MANIFEST,
    Damaged,
    HashedFile,
    block_sizes,
    check_block,
    check_hash,
    check_names,
    check_nothing_else,
    check_sizes,
    encode_manifest,
    file_entry,
    read_manifest,
    write_durably,
)

BLOCK = 1000
"""Stands in for the 64 MiB of a real run."""


def write_pieces(path: Path, content: bytes, *, seed: int) -> HashedFile:
    """Write content in pieces of random lengths, empty ones among them."""
    choose, rest = random.Random(seed), memoryview(content)
    with HashedFile(path, blocks=True) as file:
        while rest:
            size = choose.choice([0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
            assert file.write(rest[:size]) == len(rest[:size])
            rest = rest[size:]
    return file


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 17])
def test_hashes_taken_while_writing_are_those_of_the_file(size, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK_BYTES", BLOCK)
    content = random.Random(size).randbytes(size)
    for seed in range(5):
        file = write_pieces(tmp_path / "file", content, seed=seed)
        assert (tmp_path / "file").read_bytes() == content
        assert file.entry == {"size": size, "sha256": hashlib.sha256(content).hexdigest()}
        assert file.entry == file_entry(tmp_path / "file")
        blocks = [content[start : start + BLOCK] for start in range(0, size, BLOCK)]
        assert file.blocks == [xxhash.xxh3_64(block).hexdigest() for block in blocks]
        assert block_sizes(size) == [len(block) for block in blocks]


def test_a_changed_byte_is_found_in_its_block_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(manifest, "_READ_BYTES", 300)
    content = bytearray(random.Random(1).randbytes(3 * BLOCK + 500))
    file = write_pieces(tmp_path / "file", bytes(content), seed=1)
    for place in (0, BLOCK - 1, BLOCK, 3 * BLOCK + 499):
        content[place] ^= 1
        (tmp_path / "file").write_bytes(content)
        content[place] ^= 1
        for number, expected in enumerate(file.blocks):
            if number != place // BLOCK:
                check_block(tmp_path / "file", number=number, expected=expected)
                continue
            end = min(len(content), (number + 1) * BLOCK)
            with pytest.raises(Damaged, match=rf"file: block {number} \(bytes {number * BLOCK} to {end}\) has XXH3"):
                check_block(tmp_path / "file", number=number, expected=expected)


def test_anything_with_a_buffer_can_be_written(tmp_path):
    import numpy as np

    with HashedFile(tmp_path / "file") as file:
        file.write(np.arange(5, dtype=np.int32))
        file.write(memoryview(b"abc"))
        assert file.tell() == file.size == 23
    assert file_entry(tmp_path / "file") == file.entry


@pytest.mark.parametrize("kind", ["file", "symbolic link", "link to nothing", "hard link", "pipe"])
def test_a_file_is_always_a_new_one(kind, tmp_path):
    """What lies at its place already is removed, and never written through."""
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_bytes(b"precious")
    if kind == "file":
        path.write_bytes(b"left by a killed run" * 10)
    elif kind == "hard link":
        os.link(victim, path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim if kind == "symbolic link" else tmp_path / "nothing")
    with HashedFile(path) as file:
        file.write(b"ours")
    assert path.read_bytes() == b"ours"
    assert path.is_file()
    assert not path.is_symlink()
    assert path.stat().st_nlink == 1
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "nothing").exists()


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error") as caught, HashedFile(tmp_path / "file") as file:
        file.write(b"x")
    assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("interrupted", ["open", "write", "fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_content(interrupted, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_durably(path, b"old")

    def fail(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if interrupted == "replace":
            patch.setattr(Path, "replace", fail)
        elif interrupted == "write":
            patch.setattr(HashedFile, "write", fail)
        else:
            patch.setattr(os, interrupted, fail)
        with pytest.raises(OSError, match="No space left"):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert write_durably(path, b"new") == file_entry(path)  # and what is left behind is in nobody's way
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_we_go_on(tmp_path, monkeypatch):
    calls: list[str] = []

    def note(name: str, real):
        return lambda *arguments: (calls.append(name), real(*arguments))[1]

    monkeypatch.setattr(os, "fsync", note("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", note("replace", Path.replace))
    write_durably(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]


# --- the manifest ----------------------------------------------------------------------------------------------------

CONTENT = {
    "format": "test",
    "format_version": 3,
    "files": {"a.bin": {"size": 3, "sha256": "00" * 8}, "b/c": {"size": 0, "sha256": "11" * 8}},
    "text": 'quotes " and \\ and \u00e9\u4e2d',
    "numbers": [1, -2, 1.5, 1e300, 2**53, True, None],
}


def read(directory: Path) -> dict:
    return read_manifest(directory, format_name="test", format_version=3)


def test_a_manifest_comes_back_as_it_was(tmp_path):
    (tmp_path / MANIFEST).write_bytes(encode_manifest(CONTENT))
    found = read(tmp_path)
    assert {key: value for key, value in found.items() if key != "checksum"} == CONTENT
    assert encode_manifest(found) == (tmp_path / MANIFEST).read_bytes()
    backwards = dict(reversed([*CONTENT.items()]))
    assert encode_manifest(backwards) == encode_manifest(CONTENT)  # one content, one file


def test_every_change_of_one_byte_is_noticed(tmp_path):
    good = encode_manifest(CONTENT)
    choose = random.Random(1)
    for place in range(len(good)):
        others = {good[place] ^ 1, good[place] ^ 0x20, good[place] ^ 0x80, *b' "', choose.randrange(256)}
        for other in others - {good[place]}:
            (tmp_path / MANIFEST).write_bytes(good[:place] + bytes([other]) + good[place + 1 :])
            with pytest.raises(Damaged, match=r"manifest\.json"):
                read(tmp_path)


def test_every_missing_and_added_byte_is_noticed(tmp_path):
    good = encode_manifest(CONTENT)
    for place in range(len(good)):
        for changed in (good[:place] + good[place + 1 :], good[:place], good[:place] + b" " + good[place:]):
            (tmp_path / MANIFEST).write_bytes(changed)
            with pytest.raises(Damaged, match=r"manifest\.json"):
                read(tmp_path)
    for added in (b"\n", b" ", b"{}", b"\0"):
        (tmp_path / MANIFEST).write_bytes(good + added)
        with pytest.raises(Damaged, match=r"manifest\.json"):
            read(tmp_path)


WRONG = {
    "missing": (None, "is missing: the directory was never finished"),
    "empty": (b"", "is damaged"),
    "another format": (encode_manifest({**CONTENT, "format": "other"}), "is not the manifest of a test"),
    "another version": (encode_manifest({**CONTENT, "format_version": 4}), "has format_version=4, this program 3"),
    "a list": (b"[]", "is not the manifest of a test"),
    "without its checksum": (orjson.dumps(CONTENT), "was changed"),
    "another checksum": (orjson.dumps({**CONTENT, "checksum": "00" * 32}), "was changed"),
    "a key twice": (encode_manifest(CONTENT).replace(b"{\n", b'{\n  "format": "test",\n', 1), "was changed"),
    "nested beyond what can be written": (
        b'{"format": "test", "format_version": 3, "x": ' + b"[" * 500 + b"]" * 500 + b"}",
        "is damaged",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_manifest_of_ours_is_refused_in_one_line(name, tmp_path):
    content, part = WRONG[name]
    if content is not None:
        (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(Damaged, match=r"^manifest\.json ") as caught:
        read(tmp_path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_a_link_is_none(tmp_path):
    (tmp_path / "elsewhere").write_bytes(encode_manifest(CONTENT))
    (tmp_path / MANIFEST).symlink_to("elsewhere")
    with pytest.raises(Damaged, match="is missing"):
        read(tmp_path)


# --- files against it ------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path) -> Path:
    """Two files, a link between them, and links to a file and a directory outside."""
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (inside / "a").write_bytes(b"abc")
    (inside / "sub" / "b").write_bytes(b"")
    (inside / "to_a").symlink_to("a")
    (tmp_path / "outside").write_bytes(b"abc")
    (inside / "out").symlink_to("../outside")
    (inside / "out_absolute").symlink_to(tmp_path / "outside")
    (inside / "up").symlink_to("..")
    (inside / "to_itself").symlink_to("to_itself")
    return inside


NAMES = {
    "a": None,
    "sub/b": None,
    "./a": None,
    "to_a": None,
    "not/there": None,
    "to_itself": None,
    "": "which leads out of the directory",
    "/": "which leads out of the directory",
    "/etc/passwd": "which leads out of the directory",
    "//etc/passwd": "which leads out of the directory",
    "..": "which leads out of the directory",
    "../outside": "which leads out of the directory",
    "sub/../../outside": "which leads out of the directory",
    "sub/..": "which leads out of the directory",
    "a\0b": "which leads out of the directory",
    "sub\\..\\..\\outside": "which leads out of the directory",
    "out": "is a link out of the directory",
    "out_absolute": "is a link out of the directory",
    "up/outside": "is a link out of the directory",
    "up/inside/../outside": "which leads out of the directory",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_are_refused(name, directory):
    expected = NAMES[name]
    if expected is None:
        check_names(directory, [name])
        return
    with pytest.raises(Damaged) as caught:
        check_names(directory, ["a", name])
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_directory_that_is_reached_through_a_link_is_no_way_out(directory, tmp_path):
    (tmp_path / "scratch").symlink_to(directory)
    check_names(tmp_path / "scratch", ["a", "sub/b"])
    with pytest.raises(Damaged, match="is a link out of the directory"):
        check_names(tmp_path / "scratch", ["out"])


@pytest.mark.parametrize(
    ("name", "size", "part"),
    [
        ("a", 4, "a is truncated: 3 bytes instead of 4"),
        ("a", 2, "a is too long: 3 bytes instead of 2"),
        ("c", 0, "c is missing"),
        ("sub", 0, "sub is not a regular file"),
        ("to_itself", 0, "to_itself is missing"),
        ("../outside", 3, "which leads out of the directory"),
    ],
)
def test_sizes_are_compared_and_kinds_of_files(name, size, part, directory):
    check_sizes(directory, {"a": {"size": 3}, "sub/b": {"size": 0}})
    with pytest.raises(Damaged) as caught:
        check_sizes(directory, {name: {"size": size}})
    assert part in str(caught.value)


def test_what_the_manifest_does_not_name_is_found(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "anything").touch()
    (tmp_path / "empty").mkdir()
    check_nothing_else(tmp_path, {"a": {}}, allowed=["work"])
    with pytest.raises(Damaged, match=r"^work/anything is not in manifest\.json"):
        check_nothing_else(tmp_path, {"a": {}})
    (tmp_path / "link").symlink_to("empty")  # to a directory, but a link all the same
    with pytest.raises(Damaged, match=r"^link is not in manifest\.json"):
        check_nothing_else(tmp_path, {"a": {}}, allowed=["work"])


def test_a_hash_that_differs_is_shown_with_the_right_one(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    entry = file_entry(tmp_path / "a")
    check_hash(tmp_path, "a", entry)
    (tmp_path / "a").write_bytes(b"abd")
    found = hashlib.sha256(b"abd").hexdigest()
    with pytest.raises(Damaged, match=rf"^a has SHA-256 {found[:12]}\.\.\. instead of {entry['sha256'][:12]}\.\.\.$"):
        check_hash(tmp_path, "a", entry)
