"""What the documents say exists: every link, path, command, option and example YAML in them is checked."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_polar.cli import _parser
from megatron_polar.config.load import load_config
from megatron_polar.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted(p for p in (ROOT / "examples").rglob("*.yaml") if "pool" not in p.name)
FOLDERS = sorted(p.name for p in ROOT.iterdir() if p.is_dir())
LAUNCHERS = re.compile(r"(?:(?:\.venv/bin/)?megatron-polar|-m megatron_polar)\s+(.*)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(params=PAGES, ids=name_of)
def page(request) -> Path:
    """Each document in turn."""
    return request.param


# --- examples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_every_example_loads_and_validates(path):
    assert isinstance(load_config(path), RunConfig)


@pytest.mark.parametrize(
    ("name", "lr", "batch", "parameters"),
    [("pretrain_1_8b", 1.4e-5, 1940, 1.700e9), ("pretrain_7b", 1.67e-5, 4343, 7.359e9)],
)
def test_the_papers_examples_have_the_papers_values(name, lr, batch, parameters):
    """arXiv 2507.05197, appendix D.1.2, and the released training configuration."""
    from megatron_polar.config.presets import architecture_of

    config = load_config(ROOT / f"examples/{name}.yaml")
    optimizer, data = config.optimizer, config.data
    assert (optimizer.lr, config.train.global_batch_size, config.train.num_epochs) == (lr, batch, 1.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.weight_decay) == (0.9, 0.95, 0.0)
    assert (optimizer.warmup_fraction, optimizer.min_lr_fraction, optimizer.clip_grad) == (0.03, 0.1, 1.0)
    assert (data.candidates_per_comparison, data.max_sequence_length) == (2, 16384)
    assert config.train.precision == "bf16"
    assert architecture_of(config.model).num_parameters(92544) == pytest.approx(parameters, rel=1e-3)


# --- links and paths ----------------------------------------------------------------------------------------------


def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_every_path_into_the_repository_exists(page):
    """Code spans and code blocks: paths below a top-level folder, and every .py file wherever it is named."""
    text = page.read_text()
    code = re.findall(r"```.*?\n(.*?)```", text, flags=re.S)
    code += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    words = [word.rstrip(".,;:") for block in code for word in re.findall(r"[\w./-]+", block)]
    missing = [word for word in words if _is_ours(word) and not _exists(word)]
    assert not missing


def _is_ours(word: str) -> bool:
    first, slash, _ = word.partition("/")
    return word.endswith(".py") or (slash == "/" and first in FOLDERS and not _is_ignored(word))


def _exists(word: str) -> bool:
    # A module may be called by its place in the package (`train/run.py`), or by its bare name.
    places = [ROOT / word, ROOT / "megatron_polar" / word]
    if "/" not in word:
        places += [*ROOT.glob(f"*/{word}"), *(ROOT / "megatron_polar").rglob(word)]
    return any(place.exists() for place in places)


def _is_ignored(word: str) -> bool:
    """By .gitignore: what users and runs put there."""
    patterns = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    return any(place.match(pattern) for place in (Path(word), *Path(word).parents) for pattern in patterns)


def test_the_readme_names_every_top_level_folder():
    text = (ROOT / "README.md").read_text()
    ours = [name for name in FOLDERS if not _is_ignored(name) and (not name.startswith(".") or name == ".ci")]
    assert {"megatron_polar", "docs", "examples", "tests", "tools", "benchmarks"} <= set(ours)
    assert [name for name in ours if f"`{name}/`" not in text] == []


def test_no_document_names_a_path_of_somebodys_machine(page):
    assert re.findall(r"(?<![\w.])/(?:home|root|work|tmp|Users|mnt)/\S*", page.read_text()) == []


# --- commands -----------------------------------------------------------------------------------------------------


@cache
def verbs() -> dict[str, argparse.ArgumentParser]:
    """The verbs of the command line and their parsers."""
    actions = _parser()._actions
    return next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))


def commands(text: str) -> list[str]:
    """Every megatron-polar command in code blocks and code spans (or in comments of a YAML), without its launcher."""
    blocks = re.findall(r"```.*?\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [found[1].split(" #")[0].strip() for line in lines if (found := LAUNCHERS.search(line))]


def problem_of(command: str) -> str | None:
    """Why a command is wrong; None when its verb and all options are known and, unless it is a synopsis, it parses."""
    is_synopsis = bool(re.search(r"\[--|\.\.\.|<[^|]*>|\b[A-Z]{1,}\b(?=\s|$)", command))
    words = [word.strip("[]") for word in shlex.split(command)]
    if words[0] not in verbs():
        return f"no verb {words[0]!r}"
    verb = verbs()[words[0]]
    directions = next((action.choices for action in verb._actions if isinstance(action.choices, dict)), {})
    known = directions.get(words[1] if len(words) > 1 else "", verb)._option_string_actions
    for word in words[1:]:
        if word.startswith("--") and word.split("=")[0] not in known:
            return f"{words[0]} has no option {word}"
    if not is_synopsis and len(words) > 1:
        try:
            _parser().parse_args(words)
        except SystemExit:
            return "does not parse"
    return None


def test_every_command_parses(page):
    wrong = {command: problem for command in commands(page.read_text()) if (problem := problem_of(command))}
    assert not wrong


def test_commands_in_comments_of_examples_parse():
    found = []
    for path in EXAMPLES:
        text = re.sub(r"^# ?", "", path.read_text(), flags=re.M).replace("\\\n", " ")
        found += [match[1].strip() for match in re.finditer(r"^\s*megatron-polar (.*)$", text, flags=re.M)]
    assert found
    assert {command: problem for command in found if (problem := problem_of(command))} == {}


def test_the_readme_shows_every_verb_that_a_first_run_needs():
    shown = {command.split()[0] for command in commands((ROOT / "README.md").read_text())}
    assert {"train-tokenizer", "preprocess", "train", "evaluate", "score"} <= shown


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("trian examples/x.yaml", "no verb"),
        ("train x.yaml --dryrun", "no option --dryrun"),
        ("score --checkpoint runs/x --input a.jsonl", "does not parse"),
        ("preprocess INPUT... --output DIR [--wrokers N]", "no option --wrokers"),
        ("preprocess INPUT... --output DIR --tokenizer PATH [--wrapper sft|pretrain]", None),
        ("train x.yaml train.num_steps=3 --dry-run", None),
    ],
)
def test_the_check_of_commands_itself(command, problem):
    found = problem_of(command)
    assert found is None if problem is None else problem in found


def test_options_of_tools_and_benchmarks_exist(page):
    wrong = []
    for script, rest in re.findall(r"python ((?:tools|benchmarks|examples)/\S+\.py)([^`\n#]*)", page.read_text()):
        options = {
            node.value
            for node in ast.walk(ast.parse((ROOT / script).read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--")
        }
        wrong += [f"{script} {option}" for option in re.findall(r"--[\w-]+", rest) if option not in options]
    assert not wrong


def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"(?:`|^)make ([\w-]+)(?:`|$)", page.read_text(), flags=re.M))
    assert named <= targets


def test_what_the_readmes_run_makes_does_not_appear_in_git_status():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    text = (ROOT / "README.md").read_text()
    made = set(re.findall(r"(?:--output |RUN_DIR |cp \S+ )([\w./-]+)", text)) | {"mine.yaml", "runs/mine", "data/train"}
    made |= {"train.jsonl", "heldout.jsonl", "preferences.jsonl", "lines.jsonl"}
    assert {"tokenizer.model", "data/preferences", "scored.jsonl", "exports/mine"} <= made
    question = ["git", "check-ignore", "--no-index", *made]
    asked = subprocess.run(question, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made - set(asked.stdout.split()) == set()
    hidden = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(hidden, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""


def test_what_the_documents_say_to_install_is_what_tests_run_with(page):
    wanted = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "requirements-dev.txt").read_text(), flags=re.M))
    named = [
        pin for line in re.findall(r"pip install (.*)", page.read_text()) for pin in re.findall(r"(\S+)==(\S+)", line)
    ]
    assert {name: version for name, version in named if wanted.get(name, version) != version} == {}
    if page.name == "rl.md":
        assert {"trl", "accelerate", "datasets"} <= dict(named).keys()


# --- generated and pinned -----------------------------------------------------------------------------------------


def test_the_configuration_page_is_up_to_date():
    check = [sys.executable, str(ROOT / "tools/write_configuration_docs.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_configuration_page_explains_every_key():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*) \|$", (ROOT / "docs/configuration.md").read_text(), re.M)
    explained = {name for name, _, _, meaning in rows if meaning.strip()}
    source = ast.parse((ROOT / "megatron_polar/config/schema.py").read_text())
    classes = [node for node in source.body if isinstance(node, ast.ClassDef) and node.name != "RunConfig"]
    keys = {item.target.id for node in classes for item in node.body if isinstance(item, ast.AnnAssign)}
    assert keys - explained == set()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-gpu.txt", "requirements-dev.txt"])
def test_every_dependency_has_its_reason(name):
    text = (ROOT / "docs/decisions.md").read_text()
    packages = re.findall(r"^([a-z][\w-]*)(?:\[.*\])?==[\w.]+$", (ROOT / name).read_text(), flags=re.M)
    assert packages
    assert [package for package in packages if package not in text] == []
