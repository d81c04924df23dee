"""Checks of links and code spans: files, headings, repository paths, dotted names and config options exist."""

from __future__ import annotations

import fnmatch
import html
import itertools
import re
from pathlib import Path

from markdown_it import MarkdownIt

from document_checks.commands import check_command, is_project_command, split_commands
from document_checks.project import (
    PACKAGES,
    ROOT,
    DocumentError,
    file_names,
    ignored_paths,
    import_name,
    selects_ignored_option,
)
from mmr5_train.common.config import CONFIGS


def check_link(target: str, document: Path) -> None:
    """Checks a relative link: its file exists, and so does the heading after `#`. Ignores web addresses."""
    if re.match(r"[a-z]+:", target):
        return
    name, _, anchor = target.partition("#")
    path = document.parent / name if name else document
    if not path.exists():
        raise DocumentError(f"dead link: no such file: {name}")
    if anchor and anchor not in (anchors := heading_anchors(path)):
        similar = ", ".join(fnmatch.filter(anchors, f"{anchor[:4]}*"))
        raise DocumentError(f"dead link: {name or path.name} has no heading for #{anchor} (similar: {similar})")


def heading_anchors(path: Path) -> list[str]:
    """The anchors of a document's headings, as GitHub derives them."""
    tokens = MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8"))
    anchors: list[str] = []
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            anchor = re.sub(r"[^\w\- ]", "", html.unescape(text).lower()).replace(" ", "-")
            anchors.append(f"{anchor}-{anchors.count(anchor)}" if anchor in anchors else anchor)
    return anchors


def check_code_span(text: str, config_root: Path) -> None:
    """Checks the text between backticks if it is a command, a config option, a dotted name, a path or a file name.

    Raises:
        DocumentError: if the command is not valid, or the project does not have the option, name, path or file.
    """
    if is_project_command(text):
        for _, words in split_commands(text.replace("…", " … ")):
            check_command(words, config_root)
        return
    for word in text.split():
        check_group_option(word)
    if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", text):
        import_name(text)
    elif re.fullmatch(r"(mmr5_train|data_construction|configs|scripts|tests|docs)/[\w./*-]*", text):
        if not list(ROOT.glob(text.rstrip("/"))) and text not in ignored_paths():
            raise DocumentError(f"no such path: {text}")
    elif re.fullmatch(r"\w+\.(py|sh)", text) and text not in file_names():
        raise DocumentError(f"no file in the repository has this name: {text}")


def check_group_option(word: str) -> None:
    """Checks GROUP=OPTION or GROUP=[OPTION,…] if configs/GROUP/ exists. `mine` stands for a user's own option."""
    group, _, value = word.partition("=")
    if not re.fullmatch(r"[a-z]+", group) or not re.fullmatch(r"\w+|\[[\w,]+\]", value):
        return
    choices = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
    if not choices:
        return
    for option in re.findall(r"\w+", value):
        if option not in choices | {"null", "mine"} and not selects_ignored_option(f"{group}={option}"):
            raise DocumentError(f"{word}: no such option (choices: {', '.join(sorted(choices))})")
