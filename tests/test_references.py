"""Several references for a prompt: drawn in turn for training, averaged by clients, compared by evaluations."""

import asyncio
import gzip
import importlib.util
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer, native, ok, pooling, value_of
from test_comparisons import halves_by_ids, open_comparisons

from megatron_polar import cli
from megatron_polar.data import public
from megatron_polar.data.corpus import Corpus
from megatron_polar.data.preprocess import preprocess
from megatron_polar.data.records import Preference, RecordError, drop_duplicates, parse_record, read_texts
from megatron_polar.data.references import mean_over_references, split_references
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.errors import UserError
from megatron_polar.score.evaluate import evaluate
from megatron_polar.score.reference_counts import bootstrap_interval
from megatron_polar.score.report import evaluation_report
from megatron_polar.score.suites import EvaluationItem, load_suite
from megatron_polar.serve import adapters
from megatron_polar.serve.client import RewardClient, RewardError, RewardItem
from megatron_polar.serve.reward_function import RewardFunction, RewardSettings, configured


def parse(record: dict) -> Preference:
    return parse_record(json.dumps(record), source="f", line_number=1)


LINE = {"prompt": "p", "chosen": "c", "rejected": "d"}

# --- records -------------------------------------------------------------------------------------------------------


def test_a_line_has_one_reference_or_a_list_of_them():
    one, listed = parse(LINE | {"reference": "r"}), parse(LINE | {"references": ["r"]})
    assert one == listed == Preference("p", "r", ("c", "d"), "sft", {})
    said = [{"role": "assistant", "content": "s"}, {"role": "assistant", "content": "t"}]
    several = parse(LINE | {"references": ["r", said, "r", "u"]})
    assert several.references == ("r", "s\nt", "u")
    distinct = drop_duplicates(several, source="f", line_number=1)
    assert (distinct.duplicates, distinct.record.references) == (1, ("r", "s\nt", "u"))


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"references": []}, "'references' is an empty list"),
        ({"references": "r"}, "'references' is not a list"),
        ({"references": ["r", 3]}, "'references[1]' is a JSON number 3"),
        ({"references": ["r"], "reference": "r"}, "'references' is there beside 'reference'"),
        ({"references": [{"role": "user", "content": "r"}]}, "'references[0]' is a JSON object"),
        ({}, "missing key 'reference'"),
    ],
)
def test_other_references_are_refused_with_their_place(record, part):
    with pytest.raises(RecordError) as caught:
        parse(LINE | record)
    assert str(caught.value).startswith("f:1: ")
    assert part in str(caught.value)


def test_a_list_is_several_references_unless_it_is_messages():
    said = [{"role": "user", "content": "a"}]
    assert split_references("a") is split_references(said) is None
    assert split_references(["a", said]) == ["a", said]
    assert split_references([]) == []


