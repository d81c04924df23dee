"""Reads the reply of a vision model that explains a page or sums up notes.

A reply that explains a page has two parts: the note, and the verdict as a field, on the last line:

    The bar chart shows the exports of 2015, which is the sum asked for.
    Verdict: helps

The verdict is read from this line only. Each problem that makes a reply unusable has a name, and a description
that is sent to the model when the request is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from data_construction.teacher.store import Answer
from mmr5_train.chat.completion import text_after_reasoning
from mmr5_train.ranking.notes import contains_verdict, format_note, read_verdict, remove_verdict

HELPS, DOES_NOT_HELP = "Verdict: helps", "Verdict: does not help"
"""The last line of a reply about a page, as the prompt asks for it."""

REPLY_PROBLEMS = {
    "empty": "was empty",
    "cut_off": "was cut off at the token limit",
    "too_long": "was too long",
    "refused": "was a refusal",
    "no_verdict": "did not end with the line that states the verdict",
    "two_verdicts": "stated more than one verdict",
}
"""Problems of a reply: name in the manifest → words that follow "Your last reply" in the prompt."""

REFUSAL_REASONS = ("content_filter", "refusal")
_VERDICTS = {HELPS.casefold(): True, DOES_NOT_HELP.casefold(): False}
_MARKUP = "*_`\"'.>#- "  # what some models put around a line
_END_OF_SENTENCE = " .,;:!?…。！？；：，、"


class PageNote(NamedTuple):
    """A teacher's note on one page: what it says, without the verdict, and the verdict."""

    text: str
    helps: bool

    def __str__(self) -> str:
        """The note as a think block holds it."""
        return format_note(self.text, self.helps)


ReadT = TypeVar("ReadT")
ReadReply = Callable[[str, int], tuple[ReadT | None, str]]
"""Reads the text of a reply with at most so many words: the result, or None with a key of `REPLY_PROBLEMS`."""


def reply_text(answer: Answer) -> tuple[str, str]:
    """(text, problem) of an answer: the problem is a key of `REPLY_PROBLEMS`, or "".

    The text does not include a think block. Some servers return it separately, as `reasoning_content`; others
    leave it in the text.
    """
    if answer.finish in REFUSAL_REASONS:
        return "", "refused"
    if answer.finish == "length":
        return "", "cut_off"
    text = text_after_reasoning(answer.text)
    return text, "" if text else "empty"


def read_line(text: str, words: int) -> tuple[str | None, str]:
    """A reply without a verdict, on one line."""
    line = " ".join(text.split())
    return (None, "too_long") if len(line.split()) > words else (line, "")


def read_note(text: str, words: int) -> tuple[PageNote | None, str]:
    """A note of at most `words` words, and the verdict on the line after it.

    If the note itself ends in the same verdict, in its fixed form (`format_note`), that end is removed. In any
    other place the fixed form is a second verdict.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    verdicts = [read_verdict_line(line) for line in lines]
    stated = [verdict for verdict in verdicts if verdict is not None]
    words_of_note = [
        word for line, verdict in zip(lines, verdicts, strict=True) if verdict is None for word in line.split()
    ]
    if len(words_of_note) > words:
        return None, "too_long"
    note = " ".join(words_of_note).rstrip(_END_OF_SENTENCE)
    if not stated or verdicts[-1] is None:
        return None, "no_verdict" if note else "empty"
    helps = stated[-1]
    if read_verdict(f"{note}.") is helps:
        note = remove_verdict(f"{note}.").rstrip(_END_OF_SENTENCE)
    if len(stated) > 1 or contains_verdict(f"{note}."):
        return None, "two_verdicts"
    return (PageNote(note, helps), "") if note else (None, "empty")


def read_verdict_line(line: str) -> bool | None:
    """The verdict that a line states, or None for any other line.

    Case and mark-up around the two parts do not matter: "**Verdict:** Helps." states that the page helps.
    """
    name, colon, value = line.replace("：", ":").partition(":")
    field = f"{name.strip(_MARKUP)}{colon} {value.strip(_MARKUP)}"
    return _VERDICTS.get(" ".join(field.split()).casefold())
