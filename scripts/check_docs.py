"""Checks the commands, code and links in the documents. Prints one line per problem: FILE:LINE: message.

    python scripts/check_docs.py [FILE…]     # default: README.md, CONTRIBUTING.md, docs/*.md, and the files below

Exits with 1 if there is a problem. `make test` runs the same checks:

- Commands, in bash blocks and between backticks: the config of a stage is composed with the overrides; `make`
  targets, scripts with their flags and environment variables, and pip extras exist.
- Python blocks: they compile, their imports from the project exist, and their calls fit the signatures. A block
  marked `python run` is run.
- Relative links: the file and the heading exist.
- Text between backticks: repository paths, dotted names and config options exist.

The script also checks the commands in the docstrings of modules and scripts, and in the comments of configs.
Commands may use `--config-dir DIR` if a YAML block above them begins with `# DIR/GROUP/OPTION.yaml`.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from document_checks.commands import check_command, is_project_command, split_commands
from document_checks.links import check_code_span, check_link
from document_checks.overrides import write_config_block
from document_checks.project import PACKAGES, ROOT, DocumentError
from document_checks.python_blocks import check_python_block
from markdown_it import MarkdownIt
from markdown_it.token import Token

# A line number and a check of what is there. The check raises `DocumentError`.
Check = tuple[int, Callable[[], None]]


def main(arguments: list[str]) -> int:
    paths = [Path(argument) for argument in arguments] or default_files()
    problems = [problem for path in paths for problem in check_file(path)]
    for problem in problems:
        print(problem)
    print(f"files: {len(paths)}, problems: {len(problems)}", file=sys.stderr)
    return 1 if problems else 0


def default_files() -> list[Path]:
    """The documents, the Python files of the packages and scripts, and the configs."""
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    code = [path for folder in (*PACKAGES, "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*documents, *code, *sorted((ROOT / "configs").rglob("*.yaml"))]


def check_file(path: Path) -> list[str]:
    """Runs the checks of a Markdown, Python or YAML file. Returns the problems, each as `FILE:LINE: message`."""
    problems: list[str] = []
    find_checks = checks_of_document if path.suffix == ".md" else checks_of_examples
    with tempfile.TemporaryDirectory() as config_root:
        for line, run_check in find_checks(path, Path(config_root)):
            try:
                run_check()
            except DocumentError as error:
                name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
                problems.append(f"{name}:{line}: {error}")
    return problems


def checks_of_document(path: Path, config_root: Path) -> Iterator[Check]:
    """The checks of a Markdown document. Writes its YAML blocks to `config_root`, for the commands after them."""
    line = 1
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else line
        if token.type == "fence":
            yield from checks_of_block(token, line, config_root)
        for child in token.children or ():
            if child.type == "code_inline":
                yield line, partial(check_code_span, child.content, config_root)
            elif child.type in ("link_open", "image"):
                target = str(child.attrs.get("href") or child.attrs.get("src"))
                yield line, partial(check_link, target, path)


def checks_of_block(token: Token, line: int, config_root: Path) -> Iterator[Check]:
    """The checks of a fenced block. `line` is the line of its opening fence."""
    language, _, mark = token.info.partition(" ")
    if language == "bash":
        for line_in_block, words in split_commands(token.content):
            yield line + line_in_block, partial(check_command, words, config_root)
    elif language == "python":
        yield line + 1, partial(check_python_block, token.content, run=mark == "run")
    elif language == "yaml":
        write_config_block(token.content, config_root)


def checks_of_examples(path: Path, config_root: Path) -> Iterator[Check]:
    """The checks of the commands in a module's docstring (indented), or in the comments of a config."""
    text = path.read_text(encoding="utf-8")
    prefix = "# "
    if path.suffix == ".py":
        text, prefix = ast.get_docstring(ast.parse(text), clean=False) or "", "    "
    lines = text.splitlines()
    for index, line in enumerate(lines):
        command = line.removeprefix(prefix)
        if not line.startswith(prefix) or not (is_project_command(command) or command.startswith("accelerate ")):
            continue
        continuations = iter(lines[index + 1 :])
        while command.endswith("\\"):
            command = command.rstrip("\\") + next(continuations, "").removeprefix(prefix)
        for _, words in split_commands(command):
            yield index + 1, partial(check_command, words, config_root)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
