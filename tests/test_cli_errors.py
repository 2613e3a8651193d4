"""Bad input ends with one line that says where, what and how to mend it, exit status 2, and nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_trajectories
from tiny_runs import tiny_config

from megatron_polar import cli
from megatron_polar.config.load import dump_config
from megatron_polar.data.preprocess import preprocess
from megatron_polar.data.tokenizer import train_tokenizer
from megatron_polar.errors import printable

REPOSITORY = Path(__file__).resolve().parents[1]
GOOD = {"prompt": "ba", "trajectories": [{"policy": p, "text": t} for p, t in (("a", "x"), ("a", "y"), ("b", "z"))]}


def test_the_head_of_foreign_text_is_one_printable_line_and_says_when_there_is_more():
    assert printable("x" * 120, limit=120) == "x" * 120
    assert printable("x" * 121, limit=120) == "x" * 120 + "..."
    assert printable(" a\n\tb\x1b[2J\u202e ", limit=60) == "a b\\u001b[2J\\u202e"
    assert printable("x" + " " * 10_000, limit=60) == "x"
    assert printable("x" + " " * 10_000 + "y", limit=60) == "x..."


def run_command(*arguments, **environment) -> subprocess.CompletedProcess:
    """The real command line, in a process of its own and without a launcher's variables."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "megatron_polar", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=clean | environment, timeout=200, check=False
    )


def refused(*arguments, **environment) -> str:
    """The one error line of a command that must be refused."""
    done = run_command(*arguments, **environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0], "the error is the last that is said"
    return errors[0]


def assert_says(line: str, *parts) -> None:
    for part in parts:
        assert str(part) in line, f"{part!r} is not in {line!r}"


@pytest.fixture
def config_file(tmp_path, trajectory_corpus):
    """Write the YAML of a good small run, and return its path."""
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(tiny_config(trajectory_corpus, tmp_path / "run", train__num_steps=1)))
    return path


def group(*policies) -> dict:
    return {"prompt": "ba", "trajectories": [{"policy": p, "text": f"x{i}"} for i, p in enumerate(policies)]}


BAD_LINES = {
    "malformed_json": ('{"prompt": "ba", "trajec', ("malformed JSON", "one JSON object per line")),
    "missing_keys": (json.dumps({"prompt": "ba", "chosen": "x"}), ("missing key 'reference', 'rejected'", "expected")),
    "empty_prompt": (json.dumps(GOOD | {"prompt": " "}), ("'prompt' is empty", "drop the line")),
    "no_same_policy_pair": (
        json.dumps(group("a", "b", "c")),
        ("no policy has two trajectories", "a x1", "sample at least two"),
    ),
    "one_policy_only": (json.dumps(group("a", "a")), ("all trajectories are of one policy", "add at least one")),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_record_is_refused_by_file_and_line(name, tmp_path, tokenizer_path):
    line, parts = BAD_LINES[name]
    source, output = tmp_path / "in.jsonl", tmp_path / "dataset"
    source.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    said = refused("preprocess", source, "--output", output, "--tokenizer", tokenizer_path)
    assert said.startswith(f"error: {source}:3: ")
    assert_says(said, *parts)
    visible = [path.name for path in output.glob("*") if not path.name.startswith(".")]
    assert visible == []


def test_an_unknown_yaml_key_is_refused_with_the_nearest_right_one(config_file, tmp_path):
    config_file.write_text(config_file.read_text().replace("global_batch_size", "global_batchsize"))
    said = refused("train", config_file)
    assert_says(said, config_file, "train.global_batchsize", "did you mean train.global_batch_size?")
    assert not (tmp_path / "run").exists()


def test_a_tensor_parallel_size_that_does_not_divide_the_heads_is_refused(config_file, tmp_path):
    said = refused("train", config_file, "parallel.tensor_model_parallel_size=4")
    assert_says(said, "parallel.tensor_model_parallel_size=4", "model.num_query_groups=2", "use 1, 2")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_the_control_tokens_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ba ke li mo nu ra si to ve zo"] * 50),
        model_prefix=str(tmp_path / "plain"),
        vocab_size=20,
        minloglevel=2,
    )
    source, output = tmp_path / "in.jsonl", tmp_path / "dataset"
    source.write_text(json.dumps(GOOD) + "\n")
    said = refused("preprocess", source, "--output", output, "--tokenizer", tmp_path / "plain.model")
    assert_says(said, tmp_path / "plain.model", "<|reward|>", "separator")
    assert not output.exists()


def test_a_world_size_that_does_not_fit_is_refused(config_file, tmp_path):
    said = refused("train", config_file, "parallel.tensor_model_parallel_size=2")
    assert_says(said, "world size 1", "(2 x 1 x 1)", "a multiple of 2 ranks", "torchrun --nproc-per-node")
    assert not (tmp_path / "run").exists()


def test_a_dataset_made_with_another_tokenizer_is_refused(config_file, tmp_path):
    other = train_tokenizer(["quite other words"] * 50, vocab_size=290, output=tmp_path / "other.model")
    source = write_trajectories(tmp_path / "in.jsonl", num_prompts=8, seed=9)
    preprocess([source], output=tmp_path / "other", tokenizer_path=other)
    said = refused("train", config_file, f"data.validation=[{{path: {tmp_path / 'other'}}}]")
    assert_says(said, tmp_path / "other", "made with tokenizer", "run preprocess again")
    assert not (tmp_path / "run").exists()


