"""Scores are training's own rewards for the same texts, whatever is asked beside them, on however many ranks."""

import dataclasses
import json
import math

import numpy as np
import pytest
from ranks import run_ranks
from tiny_runs import STEPS, checkpoint_of, run_training, tiny_config

from megatron_polar import cli
from megatron_polar.config.load import load_saved_config
from megatron_polar.config.schema import ParallelSection
from megatron_polar.data.packing import build_micro_batch
from megatron_polar.errors import UserError
from megatron_polar.model.build import build_model
from megatron_polar.parallel import topology as ranks
from megatron_polar.parallel.device import select_device
from megatron_polar.score import scorer as scorer_module
from megatron_polar.score.evaluate import evaluate
from megatron_polar.score.requests import ScoreRequest
from megatron_polar.score.score_file import read_requests
from megatron_polar.score.scorer import load_scorer
from megatron_polar.score.suites import EvaluationItem
from megatron_polar.train.build import open_data
from megatron_polar.train.gradients import GradientReduction
from megatron_polar.train.optimizer import build_optimizer
from megatron_polar.train.state_dict import load_training
from megatron_polar.train.step import compute_rewards


@pytest.fixture(scope="module")
def trained(tmp_path_factory, trajectory_corpus):
    """A run whose weights have moved far from their start."""
    config = tiny_config(
        trajectory_corpus,
        tmp_path_factory.mktemp("scorer") / "run",
        optimizer__lr=1e-2,
        checkpoint__save_interval=STEPS,
        data__candidates_per_comparison=3,
    )
    run_training(config)
    return config


@pytest.fixture(scope="module")
def records(trajectory_corpus) -> list[dict]:
    return [json.loads(line) for line in (trajectory_corpus.parent / "input.jsonl").read_text().splitlines()]


def requests_of(records) -> list[ScoreRequest]:
    """The first trajectory of each record as reference, the others as outputs."""
    requests = []
    for record in records:
        reference, *outputs = [trajectory["text"] for trajectory in record["trajectories"]]
        requests.append(ScoreRequest(record["prompt"], reference, tuple(outputs), "pretrain"))
    return requests


def _score(directory: str, batches: list, parallel: dict) -> list:
    """Rewards of each batch of requests, asked one batch after the other."""
    scorer = load_scorer(directory, parallel=ParallelSection(**parallel), device_kind="cpu")
    return [scorer.score(batch) for batch in batches]


def score(config, *batches, world_size=1, **parallel) -> list:
    results = run_ranks(_score, world_size, config.run.directory, list(batches), parallel)
    assert all(result == results[0] for result in results), "every rank gets all rewards"
    return results[0]


def flat(rewards) -> np.ndarray:
    return np.concatenate([np.asarray(values) for values in rewards])


def _training_rewards(config, texts: list[list[str]]) -> list:
    """(document, reference, candidates, rewards) of training's own comparisons, model and forward pass."""
    device = select_device("cpu", local_rank=0)
    topology = ranks.initialize(config.parallel, device=device)
    data = open_data(config, topology=topology)
    model = build_model(config, topology=topology, device=device, vocab_size=data.vocab_size)
    optimizer = build_optimizer(config.optimizer, model=model, reduction=GradientReduction(model, device=device))
    newest = checkpoint_of(config.run.directory, STEPS)
    load_training(newest, model=model, optimizer=optimizer, topology=topology)
    corpus, control = data.train.corpora[0], data.train.control
    names = {
        tuple(half.ids): (document, number)
        for document in range(len(corpus))
        for number, half in enumerate(corpus.document(document).halves)
    }
    found = []
    for index in range(20):
        comparison = data.train.comparison(index)
        batch = build_micro_batch([comparison], layout="shared_prefix", pad_id=control.pad_id, pad_to_multiple=16)
        rewards = compute_rewards(model, micro_batches=[batch], topology=topology, device=device)[0].tolist()
        sequences = [np.concatenate([comparison.prefix, candidate]).tolist() for candidate in comparison.candidates]
        middle = sequences[0].index(control.separator_id)
        start = 0 if control.bos_id is None else 1
        document, reference = names[tuple(sequences[0][start:middle])]
        candidates = [names[tuple(sequence[middle + 1 : -1])][1] for sequence in sequences]
        found.append((document, texts[document][reference], [texts[document][c] for c in candidates], rewards))
    return found


