"""Files and paths of somebody who means harm, and planted secrets.

Each function returns figures; tests call it with small counts, `make faults` with the full ones. What a user would
type runs in a forked process, which is watched: it may start no command, touch nothing outside, and has to end with
what it was asked for or with one line that says what is wrong.
"""

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import conftest
import malicious
import malicious_exports
import malicious_inputs
import orjson
import paths
from tiny_runs import checkpoint_of, tiny_config

from megatron_polar import cli, faults
from megatron_polar.config.load import dump_config
from megatron_polar.data.preprocess import preprocess
from megatron_polar.score import report

_FORK = multiprocessing.get_context("fork")

# --- Using files as a user would -------------------------------------------------------------------------------------

_COMMANDS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.connect")
_AUDIT = "AUDIT: "
_REFUSED, _CRASHED = 2, 101


@dataclass(frozen=True)
class Outcome:
    """How a command ended: `used` what it was given, `refused` it with one line, `crashed`, `hung` or `died`.

    `said` is that line, or the end of what was printed; `printed` is all of it, `started` the commands that the process
    itself started.
    """

    how: str
    said: str
    printed: str
    started: tuple[str, ...]


def use(arguments: list[str], *, log: Path, environment: dict[str, str] | None = None, seconds: float = 60) -> Outcome:
    """Run the command line in a fork of this warm process."""
    process = _FORK.Process(target=_child, args=(arguments, log, environment or {}))
    process.start()
    process.join(seconds)
    hung = process.is_alive()
    process.kill()
    process.join()
    lines = log.read_text(errors="replace").splitlines()
    started = tuple(line for line in lines if line.startswith(_AUDIT))
    printed = "\n".join(line for line in lines if not line.startswith(_AUDIT))
    errors = [line for line in lines if line.startswith("error: ")]
    if hung:
        how = "hung"
    elif process.exitcode < 0:
        how = "died"
    elif process.exitcode == _REFUSED and len(errors) == 1 and "Traceback" not in printed:
        how = "refused"
    elif process.exitcode in (0, 1) and not errors:
        how = "used"
    else:
        how = "crashed"
    return Outcome(how, errors[0] if how == "refused" else printed[-3000:], printed, started)


