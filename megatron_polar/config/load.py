"""YAML + `section.key=value` → RunConfig, and back. The only importer of OmegaConf."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_polar.config.schema import RunConfig
from megatron_polar.config.validate import validate
from megatron_polar.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = (), *, for_training: bool = True) -> RunConfig:
    """Read a run's YAML, apply `section.key=value` overrides, and check every value and every pair that must fit.

    Not `for_training`: it may name no data. Raises UserError naming the key, the value, the reason and the remedy.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: a device or a pipe, which cannot be read twice; write the configuration to a file")
    try:
        tree = OmegaConf.load(path)
        for override in overrides:
            key, separator, _ = override.partition("=")
            if not separator or not key:
                raise UserError(f"override {override!r} is not of the form section.key=value")
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        container = OmegaConf.to_container(tree, resolve=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file; paths count from where you are ({Path.cwd()})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a configuration ({error.strerror or error})") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except TypeError:  # OmegaConf merges no list with a mapping
        raise UserError(
            f"{path}: a list and a mapping do not merge; the file must be a mapping of sections (run, model, data, "
            f"...), and an override must replace a list whole, as in 'data.train=[{{path: DIRECTORY}}]'"
        ) from None
    if not isinstance(container, dict):
        raise UserError(
            f"{path}: the top level must be a mapping of sections (run, model, data, train, optimizer, ...)"
        )
    config = _build(RunConfig, container, key="", source=str(path))
    validate(config, for_training=for_training)
    return config


def load_saved_config(path: str | Path) -> RunConfig:
    """Read the configuration of a checkpoint, which may come from anywhere.

    It is refused where it has what `dump_config` never writes: interpolations, which could carry an environment
    variable of yours into a log or a report, and aliases, a few of which fill any memory.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        aliases = [token.value for token in yaml.scan(text) if isinstance(token, yaml.AliasToken)]
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a saved configuration: {' '.join(str(error).split())}") from None
    if "${" in text or aliases:
        what = f"the alias *{aliases[0]}" if aliases else "an interpolation, ${...}"
        raise UserError(f"{path}: has {what}, which no saved configuration has; do not use this checkpoint")
    return load_config(path, for_training=False)


def dump_config(config: RunConfig) -> str:
    """Render the resolved configuration as YAML; `load_config` of it gives the same RunConfig."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(config)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _build(cls: type, mapping: Any, *, key: str, source: str):
    where = key or "the top level"
    if not isinstance(mapping, Mapping):
        raise UserError(f"{source}: {where} must be a mapping, such as {_example_of(cls)}, not {mapping!r}")
    hints = typing.get_type_hints(cls)
    prefix = f"{key}." if key else ""
    for name in mapping:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            raise UserError(f"{source}: unknown key {prefix}{name}; {hint}")
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in mapping:
            name = f"{prefix}{field.name}"
            values[field.name] = _convert(hints[field.name], mapping[field.name], key=name, source=source)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{source}: {prefix}{field.name} is missing; it has no default")
    return cls(**values)


def _example_of(cls: type) -> str:
    return f"{{{dataclasses.fields(cls)[0].name}: ...}}"


def _convert(hint: Any, value: Any, *, key: str, source: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, key=key, source=source)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key=key, source=source)
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{source}: {key}={value!r} must be a list, such as [{_example_of(arguments[0])}]")
        return tuple(_convert(arguments[0], item, key=f"{key}[{i}]", source=source) for i, item in enumerate(value))
    if origin is Literal:
        if isinstance(value, bool) and value not in arguments:
            value = "on" if value else "off"  # YAML 1.1 reads both as booleans
        if not any(value == a and type(value) is type(a) for a in arguments):
            names = [str(a).lower() if isinstance(a, bool) else a for a in arguments]
            near = difflib.get_close_matches(str(value), names, n=1)
            hint_text = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{source}: {key}={value!r} must be one of {', '.join(names)}{hint_text}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not hint:
        raise UserError(f"{source}: {key}={value!r} must be of type {hint.__name__}, not {type(value).__name__}")
    return value
