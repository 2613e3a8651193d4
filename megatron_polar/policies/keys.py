"""Keys of a pool file: what each may hold, its default, and one clear line for everything else."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_polar.errors import UserError


class Key(NamedTuple):
    """One key of a section: its default, what is allowed in words, and the test for it."""

    default: Any
    allowed: str
    is_allowed: Callable[[Any], bool]


def number(default: float, low: float, high: float, *, open_low: bool = False) -> Key:
    def is_allowed(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (low < value if open_low else low <= value) and value <= high

    return Key(default, f"a number in {'(' if open_low else '['}{low:g}, {high:g}]", is_allowed)


def integer(default: int | None, low: int, high: int | None = None) -> Key:
    def is_allowed(value: Any) -> bool:
        return (
            isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high)
        )

    return Key(default, f"a whole number from {low} " + ("up" if high is None else f"to {high}"), is_allowed)


def list_of(item: Key, default: Any) -> Key:
    def is_allowed(values: Any) -> bool:
        return isinstance(values, list) and bool(values) and all(map(item.is_allowed, values))

    return Key(default, f"a list, each entry {item.allowed}", is_allowed)


def one_of(*names: str) -> Key:
    """A key without a default that takes one of `names`."""
    return Key(None, " or ".join(f"`{name}`" for name in names), lambda value: value in names)


def is_files(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(TEXT.is_allowed, value))


def is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not any(map(str.isspace, value))


def is_words(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_word, value))


TEXT = Key(None, "a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
WORD = Key(None, "a word without spaces", is_word)
SECTION = Key({}, "a section with keys", lambda value: isinstance(value, dict))


def read_yaml(path: Path) -> Any:
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


def check_section(
    given: Any, keys: dict[str, Key], *, where: str, below: Mapping[str, Iterable[str]] | None = None
) -> dict[str, Any]:
    """Check one mapping against its keys and fill in the defaults; a default of None marks a key that must be there.

    `below`: the keys of sections that it has, to say where a key belongs that was written beside them.
    """
    if not isinstance(given, dict):
        raise UserError(f"{where}: {shown(given)} is not a section of keys and values; it takes {listed(keys)}")
    for name, value in given.items():
        if name not in keys:
            raise UserError(f"{where}: unknown key `{name}`; {_remedy(name, keys, below=below or {})}")
        if not keys[name].is_allowed(value):
            raise UserError(f"{where}: {name}={shown(value)} is not {keys[name].allowed}; give such a value")
    missing = [name for name, key in keys.items() if key.default is None and name not in given]
    if missing:
        raise UserError(f"{where}: the key `{missing[0]}` is missing; set it to {keys[missing[0]].allowed}")
    return {name: given.get(name, key.default) for name, key in keys.items()}


def _remedy(name: Any, keys: dict[str, Key], *, below: Mapping[str, Iterable[str]]) -> str:
    homes = [section for section, names in below.items() if name in names]
    if homes:
        return f"it belongs below {' or '.join(f'`{home}`' for home in homes)}"
    near = difflib.get_close_matches(str(name), keys, n=1)
    return f"did you mean `{near[0]}`?" if near else f"use one of {listed(keys)}"


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
