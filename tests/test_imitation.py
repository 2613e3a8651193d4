"""Policies that imitate a model from its published answers: what they say, from where, and what is refused."""

import json
import re
from itertools import pairwise

import pytest

from megatron_polar.errors import UserError
from megatron_polar.policies.imitation import fit_imitation, read_answers, read_imitation, split_tokens
from megatron_polar.policies.pool import load_pool
from megatron_polar.policies.sample import sample_pool

ANSWERS = [
    ("Who sings?", "Birds sing at dawn.\n\n- Larks begin,\n- thrushes follow."),
    ("What floats?", "Corks float, boats float; 2 stones of 10 do not."),
    ("Where is it cold?", "Snow lies on mountains, and ice covers seas."),
]
HELD_OUT = ("What is hidden?", "Zanzibar xylophones quietly quaver.")


def write_answers(path, rows=ANSWERS, held_out=(HELD_OUT,)):
    lines = [{"prompt": prompt, "text": text} for prompt, text in rows]
    lines += [{"prompt": prompt, "text": text, "heard": False} for prompt, text in held_out]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def fitted(directory, **changes):
    write_answers(directory / "answers.jsonl")
    entry = {"name": "a", "answers": "answers.jsonl", "corpus_fraction": 1.0} | changes
    return fit_imitation(read_imitation(entry, {}, seed=1, directory=directory, where="pool"))


def draw(policy, prompt, count=20, *, seed=1, wrapper="sft"):
    return policy.generate(prompt, num_trajectories=count, seed=seed, wrapper=wrapper)


def write_pool(directory, **changes):
    policies = []
    for name in ("a", "b", "c"):
        write_answers(directory / f"{name}.jsonl", rows=[(p, f"{name.upper()} says: {t}") for p, t in ANSWERS])
        policies.append({"name": name, "answers": f"{name}.jsonl", "corpus_fraction": 1.0} | changes)
    pool = directory / "pool.yaml"
    pool.write_text(json.dumps({"policies": policies}))
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p, _ in [*ANSWERS, HELD_OUT]))
    return pool


def sample(directory, pool, output="out", **changes):
    return sample_pool(
        pool, prompts=directory / "prompts.jsonl", output=directory / output, schedule="all", wrapper="sft", **changes
    )


@pytest.mark.parametrize(
    "text", ["a b", "  x\n\n- 1,024.50 __init__ (it's)", "naïve: 東京!\t2²", "```py\nx=1\n```", ""]
)
def test_tokens_joined_are_the_text(text):
    assert "".join(split_tokens(text)) == text


def test_a_trajectory_depends_on_its_seeds_alone(tmp_path):
    policy = fitted(tmp_path)
    first = draw(policy, "Who sings?", 5)
    draw(policy, "What floats?", 3)
    assert draw(policy, "Who sings?", 5) == first
    assert draw(policy, "Who sings?", 2) == first[:2]
    assert draw(policy, "Who sings?", 5, seed=2) != first
    assert len(set(draw(policy, "Who sings?", 40))) > 8


def test_full_fidelity_follows_the_prompts_own_answer(tmp_path):
    answer = split_tokens(dict(ANSWERS)["Where is it cold?"])
    pairs = set(pairwise(answer))
    for text in draw(fitted(tmp_path, fidelity=1.0), "Where is it cold?"):
        tokens = split_tokens(text)
        assert tokens[0] == answer[0]
        assert set(pairwise(tokens)) <= pairs


def test_no_fidelity_is_style_alone(tmp_path):
    policy = fitted(tmp_path, fidelity=0.0)
    words = {word for text in draw(policy, "Who sings?", 60) for word in re.findall(r"\w+", text)}
    assert {"Birds", "Corks", "Snow"} <= words


def test_what_is_not_to_be_heard_is_said_to_its_own_prompt_alone(tmp_path):
    policy = fitted(tmp_path, fidelity=0.5)
    hidden = set(re.findall(r"\w+", HELD_OUT[1]))
    own = draw(policy, HELD_OUT[0], 40)
    others = [text for prompt, _ in ANSWERS for text in draw(policy, prompt, 200)] + draw(policy, "unknown", 200)
    assert any(hidden & set(re.findall(r"\w+", text)) for text in own)
    assert not any(hidden & set(re.findall(r"\w+", text)) for text in others)


