"""The offline teacher: it quotes the page. It needs no model and no network, and is deterministic.

If the page has a description (synthetic pages do), the note is that description. Otherwise the note quotes the
passage that shares most words with the question, and names the heading above the passage and the shared words. If
the page has no text, the note says so. The verdict is the label.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from data_construction.teacher.calls import TeacherFailure
from data_construction.teacher.replies import PageNote
from mmr5_train.common.bm25s_import import STOPWORDS
from mmr5_train.ranking.notes import remove_verdict
from mmr5_train.ranking.prompt import fill_template, neutralize
from mmr5_train.ranking.records import LocalId, Page

QUOTE_WORDS, HEADING_WORDS, MAX_NAMED_WORDS = 20, 6, 3
QUESTION_WORDS = (
    "what", "which", "who", "whom", "whose", "when", "where", "why", "how", "many", "much", "do", "does", "did",
    "has", "have", "had", "were", "can", "from", "page", "document", "according", "about", "all", "its", "your",
    "you", "them", "list", "give", "write", "answer", "please",
)  # fmt: skip
_STOP_WORDS = frozenset((*STOPWORDS, *QUESTION_WORDS))


class ExtractiveConfig(BaseModel):
    """`teacher: extractive` (configs/teacher/extractive.yaml): sentence templates around a quote.

    `{where}` is filled with one of the two `where…` texts. The verdict is appended to each sentence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["extractive"]
    where: str
    where_heading: str
    helps: str
    helps_unnamed: str
    partly: str
    near: str
    unrelated: str


