"""Bad input ends with one line that says where, what and how to mend it, exit status 2, and nothing half-written."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_trajectories
from tiny_runs import tiny_config

from megatron_polar import cli, outputs
from megatron_polar.config.load import dump_config
from megatron_polar.data.corpus import Corpus
from megatron_polar.data.preprocess import preprocess
from megatron_polar.data.tokenizer_training import train_tokenizer
from megatron_polar.errors import UserError, printable

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


# --- the other commands, in this process: none of them gets as far as torch ------------------------------------------


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


def test_an_evaluation_is_not_written_into_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.html").write_text("of the training")
    evaluate = ("evaluate", "--checkpoint", run, "--suite", "mmlu", "--data", tmp_path, "--output", run)
    said = refused_here(capsys, *evaluate)
    assert_says(said, f"{run}: is not empty, and no earlier evaluation", f"such as {run / 'evaluate'}")
    (run / "rewards.jsonl").write_text("")
    assert_says(refused_here(capsys, *evaluate), "mmlu")  # an earlier evaluation gives way


def test_scores_are_not_written_over_what_is_scored(tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "p", "reference": "r", "output": "o"}\n')
    said = refused_here(capsys, "score", "--checkpoint", tmp_path, "--input", lines, "--output", lines)
    assert_says(said, f"{lines}: is one of the files to score")
    said = refused_here(capsys, "score", "--checkpoint", tmp_path, "--input", tmp_path, "--output", lines)
    assert_says(said, f"{lines}: is one of the files to score")
    said = refused_here(capsys, "score", "--checkpoint", tmp_path, "--input", tmp_path / "line.jsonl", "--output", "o")
    assert_says(said, f"{tmp_path / 'line.jsonl'}: no such file; check the path")


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


def test_another_python_is_told_by_the_module_that_it_lacks(config_file, monkeypatch, capsys):
    class Lacking(Loaded):
        def __getattr__(self, name):
            raise ModuleNotFoundError("No module named 'omegaconf'", name="omegaconf")

    monkeypatch.setitem(sys.modules, "megatron_polar.config.load", Lacking())
    assert cli.main(["train", str(config_file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sys.executable} has no module 'omegaconf'; use the environment that has it")


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
    with pytest.raises(SystemExit):  # not --gpus-per-node
        cli.main(["plan", str(config), "--gpus", "64"])
    assert "unrecognized arguments: --gpus 64" in capsys.readouterr().err


# --- places to write to, asked before the work -----------------------------------------------------------------------


@pytest.fixture
def taken(tmp_path):
    """A file where a directory is wanted."""
    path = tmp_path / "mine.yaml"
    path.write_text("a: 1\n")
    return path


def test_a_file_in_the_place_of_an_output_is_refused_before_anything_is_read(taken, tmp_path, capsys):
    missing, below = tmp_path / "missing", taken / "x"
    score = ("score", "--checkpoint", missing, "--input", missing, "--output")
    evaluate = ("evaluate", "--checkpoint", missing, "--suite", "preferences", "--data", missing, "--output")
    from_hf = ("convert", "from-hf", "--model", missing, "--output")
    to_hf = ("convert", "to-hf", "--checkpoint", missing, "--layout", "internlm2", "--output")
    sample = ("sample", "--pool", missing, "--num-prompts", 3, "--output")
    preprocess_ = ("preprocess", missing, "--tokenizer", missing, "--output")
    for verb in (evaluate, from_hf, to_hf, sample, preprocess_):
        said = refused_here(capsys, *verb, taken)
        assert said == f"error: {taken}: is a file, and --output is a directory to write into; choose another one"
        assert_says(refused_here(capsys, *verb, below), f"{taken}: is a file, so nothing can be written below it")
    for verb in (score, ("train-tokenizer", missing, "--output")):
        assert_says(refused_here(capsys, *verb, below), f"{taken}: is a file, so nothing can be written below it")
        said = refused_here(capsys, *verb, tmp_path)
        assert said == f"error: {tmp_path}: is a directory, and --output is a file to write; give a file's name"
        assert_says(refused_here(capsys, *verb, "/dev/null"), "/dev/null: is a device, a pipe or a socket")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for verb in (score, evaluate):
        assert_says(refused_here(capsys, *verb, tmp_path / "dangling"), "is a link to nothing")
    assert taken.read_text() == "a: 1\n"


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_file_in_the_place_of_the_run_directory_is_refused(options, config_file, taken, capsys):
    said = refused_here(capsys, "train", config_file, f"run.directory={taken}", *options)
    assert said == f"error: {taken}: is a file, and run.directory is a directory to write into; choose another one"
    said = refused_here(capsys, "train", config_file, f"run.directory={taken}/x", *options)
    assert_says(said, f"{taken}: is a file, so nothing can be written below it; choose another run.directory")


def test_a_directory_that_nobody_may_write_to_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: False)  # the tests' user may be root
    verb = ("evaluate", "--checkpoint", tmp_path, "--suite", "preferences", "--data", tmp_path, "--output")
    assert_says(refused_here(capsys, *verb, tmp_path / "a" / "b"), f"{tmp_path}: cannot be written to")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EEXIST, "check the path"),
        (errno.ENOENT, "check the path"),
        (errno.ENOTDIR, "check the path"),
        (errno.ENAMETOOLONG, "check the path"),
        (errno.ENOSPC, "make room"),
        (errno.EIO, "check the disk"),
    ],
)
def test_what_the_operating_system_refuses_is_one_line_with_the_path(number, remedy, tmp_path, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("megatron_polar.score.report.training_report", fails)
    assert refused_here(capsys, "report", tmp_path) == f"error: some/file: {os.strerror(number)}; {remedy}"


# --- hints -----------------------------------------------------------------------------------------------------------


def usage_error(capsys, *arguments) -> str:
    """What argparse says to arguments that it cannot take."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_overrides_are_optional_and_written_without_dashes(config_file, capsys):
    assert usage_error(capsys, "train").endswith("required: CONFIG.yaml")
    hint = "; overrides are written without dashes: "
    assert usage_error(capsys, "train", config_file, "--train.num_steps=4").endswith(f"{hint}train.num_steps=4")
    assert usage_error(capsys, "train", config_file, "--optimizer.lr", "4").endswith(f"{hint}optimizer.lr=VALUE")
    assert hint not in usage_error(capsys, "train", config_file, "--no-such-option")
    assert hint not in usage_error(capsys, "report", config_file, "--train.num_steps=4")
    assert cli.main(["train", str(config_file), "--dry-run", "train.num_steps=5"]) == 0
    assert cli.main(["train", str(config_file), "--dry-run"]) == 0
    assert "num_steps: 1\n" in capsys.readouterr().out.rpartition("run:")[2], "one call's overrides are not the next's"


