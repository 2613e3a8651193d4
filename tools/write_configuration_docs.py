"""Write docs/configuration.md from megatron_polar/config/schema.py; with --check only say whether it is up to date."""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCHEMA, OUTPUT = ROOT / "megatron_polar/config/schema.py", ROOT / "docs/configuration.md"
HEAD = """# Configuration

Made from `megatron_polar/config/schema.py` by `tools/write_configuration_docs.py`; do not edit by hand.

A run is one YAML file. `section.key=value` after it on the command line overrides a value. An unknown key is an error
that names the nearest right one. `megatron-polar train CONFIG.yaml --dry-run` checks it and prints the resolved file.
"""


def render() -> str:
    """The whole page: one table for each section of RunConfig, and one for each class in a section."""
    classes = {node.name: node for node in ast.parse(SCHEMA.read_text()).body if isinstance(node, ast.ClassDef)}
    page = HEAD
    for section, (kind, _, _) in fields(classes["RunConfig"]).items():
        page += f"\n## `{section}`\n\n{table(classes[kind])}"
        users: dict[str, list[str]] = {}
        for name, (inner, _, _) in fields(classes[kind]).items():
            if inner.startswith("list of "):
                users.setdefault(inner.removeprefix("list of "), []).append(f"`{section}.{name}`")
        for listed, names in users.items():
            page += f"\nEach `{listed}` in {' and '.join(names)}:\n\n{table(classes[listed])}"
        for name, (inner, _, _) in fields(classes[kind]).items():
            if inner in classes:
                page += f"\n`{section}.{name}`:\n\n{table(classes[inner])}"
    return page


def table(node: ast.ClassDef) -> str:
    """A Markdown table of a class's fields."""
    rows = [f"| `{key}` | {kind} | {default} | {text} |\n" for key, (kind, default, text) in fields(node).items()]
    return "| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)


def fields(node: ast.ClassDef) -> dict[str, tuple[str, str, str]]:
    """Name → type, default, meaning; the meaning is the string that follows the field."""
    found, words = {}, {"None": "null", "()": "none", "True": "`true`", "False": "`false`"}
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            kind = ast.unparse(item.annotation).replace("tuple[", "list of ").replace(", ...]", "")
            kind = kind.removeprefix("Literal[").removesuffix("]").replace("'", "`").replace(" | None", " or null")
            kind = kind.replace("True", "`true`").replace("False", "`false`")
            value = "required" if item.value is None else ast.unparse(item.value).replace("'", "")
            default = value if item.value is None else words.get(value, f"`{value}`")
            default = "below" if value.startswith("field(") else default
            found[item.target.id] = kind, default, " ".join(text.split()).replace("|", "\\|")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    if not parser.parse_args().check:
        OUTPUT.write_text(render(), encoding="utf-8")
    elif not OUTPUT.is_file() or OUTPUT.read_text(encoding="utf-8") != render():
        sys.exit(f"{OUTPUT.relative_to(ROOT)} is out of date; run python tools/write_configuration_docs.py")
