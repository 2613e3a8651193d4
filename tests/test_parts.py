"""`--part I/N`: an array of jobs makes what one process makes, whatever is killed; and nobody merges beside them."""

import fcntl
import json
import os
import random
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults_data import FORK, hashes, make_record, make_tokenizer, preprocess_quietly, run_child

from megatron_polar import cli
from megatron_polar.data import units
from megatron_polar.data.parts import Part, parse_part
from megatron_polar.data.preprocess_report import PartReport
from megatron_polar.errors import UserError
from megatron_polar.manifest import write_durably
from megatron_polar.policies import sample

NUM_PARTS = 3
NOT_PARTS = ["3/3", "a/b", "-1/4", "0/0", "1/-2", "1", "", "1/2/3", "1/ 2", "0.0/2", "1_0/20", "²/4", "9" * 5000 + "/1"]


@pytest.fixture(scope="module")
def call(tmp_path_factory) -> dict:
    """Arguments of preprocess but for the output: 120 lines in two files, about twenty units, two bad lines."""
    workdir = tmp_path_factory.mktemp("call")
    choose = random.Random(11)
    lines = [json.dumps(make_record(choose)) for _ in range(120)]
    lines[30] = lines[100] = "{broken"
    files = [workdir / "a.jsonl", workdir / "b.jsonl"]
    for file, content in zip(files, (lines[:70], lines[70:]), strict=True):
        file.write_text("\n".join(content))
    size = sum(file.stat().st_size for file in files) // 20
    tokenizer = make_tokenizer(workdir, seed=11)
    return {"inputs": files, "tokenizer_path": tokenizer, "unit_bytes": size, "max_bad_fraction": 0.1}


