"""No file that is opened runs code or ends in a traceback, no path leads out, no secret of the environment is kept."""

import ast
import os
import pickle
import re
import shutil
from pathlib import Path
from unittest import mock

import faults_safety
import malicious
import orjson
import pytest
from conftest import write_trajectories
from faults_safety import attempt, copy_good, door, make_scene, open_doors, path_attacks, planted_secrets, use
from payloads import METADATA, armed_pickles, dud_pickles, name, stream
from tiny_runs import checkpoint_of, tiny_config, training_refusal

from megatron_polar.config.load import dump_config, load_config, load_saved_config
from megatron_polar.errors import UserError
from megatron_polar.manifest import Damaged
from megatron_polar.train.build import refuse_planted_outputs
from megatron_polar.train.checkpoint_files import find_checkpoint, verify_checkpoint
from megatron_polar.train.journal import Journal, LineFile
from megatron_polar.train.last_words import LastWords
from megatron_polar.train.shard_files import _METADATA_CLASSES, read_metadata
from megatron_polar.train.verdicts import Process

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_polar"


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return make_scene(tmp_path_factory.mktemp("safety") / "scene")


# --- the metadata of a checkpoint ------------------------------------------------------------------------------------


def test_every_armed_pickle_fires_when_it_is_read_without_care(tmp_path):
    """Else the corpus would prove nothing."""
    canary = tmp_path / "canary"
    for payload in armed_pickles(canary).values():
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                process = pickle.loads(payload)
                process.wait() if hasattr(process, "wait") else None
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert canary.exists(), payload
        canary.unlink()


def _allowed_classes() -> dict[str, object]:
    import sys

    return {f"{m}.{n}": getattr(sys.modules[m], n) for m, names in _METADATA_CLASSES.items() for n in names}


def test_no_pickle_gets_anything_out_of_the_metadata(tmp_path):
    """No code runs, and the classes that it may use are afterwards what they were."""
    canary = tmp_path / "canary"
    before = {key: dict(vars(found)) for key, found in _allowed_classes().items() if hasattr(found, "__dict__")}
    for key, payload in (armed_pickles(canary) | dud_pickles(canary)).items():
        (tmp_path / ".metadata").write_bytes(payload)
        with pytest.raises(Damaged, match=r"^\.metadata ") as caught:
            read_metadata(tmp_path)
        assert "\n" not in str(caught.value), key
        assert not canary.exists(), key
    after = {key: dict(vars(found)) for key, found in _allowed_classes().items() if hasattr(found, "__dict__")}
    assert after == before


@pytest.mark.parametrize("asked", ["Metadata.__init__", "os", "os.path", "Metadata ", "metadata", "", "Enum"])
def test_a_name_is_allowed_as_it_stands_or_not_at_all(asked, tmp_path):
    for opcodes in (name(METADATA, asked), pickle.dumps(METADATA)[2:-2] + pickle.dumps(asked)[2:-2] + b"\x93"):
        (tmp_path / ".metadata").write_bytes(stream(opcodes, protocol=4))
        with pytest.raises(Damaged, match=r"\.metadata (asks for|cannot be read)"):
            read_metadata(tmp_path)


def test_honest_metadata_is_read_as_pickle_reads_it(scene):
    directory = checkpoint_of(scene / "run", 2)
    assert read_metadata(directory) == pickle.loads((directory / ".metadata").read_bytes())


