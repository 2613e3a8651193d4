"""Which trajectories meet where is a pure function of seed, index and data, and uses every document equally often."""

import dataclasses
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import write_trajectories

from megatron_polar.config.schema import DatasetSource
from megatron_polar.data.comparisons import ComparisonDataset, permute
from megatron_polar.data.preprocess import preprocess
from megatron_polar.data.tokenizer_training import train_tokenizer
from megatron_polar.errors import UserError


def open_comparisons(*paths, seed=1, weights=None, candidates=2, longest=4096) -> ComparisonDataset:
    weights = weights or [None] * len(paths)
    sources = [DatasetSource(str(path), weight) for path, weight in zip(paths, weights, strict=True)]
    return ComparisonDataset(sources, seed=seed, candidates_per_comparison=candidates, max_sequence_length=longest)


def halves_by_ids(dataset: ComparisonDataset) -> dict[tuple, tuple[int, int, int, int]]:
    """ids of a half → (corpus, document, number within the document, policy)."""
    table = {}
    for c, corpus in enumerate(dataset.corpora):
        for d in range(len(corpus)):
            document = corpus.document(d)
            for h, (half, policy) in enumerate(zip(document.halves, document.policy_ids, strict=True)):
                assert table.setdefault(tuple(half.ids), (c, d, h, int(policy))) == (c, d, h, int(policy))
    return table


def decompose(dataset: ComparisonDataset, index: int, table: dict):
    """Reference and candidates of a comparison as entries of `table`, read back from its tokens."""
    comparison, control = dataset.comparison(index), dataset.control
    start = 0 if control.bos_id is None else 1
    references, candidates = set(), []
    for candidate in comparison.candidates:
        sequence = np.concatenate([comparison.prefix, candidate]).tolist()
        assert sequence[:start] == ([] if control.bos_id is None else [control.bos_id])
        assert sequence[-1] == control.reward_id
        middle = sequence.index(control.separator_id)
        references.add(table[tuple(sequence[start:middle])])
        candidates.append(table[tuple(sequence[middle + 1 : -1])])
    assert len(references) == 1
    return references.pop(), candidates, comparison.levels


def same(one, other) -> bool:
    return (
        np.array_equal(one.prefix, other.prefix)
        and one.levels == other.levels
        and len(one.candidates) == len(other.candidates)
        and all(np.array_equal(a, b) for a, b in zip(one.candidates, other.candidates, strict=True))
    )


# --- permute ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 255, 1000])
@pytest.mark.parametrize("key", [0, 1, 12345, (1 << 64) - 1])
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(i, size=size, key=key) for i in range(size)) == list(range(size))


def test_permute_spreads_neighbours_and_differs_by_key():
    size = 5000
    places = np.array([[permute(i, size=size, key=key) for i in range(size)] for key in (1, 2)])
    assert (places[0] == places[1]).sum() < 10  # one match is expected by chance
    for row in places:
        # Uniform: the mean distance of two independent places is size / 3.
        assert abs(np.abs(np.diff(row)).mean() / (size / 3) - 1) < 0.05
        assert abs(np.corrcoef(np.arange(size), row)[0, 1]) < 0.05


def test_permute_reaches_every_place_of_half_a_billion():
    size = 500_000_000
    places = [permute(i, size=size, key=9) for i in range(0, size, 1_000_003)]
    assert len(set(places)) == len(places)
    assert all(0 <= place < size for place in places)


# --- purity ----------------------------------------------------------------------------------------------------------


def test_two_instances_agree_and_another_seed_does_not(trajectory_corpus):
    one, two, other = (open_comparisons(trajectory_corpus, seed=seed, candidates=3) for seed in (1, 1, 2))
    order = list(range(200))
    np.random.default_rng(0).shuffle(order)  # whatever was asked before
    mine = {index: two.comparison(index) for index in order}
    assert all(same(one.comparison(index), mine[index]) for index in range(200))
    assert sum(same(other.comparison(index), mine[index]) for index in range(200)) < 20
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_a_pickled_dataset_draws_the_same(trajectory_corpus):
    dataset = open_comparisons(trajectory_corpus)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(same(copy.comparison(index), dataset.comparison(index)) for index in range(20))


