"""The study, end to end on generated text, and the parts of it that figures depend on."""

import argparse
import gzip
import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_polar.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "examples/study"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    """The study's modules import each other by their bare names, as scripts of one folder do."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def study_module(name):
    return importlib.import_module(name)


def run_study(directory, *arguments):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "run.py"), "--size", "smoke", "--run", str(directory), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def texts_below(directory):
    return "\n".join(path.read_text() for path in sorted(directory.rglob("*.jsonl")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole study of the smoke size: some sixty commands, in about a minute of a quiet machine."""
    directory = tmp_path_factory.mktemp("study") / "smoke"
    result = run_study(directory)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    return directory


def test_every_stage_runs_and_the_figures_have_their_shape(finished):
    figures = json.loads((finished / "docs/study.json").read_text())
    assert set(figures["finetune"]) == {"gsm8k", "alpaca_eval"}
    for task in figures["finetune"].values():
        for arm in ("pretrained_reference", "reference_longer_base", "reference_only", "neither"):
            low, high = task[arm]["ci95"]
            assert 0 <= low <= task[arm]["mean"] <= high <= 1
    assert figures["base_models"]["longer"]["tokens"] > 2 * figures["base_models"]["a"]["tokens"]
    assert len(figures["scaling"]["sizes"]) == len(figures["scaling"]["losses"]) == 4
    assert math.isfinite(figures["scaling"]["exponent"])
    assert len(figures["scaling"]["ci95"]) == 2
    (commit,) = figures["commits"]
    assert commit == (study_module("jobs").checked_out() or "not written down")
    assert figures["commits"][commit] == len(figures["commands"]) - 1 and re.fullmatch(
        r"[0-9a-f]{12}(-dirty)?|not.*", commit
    )
    assert figures["zero_shot"]["rmb"]["num_pairs"] == 4
    for name, where in (("rmb", "rmb"), ("gsm8k", "gsm8k")):
        found, job = figures["zero_shot"][name], f"evaluate/pretrain/a-base-k2-d1-seed1/{where}"
        summary = json.loads((finished / job / "summary.json").read_text())
        assert found["word_overlap"] == pytest.approx(summary["word_overlap_accuracy"], rel=1e-4)
        assert found["longer"] == pytest.approx(summary["length_only_accuracy"], rel=1e-4)
        gained = found["over"]["word_overlap"]
        assert gained["mean"] == pytest.approx(found["mean"] - found["word_overlap"], abs=1e-4)
        assert gained["ci95"][0] <= gained["mean"] <= gained["ci95"][1]
    assert figures["policies"]["seen"] == len(figures["policies"]["seen_models"]) + 23
    assert all(len(digest) == 64 for digest in figures["data"].values())
    assert set(figures["commands"]) == {
        p.relative_to(finished / "done").with_suffix("").as_posix() for p in (finished / "done").rglob("*.json")
    } | {"report"}
    assert str(finished) not in (finished / "docs/study.json").read_text()


