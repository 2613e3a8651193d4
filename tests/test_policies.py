"""The embedded policies: what an n-gram model draws, what a pool file may say, and that habits show."""

import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_polar.errors import UserError
from megatron_polar.policies.backends import choose, derived_seed
from megatron_polar.policies.ngram import (
    Truncation,
    fit_ngram,
    join_words,
    read_documents,
    split_documents,
    split_words,
    truncated_distribution,
)
from megatron_polar.policies.pool import load_pool

EXAMPLES = Path(__file__).parent.parent / "examples" / "quickstart"
PROMPT = "the statement is"

TEXT = """The Heading
***********

The quick brown fox jumps over the lazy dog, and the dog sleeps. The fox runs away from the dog.

   rule ::= "not" prose and it should be left out of the documents of a corpus.
"""


def write_pool(directory: Path, text: str) -> Path:
    path = directory / "pool.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pool():
    return load_pool(EXAMPLES / "pool.yaml")


@pytest.fixture(scope="module")
def policies(pool):
    return pool.fit()


def test_documents_keep_prose_and_drop_headings_and_grammar():
    (document,) = split_documents(TEXT)
    assert document[:4] == ["the", "quick", "brown", "fox"]
    assert "heading" not in document and "rule" not in document


def test_joined_words_split_into_the_same_words():
    words = ["the", "fox", ",", "it's", "well-known", ":", "yes", "."]
    assert join_words(words) == "the fox, it's well-known: yes."
    assert split_words(join_words(words)) == words


def test_top_k_and_top_p_keep_the_most_probable_words():
    followers = {"a": 50, "b": 30, "c": 15, "d": 5}
    assert truncated_distribution(followers, Truncation(1.0, 1.0, 0)).words == ("a", "b", "c", "d")
    assert truncated_distribution(followers, Truncation(1.0, 1.0, 2)).words == ("a", "b")
    assert truncated_distribution(followers, Truncation(1.0, 0.8, 0)).words == ("a", "b")  # exactly 0.8
    assert truncated_distribution(followers, Truncation(1.0, 0.81, 0)).words == ("a", "b", "c")
    assert truncated_distribution(followers, Truncation(1.0, 0.01, 0)).words == ("a",)  # one word always stays


def test_temperature_is_the_exponent_of_the_probabilities():
    distribution = truncated_distribution({"a": 9, "b": 1}, Truncation(0.5, 1.0, 0))
    assert distribution.cumulative == pytest.approx((81 / 82, 1.0))


def test_drawn_frequencies_follow_witten_bell_back_off():
    documents = [["a", "b", "a", "b", "a", "c"]]
    model = fit_ngram(documents, order=2, truncation=Truncation(1.0, 1.0, 0))
    rng = random.Random(0)
    drawn = Counter(model.next_word(("a",), rng.random) for _ in range(20000))
    # After "a": b twice, c once: T=2, N=3, so P(back off) = 2/5. Without context: a 3/6, b 2/6, c 1/6.
    expected = {"a": 0.4 * 3 / 6, "b": 0.6 * 2 / 3 + 0.4 * 2 / 6, "c": 0.6 * 1 / 3 + 0.4 * 1 / 6}
    for word, probability in expected.items():
        assert drawn[word] / 20000 == pytest.approx(probability, abs=0.015)  # 4 standard deviations of the count


def test_an_unseen_context_backs_off_to_single_words():
    model = fit_ngram([["a", "b", "c"]], order=3)
    assert model.next_word(("never", "seen"), random.Random(1).random) in {"a", "b", "c"}


def test_contexts_do_not_span_documents():
    model = fit_ngram([["a", "b"], ["c", "d"]], order=2)
    assert ("b",) not in model.followers


def test_an_order_that_is_not_offered_is_refused():
    with pytest.raises(UserError, match="order=4"):
        fit_ngram([["a"]], order=4)


def test_python_carries_enough_prose():
    documents = read_documents(None)
    assert len(documents) > 50
    assert sum(map(len, documents)) > 30_000


def test_derived_seeds_keep_parts_apart():
    assert derived_seed("ab", "c") != derived_seed("a", "bc")
    assert derived_seed("trajectory", 1) == 10485395639284836165  # the same on every machine