def test_a_truncated_bin_is_refused(config_file, tmp_path, tokenizer_path):
    source = write_trajectories(tmp_path / "in.jsonl", num_prompts=8, seed=9)
    preprocess([source], output=tmp_path / "short", tokenizer_path=tokenizer_path)
    tokens = tmp_path / "short" / "corpus.bin"
    size = tokens.stat().st_size
    os.truncate(tokens, size - 4)
    said = refused("train", config_file, f"data.train=[{{path: {tmp_path / 'short'}}}]")
    assert_says(said, tokens, "truncated", f"{size - 4} bytes", size, "run preprocess again")
    assert not (tmp_path / "run").exists()


# --- the other commands, in this process: none of them gets as far as torch -------------------------------------------


def refused_here(capsys, *arguments) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert shown.err.splitlines()[-1:] == errors
    return errors[0]


def test_missing_files_are_refused_by_name(tmp_path, tokenizer_path, capsys):
    missing, out = tmp_path / "missing", tmp_path / "out"
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(GOOD) + "\n")
    for arguments in (
        ("train", missing),
        ("preprocess", missing, "--output", out, "--tokenizer", tokenizer_path),
        ("preprocess", source, "--output", out, "--tokenizer", missing),
        ("train-tokenizer", missing, "--output", out),
        ("evaluate", "--checkpoint", missing, "--suite", "preferences", "--data", missing, "--output", out),
        ("score", "--checkpoint", missing, "--input", missing, "--output", out),
        ("sample", "--pool", missing, "--output", out),
    ):
        assert_says(refused_here(capsys, *arguments), missing)
        assert not out.exists()


def test_a_report_heading_without_a_directory_is_refused(tmp_path, capsys):
    assert_says(refused_here(capsys, "report", tmp_path, "--evaluation", "accuracy"), "'accuracy'", "HEADING=DIR")


def test_a_suite_of_another_name_is_refused_with_the_known_ones(tmp_path, capsys):
    said = refused_here(
        capsys, "evaluate", "--checkpoint", tmp_path, "--suite", "mmlu", "--data", tmp_path, "--output", tmp_path / "o"
    )
    assert_says(said, "mmlu", "preferences", "gsm8k", "rmb")


def test_a_dry_run_prints_the_resolved_configuration_and_starts_nothing(config_file, tmp_path, capsys):
    assert cli.main(["train", str(config_file), "train.global_batch_size=16", "--dry-run"]) == 0
    assert "global_batch_size: 16" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


class Loaded:
    """In the place of a module that takes long to load: each of its functions ends as by Ctrl-C."""

    def __init__(self, *sentence):
        self.sentence = sentence

    def __getattr__(self, name):
        def interrupted(*arguments, **options):
            raise KeyboardInterrupt(*self.sentence)

        return interrupted


@pytest.mark.parametrize(
    ("verb", "module", "sentence", "said"),
    [
        ("train", "train.run", (), "interrupted: nothing is lost, the same command goes on from here"),
        ("train", "train.run", ("interrupted after step 2",), "interrupted after step 2"),
        ("preprocess", "data.preprocess", (), "interrupted: nothing is lost, the same command goes on from here"),
        ("sample", "policies.sample", (), "interrupted: nothing is lost, the same command goes on from here"),
        ("score", "score.score_file", (), "interrupted"),
        ("evaluate", "score.suites", (), "interrupted"),
    ],
)
def test_ctrl_c_is_one_line_of_the_first_rank(verb, module, sentence, said, config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, f"megatron_polar.{module}", Loaded(*sentence))
    arguments = {
        "train": [config_file],
        "preprocess": ["in.jsonl", "--output", "out", "--tokenizer", "t.model"],
        "sample": ["--pool", "pool.yaml", "--output", "out"],
        "score": ["--checkpoint", "run", "--input", "in.jsonl", "--output", "out.jsonl"],
        "evaluate": ["--checkpoint", "run", "--suite", "preferences", "--data", "in.jsonl", "--output", "out"],
    }[verb]
    command = [verb, *map(str, arguments)]
    assert cli.main(command) == 130
    start = ["starting: loading torch and megatron-core"] * (verb == "train")
    assert capsys.readouterr().err.splitlines() == [*start, said]
    monkeypatch.setenv("RANK", "1")
    assert cli.main(command) == 130
    assert capsys.readouterr().err == ""


def test_overrides_may_stand_behind_an_option_and_other_leftovers_are_refused(tmp_path, capsys):
    from megatron_polar import cli

    config = tmp_path / "run.yaml"
    config.write_text(
        "run: {directory: r}\nmodel: {preset: nano}\ndata: {train: [{path: d}]}\n"
        "train: {global_batch_size: 8, num_steps: 3}\noptimizer: {lr: 1e-3}\n"
    )
    assert cli.main(["train", str(config), "--dry-run", "train.num_steps=5"]) == 0
    assert "num_steps: 5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["train", str(config), "--dry-run", "--no-such-option"])
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err