def test_the_page_shows_the_figures_and_its_drawings(finished):
    page = (finished / "docs/study.md").read_text()
    figures = json.loads((finished / "docs/study.json").read_text())
    assert f"{figures['finetune']['gsm8k']['reference_only']['mean']:.3f} (" in page
    assert f"exponent {figures['scaling']['exponent']:.4f}" in page
    drawings = [line.split("(")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert len(drawings) == 4
    assert "no figure of this page is a result" in " ".join(page.split()) and "public files" not in page
    assert "docs/log.md" in page and not re.findall(r"\]\(\w+\.md\)", page)
    for drawing in drawings:
        assert (finished / "docs" / drawing).read_text().count("<svg") == 1
    assert str(finished) not in page


def test_a_second_call_repeats_nothing_and_a_lost_job_alone_is_run_again(finished):
    again = run_study(finished)
    assert again.returncode == 0
    told, every = re.match(r"(\d+) of (\d+) jobs are done, 0 to run\n", again.stdout).groups()
    assert told == every == str(sum(1 for _ in (finished / "done").rglob("*.json")))
    done = finished / "done/heldout-real.json"
    before = json.loads(done.read_text())
    done.unlink()
    again = run_study(finished, "--stages", "policies")
    assert again.returncode == 0
    assert [line for line in again.stdout.splitlines() if line.startswith("$")] == ["$ " + before["command"]]
    assert json.loads(done.read_text())["hash"] == before["hash"]


def test_nothing_held_out_is_in_what_training_reads(finished):
    inputs = finished / "inputs"
    facts = json.loads((inputs / "facts.json").read_text())
    training = texts_below(finished / "sampled/alpaca-train") + texts_below(finished / "sampled/gsm8k-train")
    training += (finished / "base.jsonl").read_text()
    for name in ("alpaca_heldout", "gsm8k_heldout"):
        for line in (inputs / "prompts" / f"{name}.jsonl").read_text().splitlines():
            assert json.loads(line)["prompt"] not in training
    for unseen in (*facts["policies"]["unseen_models"], *facts["policies"]["unseen_writers"]):
        assert f'"{unseen}@' not in training
    graded = [
        json.loads(line)
        for line in (finished / "generated/gsm8k/example_model_solutions.jsonl").read_text().splitlines()
    ]
    assert not any(row["question"] in training for row in graded)


def test_folds_hold_out_every_problem_once_and_share_none(finished):
    folder = finished / "inputs/finetune/gsm8k/reference"

    def problems(name):
        return {json.loads(line)["prompt"] for line in (folder / f"{name}.jsonl").read_text().splitlines()}

    heldout = [problems(f"fold{fold}_heldout") for fold in range(3)]
    generated = study_module("generated")
    assert sum(map(len, heldout)) == len(set.union(*heldout)) == generated.NUM_GRADED - generated.NUM_REPEATING
    assert all(not problems(f"fold{fold}_train") & heldout[fold] for fold in range(3))
    blind = [json.loads(line) for line in (folder.parent / "none/fold0_train.jsonl").read_text().splitlines()]
    assert {row["reference"] for row in blind} == {""}


def test_every_arm_of_fine_tuning_has_the_same_records_and_none_whose_answer_is_its_reference(finished):
    """`preprocess` drops those where there are references only, and refuses a file with too many of them."""
    with gzip.open(finished / "generated/alpaca_eval/preferences_train.jsonl.gz", "rt") as lines:
        first = json.loads(next(lines))
        assert first["chosen"] == first["reference"], "there is something to leave out"
    folder = finished / "inputs/finetune"
    for path in sorted(folder.glob("*/reference/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(row["reference"] not in (row["chosen"], row["rejected"]) for row in rows)
        blind = (path.parents[1] / "none" / path.name).read_text().splitlines()
        assert [json.loads(line) for line in blind] == [row | {"reference": ""} for row in rows]
    assert len(list((finished / "datasets").glob("*-reference-*/manifest.json"))) == 4
    assert not list((finished / "datasets").glob("*-reference-*/quarantine.ndjson"))


# --- jobs ------------------------------------------------------------------------------------------------------------


def job(name, *words, directory, needs=(), stage="one", reads=()):
    jobs = study_module("jobs")
    return jobs.Job(stage, name, words, directory / name, needs, reads=reads)


def tokenizer_words(directory, size="290"):
    answers = {"reference": "a", "chosen": "b", "rejected": "c"}
    (directory.parent / "text.jsonl").write_text(
        "".join(json.dumps({"prompt": f"word{i} and {i * 7}"} | answers) + "\n" for i in range(200))
    )
    return ("megatron-polar", "train-tokenizer", str(directory.parent / "text.jsonl"), "--vocab-size", size)


def collection(directory, *made):
    return study_module("jobs").Jobs(directory, {one.name: one for one in made}, parallel=2, forks=True)


def test_a_failed_job_ends_the_study_with_its_status_and_is_tried_again(tmp_path, capsys):
    directory = tmp_path / "run"
    bad = job(
        "bad.model",
        *tokenizer_words(directory, size="4"),
        "--output",
        str(directory / "bad.model"),
        directory=directory,
    )
    after = job("after", "megatron-polar", "preprocess", directory=directory, needs=("bad.model",))
    jobs = collection(directory, bad, after)
    assert jobs.run(["one"]) == 2
    said = capsys.readouterr().out
    assert "error: bad.model failed with exit status 2; all it said is in" in said
    assert "preprocess" not in said
    assert jobs.record_of("bad.model") is None
    good = job("bad.model", *tokenizer_words(directory), "--output", str(directory / "bad.model"), directory=directory)
    assert collection(directory, good).run(["one"]) == 0
    assert collection(directory, good).record_of("bad.model")["command"].startswith("megatron-polar train-tokenizer")


def test_a_changed_command_need_or_file_makes_a_job_new(tmp_path):
    first = job("a", "megatron-polar", "x", directory=tmp_path)
    plain = collection(tmp_path, first, job("b", "megatron-polar", "y", directory=tmp_path, needs=("a",))).hashes
    other = job("a", "megatron-polar", "z", directory=tmp_path)
    changed = collection(tmp_path, other, job("b", "megatron-polar", "y", directory=tmp_path, needs=("a",))).hashes
    assert plain["a"] != changed["a"]
    assert plain["b"] != changed["b"]
    read = job("a", "megatron-polar", "x", directory=tmp_path, reads=(("file", "0" * 64),))
    assert collection(tmp_path, read).hashes["a"] != plain["a"]
    assert collection(tmp_path, first).hashes["a"] == plain["a"]


def test_a_stage_without_what_it_needs_is_refused(tmp_path):
    first = job("a", "megatron-polar", "x", directory=tmp_path)
    second = job("b", "megatron-polar", "y", directory=tmp_path, needs=("a",), stage="two")
    with pytest.raises(UserError, match="b needs a, which is not done; run --stages one first"):
        collection(tmp_path, first, second).run(["two"])


def test_only_outputs_below_the_study_are_removed(tmp_path):
    jobs = study_module("jobs")
    (tmp_path / "outside").write_text("kept")
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "outside", tmp_path / "run", tmp_path / "run/../outside"):
        with pytest.raises(UserError, match="so it is not removed"):
            jobs._remove(path, within=tmp_path / "run")
    assert (tmp_path / "outside").read_text() == "kept"
    (tmp_path / "run/link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="so it is not removed"):
        jobs._remove(tmp_path / "run/link/outside", within=tmp_path / "run")


def test_foreign_directories_and_missing_data_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    refused = run_study(tmp_path / "mine")
    assert refused.returncode == 2
    assert "is not empty and no directory of a study; choose another --run" in refused.stderr
    (tmp_path / "empty").mkdir()
    refused = run_study(tmp_path / "run", "--data", str(tmp_path / "empty"))
    assert refused.returncode == 2
    assert "no alpaca_eval/*/results/*/model_outputs.json in it (AlpacaEval's outputs)" in refused.stderr


# --- figures ---------------------------------------------------------------------------------------------------------


def test_the_fit_finds_a_power_law_and_says_how_sure_it_is():
    fit = study_module("figures").fit_power_law
    sizes = [1e5, 4e5, 1.6e6, 6.4e6]
    exact = fit(sizes, [[0.9 * n**-0.05] for n in sizes])
    assert exact["exponent"] == pytest.approx(0.05)
    assert exact["coefficient"] == pytest.approx(0.9)
    assert exact["r2"] == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        noisy = fit(sizes, [[0.9 * n**-0.05 * math.exp(rng.normal(0, 0.02)) for _ in range(2)] for n in sizes])
        covered += noisy["ci95"][0] <= 0.05 <= noisy["ci95"][1]
    assert 180 <= covered <= 198


def test_intervals_are_over_prompts_and_not_over_pairs():
    pooled = study_module("figures").pooled
    rng = np.random.default_rng(1)
    right = rng.integers(0, 2, size=200).astype(float)
    names = [f"p{i}" for i in range(200)]
    once = pooled([right], [names])
    tenfold = pooled([np.repeat(right, 10)], [np.repeat(names, 10).tolist()])
    seeds = pooled([right] * 3, [names] * 3)
    half = 1.96 * math.sqrt(0.25 / 200)
    for found in (once, tenfold, seeds):
        assert found["ci95"][1] - found["ci95"][0] == pytest.approx(2 * half, rel=0.1)
        assert found["mean"] == pytest.approx(right.mean())
    assert seeds["each_seed"] == [right.mean()] * 3 and once["ci95_seeds"] is None
    low, high = pooled([right, right, 1 - right], [names] * 3)["ci95_seeds"]
    assert high - low == pytest.approx(
        2 * 4.3027 * np.std([right.mean()] * 2 + [1 - right.mean()], ddof=1) / 3**0.5, rel=1e-3
    )
    assert (tenfold["num_prompts"], tenfold["num_pairs"]) == (200, 2000)


def test_the_loss_is_the_papers():
    figures = study_module("figures")
    scored = figures.Scored(np.array([0.0, 2.0, -1.0]), ("a", "b", "c"), ("x",) * 3, {})
    assert figures.bt_loss(scored) == pytest.approx(
        np.mean([-math.log(1 / (1 + math.exp(-m))) for m in (0.0, 2.0, -1.0)])
    )
    assert scored.scores.tolist() == [0.5, 1.0, 0.0]


# --- sources ---------------------------------------------------------------------------------------------------------


def test_writers_err_each_in_a_way_of_its_own():
    sources = study_module("sources")
    solution = "48/2 = <<48/2=24>>24 clips for $1.50, 1,024 in all.\n#### 25"
    problems = [{"question": "Ann has 48 clips.", "answer": solution}]
    problems += [{"question": f"Problem {i}.", "answer": f"It is {i}."} for i in range(12)]
    said = {writer: sources.solutions(problems, writer=writer) for writer in sources.WRITERS}
    assert said["exact"] == [problem["answer"] for problem in problems]
    assert said["doubles"][0] == "48/4 = <<48/4=48>>48 clips for $1.50, 1,024 in all.\n#### 50"
    assert said["result-plus-16"][0] == solution.replace("#### 25", "#### 41"), "the result alone"
    assert said["mix-up-2"][:2] == ["It is 1.", "It is 2."]
    assert len({tuple(texts) for texts in said.values()}) == len(sources.WRITERS) == 31
    assert set(sources.UNSEEN_WRITERS) < set(sources.WRITERS)


def test_the_ending_of_a_solution_is_whole_lines_and_has_the_result():
    ending = study_module("sources").ending
    solution = "First 2*3=<<2*3=6>>6.\nThen 6+1=<<6+1=7>>7 of them.\n#### 7"
    assert ending(solution, max_words=100) == "First 2*3=6.\nThen 6+1=7 of them.\nA: 7"
    assert ending(solution, max_words=12) == "Then 6+1=7 of them.\nA: 7"
    assert ending(solution, max_words=11) == ending(solution, max_words=1) == "A: 7"
    assert ending("It is 1,234,567, or 1,23.\n#### 12,000", max_words=100) == "It is 1234567, or 1,23.\nA: 12000"


def test_characters_that_only_python_takes_for_line_ends_cut_no_line(tmp_path):
    """Published answers hold U+2028; JSON leaves it as it is."""
    text = "one\u2028two\x85three"
    shard = tmp_path / "alpaca-train/trajectories-00000.jsonl"
    shard.parent.mkdir()
    line = {"prompt": "p", "trajectories": [{"policy": "a@n3", "text": text}]}
    shard.write_text(json.dumps(line, ensure_ascii=False) + "\n")
    assert list(study_module("texts").groups(shard.parent)) == [("p", {"a@n3": [text]})]
    path = tmp_path / "base.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text} {i}"}, ensure_ascii=False) + "\n" for i in range(50)))

    class Letters:
        bos_id = 0

        def encode(self, text):
            return [ord(letter) for letter in text]

    documents, held_out = study_module("base_model").read_documents(path, Letters(), context=64, seed=1)
    assert sum(document.tolist().count(0x2028) for document in (*documents, *held_out)) == 50
    path.write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match="1 documents; two are needed"):
        study_module("base_model").read_documents(path, Letters(), context=64, seed=1)