def test_choose_returns_different_items_and_leaves_the_list_alone():
    items = list(range(10))
    chosen = choose(items, 6, random.Random(3))
    assert len(set(chosen)) == 6 and set(chosen) <= set(items) and items == list(range(10))


def test_trajectories_of_one_policy_differ_and_repeat_with_the_seed(policies):
    first = policies[5].generate(PROMPT, num_trajectories=6, seed=1, wrapper="pretrain")
    assert len(set(first)) == 6
    assert policies[5].generate(PROMPT, num_trajectories=6, seed=1, wrapper="pretrain") == first
    assert set(policies[5].generate(PROMPT, num_trajectories=6, seed=2, wrapper="pretrain")).isdisjoint(first)


def test_trajectories_do_not_depend_on_what_was_drawn_before(pool, policies):
    fresh = pool.fit()[7]
    policies[7].generate("another prompt", num_trajectories=3, seed=1, wrapper="sft")
    drawn = policies[7].generate(PROMPT, num_trajectories=4, seed=1, wrapper="sft")
    assert fresh.generate(PROMPT, num_trajectories=4, seed=1, wrapper="sft") == drawn
    assert fresh.generate(PROMPT, num_trajectories=2, seed=1, wrapper="sft") == drawn[:2]


def test_a_pretrain_trajectory_continues_its_prompt_and_an_sft_one_stands_alone(policies):
    for policy in policies[:8]:
        glued = policy.generate(PROMPT, num_trajectories=8, seed=1, wrapper="pretrain")
        alone = policy.generate(PROMPT, num_trajectories=8, seed=1, wrapper="sft")
        assert [text.removeprefix(" ") for text in glued] == alone
        assert all(split_words(PROMPT + text) == split_words(PROMPT) + split_words(text) for text in glued)
        assert not any(text.startswith(" ") for text in alone)


def test_lengths_are_those_of_the_pool(policies):
    for policy in policies[:8]:
        for text in policy.generate(PROMPT, num_trajectories=20, seed=1, wrapper="sft"):
            count = len(split_words(text))
            assert policy.spec.min_words <= count <= policy.spec.max_words


def test_habits_show_in_every_policy(policies):
    prompts = [f"the {noun} is" for noun in ("object", "function", "class", "value", "module", "type")]
    counts = {
        policy.name: Counter(
            word
            for prompt in prompts
            for text in policy.generate(prompt, num_trajectories=10, seed=1, wrapper="sft")
            for word in split_words(text)
        )
        for policy in policies
    }
    shares = {name: {word: count / total.total() for word, count in total.items()} for name, total in counts.items()}
    for policy in policies:
        favourites = policy.spec.favourite_words
        own = sum(shares[policy.name].get(word, 0.0) for word in favourites)
        others = [
            sum(shares[other.name].get(word, 0.0) for word in favourites) for other in policies if other is not policy
        ]
        assert own > 0.2 and own > 3 * sum(others) / len(others) and own > max(others), policy.name


def test_unseen_policies_share_neither_names_nor_habits_with_the_seen_ones(pool):
    unseen = load_pool(EXAMPLES / "unseen_pool.yaml")
    assert len(pool.specs) >= 64 and len(unseen.specs) >= 16
    assert {spec.name for spec in pool.specs}.isdisjoint(spec.name for spec in unseen.specs)
    seen_habits = {frozenset(spec.favourite_words) for spec in pool.specs}
    unseen_habits = {frozenset(spec.favourite_words) for spec in unseen.specs}
    assert len(seen_habits) == len(pool.specs) and len(unseen_habits) == len(unseen.specs)
    assert seen_habits.isdisjoint(unseen_habits)
    assert {(spec.truncation, spec.insertion_probability, spec.max_words) for spec in unseen.specs} <= {
        (spec.truncation, spec.insertion_probability, spec.max_words) for spec in pool.specs
    }


