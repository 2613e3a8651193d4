"""Which policies meet: uniformly as ever, or more often those whose order the model gets wrong."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import multiprocessing
import pickle
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_comparisons import decompose, halves_by_ids, open_comparisons

from megatron_polar.config.schema import CurriculumSection, DatasetSource
from megatron_polar.data.comparisons import ComparisonDataset, _draw_contrast
from megatron_polar.data.corpus import StoredDocument
from megatron_polar.data.curriculum import DifficultyTables, difficulty_table, draw_hard_contrast
from megatron_polar.data.packing import build_micro_batch
from megatron_polar.data.pair_counts import (
    EMPTY,
    NO_PAIR,
    PairCounts,
    add_counts,
    count_pairs,
    error_rates,
    from_plain,
    halve,
    keep_most_compared,
    pair_keys,
    plain,
    split_keys,
)
from megatron_polar.data.tokenizer import load_tokenizer
from megatron_polar.errors import UserError

GOLDEN = {
    # (K, blended with rankings): SHA-256 of two epochs of draws, computed with commit db12e3d, before the curriculum
    (2, False): "a92ff00e48c9457fd4899edf806334c499dde8a575226f3e303caceb016ccb7f",
    (2, True): "93b6cc3fd3d7b18e52a0f5378447526bfea718ebbbc88f21bb470d07b35cd184",
    (3, False): "0c221dfd909d16e52a2c47a301cb3d1a6aeb7e8b52b890420e90f28008f1c05d",
    (3, True): "e52de598b52e552214dc9288bbddd99041e3bb214347481b377bb7a0baf8dae1",
    (4, False): "0c221dfd909d16e52a2c47a301cb3d1a6aeb7e8b52b890420e90f28008f1c05d",
    (4, True): "f37b4459c4a0509715ac1f09fb79392ef09b619f1ff110abf3d7336e16234537",
}
DRAWS = 20_000


@pytest.mark.parametrize(("candidates", "blend"), GOLDEN)
def test_uniform_draws_are_those_of_before_there_was_a_choice(candidates, blend, trajectory_corpus, ranking_corpus):
    paths = [trajectory_corpus, ranking_corpus] if blend else [trajectory_corpus]
    dataset = open_comparisons(*paths, seed=11, candidates=candidates)
    table = halves_by_ids(dataset)
    digest = hashlib.sha256()
    for index in range(2 * len(dataset)):
        digest.update(repr(decompose(dataset, index, table)).encode())
    assert digest.hexdigest() == GOLDEN[candidates, blend]


# --- counts ----------------------------------------------------------------------------------------------------------


def random_counts(seed: int, size: int = 300) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    keys = pair_keys(generator.integers(0, 9, size), generator.integers(0, 9, size))
    keys[generator.random(size) < 0.1] = NO_PAIR
    return keys, generator.integers(0, 3, size).astype(np.int8)


def naive(keys: np.ndarray, half_wins: np.ndarray) -> dict[int, list[int]]:
    table: dict[int, list[int]] = {}
    for key, wins in zip(keys.tolist(), half_wins.tolist(), strict=True):
        if key != NO_PAIR:
            entry = table.setdefault(key, [0, 0])
            entry[0], entry[1] = entry[0] + wins, entry[1] + 2 - wins
    return table


def as_dict(counts: PairCounts) -> dict[int, list[int]]:
    assert (np.diff(counts.keys) > 0).all()
    return {key: [won, lost] for key, won, lost in zip(*(c.tolist() for c in dataclasses.astuple(counts)), strict=True)}


def test_counts_equal_a_dictionarys_and_their_sum_knows_no_order():
    parts = [random_counts(seed) for seed in range(4)]
    whole = naive(np.concatenate([keys for keys, _ in parts]), np.concatenate([wins for _, wins in parts]))
    counted = [count_pairs(*part) for part in parts]
    assert as_dict(add_counts(counted)) == whole == as_dict(add_counts(reversed(counted)))
    assert as_dict(add_counts([])) == {} == as_dict(EMPTY)


def test_keys_name_their_policies():
    reference, other = np.array([0, 5, 2**31 - 1]), np.array([2**31 - 1, 3, 0])
    found = split_keys(pair_keys(reference, other))
    np.testing.assert_array_equal(found, [reference, other])
    assert (pair_keys(reference, other) >= 0).all()  # so that NO_PAIR is none of them


def test_halving_rounds_wins_and_losses_alike_and_forgets_what_is_gone():
    keys = pair_keys(0, np.arange(1, 6))
    halved = halve(PairCounts(keys, np.array([5, 0, 1, 1, 8]), np.array([0, 5, 1, 2, 9])))
    assert as_dict(halved) == {int(keys[0]): [2, 0], int(keys[1]): [0, 2], int(keys[3]): [0, 1], int(keys[4]): [4, 4]}


def test_of_too_many_pairs_the_most_compared_are_kept():
    counts = PairCounts(pair_keys(0, np.arange(5)), np.array([2, 6, 2, 4, 2]), np.zeros(5, dtype=np.int64))
    assert split_keys(keep_most_compared(counts, 3).keys)[1].tolist() == [0, 1, 3]
    assert keep_most_compared(counts, 5) is counts


def test_error_rates_are_the_mean_of_a_beta_posterior():
    counts = PairCounts(pair_keys(0, np.arange(3)), np.array([12, 0, 3]), np.array([4, 20, 1]))  # half comparisons
    wrong, all_of_them = counts.lost / 2, counts.comparisons
    expected = (wrong + 4 / 2) / (all_of_them + 4)  # Beta(2, 2): 4 comparisons, half of them wrong
    np.testing.assert_allclose(error_rates(counts, prior_comparisons=4.0), expected, rtol=1e-15)


def test_counts_survive_json_and_what_is_none_is_refused():
    counts = count_pairs(*random_counts(1))
    columns = plain(counts)
    assert as_dict(from_plain(columns, num_policies=9)) == as_dict(counts)
    with pytest.raises(ValueError, match="beyond the 8"):
        from_plain(columns, num_policies=8)
    bad = [
        {**columns, "won": columns["won"][:-1]},
        {**columns, "won": [-1] * len(columns["won"])},
        {**columns, "won": [0] * len(columns["won"]), "lost": [0] * len(columns["won"])},
        {**columns, "lost": [0.5] * len(columns["won"])},
        {**columns, "lost": [True] * len(columns["won"])},
        {**columns, "lost": [2**63] * len(columns["won"])},
        {name: column[::-1] for name, column in columns.items()},
        {name: column[:1] * 2 for name, column in columns.items()},
        {"won": []},
        [],
        None,
    ]
    for one in bad:
        with pytest.raises(ValueError):
            from_plain(one, num_policies=9)


# --- draws -----------------------------------------------------------------------------------------------------------

POLICIES = np.array([7, 7, 2, 2, 2, 5, 4, 4, 9])
"""Policies of the trajectories of one document: 7, 2 and 4 can be references."""


def pair_probabilities(table, *, floor: float, policies=POLICIES) -> dict[tuple[int, int], float]:
    """What the docstring of draw_hard_contrast says, term by term."""
    sizes = Counter(policies.tolist())
    anchors = [p for p, size in sizes.items() if size >= 2]
    uniform = {
        (a, b): size / (len(policies) - sizes[a]) / len(anchors) for a in anchors for b, size in sizes.items() if a != b
    }
    weight = {pair: table.weights_of(np.array([pair[0]]), np.array([pair[1]])).item() for pair in uniform}
    total = sum(uniform[pair] * weight[pair] for pair in uniform)
    return {p: (1 - floor) * uniform[p] * weight[p] / total + floor * uniform[p] for p in uniform}


def hard_pairs(floor: float, temperature: float = 1.0):
    """A table in which (7, 2) is nearly always wrong, (2, 5) nearly always right, and the rest has not been seen."""
    counts = PairCounts(pair_keys(np.array([2, 7]), np.array([5, 2])), np.array([2000, 0]), np.array([0, 2000]))
    section = CurriculumSection(floor=floor, temperature=temperature)
    return difficulty_table(counts, section)


def chi_square_is_small(found: Counter, expected: dict, draws: int) -> None:
    """Within 4 standard deviations of chi-square's mean: a seeded draw that fails is wrong, not unlucky."""
    assert set(found) <= set(expected)
    statistic = sum((found[key] - draws * p) ** 2 / (draws * p) for key, p in expected.items())
    degrees = len(expected) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees), (statistic, degrees)


