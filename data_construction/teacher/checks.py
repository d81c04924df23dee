"""Checks of the teacher's text, before a model is trained on it.

A note is about one page, and the teacher saw only that page when it wrote the note. The reasoning is about all
pages of a prompt. Each check that fails yields its name and a detail. `RETRY_PROBLEMS` describes the problem to a
teacher that gets a second try.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_construction.corpus.languages import other_language
from data_construction.teacher.replies import PageNote
from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.prompt import neutralize, render_completion
from mmr5_train.ranking.records import LocalId, Page

RETRY_PROBLEMS = {
    "direction": "stated the other verdict",
    "no_label_words": "told of a label, and not only of what is there",
    "moved_ids": "called an image by a number that the reader can't know",
    "language": "was not in the language of the question",
    "names_pages": "did not call the pages by the names given",
}
"""Checks that a second try may pass, with the words that follow "Your last reply" in the prompt."""

# Words that a page or a question may contain for its own reasons.
_LABEL_WORD = re.compile(r"\b(?:labels?|positives?|negatives?)\b", re.IGNORECASE)
# Phrases that only a writer who knows the label uses.
_LABEL_PHRASE = re.compile(
    r"\bground[- ]?truth\b|\b(?:positive|negative) (?:page|image|candidate|example)s?\b"
    r"|\blabell?ed (?:as )?(?:a )?(?:ir)?(?:relevant|positive|negative|correct|wrong|helpful|useful)\b"
    r"|\b(?:the|given|its) label (?:is|says|states)\b|\b(?:according to|by|given) (?:the|its) label\b"
    r"|\b(?:was|am|were|been) told\b",
    re.IGNORECASE,
)
_IMAGE_NAMES = re.compile(r"\bImages? (\d+(?:(?:, ?and |, ?| ?and | ?& ?)\d+)*)", re.IGNORECASE)
_QUOTATION = re.compile(r"\"[^\"]*\"|“[^”]*”")


@dataclass(frozen=True)
class Rules:
    """Requirements for one run of the traces stage.

    `max_words` is the limit of a note, without its verdict; refined reasoning may have twice as many. `refined`:
    the think block is refined reasoning. `same_language`: text must be in the question's language.
    """

    max_words: int
    refined: bool = False
    same_language: bool = True


FailedChecks = Iterator[tuple[str, str]]
"""(name, detail) of each check that failed."""


def failed_checks(
    query: str,
    pages: Sequence[Page],
    notes: Sequence[PageNote],
    think: str,
    answer: tuple[LocalId, ...],
    positives: tuple[LocalId, ...],
    rules: Rules,
) -> FailedChecks:
    """All checks of a trace. `pages` and `notes` are in prompt order, and local ids refer to that order."""
    if len(notes) != len(pages) or not all(note.text.strip() for note in notes):
        yield "one_note_a_page", f"{len(notes)} notes on {len(pages)} pages"
    for i, (page, note) in enumerate(zip(pages, notes, strict=False), 1):
        yield from failed_note_checks(LocalId(i), note, query, page, i in positives, rules)
    if rules.refined:
        yield from failed_reasoning_checks(think, query, pages, positives, rules)
    if neutralize(think) != think:
        yield "no_tags", f"a tag in: {think}"
    parsed = parse_answer(render_completion(think, answer), len(pages))
    relevant_first = set(answer[: len(positives)]) == set(positives)
    if parsed.defects or not parsed.structure_valid or not relevant_first:
        yield "answer", f"{list(answer)} reads as {list(parsed.ids)}, relevant are {list(positives)}"


def failed_note_checks(
    i: LocalId, note: PageNote, query: str, page: Page, helps: bool, rules: Rules
) -> FailedChecks:
    """The checks of one note. `i` is the local id of its page, which the teacher did not know."""
    words = len(note.text.split())
    if words > rules.max_words:
        yield "short_notes", f"image {i}: {words} words, at most {rules.max_words} are allowed"
    if note.helps != helps:
        yield "direction", f"image {i} {'helps' if helps else 'does not help'}; the note: {note}"
    if word := find_label_word(note.text, query, [page]):
        yield "no_label_words", f"image {i}: {word!r} in: {note}"
    source = f"{query}\n{page.text}\n{page.description}"
    if moved := named_images(_QUOTATION.sub(" ", note.text)) - {i} - named_images(source):
        yield "moved_ids", f"image {i} is called {sorted(moved)} in: {note}"
    yield from _failed_language_check(note.text, query, rules, f"image {i}: ")


def failed_reasoning_checks(
    think: str, query: str, pages: Sequence[Page], positives: Sequence[LocalId], rules: Rules
) -> FailedChecks:
    """The checks of refined reasoning, which is about all pages of a prompt."""
    named = named_images(think)
    if not set(positives) <= named or not named <= set(range(1, len(pages) + 1)):
        yield "names_pages", f"images {sorted(named)} named, relevant are {list(positives)}, in: {think}"
    if len(think.split()) > 2 * rules.max_words:
        yield "short_reasoning", f"{len(think.split())} words, at most {2 * rules.max_words} are allowed"
    if word := find_label_word(think, query, pages):
        yield "no_label_words", f"{word!r} in: {think}"
    yield from _failed_language_check(think, query, rules)


def _failed_language_check(text: str, query: str, rules: Rules, where: str = "") -> FailedChecks:
    """Leaves out quotes, which are in the page's language."""
    if not rules.same_language:
        return
    if difference := other_language(_QUOTATION.sub(" ", text), query):
        yield "language", f"{where}{difference}, in: {text}"


def find_label_word(text: str, query: str, pages: Sequence[Page]) -> str | None:
    """A word that shows that the teacher knew the label. Words of the question or of a page do not count."""
    own_words = _QUOTATION.sub(" ", text)
    if phrase := _LABEL_PHRASE.search(own_words):
        return phrase[0]
    words = _LABEL_WORD.findall(own_words)
    source = " ".join([query, *(f"{page.text} {page.description}" for page in pages)]).lower() if words else ""
    return next((word for word in words if word.lower() not in source), None)


def named_images(text: str) -> set[int]:
    """Local ids that a text names, as in "Image 2" or "Images 1, 3 and 4"."""
    return {int(i) for ids in _IMAGE_NAMES.findall(text) for i in re.findall(r"\d+", ids)}
