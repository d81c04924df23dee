"""Generates docs/data_formats.md from the records and from the docstrings of the code that writes the files.

    python scripts/document_formats.py            # writes docs/data_formats.md
    python scripts/document_formats.py --check    # exits with 1 if the file is out of date (part of `make lint`)

The template is scripts/data_formats.md.j2. It describes the formats that the project reads but does not define.
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
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NewType, Union, get_args, get_origin

import jinja2
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "data_formats.md"
TEMPLATE = Path(__file__).with_name("data_formats.md.j2")
TYPE_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Path: "path",
    dict: "object",
    Any: "any",
}
# Models that are the type of a field → the anchor of the section that describes the model.
MODEL_ANCHORS = {
    "PageId": "page-ids",
    "Candidate": "candidate",
    "ModelAnswer": "modelanswer",
    "Prompt": "prompts",
    "Adaptive": "adaptive",
}


def main(arguments: list[str]) -> int:
    text = render()
    if arguments == ["--check"]:
        if TARGET.read_text(encoding="utf-8") != text:
            print("docs/data_formats.md is out of date: run python scripts/document_formats.py", file=sys.stderr)
            return 1
    elif arguments:
        print(__doc__, file=sys.stderr)
        return 2
    else:
        TARGET.write_text(text, encoding="utf-8")
    return 0


def render() -> str:
    """The text of docs/data_formats.md."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    functions = (record_section, enum_table, dict_table, returns_list, json_example)
    template = environment.get_template(TEMPLATE.name)
    text = template.render({function.__name__: function for function in functions})
    return re.sub(r"\n{3,}", "\n\n", text)


def import_name(dotted_name: str) -> Any:
    """Imports a name of a module."""
    module, _, name = dotted_name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def record_section(dotted_name: str) -> str:
    """The docstring of a pydantic model, with each paragraph on one line, and the table of its fields."""
    docstring = inspect.getdoc(import_name(dotted_name)) or ""
    paragraphs = [" ".join(paragraph.split()) for paragraph in docstring.split("\n\n")]
    return "\n\n".join([*paragraphs, field_table(dotted_name)])


def field_table(dotted_name: str) -> str:
    """A table of the fields of a pydantic model. Raises ValueError for a field without a description."""
    rows = ["| Field | Type | Meaning |", "|---|---|---|"]
    for name, field in import_name(dotted_name).model_fields.items():
        if not field.description:
            raise ValueError(f"{dotted_name}.{name} has no description; add one: Field(description=…)")
        optional = "" if field.is_required() else ", optional"
        rows.append(f"| `{name}` | {type_name(field.annotation)}{optional} | {field.description} |")
    return "\n".join(rows)


def type_name(annotation: Any) -> str:
    """A type in words: `tuple[int, ...]` is "list of integer"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, NewType):
        return "local id" if annotation.__name__ == "LocalId" else type_name(annotation.__supertype__)
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else type_name(part) for part in arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{MODEL_ANCHORS[annotation.__name__]})"
    return TYPE_NAMES[annotation]


def enum_table(dotted_name: str) -> str:
    """A table of an enum's values. The meaning of a value is the string literal after it in the source."""
    enum = import_name(dotted_name)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(enum))).body
    meanings = {
        statement.targets[0].id: following.value.value
        for statement, following in itertools.pairwise(definition.body)  # type: ignore[attr-defined]
        if isinstance(statement, ast.Assign) and isinstance(following, ast.Expr)
    }
    return meaning_table({member.value: meanings[member.name] for member in enum})


def dict_table(dotted_name: str) -> str:
    """A table of a dict from names to meanings."""
    return meaning_table(import_name(dotted_name))


def meaning_table(meanings: Mapping[str, str]) -> str:
    rows = [f"| `{name}` | {' '.join(meaning.split())} |" for name, meaning in meanings.items()]
    return "\n".join(["| Name | Meaning |", "|---|---|", *rows])


def returns_list(dotted_name: str) -> str:
    """The entries after "Returns:" in a function's docstring, as a nested Markdown list.

    An entry is `name, name: text`. Its continuation lines are indented by four more spaces. Entries below an entry
    that ends with a colon are its children.
    """
    block = re.search(r"Returns:\n((?: {4}.*\n?)+)", inspect.getdoc(import_name(dotted_name)) or "")
    if block is None:
        raise ValueError(f"{dotted_name}: the docstring has no list after 'Returns:'")
    entries: list[tuple[int, str]] = []  # (depth, text)
    for line in block[1].splitlines():
        depth, text = (len(line) - len(line.lstrip())) // 4 - 1, line.strip()
        entry = re.match(r"([\w<>, ]+): ?(.*)", text)
        if entry and (not entries or depth <= entries[-1][0] or entries[-1][1].endswith(":")):
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            entries.append((depth, f"{names}: {entry[2]}".rstrip()))
        else:
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {text}")
    return "\n".join(f"{'  ' * depth}- {text}" for depth, text in entries)


def json_example(dotted_name: str, text: str) -> str:
    """A JSON block. Raises pydantic's ValidationError if the text is not a valid record of the model."""
    import_name(dotted_name).model_validate(json.loads(text))
    return f"```json\n{text.strip()}\n```"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
