"""What is checked of a teacher's words before a model learns from them.

A note is about one page that its writer saw alone; the reasoning is about all pages of a prompt. Each check yields
its name and what was found; `WRONG` says the same to a teacher that gets a second try.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bm25s import stopwords

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.notes import QUOTATION, read_verdict
from mmr5_train.ranking.prompt import neutralize, render_completion
from mmr5_train.ranking.records import LocalId, Page

WRONG = {
    "direction": "argued the other way",
    "no_label_words": "told of a label, and not only of what is there",
    "moved_ids": "called an image by a number that the reader can't know",
    "language": "was not in the language of the question",
    "names_pages": "did not call the pages by the names given",
}
"""The checks that a second try may mend, in the words that follow "Your last reply"."""

# Words that a page or a question may hold for its own reasons, and turns of phrase that only a label explains.
_LABEL_WORD = re.compile(r"\b(?:labels?|positives?|negatives?)\b", re.IGNORECASE)
_LABEL_TOLD = re.compile(
    r"\bground[- ]?truth\b|\b(?:positive|negative) (?:page|image|candidate|example)s?\b"
    r"|\blabell?ed (?:as )?(?:a )?(?:ir)?(?:relevant|positive|negative|correct|wrong|helpful|useful)\b"
    r"|\b(?:the|given|its) label (?:is|says|states)\b|\b(?:according to|by|given) (?:the|its) label\b"
    r"|\b(?:was|am|were|been) told\b",
    re.IGNORECASE,
)
_NAMED = re.compile(r"\bImages? (\d+(?:(?:, ?and |, ?| ?and | ?& ?)\d+)*)", re.IGNORECASE)
# Enough to tell languages of one script apart; one that is missing here is never told.
_LANGUAGES = {
    "English": "EN_PLUS", "German": "GERMAN", "Dutch": "DUTCH", "French": "FRENCH", "Spanish": "SPANISH",
    "Portuguese": "PORTUGUESE", "Italian": "ITALIAN", "Swedish": "SWEDISH", "Turkish": "TURKISH",
}  # fmt: skip
_SMALL_WORDS = {name: frozenset(getattr(stopwords, f"STOPWORDS_{list_}")) for name, list_ in _LANGUAGES.items()}
# Japanese mixes three scripts, and Korean may hold Chinese characters: they are not told apart.
_SCRIPTS = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "HANGUL"), "EAST ASIAN")
_VERDICT = re.compile(r"so it (?:helps|does not help)\.$")


@dataclass(frozen=True)
class Rules:
    """What is asked of notes: how many words they may have (refined reasoning has twice as many), whether there is
    such reasoning, and whether they must be in the question's language."""

    max_words: int
    refined: bool = False
    same_language: bool = True


Failed = Iterator[tuple[str, str]]
"""(name, what was found) of each check that is not passed."""


def failed_checks(
    query: str,
    seen: Sequence[Page],
    notes: Sequence[str],
    think: str,
    answer: tuple[LocalId, ...],
    positives: tuple[LocalId, ...],
    rules: Rules,
) -> Failed:
    """All checks of a trace. Everything local refers to `seen`."""
    if len(notes) != len(seen) or not all(note.strip() and "\n" not in note for note in notes):
        yield "one_note_a_page", f"{len(notes)} notes on {len(seen)} pages"
    for i, (page, note) in enumerate(zip(seen, notes, strict=False), 1):
        yield from failed_note_checks(LocalId(i), note, query, page, i in positives, rules)
    if rules.refined:
        yield from failed_reasoning_checks(think, query, seen, positives, rules)
    if neutralize(think) != think:
        yield "no_tags", f"a tag in: {think}"
    read = parse_answer(render_completion(think, answer), len(seen))
    relevant_first = set(answer[: len(positives)]) == set(positives)
    if read.defects or not read.structure_valid or not relevant_first:
        yield "answer", f"{list(answer)} reads as {list(read.ids)}, relevant are {list(positives)}"


