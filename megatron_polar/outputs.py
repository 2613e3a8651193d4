"""Whether a command can write where it is told to: asked before the work, not after it."""

import os
from pathlib import Path

from megatron_polar.errors import UserError


def check_output_directory(path: Path, *, name: str = "--output") -> None:
    """Raise UserError where `path` is no directory and none can be made there; `name` is what the user calls it."""
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path}: is {_kind(path)}, and {name} is a directory to write into; choose another one")
    _check_ancestors(path, name=name)


def check_output_file(path: Path, *, name: str = "--output") -> None:
    """Raise UserError where no file can be written at `path`; what is there may be replaced if it is a file, too."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path}: is {_kind(path)}, and {name} is a file to write; give a file's name")
    _check_ancestors(path.parent, name=name)


def _check_ancestors(path: Path, *, name: str) -> None:
    """Directories are made as far as they are missing, below the last one that is there."""
    path = Path(os.path.abspath(path))
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise UserError(f"{nearest}: is {_kind(nearest)}, so nothing can be written below it; choose another {name}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{nearest}: cannot be written to; choose another {name}")


def _kind(path: Path) -> str:
    if not path.exists():
        return "a link to nothing"
    return "a directory" if path.is_dir() else "a file" if path.is_file() else "a device, a pipe or a socket"
