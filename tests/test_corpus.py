"""What a dataset gives back, and what it refuses: damage, another tokenizer, a path that is none."""

import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentences import lines

from megatron_polar.data.corpus import Corpus
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.data.tokenizer_training import train_tokenizer
from megatron_polar.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def corpus_copy(sentence_corpus, tmp_path):
    return Path(shutil.copytree(sentence_corpus, tmp_path / "copy"))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_corpus_can_be_sent_to_another_process(sentence_corpus):
    corpus = Corpus(sentence_corpus)
    first = corpus.document(3)
    again = pickle.loads(pickle.dumps(corpus)).document(3)
    assert [half.ids.tolist() for half in again.halves] == [half.ids.tolist() for half in first.halves]


def test_documents_out_of_range_are_an_index_error(sentence_corpus):
    corpus = Corpus(sentence_corpus)
    for index in (-1, len(corpus)):
        with pytest.raises(IndexError):
            corpus.document(index)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_truncated_bin_is_refused_at_open(corpus_copy):
    data = (corpus_copy / "corpus.bin").read_bytes()
    (corpus_copy / "corpus.bin").write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"corpus\.bin is truncated: \d+ bytes instead of \d+; restore"):
        Corpus(corpus_copy)


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.idx", "tokenizer/tokenizer.model"])
def test_missing_and_longer_files_are_refused_at_open(corpus_copy, name):
    path = corpus_copy / name
    data = path.read_bytes()
    path.write_bytes(data + b"\0\0\0\0")
    with pytest.raises(UserError, match=f"{name} is too long"):
        Corpus(corpus_copy)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Corpus(corpus_copy)


def test_a_tampered_manifest_is_refused(corpus_copy):
    path = corpus_copy / "manifest.json"
    original = path.read_text()
    path.write_text(original.replace('"documents": 120', '"documents": 119'))
    with pytest.raises(UserError, match=r"manifest\.json was changed"):
        Corpus(corpus_copy)
    path.write_text(original[: len(original) // 2])
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Corpus(corpus_copy)
    path.write_text("{}")
    with pytest.raises(UserError, match="not the manifest"):
        Corpus(corpus_copy)
    path.unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        Corpus(corpus_copy)


def test_every_flipped_bit_of_the_index_is_noticed_at_open(corpus_copy):
    path = corpus_copy / "corpus.idx"
    original = path.read_bytes()
    choose = random.Random(2)
    for place in [*range(34), *(choose.randrange(len(original)) for _ in range(300))]:
        damaged = bytearray(original)
        damaged[place] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"corpus\.idx"):
            Corpus(corpus_copy)
    path.write_bytes(original)
    Corpus(corpus_copy)


def test_a_flipped_bit_of_the_tokens_is_found_by_verify_and_bad_ids_at_reading(corpus_copy):
    path = corpus_copy / "corpus.bin"
    original = path.read_bytes()
    Corpus(corpus_copy).verify_hashes()
    path.write_bytes(original[:1000] + bytes([original[1000] ^ 1]) + original[1001:])
    with pytest.raises(UserError, match=r"corpus\.bin has SHA-256 \w+\.\.\. instead of"):
        Corpus(corpus_copy).verify_hashes()
    for place, value in ((0, 7), (1, 7), (3, 99), (6, -5), (len(original) // 4 - 1, 400)):
        numbers = np.frombuffer(original, np.int32).copy()
        numbers[place] = value
        path.write_bytes(numbers.tobytes())
        corpus = Corpus(corpus_copy)
        with pytest.raises(UserError, match=r"document \d+ is damaged"):
            corpus.document(0 if place < 100 else len(corpus) - 1)


def test_another_tokenizer_is_refused_with_the_remedy(sentence_corpus, sentence_tokenizer, tmp_path):
    corpus = Corpus(sentence_corpus)
    corpus.check_tokenizer(load_tokenizer(sentence_tokenizer), origin="here")
    corpus.check_tokenizer(load_tokenizer(sentence_corpus / "tokenizer"), origin="here")
    assert corpus.control == load_tokenizer(sentence_tokenizer).control
    other = load_tokenizer(train_tokenizer(lines(50, seed=8), vocab_size=390, output=tmp_path / "other.model"))
    with pytest.raises(UserError) as caught:
        corpus.check_tokenizer(other, origin="there")
    for part in (corpus.manifest["tokenizer"]["fingerprint"][:12], other.fingerprint[:12], "run preprocess again"):
        assert part in str(caught.value)


# --- paths and tools -------------------------------------------------------------------------------------------------


def test_a_path_that_was_mistaken_for_a_dataset_is_told_what_it_is(sentence_corpus, tmp_path):
    run, parent, empty, file = (tmp_path / name for name in ("run", "parent", "empty", "file"))
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run / "data" / "train").mkdir(parents=True)
    empty.mkdir()
    file.write_bytes(b"")
    shutil.copytree(sentence_corpus, parent / "train")
    said = {
        tmp_path / "nowhere": "no such directory; check the path, or make it with megatron-polar preprocess",
        file: "not a directory; check the path",
        run: "a run directory of `train`, no dataset; give a directory that `preprocess` has written",
        parent: f"no dataset itself, but holds some; give {parent / 'train'}",
        empty: "no dataset (manifest.json is missing); give a directory that `preprocess` has written",
    }
    for path, problem in said.items():
        with pytest.raises(UserError) as caught:
            Corpus(path)
        assert str(caught.value) == f"{path}: {problem}"
    (empty / ".work").mkdir()
    with pytest.raises(UserError, match="the directory was never finished"):
        Corpus(empty)


def test_a_progress_line_has_no_eta_before_a_few_percent_are_done(capfd, monkeypatch):
    from megatron_polar import log

    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with log.Progress("verify", total=1000, unit="documents") as bar:
        for done in (1, 28, 1, 20):
            now[0] += 10.0
            bar.advance(done)
    before, *_, at_last, later = capfd.readouterr().err.splitlines()
    assert before == "verify: 1/1000 documents, 0:10 elapsed"
    assert at_last == "verify: 30/1000 documents, 0:30 elapsed, ETA 16:10"
    assert later == "verify: 50/1000 documents, 0:40 elapsed, ETA 12:40"


def test_the_verify_tool_says_what_is_wrong(corpus_copy, sentence_corpus):
    def verify(*paths):
        command = [sys.executable, str(REPOSITORY / "tools" / "verify_dataset.py"), "--deep", *map(str, paths)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    good = verify(corpus_copy)
    assert good.returncode == 0, good.stderr
    assert "120 documents" in good.stdout + good.stderr
    path = corpus_copy / "corpus.bin"
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 4]) + data[101:])
    bad = verify(corpus_copy, corpus_copy / "nowhere", sentence_corpus)
    assert bad.returncode == 2
    assert "corpus.bin has SHA-256" in bad.stderr
    assert f"error: {corpus_copy / 'nowhere'}: no such directory" in bad.stderr
    assert f"{sentence_corpus}: hashes and documents are right" in bad.stderr
    assert "Traceback" not in bad.stderr