def test_base_models_read_every_document_once_and_nothing_of_the_padding():
    import torch

    base_model = study_module("base_model")
    lengths = random.Random(1).choices(range(4, 40), k=1200)
    documents = [torch.arange(n) % 30 + 1 + i % 7 for i, n in enumerate(lengths)]
    found = list(base_model.batches(documents, max_tokens=128, rng=random.Random(2)))
    assert sorted(id(document) for batch in found for document in batch) == sorted(map(id, documents))
    padded_sizes = [len(batch) * max(map(len, batch)) for batch in found]
    assert max(padded_sizes) <= 128 and sum(padded_sizes) < 1.05 * sum(lengths)
    assert [len(b) for b in base_model.batches([torch.arange(200)] * 2, max_tokens=128, rng=random.Random(2))] == [1, 1]

    options = argparse.Namespace(hidden_size=16, num_layers=1, ffn_hidden_size=16, num_heads=2, num_query_groups=2)
    options.max_positions, options.batch_tokens, options.device = 64, 128, "cpu"
    tokenizer = argparse.Namespace(vocab_size=64, bos_id=0, pad_id=0)
    torch.manual_seed(1)
    model = base_model.build_model(options, tokenizer)
    alone = [float(model(input_ids=d[None], labels=d[None]).loss) * (len(d) - 1) for d in documents[:40]]
    expected = sum(alone) / sum(n - 1 for n in lengths[:40])
    assert base_model.mean_loss(model, documents[:40], options=options) == pytest.approx(expected, rel=1e-5)


