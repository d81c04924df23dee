"""Checks of shell commands: programs, make targets, scripts with their flags and variables, and pip extras."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from document_checks.overrides import check_stage_command
from document_checks.project import ROOT, DocumentError
from mmr5_train.common.cli import MODULES

# Documents may use these programs. Their arguments are not checked, except those of pip and sbatch.
EXTERNAL_PROGRAMS = (
    "curl",
    "docker",
    "export",
    "cd",
    "git",
    "pip",
    "trl",
    "source",
    ".",
    "sbatch",
    "python3",
    "trec_eval",
)
# A script passes these variables on to the stages, so its source does not mention them.
STAGE_VARIABLES = ("OPENAI_API_KEY", "OPENAI_BASE_URL")
_ASSIGNMENT = re.compile("[A-Z_][A-Z0-9_]*=")
_PROJECT_COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:python -m (?:mmr5_train|data_construction)\.|python scripts/|mmr5 |make |scripts/\S+\.sh)"
)


def is_project_command(text: str) -> bool:
    """Whether a text begins like a command of the project, possibly after environment variables."""
    return _PROJECT_COMMAND.match(text) is not None


def split_commands(block: str) -> Iterator[tuple[int, list[str]]]:
    """The commands of a bash block, each with its line number in the block (from 1) and its words.

    Joins continued lines, splits at `&&`, `|` and `;`, and ignores comments and here-documents.
    """
    block = re.sub(r"<<'?(\w+)'?\n.*?\n\1$", "", block, flags=re.DOTALL | re.MULTILINE)
    joined, first_line = "", 0
    for number, line in enumerate(block.splitlines(), 1):
        first_line = first_line or number
        joined += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        lexer = shlex.shlex(joined, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        for is_separator, words in itertools.groupby(lexer, lambda word: set(word) <= set("&|;")):
            if not is_separator:
                yield first_line, list(words)
        joined, first_line = "", 0


def check_command(words: Sequence[str], config_root: Path) -> None:
    """Checks one command. `config_root` holds the YAML blocks of the document, for `--config-dir DIR`.

    Raises:
        DocumentError: if the program, a target, a flag, a variable, a config field or an option does not exist.
    """
    variables = [word.partition("=")[0] for word in itertools.takewhile(_ASSIGNMENT.match, words)]
    program, *arguments = words[len(variables) :] or ["export"]
    if program == "accelerate" and "-m" in arguments:
        start = arguments.index("-m") + 1
        check_stage_command(arguments[start], arguments[start + 1 :], config_root)
    elif program == "python" and arguments[:1] == ["-m"]:
        check_stage_command(arguments[1], arguments[2:], config_root)
    elif program == "mmr5":
        check_console_command(arguments, config_root)
    elif program == "make":
        check_make_targets([word for word in arguments if "=" not in word])
    elif program == "python" and arguments and arguments[0].endswith(".py"):
        check_script(arguments[0], arguments[1:], variables)
    elif program.startswith("scripts/"):
        check_script(program, arguments, variables)
    elif program not in EXTERNAL_PROGRAMS:
        raise DocumentError(f"unknown program: {program}")
    if program == "sbatch":
        check_slurm_job(arguments, variables, config_root)
    if "pip" in (program, *arguments[:2]):
        check_pip_requirements(arguments)


def check_console_command(words: Sequence[str], config_root: Path) -> None:
    """Checks the words after `mmr5`. NAME is the placeholder that documents use for a command."""
    command, *overrides = words
    if command in ("--help", "--version", "--configs", "NAME"):
        return
    if command not in MODULES:
        raise DocumentError(f"mmr5 has no command {command}")
    check_stage_command(MODULES[command], overrides, config_root)


def check_make_targets(targets: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known_targets = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
    for target in targets:
        if target not in known_targets:
            raise DocumentError(f"make has no target {target}")


def check_script(name: str, arguments: Sequence[str], variables: Sequence[str]) -> None:
    """Checks that a script exists, and that its source mentions the flags and, in bash, the variables."""
    path = ROOT / name
    if not path.is_file():
        raise DocumentError(f"no such file: {name}")
    source = path.read_text(encoding="utf-8")
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag != "--" and not re.search(rf"{flag}(?![\w-])", source):
            raise DocumentError(f"{name} has no option {flag}")
    if path.suffix == ".sh":
        for variable in variables:
            if variable not in STAGE_VARIABLES and not re.search(rf"\b{variable}\b", source):
                raise DocumentError(f"{name} reads no variable {variable}")


def check_slurm_job(arguments: Sequence[str], variables: Sequence[str], config_root: Path) -> None:
    """Checks `sbatch [FLAG…] SCRIPT MODULE [OVERRIDE…]`."""
    script, module, *overrides = itertools.dropwhile(lambda word: word.startswith("-"), arguments)
    check_script(script, [], variables)
    check_stage_command(module, overrides, config_root)


def check_pip_requirements(arguments: Sequence[str]) -> None:
    """Checks that the extras exist, and that the project is not installed by name: no index has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for argument in arguments:
        if argument.startswith(project["name"]):
            raise DocumentError(f"{argument} is on no package index; install from the checkout or a wheel")
        for extras in re.findall(r"^\.\[([\w,]+)\]$", argument):
            if unknown := set(extras.split(",")) - set(project["optional-dependencies"]):
                raise DocumentError(f"no such extra: {unknown.pop()}")