def test_scores_equal_the_rewards_of_training(trained, records):
    texts = [[trajectory["text"] for trajectory in record["trajectories"]] for record in records]
    drawn = run_ranks(_training_rewards, 1, trained, texts)[0]
    requests = [ScoreRequest(records[d]["prompt"], ref, tuple(outs), "pretrain") for d, ref, outs, _ in drawn]
    found, wanted = score(trained, requests)[0], [rewards for *_, rewards in drawn]
    # The same fp32 arithmetic in rows of other lengths.
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-5, atol=1e-5)
    assert np.ptp(flat(wanted)) > 0.1


def _random_states_at_build(checkpoint) -> list[int]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    seen, build = [], scorer_module.build_model

    def build_model(*arguments, **options):
        seen.append(len(get_cuda_rng_tracker().get_states()))
        return build(*arguments, **options)

    scorer_module.build_model = build_model
    load_scorer(checkpoint, device_kind="cpu")
    return seen


def test_the_layers_random_states_are_there_before_a_model_is_built(trained):
    """On a GPU megatron-core's embedding and Transformer Engine's attention ask for one, though they draw nothing from
    it, and raise where there is none; on the CPU nobody asks."""
    ((count,),) = run_ranks(_random_states_at_build, 1, trained.run.directory)
    assert count > 0


def test_what_was_trained_in_fp8_is_scored_in_bf16(trained, records, monkeypatch):
    """On any machine: the checkpoint has no FP8 in it."""

    def in_fp8(path):
        config = load_saved_config(path)
        train = dataclasses.replace(config.train, fp8="delayed", fp8_bf16_layers=0, fp8_param_gather=True)
        return dataclasses.replace(config, train=train)

    (expected,) = score(trained, requests_of(records[:3]))
    monkeypatch.setattr(scorer_module, "load_saved_config", in_fp8)
    (found,) = score(trained, requests_of(records[:3]))
    np.testing.assert_array_equal(flat(found), flat(expected))


def test_what_was_trained_with_transformer_engine_is_scored_without(trained, records, monkeypatch):
    """As the YAMLs of examples/ insist on it, and on `run.device: cuda`."""

    def insisting(path):
        config = load_saved_config(path)
        model = dataclasses.replace(config.model, transformer_impl="transformer_engine", attention="te")
        return dataclasses.replace(config, model=model, run=dataclasses.replace(config.run, device="cuda"))

    (expected,) = score(trained, requests_of(records[:3]))
    monkeypatch.setattr(scorer_module, "load_saved_config", insisting)
    (found,) = score(trained, requests_of(records[:3]))
    np.testing.assert_array_equal(flat(found), flat(expected))


def test_outputs_scored_together_equal_each_alone_and_order_plays_no_part(trained, records):
    requests = requests_of(records[:12])
    alone = [ScoreRequest(r.prompt, r.reference, (output,), r.wrapper) for r in requests for output in r.outputs]
    together, one_by_one, backwards = score(trained, requests, alone, requests[::-1])
    assert [len(values) for values in together] == [3] * 12
    np.testing.assert_allclose(flat(together), flat(one_by_one), atol=1e-5)
    np.testing.assert_allclose(flat(together), flat(backwards[::-1]), atol=1e-5)
    assert np.ptp(flat(together)) > 0.1


def test_equal_outputs_get_equal_rewards_and_reference_and_wrapper_count(trained, records):
    base = requests_of(records[:1])[0]
    output = base.outputs[0]
    rewards = score(
        trained,
        [
            ScoreRequest(base.prompt, base.reference, (output, output), "pretrain"),
            ScoreRequest(base.prompt, base.outputs[1], (output,), "pretrain"),
            ScoreRequest(base.prompt, base.reference, (output,), "sft"),
            ScoreRequest("ba ke", base.reference, (output,), "pretrain"),
        ],
    )[0]
    assert rewards[0][0] == pytest.approx(rewards[0][1], abs=1e-5)
    for other in rewards[1:]:
        assert abs(other[0] - rewards[0][0]) > 1e-4