def test_the_global_random_state_plays_no_part(trajectory_corpus):
    dataset = open_comparisons(trajectory_corpus)
    np.random.seed(1)
    before, state = dataset.comparison(5), np.random.get_state()[1].copy()
    np.random.seed(2)
    assert same(dataset.comparison(5), before)
    np.random.seed(1)
    dataset.comparison(5)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize(
    "change",
    [{"candidates": 3}, {"longest": 100}, {"weights": [0.3, 0.7]}],
    ids=["candidates", "max_sequence_length", "weights"],
)
def test_the_fingerprint_sees_every_setting_that_changes_the_draw(change, trajectory_corpus, ranking_corpus):
    plain = open_comparisons(trajectory_corpus, ranking_corpus)
    assert open_comparisons(trajectory_corpus, ranking_corpus).fingerprint == plain.fingerprint
    assert open_comparisons(trajectory_corpus, ranking_corpus, **change).fingerprint != plain.fingerprint
    assert open_comparisons(ranking_corpus, trajectory_corpus).fingerprint != plain.fingerprint


# --- epochs and blends -----------------------------------------------------------------------------------------------


def test_each_epoch_uses_each_document_once_in_another_order(trajectory_corpus, ranking_corpus):
    dataset = open_comparisons(trajectory_corpus, ranking_corpus)
    table = halves_by_ids(dataset)
    assert len(dataset) == 120
    orders = []
    for epoch in range(3):
        found = [decompose(dataset, epoch * 120 + i, table)[0][:2] for i in range(120)]
        assert sorted(found) == [(0, d) for d in range(80)] + [(1, d) for d in range(40)]
        orders.append(found)
    assert orders[0] != orders[1] != orders[2]


def test_epochs_draw_other_trajectories_of_the_same_documents(trajectory_corpus):
    dataset = open_comparisons(trajectory_corpus)
    table = halves_by_ids(dataset)
    drawn = [{decompose(dataset, e * 80 + i, table)[0] for i in range(80)} for e in range(2)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("weights", [[1, 1], [0.9, 0.1], [0.123, 0.877], [1, 1e-9]])
def test_weights_are_respected_to_within_one_comparison_an_epoch(weights, trajectory_corpus, ranking_corpus):
    dataset = open_comparisons(trajectory_corpus, ranking_corpus, weights=weights)
    for epoch in range(2):
        counts = Counter(dataset.locate(epoch * len(dataset) + i)[0] for i in range(len(dataset)))
        for source, weight in enumerate(weights):
            assert counts[source] >= 1
            assert abs(counts[source] - weight / sum(weights) * 120) <= 1
    used = Counter(dataset.locate(i) for i in range(3 * len(dataset)))
    assert max(used.values()) == 1  # no draw is made twice


def test_an_overweighted_corpus_uses_its_documents_equally_often(trajectory_corpus, ranking_corpus):
    dataset = open_comparisons(trajectory_corpus, ranking_corpus, weights=[1, 3])
    table = halves_by_ids(dataset)
    counts = Counter(decompose(dataset, i, table)[0][:2] for i in range(2 * len(dataset)))
    small = [counts[1, d] for d in range(40)]
    assert sum(small) == 180
    assert max(small) - min(small) <= 1
    assert max(counts[0, d] for d in range(80)) <= 1


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("candidates", "drawn"), [(2, 2), (3, 3), (9, 3)])
def test_contrasts_pit_the_references_policy_against_others(candidates, drawn, trajectory_corpus):
    """Groups of the fixture hold trajectories of policies [a, a, b, c]: at most one positive and two negatives."""
    dataset = open_comparisons(trajectory_corpus, candidates=candidates)
    table = halves_by_ids(dataset)
    first_is_reference = 0
    for index in range(160):
        reference, chosen, levels = decompose(dataset, index, table)
        assert len(chosen) == drawn
        assert levels == (0,) + (1,) * (drawn - 1)
        assert chosen[0][3] == reference[3]
        assert all(entry[3] != reference[3] for entry in chosen[1:])
        assert len({reference, *chosen}) == drawn + 1  # distinct trajectories
        assert {entry[:2] for entry in chosen} == {reference[:2]}  # of one prompt
        if candidates > 2:
            assert len({entry[3] for entry in chosen[1:]}) == drawn - 1
        first_is_reference += reference[2] < chosen[0][2]
    assert 40 < first_is_reference < 120  # either of the two may be the reference


