"""Imports the prompt of the MM-R5 repository as an option of configs/prompt.

    python scripts/import_prompt.py ../MM-R5 configs/prompt/mm_r5.yaml
    python -m mmr5_train.evaluate prompt=mm_r5 …

The released checkpoint ranks best with the prompt it was trained with. That prompt belongs to its authors, so this
script reads it from the user's own copy of their repository. It looks for what the released `examples/reranker.py`
contains: a constant with "system" in its name; a `str.format` template with the field {Question} and fields for
the number of images; and, in a loop over the images, a text message part with an f-string such as f"Page {i+1}",
followed by an image part. It parses the source, and never imports or runs it.
"""

from __future__ import annotations

import argparse
import ast
import re
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import ValidationError

from mmr5_train.common.files import InputError, atomic_write, validation_message
from mmr5_train.ranking.prompt import Prompt

RERANKER = Path("examples/reranker.py")
"""The file with the inference prompt in the released repository."""

MAX_BYTES = 1_000_000

_QUESTION_FIELDS = {"question", "query"}
_COUNT_FIELD = re.compile(r"n|.*(num|count|total).*", re.IGNORECASE)


def import_prompt(repo: Path, name: str = "mm_r5") -> Prompt:
    """Reads the prompt from a copy of the MM-R5 repository, or from one of its Python files.

    In a folder, it reads `RERANKER` if that file exists, or else all Python files. Raises `InputError` unless it
    finds exactly one prompt.
    """
    if repo.is_file():
        return _read_prompt(repo, name)
    if not repo.is_dir():
        raise InputError(f"{repo}: no such folder; pass the folder of your copy of the MM-R5 repository")
    if (repo / RERANKER).is_file():
        return _read_prompt(repo / RERANKER, name)
    prompts: dict[Prompt, Path] = {}
    for path in sorted(repo.rglob("*.py")):
        if any(part.startswith(".") for part in path.relative_to(repo).parts):
            continue  # skip virtual environments and other hidden folders
        try:
            prompts.setdefault(_read_prompt(path, name), path)
        except InputError:  # most files contain no prompt
            continue
    if len(prompts) == 1:
        return next(iter(prompts))
    if not prompts:
        raise InputError(
            f"{repo}: no {RERANKER}, and no other Python file contains a reranking prompt (a constant with "
            '"system" in its name, a template with {Question}, a message part with "type": "image"); '
            "pass the file that contains it"
        )
    files = ", ".join(str(path) for path in prompts.values())
    raise InputError(
        f"{repo}: expected one reranking prompt, found {len(prompts)} in {files}; pass one of these files"
    )


def write_prompt(prompt: Prompt, path: Path) -> None:
    """Writes a prompt as an option of the config group `prompt`."""
    # Hydra reads "${" as an interpolation, and "\${" as text.
    values = {
        key: value.replace("${", r"\${") if isinstance(value, str) else value
        for key, value in prompt.model_dump().items()
    }
    with atomic_write(path) as stream:
        stream.write(
            "# Imported by scripts/import_prompt.py. The text belongs to the authors of the imported repository.\n"
        )
        yaml.safe_dump(values, stream, sort_keys=False, allow_unicode=True, width=100)


def _read_prompt(path: Path, name: str) -> Prompt:
    tree = _parse(path)
    constants = dict(_string_constants(tree))
    system = _only_name(
        path, {k: v for k, v in constants.items() if "system" in k.lower()}, 'constant with "system" in its name'
    )
    templates = {k: v for k, v in constants.items() if _has_question(v)}
    question = _only_name(path, templates, "string constant with the field {Question}")
    labels = {ast.unparse(node): node for node in _label_nodes(tree)}
    images = [node.lineno for node in _parts(tree, "image")]
    if not images:
        raise InputError(f'{path}: expected a message part with "type": "image", found none')
    if len(labels) > 1:
        raise InputError(f"{path}: expected one f-string as image label, found {', '.join(sorted(labels))}")
    try:
        return Prompt(
            name=name,
            system=constants[system],
            question=_convert_question(path, constants[question]),
            image_label=_convert_label(path, next(iter(labels.values()))) if labels else "",
            images_first=min(images) < _first_use_line(path, tree, question),
        )
    except ValidationError as error:
        raise InputError(f"{path}: {validation_message(error)}") from None