def test_no_requests_give_no_rewards_and_empty_texts_are_scored(trained):
    nothing, empty = score(trained, [], [ScoreRequest("", "", ("", "ba"), "sft")])
    assert nothing == []
    assert np.isfinite(empty).all()


@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    ids=["dp2", "tp2", "pp2"],
)
def test_two_ranks_score_like_one(parallel, trained, records):
    requests = requests_of(records[:9])
    single, double = score(trained, requests)[0], score(trained, requests, world_size=2, **parallel)[0]
    np.testing.assert_allclose(flat(double), flat(single), atol=1e-5)


def _rows_and_rewards(directory: str, request: ScoreRequest, max_tokens: int) -> tuple[list[int], list[float]]:
    """Tokens of each row that the model saw, and the rewards."""
    scorer = load_scorer(directory, device_kind="cpu")
    scorer._shape = dataclasses.replace(scorer._shape, max_tokens=max_tokens)
    rows = []

    def compute(model, *, micro_batches, **keywords):
        rows.extend(batch.tokens.size for batch in micro_batches)
        return compute_rewards(model, micro_batches=micro_batches, **keywords)

    scorer_module.compute_rewards = compute
    return rows, scorer.score([request])[0]


def test_outputs_beyond_a_row_are_split_and_get_the_same_rewards(trained, records):
    base = requests_of(records[:1])[0]
    outputs = tuple(f"{base.outputs[k % 3]} {'ba ' * (k % 7)}" for k in range(60))
    request = ScoreRequest(base.prompt, base.reference, outputs, base.wrapper)
    (rows, split), (one_row, whole) = (
        run_ranks(_rows_and_rewards, 1, trained.run.directory, request, limit)[0] for limit in (300, 10**6)
    )
    assert len(one_row) == 1
    assert len(rows) > 3
    assert max(rows) < 300 + 64  # rows are padded to a multiple
    np.testing.assert_allclose(split, whole, atol=1e-5)  # the same fp32 arithmetic in rows of other lengths
    assert np.ptp(whole) > 0.1


def test_a_layout_that_does_not_fit_the_model_is_refused_before_it_is_built(trained):
    for message in run_ranks(_refused_layout, 3, trained.run.directory):
        assert "parallel.tensor_model_parallel_size=3 does not divide model.num_query_groups=2" in message


def _refused_layout(directory) -> str:
    try:
        load_scorer(directory, parallel=ParallelSection(tensor_model_parallel_size=3), device_kind="cpu")
    except UserError as error:
        return str(error)
    return ""


def test_long_texts_are_scored_within_the_models_length(trained):
    """Answers longer than the model's sequences keep their head, as they do at the published length."""
    long = " ".join(["ba ke li"] * 400)
    requests = [ScoreRequest(long, long, (long, "mo"), "sft")]
    assert np.isfinite(score(trained, requests)[0]).all()


# --- the command -----------------------------------------------------------------------------------------------------


def _command(arguments: list[str]) -> int:
    return cli.main(arguments)


def score_command(config, source, output, world_size=1, *more) -> list[int]:
    arguments = ["score", "--checkpoint", config.run.directory, "--input", str(source), "--output", str(output)]
    return run_ranks(_command, world_size, [*arguments, "--device", "cpu", *more])


