"""`pool.yaml`: which policies there are, what they have read, and how prompts are drawn (docs/policies.md)."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_polar.errors import UserError
from megatron_polar.policies.backends import BACKENDS, EmbeddedPolicy, EmbeddedSpec, choose, derived_seed, fit_embedded
from megatron_polar.policies.clean import Cleaning
from megatron_polar.policies.imitation import ImitationPolicy, ImitationSpec, fit_imitation, read_imitation
from megatron_polar.policies.keys import (
    SECTION,
    TEXT,
    WORD,
    Key,
    check_section,
    integer,
    is_files,
    is_words,
    list_of,
    listed,
    number,
    one_of,
    read_yaml,
    shown,
)
from megatron_polar.policies.ngram import MARKS, MAX_ORDER, Truncation, read_documents
from megatron_polar.policies.remote import HttpSpec, TransformersSpec, check_together, read_http, read_transformers


@dataclass(frozen=True)
class PromptRule:
    """Length in words and marks of the prompts that are drawn from the corpus."""

    min_words: int
    max_words: int


@dataclass(frozen=True)
class Pool:
    """A validated pool: every policy in full, and the words of the corpus that embedded ones are fitted on.

    Without embedded policies the corpus is read when prompts are drawn from it. cleaning: of answers, where not all
    policies are embedded.
    """

    path: Path
    seed: int
    prompts: PromptRule
    specs: tuple[EmbeddedSpec | ImitationSpec | HttpSpec | TransformersSpec, ...]
    documents: tuple[tuple[str, ...], ...]
    corpus: tuple[Path, ...] | None
    cleaning: Cleaning = field(default_factory=Cleaning)

    @property
    def is_embedded(self) -> bool:
        """Whether every policy is."""
        return all(isinstance(spec, EmbeddedSpec | ImitationSpec) for spec in self.specs)

    def read_corpus(self) -> tuple[tuple[str, ...], ...]:
        """The documents, whether they were read before or not. Raises UserError."""
        return self.documents or tuple(map(tuple, read_documents(self.corpus)))

    def fit(self) -> list[EmbeddedPolicy | ImitationPolicy]:
        """Fit every embedded policy, in the order of the pool: about 25 ms each on Python's own reference text."""
        return [
            fit_imitation(spec) if isinstance(spec, ImitationSpec) else fit_embedded(spec, self.documents)
            for spec in self.specs
            if isinstance(spec, EmbeddedSpec | ImitationSpec)
        ]


_TEMPERATURE = number(1.0, 0, 10, open_low=True)
_ORDER = integer(3, 1, MAX_ORDER)

_POOL_KEYS = {
    "seed": integer(1, 0),
    "corpus": Key("pydoc", "`pydoc`, a text file or a list of them", lambda v: TEXT.is_allowed(v) or is_files(v)),
    "sampling": SECTION,
    "prompts": SECTION,
    "embedded": SECTION,
    "policies": Key([], "a list of policies", lambda value: isinstance(value, list)),
    "cleaning": SECTION,
}
_SAMPLING_KEYS = {
    "top_p": number(0.9, 0, 1, open_low=True),
    "top_k": integer(50, 0),
    "min_words": integer(14, 1),
    "max_words": integer(20, 1),
    "corpus_fraction": number(0.5, 0, 1, open_low=True),
    "insertion_probability": number(0.5, 0, 1),
}
_MAX_TOKENS = {"max_tokens": integer(4096, 1)}
_CLEANING_KEYS = {
    "loop_repeats": integer(4, 0),
    "loop_characters": integer(100, 1),
    "cut_off": one_of("trim", "keep", "drop")._replace(default="trim"),
    "near_duplicates": number(0.9, 0, 1),
}
_PROMPT_KEYS = {"min_words": integer(3, 1), "max_words": integer(6, 1)}
_GENERATOR_KEYS = {
    "num_policies": integer(None, 1),
    "name": Key("embedded", WORD.allowed, WORD.is_allowed),
    "orders": list_of(_ORDER, [1, 2, 3]),
    "temperatures": list_of(_TEMPERATURE, [0.8, 1.0, 1.2]),
    "favourite_words": integer(4, 0),
    "favourite_vocabulary": integer(64, 1),
}
_SECTIONS = {
    "sampling": _SAMPLING_KEYS | _MAX_TOKENS,
    "prompts": _PROMPT_KEYS,
    "embedded": _GENERATOR_KEYS,
    "cleaning": _CLEANING_KEYS,
}
_POLICY_KEYS = {
    "name": WORD,
    "backend": Key("embedded", "the name of a backend", TEXT.is_allowed),
    "order": _ORDER,
    "temperature": _TEMPERATURE,
    "favourite_words": Key([], "a list of words without spaces", is_words),
    **_SAMPLING_KEYS,
}


