"""What can go wrong with data and its files, and that it ends in one line: faults_data.py with small counts, attacks on
paths, full and broken disks."""

import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
from faults_data import (
    FINAL_POINTS,
    FORK,
    UNIT_POINTS,
    dataset_corruptions,
    fuzz_lines,
    hashes,
    make_record,
    make_tokenizer,
    open_as_trainer,
    preprocess_kills,
    preprocess_quietly,
)

from megatron_polar import cli, faults
from megatron_polar.data.corpus import Corpus
from megatron_polar.errors import UserError
from megatron_polar.manifest import encode_manifest


@pytest.fixture(scope="module")
def call(tmp_path_factory) -> dict:
    """Arguments of preprocess but for the output: 60 lines, about ten units, one bad line."""
    workdir = tmp_path_factory.mktemp("call")
    choose = random.Random(3)
    lines = [json.dumps(make_record(choose)) for _ in range(60)]
    source = workdir / "in.jsonl"
    source.write_text("\n".join([*lines, "{broken"]))
    size = source.stat().st_size // 10
    tokenizer = make_tokenizer(workdir, seed=3)
    return {"inputs": [source], "tokenizer_path": tokenizer, "unit_bytes": size, "max_bad_fraction": 0.1}


@pytest.fixture(scope="module")
def dataset(call, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("dataset") / "out"
    preprocess_quietly(**call, output=output)
    return output


@pytest.fixture
def dataset_copy(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


@pytest.fixture
def no_faults():
    """Forget planned faults, whatever the test's outcome."""
    yield
    faults.plan("")


# --- many faults, few of each ----------------------------------------------------------------------------------------


def test_preprocessing_that_is_killed_anywhere_ends_with_the_same_bytes(tmp_path):
    figures = preprocess_kills(16, tmp_path, seed=0)
    assert figures["kills"] >= 16
    assert (figures["identical"], figures["redone"]) == (16, 0)


def test_every_bad_line_is_quarantined_with_its_place_and_every_good_line_kept(tmp_path):
    figures = fuzz_lines(1000, tmp_path, seed=0)
    assert figures["bad_lines"] > 900
    assert figures["quarantined"] == figures["bad_lines"]
    assert figures["kept"] == figures["good_lines"] > 300
    assert figures["wrong_place"] == 0


def test_every_damage_of_a_dataset_is_found_before_the_first_step(tmp_path):
    figures = dataset_corruptions(180, tmp_path, seed=0)
    assert figures["missed"] == []
    assert figures["found"] == 180


# --- paths -----------------------------------------------------------------------------------------------------------

NAMES = [
    "../outside",
    "a/../../outside",
    "tokenizer/../../outside",
    "..",
    ".",
    "",
    "/etc/hostname",
    "//etc/hostname",
    "tokenizer/..",
    "a\0b",
    "..\\outside",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_that_names_a_path_outside_is_refused(dataset_copy, name):
    (dataset_copy.parent / "outside").write_bytes(b"")
    content = json.loads((dataset_copy / "manifest.json").read_text())
    content["files"][name] = {"size": 0, "sha256": "0" * 64}
    (dataset_copy / "manifest.json").write_bytes(encode_manifest(content))
    with pytest.raises(UserError, match=r"manifest\.json names .*, which leads out of the directory") as caught:
        Corpus(dataset_copy)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("change", ["files", "blocks", "policies", "corpus.bin", "size", "fewer blocks"])
def test_a_manifest_that_lacks_something_is_refused(dataset_copy, change):
    content = json.loads((dataset_copy / "manifest.json").read_text())
    if change == "size":
        del content["files"]["corpus.idx"]["size"]
    elif change == "fewer blocks":
        content["blocks"]["corpus.bin"].pop()
    else:
        content.pop(change, None)
        content.get("files", {}).pop(change, None)
    (dataset_copy / "manifest.json").write_bytes(encode_manifest(content))
    with pytest.raises(UserError, match=r"manifest\.json .*preprocess did not write it"):
        Corpus(dataset_copy)


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


OUTPUTS = ["corpus.bin", "corpus.idx", "manifest.json", "quarantine.ndjson", "tokenizer"]
WORK_FILES = ["lock", "corpus.bin", "corpus.idx", "quarantine.ndjson", "lengths", "manifest.json"]


@pytest.mark.parametrize("name", [*OUTPUTS, ".work", ".work/tokenizer", *(f".work/{name}" for name in WORK_FILES)])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_preprocess_never_writes_through_a_link(call, dataset, tmp_path, name, kind):
    """A link that somebody put there is refused, or replaced by a file of ours; what it points to stays as it is."""
    outside, output = tmp_path / "outside", tmp_path / "out"
    if kind == "file":
        outside.write_bytes(b"precious")
    else:
        outside.mkdir()
        (outside / "precious").write_bytes(b"precious")
    before = hashes(tmp_path)
    _link(output / name, outside)
    try:
        preprocess_quietly(**call, output=output)
    except UserError as error:
        assert str(output) in str(error)
        assert "\n" not in str(error)
    else:
        assert hashes(output) == hashes(dataset)
        assert not any(path.is_symlink() for path in output.rglob("*"))
    shutil.rmtree(output)
    assert hashes(tmp_path) == before


def test_a_directory_with_other_files_is_no_output(call, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        UserError, match=r"holds 'notes\.txt', which is no part of a dataset; choose an empty directory"
    ):
        preprocess_quietly(**call, output=tmp_path)


def test_inputs_inside_of_the_output_are_refused(call, tmp_path):
    """They would go with what is replaced there."""
    shutil.copy(call["inputs"][0], tmp_path)
    output = tmp_path / "out"
    (output / "tokenizer").mkdir(parents=True)
    (output / "tokenizer" / "texts.jsonl").write_text("")
    with pytest.raises(UserError, match=r"texts\.jsonl: an input inside of the output"):
        preprocess_quietly(**{**call, "inputs": [tmp_path]}, output=output)


# --- disks -----------------------------------------------------------------------------------------------------------


def test_an_input_that_cannot_be_read_is_one_line_and_status_2(call, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.symlink_to("/proc/self/mem")  # a regular file whose first byte is an input/output error
    output = tmp_path / "out"
    arguments = ["preprocess", str(broken), "--output", str(output), "--tokenizer", str(call["tokenizer_path"])]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said == f"error: {broken}:1: cannot be read (Input/output error); check the file\n"
    assert not (output / "manifest.json").exists()


@pytest.mark.parametrize("point", [*UNIT_POINTS, *FINAL_POINTS[:-1]])
@pytest.mark.parametrize(("action", "text"), [("enospc", "No space left on device"), ("eio", "Input/output error")])
def test_a_full_or_broken_disk_is_one_line_and_publishes_nothing(
    call, dataset, tmp_path, point, action, text, no_faults
):
    output = tmp_path / "out"
    nth = 3 if point in UNIT_POINTS else 1
    faults.plan(f"{point}:{nth}={action}")
    with pytest.raises(UserError) as caught:
        preprocess_quietly(**call, output=output)
    assert str(caught.value).startswith(f"{output}: {text} (")
    assert "run the same command again" in str(caught.value)
    assert not (output / "manifest.json").exists()
    faults.plan("")
    report = preprocess_quietly(**call, output=output)
    assert report.units_resumed >= (nth - 1 if "unit" in point else 2)
    assert hashes(output) == hashes(dataset)


def test_a_full_disk_in_a_worker_is_one_line(call, tmp_path, monkeypatch):
    monkeypatch.setenv("POLAR_FAULT", "unit:2=enospc")
    with pytest.raises(UserError, match=r"out: No space left on device \(unit\); mend that"):
        preprocess_quietly(**call, output=tmp_path / "out", num_workers=2)


@pytest.mark.parametrize("name", ["unit", "corpus.bin"])
def test_a_write_that_the_system_refuses_names_the_file(call, dataset, tmp_path, name):
    """Files that may not grow any more are the closest to a full disk that needs no rights."""
    output = tmp_path / "out"
    largest_unit = max(call["unit_bytes"] * 4, 1)
    limit = 500 if name == "unit" else min(largest_unit, (dataset / "corpus.bin").stat().st_size - 100)
    pipe, other = FORK.Pipe()
    process = FORK.Process(target=_preprocess_with_limit, args=({**call, "output": output}, limit, other))
    process.start()
    other.close()
    said = pipe.recv()
    process.join()
    assert said.startswith(f"{output}: File too large ({output / '.work' / name}")
    assert not (output / "manifest.json").exists()
    preprocess_quietly(**call, output=output)
    assert hashes(output) == hashes(dataset)


def _preprocess_with_limit(call: dict, limit: int, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        preprocess_quietly(**call)
        pipe.send("nothing")
    except UserError as error:
        pipe.send(str(error))
    os._exit(0)


def test_an_output_that_is_a_file_is_one_line(call, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"out: Not a directory|out: File exists"):
        preprocess_quietly(**call, output=tmp_path / "out")


# --- damage and repair -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.idx", "tokenizer/tokenizer.model", "quarantine.ndjson"])
@pytest.mark.parametrize("missing", [True, False])
def test_the_same_command_mends_a_damaged_dataset(call, dataset, dataset_copy, name, missing, capsys):
    path = dataset_copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if not missing:
        path.write_bytes(data)
    with pytest.raises(UserError, match="run preprocess again"):
        open_as_trainer(dataset_copy)
    report = preprocess_quietly(**call, output=dataset_copy)
    assert not report.already_complete
    assert hashes(dataset_copy) == hashes(dataset)


def test_what_is_not_ours_to_mend_is_refused(call, dataset_copy):
    (dataset_copy / "tokenizer" / "mine.txt").write_text("")
    with pytest.raises(UserError, match=r"tokenizer/mine\.txt is not in manifest\.json.*remove this one"):
        preprocess_quietly(**call, output=dataset_copy)
    (dataset_copy / "tokenizer" / "mine.txt").unlink()
    (dataset_copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged.*choose another output directory or remove"):
        preprocess_quietly(**call, output=dataset_copy)


def test_ranks_share_the_check_of_the_tokens(dataset, monkeypatch, tmp_path, call):
    monkeypatch.setattr("megatron_polar.manifest.BLOCK_BYTES", 1000)
    output = tmp_path / "out"
    preprocess_quietly(**call, output=output)
    corpus = Corpus(output)
    size = corpus.manifest["files"]["corpus.bin"]["size"]
    small = sum(entry["size"] for name, entry in corpus.manifest["files"].items() if name != "corpus.bin")
    for of in (1, 2, 3, 100):
        read = [corpus.verify_tokens(part, of) for part in range(of)]
        assert sum(read) == size + small
        assert sum(read[1:]) == size - sum(min(1000, size - start) for start in range(0, size, 1000 * of))
    data = bytearray((output / "corpus.bin").read_bytes())
    data[3500] ^= 1
    (output / "corpus.bin").write_bytes(data)
    found = []
    for part in range(3):
        try:
            corpus.verify_tokens(part, 3)
        except UserError as error:
            found.append((part, str(error)))
    ((part, said),) = found
    assert part == 0
    assert said.startswith(f"{output}/corpus.bin: block 3 (bytes 3000 to 4000) has XXH3 ")
    assert said.endswith("restore the file or run preprocess again")


def test_a_shard_that_changes_before_it_is_merged_is_noticed(call, tmp_path, monkeypatch, dataset):
    from megatron_polar.data import preprocess as module

    original = module.Merger.append

    def damaging(merger, shard, done):
        if shard.name == "unit-00000002.shard":
            shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        original(merger, shard, done)

    monkeypatch.setattr(module.Merger, "append", damaging)
    with pytest.raises(
        UserError, match=r"unit-00000002\.shard has XXH3 \w+ instead of \w+; run the same command again"
    ):
        preprocess_quietly(**call, output=tmp_path / "out")
    monkeypatch.undo()
    preprocess_quietly(**call, output=tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(dataset)


def test_a_done_file_that_changed_is_not_believed(call, tmp_path, dataset, no_faults):
    output = tmp_path / "out"
    faults.plan("before_dataset_files=eio")
    with pytest.raises(UserError):
        preprocess_quietly(**call, output=output)
    faults.plan("")
    done = output / ".work" / "unit-00000001.done"
    text = done.read_text()
    done.write_text(text.replace('"halves": ', '"halves": 1'))
    units = len(list((output / ".work").glob("*.done")))
    assert preprocess_quietly(**call, output=output).units_resumed == units - 1
    assert hashes(output) == hashes(dataset)


def test_a_run_does_not_touch_what_another_finished_meanwhile(call, dataset_copy, monkeypatch):
    before = hashes(dataset_copy)
    monkeypatch.setattr("megatron_polar.data.preprocess.complete_output", lambda *_, **__: None)
    with pytest.raises(UserError, match="another preprocess has just finished here"):
        preprocess_quietly(**call, output=dataset_copy)
    shutil.rmtree(dataset_copy / ".work")
    assert hashes(dataset_copy) == before


def test_a_deep_check_counts_the_documents(dataset_copy):
    Corpus(dataset_copy).verify_hashes()
    content = json.loads((dataset_copy / "manifest.json").read_text())
    content["counts"]["halves"] += 1
    (dataset_copy / "manifest.json").write_bytes(encode_manifest(content))
    with pytest.raises(UserError, match=r"corpus\.bin: has \d+ halves, the manifest \d+; run preprocess again"):
        Corpus(dataset_copy).verify_hashes()
