"""The command line of slurm/launch.sh, and what a job script says of itself. Part of submit.py."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_polar.errors import UserError

_ANY_YAML = Path("slurm/train.sh")


@dataclass(frozen=True)
class JobScript:
    """A script below slurm/: its #SBATCH lines and what it calls."""

    path: Path
    text: str

    def directive(self, name: str) -> str | None:
        """The value of `#SBATCH --name=value`."""
        found = re.search(rf"^#SBATCH --{name}=(\S+)", self.text, re.MULTILINE)
        return found[1] if found else None

    @property
    def trains(self) -> bool:
        return self._calls("polar_train")

    @property
    def is_array(self) -> bool:
        return self._calls("polar_array")

    def _calls(self, function: str) -> bool:
        return re.search(rf"^{function} ", self.text, re.MULTILINE) is not None

    @property
    def config(self) -> str | None:
        """The YAML that it names; None where that is its first argument."""
        found = re.search(r"^polar_train .*POLAR_CONFIG:-([^}]+)\}", self.text, re.MULTILINE)
        return os.environ.get("POLAR_CONFIG") or (found[1] if found else None)


@dataclass(frozen=True)
class Request:
    """What is asked for. `options` are sbatch's, `arguments` the script's; no `config`: it trains nothing."""

    script: JobScript
    arguments: tuple[str, ...]
    config: Path | None
    overrides: tuple[str, ...]
    options: tuple[str, ...]
    dry_run: bool
    with_paths: bool
    chain: int

    @property
    def job(self) -> Path:
        return self.script.path

    def option(self, name: str) -> str | None:
        """The value of the last `--name=value` that the user has given."""
        values = [option.partition("=")[2] for option in self.options if option.startswith(f"--{name}=")]
        return values[-1] if values else None

    def setting(self, name: str) -> str | None:
        """The user's option, else the script's own."""
        return self.option(name) or self.script.directive(name)


@dataclass(frozen=True)
class Shape:
    """Nodes, and GPUs and ranks on each."""

    num_nodes: int
    num_gpus: int
    num_ranks: int


def parse_request(words: Sequence[str]) -> Request:
    """Read the words behind slurm/launch.sh. Raises UserError."""
    options, flags, chain, rest = _split(words)
    if not rest:
        raise UserError("launch.sh: no job; name a job script or a configuration such as examples/pretrain_7b.yaml")
    first, arguments = rest[0], tuple(rest[1:])
    if not Path(first).is_file():
        raise UserError(_no_such_file(first, options))
    script = _script(Path(first)) if first.endswith(".sh") else _script_of(Path(first))
    config: str | None = None
    overrides = arguments
    if script.trains:
        config = script.config
        if not first.endswith(".sh"):
            config = first
            arguments = arguments if script.path != _ANY_YAML else (first, *arguments)
        elif config is None:
            config, overrides = (arguments[0], arguments[1:]) if arguments else (None, ())
        _check_arguments(config, overrides)
    return Request(
        script=script,
        arguments=arguments,
        config=None if config is None else Path(config),
        overrides=overrides,
        options=tuple(options),
        dry_run="--dry-run" in flags,
        with_paths="--no-paths" not in flags,
        chain=chain,
    )


def _split(words: Sequence[str]) -> tuple[list[str], set[str], int, list[str]]:
    """Options of sbatch, our own flags, the length of a chain, and the rest from the job on."""
    options, flags, chain, rest = [], set(), 0, list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, separator, value = word.partition("=")
        if word in ("--dry-run", "--no-paths"):
            flags.add(word)
        elif name == "--chain":
            chain = _chain(value if separator else rest.pop(0) if rest else "")
        elif word in ("--nodes", "-N"):
            options.append(f"--nodes={rest.pop(0) if rest else ''}")
        elif re.fullmatch(r"-[Nt]\S+", word):
            options.append({"N": "--nodes=", "t": "--time="}[word[1]] + word[2:])
        else:
            options.append(word)
    return options, flags, chain, rest


def _chain(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--chain {text}: is not a number of jobs; give 1 or more")
    return int(text)


def _no_such_file(word: str, options: Sequence[str]) -> str:
    message = f"{word}: no such file in {Path.cwd()}; name a job script, or a configuration such as "
    message += "examples/pretrain_7b.yaml"
    if options and "=" not in options[-1]:
        separator = "=" if options[-1].startswith("--") else ""
        message += f" (options of sbatch are written as one word: {options[-1]}{separator}{word})"
    return message


def _script(path: Path) -> JobScript:
    script = JobScript(path, path.read_text(errors="replace"))
    if script.is_array:
        raise UserError(f"{path}: submits its parts itself; run {path} with the arguments of its verb")
    if "\n#SBATCH" not in script.text:
        known = sorted(str(other) for other in path.parent.glob("*.sh") if "\n#SBATCH" in other.read_text())
        raise UserError(f"{path}: is no job script; there are {', '.join(known)}")
    return script


def _script_of(config: Path) -> JobScript:
    """The job script that belongs to a YAML, else the one for any."""
    for path in sorted(Path("slurm").glob("*.sh")):
        script = JobScript(path, path.read_text())
        named = re.search(r"POLAR_CONFIG:-([^}]+)\}", script.text)
        if script.trains and named and Path(named[1]).resolve() == config.resolve():
            return script
    return JobScript(_ANY_YAML, _ANY_YAML.read_text())


def _check_arguments(config: str | None, overrides: Sequence[str]) -> None:
    if config is None or not Path(config).is_file():
        name = config or "the YAML"
        raise UserError(f"{name}: no such file in {Path.cwd()}; name a configuration such as examples/pretrain_7b.yaml")
    late = next((word for word in overrides if word.startswith("-")), None)
    if late is not None:
        raise UserError(f"{late} comes after {config}; options of sbatch and of launch.sh go before it")


def shape_of(request: Request, *, launcher: str, ranks_per_node: int | None) -> Shape:
    """Raises UserError where a node would have more ranks than GPUs, or the number of nodes is left open."""
    nodes = request.setting("nodes") or "1"
    if not nodes.isdigit() or int(nodes) < 1:
        raise UserError(f"--nodes={nodes}: give one number of nodes; memory and batch are planned for it")
    asked = request.setting("gpus-per-node") or "0"
    number = re.split("[=:]", asked)[-1]  # 8, or h100:8
    if not number.isdigit():
        raise UserError(f"--gpus-per-node={asked}: give a number, too, such as {asked}:8")
    gpus = int(number)
    if launcher == "torchrun":
        ranks, remedy = ranks_per_node or gpus, f"set POLAR_RANKS_PER_NODE={gpus}, too"
    else:
        ranks, remedy = int(request.setting("ntasks-per-node") or 1), f"give --ntasks-per-node={gpus}, too"
    if gpus and ranks > gpus:
        raise UserError(f"{ranks} ranks for {gpus} GPUs of a node; {remedy}")
    return Shape(int(nodes), gpus, ranks)


def minutes_of(text: str | None) -> int | None:
    """Whole minutes of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None: no such time."""
    if text is None or not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        return None
    days, dash, rest = text.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if dash:
        return int(days) * 1440 + numbers[0] * 60 + (numbers[1] if len(numbers) > 1 else 0)
    return numbers[0] * 60 + numbers[1] if len(numbers) == 3 else numbers[0]