def test_the_command_copies_lines_and_adds_rewards(trained, records, tmp_path):
    base = requests_of(records[:5])
    lines = [
        {"id": 7, "prompt": base[0].prompt, "reference": base[0].reference, "output": base[0].outputs[0]},
        {
            "prompt": base[1].prompt,
            "reference": base[1].reference,
            "outputs": list(base[1].outputs),
            "wrapper": "pretrain",
            "é": [1, None],
        },
        {
            "prompt": [{"role": "user", "content": "ba"}, {"role": "user", "content": "ke"}],
            "reference": "li",
            "output": "mo",
            "wrapper": "sft",
        },
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert score_command(trained, source, output, 2, "--tensor-model-parallel-size", "2") == [0, 0]
    written = [json.loads(line) for line in output.read_text().splitlines()]
    rewards = [written[0].pop("reward"), *written[1].pop("rewards"), written[2].pop("reward")]
    assert written == lines
    expected = score(
        trained,
        [
            ScoreRequest(base[0].prompt, base[0].reference, base[0].outputs[:1], "pretrain"),  # as in training
            base[1],
            ScoreRequest("ba\nke", "li", ("mo",), "sft"),
        ],
    )[0]
    np.testing.assert_allclose(rewards, flat(expected), atol=1e-5)
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


GOOD = '{"prompt": "a", "reference": "b", "output": "c"}'


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"prompt": "a"', "malformed JSON"),
        ('{"prompt": "\udce9"}', "not UTF-8 (byte 12: 0xe9); convert the file to UTF-8"),
        (f"[{', '.join([GOOD] * 99)}]", "a JSON array, not an object with prompt, reference and output"),
        ('{"reference": "b", "output": "c"}', "'prompt' is missing"),
        ('{"prompt": "a", "output": "c"}', "'reference' is missing"),
        ('{"prompt": "a", "reference": "b"}', "'output' is missing"),
        ('{"prompt": "a", "reference": "b", "outputs": []}', "non-empty list"),
        ('{"prompt": "a", "reference": "b", "outputs": "c"}', "non-empty list"),
        ('{"prompt": 3, "reference": "b", "output": "c"}', "prompt=3"),
        (f'{{"prompt": "a", "reference": "b", "output": [{", ".join(["1"] * 999)}]}}', "output=[1, 1, 1"),
        ('{"prompt": "a", "reference": "b", "output": null}', "output=None"),
        ('{"prompt": "a", "reference": "b", "output": "c", "wrapper": "chat"}', "sft or pretrain"),
    ],
)
def test_a_bad_line_is_refused_with_its_place_before_any_model_is_loaded(line, part, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text(f"{GOOD}\n{line}\n", errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        read_requests(source)
    assert len(str(caught.value)) < 300 + len(str(source))
    assert str(caught.value).startswith(f"{source}:2: ")
    assert part in str(caught.value)
    arguments = ["--checkpoint", str(tmp_path), "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(["score", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {source}:2: ")
    assert not (tmp_path / "out.jsonl").exists()


class LengthScorer:
    """Rewards the length of an output; counts what it was asked."""

    def score(self, requests):
        return [[float(len(output)) for output in request.outputs] for request in requests]


def test_score_file_keeps_every_line_of_a_long_file(tmp_path):
    from megatron_polar.score.score_file import score_file

    lines = [{"id": i, "prompt": "p", "reference": "r", "output": "x" * (i % 7)} for i in range(600)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        score_file(LengthScorer(), tmp_path / "in.jsonl", output=tmp_path / "out.jsonl", default_wrapper="sft") == 600
    )
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert scored == [line | {"reward": float(line["id"] % 7)} for line in lines]


class BrokenScorer:
    def score(self, requests):
        raise RuntimeError("broken")


def test_a_misspelt_key_is_named_once_and_other_keys_are_copied_in_silence(tmp_path, capsys):
    from megatron_polar.score.score_file import score_file

    line = {"prompt": "p", "reference": "r", "output": "o", "id": 7, "prompt_id": 3}
    given = [line, line | {"wraper": "pretrain"}, line | {"wraper": "pretrain", "refrences": 1}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in given))
    score_file(LengthScorer(), tmp_path / "in.jsonl", output=tmp_path / "out.jsonl", default_wrapper="sft")
    warned = [said for said in capsys.readouterr().err.splitlines() if "has no effect" in said]
    assert len(warned) == 2
    assert "in.jsonl:2: key 'wraper' has no effect" in warned[0] and "'wrapper' would" in warned[0]
    assert "in.jsonl:3: key 'refrences'" in warned[1] and "'references' would" in warned[1]
    written = [json.loads(each) for each in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["id"] for each in written] == [7, 7, 7] and written[1]["wraper"] == "pretrain"


def test_a_failed_score_leaves_no_file_behind(tmp_path):
    from megatron_polar.score.score_file import score_file

    (tmp_path / "in.jsonl").write_text('{"prompt": "p", "reference": "r", "outputs": ["x"]}\n')
    with pytest.raises(RuntimeError):
        score_file(BrokenScorer(), tmp_path / "in.jsonl", output=tmp_path / "out.jsonl", default_wrapper="sft")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


class NanScorer:
    """NaN for the second output of the third request."""

    def score(self, requests):
        return [
            [math.nan if (number, place) == (2, 1) else 1.0 for place in range(len(request.outputs))]
            for number, request in enumerate(requests)
        ]


def test_a_reward_that_is_not_finite_is_an_error_with_its_line_and_leaves_no_file(tmp_path):
    from megatron_polar.score.score_file import score_file

    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "p", "reference": "r", "outputs": ["x", "y"]}\n' * 4)
    with pytest.raises(UserError) as caught:
        score_file(NanScorer(), source, output=tmp_path / "out.jsonl", default_wrapper="sft")
    assert str(caught.value).startswith(f"{source}:3: rewards [1.0, nan] are not finite")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_outputs_that_a_cut_makes_the_same_tie_and_are_counted(trained, tmp_path, capfd):
    """In rows of their own they would differ by roundings, and their order would be chance."""
    word = "bakelimo " * 400
    item = EvaluationItem("i", "p", "r", (word + "a", word + "b", "c"), (2, 1, 0), "c", "sft")
    summary, rewards = run_ranks(score_cut, 1, trained.run.directory, item, tmp_path)[0]
    assert summary["outputs_cut"] == 2
    assert rewards[0] == rewards[1] != rewards[2]
    assert "2 candidates were cut as in training" in capfd.readouterr().err