# --- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer_path):
    """Rankings with one, two and three references, and the lines that they came from."""
    directory = tmp_path_factory.mktemp("references")
    lines = []
    for number in range(12):
        references = [f"li mo {number} {'ra ' * (k + 1)}" for k in range(number % 3 + 1)]
        lines.append({"prompt": f"ba ke {number}", "references": references, "ranked": ["ba", f"ke {number}", "mo nu"]})
    lines[5]["references"].append(lines[5]["references"][0])
    (directory / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = preprocess([directory / "in.jsonl"], output=directory / "dataset", tokenizer_path=tokenizer_path)
    assert report.duplicates_dropped == 1
    assert (report.documents, report.preferences, report.halves) == (12, 12, 12 * 3 + 4 * (1 + 2 + 3))
    return directory / "dataset", lines


def test_a_dataset_keeps_all_references_and_tells_them_from_candidates(dataset, tokenizer_path):
    path, lines = dataset
    corpus, tokenizer = Corpus(path), load_tokenizer(tokenizer_path)
    for number, line in enumerate(lines):
        document, references = corpus.document(number), list(dict.fromkeys(line["references"]))
        texts = [tokenizer.decode(half.ids).split("\n", 1)[1] for half in document.halves]
        assert [text.strip() for text in texts] == [text.strip() for text in [*references, *line["ranked"]]]
        assert (document.kind, document.num_references) == ("preference", len(references))
        assert document.policy_ids.tolist() == [-1] * len(texts)
    corpus.verify_hashes()


def test_each_epoch_takes_another_reference_and_all_of_them_equally_often(dataset):
    comparisons = open_comparisons(dataset[0], seed=3, candidates=3)
    table = halves_by_ids(comparisons)
    drawn: dict[int, list[int]] = {}
    for index in range(6 * 12):
        comparison = comparisons.comparison(index)
        start = 0 if comparisons.control.bos_id is None else 1
        whole = np.concatenate([comparison.prefix, comparison.candidates[0]]).tolist()
        _, document, half, _ = table[tuple(whole[start : whole.index(comparisons.control.separator_id)])]
        assert (len(comparison.candidates), comparison.levels) == (3, (0, 1, 2))
        drawn.setdefault(document, []).append(half)
        again = comparisons.comparison(index)
        assert np.array_equal(comparison.prefix, again.prefix)
    for document, halves in drawn.items():
        count = document % 3 + 1
        assert halves[:count] == halves[count : 2 * count]  # in turn
        assert sorted(halves[:count]) == list(range(count))
    assert len({halves[0] for document, halves in drawn.items() if document % 3 == 2}) > 1  # not all begin alike


def test_lines_with_one_reference_are_stored_as_ever(tmp_path, tokenizer_path):
    for name, given in (("one", {"reference": "li"}), ("listed", {"references": ["li"]})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(LINE | given) + "\n")
        preprocess([tmp_path / f"{name}.jsonl"], output=tmp_path / name, tokenizer_path=tokenizer_path)
    one, listed = Corpus(tmp_path / "one"), Corpus(tmp_path / "listed")
    assert one.fingerprint == listed.fingerprint
    (tmp_path / "several.jsonl").write_text(json.dumps(LINE | {"references": ["li", "mo"]}) + "\n")
    assert set(read_texts([tmp_path / "several.jsonl"])) == {"p", "li", "mo", "c", "d"}


# --- clients -------------------------------------------------------------------------------------------------------


def reward_of(prompt: str, reference: str, output: str, wrapper: str | None = None) -> float:
    return value_of([prompt, reference, output, wrapper])


def mean_of(prompt: str, references, output: str) -> float:
    return sum(reward_of(prompt, reference, output) for reference in references) / len(references)


@pytest.fixture
def server():
    with FlakyServer(lambda request: ok(native(request))) as server:
        yield server


def test_the_client_averages_over_distinct_references(server, capfd):
    items = [RewardItem("p", ["r", "s", "r"], f"o{i}") for i in range(3)] + [RewardItem("p", "r", "o0")]
    items.append(RewardItem("q", [[{"role": "assistant", "content": "t"}], "u"], "o"))
    with RewardClient(server.url, engine="megatron-polar", batch_size=4) as client:
        found, each = client.score(items), client.score_per_reference(items)
        assert asyncio.run(client.score_async(items)) == found
        assert client.num_duplicate_references == 9
    assert found == [mean_of("p", "rs", f"o{i}") for i in range(3)] + [
        reward_of("p", "r", "o0"),
        mean_of("q", "tu", "o"),
    ]
    assert each[0] == [reward_of("p", "r", "o0"), reward_of("p", "s", "o0")]
    assert [len(row) for row in each] == [2, 2, 2, 1, 2]
    assert capfd.readouterr().err.count("references are there twice") == 1
    together = [[len(item["outputs"]) for item in request.body["items"]] for request in server.requests]
    assert [4] in together  # outputs of one prompt and reference travel together


def test_engines_get_one_sequence_for_each_reference(tokenizer_path):
    with FlakyServer(lambda request: ok(pooling(request))) as server:
        client = RewardClient(
            server.url, engine="vllm", tokenizer=tokenizer_path, wrapper="sft", max_sequence_length=256
        )
        with client:
            several = client.score([RewardItem("ba", ["li", "mo ra"], "ke"), RewardItem("ba", "li", "nu")])
            alone = client.score([RewardItem("ba", r, "ke") for r in ("li", "mo ra")])
        assert [len(request.body["input"]) for request in server.requests] == [3, 2]
    assert several[0] == pytest.approx(sum(alone) / 2, abs=1e-15)


def test_a_failure_names_the_item_and_which_of_its_references(server):
    def value(item: dict, output: str) -> float:
        return math.nan if (item["reference"], output) == ("s", "o2") else 1.0

    server.answer = lambda request: ok(native(request, value))
    items = [RewardItem("p", ["r", "s"], f"o{i}") for i in range(4)]
    with RewardClient(server.url, engine="megatron-polar", retries=0) as client:
        with pytest.raises(RewardError, match="no reward for item 2: against its reference 1: ") as caught:
            client.score(items)
        assert caught.value.indices == (2,)
        for references, part in (
            ([], "empty list"),
            (["r", 3], "no text"),
            (["r", {"content": "s"}], "a message in it"),
        ):
            with pytest.raises(RewardError, match=part) as caught:
                client.score([items[0], RewardItem("p", references, "o")])
            assert caught.value.indices == (1,)


@pytest.fixture
def configure(server, monkeypatch):
    configured.cache_clear()
    monkeypatch.setenv("MEGATRON_POLAR_REWARD_URL", server.url)
    yield
    if configured.cache_info().currsize:
        configured().client.close()
    configured.cache_clear()


def test_every_framework_may_give_a_list_where_a_reference_stands(configure):
    wanted = mean_of("p", "rs", "a")
    # What a parquet reader makes of a list of texts, and of a list of message lists.
    texts = np.array(["r", "s"], dtype=object)
    messages = np.empty(2, dtype=object)
    messages[:] = [np.array([{"role": "assistant", "content": text}], dtype=object) for text in "rs"]
    for truth in (["r", "s"], texts, messages):
        found = adapters.compute_score("x", "a", truth, {"prompt": "p"})
        assert found == {"score": wanted}
        assert adapters.compute_score_batch(["x"], ["a"], [truth], [{"prompt": "p"}]) == [found]
        assert asyncio.run(adapters.compute_score_async("x", "a", truth, {"prompt": "p"})) == found
    labels = [["r", "s"], "r", {"prompt": "p", "references": ["r", "s"]}]
    rewards = adapters.reward_func(["pa", "pa", "pa"], ["p"] * 3, labels)["rewards"]
    assert rewards == [wanted, reward_of("p", "r", "a"), wanted]
    with pytest.raises(RewardError, match="both 'reference' and 'references'"):
        adapters.reward_func(["pa"], ["p"], [{"reference": "r", "references": ["s"]}])
    assert adapters.trl_reward(prompts=["p", "p"], completions=["a", "a"], reference=[["r", "s"], "r"]) == rewards[:2]
    conversation = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    assert adapters.swift_reward(["a"], messages=[conversation], reference=[["r", "s"]]) == [wanted]
    with pytest.raises(RewardError, match="empty list") as caught:
        adapters.trl_reward(prompts=["p", "p"], completions=["a", "a"], reference=["r", []])
    assert caught.value.indices == (1,)


def test_the_mean_is_normalised_and_penalties_stay(server):
    settings = {"malformed_think": "penalty", "malformed_think_reward": -3.0, "mean": -10.0, "std": 10.0}
    function = RewardFunction(RewardSettings(url=(server.url,), **settings))
    with function.client:
        found = function.rewards(prompts=["p"] * 2, references=[["r", "s"]] * 2, outputs=["a", "<think>"])
    assert found == [(mean_of("p", "rs", "a") + 10) / 10, -3.0]


# --- evaluation ----------------------------------------------------------------------------------------------------


class NoisyReferences:
    """A reference is worth what its number says, or the contrary: of 0, 1, 2, 3 the last two are right."""

    def score(self, requests):
        rewards = []
        for request in requests:
            sign = 1.0 if int(request.reference[-1]) > 1 else -0.5
            rewards.append([sign * float(output.startswith("good")) for output in request.outputs])
        return rewards


def item(number: int, count: int = 4) -> EvaluationItem:
    references = [f"r{k}" for k in range(count)]
    first, *more = references
    candidates, levels = ("good", "bad"), (0, 1)
    return EvaluationItem(
        f"i{number}", f"p{number}", first, candidates, levels, "c", "sft", more_references=tuple(more)
    )


def test_numbers_of_references_are_compared_on_the_same_items(tmp_path, capfd):
    items = [item(number) for number in range(20)] + [item(20, count=3)]
    summary = evaluate(NoisyReferences(), items, output=tmp_path, suite="s", references=[4, 1, 2])
    assert (summary["num_items"], summary["num_references"], summary["swap_check"]) == (20, 4, "passed")
    found = summary["references"]
    # Means -0.5, -0.5 and 0.25: wrong with one and two references, right with four.
    assert [(entry["references"], entry["accuracy"]) for entry in found["by_count"]] == [(1, 0.0), (2, 0.0), (4, 1.0)]
    assert (found["single"]["accuracy"], found["disagreement"], summary["accuracy"]) == (0.5, 1.0, 1.0)
    gains = {(entry["references"], entry["against"]): entry["difference"] for entry in found["differences"]}
    assert gains == {(2, 0): -0.5, (2, 1): 0.0, (4, 0): 0.5, (4, 1): 1.0, (4, 2): 1.0}
    line = json.loads((tmp_path / "rewards.jsonl").read_text().splitlines()[0])
    assert line["rewards"] == mean_over_references(line["per_reference"]) == [0.25, 0.0]
    assert "left out 1 of 21 items, which have fewer than 4 references" in capfd.readouterr().err
    page = evaluation_report(summary, rewards=tmp_path / "rewards.jsonl", output=tmp_path / "report.html").read_text()
    assert "20 pairs, 4 references each" in page
    assert page.count("Gain over single references") >= 1


def test_one_reference_is_the_first_and_the_figures_are_as_ever(tmp_path):
    several = evaluate(NoisyReferences(), [item(0)], output=tmp_path / "a", suite="s")
    single = evaluate(NoisyReferences(), [item(0, count=1)], output=tmp_path / "b", suite="s")
    drop = {"seconds", "items_per_second"}
    assert {k: v for k, v in several.items() if k not in drop} == {k: v for k, v in single.items() if k not in drop}
    assert (tmp_path / "a" / "rewards.jsonl").read_bytes() == (tmp_path / "b" / "rewards.jsonl").read_bytes()
    assert "per_reference" not in (tmp_path / "a" / "rewards.jsonl").read_text()


def test_paired_intervals_draw_prompts_and_not_pairs():
    values = np.repeat([1.0, -1.0] * 8, 50)  # 16 prompts of 50 pairs that agree with each other
    low, high = bootstrap_interval(values, np.repeat(np.arange(16), 50), seed=0)
    spread = 1.96 / math.sqrt(16)
    assert (low, high) == (pytest.approx(-spread, abs=0.1), pytest.approx(spread, abs=0.1))
    assert bootstrap_interval(values, np.repeat(np.arange(16), 50), seed=0) == (low, high)
    assert bootstrap_interval(np.full(4, 0.25), np.arange(4), seed=0) == (0.25, 0.25)


def test_policies_give_further_trajectories_of_the_references_policy(tmp_path):
    counts = {"a": 6, "b": 6, "c": 2}
    rows = [
        {
            "prompt": f"p{n}",
            "trajectories": [{"policy": p, "text": f"{p} {n} {k}"} for p in counts for k in range(counts[p])],
        }
        for n in range(30)
    ]
    rows[0]["trajectories"] += [{"policy": "b", "text": "a 0 0"}] * 2  # what another policy wrote, and twice
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = load_suite("policies", tmp_path / "a.jsonl", num_references=4)
    assert 0 < len(items) < 30, "only the items whose own policy has five trajectories"
    for found in items:
        own = found.reference[0]
        assert own in "ab"
        assert len({*found.references, *found.candidates}) == 6
        assert all(text.startswith(own) or text == "a 0 0" for text in (*found.references, found.candidates[0]))
    first = {found.identifier: found for found in load_suite("policies", tmp_path / "a.jsonl")}
    for found in items:
        same = first[found.identifier]
        assert (same.reference, same.candidates, same.more_references) == (found.reference, found.candidates, ())
    three = {found.identifier: found for found in load_suite("policies", tmp_path / "a.jsonl", num_references=3)}
    assert all(three[i.identifier].references == i.references[:3] for i in items)
    assert len(load_suite("policies", tmp_path / "a.jsonl", num_references=4, limit=5)) == 5
    with pytest.raises(UserError, match="no item has 8 references"):
        load_suite("policies", tmp_path / "a.jsonl", num_references=8)


def test_preferences_take_the_references_of_their_lines(tmp_path):
    lines = [LINE | {"references": ["r", "s", "t"]}, LINE | {"reference": "r"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = load_suite("preferences", tmp_path / "a.jsonl", num_references=2)
    assert found.references == ("r", "s")


def test_gsm8k_takes_the_other_right_solutions(tmp_path):
    models = {name: {"solution": f"{name} says", "is_correct": name != "w"} for name in ("m1", "m2", "m3", "w")}
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "ground_truth": "truth", **models}) + "\n")
    (found,) = load_suite("gsm8k-all", tmp_path / "a.jsonl", num_references=3)
    right = {"m1 says", "m2 says", "m3 says"}
    assert found.reference == "truth"
    assert set(found.more_references) == right - {found.candidates[0]}


