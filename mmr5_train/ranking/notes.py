"""The notes of a think block, one line per page. Teachers write them, SFT trains on them, rewards check them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NOTE_LINE = re.compile(r"^Image (\d{1,4}): (.*)$")
QUOTATION = re.compile(r"\"[^\"]*\"|“[^”]*”")
# Verdicts in free text. The repetitions are bounded, so that matching takes linear time on any model output.
_DOES_NOT_HELP = re.compile(
    r"(?:\b(?:no|not|never|cannot|nothing)\b|n[’']t\b)(?:\W{1,5}\w{1,40}){0,3}?\W{1,5}"
    r"(?:help\w*|answer\w*|relevant|useful|use|bear\w*|address\w*)\b|\b(?:irrelevant|unrelated|unhelpful|useless)\b",
    re.IGNORECASE,
)
_HELPS = re.compile(r"\b(?:helps?|helpful|answers|relevant|useful)\b", re.IGNORECASE)


def format_note(description: str, helps: bool) -> str:
    """The note on a page, from its description: "a red bar chart, so it does not help."."""
    return f"{description}, so it {'helps' if helps else 'does not help'}."


def text_before_verdict(note: str) -> str:
    """The part of a `format_note` note before its verdict: "a red bar chart, so it". "" for any other note."""
    ends = (" helps.", " does not help.")
    return next((note.removesuffix(end) for end in ends if note.endswith(f", so it{end}")), "")


def join_notes(notes: Sequence[str]) -> str:
    """The content of a think block: one line "Image i: note" per page, in prompt order."""
    return "\n".join(f"Image {i}: {note}" for i, note in enumerate(notes, 1))


def split_notes(think: str) -> dict[int, str]:
    """The first note on each page in a think block, by local id. Lines that are not notes are ignored."""
    notes: dict[int, str] = {}
    for line in think.splitlines():
        if match := _NOTE_LINE.match(line.strip()):
            notes.setdefault(int(match[1]), match[2].strip())
    return notes


def states_description(note: str, description: str) -> bool:
    """Whether a note gives exactly `description` as the content of its page."""
    return note.startswith((f"{description},", f"{description}."))


def read_verdict(note: str) -> bool | None:
    """Whether a note says that its page helps, or None if it gives no clear verdict. Quoted text is ignored."""
    if note.endswith("so it does not help."):
        return False
    if note.endswith("so it helps."):
        return True
    unquoted = QUOTATION.sub(" ", note)
    without_negations = _DOES_NOT_HELP.sub(" ", unquoted)
    says_no, says_yes = without_negations != unquoted, bool(_HELPS.search(without_negations))
    return None if says_no == says_yes else says_yes
