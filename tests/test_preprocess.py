"""What preprocess writes: the same bytes after kills, with any number of workers; and bad lines by their place."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import zstandard
from faults_data import hashes
from sentences import UNIT_BYTES, lines, write_lines
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_polar.data.corpus import Corpus, preprocess
from megatron_polar.data.parts import Part
from megatron_polar.data.template import encode_half
from megatron_polar.data.tokenizer import REWARD_TOKEN, SEPARATOR_TOKEN, load_tokenizer
from megatron_polar.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def all_records(directory):
    read = {
        ".jsonl": Path.read_bytes,
        ".gz": lambda path: gzip.decompress(path.read_bytes()),
        ".zst": lambda path: zstandard.ZstdDecompressor().decompress(path.read_bytes()),
    }
    for path in sorted(directory.iterdir()):
        yield from (json.loads(line) for line in read[path.suffix](path).decode().splitlines())


# --- what is written -------------------------------------------------------------------------------------------------


def test_documents_hold_the_halves_of_their_records(sentence_corpus, sentence_files, sentence_tokenizer):
    corpus, tokenizer = Corpus(sentence_corpus), load_tokenizer(sentence_tokenizer)
    records = list(all_records(sentence_files))
    assert len(corpus) == len(records) == 120
    for index, source in enumerate(records):
        document = corpus.document(index)
        wrapper = source.get("wrapper", "sft")
        if "trajectories" in source:
            answers = [trajectory["text"] for trajectory in source["trajectories"]]
            names = [corpus.policies[id] for id in document.policy_ids]
            assert names == [trajectory["policy"] for trajectory in source["trajectories"]]
        else:
            answers = [source["reference"], *source["ranked"]]
            assert document.policy_ids.tolist() == [-1] * len(answers)
        assert document.kind == ("trajectories" if "trajectories" in source else "preference")
        assert document.wrapper == wrapper
        for half, answer in zip(document.halves, answers, strict=True):
            expected = encode_half(
                tokenizer, prompt=source["prompt"], trajectory=answer, wrapper=wrapper, max_response_length=4096
            )
            assert half.ids.tolist() == expected.ids.tolist()
            assert half.prompt_length == expected.prompt_length


def test_policies_are_numbered_by_first_appearance(sentence_corpus, sentence_files):
    seen = dict.fromkeys(
        item["policy"] for source in all_records(sentence_files) for item in source.get("trajectories", [])
    )
    assert Corpus(sentence_corpus).policies == tuple(seen)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(
    sentence_corpus, sentence_files, sentence_tokenizer, tmp_path, num_workers
):
    output = tmp_path / "out"
    preprocess(
        [sentence_files],
        output=output,
        tokenizer_path=sentence_tokenizer,
        num_workers=num_workers,
        unit_bytes=UNIT_BYTES,
    )
    assert hashes(output) == hashes(sentence_corpus)
    assert not (output / ".work").exists()


def test_the_size_of_work_units_does_not_show_in_the_output(
    sentence_corpus, sentence_files, sentence_tokenizer, tmp_path
):
    preprocess([sentence_files], output=tmp_path / "out", tokenizer_path=sentence_tokenizer)
    assert hashes(tmp_path / "out") == hashes(sentence_corpus)


def test_files_equal_those_of_megatrons_own_builder(sentence_corpus, tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    theirs = IndexedDataset(str(sentence_corpus / "corpus"))
    builder = IndexedDatasetBuilder(str(tmp_path / "built.bin"), dtype=np.int32)
    for first, last in zip(theirs.document_indices[:-1], theirs.document_indices[1:], strict=True):
        for sequence in theirs[int(first) : int(last)]:
            builder.add_item(torch.from_numpy(sequence.copy()))
        builder.end_document()
    builder.finalize(str(tmp_path / "built.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"built.{suffix}").read_bytes() == (sentence_corpus / f"corpus.{suffix}").read_bytes()


def test_a_hugging_face_tokenizer_works_in_workers_and_travels_with_the_dataset(sentence_files, tmp_path):
    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(lines(50, seed=1), trainer)
    fast.add_special_tokens([SEPARATOR_TOKEN, REWARD_TOKEN])
    (tmp_path / "fast").mkdir()
    fast.save(str(tmp_path / "fast" / "tokenizer.json"))
    outputs = [tmp_path / "one", tmp_path / "two"]
    for num_workers, output in enumerate(outputs, start=1):
        preprocess(
            [sentence_files],
            output=output,
            tokenizer_path=tmp_path / "fast",
            num_workers=num_workers,
            unit_bytes=UNIT_BYTES,
        )
    assert hashes(outputs[0]) == hashes(outputs[1])
    corpus, tokenizer = Corpus(outputs[0]), load_tokenizer(outputs[0] / "tokenizer")
    corpus.check_tokenizer(tokenizer, origin="here")
    source = next(all_records(sentence_files))
    first = corpus.document(0).halves[0]
    between = "\n" if source["wrapper"] == "sft" else ""
    text = source["prompt"] + between + source["trajectories"][0]["text"]
    assert tokenizer.decode(first.ids) == text
    assert first.ids.tolist() == fast.encode(text).ids


def test_the_manifest_counts_what_was_done(sentence_tokenizer, tmp_path):
    long, cut_to = "dog " * 50, 10
    tokenizer = load_tokenizer(sentence_tokenizer)
    group = [("a", long), ("a", "cat"), ("a", "cat"), ("b", "cat"), ("b", long), ("b", "dog 7")]
    items = [{"policy": policy, "text": answer} for policy, answer in group]
    path = write_lines(
        tmp_path / "in.jsonl",
        [
            json.dumps({"prompt": "p", "trajectories": items}),
            json.dumps({"prompt": "p", "reference": "r", "ranked": ["1", "2", "1"]}),
        ],
    )
    report = preprocess([path], output=tmp_path / "out", tokenizer_path=sentence_tokenizer, max_response_length=cut_to)
    corpus = Corpus(tmp_path / "out")
    counts = corpus.manifest["counts"]
    halves = [half for index in range(2) for half in corpus.document(index).halves]
    expected = {
        "lines": 2,
        "bad_lines": 0,
        "documents": 2,
        "trajectory_groups": 1,
        "preferences": 1,
        "halves": 6,
        "tokens": sum(len(half.ids) for half in halves),
        "responses_cut": 1,
        "response_tokens_cut": len(tokenizer.encode(long)) - cut_to,
        "duplicate_trajectories": 1,
        "duplicate_candidates": 1,
        "identical_candidates": 2,
    }
    assert counts == expected
    invariants = corpus.manifest["invariants"]
    assert invariants["longest_half"] == max(len(half.ids) for half in halves)
    assert invariants["longest_response"] == max(len(half.ids) - half.prompt_length for half in halves)
    assert invariants["longest_prompt"] == halves[0].prompt_length
    assert (report.tokens, report.policies) == (expected["tokens"], 2)
    assert (report.duplicates_dropped, report.identical_candidates) == (2, 2)


def test_no_path_of_the_machine_is_in_the_dataset(sentence_corpus, sentence_files):
    for path in sentence_corpus.rglob("*"):
        if path.is_file():
            assert str(sentence_files).encode() not in path.read_bytes()


def test_the_fingerprint_depends_on_the_content_and_not_on_names(
    sentence_corpus, sentence_files, sentence_tokenizer, tmp_path
):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for index, path in enumerate(sorted(sentence_files.iterdir())):
        shutil.copy(path, renamed / f"{index}{''.join(path.suffixes)}")
    same, less = tmp_path / "same", tmp_path / "less"
    preprocess([renamed], output=same, tokenizer_path=sentence_tokenizer)
    preprocess([renamed / "0.jsonl.gz"], output=less, tokenizer_path=sentence_tokenizer)
    assert Corpus(same).fingerprint == Corpus(sentence_corpus).fingerprint != Corpus(less).fingerprint


# --- again, killed, resumed ------------------------------------------------------------------------------------------


def test_a_complete_output_is_left_alone_and_another_call_is_refused(sentence_files, sentence_tokenizer, tmp_path):
    output = tmp_path / "out"
    files = [Path(shutil.copytree(sentence_files, tmp_path / "in"))]
    call = {"output": output, "tokenizer_path": sentence_tokenizer, "unit_bytes": UNIT_BYTES}
    first = preprocess(files, **call)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = preprocess(files, **call)
    assert (first.already_complete, again.already_complete) == (False, True)
    assert again.tokens == first.tokens
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(UserError, match="max_response_length=4096, not 9"):
        preprocess(files, **call, max_response_length=9)
    with pytest.raises(UserError, match="another tokenizer"):
        preprocess(files, **call, separator_token=REWARD_TOKEN, reward_token=SEPARATOR_TOKEN)
    plain = tmp_path / "in" / "b.jsonl"
    plain.write_bytes(plain.read_bytes().replace(b"cat", b"dog"))
    with pytest.raises(UserError, match=r"other content of .*b\.jsonl"):
        preprocess(files, **call)
    write_lines(tmp_path / "in" / "d.jsonl", lines(1, seed=9))
    with pytest.raises(UserError, match="other inputs"):
        preprocess(files, **call)


def test_every_difference_to_the_call_that_made_an_output_is_named(sentence_files, sentence_tokenizer, tmp_path):
    source = Path(shutil.copytree(sentence_files, tmp_path / "in"))
    call = {"output": tmp_path / "out", "tokenizer_path": sentence_tokenizer}
    preprocess([source], **call)

    def refusal(files=(source,), **changes):
        with pytest.raises(UserError) as caught:
            preprocess(files, **call, **changes)
        return str(caught.value)

    reverse = sorted(source.iterdir(), reverse=True)
    assert "was made with other inputs (in another order); choose" in refusal(reverse)
    gone, longer = (source / name for name in ("a.jsonl.gz", "b.jsonl"))
    was = gone.stat().st_size, longer.stat().st_size
    gone.unlink()
    write_lines(longer, lines(1, seed=9))
    changes = {"wrapper": "pretrain", "max_response_length": 9, "max_bad_fraction": 0.5}
    said = refusal(**changes, separator_token=REWARD_TOKEN, reward_token=SEPARATOR_TOKEN)
    for part in (
        "wrapper='sft', not 'pretrain'; max_response_length=4096, not 9; max_bad_fraction=0.0, not 0.5; another tok",
        f"separator_token='{SEPARATOR_TOKEN}', not '{REWARD_TOKEN}'; reward_token=",
        f"only then: 'a.jsonl.gz' of {was[0]} bytes, 'b.jsonl' of {was[1]} bytes; only now: 'b.jsonl' of ",
    ):
        assert part in said
    shutil.rmtree(source)
    shutil.copytree(sentence_files, source)
    for path in source.glob("[bc].*"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    assert f"was made with other content of {source / 'b.jsonl'}, {source / 'c.jsonl.zst'}; choose" in refusal()


def start(inputs, *, output, tokenizer_path, num_workers):
    code = (
        "import sys; from pathlib import Path; from megatron_polar.data.corpus import preprocess\n"
        "if __name__ == '__main__':\n"
        f"    preprocess([{str(inputs)!r}], output={str(output)!r}, tokenizer_path={str(tokenizer_path)!r},"
        f" num_workers={num_workers}, unit_bytes={UNIT_BYTES})\n"
    )
    script = output.with_suffix(".py")
    script.write_text(code)
    return subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


@pytest.mark.parametrize("num_workers", [1, 2])
def test_killed_runs_resume_to_the_same_bytes(sentence_tokenizer, tmp_path, num_workers):
    source = write_lines(tmp_path / "in.jsonl", lines(2500, seed=5))
    expected, output = tmp_path / "expected", tmp_path / "out"
    preprocess([source], output=expected, tokenizer_path=sentence_tokenizer, unit_bytes=UNIT_BYTES)
    for wanted in (20, 90):
        process = start(source, output=output, tokenizer_path=sentence_tokenizer, num_workers=num_workers)
        while len(list((output / ".work").glob("*.done"))) < wanted:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        workers = [child.pid for child in psutil.Process(process.pid).children()]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (output / "manifest.json").exists()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers), "workers outlive their parent"
    # A shard that a kill left half written must not be believed.
    shard = sorted((output / ".work").glob("*.shard"))[3]
    shard.write_bytes(shard.read_bytes()[:-7])
    (output / ".work" / "unit-00000004.done").write_bytes(b'{"unit": ')
    done = len(list((output / ".work").glob("*.done")))
    report = preprocess([source], output=output, tokenizer_path=sentence_tokenizer, unit_bytes=UNIT_BYTES)
    assert done - 3 <= report.units_resumed <= done - 2
    assert hashes(output) == hashes(expected)


def test_units_of_other_input_or_settings_are_not_reused(sentence_tokenizer, tmp_path):
    content = lines(60, seed=6)
    source = write_lines(tmp_path / "in.jsonl", [*content, "{broken"])
    call = {"output": tmp_path / "out", "tokenizer_path": sentence_tokenizer, "unit_bytes": UNIT_BYTES}
    with pytest.raises(UserError, match=r"in\.jsonl:61: malformed JSON"):
        preprocess([source], **call)
    # The broken line is mended, and one line in the middle changes as well.
    content[30] = content[30].replace("the", "one")
    write_lines(source, content)
    report = preprocess([source], **call)
    units = 1 + sum(map(len, content)) // UNIT_BYTES
    assert 0 < report.units_resumed < units
    fresh = tmp_path / "fresh"
    preprocess([source], **{**call, "output": fresh})
    assert hashes(tmp_path / "out") == hashes(fresh)


def test_two_runs_do_not_write_the_same_output(sentence_files, sentence_tokenizer, tmp_path):
    import fcntl

    (tmp_path / "out" / ".work").mkdir(parents=True)
    with (tmp_path / "out" / ".work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another preprocess writes here"):
            preprocess([sentence_files], output=tmp_path / "out", tokenizer_path=sentence_tokenizer)


# --- bad input -------------------------------------------------------------------------------------------------------


GOOD = json.dumps({"prompt": "p", "reference": "r", "chosen": "1", "rejected": "2"})
BAD_LINES = {
    "malformed": b'{"prompt": ',
    "missing keys": b'{"prompt": "p", "chosen": "1"}',
    "empty prompt": b'{"prompt": "", "reference": "r", "chosen": "1", "rejected": "2"}',
    "no same-policy pair": b'{"prompt": "p", "trajectories": [{"policy": "a", "text": "1"}]}',
    "duplicates only": b'{"prompt": "p", "reference": "r", "chosen": "1", "rejected": "1"}',
    "not UTF-8": b'{"prompt": "caf\xe9"}',
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_bad_line_stops_the_run_with_its_place(sentence_tokenizer, tmp_path, name, num_workers):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode()] * 3 + [BAD_LINES[name], b"also bad"]))
    with pytest.raises(UserError) as caught:
        preprocess(
            [path], output=tmp_path / "out", tokenizer_path=sentence_tokenizer, num_workers=num_workers, unit_bytes=40
        )
    assert str(caught.value).startswith(f"{path}:4: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_an_empty_input_is_an_error(sentence_tokenizer, tmp_path, content):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    other = tmp_path / "b.jsonl"
    other.write_bytes(b"")
    for files, given in (([path], "the one file given holds"), ([path, other], "all 2 files given hold")):
        with pytest.raises(UserError, match=rf"in\.jsonl: empty input: {given} only blank lines or nothing; check"):
            preprocess(files, output=tmp_path / "out", tokenizer_path=sentence_tokenizer)


def test_a_warning_counts_quarantined_lines_and_says_why_most_often(sentence_tokenizer, tmp_path, capfd):
    path, output = tmp_path / "in.jsonl", tmp_path / "out"
    names = ["empty prompt", "not UTF-8", "malformed", "not UTF-8", "malformed", "malformed"]
    path.write_bytes(b"\n".join([GOOD.encode()] + [b" " * place + BAD_LINES[name] for place, name in enumerate(names)]))
    preprocess([path], output=output, tokenizer_path=sentence_tokenizer, max_bad_fraction=0.9)
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == (
        f"warning: {output / 'quarantine.ndjson'}: 6 of 7 lines are not in the dataset; most often: malformed JSON "
        "(3 times), not UTF-8 (2 times)"
    )


def test_allowed_bad_lines_are_quarantined_with_place_reason_and_hash(sentence_tokenizer, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode()] * 8 + [BAD_LINES["empty prompt"], BAD_LINES["not UTF-8"]]))
    report = preprocess(
        [path], output=tmp_path / "out", tokenizer_path=sentence_tokenizer, max_bad_fraction=0.2, unit_bytes=100
    )
    assert (report.documents, report.bad_lines) == (8, 2)
    entries = [json.loads(line) for line in (tmp_path / "out" / "quarantine.ndjson").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in entries] == [("in.jsonl", 9), ("in.jsonl", 10)]
    content = path.read_bytes()
    assert [entry["byte_offset"] for entry in entries] == [
        content.index(BAD_LINES[n]) for n in ("empty prompt", "not UTF-8")
    ]
    assert entries[1]["sha256"] == hashlib.sha256(BAD_LINES["not UTF-8"]).hexdigest()
    assert "'prompt' is empty" in entries[0]["reason"]
    assert "quarantine.ndjson" in Corpus(tmp_path / "out").manifest["files"]


def test_an_input_of_no_records_is_said_to_be_that(sentence_tokenizer, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(BAD_LINES["empty prompt"])
    with pytest.raises(UserError, match=r"quarantine\.ndjson: says why none of the 1 lines can be used"):
        preprocess([path], output=tmp_path / "out", tokenizer_path=sentence_tokenizer, max_bad_fraction=1.0)


def test_an_output_below_its_input_goes_on_and_is_no_input(sentence_tokenizer, tmp_path):
    """Its quarantine and work files are not called .jsonl."""
    path, output = tmp_path / "in" / "a.jsonl", tmp_path / "in" / "tok"
    path.parent.mkdir()
    path.write_bytes(b"\n".join([GOOD.encode()] * 8 + [BAD_LINES["empty prompt"]] * 2))
    call = {"output": output, "tokenizer_path": sentence_tokenizer}
    with pytest.raises(UserError, match="2 bad lines of 10"):
        preprocess([path.parent], **call, max_bad_fraction=0.1)
    for already in (False, True):
        assert preprocess([path.parent], **call, max_bad_fraction=0.5).already_complete is already
    report = preprocess([path.parent], output=tmp_path / "b", tokenizer_path=sentence_tokenizer, max_bad_fraction=0.5)
    assert report.lines == 10


def test_a_check_finds_what_the_call_would_be_refused_for(sentence_files, sentence_tokenizer, tmp_path, capfd):
    output = tmp_path / "out"
    call = {"output": output, "tokenizer_path": sentence_tokenizer}
    twice = [sentence_files, sentence_files / "b.jsonl"]
    with pytest.raises(UserError, match="given twice as input"):
        preprocess(twice, **call, check=True)
    preprocess([sentence_files], **call)
    with pytest.raises(UserError, match="was made with wrapper='sft', not 'pretrain'"):
        preprocess([sentence_files], **call, wrapper="pretrain", check=True)
    assert preprocess([sentence_files], **call, check=True) is None
    (output / "corpus.bin").write_bytes(b"")
    assert preprocess([sentence_files], **call, check=True) is None  # the call would make it again
    assert (output / "manifest.json").is_file()


def test_a_quarantine_under_its_old_name_is_known_and_replaced(sentence_tokenizer, tmp_path):
    path, output = tmp_path / "in.jsonl", tmp_path / "out"
    path.write_bytes(b"\n".join([GOOD.encode()] * 8 + [BAD_LINES["empty prompt"]] * 2))
    output.mkdir()
    (output / "quarantine.jsonl").write_text("{}\n")
    preprocess([path], output=output, tokenizer_path=sentence_tokenizer, max_bad_fraction=0.5)
    assert sorted(p.name for p in output.iterdir() if p.name.startswith("quarantine")) == ["quarantine.ndjson"]


def test_work_begun_by_other_rules_is_begun_again(sentence_files, sentence_tokenizer, tmp_path, monkeypatch):
    call = {"output": tmp_path / "out", "tokenizer_path": sentence_tokenizer, "unit_bytes": UNIT_BYTES}
    monkeypatch.setattr("megatron_polar.data.preprocess.RULES_VERSION", 1)
    assert preprocess([sentence_files], **call, part=Part(0, 1)).units_made > 1
    monkeypatch.undo()
    assert preprocess([sentence_files], **call).units_resumed == 0


def test_too_many_bad_lines_fail_and_leave_the_quarantine(sentence_tokenizer, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode()] * 8 + [BAD_LINES["empty prompt"]] * 2))
    call = {"output": tmp_path / "out", "tokenizer_path": sentence_tokenizer}
    with pytest.raises(UserError, match=r"2 bad lines of 10 \(20\.00%\), more than max_bad_fraction=0\.1"):
        preprocess([path], **call, max_bad_fraction=0.1)
    assert len((tmp_path / "out" / "quarantine.ndjson").read_text().splitlines()) == 2
    assert not (tmp_path / "out" / "manifest.json").exists()
    write_lines(path, [GOOD] * 10)
    preprocess([path], **call)
    assert not (tmp_path / "out" / "quarantine.ndjson").exists()


def test_arguments_without_meaning_are_refused(sentence_files, sentence_tokenizer, tmp_path):
    for wrong in ({"num_workers": 0}, {"wrapper": "chat"}, {"max_response_length": 0}, {"max_bad_fraction": 1.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            preprocess([sentence_files], output=tmp_path / "out", tokenizer_path=sentence_tokenizer, **wrong)
    with pytest.raises(UserError, match="given twice"):
        preprocess(
            [sentence_files, sentence_files / "b.jsonl"], output=tmp_path / "out", tokenizer_path=sentence_tokenizer
        )


def test_a_misspelt_key_is_named_and_the_line_is_used(sentence_tokenizer, tmp_path, capsys):
    record = {"prompt": "the cat", "reference": "sat down", "chosen": "sat", "rejected": "ran", "id": 1}
    texts = [json.dumps(record), json.dumps(record | {"wraper": "pretrain"}), json.dumps(record | {"wraper": 1})]
    (tmp_path / "in.jsonl").write_text("\n".join(texts))
    preprocess([tmp_path / "in.jsonl"], output=tmp_path / "out", tokenizer_path=sentence_tokenizer)
    (warned,) = [said for said in capsys.readouterr().err.splitlines() if "has no effect" in said]
    assert "in.jsonl:2: key 'wraper' has no effect; 'wrapper' would have one" in warned
    assert len(Corpus(tmp_path / "out")) == 3


# --- what it needs ---------------------------------------------------------------------------------------------------


def measure(source, *, output, tokenizer_path, num_workers):
    """The figures of a preprocess run in a process of its own: the benchmark's."""
    program = REPOSITORY / "benchmarks" / "preprocess.py"
    paths = ["--input", source, "--measure-into", output, "--tokenizer", tokenizer_path]
    command = [sys.executable, program, *paths, "--workers", num_workers, "--unit-bytes", 100_000]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [str(part) for part in command]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True).stdout)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_memory_does_not_grow_with_ten_times_the_input(sentence_tokenizer, tmp_path, num_workers):
    content = lines(2500, seed=7)
    small = write_lines(tmp_path / "small.jsonl", content)
    large = write_lines(tmp_path / "large.jsonl", content * 10)
    once, ten_times = (
        measure(path, output=tmp_path / path.stem, tokenizer_path=sentence_tokenizer, num_workers=num_workers)
        for path in (small, large)
    )
    assert ten_times["tokens"] == 10 * once["tokens"]
    for peak in ("peak_parent_megabytes", "peak_worker_megabytes"):
        assert (once[peak] > 0) == (num_workers > 1 or "parent" in peak)
        assert ten_times[peak] <= 1.25 * once[peak]
    # The bound means something: holding the input alone would break it.
    assert large.stat().st_size / 1e6 > 0.25 * once["peak_parent_megabytes"]


def test_preprocess_needs_no_torch(sentence_files, sentence_tokenizer, tmp_path):
    code = (
        "import sys; from megatron_polar.data.corpus import Corpus, preprocess\n"
        f"call = {{'output': {str(tmp_path / 'o')!r}, 'tokenizer_path': {str(sentence_tokenizer)!r}}}\n"
        f"preprocess([{str(sentence_files)!r}], **call)\n"
        f"Corpus({str(tmp_path / 'o')!r})\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True)