def score_cut(checkpoint, item, directory):
    scorer = load_scorer(checkpoint, device_kind="cpu")
    summary = evaluate(scorer, [item], output=directory / "out", suite="s")
    (line,) = (directory / "out" / "rewards.jsonl").read_text().splitlines()
    return summary, json.loads(line)["rewards"]


def test_evaluate_names_its_references_and_takes_answers_of_a_policy(trained, trajectory_corpus, tmp_path, capfd):
    texts = trajectory_corpus.parent / "input.jsonl"

    def command(*arguments) -> int:
        options = ("--checkpoint", trained.run.directory, "--output", tmp_path / "out", "--device", "cpu")
        return run_ranks(cli.main, 1, ["evaluate", *map(str, (*arguments, *options))])[0]

    assert command("--suite", "policies", "--data", texts, "--comparisons-per-prompt", 3) == 0
    assert "policies, reference leave-one-out: accuracy" in capfd.readouterr().err
    several = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert several["num_items"] > 2 * len(texts.read_text().splitlines())
    assert (tmp_path / "out" / "policy_pairs.csv").is_file()
    policy = several["policy_pairs"]["policies"][0]
    rows = [{"prompt": json.loads(line)["prompt"], "reference": "r", "chosen": "good", "rejected": "bad"}
            for line in texts.read_text().splitlines()]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = ("--reference-scheme", f"policy:{policy}", "--reference-answers", texts)
    assert command("--suite", "preferences", "--data", tmp_path / "p.jsonl", *answers) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["reference_scheme"], summary["policy_pairs"]) == (f"policy:{policy}", None)
    assert not (tmp_path / "out" / "policy_pairs.csv").exists()  # it was the earlier evaluation's
    capfd.readouterr()
    assert command("--suite", "judgebench", "--data", texts, "--reference-scheme", "gold") == 2
    assert "error: suite 'judgebench' has no references for the scheme 'gold'" in capfd.readouterr().err
