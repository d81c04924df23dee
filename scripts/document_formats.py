"""Generates docs/data_formats.md from the records, their fields and the docstrings of what writes the files.

    python scripts/document_formats.py            # writes the file
    python scripts/document_formats.py --check    # exits with 1 if the file is not current (`make lint`)

The frame, with the formats that the project reads but does not define, is scripts/data_formats.md.j2.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import re
import sys
import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NewType, Union, get_args, get_origin

import jinja2
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "data_formats.md"
TEMPLATE = Path(__file__).with_name("data_formats.md.j2")
NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Path: "path",
    dict: "object",
    Any: "any",
}
# Records with a section of their own → the anchor of that section.
LINKS = {"PageId": "page-ids", "Candidate": "candidate", "ModelAnswer": "modelanswer", "Prompt": "prompts"}


def main(arguments: list[str]) -> int:
    text = render()
    if arguments == ["--check"]:
        if TARGET.read_text(encoding="utf-8") != text:
            print("docs/data_formats.md is not current: run python scripts/document_formats.py", file=sys.stderr)
            return 1
    elif arguments:
        print(__doc__, file=sys.stderr)
        return 2
    else:
        TARGET.write_text(text, encoding="utf-8")
    return 0


def render() -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    functions = {"record": record, "fields": fields, "members": members, "meanings": meanings}
    text = environment.get_template(TEMPLATE.name).render(**functions, returns=returns, example=example)
    return re.sub(r"\n{3,}", "\n\n", text)


def load(path: str) -> Any:
    """The object with a dotted path: its module, then its name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def record(path: str) -> str:
    """The docstring of a model, and a table of its fields."""
    return f"{prose(inspect.getdoc(load(path)) or '')}\n\n{fields(path)}"


def fields(path: str) -> str:
    """A table of the fields of a pydantic model. Raises ValueError for a field without a description."""
    rows = ["| Field | Type | Meaning |", "|---|---|---|"]
    for name, field in load(path).model_fields.items():
        if not field.description:
            raise ValueError(f"{path}.{name} has no description; give it one: Field(description=…)")
        rows.append(f"| `{name}` | {type_name(field.annotation)}{default(field)} | {field.description} |")
    return "\n".join(rows)


def default(field: FieldInfo) -> str:
    return "" if field.is_required() else ", optional"


def type_name(kind: Any) -> str:
    """A type in words: `tuple[int, ...]` is "list of integer"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, NewType):
        return "local id" if kind.__name__ == "LocalId" else type_name(kind.__supertype__)
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else type_name(part) for part in arguments)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"[{kind.__name__}](#{LINKS[kind.__name__]})"
    return NAMES[kind]


def members(path: str) -> str:
    """A table of an enum's members, with the strings below them as their meanings."""
    kind = load(path)
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    meaning = {
        member.targets[0].id: text.value.value
        for member, text in itertools.pairwise(body)
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr)
    }
    return table({member.value: meaning[member.name] for member in kind})


def meanings(path: str) -> str:
    """A table of a dict of names and their meanings."""
    return table(load(path))


def table(meaning: dict[str, str]) -> str:
    rows = [f"| `{name}` | {' '.join(text.split())} |" for name, text in meaning.items()]
    return "\n".join(["| Name | Meaning |", "|---|---|", *rows])


def returns(path: str) -> str:
    """The block of a function's docstring that ends a line with "Returns:" starts, as nested list."""
    block = re.search(r"Returns:\n((?: {4}.*\n?)+)", inspect.getdoc(load(path)) or "")
    if block is None:
        raise ValueError(f"{path}: the docstring has no list after 'Returns:'")
    items: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        indent, text = (len(line) - len(line.lstrip())) // 4 - 1, line.strip()
        named = re.match(r"([\w<>, ]+): ?(.*)", text)
        if named and (not items or indent <= items[-1][0] or items[-1][1].endswith(":")):
            names = ", ".join(f"`{name}`" for name in named[1].split(", "))
            items.append((indent, f"{names}: {named[2]}".rstrip()))
        else:
            items[-1] = (items[-1][0], f"{items[-1][1]} {text}")
    return "\n".join(f"{'  ' * indent}- {text}" for indent, text in items)


def example(path: str, text: str) -> str:
    """A JSON example. It is validated as the record it shows."""
    load(path).model_validate(json.loads(text))
    return f"```json\n{text.strip()}\n```"


def prose(docstring: str) -> str:
    """A docstring with each paragraph on one line."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in docstring.split("\n\n"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