def test_negatives_come_from_as_many_policies_as_there_are_before_any_repeats(tmp_path, tokenizer_path):
    texts = [f"word {i}" for i in range(9)]
    policies = ["a", "a", "b", "b", "b", "b", "c", "c", "d"]
    entries = ", ".join(f'{{"policy": "{p}", "text": "{t}"}}' for p, t in zip(policies, texts, strict=True))
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": "ba ke", "trajectories": [{entries}]}}\n')
    preprocess([tmp_path / "in.jsonl"], output=tmp_path / "out", tokenizer_path=tokenizer_path)
    for candidates in (4, 7):
        dataset = open_comparisons(tmp_path / "out", candidates=candidates)
        table = halves_by_ids(dataset)
        anchors = set()
        for index in range(40):
            reference, chosen, _ = decompose(dataset, index, table)
            anchors.add(reference[3])
            available = sum(policy != "abcd"[reference[3]] for policy in policies)
            assert len(chosen) - 1 == len(set(chosen[1:])) == min(candidates - 1, available)
            assert len({entry[3] for entry in chosen[1:]}) == 3
        assert len(anchors) == 3  # a, b and c have two trajectories, d has not


@pytest.mark.parametrize(("candidates", "drawn"), [(2, 2), (3, 3), (4, 4), (9, 4)])
def test_rankings_keep_their_order(candidates, drawn, ranking_corpus):
    dataset = open_comparisons(ranking_corpus, candidates=candidates)
    table = halves_by_ids(dataset)
    subsets = set()
    for index in range(120):
        reference, chosen, levels = decompose(dataset, index, table)
        places = tuple(entry[2] for entry in chosen)
        assert reference[2] == 0
        assert len(chosen) == drawn
        assert places[0] > 0
        assert list(places) == sorted(set(places))
        assert levels == tuple(range(drawn))
        subsets.add(places)
    assert len(subsets) == {2: 6, 3: 4, 4: 1}[drawn]


def test_long_prompts_lose_their_head_and_the_cut_is_counted(trajectory_corpus):
    whole = open_comparisons(trajectory_corpus)
    limit = 2 * whole.corpora[0].manifest["invariants"]["longest_response"] + 4  # the least that fits any two answers
    short = open_comparisons(trajectory_corpus, longest=limit)
    cut = 0
    for index in range(80):
        a, b = whole.comparison(index), short.comparison(index)
        assert a.prompt_tokens_cut == 0
        assert all(len(b.prefix) + len(c) <= limit for c in b.candidates)
        lost = len(a.prefix) + len(a.candidates[0]) - len(b.prefix) - len(b.candidates[0])
        assert lost == 2 * b.prompt_tokens_cut
        cut += b.prompt_tokens_cut
    assert cut > 0


def test_corpora_of_different_tokenizers_do_not_mix(trajectory_corpus, tmp_path):
    other = train_tokenizer(["quite other words"] * 50, vocab_size=290, output=tmp_path / "tokenizer.model")
    source = write_trajectories(tmp_path / "in.jsonl", num_prompts=3, seed=9)
    preprocess([source], output=tmp_path / "out", tokenizer_path=other)
    with pytest.raises(UserError) as caught:
        open_comparisons(trajectory_corpus, tmp_path / "out")
    for part in (str(tmp_path / "out"), str(trajectory_corpus), "another tokenizer", "preprocess"):
        assert part in str(caught.value)


def test_control_tokens_are_those_of_the_corpus(trajectory_corpus):
    dataset = open_comparisons(trajectory_corpus)
    stated = dataset.corpora[0].manifest["tokenizer"]
    assert dataclasses.asdict(dataset.control) == {name: stated[name] for name in dataclasses.asdict(dataset.control)}
    assert Path(dataset.corpora[0].path) == Path(trajectory_corpus)