def _child(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(log.parent)
    report.training_report = lambda directory, **more: directory  # drawing takes seconds; it has doors of its own
    if arguments[0] == "report":
        report.training_report = _TRAINING_REPORT
    sys.addaudithook(_watch)
    try:
        status = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
        status = _CRASHED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_TRAINING_REPORT = report.training_report


def _watch(event: str, arguments: tuple) -> None:
    if event in _COMMANDS:
        os.write(2, f"\n{_AUDIT}{event} {arguments!r:.300}\n".encode(errors="replace"))


# --- Good files, and the doors through which they are used -----------------------------------------------------------

_SAMPLE = "--num-prompts 3 --policies-per-prompt 2"
DOORS = {
    "score": "score --checkpoint {p} --input {s}/score.jsonl --output {n}/scored.jsonl --device cpu",
    "export it": "convert to-hf --checkpoint {p} --output {n}/export --layout sequence-classification",
    "score an export": "score --checkpoint {p} --input {s}/score.jsonl --output {n}/scored.jsonl --device cpu",
    "convert it": "convert from-hf --model {p} --output {n}/converted",
    "evaluate": "evaluate --checkpoint {p} --suite preferences --data {s}/rankings.jsonl --output {n}/evaluated",
    "resume": "train {s}/run.yaml run.directory={p} train.num_steps=3",
    "start from it": "train {s}/run.yaml run.directory={n}/fresh train.init_from={p} train.num_steps=1",
    "train on it": 'train {s}/run.yaml run.directory={n}/fresh train.num_steps=1 data.train=[{{"path":"{p}"}}]',
    "train on it, index only": "train {s}/run.yaml run.directory={n}/fresh train.num_steps=1 data.verify=index "
    'data.train=[{{"path":"{p}"}}]',
    "dry run": "train {p}/run.yaml --dry-run",
    "train": "train {p}/run.yaml",
    "train into it": "train {s}/run.yaml run.directory={p} train.num_steps=1",
    "score into it": "score --checkpoint {s}/run --input {s}/score.jsonl --output {p}/scored.jsonl",
    "evaluate into it": "evaluate --checkpoint {s}/run --suite preferences --data {s}/rankings.jsonl --output {p}",
    "preprocess into it": "preprocess {s}/lines.jsonl --output {p} --tokenizer {s}/tokenizer.model",
    "preprocess with a file": "preprocess {s}/lines.jsonl --output {n}/out --tokenizer {p}/tokenizer.model",
    "train a tokenizer into it": "train-tokenizer {s}/lines.jsonl --output {p}/x.model --vocab-size 300",
    "sample into it": f"sample --pool {{s}}/pool/pool.yaml --output {{p}} {_SAMPLE}",
    "preprocess again": "preprocess {s}/lines.jsonl --output {p} --tokenizer {s}/tokenizer.model",
    "preprocess": "preprocess {s}/lines.jsonl --output {n}/out --tokenizer {p}",
    "score with it": "score --checkpoint {n}/run --input {s}/score.jsonl --output {n}/scored.jsonl --device cpu",
    "preprocess lines": "preprocess {f} --output {n}/out --tokenizer {s}/tokenizer.model",
    "train-tokenizer": "train-tokenizer {f} --output {n}/x.model --vocab-size 300",
    "score lines": "score --checkpoint {s}/run --input {f} --output {n}/scored.jsonl --device cpu",
    "evaluate lines": "evaluate --checkpoint {s}/run --suite preferences --data {f} --output {n}/evaluated",
    "evaluate gsm8k": "evaluate --checkpoint {s}/run --suite gsm8k-all --data {p} --output {n}/evaluated",
    "evaluate rmb": "evaluate --checkpoint {s}/run --suite rmb --data {p}/RMB --output {n}/evaluated",
    "sample": f"sample --pool {{p}}/pool.yaml --output {{n}}/sampled {_SAMPLE}",
    "sample again": f"sample --pool {{s}}/pool/pool.yaml --output {{p}} {_SAMPLE}",
    "sample lines": "sample --pool {s}/pool/pool.yaml --prompts {f} --output {n}/sampled --policies-per-prompt 2",
    "report": "report {p}",
    "report with it": "report {p} --evaluation x={p}/evaluation",
}
"""What a user types: {p} is what was planted, {f} the file of lines in it, {n} a directory beside it, {s} the scene."""


def door(name: str, *, scene: Path, place: Path) -> list[str]:
    lines = next(place.glob("lines.jsonl*"), place)
    return [word.format(p=place, f=lines, n=place.parent, s=scene) for word in DOORS[name].split()]


def make_scene(root: Path) -> Path:
    """A tokenizer, a dataset, an interrupted preprocess, a run with a checkpoint and an evaluation, lines, a pool."""
    root.mkdir(parents=True, exist_ok=True)
    model = conftest.make_tokenizer(root)
    conftest.write_trajectories(root / "lines.jsonl", num_prompts=40, seed=1)
    conftest.write_rankings(root / "rankings.jsonl", num_prompts=6, seed=2)
    rankings = [orjson.loads(line) for line in (root / "rankings.jsonl").read_bytes().splitlines()]
    scored = [{"prompt": r["prompt"], "reference": r["reference"], "output": r["ranked"][0]} for r in rankings]
    (root / "score.jsonl").write_bytes(b"\n".join(map(orjson.dumps, scored)))
    (root / "pool").mkdir()
    (root / "pool" / "pool.yaml").write_text("seed: 1\npolicies:\n  - {name: a, order: 1}\n  - {name: b, order: 2}\n")
    with contextlib.redirect_stderr(io.StringIO()):
        preprocess([root / "lines.jsonl"], output=root / "dataset", tokenizer_path=model)
    process = _FORK.Process(target=_interrupted, args=(root, model))
    process.start()
    process.join()
    shutil.copytree(root / "dataset" / "tokenizer", root / "tokenizer")
    changes = {"train__num_steps": 2, "checkpoint__save_interval": 2, "evaluation__interval": 0}
    (root / "run.yaml").write_text(dump_config(tiny_config(root / "dataset", root / "run", **changes)))
    for arguments in (
        ["train", str(root / "run.yaml")],
        door("evaluate", scene=root, place=root / "run"),
        door("sample", scene=root, place=root / "pool"),
    ):
        outcome = use(arguments, log=root / "log")
        assert outcome.how == "used", outcome.said
    (root / "evaluated").rename(root / "run" / "evaluation")
    exported = ["convert", "to-hf", "--checkpoint", str(root / "run"), "--output", str(root / "export")]
    outcome = use([*exported, "--layout", "internlm2"], log=root / "log")
    assert outcome.how == "used", outcome.said
    return root


def _interrupted(root: Path, model: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    faults.plan("merge:3")
    preprocess([root / "lines.jsonl"], output=root / "interrupted", tokenizer_path=model, unit_bytes=4000)


SECRET = "hunter2-7f3a9c"

# --- Malicious files -------------------------------------------------------------------------------------------------

_COPIED = {
    **dict.fromkeys(("checkpoint", "manifest", "run"), "run"),
    **dict.fromkeys(("dataset", "dataset manifest"), "dataset"),
    "work": "interrupted",
    "sampled": "sampled",
    "tokenizer": "tokenizer",
    "export": "export",
}


def malicious_files(workdir: Path, *, every: int = 1, versions: int = 10) -> dict:
    """Plant every `every`-th file of the corpus and walk in through one of its doors; `versions` of odd JSON a place.

    `canaries` counts files whose payload ran, that made the program start a command, or that put a script into a
    report; `leaks` checkpoints that made it say what an environment variable holds. `bad` says of these, and of what
    ended neither with one line nor with what was asked for, what happened.
    """
    scene, area, canary = make_scene(workdir / "scene"), workdir / "area", workdir / "canary"
    figures, places, bad = Counter(files=0, refused=0, used=0, canaries=0, leaks=0), set(), []
    for number, attack in enumerate(all_attacks(scene, canary=canary, versions=versions)[::every]):
        name = attack.doors[number % len(attack.doors)]
        outcome = attempt(attack, name, scene=scene, area=area)
        page = area / "place" / "report.html"
        ran = canary.exists() or bool(outcome.started)
        ran = ran or (page.is_file() and malicious_inputs.SCRIPT in page.read_text(errors="replace"))
        canary.unlink(missing_ok=True)
        leaked = attack.place.startswith("checkpoint") and SECRET in outcome.printed
        figures.update(["files", outcome.how, *["canaries"] * ran, *["leaks"] * leaked])
        places.add(attack.place)
        if ran or leaked or outcome.how not in ("used", "refused"):
            details = "; ".join([*outcome.started, *["leaked"] * leaked, outcome.said])
            bad.append(f"{attack.place}: {attack.name}, {name}: {outcome.how}: {details}")
    return {**figures, "places": len(places), "bad": bad}


def open_doors(workdir: Path) -> dict[str, str]:
    """How each door ends with the good files: a corpus that is refused for another reason would prove nothing."""
    scene, found = make_scene(workdir / "scene"), {}
    for attack in all_attacks(scene, canary=workdir / "canary", versions=1):
        for name in set(attack.doors) - set(found):
            plant = _leave_good_files(scene, attack.kind, name)
            good = malicious.Attack(attack.place, "nothing", attack.kind, plant, (name,))
            found[name] = attempt(good, name, scene=scene, area=workdir / "area").how
    return found


def _leave_good_files(scene: Path, kind: str, name: str) -> Callable[[Path], None]:
    lines = {"score lines": "score.jsonl", "evaluate lines": "rankings.jsonl"}.get(name, "lines.jsonl")
    files = {
        "config": ("run.yaml", "run.yaml"),
        "pool": ("pool/pool.yaml", "pool.yaml"),
        "lines": (lines, "lines.jsonl"),
    }

    def leave(place: Path) -> None:
        if kind in files:
            shutil.copy(scene / files[kind][0], place / files[kind][1])

    return leave


def all_attacks(scene: Path, *, canary: Path, versions: int) -> list[malicious.Attack]:
    checkpoint = checkpoint_of(scene / "run", 2)
    return [
        *malicious.metadata_attacks(canary),
        *malicious.torch_file_attacks(canary),
        *malicious.checkpoint_text_attacks(canary, checkpoint=checkpoint, count=versions),
        *malicious.config_attacks(canary, (scene / "run.yaml").read_text()),
        *malicious_inputs.tokenizer_attacks(canary, model=scene / "tokenizer.model", count=versions),
        *malicious_inputs.dataset_attacks(canary, dataset=scene / "dataset", count=versions),
        *malicious_inputs.work_attacks(canary, count=versions),
        *malicious_inputs.line_attacks(canary),
        *malicious_inputs.run_attacks(canary, run=scene / "run", count=versions),
        *malicious_inputs.sample_attacks(canary, output=scene / "sampled", count=versions),
        *malicious_inputs.suite_attacks(canary),
        *malicious_exports.export_attacks(canary, export=scene / "export", count=versions),
    ]


def attempt(attack: malicious.Attack, name: str, *, scene: Path, area: Path) -> Outcome:
    """Plant one file and go through one door."""
    place = copy_good(attack.kind, scene=scene, area=area)
    if attack.kind in ("checkpoint", "manifest"):
        attack.plant(checkpoint_of(place, 2))
    else:
        attack.plant(place)
    if attack.kind == "checkpoint":
        malicious.seal_checkpoint(checkpoint_of(place, 2))
    elif attack.kind == "dataset":
        malicious_inputs.seal_dataset(place)
    elif attack.kind == "tokenizer" and name == "score with it":
        shutil.copytree(scene / "run", area / "run")
        shutil.rmtree(checkpoint_of(area / "run", 2) / "tokenizer")
        shutil.copytree(place, checkpoint_of(area / "run", 2) / "tokenizer")
        malicious.seal_checkpoint(checkpoint_of(area / "run", 2))
    environment = {"PLANTED_SECRET": SECRET, **attack.environment}
    return use(door(name, scene=scene, place=place), log=area / "log", environment=environment)


def copy_good(kind: str, *, scene: Path, area: Path) -> Path:
    """A fresh copy of the good files of a kind, or an empty directory."""
    shutil.rmtree(area, ignore_errors=True)
    area.mkdir(parents=True)
    if kind in _COPIED:
        return Path(shutil.copytree(scene / _COPIED[kind], area / "place"))
    (area / "place" / ("RMB/BoN_set" if kind == "rmb" else "")).mkdir(parents=True)
    return area / "place"


# --- Paths that lead out ---------------------------------------------------------------------------------------------


def path_attacks(workdir: Path, *, every: int = 1) -> dict:
    """Every `every`-th row of the table; refused is also what was not followed where the program may go on."""
    scene, area = make_scene(workdir / "scene"), workdir / "area"
    figures, bad = Counter(attacks=0, refused=0, victims_touched=0), []
    for attack in paths.path_table()[::every]:
        place = copy_good(attack.kind, scene=scene, area=area)
        paths.make_victim(paths.victim_of(place))
        attack.plant(place)
        before = snapshot(paths.victim_of(place))
        outcome = use(door(attack.door, scene=scene, place=place), log=area / "log")
        touched = snapshot(paths.victim_of(place)) != before
        refused = outcome.how == "refused" or (attack.goes_on and outcome.how == "used")
        figures["attacks"] += 1
        figures["refused"] += refused and not touched
        figures["went_on_beside"] += outcome.how == "used" and not touched
        figures["victims_touched"] += touched
        if touched or not refused:
            bad.append(f"{attack.name}: {outcome.how}{', victim touched' * touched}: {outcome.said}")
    return {**figures, "bad": bad}


def snapshot(directory: Path) -> dict[str, bytes | str]:
    """Content of every file below a directory, and where links lead."""
    return {
        str(path.relative_to(directory)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


# --- Secrets ---------------------------------------------------------------------------------------------------------

SECRETS = {
    name: f"planted-{number}-{SECRET}"
    for number, name in enumerate(("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"))
}


def planted_secrets(workdir: Path) -> dict:
    """Train, evaluate, score, report and be refused with secrets in the environment; look for them in every file."""
    scene, area = make_scene(workdir / "scene"), workdir / "area"
    place = copy_good("empty", scene=scene, area=area)
    doors = ("train into it", "resume", "evaluate", "score", "report", "train on it")
    for number, name in enumerate(doors):
        arguments = door(name, scene=scene, place=place)
        more = ["logging.tensorboard=true", "run.device=cpu"] if arguments[0] == "train" else []
        outcome = use(arguments + more, log=area / f"log{number}", environment=SECRETS)
        assert outcome.how == ("refused" if name == "train on it" else "used"), outcome.said  # a run is no dataset
    files = [path for path in area.rglob("*") if path.is_file()]
    hits = [f"{path}: {name}" for path in files for name, text in SECRETS.items() if text.encode() in path.read_bytes()]
    return {"variables": len(SECRETS), "files": len(files), "hits": len(hits), "bad": hits}