def failed_note_checks(i: LocalId, note: str, query: str, page: Page, helps: bool, rules: Rules) -> Failed:
    """The checks of one note, on the page that is shown as image `i`. Its writer did not know that number."""
    if len(note.split()) > rules.max_words:
        yield "short_notes", f"image {i}: {len(note.split())} words, at most {rules.max_words} asked for"
    if read_verdict(note) not in (None, helps):
        yield "direction", f"image {i} {'helps' if helps else 'does not help'}; the note: {note}"
    if word := label_word(note, query, [page]):
        yield "no_label_words", f"image {i}: {word!r} in: {note}"
    given = f"{query}\n{page.text}\n{page.description}"
    if moved := named_pages(QUOTATION.sub(" ", note)) - {i} - named_pages(given):
        yield "moved_ids", f"image {i} is called {sorted(moved)} in: {note}"
    if rules.same_language and (other := other_language(note, query)):
        yield "language", f"image {i}: {other}: {note}"


def failed_reasoning_checks(
    think: str, query: str, seen: Sequence[Page], positives: Sequence[LocalId], rules: Rules
) -> Failed:
    """The checks of refined reasoning on all pages of a prompt."""
    named = named_pages(think)
    if not set(positives) <= named or not named <= set(range(1, len(seen) + 1)):
        yield "names_pages", f"images {sorted(named)} named, relevant are {list(positives)}, in: {think}"
    if len(think.split()) > 2 * rules.max_words:
        yield "short_reasoning", f"{len(think.split())} words, at most {2 * rules.max_words} asked for"
    if word := label_word(think, query, seen):
        yield "no_label_words", f"{word!r} in: {think}"
    if rules.same_language and (other := other_language(think, query)):
        yield "language", f"{other}: {think}"


def label_word(text: str, query: str, seen: Sequence[Page]) -> str | None:
    """A word that gives away that the teacher knew the label; those of the pages and the question are none."""
    own_words = QUOTATION.sub(" ", text)
    if told := _LABEL_TOLD.search(own_words):
        return told[0]
    words = _LABEL_WORD.findall(own_words)
    given = " ".join([query, *(f"{page.text} {page.description}" for page in seen)]).lower() if words else ""
    return next((word for word in words if word.lower() not in given), None)


def named_pages(text: str) -> set[int]:
    """Local ids that a text names, as in "Image 2" or "Images 1, 3 and 4"."""
    return {int(i) for ids in _NAMED.findall(text) for i in re.findall(r"\d+", ids)}


def other_language(text: str, query: str) -> str | None:
    """How a text's language differs from the question's, where both can be told.

    Quotes and the verdict don't count. Scripts are compared first, then languages, by the small words they use.
    """
    own_words = _VERDICT.sub(" ", QUOTATION.sub(" ", text))
    scripts, languages = (script(own_words), script(query)), (language(own_words), language(query))
    if all(scripts) and scripts[0] != scripts[1]:
        return f"{scripts[0]} letters, the question's are {scripts[1]}"
    if all(languages) and languages[0] != languages[1]:
        return f"{languages[0]}, the question is {languages[1]}"
    return None


def script(text: str) -> str | None:
    """The script that most of a text's letters are of, None for a text of few letters or of many scripts."""
    names = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    scripts: Counter[str] = Counter()
    for name, count in names.items():
        scripts[_SCRIPTS.get(name, name)] += count
    most, count = scripts.most_common(1)[0] if scripts else ("", 0)
    return most if count >= 4 and count > 0.6 * scripts.total() else None


def language(text: str) -> str | None:
    """The language whose small words a text holds: three at least, and twice as many as any other's."""
    words = re.findall(r"\b[^\W\d_]{2,}\b", text.lower())  # no single letters: they may be anything
    hits = sorted(((sum(word in own for word in words), name) for name, own in _SMALL_WORDS.items()), reverse=True)
    (most, name), (second, _) = hits[:2]
    return name if most >= 3 and most >= 2 * second else None