def test_metadata_that_describes_a_part_of_a_tensor_is_refused(scene, tmp_path):
    shutil.copy(checkpoint_of(scene / "run", 2) / ".metadata", tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    next(entry for entry in metadata.state_dict_metadata.values() if hasattr(entry, "chunks")).chunks.pop()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(Damaged, match=r"\.metadata describes 0 of \d+ numbers of "):
        read_metadata(tmp_path)


# --- the whole program -----------------------------------------------------------------------------------------------


def test_every_door_stands_open_for_good_files(tmp_path):
    """What the corpus finds refused is refused for what was planted."""
    without_good_files = {"evaluate gsm8k", "evaluate rmb"}
    found = open_doors(tmp_path)
    assert {key for key, how in found.items() if how != "used"} == without_good_files
    assert len(found) > 15


def test_malicious_files_run_nothing_and_end_in_one_line(tmp_path):
    """A sample; `make faults` plants all of them."""
    figures = faults_safety.malicious_files(tmp_path, every=29)
    assert figures["bad"] == []
    assert figures["files"] == figures["refused"] + figures["used"] > 20
    assert figures["canaries"] == figures["leaks"] == 0
    assert figures["places"] > 12


def test_a_careless_reader_would_be_caught(scene, tmp_path):
    """The harness itself: with Python's own unpickler in its place the payload runs, and that is seen."""
    canary = tmp_path / "canary"
    attack = next(a for a in malicious.metadata_attacks(canary) if a.name == "os.system")
    with mock.patch("megatron_polar.train.shard_files._MetadataUnpickler", pickle.Unpickler):
        outcome = attempt(attack, "score", scene=scene, area=tmp_path / "area")
    assert canary.exists()
    assert outcome.how == "refused"  # what comes after the payload is no sign of safety
    assert outcome.started[0].startswith("AUDIT: os.system")


@pytest.mark.parametrize("packing", ["zip", "legacy"])
def test_an_environment_variable_of_torch_opens_no_checkpoint(packing, scene, tmp_path):
    canary = tmp_path / "canary"
    attack = next(a for a in malicious.torch_file_attacks(canary) if a.environment and a.name.startswith(packing))
    outcome = attempt(attack, "score", scene=scene, area=tmp_path / "area")
    assert not canary.exists()
    assert outcome.how == "refused"
    assert "common.pt cannot be read" in outcome.said


def test_paths_that_lead_out_are_refused_and_no_victim_is_touched(tmp_path):
    """A sample; `make faults` goes through the table."""
    figures = path_attacks(tmp_path, every=11)
    assert figures["bad"] == []
    assert figures["refused"] == figures["attacks"] > 20
    assert figures["victims_touched"] == 0


# --- configurations --------------------------------------------------------------------------------------------------


def test_a_saved_configuration_has_no_interpolations_and_a_users_may(tmp_path, trajectory_corpus, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = tmp_path / "config.yaml"
    good = dump_config(tiny_config(trajectory_corpus, "RUN"))
    path.write_text(good.replace("RUN", "${oc.env:SCRATCH}/run"))
    assert load_config(path).run.directory == "/scratch/me/run"
    with pytest.raises(UserError, match=rf"^{path}: has an interpolation, .* do not use this checkpoint$") as caught:
        load_saved_config(path)
    assert "/scratch/me" not in str(caught.value)
    path.write_text(good + "x: &a [1]\ny: *a\n")
    with pytest.raises(UserError, match=r"has the alias \*a, which no saved configuration has"):
        load_saved_config(path)
    path.write_text(good)
    assert load_saved_config(path) == load_config(path)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_built(tmp_path, trajectory_corpus):
    config = tiny_config(trajectory_corpus, tmp_path / "run", model__num_layers=10**9)
    message = training_refusal(config)
    assert re.search(r"describes \S+ parameters: \S+ GiB of weights on each of 1 ranks, and cpu has \S+ GiB", message)
    assert not (tmp_path / "run").exists()


# --- links -----------------------------------------------------------------------------------------------------------


def test_a_run_directory_that_is_a_link_to_scratch_works(scene, tmp_path):
    (tmp_path / "scratch").mkdir()
    place = tmp_path / "run"
    place.symlink_to("scratch")
    for words in (door("train into it", scene=scene, place=place), door("score", scene=scene, place=place)):
        assert use(words, log=tmp_path / "log").how == "used"
    assert place.is_symlink()
    assert find_checkpoint(place) == checkpoint_of(place, 1)
    assert (tmp_path / "scratch" / "checkpoints" / "step_00000001" / "manifest.json").is_file()


def test_a_step_given_by_a_link_is_read_and_one_within_a_run_is_not(scene, tmp_path):
    (tmp_path / "step_00000002").symlink_to(checkpoint_of(scene / "run", 2))
    assert find_checkpoint(tmp_path / "step_00000002") == checkpoint_of(scene / "run", 2).resolve()
    place = copy_good("run", scene=scene, area=tmp_path / "area")
    checkpoint_of(place, 2).rename(tmp_path / "moved")
    checkpoint_of(place, 2).symlink_to(tmp_path / "moved")
    assert verify_checkpoint(checkpoint_of(place, 2)) == "is a link, and checkpoints are directories"


def test_hard_links_are_read_and_never_written_through(scene, tmp_path):
    """A second name of a file cannot be told from the first; as long as the hash fits it does not matter."""
    place = copy_good("run", scene=scene, area=tmp_path / "area")
    backup = tmp_path / "backup"
    shutil.copytree(place, backup, copy_function=os.link)
    before = faults_safety.snapshot(backup)
    assert verify_checkpoint(checkpoint_of(place, 2)) is None
    assert use(door("resume", scene=scene, place=place), log=tmp_path / "log").how == "used"
    assert faults_safety.snapshot(backup) == before
    assert find_checkpoint(place) == checkpoint_of(place, 3)


def test_lines_are_not_appended_to_what_a_link_leads_to(tmp_path, capfd):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for target in (victim, tmp_path / "new"):
        (tmp_path / "events.jsonl").symlink_to(target)
        LineFile(tmp_path / "events.jsonl").append({"x": 1})
        (tmp_path / "events.jsonl").unlink()
    os.link(victim, tmp_path / "events.jsonl")
    Journal(tmp_path, writes=True).write("start")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "new").exists()
    assert orjson.loads((tmp_path / "events.jsonl").read_bytes())["event"] == "start"
    assert capfd.readouterr().err.count("cannot be written now") == 2


def test_last_words_are_not_written_through_a_link(tmp_path):
    run, victim = tmp_path / "run", tmp_path / "victim"
    (run / "stacks").mkdir(parents=True)
    victim.write_bytes(b"precious")
    written = [run / "heartbeat", run / "stacks/rank_00000.txt"]
    for path in written:
        os.link(victim, path)
    words = LastWords(run, process=Process.of_this(0), exit_code=1)
    words.beat("step", 3)
    words.stacks("hangs")
    words.finish()
    assert victim.read_bytes() == b"precious"
    assert written[0].read_text() == "step of step 3\n"
    assert "hangs" in written[1].read_text() and "Thread" in written[1].read_text()


@pytest.mark.parametrize("planted", ["checkpoints", "tensorboard", "stacks", "metrics.jsonl", "stacks/rank_00000.txt"])
def test_outputs_that_are_links_are_refused_before_anything_is_written(planted, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / planted).parent.mkdir(parents=True)
    refuse_planted_outputs(run)
    for target in (elsewhere, tmp_path):
        (run / planted).symlink_to(target)
        with pytest.raises(UserError, match=f"{planted}: is a link, and could lead anywhere; remove it"):
            refuse_planted_outputs(run)
        (run / planted).unlink()
    os.mkfifo(run / planted)
    with pytest.raises(UserError, match=f"{planted}: is neither a file nor a directory"):
        refuse_planted_outputs(run)


def test_a_damaged_loop_of_links_is_one_line(tmp_path, tokenizer_path):
    from megatron_polar.data.corpus import Corpus
    from megatron_polar.data.preprocess import preprocess

    source = write_trajectories(tmp_path / "in.jsonl", num_prompts=4, seed=1)
    preprocess([source], output=tmp_path / "dataset", tokenizer_path=tokenizer_path)
    (tmp_path / "dataset" / "corpus.bin").unlink()
    (tmp_path / "dataset" / "corpus.bin").symlink_to("corpus.bin")
    with pytest.raises(UserError, match=r"corpus\.bin is missing"):
        Corpus(tmp_path / "dataset")


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_no_secret_of_the_environment_is_written_or_printed(tmp_path):
    figures = planted_secrets(tmp_path)
    assert figures["hits"] == 0, figures["bad"]
    assert figures["variables"] == 4
    assert figures["files"] > 30


def test_what_a_secret_would_look_like_is_found(tmp_path, monkeypatch):
    """The search itself: a program that wrote its environment down would be caught."""
    with mock.patch("megatron_polar.train.run.dump_config", lambda config: dump_config(config) + f"# {os.environ}\n"):
        assert planted_secrets(tmp_path)["hits"] > 0


# --- what the package never does -------------------------------------------------------------------------------------

_FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads"),
    *("os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load"),
    *("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output", "shelve.open"),
}
_NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "np.save": ("allow_pickle", False)}