def test_drawing_prompts_without_saying_how_many_names_the_option(tmp_path, capsys):
    pool = REPOSITORY / "examples/quickstart/pool.yaml"
    said = refused_here(capsys, "sample", "--pool", pool, "--output", tmp_path / "out")
    assert_says(said, "--num-prompts is missing", "--prompts")
    assert not (tmp_path / "out").exists()


def test_nothing_to_score_is_an_error(tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n \n")
    said = refused_here(capsys, "score", "--checkpoint", tmp_path, "--input", source, "--output", output)
    assert said == f"error: {source}: empty input: only blank lines or nothing; check the path"
    assert not output.exists()


def test_a_line_in_a_directory_is_named_by_its_file(tmp_path, capsys):
    (tmp_path / "two").mkdir()
    good = json.dumps({"prompt": "a", "reference": "b", "output": "c"})
    (tmp_path / "two" / "a.jsonl").write_text(f"{good}\n{good}\n{good}\n")
    (tmp_path / "two" / "b.jsonl").write_text(f"{good}\n[1]\n")
    arguments = ("--checkpoint", tmp_path, "--input", tmp_path / "two", "--output", tmp_path / "out.jsonl")
    assert_says(refused_here(capsys, "score", *arguments), f"error: {tmp_path / 'two' / 'b.jsonl'}:2: ")


def test_raw_text_in_the_place_of_a_dataset_is_said_to_be_that(config_file, tmp_path):
    source = write_trajectories(tmp_path / "train.jsonl", num_prompts=8, seed=9)
    (tmp_path / "texts").mkdir()
    write_trajectories(tmp_path / "texts" / "train.jsonl", num_prompts=8, seed=9)
    for place in (source, tmp_path / "texts"):
        with pytest.raises(UserError) as caught:
            Corpus(place)
        assert str(caught.value) == f"{place}: raw text, no dataset; give the output of megatron-polar preprocess"
    said = refused("train", config_file, f"data.train=[{{path: {source}}}]")
    assert_says(said, source, "give the output of megatron-polar preprocess")


@pytest.mark.parametrize(
    ("soft", "hard", "asked"),
    [
        (300, 2000, (2000, 2000)),
        (1024, 1 << 20, (65_536, 1 << 20)),
        (1024, resource.RLIM_INFINITY, (65_536, resource.RLIM_INFINITY)),
        (100_000, 1 << 20, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_the_soft_limit_of_open_files_is_raised(soft, hard, asked, monkeypatch):
    """Shells and Slurm hand 1,024 on, and the first of 512 ranks needs more for the others' store alone."""
    set_to = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: set_to.append(limits))
    cli._allow_many_open_files()
    assert set_to == ([] if asked is None else [asked])


def test_a_verb_runs_with_as_many_open_files_as_it_may_have(tmp_path):
    program = "import resource; from megatron_polar import cli; cli.main(['fit', 'nowhere', '--output', 'out'])"
    program += "; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    command = f'ulimit -n 2000 && ulimit -Sn 300 && "{sys.executable}" -c "{program}"'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2000", "2000"], done.stderr