def drawn_pairs(table, *, count: int = 2, draws: int = DRAWS) -> tuple[Counter, Counter]:
    """Pairs of policies, and of trajectories, of the first contrast."""
    generator = np.random.default_rng(3)
    policies, trajectories = Counter(), Counter()
    for _ in range(draws):
        reference, candidates, levels = draw_hard_contrast(POLICIES, table=table, count=count, generator=generator)
        assert len({reference, *candidates}) == len(candidates) + 1 == count + 1
        assert levels == (0,) + (1,) * (count - 1)
        assert POLICIES[reference] == POLICIES[candidates[0]] not in POLICIES[candidates[1:]]
        policies[int(POLICIES[reference]), int(POLICIES[candidates[1]])] += 1
        if POLICIES[candidates[1]] == 2:
            trajectories[candidates[1]] += 1
    return policies, trajectories


@pytest.mark.parametrize(("floor", "temperature"), [(0.0, 1.0), (0.2, 1.0), (0.2, 0.5), (0.5, 3.0), (1.0, 1.0)])
def test_pairs_are_drawn_as_often_as_their_weights_say(floor, temperature):
    table = hard_pairs(floor, temperature)
    policies, trajectories = drawn_pairs(table)
    chi_square_is_small(policies, pair_probabilities(table, floor=floor), DRAWS)
    of_two = sum(trajectories.values())  # and which of a policy's trajectories is taken is uniform
    chi_square_is_small(trajectories, dict.fromkeys((2, 3, 4), 1 / 3), of_two)


