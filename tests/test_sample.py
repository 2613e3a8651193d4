"""`sample`: the same bytes for any workers and any interruption, prompts on one side of the split, usable records."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest

from megatron_polar.data.lines import read_jsonl
from megatron_polar.data.records import TrajectoryGroup, parse_record
from megatron_polar.errors import UserError
from megatron_polar.policies.ngram import split_words
from megatron_polar.policies.pool import load_pool
from megatron_polar.policies.prompts import draw_prompts, prompt_side
from megatron_polar.policies.sample import sample_pool

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "quickstart"
SMALL_POOL = "embedded: {num_policies: 6}\nsampling: {corpus_fraction: 0.2}\n"


@pytest.fixture(scope="module")
def pool_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "pool.yaml"
    path.write_text(SMALL_POOL, encoding="utf-8")
    return path


def draw(pool_path: Path, output: Path, **settings):
    return sample_pool(
        pool_path, prompts=None, output=output, **{"num_prompts": 90, "prompts_per_shard": 20, **settings}
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def groups(directory: Path) -> list[TrajectoryGroup]:
    return [
        parse_record(line, source="sample", line_number=number, default_wrapper="sft")
        for number, line in read_jsonl(directory)
    ]


@pytest.fixture(scope="module")
def drawn(pool_path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("drawn") / "output"
    draw(pool_path, output)
    return output


def test_the_bytes_do_not_depend_on_the_number_of_workers(pool_path, drawn, tmp_path):
    for workers in (2, 3):
        draw(pool_path, tmp_path / str(workers), workers=workers)
        assert contents(tmp_path / str(workers)) == contents(drawn)


def test_the_shards_do_not_change_what_is_drawn(pool_path, drawn, tmp_path):
    draw(pool_path, tmp_path / "one", prompts_per_shard=1000)
    assert groups(tmp_path / "one") == groups(drawn)


def test_every_record_is_usable_for_pre_training(drawn):
    records = groups(drawn)
    assert len(records) == 90
    for record in records:
        assert isinstance(record, TrajectoryGroup) and record.wrapper == "pretrain"
        assert list(Counter(trajectory.policy for trajectory in record.trajectories).values()) == [2, 1, 1, 1]
        texts = [trajectory.text for trajectory in record.trajectories]
        assert len(set(texts)) == len(texts)


def test_every_policy_becomes_an_anchor(drawn):
    assert len({record.trajectories[0].policy for record in groups(drawn)}) == 6


def test_the_manifest_describes_every_shard(drawn):
    manifest = json.loads((drawn / "manifest.json").read_text())
    shards = sorted(drawn.glob("trajectories-*.jsonl"))
    assert [entry["file"] for entry in manifest["shards"]] == [path.name for path in shards]
    assert [entry["sha256"] for entry in manifest["shards"]] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in shards
    ]
    assert [entry["prompts"] for entry in manifest["shards"]] == [20, 20, 20, 20, 10]
    assert (manifest["prompts"], manifest["trajectories"]) == (90, 450)
    assert manifest["words"] == sum(len(t.text.split()) for record in groups(drawn) for t in record.trajectories)
    assert not list(drawn.glob("*.partial"))


def test_another_seed_draws_other_prompts_and_other_texts(pool_path, drawn, tmp_path):
    draw(pool_path, tmp_path / "other", seed=2)
    one, other = groups(drawn), groups(tmp_path / "other")
    assert {record.prompt for record in one} != {record.prompt for record in other}
    texts = {trajectory.text for record in one for trajectory in record.trajectories}
    assert texts.isdisjoint(trajectory.text for record in other for trajectory in record.trajectories)


def test_a_killed_run_resumes_to_the_same_bytes(pool_path, tmp_path):
    settings = {"num_prompts": 3000, "prompts_per_shard": 100}
    command = (
        "import sys; from pathlib import Path; from megatron_polar.policies.sample import sample_pool; "
        f"sample_pool(Path(sys.argv[1]), prompts=None, output=Path(sys.argv[2]), **{settings})"
    )
    output = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", command, str(pool_path), str(output)], env=environment)
    deadline = time.monotonic() + 60
    while not (output / "trajectories-00001.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in output.glob("trajectories-*.jsonl")}
    report = draw(pool_path, output, **settings)
    assert 2 <= report.num_reused == len(before) < report.num_shards == 30
    assert {path: path.stat().st_mtime_ns for path in before} == before
    draw(pool_path, tmp_path / "straight", **settings)
    assert contents(output) == contents(tmp_path / "straight")


def test_a_shard_that_was_cut_is_drawn_again(pool_path, drawn, tmp_path):
    draw(pool_path, tmp_path / "cut")
    shard = tmp_path / "cut" / "trajectories-00002.jsonl"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert draw(pool_path, tmp_path / "cut").num_reused == 4
    assert contents(tmp_path / "cut") == contents(drawn)


def test_a_finished_output_is_left_alone(pool_path, tmp_path, capsys):
    draw(pool_path, tmp_path / "done")
    report = draw(pool_path, tmp_path / "done")
    assert report.num_reused == report.num_shards == 5
    assert "nothing to do" in capsys.readouterr().err


def test_all_policies_of_a_small_pool_answer_unless_told_otherwise(tmp_path):
    pool = tmp_path / "pool.yaml"
    for size, answering in ((6, 4), (3, 3)):
        pool.write_text(SMALL_POOL.replace("6", str(size)), encoding="utf-8")
        draw(pool, tmp_path / f"of-{size}", num_prompts=5)
        for group in groups(tmp_path / f"of-{size}"):
            assert len({trajectory.policy for trajectory in group.trajectories}) == answering


def test_an_output_of_other_settings_is_refused(pool_path, drawn, tmp_path):
    with pytest.raises(UserError, match=r"other settings \(--seed 1 then, 3 now\); repeat those"):
        draw(pool_path, drawn, seed=3)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not an output of `sample`"):
        draw(pool_path, tmp_path)


def test_train_and_held_out_prompts_share_no_opening():
    seen, unseen = load_pool(EXAMPLES / "pool.yaml"), load_pool(EXAMPLES / "unseen_pool.yaml")
    train = draw_prompts(seen, num_prompts=8000, split="train", seed=1)
    held_out = draw_prompts(seen, num_prompts=1000, split="heldout", seed=2)
    held_out += draw_prompts(unseen, num_prompts=1000, split="heldout", seed=3)
    assert len(set(train)) == 8000 and len(set(held_out[:1000])) == 1000
    openings = {tuple(split_words(prompt)[:3]) for prompt in train}
    assert openings.isdisjoint(tuple(split_words(prompt)[:3]) for prompt in held_out)
    assert {prompt_side(split_words(prompt)) for prompt in held_out} == {"heldout"}


def test_prompts_are_openings_of_the_corpus_with_the_pools_lengths(pool_path):
    pool = load_pool(pool_path)
    text = " ".join(word for document in pool.documents for word in document)
    for prompt in draw_prompts(pool, num_prompts=200, split="train", seed=4):
        words = split_words(prompt)
        assert pool.prompts.min_words <= len(words) <= pool.prompts.max_words
        assert " ".join(words) in text


def test_prompts_come_from_a_file_with_texts_and_messages(pool_path, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    lines = [{"prompt": "The object", "id": 7}, {"prompt": messages}, {"prompt": "Never reached"}]
    prompts.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    report = sample_pool(
        pool_path, prompts=prompts, output=tmp_path / "out", num_prompts=2, wrapper="sft", policies_per_prompt=2
    )
    assert (report.num_prompts, report.num_trajectories) == (2, 6)
    records = groups(tmp_path / "out")
    assert [record.prompt for record in records] == ["The object", "Be kind.\nHi"]
    assert {record.wrapper for record in records} == {"sft"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ""}', r"prompts\.jsonl:2: the prompt is empty"),
        ('{"prompt": 3}', r"prompts\.jsonl:2: cannot be read"),
        ('{"text": "x"}', r"prompts\.jsonl:2: has no key `prompt`"),
        ("{", r"prompts\.jsonl:2: cannot be read"),
        ("[1]", r"prompts\.jsonl:2: cannot be read"),
    ],
)
def test_a_bad_line_of_prompts_is_named(pool_path, tmp_path, line, message):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        sample_pool(pool_path, prompts=prompts, output=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policies_per_prompt": 7}, "policies_per_prompt=7 does not fit the 6 policies"),
        ({"policies_per_prompt": 1}, "policies_per_prompt=1 does not fit"),
        ({"trajectories_per_policy": 1}, "trajectories_per_policy=1 is too small; use 2"),
        ({"workers": 0}, "workers=0 is too small"),
        ({"num_prompts": 0}, "num_prompts=0 is too small"),
        ({"num_prompts": None}, "--num-prompts is missing"),
        ({"num_prompts": 10**7}, "above the .* different train prompts"),
        ({"wrapper": "chat"}, "wrapper='chat' is not known; use 'pretrain' or 'sft'"),
        ({"prompt_split": "test"}, "prompt_split='test' is not known"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(pool_path, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        draw(pool_path, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_too_few_prompts_in_a_file_are_reported(pool_path, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "fine"}\n')
    with pytest.raises(UserError, match=r"holds 1 prompts, and --num-prompts asks for 2"):
        sample_pool(pool_path, prompts=prompts, output=tmp_path / "out", num_prompts=2)
