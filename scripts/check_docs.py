"""Checks that the documents are true. Prints a line for each mistake, and exits with 1 if there is one.

    python scripts/check_docs.py [FILE…]     # default: README.md, CONTRIBUTING.md, docs/*.md, and the files below

It is part of `make test`. What is checked:

- A command, in a bash block or in backticks: a stage's config is composed with the overrides; `make` targets,
  scripts, their flags and environment variables, and pip extras exist.
- A Python block: it compiles, its imports of the project resolve, and calls fit the signatures. A block marked
  `python run` is run.
- A relative link: its file and anchor exist. In backticks: repository paths, modules and group options exist.

The commands in the docstrings of modules and scripts, and in the comments of configs, are checked too.
A YAML block that starts with a comment `# DIR/GROUP/OPTION.yaml` is a file for commands with `--config-dir DIR`.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import html
import importlib
import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from markdown_it import MarkdownIt
from markdown_it.token import Token

from mmr5_train.common.cli import MODULES
from mmr5_train.common.config import CONFIGS, USER_CONFIGS, compose_stage
from mmr5_train.common.files import InputError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mmr5_train", "data_construction")
# Programs that documents may use, and that are not checked any further.
OTHERS = ("curl", "export", "cd", "git", "pip", "trl", "source", ".", "sbatch", "python3", "trec_eval")
TRAINERS = {"sft": "SFTConfig", "grpo": "GRPOConfig"}
_ASSIGNMENT = re.compile(r"([A-Z_][A-Z0-9_]*)=")
_COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:python -m (?:mmr5_train|data_construction)\.|python scripts/|mmr5 |make |scripts/\S+\.sh)")  # fmt: skip  # noqa: E501


class Mistake(Exception):
    """Something that a document says and that is not so."""


def main(arguments: list[str]) -> int:
    paths = [Path(argument) for argument in arguments] or documents()
    mistakes = [mistake for path in paths for mistake in check(path)]
    for mistake in mistakes:
        print(mistake)
    print(f"{len(paths)} documents, {len(mistakes)} mistakes", file=sys.stderr)
    return 1 if mistakes else 0


def documents() -> list[Path]:
    """The files with commands in them."""
    code = [path for folder in (*PACKAGES, "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [*texts, *code, *sorted((ROOT / "configs").rglob("*.yaml"))]


def check(path: Path) -> list[str]:
    """The mistakes of a file, each as `FILE:LINE: message`."""
    mistakes: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        parts = document_tests(path, Path(scratch)) if path.suffix == ".md" else example_tests(path, Path(scratch))
        for line, test in parts:
            try:
                test()
            except Mistake as mistake:
                shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
                mistakes.append(f"{shown}:{line}: {mistake}")
    return mistakes


def document_tests(path: Path, scratch: Path) -> Iterator[tuple[int, Any]]:
    """(line, function that raises `Mistake`) of each check of a Markdown document."""
    line = 1
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else line
        for found, test in tests(token, path, scratch):
            yield line + found, test


def example_tests(path: Path, scratch: Path) -> Iterator[tuple[int, Any]]:
    """The same of the commands in a module's docstring, or in the comments of a config."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        block, mark = ast.get_docstring(ast.parse(text), clean=False) or "", "    "
    else:
        block, mark = text, "# "
    lines = block.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(mark) and (
            _COMMAND.match(line[len(mark) :]) or line[len(mark) :].startswith("accelerate ")
        ):
            joined = line[len(mark) :]
            for more in lines[number + 1 :]:
                if not joined.endswith("\\"):
                    break
                joined = joined.rstrip("\\") + more.removeprefix(mark)
            for _, command in commands(joined):
                yield number + 1, lambda command=command: check_command(command, scratch)


