"""The notes of a think block: a line a page, written by the teacher, learned by the model, checked afterwards."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LINE = re.compile(r"^Image (\d{1,4}): (.*)$")
QUOTATION = re.compile(r"\"[^\"]*\"|“[^”]*”")
# How a teacher that writes freely says it; gaps are bounded, so that a model's text is read in linear time.
_HELPS_NOT = re.compile(
    r"(?:\b(?:no|not|never|cannot|nothing)\b|n[’']t\b)(?:\W{1,5}\w{1,40}){0,3}?\W{1,5}"
    r"(?:help\w*|answer\w*|relevant|useful|use|bear\w*|address\w*)\b|\b(?:irrelevant|unrelated|unhelpful|useless)\b",
    re.IGNORECASE,
)
_HELPS = re.compile(r"\b(?:helps?|helpful|answers|relevant|useful)\b", re.IGNORECASE)


def format_note(description: str, helps: bool) -> str:
    """The note on a page whose content is known, e.g. "a red bar chart, so it does not help."."""
    return f"{description}, so it {'helps' if helps else 'does not help'}."


def text_before_verdict(note: str) -> str:
    """A note of that form up to its verdict, e.g. "a red bar chart, so it"; of any other form, nothing."""
    ends = (" helps.", " does not help.")
    return next((note.removesuffix(end) for end in ends if note.endswith(f", so it{end}")), "")


def join_notes(notes: Sequence[str]) -> str:
    """A think block: "Image i: note", a line a page, in prompt order."""
    return "\n".join(f"Image {i}: {note}" for i, note in enumerate(notes, 1))


def split_notes(think: str) -> dict[int, str]:
    """The first note on each page of a think block, by local id; other lines are passed over."""
    notes: dict[int, str] = {}
    for line in think.splitlines():
        if match := _LINE.match(line.strip()):
            notes.setdefault(int(match[1]), match[2].strip())
    return notes


def states_description(note: str, description: str) -> bool:
    """Whether a note says that its page shows exactly `description`."""
    return note.startswith((f"{description},", f"{description}."))


def read_verdict(note: str) -> bool | None:
    """Whether a note says that its page helps; None where that can't be told. What it quotes does not count."""
    if note.endswith("so it does not help."):
        return False
    if note.endswith("so it helps."):
        return True
    own_words = QUOTATION.sub(" ", note)
    rest = _HELPS_NOT.sub(" ", own_words)
    against, for_it = rest != own_words, bool(_HELPS.search(rest))
    return None if against == for_it else for_it