class ExtractiveTeacher:
    """A deterministic `Teacher`."""

    concurrency = 1

    def __init__(self, config: ExtractiveConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self.resolved: dict[str, Any] = {}

    async def explain(
        self, query: str, page: Page, image: Path, helps: bool, words: int, problem: str = ""
    ) -> PageNote:
        """A note of at most `words` words, unless the template itself is longer.

        `image` is not used, and a second try returns the same note as the first. Raises `TeacherFailure` for a
        page without text: this teacher can't see it.
        """
        if page.description:
            return PageNote(page.description, helps)
        lines = _lines(page.text)
        if not lines:
            raise TeacherFailure("page without text", f"page {page.id}; read it with ocr={{}} in candidates")
        query_terms, page_terms = _terms(query), _terms(page.text)
        best = _best_line(lines, query_terms)
        passage, heading = _passage(lines, best), _heading(lines, best)
        text = ""
        for size in range(QUOTE_WORDS, 0, -1):
            quote = _window(passage, size, query_terms)
            text = self._text(query_terms, page_terms, quote, heading, helps)
            if len(text.split()) <= words:
                break
        return PageNote(text, helps)

    def _text(
        self, query_terms: dict[str, str], page_terms: dict[str, str], quote: str, heading: str, helps: bool
    ) -> str:
        quote_terms = _terms(quote)
        shared = [word for term, word in query_terms.items() if term in quote_terms][:MAX_NAMED_WORDS]
        missing = [word for term, word in query_terms.items() if term not in page_terms][:MAX_NAMED_WORDS]
        if helps:
            sentence = self.config.helps if shared else self.config.helps_unnamed
        elif not shared:
            sentence = self.config.unrelated
        else:
            sentence = self.config.partly if missing else self.config.near
        where = fill_template(self.config.where_heading, heading=heading) if heading else self.config.where
        return fill_template(
            sentence, where=where, quote=quote, shared=join_words(shared), missing=join_words(missing)
        )

    async def refine(
        self, query: str, notes: Sequence[str], positives: Sequence[LocalId], words: int, problem: str = ""
    ) -> str:
        """One sentence on the relevant pages and one on the others; none for an empty group."""
        others = [i for i in range(1, len(notes) + 1) if i not in positives]
        groups = ((positives, True), (others, False))
        return " ".join(_summary(notes, ids, helps, words // 2) for ids, helps in groups if ids)

    def status(self) -> str:
        return ""

    async def close(self) -> None:
        """Does nothing: this teacher opens no resources."""


def join_words(words: Sequence[object]) -> str:
    """Joins words in English, as in "a, b and c"."""
    head = ", ".join(str(word) for word in words[:-1])
    return f"{head} and {words[-1]}" if head else "".join(str(word) for word in words)


def image_names(ids: Sequence[int]) -> str:
    """Names local ids as the think block does, as in "Image 2" or "Images 1, 3 and 4"."""
    return f"{'Image' if len(ids) == 1 else 'Images'} {join_words(ids)}"


def _summary(notes: Sequence[str], ids: Sequence[int], helps: bool, words: int) -> str:
    """One sentence of about `words` words: the notes on the pages `ids`, each cut to the same number of words."""
    verb = {(True, True): "helps", (True, False): "help", (False, True): "does not help"}.get(
        (helps, len(ids) == 1), "do not help"
    )
    head = f"{image_names(ids)} {verb}"
    words_per_note = max(4, (words - len(head.split())) // len(ids))
    parts = []
    for i in ids:
        note = remove_verdict(notes[i - 1]).split()
        part = " ".join(note[:words_per_note]) + ("…" if len(note) > words_per_note else "")
        parts.append(part + '"' if part.count('"') % 2 else part)
    return f"{head}: {'; '.join(parts)}."


def _lines(text: str) -> list[str]:
    """Lines that contain words: printable, single spaces, no characters that end a quote or form a tag."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text.replace("\r", "\n"))
    text = re.sub(r"\.{4,}|(?:\. ){4,}", "… ", text)  # the leaders of a table of contents
    text = neutralize(re.sub('["“”„«»]', "'", text))
    return [" ".join(line.split()) for line in text.split("\n") if any(c.isalnum() for c in line)]


def _terms(text: str) -> dict[str, str]:
    """Content words in order of appearance: normalized form (lower case, no plural s) → original form."""
    terms: dict[str, str] = {}
    for word in re.findall(r"[^\W_]+", text):
        term = word.lower()
        if term in _STOP_WORDS or (len(term) == 1 and not term.isdigit()):
            continue
        if len(term) > 3 and term.endswith("s") and not term.endswith("ss"):
            term = term[:-1]
        terms.setdefault(term, word)
    return terms


def _passage(lines: Sequence[str], start: int) -> list[str]:
    """The words from line `start` to the end of its sentence, or until there are enough for a quote."""
    words = lines[start].split()
    for line in lines[start + 1 :]:
        if len(words) >= QUOTE_WORDS or words[-1].endswith((".", "!", "?", ":")):
            break
        words += line.split()
    return words


def _best_line(lines: Sequence[str], query_terms: dict[str, str]) -> int:
    """First line of the passage that shares most terms with the question; rare terms count more."""
    shared = [query_terms.keys() & _terms(" ".join(_passage(lines, i))).keys() for i in range(len(lines))]
    passages_with = Counter(term for terms in shared for term in terms)
    # Sorted, so that rounding is the same in every run: the order of a set differs between runs.
    scores = [sum(1 / passages_with[term] for term in sorted(terms)) for terms in shared]
    best = scores.index(max(scores))
    while best + 1 < len(lines) and _is_heading(lines[best]) and scores[best + 1] == scores[best]:
        best += 1  # skip the heading: the shared terms are below it, and the note names it before the quote
    return best


def _window(words: Sequence[str], size: int, query_terms: dict[str, str]) -> str:
    """The `size` successive words with most terms of the question; "…" marks where the passage is cut."""
    starts = range(max(1, len(words) - size + 1))
    shared = [len(query_terms.keys() & _terms(" ".join(words[i : i + size])).keys()) for i in starts]
    first = shared.index(max(shared))
    tied = next((k for k, count in enumerate(shared[first:]) if count < shared[first]), len(shared) - first)
    # The middle of equally good windows, so that there is context on both sides of the match.
    start = first and first + tied // 2
    quote = " ".join(words[start : start + size])
    return ("…" if start else "") + quote + ("…" if start + size < len(words) else "")


def _heading(lines: Sequence[str], index: int) -> str:
    """The first words of the nearest heading above a line; "" without a heading."""
    above = reversed(lines[:index])
    return next((" ".join(line.split()[:HEADING_WORDS]) for line in above if _is_heading(line)), "")


def _is_heading(line: str) -> bool:
    """Whether a line looks like a heading: short, no punctuation at the end, mostly capitalized words."""
    words = re.findall(r"[^\W\d_]+", line)
    capitalized = sum(word[0].isupper() for word in words)
    short = len(line.split()) <= 8 and line[0].isalnum() and line[-1] not in ".,;:?!"
    return short and sum(map(len, words)) >= 3 and 2 * capitalized >= len(words)
