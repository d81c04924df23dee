"""The notes of a think block, one line per page. Teachers write them, SFT trains on them, rewards check them.

A note may end with a verdict: whether the page helps to answer the question. The verdict has one fixed form,
", so it helps." or ", so it does not help." at the end of the note. `format_note` writes it and `read_verdict`
reads it. No other wording counts as a verdict, because free text can't be read reliably.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmr5_train.ranking.prompt import neutralize

_NOTE_LINE = re.compile(r"^Image (\d{1,4}): (.*)$")
_VERDICT_START = ", so it"
_VERDICT_ENDS = {True: " helps.", False: " does not help."}


def format_note(text: str, helps: bool) -> str:
    """The note on a page, with its verdict: "a red bar chart, so it does not help.".

    The text is put on one line and can't contain tags, so the verdict on any text can be read back from a think
    block.
    """
    return f"{neutralize(' '.join(text.split()))}{_VERDICT_START}{_VERDICT_ENDS[helps]}"


def read_verdict(note: str) -> bool | None:
    """Whether a note says that its page helps, or None if the note does not end with a verdict."""
    ends = _VERDICT_ENDS.items()
    return next((helps for helps, end in ends if note.endswith(f"{_VERDICT_START}{end}")), None)


def text_before_verdict(note: str) -> str:
    """The note up to the words of its verdict: "a red bar chart, so it"; "" for a note without a verdict."""
    helps = read_verdict(note)
    return "" if helps is None else note.removesuffix(_VERDICT_ENDS[helps])


def remove_verdict(note: str) -> str:
    """The text of a `format_note` note; any other note unchanged."""
    helps = read_verdict(note)
    return note if helps is None else note.removesuffix(f"{_VERDICT_START}{_VERDICT_ENDS[helps]}")


def contains_verdict(text: str) -> bool:
    """Whether the fixed form of a verdict is anywhere in a text."""
    return any(f"{_VERDICT_START}{end}" in text for end in _VERDICT_ENDS.values())


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


def page_verdicts(think: str, n: int) -> dict[int, bool]:
    """The verdicts of a think block by local id: whether the page helps. Pages without a verdict are omitted."""
    verdicts = {i: read_verdict(note) for i, note in split_notes(think).items() if 1 <= i <= n}
    return {i: helps for i, helps in verdicts.items() if helps is not None}


def states_description(note: str, description: str) -> bool:
    """Whether a note gives exactly `description` as the content of its page."""
    return note.startswith((f"{description},", f"{description}."))
