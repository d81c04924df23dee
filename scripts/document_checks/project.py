"""The project that the documents describe: its folders, its Python names, and the files that users add."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmr5_train", "data_construction")


class DocumentError(Exception):
    """A document is wrong about the project. The message names the word in the document."""


def in_project(module: str) -> bool:
    """Whether a dotted name begins with one of the project's packages."""
    return module.partition(".")[0] in PACKAGES


def import_name(dotted_name: str) -> Any:
    """Imports a module, or a name in a module. Raises `DocumentError` if it does not exist."""
    parts = dotted_name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        try:
            for name in parts[size:]:
                value = getattr(value, name)
        except AttributeError:
            break
        return value
    raise DocumentError(f"no such name: {dotted_name}")


@cache
def ignored_paths() -> list[str]:
    """The entries of .gitignore. Documents may mention these paths, which only exist after a user creates them."""
    return (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def selects_ignored_option(override: str) -> bool:
    """Whether an override such as prompt=mm_r5 selects a config that git ignores, because a user imports it."""
    return f"configs/{override.replace('=', '/')}.yaml" in ignored_paths()


@cache
def file_names() -> set[str]:
    """The names of all files and folders in the repository, without their paths."""
    folders = (*PACKAGES, "configs", "scripts", "tests", "docs")
    return {path.name for folder in folders for path in (ROOT / folder).rglob("*")}