@pytest.fixture(scope="module")
def dataset(call, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("dataset") / "out"
    preprocess_quietly(**call, output=output)
    return output


@pytest.fixture(scope="module")
def num_units(call, tmp_path_factory) -> int:
    report = preprocess_quietly(**call, output=tmp_path_factory.mktemp("units") / "out", part=Part(0, 1))
    assert report.units_resumed == 0
    return report.units_made


def run_parts(target, arguments: list[tuple]) -> list[int]:
    """Run one process for each tuple, all at the same time; returns their exit statuses."""
    processes = [FORK.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@contextmanager
def lock_held(path: Path, kind: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        fcntl.flock(lock, kind)
        yield


# --- I/N -------------------------------------------------------------------------------------------------------------


def test_parts_share_all_pieces_and_none_twice():
    parts = [parse_part(f"{index}/4") for index in range(4)]
    assert [part for number in range(12) for part in parts if part.holds(number)] == parts * 3
    assert str(parts[3]) == "3/4"


@pytest.mark.parametrize("text", NOT_PARTS)
def test_what_is_no_part_is_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"^part '.*' is not I/N with I from 0 to N-1; four jobs are 0/4") as caught:
        parse_part(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("verb", ["preprocess in.jsonl --tokenizer t.model", "sample --pool pool.yaml"])
@pytest.mark.parametrize("text", ["3/3", "a/b", "-1/4"])
def test_the_command_line_refuses_it_before_it_reads_anything(verb, text, tmp_path, capsys):
    arguments = [*verb.split(), "--output", str(tmp_path / "out"), f"--part={text}"]
    assert cli.main(arguments) == 2
    said = f"error: part {text!r} is not I/N with I from 0 to N-1; four jobs are 0/4, 1/4, 2/4 and 3/4\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "out").exists()


# --- preprocess ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_three_parts_at_once_with_a_kill_and_a_merge_give_the_bytes_of_one_run(
    call, dataset, num_units, tmp_path, num_workers
):
    output = tmp_path / "out"
    again = [{**call, "output": output, "part": Part(index, NUM_PARTS)} for index in range(NUM_PARTS)]
    statuses = run_parts(
        run_child, list(zip(again, ["unit=slow", "after_unit_shard:3=kill", "unit=slow"], strict=True))
    )
    assert statuses == [0, -signal.SIGKILL, 0]
    reports = [preprocess_quietly(**{**arguments, "num_workers": num_workers}) for arguments in again]
    own = [len(range(index, num_units, NUM_PARTS)) for index in range(NUM_PARTS)]
    assert [(report.units_made, report.units_resumed) for report in reports] == [
        (0, own[0]),
        (own[1] - 2, 2),
        (0, own[2]),
    ]
    assert not (output / "manifest.json").exists()
    assert preprocess_quietly(**call, output=output).units_resumed == num_units
    assert hashes(output) == hashes(dataset)


def test_the_merge_makes_what_no_part_has_made(call, dataset, num_units, tmp_path):
    output = tmp_path / "out"
    made = preprocess_quietly(**call, output=output, part=Part(1, 4)).units_made
    assert made == len(range(1, num_units, 4))
    assert preprocess_quietly(**call, output=output).units_resumed == made
    assert hashes(output) == hashes(dataset)


def test_parts_of_two_arrays_fit_together(call, dataset, num_units, tmp_path):
    """The number of parts is no setting: an array that was too small is followed by a larger one."""
    output = tmp_path / "out"
    statuses = run_parts(run_child, [({**call, "output": output, "part": Part(index, 2)}, "") for index in (0, 1)])
    report = preprocess_quietly(**call, output=output, part=Part(4, 5))
    assert (statuses, report.units_made) == ([0, 0], 0)
    assert report.units_resumed == len(range(4, num_units, 5))
    preprocess_quietly(**call, output=output)
    assert hashes(output) == hashes(dataset)


def test_a_part_without_units_is_no_error_and_an_empty_input_is_one(call, num_units, tmp_path):
    report = preprocess_quietly(**call, output=tmp_path / "out", part=Part(num_units, num_units + 1))
    assert (report.units_made, report.units_resumed) == (0, 0)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match="empty input: the one file given holds only blank lines"):
        preprocess_quietly(**{**call, "inputs": [empty]}, output=tmp_path / "empty", part=Part(0, 2))


def test_a_part_neither_keeps_nor_hashes_what_belongs_to_others(call, num_units, tmp_path, monkeypatch):
    hashed, kept = [], []

    class Counting:
        def __init__(self, data=b""):
            self.update(data)

        def update(self, data):
            hashed.append(len(data))

        def hexdigest(self):
            return "0" * 32

    original = units.UnitSource._unit

    def noting(source, index, lines):
        kept.append((index, sum(len(line.data) for _, line in lines)))
        return original(source, index, lines)

    monkeypatch.setattr(units.xxhash, "xxh3_128", Counting)
    monkeypatch.setattr(units.UnitSource, "_unit", noting)
    context = units.UnitContext(Path(), "", "", "sft", 9, tmp_path, ("a", "b"), b"key")
    source = units.UnitSource(call["inputs"], context=context, unit_bytes=call["unit_bytes"], part=Part(2, 6))
    assert [unit.index for unit in source.units()] == [*range(2, num_units, 6)] == [index for index, _ in kept]
    assert source.bytes_read == source.total_bytes
    own = sum(size for _, size in kept)
    assert own < source.total_bytes / 4
    assert sum(hashed) < own + 100 * source.lines_read * len(kept) / num_units + 1000
    assert source.entries == []


def test_a_bad_line_fails_the_part_that_meets_it_and_no_other(call, tmp_path):
    strict = {**call, "max_bad_fraction": 0.0, "output": tmp_path / "out"}
    failed = []
    for index in range(NUM_PARTS * 3):
        try:
            preprocess_quietly(**strict, part=Part(index, NUM_PARTS * 3))
        except UserError as error:
            failed.append(str(error))
    first, second = call["inputs"]
    assert sorted(said.split(": ")[0] for said in failed) == [f"{first}:31", f"{second}:31"]
    with pytest.raises(UserError, match=r"a\.jsonl:31: malformed JSON"):
        preprocess_quietly(**strict)


def test_a_merge_beside_parts_is_refused_and_so_is_a_part_beside_a_merge(call, dataset, tmp_path):
    output = tmp_path / "out"
    with lock_held(output / ".work" / "lock", fcntl.LOCK_SH):
        assert isinstance(preprocess_quietly(**call, output=output, part=Part(0, 2)), PartReport)
        with pytest.raises(UserError) as caught:
            preprocess_quietly(**call, output=output)
        said = f"{output}: parts of preprocess are at work here; run this again when they have ended"
        assert str(caught.value) == said
    with lock_held(output / ".work" / "lock", fcntl.LOCK_EX):
        for part in (None, Part(1, 2)):
            with pytest.raises(UserError, match=r"out: another preprocess writes here; wait for it or choose another"):
                preprocess_quietly(**call, output=output, part=part)
    preprocess_quietly(**call, output=output)
    assert hashes(output) == hashes(dataset)


def test_a_part_leaves_half_written_files_alone_and_the_merge_removes_them(call, dataset, tmp_path):
    output = tmp_path / "out"
    stale = output / ".work" / "unit-00000001.shard.0123.tmp"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another machine")
    preprocess_quietly(**call, output=output, part=Part(0, 2))
    assert stale.read_bytes() == b"of another machine"
    preprocess_quietly(**call, output=output)
    assert hashes(output) == hashes(dataset)


def test_a_part_finds_a_complete_output_and_changes_nothing(call, dataset, tmp_path, capfd):
    output = Path(shutil.copytree(dataset, tmp_path / "out"))
    report = preprocess_quietly(**call, output=output, part=Part(1, 2))
    assert report == PartReport(output, Part(1, 2), already_complete=True, units_made=0, units_resumed=0)
    with pytest.raises(UserError, match="was made with max_response_length=4096, not 9"):
        preprocess_quietly(**call, output=output, part=Part(1, 2), max_response_length=9)
    assert hashes(output) == hashes(dataset)
    (output / "corpus.bin").write_bytes(b"short")
    damaged = hashes(output)
    with pytest.raises(UserError, match=r"corpus\.bin is truncated.*without --part makes the dataset again"):
        preprocess_quietly(**call, output=output, part=Part(1, 2))
    assert hashes(output) == damaged
    preprocess_quietly(**call, output=output)
    assert hashes(output) == hashes(dataset)


def test_a_file_system_without_locks_is_one_line(call, tmp_path, monkeypatch):
    def refuse(handle, kind):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"lock: cannot be locked \(Function not implemented\); .*flock.*-o flock"):
        preprocess_quietly(**call, output=tmp_path / "out", part=Part(1, 2))