def _parse(path: Path) -> ast.Module:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes, so not a prompt file")
        return ast.parse(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path}: not valid Python ({error})") from None


def _string_constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, value) of every assignment of a string. Joins adjacent strings and strings added with +."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            value = _string_value(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and value is not None:
                    yield target.id, value


def _string_value(node: ast.expr | None) -> str | None:
    """The value of a string literal or of a sum of string literals; None for other expressions."""
    parts = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts.append(node.right)
        node = node.left
    if node is not None:
        parts.append(node)
    values = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return "".join(reversed(values)) if values and len(values) == len(parts) else None


def _only_name(path: Path, constants: dict[str, str], description: str) -> str:
    """The only key of `constants`. Raises `InputError` if there are none or several."""
    if len(constants) != 1:
        raise InputError(f"{path}: expected one {description}, found {', '.join(sorted(constants)) or 'none'}")
    return next(iter(constants))


def _has_question(value: str) -> bool:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(value)]
    except ValueError:
        return False
    return any(field and field.lower() in _QUESTION_FIELDS for field in fields)


def _convert_question(path: Path, template: str) -> str:
    """Renames the fields of a `str.format` template: the question to {query}, and every count to {n}."""
    text = literals = ""
    for literal, field, spec, conversion in string.Formatter().parse(template):
        text += literal
        literals += literal
        if field is None:
            continue
        if field.lower() in _QUESTION_FIELDS and not spec and not conversion:
            text += "{query}"
        elif _COUNT_FIELD.fullmatch(field) and not spec and not conversion:
            text += "{n}"
        else:
            raise InputError(
                f"{path}: the question template has the field {{{field}}}, expected {{Question}} and fields for "
                "the number of images, such as {image_num}"
            )
        literals += " "
    if re.search(r"\{(query|n)\}", literals):
        raise InputError(
            f"{path}: the question template contains {{query}} or {{n}} as text, which can't be imported"
        )
    return text


def _parts(tree: ast.Module, kind: str) -> Iterator[ast.Dict]:
    """The message parts {"type": kind, …}."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            if any(_string_value(key) == "type" and _string_value(value) == kind for key, value in pairs):
                yield node


def _label_nodes(tree: ast.Module) -> Iterator[ast.JoinedStr]:
    for part in _parts(tree, "text"):
        for key, value in zip(part.keys, part.values, strict=True):
            if _string_value(key) == "text" and isinstance(value, ast.JoinedStr):
                yield value


def _convert_label(path: Path, node: ast.JoinedStr) -> str:
    """Converts f"Page {i + 1}: " to "Page {i}: ". Other labels are rejected, since page ids start at 1."""
    text = ""
    for part in node.values:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue) and re.fullmatch(r"\w+ \+ 1", ast.unparse(part.value)):
            text += "{i}"
        else:
            raise InputError(f"{path}, line {node.lineno}: expected an image label such as f'Page {{i + 1}}: '")
    return text


def _first_use_line(path: Path, tree: ast.Module, name: str) -> int:
    """The line number of the first use of a constant, as a name or an attribute."""
    lines = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.Attribute) and node.attr == name)
    ]
    if not lines:
        raise InputError(f"{path}: {name} is never used, so the position of the question is unknown")
    return min(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="a copy of the MM-R5 repository, or one of its Python files")
    parser.add_argument("output", type=Path, help="the option to write: configs/prompt/NAME.yaml")
    args = parser.parse_args(arguments)
    if args.output.suffix != ".yaml":
        raise InputError(f"{args.output}: expected a file name that ends in .yaml")
    if args.output.exists():
        raise InputError(f"{args.output}: already exists; delete it, or choose another name")
    write_prompt(import_prompt(args.repository, name=args.output.stem), args.output)
    print(f"wrote the prompt of {args.repository} to {args.output}; select it with prompt={args.output.stem}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