def tests(token: Token, path: Path, scratch: Path) -> Iterator[tuple[int, Any]]:
    """What to check of a token: lines below its first line, and a function that raises `Mistake`."""
    if token.type == "fence":
        language, _, mark = token.info.partition(" ")
        if language == "bash":
            for found, command in commands(token.content):
                yield found, lambda command=command: check_command(command, scratch)
        elif language == "python":
            yield 1, lambda: check_python(token.content, run=mark == "run")
        elif language == "yaml":
            write_option(token.content, scratch)
    for child in token.children or ():
        if child.type == "code_inline":
            yield 0, lambda text=child.content: check_inline(text, scratch)
        elif child.type in ("link_open", "image"):
            target = str(child.attrs.get("href") or child.attrs.get("src"))
            yield 0, lambda target=target: check_link(target, path)


# Commands.


def commands(block: str) -> Iterator[tuple[int, list[str]]]:
    """(line below the fence, words) of each command of a bash block."""
    joined, start = "", 0
    block = re.sub(r"<<'?(\w+)'?\n.*?\n\1$", "", block, flags=re.DOTALL | re.MULTILINE)  # without here-documents
    for number, line in enumerate(block.splitlines(), 1):
        start = start or number
        joined += line.removesuffix("\\") if line.endswith("\\") else line
        if line.endswith("\\"):
            continue
        lexer = shlex.shlex(joined, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if set(word) <= set("&|;"):
                if words:
                    yield start, words
                words = []
            else:
                words.append(word)
        joined, start = "", 0


def check_command(words: Sequence[str], scratch: Path) -> None:
    """Raises `Mistake` for a command that the project does not have."""
    given = [match[1] for word in words if (match := _ASSIGNMENT.match(word))]
    variables = given[: next((i for i, word in enumerate(words) if not _ASSIGNMENT.match(word)), len(words))]
    program, *rest = words[len(variables) :] or ["export"]
    if program == "accelerate" and "-m" in rest:
        check_module(rest[rest.index("-m") + 1], rest[rest.index("-m") + 2 :], scratch)
    elif program == "python" and rest[:1] == ["-m"]:
        check_module(rest[1], rest[2:], scratch)
    elif program == "mmr5":
        check_console_command(rest, scratch)
    elif program == "make":
        check_make([word for word in rest if "=" not in word])
    elif program == "python" and rest and rest[0].endswith(".py"):
        check_script(rest[0], rest[1:], variables)
    elif program.startswith("scripts/"):
        check_script(program, rest, variables)
    elif program not in OTHERS:
        raise Mistake(f"no such program: {program}")
    if program == "sbatch":
        script = next(i for i, word in enumerate(rest) if not word.startswith("-"))
        check_script(rest[script], [], variables)
        check_module(rest[script + 1], rest[script + 2 :], scratch)
    if "pip" in (program, *rest[:2]):
        check_extras(rest)


def check_console_command(words: list[str], scratch: Path) -> None:
    command, *overrides = words
    if command not in ("--help", "--version", "--configs", "NAME"):
        if command not in MODULES:
            raise Mistake(f"mmr5 has no command {command}")
        check_module(MODULES[command], overrides, scratch)


def check_module(module: str, overrides: list[str], scratch: Path) -> None:
    """Composes the config of a stage with the overrides, as the stage does before it runs."""
    if module.partition(".")[0] not in PACKAGES or module.endswith(".NAME"):
        return
    if (found := stage(module)) is None:
        return
    model, entry = found
    with user_options(overrides, scratch) as rest:
        given = [
            word.replace("…", "x")
            for word in rest
            if word not in ("…", "--help", "-m") and not chooses_ignored(word)
        ]
        if "-m" in rest:
            given = first_job(given)
        if any("=" not in word for word in given):
            raise Mistake(f"{module}: not an override: {next(word for word in given if '=' not in word)}")
        try:
            config = compose_stage(model, entry, given)
        except InputError as error:
            if not re.search(r"no such file|no such folder|is no folder|no value for", str(error)):
                raise Mistake(f"{module}: {error}") from None
        else:
            check_trainer(entry, config)


def first_job(overrides: list[str]) -> list[str]:
    """The overrides of the first job of a sweep."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [
        f"{one.get_key_element()}={next(one.sweep_string_iterator())}"
        if one.is_sweep_override()
        else str(one.input_line)
        for one in parsed
    ]


def check_trainer(entry: str, config: Any) -> None:
    if entry in TRAINERS:
        known = {
            field.name for field in dataclasses.fields(getattr(importlib.import_module("trl"), TRAINERS[entry]))
        }
        for name in config.trainer:
            if name not in known:
                raise Mistake(f"trainer.{name}: trl.{TRAINERS[entry]} has no such field")


@contextmanager
def user_options(words: list[str], scratch: Path) -> Iterator[list[str]]:
    """The words without `--config-dir DIR`; inside, DIR is the folder with the document's YAML blocks."""
    if "--config-dir" not in words:
        yield words
        return
    at = words.index("--config-dir")
    folder = scratch / words[at + 1]
    if not folder.is_dir():
        raise Mistake(f"--config-dir {words[at + 1]}: no YAML block above says what is in it")
    os.environ[USER_CONFIGS] = str(folder)
    try:
        yield words[:at] + words[at + 2 :]
    finally:
        del os.environ[USER_CONFIGS]


def write_option(block: str, scratch: Path) -> None:
    if named := re.match(r"# (\S+\.yaml)\n", block):
        path = scratch / named[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block, encoding="utf-8")


@cache
def stage(module: str) -> tuple[Any, str] | None:
    """The config model and the entry config of a stage, from its `run_stage(main, MODEL, ENTRY)`.

    None for a module that can be run but is no stage.
    """
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError:
        raise Mistake(f"no such module: {module}") from None
    for node in ast.walk(ast.parse(inspect.getsource(loaded))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run_stage":
            _, model, entry = node.args
            return getattr(loaded, ast.unparse(model)), ast.literal_eval(entry)
    if '__name__ == "__main__"' in inspect.getsource(loaded):
        return None
    raise Mistake(f"{module} is not a command")


def check_make(targets: list[str]) -> None:
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in targets:
        if target not in known:
            raise Mistake(f"make has no target {target}")


def check_script(name: str, words: list[str], variables: list[str]) -> None:
    path = ROOT / name
    if not path.is_file():
        raise Mistake(f"no such file: {name}")
    source = path.read_text(encoding="utf-8")
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag != "--" and not re.search(rf"{flag}(?![\w-])", source):
            raise Mistake(f"{name} has no option {flag}")
    for variable in variables:
        if (
            name.endswith(".sh")
            and not re.search(rf"\b{variable}\b", source)
            and variable not in ("OPENAI_API_KEY", "OPENAI_BASE_URL")
        ):
            raise Mistake(f"{name} reads no variable {variable}")


def check_extras(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        if word.startswith(project["name"]):
            raise Mistake(f"{word} is on no package index; install from the checkout or a wheel")
        for extra in re.findall(r"^\.\[([\w,]+)\]$", word):
            if unknown := set(extra.split(",")) - set(project["optional-dependencies"]):
                raise Mistake(f"no such extra: {unknown.pop()}")


# Python.


def check_python(block: str, run: bool) -> None:
    """Raises `Mistake` for a block that does not compile or does not fit the project's names and signatures."""
    try:
        tree = ast.parse(block)
    except SyntaxError as error:
        raise Mistake(f"not Python: {error}") from None
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            names |= {alias.asname or alias.name: resolve(f"{node.module}.{alias.name}") for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made = names.get(ast.unparse(node.value.func))
            if inspect.isclass(made):
                names |= {ast.unparse(target): made for target in node.targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            check_call(node, names)
    if run:
        with tempfile.TemporaryDirectory() as folder:
            ended = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True)
        if ended.returncode:
            raise Mistake(f"the block fails: {ended.stderr.strip().splitlines()[-1]}")


def check_call(call: ast.Call, names: dict[str, Any]) -> None:
    """Raises `Mistake` for arguments that a function of the project, or a method of its classes, does not take."""
    arguments: list[Any] = list(call.args)
    if isinstance(call.func, ast.Name) and call.func.id in names:
        called = names[call.func.id]
    elif isinstance(call.func, ast.Attribute) and inspect.isclass(names.get(ast.unparse(call.func.value))):
        owner = names[ast.unparse(call.func.value)]
        called = getattr(owner, call.func.attr, None)
        if called is None:
            raise Mistake(f"{owner.__name__} has no attribute {call.func.attr}")
        arguments = [None, *arguments]
    else:
        return
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    if any(isinstance(argument, ast.Starred) for argument in call.args) or len(keywords) < len(call.keywords):
        return
    try:
        inspect.signature(called).bind(*arguments, **keywords)
    except TypeError as error:
        raise Mistake(f"{ast.unparse(call.func)}: {error}") from None


def resolve(dotted: str) -> Any:
    """The object or module with a dotted name. Raises `Mistake` if there is none."""
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        try:
            for name in parts[size:]:
                found = getattr(found, name)
        except AttributeError:
            break
        return found
    raise Mistake(f"no such name: {dotted}")


# Backticks and links.


def check_inline(text: str, scratch: Path) -> None:
    if _COMMAND.match(text):
        for _, command in commands(text.replace("…", " … ")):
            check_command(command, scratch)
        return
    for word in text.split():
        group, is_option, option = word.partition("=")
        choices = (
            {path.stem for path in (CONFIGS / group).glob("*.yaml")} if re.fullmatch(r"[a-z]+", group) else set()
        )
        if is_option and choices and re.fullmatch(r"\w+|\[[\w,]+\]", option):
            for name in re.findall(r"\w+", option):
                if name not in choices | {"null", "mine"} and not chooses_ignored(f"{group}={name}"):
                    raise Mistake(f"{word}: no such option (choices: {', '.join(sorted(choices))})")
    if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", text):
        resolve(text)
    elif re.fullmatch(r"(mmr5_train|data_construction|configs|scripts|tests|docs)/[\w./*-]*", text):
        if not list(ROOT.glob(text.rstrip("/"))) and text not in ignored():
            raise Mistake(f"no such path: {text}")
    elif re.fullmatch(r"\w+\.(py|sh)", text) and not any(path.rsplit("/", 1)[-1] == text for path in files()):
        raise Mistake(f"no such file anywhere: {text}")


@cache
def files() -> list[str]:
    return [
        path.relative_to(ROOT).as_posix()
        for folder in (*PACKAGES, "configs", "scripts", "tests", "docs")
        for path in (ROOT / folder).rglob("*")
    ]


def chooses_ignored(override: str) -> bool:
    """Whether an override chooses an option that a user makes, such as the imported prompt."""
    return f"configs/{override.replace('=', '/')}.yaml" in ignored()


def ignored() -> list[str]:
    """Files that a user makes."""
    return (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def check_link(target: str, path: Path) -> None:
    if re.match(r"[a-z]+:", target):
        return
    name, _, anchor = target.partition("#")
    file = path.parent / name if name else path
    if not file.exists():
        raise Mistake(f"dead link: no such file as {name}")
    if anchor and anchor not in anchors(file):
        near = fnmatch.filter(anchors(file), f"{anchor[:4]}*")
        raise Mistake(f"dead link: {name or path.name} has no heading for #{anchor} (similar: {', '.join(near)})")


def anchors(path: Path) -> list[str]:
    """The anchors that GitHub gives the headings of a document."""
    tokens = MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8"))
    found: list[str] = []
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            slug = re.sub(r"[^\w\- ]", "", html.unescape(text).lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