def test_the_commands_of_an_array_and_its_merge(call, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["preprocess", *map(str, call["inputs"]), "--output", str(output), "--max-bad-fraction", "0.1"]
    command += ["--tokenizer", str(call["tokenizer_path"])]
    for index, made in ((0, 1), (1, 0)):  # units of the command line have 4 MiB: this input is one
        assert cli.main([*command, "--part", f"{index}/2"]) == 0
        said = f"{output}: part {index}/2: {made} units made, 0 found made already; the same command without --part "
        assert capsys.readouterr().err.splitlines()[-1] == said + "merges all parts"
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main([*command, "--part", "1/2"]) == 0
    said = f"{output}: complete already, made from the same inputs and settings; nothing to do\n"
    assert capsys.readouterr().err == said


# --- sample ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "pool.yaml"
    path.write_text("embedded: {num_policies: 6}\nsampling: {corpus_fraction: 0.2}\n", encoding="utf-8")
    return path


def draw(pool_path: Path, output: Path, **settings):
    settings = {"num_prompts": 200, "prompts_per_shard": 20, **settings}
    return sample.sample_pool(pool_path, prompts=None, output=output, **settings)


def draw_in_child(pool_path: Path, output: Path, part: Part, kill_at: int) -> None:
    """Draw one part; killed in the middle of writing its file number `kill_at`."""
    written = []

    def write(path, content, *, suffix):
        written.append(path)
        if len(written) == kill_at:
            path.with_name(path.name + suffix).write_bytes(content[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        return write_durably(path, content, suffix=suffix)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sample.write_durably = write
    draw(pool_path, output, part=part)
    os._exit(0)


@pytest.fixture(scope="module")
def drawn(pool_path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("drawn") / "out"
    draw(pool_path, output)
    return output


@pytest.mark.parametrize("workers", [1, 2])
def test_three_parts_of_sample_at_once_with_a_kill_give_the_bytes_of_one_call(pool_path, drawn, tmp_path, workers):
    output = tmp_path / "out"
    parts = [Part(index, NUM_PARTS) for index in range(NUM_PARTS)]
    arguments = [(pool_path, output, part, kill_at) for part, kill_at in zip(parts, (0, 3, 0), strict=True)]
    assert run_parts(draw_in_child, arguments) == [0, -signal.SIGKILL, 0]
    assert len(list(output.glob("*.partial"))) == 1
    reports = [draw(pool_path, output, part=part, workers=workers) for part in parts]
    assert [(report.num_shards, report.num_reused) for report in reports] == [(4, 4), (3, 2), (3, 3)]
    assert [report.num_prompts for report in reports] == [80, 60, 60]
    assert not any(report.is_complete for report in reports)
    assert not (output / "manifest.json").exists()
    report = draw(pool_path, output)
    assert (report.num_reused, report.num_shards, report.is_complete) == (10, 10, True)
    assert hashes(output) == hashes(drawn)


def test_sample_without_a_part_draws_what_is_missing(pool_path, drawn, tmp_path):
    assert draw(pool_path, tmp_path / "out", part=Part(1, 4)).num_shards == 3
    assert draw(pool_path, tmp_path / "out").num_reused == 3
    assert hashes(tmp_path / "out") == hashes(drawn)
    assert draw(pool_path, tmp_path / "none", part=Part(10, 11)).num_trajectories == 0


def test_sample_is_refused_beside_its_parts_and_a_part_beside_it(pool_path, drawn, tmp_path):
    output = tmp_path / "out"
    draw(pool_path, output, part=Part(0, 2))
    with lock_held(output / "settings.json", fcntl.LOCK_SH):
        draw(pool_path, output, part=Part(0, 2))
        with pytest.raises(UserError, match=r"out: parts of sample are at work here; run this again when they have"):
            draw(pool_path, output)
    with lock_held(output / "settings.json", fcntl.LOCK_EX):
        for part in (None, Part(1, 2)):
            with pytest.raises(UserError, match=r"out: another sample writes here; wait for it or choose another"):
                draw(pool_path, output, part=part)
    draw(pool_path, output)
    assert hashes(output) == hashes(drawn)


def test_a_part_of_sample_after_completion_changes_nothing(pool_path, drawn, tmp_path, capsys):
    output = Path(shutil.copytree(drawn, tmp_path / "out"))
    report = draw(pool_path, output, part=Part(1, 4))
    assert (report.num_reused, report.is_complete) == (3, True)
    assert "is complete and was made with these settings; nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"other settings \(--seed 1 then, 3 now\); repeat those"):
        draw(pool_path, output, seed=3, part=Part(1, 4))
    assert hashes(output) == hashes(drawn)


def test_of_two_parts_with_other_settings_the_first_decides(pool_path, tmp_path, monkeypatch):
    """Even when both have seen an empty directory."""
    output = tmp_path / "out"
    original = sample._write_unless_there

    def after_another(path, content):
        monkeypatch.setattr(sample, "_write_unless_there", original)
        draw(pool_path, output, seed=2, part=Part(1, 2))
        original(path, content)

    monkeypatch.setattr(sample, "_write_unless_there", after_another)
    with pytest.raises(UserError, match="holds trajectories of other settings"):
        draw(pool_path, output, part=Part(0, 2))
    assert draw(pool_path, output, seed=2).num_reused == 5
    assert not list(output.glob("*.partial"))


def test_the_command_of_a_part_of_sample(pool_path, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["sample", "--pool", str(pool_path), "--num-prompts", "30", "--output", str(output)]
    rest = "; the same command without --part draws what is missing and ends the output"
    for number, count in ((0, 30), (1, 0)):
        assert cli.main([*command, "--part", f"{number}/2"]) == 0
        said = f"{output}: part {number}/2: {5 * count} trajectories for {count} prompts{rest}"
        assert capsys.readouterr().err.splitlines()[-1] == said
    assert cli.main(command) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"{output}: 150 trajectories for 30 prompts"