def load_pool(path: Path) -> Pool:
    """Read, validate and complete a pool file, and read the corpus that it names (relative to the file).

    UserError, one line, for a file that cannot be read, an unknown key (with the nearest right one), a value out of
    range, a backend that does not exist, two policies of one name, or fewer than two policies.
    """
    root = check_section(read_yaml(path), _POOL_KEYS, where=str(path), below=_SECTIONS)
    sampling = check_section(root["sampling"], _SECTIONS["sampling"], where=f"{path}: sampling")
    prompts = check_section(root["prompts"], _PROMPT_KEYS, where=f"{path}: prompts")
    cleaning = check_section(root["cleaning"], _CLEANING_KEYS, where=f"{path}: cleaning")
    _check_lengths(sampling, where=f"{path}: sampling")
    _check_lengths(prompts, where=f"{path}: prompts")
    explicit = [
        _explicit_spec(entry, sampling, seed=root["seed"], path=path, where=f"{path}: policies[{index}]")
        for index, entry in enumerate(root["policies"])
    ]
    corpus, documents = _corpus_files(root["corpus"], path.parent), ()
    if root["embedded"] or any(isinstance(spec, EmbeddedSpec) for spec in explicit) or not explicit:
        documents = tuple(map(tuple, read_documents(corpus)))
    generated: list[EmbeddedSpec] = []
    if root["embedded"]:
        generator = check_section(root["embedded"], _GENERATOR_KEYS, where=f"{path}: embedded")
        generated = _generate_specs(generator, sampling, documents, seed=root["seed"], where=f"{path}: embedded")
    specs = (*generated, *explicit)
    repeated = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: policies: the name {repeated[0]!r} stands for two policies; rename one of them")
    if len(specs) < 2:
        raise UserError(
            f"{path}: {len(specs)} policies are described and a comparison needs two; "
            "set embedded.num_policies or list them under `policies`"
        )
    check_together(specs, where=f"{path}: policies")
    _check_different(specs, where=f"{path}: policies")
    pool = Pool(path, root["seed"], PromptRule(**prompts), specs, documents, corpus, Cleaning(**cleaning))
    if pool.is_embedded and root["cleaning"]:
        raise UserError(
            f"{path}: cleaning is for answers of models, and every policy here is embedded; take the section out"
        )
    return pool


def _check_different(specs: Iterable[Any], *, where: str) -> None:
    """Raise UserError for two names of one model that samples in one way: nothing can tell them apart."""
    first: dict[bytes, str] = {}
    for spec in specs:
        if isinstance(spec, HttpSpec | TransformersSpec):
            identity = spec.identity() | {"name": "", "at": getattr(spec, "endpoint", "")}
            other = first.setdefault(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS), spec.name)
            if other != spec.name:
                raise UserError(
                    f"{where}: {other} and {spec.name} are one model with one way of sampling, which nothing can tell "
                    "apart; leave one out, or change its sampling"
                )


def _check_lengths(section: dict[str, Any], *, where: str) -> None:
    if section["min_words"] > section["max_words"]:
        raise UserError(
            f"{where}: min_words={section['min_words']} is above max_words={section['max_words']}; "
            "lower it or raise max_words"
        )