def test_rmb_takes_the_other_unbeaten_answers_above_both(tmp_path):
    def judged(best: str, worse: str) -> dict:
        sides = {key: {"llm_name": text, "answer": text} for key, text in (("chosen", best), ("reject", worse))}
        return {"conversation_input": [{"role": "user", "content": "q"}], **sides}

    # x and y above s above t; z above t alone; w could be the reference of others, u and v.
    rows = [judged(*pair) for pair in ("xs", "ys", "st", "zt", "xa", "ya", "wu", "uv")]
    for folder in ("Pairwise_set/Helpfulness/Chat", "BoN_set"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Pairwise_set/Helpfulness/Chat/A.json").write_text(json.dumps(rows))
    (found,) = load_suite("rmb", tmp_path, num_references=2)
    assert (set(found.references), found.candidates) == ({"x", "y"}, ("s", "t"))
    (record,) = public.rmb_preferences(tmp_path, max_references=4, skipped=Counter())
    assert set(record["references"]) == {"x", "y"}


@pytest.mark.parametrize("numbers", [["0"], ["1", "1"], ["-2", "4"]])
def test_odd_numbers_of_references_are_refused(numbers, tmp_path, capsys):
    arguments = ["--checkpoint", str(tmp_path), "--suite", "policies", "--data", str(tmp_path)]
    assert cli.main(["evaluate", *arguments, "--output", str(tmp_path / "o"), "--references", *numbers]) == 2
    assert "give distinct whole numbers of 1 or more" in capsys.readouterr().err


def test_importers_write_the_list_where_there_are_several(tmp_path):
    from megatron_polar.data.lines import read_jsonl

    models = {name: {"solution": f"{name} says", "is_correct": name != "w"} for name in ("m1", "m2", "w")}
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "ground_truth": "truth", **models}) + "\n")
    for count, key in ((1, "reference"), (2, "references")):
        records = public.gsm8k_preferences(tmp_path / "a.jsonl", max_references=count, skipped=Counter())
        output = tmp_path / f"{count}.jsonl.gz"
        public.write_records(records, output=output)
        with gzip.open(output) as stream:
            assert key in json.loads(stream.readline())
        (line,) = [line for _, line in read_jsonl(output)]
        assert len(parse_record(line, source="f", line_number=1).references) == count


def test_the_benchmark_counts_what_the_prompt_alone_would_save(tmp_path, tokenizer_path, monkeypatch, capsys):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "reference_prefixes.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("reference_prefixes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer, prompt = load_tokenizer(tokenizer_path), "ba ke li mo"
    texts = {"references": ["ra si", "zo zo zo", "nu"], "outputs": ["ba", "ve ve"], "wrapper": "sft"}
    found = module.count_tokens(tokenizer, prompt, **texts)
    # Of three copies of BOS and prompt two would go; the newline behind the prompt is shared, too.
    assert found.shared - found.nested == 2 * (len(tokenizer.encode(prompt + "\n")) + 1)
    assert found.nested < found.shared < found.apart
    (tmp_path / "a.jsonl").write_text(json.dumps(LINE | {"reference": "r"}) + "\n")
    arguments = ["reference_prefixes.py", "--tokenizer", str(tokenizer_path), str(tmp_path / "a.jsonl")]
    monkeypatch.setattr("sys.argv", arguments)
    module.main()
    assert capsys.readouterr().out.count("| 4 | ") == 3