def test_muon_in_fp32_takes_the_steps_of_torch_s_own():
    import torch

    torch.manual_seed(1)
    shapes = [(24, 40), (24, 40), (48, 16), (32, 32)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([weight.clone().requires_grad_() for weight in start] for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.01}
    optimizers = [study_module("muon").Muon(ours, **settings)]
    optimizers.append(torch.optim.Muon(theirs, **settings, adjust_lr_fn="original"))
    for _ in range(8):
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(2)
            optimizer.zero_grad()
            sum(((weight - torch.randn_like(weight)) ** 2).sum() for weight in weights).backward()
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (a - before).norm()  # bf16 keeps eight bits


def test_the_models_left_out_depend_on_their_names_alone():
    split = study_module("sources").split_models
    names = [f"model-{i}" for i in range(40)]
    seen, unseen = split(names)
    assert (len(seen), len(unseen)) == (32, 8)
    assert split(reversed(names)) == (seen, unseen)
    assert len(split(names[:6])[1]) == 2


def test_seeds_that_differ_by_more_than_their_interval_are_named(finished):
    figures = json.loads((finished / "docs/study.json").read_text())
    pretraining = figures["pretraining"]
    seen = pretraining["settings"][pretraining["claims"]["main"]]["seen"]
    seen |= {"ci95": [0.66, 0.70], "each_seed": [0.69, 0.78, 0.57]}
    shortcomings = study_module("shortcomings").shortcomings
    assert any("further apart (0.690, 0.780, 0.570)" in sentence for sentence in shortcomings(figures))
    seen["each_seed"] = [0.68, 0.69, 0.67]
    assert not any("further apart" in sentence for sentence in shortcomings(figures))


def test_seeds_below_a_baseline_that_their_mean_beats_are_named(finished):
    figures = json.loads((finished / "docs/study.json").read_text())
    task = figures["finetune"]["gsm8k"]
    task["word_overlap"] = 0.7
    task["pretrained_reference"] |= {"mean": 0.75, "each_seed": [0.9, 0.65, 0.7]}
    task["over"]["word_overlap"] |= {"mean": 0.05, "each_seed": [0.2, -0.05, 0.0], "ci95": [-0.01, 0.11]}
    task["over"]["longer"] |= {"mean": -0.1, "ci95": [-0.15, -0.05]}
    shortcomings = study_module("shortcomings").shortcomings
    found = list(shortcomings(figures))
    assert "GSM8K solutions: 2 of 3 seeds do not beat counting shared words (0.650, 0.700; it has 0.700)." in found
    own = "GSM8K solutions: the pre-trained, fine-tuned model"
    assert any(f"{own} does not clearly beat counting shared words (0.750 against 0.700; diff" in one for one in found)
    assert any(one.startswith(f"{own} is clearly worse than taking the longer answer") for one in found)
    task["over"]["word_overlap"] |= {"each_seed": [0.2, 0.05, 0.01], "ci95": [0.01, 0.11]}
    found = list(shortcomings(figures))
    assert not any("seeds do not beat" in one or f"{own} does not clearly beat counting" in one for one in found)


def test_whether_pre_training_decides_is_said_by_a_correlation(finished):
    figures = json.loads((finished / "docs/study.json").read_text())
    figures["pretraining"]["settings"][figures["pretraining"]["claims"]["main"]]["seen"]["each_seed"] = [0.6, 0.7, 0.8]
    after = study_module("page")._after_pretraining
    (line,) = after(figures, {"pretrained_reference": {"each_seed": [0.7, 0.65, 0.6]}})
    assert "r = -1.00 over 3 seeds" in " ".join(line.split())
    assert not list(after(figures, {"pretrained_reference": {"each_seed": [0.7, 0.7, 0.7]}}))


# --- a report on a part ----------------------------------------------------------------------------------------------


def test_a_study_that_is_told_to_end_ends_its_jobs(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--size", "smoke", "--run", str(tmp_path / "smoke")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    study = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not study.stdout.readline().startswith("$ "):
        assert study.poll() is None
    started = []
    while len(started) < 3:  # the server that forks, its tracker, and a job
        assert study.poll() is None
        started = psutil.Process(study.pid).children(recursive=True)
        time.sleep(0.02)
    study.terminate()
    said, _ = study.communicate(timeout=60)
    assert study.returncode == 130 and "the same command goes on from here" in said
    assert not psutil.wait_procs(started, timeout=10)[1]


def test_a_part_is_reported_as_a_part(finished, tmp_path):
    """What has not been run is not measured, on the page and in the figures; what has been is as it was."""
    done, aside = finished / "done/evaluate", tmp_path / "aside"
    whole = json.loads((finished / "docs/study.json").read_text())
    lost = ["finetune/gsm8k/neither-seed1/heldout", "pretrain/a-base-k4-d0.5-seed1/seen"]
    lost += [f"pretrain/{shape}-base-k2-d0.5-seed1/real" for shape in "cd"]
    lost += ["pretrain/a-base-k2-d1-seed1/rmb"]
    for name in lost:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (done / f"{name}.json").rename(aside / name)
    try:
        result = run_study(finished, "--docs", str(tmp_path / "docs"), "--partial")
        assert result.returncode == 0, result.stderr
    finally:
        for name in lost:
            (aside / name).rename(done / f"{name}.json")
    figures = json.loads((tmp_path / "docs/study.json").read_text())
    assert not figures["complete"]
    assert figures["scaling"] is figures["finetune"]["gsm8k"] is figures["zero_shot"]["rmb"] is None
    assert figures["finetune"]["alpaca_eval"] == whole["finetune"]["alpaca_eval"]
    settings = whole["pretraining"]["settings"]
    gone = {"a/base/4/0.5", "c/base/2/0.5", "d/base/2/0.5"}
    assert figures["pretraining"]["settings"] == {key: found for key, found in settings.items() if key not in gone}
    assert not set(figures["commands"]) & {f"evaluate/{name}" for name in lost}
    page = (tmp_path / "docs/study.md").read_text()
    assert "a report on a part" in page
    assert "GSM8K solutions: not measured in this run." in page
    assert "| rmb | not measured |" in page
    drawn = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert drawn == ["study/start.svg", "study/ablations.svg"]
    assert all((tmp_path / "docs" / drawing).is_file() for drawing in drawn)


def test_a_claim_holds_only_where_its_interval_says_so():
    def claims(found, *, law=(0.01, 0.03), gain=(0.01, 0.05), seeds=(-0.001, 0.001), over_seeds=(0.01, 0.06)):
        spans = {}
        for name, span in found.items():
            each, mean = [sum(span) / 2 + apart for apart in seeds], sum(span) / 2
            between = [mean - 0.01, mean + 0.01] if len(seeds) > 1 else None
            spans[name] = {"mean": mean, "ci95": list(span), "each_seed": each, "ci95_seeds": between}
            over = {"mean": mean - 0.61, "ci95": [one - 0.61 for one in span]}
            over["ci95_seeds"] = between and [one - 0.61 for one in between]
            spans[name] |= {"word_overlap": 0.61, "over": {"word_overlap": over}}
        settings = {
            f"m/{start}/{k}/1.0": {"seen": spans[f"{start}{k}"], "unseen": spans[f"{start}{k}"], "candidates": k}
            for start, k in (("base", 2), ("random", 2), ("base", 8))
        }
        gained = {"mean": 0.03, "ci95": list(gain), "ci95_seeds": over_seeds and list(over_seeds)}
        arms = {"differences": dict.fromkeys(study_module("verdicts").FINE_TUNING, gained), **spans["base8"]}
        arms["pretrained_reference"] = spans["base8"]
        figures = {
            "pretraining": {
                "settings": settings,
                "claims": {name: f"m/{name.replace('main', 'base')}/2/1.0" for name in ("main", "base", "random")},
                "tables": {"data": [], "candidates": ["m/base/2/1.0", "m/base/8/1.0"]},
            },
            "scaling": {"exponent": 0.02, "ci95": list(law), "r2": 0.9},
            "finetune": {"gsm8k": arms, "alpaca_eval": None},
            "zero_shot": {"rmb": {"mean": 0.4, "ci95": [0.35, 0.45], "ci95_seeds": [0.38, 0.42]}},
        }
        return {claim: word for claim, word, _ in study_module("verdicts").verdicts(figures)}

    clear = claims({"base2": (0.60, 0.64), "random2": (0.50, 0.59), "base8": (0.70, 0.75)})
    words = {
        "Pre-training learns to match unseen policies on new prompts": "yes",
        "A base model is a better start than random weights (seen policies)": "yes",
        "More steps over the same prompts help (seen policies)": "not measured",
        "More candidates a comparison help (seen policies, 8 against 2 candidates)": "yes",
        "It does so better than counting shared words (seen policies)": "not clear",
        "Held-out loss falls with size": "yes",
        "GSM8K solutions: better than counting shared words": "yes",
        "GSM8K solutions: pre-training helps": "yes",
        "GSM8K solutions: pre-training helps more than language modelling for as long": "yes",
        "AlpacaEval preferences: a reference helps": "not measured",
        "Zero-shot on rmb, better than chance": "no, the reverse",
    }
    assert words.items() <= clear.items()
    assert len(clear) == 18
    found = {"base2": (0.48, 0.64), "random2": (0.50, 0.70), "base8": (0.30, 0.45)}
    vague = claims(found, law=(-0.01, 0.03), gain=(-0.05, -0.01), over_seeds=(-0.09, -0.01))
    assert vague["Pre-training learns to match seen policies on new prompts"] == "not clear"
    assert vague["A base model is a better start than random weights (seen policies)"] == "not clear"
    assert vague["More candidates a comparison help (seen policies, 8 against 2 candidates)"] == "no, the reverse"
    assert vague["Held-out loss falls with size"] == "not clear"
    assert vague["GSM8K solutions: a reference helps"] == "no, the reverse"
    apart = {"base2": (0.60, 0.64), "random2": (0.50, 0.59), "base8": (0.70, 0.75)}
    some = claims(apart, seeds=(-0.1, 0.1), over_seeds=(-0.2, 0.3))
    assert some["A base model is a better start than random weights (seen policies)"] == "yes, for these seeds"
    assert some["GSM8K solutions: pre-training helps"] == "yes, for these seeds"
    one = claims(apart, seeds=(0.0,), over_seeds=None)
    assert one["More candidates a comparison help (seen policies, 8 against 2 candidates)"] == "yes, for one seed"
    assert one["Pre-training learns to match seen policies on new prompts"] == "yes, for one seed"
    assert one["GSM8K solutions: pre-training helps"] == "yes, for one seed"


# --- The data, from the publishers' repositories ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def clones(tmp_path_factory):
    """What clones of the three repositories hold, with generated text in it."""
    folder = tmp_path_factory.mktemp("clones")
    generated = study_module("generated")
    generated.write_generated(folder / "all")
    for model in generated.MODELS:
        sides = [folder / f"all/alpaca_eval/{side}/results/{model}/model_outputs.json" for side in ("train", "eval")]
        rows = [row for side in sides for row in json.loads(side.read_text())]
        generated.write_json(folder / "alpaca_eval/results" / model / "model_outputs.json", rows)
        judged = [
            {
                "instruction": row["instruction"],
                "output_1": f"base on {row['instruction']}",
                "generator_1": "base",
                "output_2": row["output"],
                "generator_2": model,
                "preference": 1 + (generated.MODELS.index(model) + 0.5) / len(generated.MODELS),
            }
            for row in rows
        ]
        place = folder / "alpaca_eval/results" / model / "weighted_alpaca_eval_gpt4_turbo/annotations.json"
        generated.write_json(place, judged)
    (folder / "math/grade_school_math").mkdir(parents=True)
    (folder / "all/gsm8k").rename(folder / "math/grade_school_math/data")
    (folder / "rmb").mkdir()
    (folder / "all/rmb/RMB_dataset").rename(folder / "rmb/RMB_dataset")
    return folder


def prepare(clones, output, *more):
    options = ("--alpaca-eval", clones / "alpaca_eval", "--grade-school-math", clones / "math", "--rmb", clones / "rmb")
    models = ("--models", *study_module("generated").MODELS)
    return study_module("prepare_data").main([*map(str, (*options, "--output", output, *(more or models)))])


def test_clones_become_the_folder_that_the_study_reads(clones, tmp_path, capsys):
    assert prepare(clones, tmp_path / "data") == 0, capsys.readouterr().err
    sources, sizes = study_module("sources"), study_module("sizes")
    assert len(sources.source_files(tmp_path / "data")) == 6 * 2 + 2 + 2 + 2
    parts = sources.read_alpaca(tmp_path / "data")  # refuses sides that share a prompt
    prompts = {side: {row["instruction"] for rows in parts[side].values() for row in rows} for side in parts}
    assert len(prompts["train"]) + len(prompts["eval"]) == 22 and prompts["train"] and prompts["eval"]
    for side in parts:
        rows = list(sources.read_preferences(tmp_path / f"data/alpaca_eval/preferences_{side}.jsonl.gz"))
        assert rows and {row["prompt"] for row in rows} <= prompts[side]
    sources.write_inputs(tmp_path / "data", tmp_path / "inputs", size=sizes.SIZES["smoke"])
    assert (tmp_path / "inputs/finetune/alpaca_eval/reference/heldout.jsonl").stat().st_size


def test_a_clone_without_its_files_is_named_and_nothing_is_written(clones, tmp_path, capsys):
    assert prepare(clones, tmp_path / "data", "--models", "model-a", "model-z") == 2
    assert "model-z/model_outputs.json: is not there" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("x")
    assert prepare(clones, tmp_path / "mine") == 2
    assert "is not empty" in capsys.readouterr().err