def test_the_chi_square_would_notice_another_rule():
    expected = pair_probabilities(hard_pairs(0.2), floor=0.2)
    with pytest.raises(AssertionError):
        chi_square_is_small(drawn_pairs(hard_pairs(0.3))[0], expected, DRAWS)


def test_no_pair_falls_below_its_share_of_the_floor():
    even = pair_probabilities(hard_pairs(1.0), floor=1.0)
    found = pair_probabilities(hard_pairs(0.25, temperature=0.05), floor=0.25)
    assert all(found[pair] >= 0.25 * even[pair] for pair in even)
    assert found[2, 5] == pytest.approx(0.25 * even[2, 5], rel=1e-3)  # hardly more: the model always ranks it rightly
    assert found[7, 2] > 0.7


def test_without_counts_pairs_are_as_likely_as_in_a_uniform_draw():
    document = StoredDocument("trajectories", "sft", POLICIES, tuple(POLICIES))  # whose halves nobody looks at
    generator, found = np.random.default_rng(8), Counter()
    for _ in range(DRAWS):
        reference, candidates, _ = _draw_contrast(document, count=2, generator=generator)
        found[int(POLICIES[reference]), int(POLICIES[candidates[1]])] += 1
    expected = pair_probabilities(difficulty_table(EMPTY, CurriculumSection()), floor=0.2)
    chi_square_is_small(found, expected, DRAWS)  # of the uniform draw
    chi_square_is_small(drawn_pairs(difficulty_table(EMPTY, CurriculumSection()))[0], expected, DRAWS)


def test_further_contrasts_are_other_policies_drawn_by_weight_without_replacement():
    policies = np.array([0, 0, 1, 2, 3])
    counts = PairCounts(pair_keys(0, np.array([1, 2, 3])), np.array([0, 40, 80]), np.array([80, 40, 0]))
    table = difficulty_table(counts, CurriculumSection(floor=0.0, prior_comparisons=8.0))
    weights = dict(zip((1, 2, 3), table.weights.tolist(), strict=True))
    generator, found = np.random.default_rng(5), Counter()
    for _ in range(DRAWS):
        _, candidates, _ = draw_hard_contrast(policies, table=table, count=3, generator=generator)
        found[tuple(policies[candidates[1:]].tolist())] += 1
    total = sum(weights.values())
    expected = {
        (a, b): weights[a] / total * weights[b] / (total - weights[a]) for a in weights for b in weights if a != b
    }
    chi_square_is_small(found, expected, DRAWS)


@pytest.mark.parametrize("count", [3, 4, 5, 6, 9])
def test_every_policy_comes_before_any_repeats(count):
    generator = np.random.default_rng(count)
    for _ in range(200):
        reference, candidates, levels = draw_hard_contrast(
            POLICIES, table=hard_pairs(0.1), count=count, generator=generator
        )
        others = POLICIES[POLICIES[reference] != POLICIES]
        assert len(candidates) == len(levels) == 1 + min(count - 1, len(others))
        assert len({reference, *candidates}) == len(candidates) + 1
        drawn = POLICIES[candidates[1:]].tolist()
        rounds = [drawn[:i].count(policy) for i, policy in enumerate(drawn)]
        assert rounds == sorted(rounds)


