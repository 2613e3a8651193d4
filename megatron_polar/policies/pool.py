"""`pool.yaml`: which policies there are, what they have read, and how prompts are drawn (docs/policies.md)."""

import difflib
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_polar.errors import UserError
from megatron_polar.policies.backends import BACKENDS, EmbeddedPolicy, EmbeddedSpec, choose, derived_seed, fit_embedded
from megatron_polar.policies.ngram import MARKS, MAX_ORDER, Truncation, read_documents


class Key(NamedTuple):
    """One key of a section: its default, what is allowed in words, and the test for it."""

    default: Any
    allowed: str
    is_allowed: Callable[[Any], bool]


@dataclass(frozen=True)
class PromptRule:
    """Length in words and marks of the prompts that are drawn from the corpus."""

    min_words: int
    max_words: int


@dataclass(frozen=True)
class Pool:
    """A validated pool: every policy in full, and the words of the corpus they were fitted on."""

    path: Path
    seed: int
    prompts: PromptRule
    specs: tuple[EmbeddedSpec, ...]
    documents: tuple[tuple[str, ...], ...]

    def fit(self) -> list[EmbeddedPolicy]:
        """Fit every policy, in the order of the pool: about 25 ms each on Python's own reference text."""
        return [fit_embedded(spec, self.documents) for spec in self.specs]


def _number(default: float, low: float, high: float, *, open_low: bool = False) -> Key:
    def is_allowed(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (low < value if open_low else low <= value) and value <= high

    return Key(default, f"a number in {'(' if open_low else '['}{low:g}, {high:g}]", is_allowed)


def _integer(default: int | None, low: int, high: int | None = None) -> Key:
    def is_allowed(value: Any) -> bool:
        return (
            isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high)
        )

    return Key(default, f"a whole number from {low} " + ("up" if high is None else f"to {high}"), is_allowed)


def _list_of(item: Key, default: Any) -> Key:
    def is_allowed(values: Any) -> bool:
        return isinstance(values, list) and bool(values) and all(map(item.is_allowed, values))

    return Key(default, f"a list, each entry {item.allowed}", is_allowed)


def _is_files(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_TEXT.is_allowed, value))


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not any(map(str.isspace, value))


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_word, value))


_TEXT = Key(None, "a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
_WORD = Key(None, "a word without spaces", _is_word)
_SECTION = Key({}, "a section with keys", lambda value: isinstance(value, dict))
_TEMPERATURE = _number(1.0, 0, 10, open_low=True)
_ORDER = _integer(3, 1, MAX_ORDER)

_POOL_KEYS = {
    "seed": _integer(1, 0),
    "corpus": Key("pydoc", "`pydoc`, a text file or a list of them", lambda v: _TEXT.is_allowed(v) or _is_files(v)),
    "sampling": _SECTION,
    "prompts": _SECTION,
    "embedded": _SECTION,
    "policies": Key([], "a list of policies", lambda value: isinstance(value, list)),
}
_SAMPLING_KEYS = {
    "top_p": _number(0.9, 0, 1, open_low=True),
    "top_k": _integer(50, 0),
    "min_words": _integer(14, 1),
    "max_words": _integer(20, 1),
    "corpus_fraction": _number(0.5, 0, 1, open_low=True),
    "insertion_probability": _number(0.5, 0, 1),
}
_PROMPT_KEYS = {"min_words": _integer(3, 1), "max_words": _integer(6, 1)}
_GENERATOR_KEYS = {
    "num_policies": _integer(None, 1),
    "name": Key("embedded", _WORD.allowed, _WORD.is_allowed),
    "orders": _list_of(_ORDER, [1, 2, 3]),
    "temperatures": _list_of(_TEMPERATURE, [0.8, 1.0, 1.2]),
    "favourite_words": _integer(4, 0),
    "favourite_vocabulary": _integer(64, 1),
}
_POLICY_KEYS = {
    "name": _WORD,
    "backend": Key("embedded", "the name of a backend", _TEXT.is_allowed),
    "order": _ORDER,
    "temperature": _TEMPERATURE,
    "favourite_words": Key([], "a list of words without spaces", _is_words),
    **_SAMPLING_KEYS,
}


def load_pool(path: Path) -> Pool:
    """Read, validate and complete a pool file, and read the corpus that it names (relative to the file).

    UserError, one line, for a file that cannot be read, an unknown key (with the nearest right one), a value out of
    range, a backend that does not exist, two policies of one name, or fewer than two policies.
    """
    root = _section(_read_yaml(path), _POOL_KEYS, where=str(path))
    sampling = _section(root["sampling"], _SAMPLING_KEYS, where=f"{path}: sampling")
    prompts = _section(root["prompts"], _PROMPT_KEYS, where=f"{path}: prompts")
    _check_lengths(sampling, where=f"{path}: sampling")
    _check_lengths(prompts, where=f"{path}: prompts")
    explicit = [
        _explicit_spec(entry, sampling, seed=root["seed"], where=f"{path}: policies[{index}]")
        for index, entry in enumerate(root["policies"])
    ]
    documents = tuple(map(tuple, read_documents(_corpus_files(root["corpus"], path.parent))))
    generated: list[EmbeddedSpec] = []
    if root["embedded"]:
        generator = _section(root["embedded"], _GENERATOR_KEYS, where=f"{path}: embedded")
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
    return Pool(path, root["seed"], PromptRule(**prompts), specs, documents)


def _read_yaml(path: Path) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        if path.exists() and not path.is_file():
            raise OSError("a device, a pipe or a directory")
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise UserError(f"{path}: {reason}; name a readable YAML file of a pool (docs/policies.md)") from None


def _section(given: Any, keys: dict[str, Key], *, where: str) -> dict[str, Any]:
    """Check one mapping against its keys and fill in the defaults; a default of None marks a key that must be there."""
    if not isinstance(given, dict):
        raise UserError(f"{where}: {_shown(given)} is not a section of keys and values; it takes {_names(keys)}")
    for name, value in given.items():
        if name not in keys:
            near = difflib.get_close_matches(str(name), keys, n=1)
            remedy = f"did you mean `{near[0]}`?" if near else f"use one of {_names(keys)}"
            raise UserError(f"{where}: unknown key `{name}`; {remedy}")
        if not keys[name].is_allowed(value):
            raise UserError(f"{where}: {name}={_shown(value)} is not {keys[name].allowed}; give such a value")
    missing = [name for name, key in keys.items() if key.default is None and name not in given]
    if missing:
        raise UserError(f"{where}: the key `{missing[0]}` is missing; set it to {keys[missing[0]].allowed}")
    return {name: given.get(name, key.default) for name, key in keys.items()}


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_lengths(section: dict[str, Any], *, where: str) -> None:
    if section["min_words"] > section["max_words"]:
        raise UserError(
            f"{where}: min_words={section['min_words']} is above max_words={section['max_words']}; "
            "lower it or raise max_words"
        )


def _corpus_files(corpus: str | list[str], directory: Path) -> list[Path] | None:
    if corpus == "pydoc":
        return None
    return [directory / name for name in ([corpus] if isinstance(corpus, str) else corpus)]


def _explicit_spec(entry: Any, sampling: dict[str, Any], *, seed: int, where: str) -> EmbeddedSpec:
    if isinstance(entry, dict) and entry.get("backend", "embedded") not in BACKENDS:
        raise UserError(f"{where}: backend={_shown(entry['backend'])} does not exist here; use {_names(BACKENDS)}")
    keys = {name: key._replace(default=sampling.get(name, key.default)) for name, key in _POLICY_KEYS.items()}
    policy = _section(entry, keys, where=where)
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