def test_trajectories_end_and_are_never_empty(tmp_path):
    policy = fitted(tmp_path, max_words=6)
    texts = draw(policy, "Who sings?", 100) + draw(policy, "unknown", 100)
    assert all(text.strip() for text in texts)
    assert max(len(split_tokens(text)) for text in texts) == 6
    longer = draw(fitted(tmp_path, max_words=400, fidelity=1.0), "Where is it cold?", 50)
    assert {text[-1] for text in longer} == {"."}


def test_under_the_pretrain_wrapper_it_is_apart_from_the_prompt(tmp_path):
    policy = fitted(tmp_path)
    assert all(text.startswith("\n") for text in draw(policy, "Who sings?", 5, wrapper="pretrain"))
    assert [text.strip() for text in draw(policy, "Who sings?", 5, wrapper="pretrain")] == draw(policy, "Who sings?", 5)


def test_a_pool_of_imitations_samples_and_resumes(tmp_path):
    pool = write_pool(tmp_path)
    report = sample(tmp_path, pool)
    assert (report.num_prompts, report.num_trajectories) == (4, 4 * 3 * 2)
    lines = [json.loads(line) for line in (tmp_path / "out/trajectories-00000.jsonl").read_text().splitlines()]
    for line in lines[:3]:
        own = [t["text"].startswith(t["policy"].upper()) for t in line["trajectories"]]
        assert sum(own) > len(own) / 2
    settings = (tmp_path / "out/settings.json").read_text()
    assert str(tmp_path) not in settings
    assert json.loads(settings)["policies"][0]["backend"] == "imitation"
    assert sample(tmp_path, pool).num_reused == report.num_shards
    (tmp_path / "elsewhere").mkdir()
    moved = write_pool(tmp_path / "elsewhere")
    sample(tmp_path, moved, output="out")  # the same answers at another place
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "new", "text": "New words."}) + "\n")
    with pytest.raises(UserError, match="other policies of the pool"):
        sample(tmp_path, pool)


def test_workers_make_the_same_bytes(tmp_path):
    pool = write_pool(tmp_path)
    sample(tmp_path, pool, prompts_per_shard=1)
    sample(tmp_path, pool, output="two", prompts_per_shard=1, workers=2)
    for shard in sorted((tmp_path / "out").glob("*.jsonl")):
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()


def test_imitations_mix_with_other_embedded_policies(tmp_path):
    pool = write_pool(tmp_path)
    content = json.loads(pool.read_text())
    content["policies"].append({"name": "words", "order": 2})
    pool.write_text(json.dumps(content))
    assert [policy.name for policy in load_pool(pool).fit()] == ["a", "b", "c", "words"]
    assert sample(tmp_path, pool).num_trajectories == 4 * 4 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": "missing.jsonl"},
            r"policies\[0\]: answers: .*missing.jsonl: No such file or directory; name a JSONL",
        ),
        ({"fidelity": 1.5}, r"fidelity=1.5 is not a number in \[0, 1\]"),
        ({"order": 1}, "order=1 is not a whole number from 2 to 3"),
        ({"favourite_words": ["x"]}, "unknown key `favourite_words`"),
        ({"backend": "http"}, "unknown key `answers`"),
    ],
)
def test_a_wrong_key_is_one_clear_line(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_pool(write_pool(tmp_path, **change))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"answers.jsonl:5: cannot be read"),
        ('{"prompt": "p"}', r"answers.jsonl:5: cannot be read \(KeyError\('text'\)\); each line is"),
        ('{"prompt": "p", "text": 3}', r"answers.jsonl:5: cannot be read"),
        ('{"prompt": 3, "text": "t"}', r"answers.jsonl:5: cannot be read"),
        ("[1]", r"answers.jsonl:5: cannot be read"),
    ],
)
def test_a_bad_answer_is_named_with_its_line(line, message, tmp_path):
    path = write_answers(tmp_path / "answers.jsonl")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=message):
        read_answers(path)


def test_answers_of_which_none_may_be_heard_are_refused(tmp_path):
    path = write_answers(tmp_path / "answers.jsonl", rows=[])
    with pytest.raises(UserError, match="no answer in it that may be read"):
        read_answers(path)
