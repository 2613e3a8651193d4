"""Files of the publishers where they are at hand, and small ones in their formats."""

import json
from pathlib import Path

import pytest
from conftest import SHARED_DATA


def published(name: str) -> Path:
    """A publisher's own file or folder; the test is skipped where it is not there."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"the publisher's files are not here ({name} beside the repository in shared/data)")
    return path


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