def _calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno


ASKS_THE_MACHINE = {("launch/node.py", "subprocess.run"), ("launch/submit.py", "subprocess.run")}
"""The preflight starts nvidia-smi and git, with arguments of its own; slurm/launch.sh starts sinfo, and sbatch with
what its user has written. No file is asked what to start."""


def test_the_package_has_no_way_to_run_what_it_reads():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for function, keywords, line in _calls(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(PACKAGE)}:{line}: {function}"
            if (path.relative_to(PACKAGE).as_posix(), function) in ASKS_THE_MACHINE and "shell" not in keywords:
                continue
            if function in _FORBIDDEN_CALLS or keywords.get("shell") == "True":
                found.append(where)
            if function in _NEEDED and keywords.get(_NEEDED[function][0]) != str(_NEEDED[function][1]):
                found.append(f"{where} without {'='.join(map(str, _NEEDED[function]))}")
    assert found == []


MAY_USE_TRANSFORMERS = {
    "examples/quickstart/score_with_transformers.py",
    "examples/study/base_model.py",
    "examples/study/rft_policies.py",
    "megatron_polar/convert/internlm2/configuration_internlm2.py",
    "megatron_polar/convert/internlm2/modeling_internlm2.py",
    "megatron_polar/convert/tokenizer.py",
    "megatron_polar/policies/local.py",
    "megatron_polar/score/verify_export.py",
}
"""What reads or is part of an export that was just written here, base models that the study has just trained, and
policies from local directories that a pool names
(safetensors only; a directory that asks for code of its own is refused before transformers sees it). Nothing else that
comes from elsewhere meets transformers."""


def test_remote_code_is_never_trusted():
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("tools/*.py"), *PACKAGE.parent.glob("examples/**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function, keywords, line in _calls(tree):
            assert "trust_remote_code" not in keywords, f"{path}:{line}: {function}"
        names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str}
        assert "trust_remote_code" not in names, path
        imports = [n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names]
        imports += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        uses = any(module.split(".")[0] == "transformers" for module in imports)
        assert uses == (path.relative_to(PACKAGE.parent).as_posix() in MAY_USE_TRANSFORMERS), path