def test_a_pool_reads_text_files_beside_it_and_explicit_policies(tmp_path):
    (tmp_path / "fox.txt").write_text(TEXT, encoding="utf-8")
    path = write_pool(
        tmp_path,
        "corpus: [fox.txt]\nsampling: {min_words: 3, max_words: 5, corpus_fraction: 1.0}\n"
        "policies:\n- {name: plain, order: 1}\n"
        "- {name: loud, backend: embedded, temperature: 0.5, favourite_words: [wow], insertion_probability: 1.0}\n",
    )
    plain, loud = load_pool(path).fit()
    assert "wow" not in plain.generate("the", num_trajectories=1, seed=1, wrapper="sft")[0]
    assert "wow" in loud.generate("the", num_trajectories=1, seed=1, wrapper="sft")[0]
    assert (plain.spec.order, loud.spec.order, loud.spec.truncation.temperature) == (1, 3, 0.5)


TWO = "embedded: {num_policies: 2}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embeded: {num_policies: 2}\n", "unknown key `embeded`; did you mean `embedded`"),
        ("num_policies: 2\n", "unknown key `num_policies`; it belongs below `embedded`"),
        ("min_words: 2\n", "unknown key `min_words`; it belongs below `sampling` or `prompts`"),
        ("embedded: {num_policy: 2}\n", "embedded: unknown key `num_policy`; did you mean `num_policies`"),
        ("sampling: {temprature: 1}\n" + TWO, "sampling: unknown key `temprature`; use one of"),
        ("embedded: {orders: [1]}\n", "embedded: the key `num_policies` is missing"),
        ("embedded: {num_policies: two}\n", "embedded: num_policies='two' is not a whole number from 1 up"),
        ("embedded: {num_policies: 2, orders: [1, 4]}\n", r"orders=\[1, 4\] is not a list, each entry a whole number"),
        ("embedded: {num_policies: 2, orders: []}\n", r"orders=\[\] is not a list"),
        ("embedded: {num_policies: 2, temperatures: [0]}\n", r"each entry a number in \(0, 10\]"),
        ("sampling: {top_p: 1.5}\n" + TWO, r"sampling: top_p=1.5 is not a number in \(0, 1\]"),
        ("sampling: {top_k: true}\n" + TWO, "sampling: top_k=True is not a whole number from 0 up"),
        ("sampling: {min_words: 90}\n" + TWO, "min_words=90 is above max_words="),
        ("sampling: 3\n" + TWO, "sampling=3 is not a section with keys"),
        ("- a\n- b\n", "is not a section of keys and values"),
        ("seed: [1\n", "pool.yaml"),
        ("embedded: {num_policies: 1}\n", "1 policies are described and a comparison needs two"),
        ("policies: [{name: a}, {name: a}]\n", "the name 'a' stands for two policies"),
        ("policies: [{name: a, order: 0}]\n", r"policies\[0\]: order=0 is not a whole number from 1 to 3"),
        ("policies: [{order: 1}]\n", r"policies\[0\]: the key `name` is missing"),
        ("policies: [{name: a, backend: openai, url: x}]\n", "backend='openai' does not exist here; use `embedded`"),
        ("corpus: absent.txt\n" + TWO, "absent.txt: No such file or directory"),
        ("embedded: {num_policies: 2, favourite_words: 9, favourite_vocabulary: 8}\n", "is above the 8 words"),
        ("embedded: {num_policies: 9, favourite_words: 7, favourite_vocabulary: 8}\n", "too few combinations"),
    ],
)
def test_every_mistake_in_a_pool_is_one_clear_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_pool(write_pool(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe", "byte 0 is not UTF-8"), (b"# Title\n", "holds no paragraph")]
)
def test_a_corpus_without_prose_is_refused(tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_pool(write_pool(tmp_path, "corpus: text.txt\n" + TWO))


def test_a_pool_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml: No such file or directory"):
        load_pool(tmp_path / "absent.yaml")


def test_the_documented_defaults_are_the_defaults(tmp_path):
    page = (EXAMPLES.parent.parent / "docs" / "policies.md").read_text(encoding="utf-8")
    block = page.split("```yaml\n")[1].split("```")[0]
    documented = load_pool(write_pool(tmp_path, block))
    minimal = load_pool(write_pool(tmp_path, "embedded: {num_policies: 64}\n"))
    assert documented.specs[:-1] == minimal.specs and documented.specs[-1].name == "hesitant"
    assert (documented.prompts, documented.documents) == (minimal.prompts, minimal.documents)