# --- the dataset -----------------------------------------------------------------------------------------------------


def by_difficulty(*paths, seed=1, candidates=2, **section) -> ComparisonDataset:
    sources = [DatasetSource(str(path)) for path in paths]
    return ComparisonDataset(
        sources,
        seed=seed,
        candidates_per_comparison=candidates,
        max_sequence_length=4096,
        curriculum=CurriculumSection(**section),
    )


class Tabled:
    """A dataset whose comparisons are drawn with one table, for `decompose`."""

    def __init__(self, dataset, table):
        self.dataset, self.table = dataset, table
        self.control = dataset.control

    def comparison(self, index):
        return self.dataset.comparison(index, self.table)


def test_documents_are_used_once_an_epoch_in_the_order_of_a_uniform_run(trajectory_corpus, ranking_corpus):
    paths = (trajectory_corpus, ranking_corpus)
    uniform, hard = open_comparisons(*paths, candidates=3), by_difficulty(*paths, candidates=3)
    halves = halves_by_ids(uniform)
    names = uniform.policies.index
    counts = PairCounts(
        pair_keys(names("policy0"), np.array(sorted(map(names, ("policy1", "policy2"))))), *np.array([[0, 90], [90, 0]])
    )
    drawn = Tabled(hard, difficulty_table(counts, CurriculumSection(floor=0.0)))
    seen, differ = [], 0
    for index in range(2 * len(uniform)):
        one = decompose(drawn, index, halves)
        c, d, *_ = one[0]
        other = decompose(uniform, index, halves)
        assert other[0][:2] == (c, d)
        assert c == 0 or one == other  # rankings are drawn as ever
        differ += one != other
        seen.append((c, d))
    everything = sorted([(0, d) for d in range(80)] + [(1, d) for d in range(40)])
    assert sorted(seen[:120]) == everything == sorted(seen[120:])
    assert differ > 100


def test_a_dataset_with_a_curriculum_has_a_fingerprint_of_its_own(trajectory_corpus):
    prints = {open_comparisons(trajectory_corpus).fingerprint}
    changes = ({}, {"interval": 50}, {"half_life": 2}, {"floor": 0.1}, {"temperature": 2.0}, {"prior_comparisons": 1.0})
    for change in changes:
        prints.add(by_difficulty(trajectory_corpus, **change).fingerprint)
    assert len(prints) == 1 + len(changes)


def test_a_table_goes_with_a_curriculum_and_only_with_one(trajectory_corpus):
    table = difficulty_table(EMPTY, CurriculumSection())
    with pytest.raises(ValueError, match="if, and only if"):
        by_difficulty(trajectory_corpus).comparison(0)
    with pytest.raises(ValueError, match="if, and only if"):
        open_comparisons(trajectory_corpus).comparison(0, table)


@pytest.mark.parametrize("candidates", [2, 3])
def test_a_micro_batch_knows_the_policies_of_its_pairs(candidates, trajectory_corpus, ranking_corpus):
    dataset = open_comparisons(ranking_corpus, trajectory_corpus, candidates=candidates)
    halves = halves_by_ids(dataset)
    comparisons = [dataset.comparison(index) for index in range(40)]
    batch = build_micro_batch(comparisons, layout="shared_prefix", pad_id=0, pad_to_multiple=16)
    expected = []
    for index, comparison in enumerate(comparisons):
        reference, drawn, levels = decompose(dataset, index, halves)
        if reference[0] == 0:
            expected += [NO_PAIR] * sum(a < b for a in levels for b in levels)
        else:
            names = [dataset.corpora[1].policies[entry[3]] for entry in (reference, *drawn)]
            assert tuple(dataset.policies[p] for p in comparison.policies) == tuple(names)
            numbers = [dataset.policies.index(name) for name in names]
            expected += [int(pair_keys(numbers[0], other)) for other in numbers[2:]]
    assert batch.policy_pairs.tolist() == expected
    assert len(batch.policy_pairs) == len(batch.winners) == len(batch.losers)
    assert build_micro_batch([], layout="padded", pad_id=0, pad_to_multiple=16).policy_pairs.shape == (0,)


