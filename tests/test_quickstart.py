"""The quickstart's own steps, end to end through the command line and torchrun, with fewer prompts and steps."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SMALLER = {"8000": "120", "700": "40", "1024": "512"}
FEWER_STEPS = ["train.num_steps=4", "checkpoint.save_interval=2", "evaluation.interval=2", "logging.interval=1"]


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", REPOSITORY / "examples/quickstart/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_step(command, *, directory: Path) -> subprocess.CompletedProcess:
    overrides = FEWER_STEPS if "train" in command else []
    arguments = [sys.executable, *(SMALLER.get(word, word) for word in command[1:]), *overrides]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        arguments, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_quickstart_runs_end_to_end_and_a_second_run_resumes(quickstart, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    for title, *command in [*quickstart.steps(), ("Report", *quickstart.report_command())]:
        finished = run_step(command, directory=tmp_path)
        assert finished.returncode == 0, f"{title}: {finished.stderr[-3000:]}"
    monkeypatch.chdir(tmp_path)
    summary = quickstart.write_summary()
    assert summary["heldout_comparisons"] == summary["unseen_policy_comparisons"] == 40
    assert summary["heldout_accuracy"] + summary["swapped_accuracy"] == pytest.approx(1.0)
    assert summary["train_seconds"] > 0
    assert json.loads((tmp_path / "runs/quickstart/summary.json").read_text()) == summary
    scored = [json.loads(line) for line in Path("runs/quickstart/example_scores.jsonl").read_text().splitlines()]
    config = json.loads(Path("runs/quickstart/export/config.json").read_text())
    assert config["polar_wrapper"] == "pretrain"  # what `sample` writes into every line
    assert summary["largest_difference_to_transformers"] < 1e-4
    assert [sorted(line) for line in scored] == [["candidate", "output", "prompt", "reference", "reward"]] * 12
    quickstart.print_example()
    assert "<svg" in Path("runs/quickstart/report.html").read_text()
    train = next(command for title, *command in quickstart.steps() if "train" in command)
    again = run_step(train, directory=tmp_path)
    assert again.returncode == 0
    assert "resumed from runs/quickstart/checkpoints/step_00000004 at step 4" in again.stderr
    assert " iteration " not in again.stderr


def test_ctrl_c_waits_for_the_step_and_says_how_to_go_on(tmp_path):
    (tmp_path / "step.py").write_text(
        textwrap.dedent("""
        import sys, time

        try:
            print("begun", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(1.0)  # as torchrun waits for its ranks
            print("ended", flush=True)
            sys.exit(130)
        """)
    )
    (tmp_path / "quickstart.py").write_text(
        textwrap.dedent(f"""
        import signal, sys

        # A shell's background jobs, of which `make test` may be one, inherit that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, {str(REPOSITORY / "examples" / "quickstart")!r})
        import run

        run.steps = lambda: [("Sleep", "python", "step.py")]
        sys.exit(run.main())
        """)
    )
    process = subprocess.Popen(
        [sys.executable, "quickstart.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal sends Ctrl-C to a whole process group
    )
    while process.stdout.readline() != "begun\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "ended\n"
    assert errors == "interrupted; `make quickstart` goes on behind the last finished step or checkpoint\n"
