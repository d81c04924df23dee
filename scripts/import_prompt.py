"""Makes a `Prompt` of the words in a user's own copy of the MM-R5 repository.

    python scripts/import_prompt.py ../MM-R5 configs/prompt/mm_r5.yaml
    python -m mmr5_train.evaluate prompt=mm_r5 …

The released checkpoint ranks best with the words it was trained on, and those belong to its authors. The
released `examples/reranker.py` holds a constant with "system" in its name, a `str.format` template with the
field {Question} and fields for the number of images, and, in a loop over the images, a message part with an
f-string label such as f"Page {i+1}" followed by an image part. This is what is looked for. The source is
parsed, never imported or run.
"""

from __future__ import annotations

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
"""Where the released repository keeps its inference prompt."""

MAX_BYTES = 1_000_000

_QUESTION_FIELDS = {"question", "query"}
_COUNT_FIELD = re.compile(r"n|.*(num|count|total).*", re.IGNORECASE)


def import_prompt(repo: Path, name: str = "mm_r5") -> Prompt:
    """The prompt of a copy of the MM-R5 repository, or of one Python file of it.

    In a folder, `RERANKER` is read where it exists; else all Python files are, and exactly one prompt must
    come out. Raises `InputError` where none or several do, naming what is missing.
    """
    if repo.is_file():
        return _prompt_of(repo, name)
    if not repo.is_dir():
        raise InputError(f"{repo}: no such folder; give the folder of a copy of the MM-R5 repository")
    if (repo / RERANKER).is_file():
        return _prompt_of(repo / RERANKER, name)
    found: dict[Prompt, Path] = {}
    for path in sorted(repo.rglob("*.py")):
        if any(part.startswith(".") for part in path.relative_to(repo).parts):
            continue  # a virtual environment, not the repository
        try:
            found.setdefault(_prompt_of(path, name), path)
        except InputError:  # most files of a repository hold no prompt
            continue
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise InputError(
            f"{repo}: no {RERANKER}, and no other Python file there holds a reranking prompt (a constant with "
            '"system" in its name, a template with {Question}, a message part with "type": "image"); '
            "give the file that does"
        )
    files = ", ".join(str(path) for path in found.values())
    raise InputError(
        f"{repo}: holds {len(found)} different reranking prompts, in {files}; give one of these files"
    )


def write_prompt(prompt: Prompt, path: Path) -> None:
    """Writes a prompt as an option of the config group `prompt`."""
    # "${" would be an interpolation to Hydra; "\${" is the text.
    values = {
        key: value.replace("${", r"\${") if isinstance(value, str) else value
        for key, value in prompt.model_dump().items()
    }
    with atomic_write(path) as stream:
        stream.write("# Imported by scripts/import_prompt.py; the words are not this project's.\n")
        yaml.safe_dump(values, stream, sort_keys=False, allow_unicode=True, width=100)


def _prompt_of(path: Path, name: str) -> Prompt:
    tree = _parse(path)
    constants = dict(_string_constants(tree))
    system = _only(
        path, {k: v for k, v in constants.items() if "system" in k.lower()}, 'constant with "system" in its name'
    )
    templates = {k: v for k, v in constants.items() if _has_question(v)}
    question = _only(path, templates, "string constant with the field {Question}")
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
            question=_question(path, constants[question]),
            image_label=_label(path, next(iter(labels.values()))) if labels else "",
            images_first=min(images) < _first_use(path, tree, question),
        )
    except ValidationError as error:
        raise InputError(f"{path}: {validation_message(error)}") from None


def _parse(path: Path) -> ast.Module:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes, which no prompt file is")
        return ast.parse(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path}: not valid Python ({error})") from None


def _string_constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, value) of every assignment of a string, adjacent and added strings joined."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            value = _text(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and value is not None:
                    yield target.id, value


def _text(node: ast.expr | None) -> str | None:
    """The value of a string, or of strings added up; None for any other expression."""
    parts = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts.append(node.right)
        node = node.left
    if node is not None:
        parts.append(node)
    values = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return "".join(reversed(values)) if values and len(values) == len(parts) else None


def _only(path: Path, found: dict[str, str], what: str) -> str:
    if len(found) != 1:
        raise InputError(f"{path}: expected one {what}, found {', '.join(sorted(found)) or 'none'}")
    return next(iter(found))


def _has_question(value: str) -> bool:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(value)]
    except ValueError:
        return False
    return any(field and field.lower() in _QUESTION_FIELDS for field in fields)


def _question(path: Path, template: str) -> str:
    """A `str.format` template with this project's field names: {query}, and {n} for every count."""
    text = bare = ""
    for literal, field, spec, conversion in string.Formatter().parse(template):
        text += literal
        bare += literal
        if field is None:
            continue
        if field.lower() in _QUESTION_FIELDS and not spec and not conversion:
            text += "{query}"
        elif _COUNT_FIELD.fullmatch(field) and not spec and not conversion:
            text += "{n}"
        else:
            raise InputError(
                f"{path}: the question template has the field {{{field}}}, expected {{Question}} and numbers of "
                "images, such as {image_num}"
            )
        bare += " "
    if re.search(r"\{(query|n)\}", bare):
        raise InputError(f"{path}: the question template shows braces that would be filled, {{query}} or {{n}}")
    return text


def _parts(tree: ast.Module, kind: str) -> Iterator[ast.Dict]:
    """The message parts {"type": kind, …}."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            if any(_text(key) == "type" and _text(value) == kind for key, value in pairs):
                yield node


def _label_nodes(tree: ast.Module) -> Iterator[ast.JoinedStr]:
    for part in _parts(tree, "text"):
        for key, value in zip(part.keys, part.values, strict=True):
            if _text(key) == "text" and isinstance(value, ast.JoinedStr):
                yield value


def _label(path: Path, node: ast.JoinedStr) -> str:
    """f"Page {i + 1}: " as "Page {i}: ". Only ids from 1 can be what the checkpoint learned."""
    text = ""
    for part in node.values:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue) and re.fullmatch(r"\w+ \+ 1", ast.unparse(part.value)):
            text += "{i}"
        else:
            raise InputError(f"{path}, line {node.lineno}: expected an image label such as f'Page {{i + 1}}: '")
    return text


def _first_use(path: Path, tree: ast.Module, name: str) -> int:
    """The first line that reads a constant, as a name or an attribute."""
    lines = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.Attribute) and node.attr == name)
    ]
    if not lines:
        raise InputError(f"{path}: {name} is never used, so the place of the question is unknown")
    return min(lines)


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise InputError("two arguments are needed: REPOSITORY configs/prompt/NAME.yaml")
    repo, out = Path(arguments[0]), Path(arguments[1])
    if out.suffix != ".yaml":
        raise InputError(f"{out}: the output must end in .yaml, or no config can choose it")
    if out.exists():
        raise InputError(f"{out}: exists already; remove it or give another name")
    write_prompt(import_prompt(repo, name=out.stem), out)
    print(f"wrote the prompt of {repo} to {out}; choose it with prompt={out.stem}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