def test_a_policy_has_one_number_in_all_corpora(trajectory_corpus, tokenizer_path, tmp_path):
    from conftest import write_trajectories

    from megatron_polar.data.preprocess import preprocess

    source = write_trajectories(tmp_path / "in.jsonl", num_prompts=6, seed=31, policies=4)
    preprocess([source], output=tmp_path / "out", tokenizer_path=tokenizer_path)
    dataset = open_comparisons(trajectory_corpus, tmp_path / "out")
    assert dataset.corpora[0].policies != dataset.corpora[1].policies[:5]  # in order of first appearance
    assert dataset.policies == tuple(f"policy{i}" for i in range(5))
    halves = halves_by_ids(dataset)
    for index in range(len(dataset)):
        reference, drawn, _ = decompose(dataset, index, halves)
        names = [dataset.corpora[reference[0]].policies[entry[3]] for entry in (reference, *drawn)]
        assert [dataset.policies[number] for number in dataset.comparison(index).policies] == names


def test_documents_that_offer_one_pair_alone_are_no_choice(trajectory_corpus, ranking_corpus):
    assert open_comparisons(trajectory_corpus, candidates=2).share_with_a_choice() == 1.0
    assert open_comparisons(trajectory_corpus, candidates=3).share_with_a_choice() == 0.0
    assert open_comparisons(ranking_corpus).share_with_a_choice() == 0.0


# --- tables on their way to workers ----------------------------------------------------------------------------------


def test_a_table_is_what_was_published_in_this_process_and_in_others(tmp_path):
    tables = DifficultyTables(CurriculumSection(interval=5), directory=tmp_path)
    counts = [count_pairs(*random_counts(seed)) for seed in range(4)]
    for period in (2, 3):
        tables.publish(period, counts[period])
    copy = pickle.loads(pickle.dumps(tables))
    copy._known = {}
    copy._owner = -1  # as a worker finds it
    for step in (10, 14, 15):
        for one in (tables.of_step(step), copy.of_step(step)):
            expected = difficulty_table(counts[step // 5], CurriculumSection(interval=5))
            np.testing.assert_array_equal(one.keys, expected.keys)
            np.testing.assert_array_equal(one.weights, expected.weights)
    assert [tables.has(step) for step in (9, 10, 19, 20)] == [False, True, True, False]
    with pytest.raises(LookupError, match=r"step 20 .* period 4"):
        tables.of_step(20)
    tables.publish(4, counts[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["period_00000003.npz", "period_00000004.npz"]


def test_a_worker_that_runs_ahead_waits_for_its_table(tmp_path):
    tables = DifficultyTables(CurriculumSection(interval=2), directory=tmp_path)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=lambda: sender.send(len(tables.of_step(6).keys)))
    worker.start()
    time.sleep(0.1)
    assert not receiver.poll(0)
    tables.publish(3, count_pairs(*random_counts(0)))
    assert receiver.poll(20)
    assert receiver.recv() == len(count_pairs(*random_counts(0)))
    worker.join()


def test_show_batch_shows_what_the_curriculum_draws(trajectory_corpus, tmp_path, monkeypatch, capsys):
    path = Path(__file__).resolve().parents[1] / "tools" / "show_batch.py"
    spec = importlib.util.spec_from_file_location("show_batch", path)
    show_batch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(show_batch)
    config = tmp_path / "train.yaml"
    data = {"train": [{"path": str(trajectory_corpus)}], "max_sequence_length": 256, "contrast": "by_difficulty"}
    data |= {"max_tokens_per_micro_batch": 4096, "curriculum": {"interval": 3, "floor": 0.0}}
    sections = {"run": {"directory": "unused"}, "model": {"preset": "nano"}, "data": data, "optimizer": {"lr": 1e-3}}
    config.write_text(json.dumps(sections | {"train": {"global_batch_size": 2, "num_steps": 9}}))

    def shown(step: int) -> str:
        monkeypatch.setattr("sys.argv", ["show_batch.py", str(config), "run.seed=1", f"--step={step}"])
        show_batch.main()
        return capsys.readouterr().out

    dataset = by_difficulty(trajectory_corpus, interval=3, floor=0.0)
    table = difficulty_table(EMPTY, dataset.curriculum)
    decode = load_tokenizer(trajectory_corpus / "tokenizer").decode
    found = shown(5)
    for index in (10, 11):
        comparison = dataset.comparison(index, table)
        for ids in (np.concatenate([comparison.prefix, comparison.candidates[0]]), comparison.candidates[1]):
            assert repr(decode(ids.tolist())) in found
    with pytest.raises(UserError, match=r"--step 6: from step 6 on .* --replay-step 7 repeats it from a checkpoint"):
        shown(6)
