"""A scaling study on the disk: a YAML for each run, `ladder.json`, and `README.md` with how to train and fit them."""

import dataclasses
import json
from pathlib import Path

from megatron_polar.config.load import dump_config
from megatron_polar.config.presets import architecture_of
from megatron_polar.errors import UserError
from megatron_polar.manifest import write_durably
from megatron_polar.scaling.ladder import Ladder, Rung
from megatron_polar.scaling.table import short


def write_ladder(ladder: Ladder, directory: Path, *, command: str) -> list[Path]:
    """Write a YAML for each run, `ladder.json` and `README.md`; returns their paths.

    What is there already with the same content stays. Raises UserError, before anything is written, where a file has
    another content.
    """
    contents = {
        **{f"{rung.name}.yaml": _yaml(rung, directory=directory, command=command) for rung in ladder.rungs},
        "ladder.json": json.dumps(as_json(ladder, command=command), indent=2) + "\n",
        "README.md": _readme(ladder, directory=directory, command=command),
    }
    files = {directory / name: content.encode() for name, content in contents.items()}
    for path, content in files.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != content):
            raise UserError(
                f"{path}: is there with another content, and is not overwritten; choose another directory for "
                f"--ladder, or remove it"
            )
    directory.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        if not path.exists():
            write_durably(path, content)
    return list(files)


def as_json(ladder: Ladder, *, command: str) -> dict:
    """The study as a table, with the shape and layout of each run."""
    return {
        "command": command,
        "cluster": ladder.cluster.name if ladder.cluster else "CPU, one rank",
        "notes": list(ladder.notes),
        "runs": [_row(rung) for rung in ladder.rungs],
    }


def _row(rung: Rung) -> dict:
    train, parallel = rung.config.train, rung.config.parallel
    shape = architecture_of(rung.config.model)
    shown = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    figures = {field.name: getattr(rung, field.name) for field in dataclasses.fields(Rung) if field.name != "config"}
    return figures | {
        "directory": rung.config.run.directory,
        "seed": rung.config.run.seed,
        "num_steps": train.num_steps,
        "global_batch_size": train.global_batch_size,
        "lr": rung.config.optimizer.lr,
        "shape": {name: getattr(shape, name) for name in shown},
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "recompute": train.recompute,
    }


def render_ladder(ladder: Ladder) -> str:
    """The table of the console, and of README.md."""
    head = ("run", "N", "layers", "hidden", "steps", "batch", "lr", "tokens", "FLOPs", "epochs", "TP", "PP")
    rows = [head]
    for rung in ladder.rungs:
        config = rung.config
        rows.append(
            (
                rung.name,
                f"{rung.parameters:,}",
                str(config.model.num_layers),
                str(config.model.hidden_size),
                f"{config.train.num_steps:,}",
                f"{config.train.global_batch_size:,}",
                f"{config.optimizer.lr:.4g}",
                short(rung.tokens),
                f"{rung.flops:.3g}",
                "unknown" if rung.epochs is None else f"{rung.epochs:.3g}",
                str(config.parallel.tensor_model_parallel_size),
                str(config.parallel.pipeline_model_parallel_size),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in ladder.notes)])


def _yaml(rung: Rung, *, directory: Path, command: str) -> str:
    train = f"megatron-polar train {directory}/{rung.name}.yaml"
    return f"# One run of a scaling study, made by\n#   {command}\n# To train it alone:\n#   {train}\n" + dump_config(
        rung.config
    )


def _readme(ladder: Ladder, *, directory: Path, command: str) -> str:
    runs = Path(ladder.rungs[0].config.run.directory).parent
    return f"""# A scaling study of {len(ladder.rungs)} runs

Made by `{command}`. N counts weights without the embedding; tokens and FLOPs are planned, from mean lengths.

```
{render_ladder(ladder)}
```

Train all, from the directory in which that command was given (a run that is stopped goes on with the same command):

```
{_how_to_run(ladder, directory=directory)}
```

Then fit the laws:

```
megatron-polar fit {runs}/n* --output {runs}_fit
```
"""


def _how_to_run(ladder: Ladder, *, directory: Path) -> str:
    cluster = ladder.cluster
    if cluster is None:
        return (
            f"export OMP_NUM_THREADS=2\n"
            f'for config in {directory}/*.yaml; do megatron-polar train "$config" || break; done'
        )
    options = f"--nodes={cluster.num_nodes}"
    if cluster.gpus_per_node != 8:  # what the job scripts ask for
        options += f" --gpus-per-node={cluster.gpus_per_node} --ntasks-per-node={cluster.gpus_per_node}"
    lines = [f'for config in {directory}/*.yaml; do slurm/launch.sh {options} "$config"; done']
    if cluster.num_nodes == 1:
        start = f"python -m torch.distributed.run --nproc-per-node {cluster.gpus_per_node} -m megatron_polar train"
        lines += [
            "# or, on one machine without Slurm:",
            f'for config in {directory}/*.yaml; do {start} "$config" || break; done',
        ]
    return "\n".join(lines)