def _corpus_files(corpus: str | list[str], directory: Path) -> tuple[Path, ...] | None:
    if corpus == "pydoc":
        return None
    return tuple(directory / name for name in ([corpus] if isinstance(corpus, str) else corpus))


def _explicit_spec(
    entry: Any, sampling: dict[str, Any], *, seed: int, path: Path, where: str
) -> EmbeddedSpec | ImitationSpec | HttpSpec | TransformersSpec:
    """One entry of `policies:`; where it names no backend, an endpoint, a model's path or answers say which."""
    if isinstance(entry, dict):
        telling = {"endpoint": "http", "path": "transformers", "answers": "imitation"}
        backend = entry.get("backend", next((name for key, name in telling.items() if key in entry), "embedded"))
        if backend not in BACKENDS:
            raise UserError(f"{where}: backend={shown(backend)} does not exist here; use {listed(BACKENDS)}")
        if backend == "http":
            return read_http(entry, sampling, where=where)
        if backend == "transformers":
            return read_transformers(entry, sampling, directory=path.parent, where=where)
        if backend == "imitation":
            return read_imitation(entry, sampling, seed=seed, directory=path.parent, where=where)
    keys = {name: key._replace(default=sampling.get(name, key.default)) for name, key in _POLICY_KEYS.items()}
    policy = check_section(entry, keys, where=where)
    _check_lengths(policy, where=where)
    return _spec(policy, seed=seed)


def _spec(policy: dict[str, Any], *, seed: int) -> EmbeddedSpec:
    return EmbeddedSpec(
        name=policy["name"],
        seed=seed,
        order=policy["order"],
        truncation=Truncation(float(policy["temperature"]), float(policy["top_p"]), policy["top_k"]),
        corpus_fraction=float(policy["corpus_fraction"]),
        favourite_words=tuple(policy["favourite_words"]),
        insertion_probability=float(policy["insertion_probability"]),
        min_words=policy["min_words"],
        max_words=policy["max_words"],
    )


def favourite_vocabulary(documents: Iterable[Iterable[str]], size: int) -> list[str]:
    """Return the `size` words of four or more letters that occur most often: what habits are made of."""
    counts = Counter(word for document in documents for word in document if word not in MARKS and len(word) >= 4)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, _ in ranked[:size]]


def _generate_specs(
    generator: dict[str, Any], sampling: dict[str, Any], documents: Iterable[Iterable[str]], *, seed: int, where: str
) -> list[EmbeddedSpec]:
    """Write out the generator's policies: order and temperature in turn, favourite words of their own for each."""
    words = favourite_vocabulary(documents, generator["favourite_vocabulary"])
    if generator["favourite_words"] > len(words):
        raise UserError(
            f"{where}: favourite_words={generator['favourite_words']} is above the {len(words)} words to choose from; "
            "lower it, raise favourite_vocabulary or name a larger corpus"
        )
    orders, temperatures = generator["orders"], generator["temperatures"]
    taken: set[frozenset[str]] = set()
    specs = []
    for index in range(generator["num_policies"]):
        name = f"{generator['name']}-{index:03d}"
        policy = {
            **sampling,
            "name": name,
            "order": orders[index % len(orders)],
            "temperature": temperatures[index // len(orders) % len(temperatures)],
        }
        rng = random.Random(derived_seed("favourites", seed, name))
        policy["favourite_words"] = _own_favourites(words, generator["favourite_words"], taken, rng=rng, where=where)
        specs.append(_spec(policy, seed=seed))
    return specs


def _own_favourites(
    words: list[str], count: int, taken: set[frozenset[str]], *, rng: random.Random, where: str
) -> list[str]:
    """Draw favourite words that no earlier policy of the pool has in this combination."""
    for _ in range(1000):
        favourites = choose(words, count, rng)
        if not count or frozenset(favourites) not in taken:
            taken.add(frozenset(favourites))
            return favourites
    raise UserError(
        f"{where}: favourite_vocabulary={len(words)} has too few combinations of {count} words for every policy to "
        "have its own; raise favourite_vocabulary or lower num_policies"
    )
