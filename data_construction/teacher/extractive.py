"""The offline teacher: it quotes the page. No model, no network, the same words every time.

A page whose content is known (synthetic pages) is described in exactly those words. Of any other page the
passage that shares most with the question is quoted, with the heading above it and what the two have in
common; a page without text is said to have none. The verdict follows the label, as MM-R5's teacher does
(arXiv 2506.12364, data construction).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bm25s.stopwords import STOPWORDS_EN
from pydantic import BaseModel, ConfigDict

from mmr5_train.ranking.notes import format_note
from mmr5_train.ranking.prompt import fill_template, neutralize
from mmr5_train.ranking.records import LocalId, Page

QUOTE_WORDS, HEADING_WORDS, NAMED_WORDS = 20, 6, 3
ASKING = (
    "what", "which", "who", "whom", "whose", "when", "where", "why", "how", "many", "much", "do", "does", "did",
    "has", "have", "had", "were", "can", "from", "page", "document", "according", "about", "all", "its", "your",
    "you", "them", "list", "give", "write", "answer", "please",
)  # fmt: skip
_UNTOLD = frozenset((*STOPWORDS_EN, *ASKING))


class ExtractiveConfig(BaseModel):
    """`teacher: extractive` (configs/teacher/extractive.yaml): the sentences around a quote.

    `{where}` is one of the two `where…` texts; the verdict ("…, so it helps.") is added to each sentence.
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
    no_text_helps: str
    no_text: str


class ExtractiveTeacher:
    """Deterministic, and a `Teacher` like the others."""

    concurrency = 1

    def __init__(self, config: ExtractiveConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()

    async def explain(
        self, query: str, page: Page, image: Path, helps: bool, words: int, problem: str = ""
    ) -> str:
        """A note of at most `words` words, where the templates leave room for it.

        `image` is not looked at, and a second try is the same as the first.
        """
        if page.description:
            return format_note(page.description, helps)
        lines = _lines(page.text)
        if not lines:
            return format_note(self.config.no_text_helps if helps else self.config.no_text, helps)
        asked, told = _terms(query), _terms(page.text)
        best = _best_line(lines, asked)
        passage, heading = _passage(lines, best), _heading(lines, best)
        note = ""
        for size in range(QUOTE_WORDS, 0, -1):
            note = self._note(asked, told, _window(passage, size, asked), heading, helps)
            if len(note.split()) <= words:
                break
        return note

    def _note(self, asked: dict[str, str], told: dict[str, str], quote: str, heading: str, helps: bool) -> str:
        quoted = _terms(quote)
        shared = [word for term, word in asked.items() if term in quoted][:NAMED_WORDS]
        missing = [word for term, word in asked.items() if term not in told][:NAMED_WORDS]
        if helps:
            sentence = self.config.helps if shared else self.config.helps_unnamed
        elif not shared:
            sentence = self.config.unrelated
        else:
            sentence = self.config.partly if missing else self.config.near
        where = fill_template(self.config.where_heading, heading=heading) if heading else self.config.where
        text = fill_template(sentence, where=where, quote=quote, shared=listed(shared), missing=listed(missing))
        return format_note(text, helps)

    async def refine(
        self, query: str, notes: Sequence[str], positives: Sequence[LocalId], words: int, problem: str = ""
    ) -> str:
        """A sentence on the relevant pages and one on the others, where there are any."""
        rest = [i for i in range(1, len(notes) + 1) if i not in positives]
        sides = ((positives, True), (rest, False))
        return " ".join(_summary(notes, ids, helps, words // 2) for ids, helps in sides if ids)

    def status(self) -> str:
        return ""

    async def close(self) -> None:
        """Nothing is open."""


def listed(words: Sequence[object]) -> str:
    """ "a", "a and b", "a, b and c"."""
    head = ", ".join(str(word) for word in words[:-1])
    return f"{head} and {words[-1]}" if head else "".join(str(word) for word in words)


def pages_named(ids: Sequence[int]) -> str:
    """ "Image 2", "Images 1, 3 and 4"."""
    return f"{'Image' if len(ids) == 1 else 'Images'} {listed(ids)}"


def _summary(notes: Sequence[str], ids: Sequence[int], helps: bool, words: int) -> str:
    """One sentence of at most about `words` words: what was said of the pages `ids`, each part cut evenly."""
    verb = {(True, True): "helps", (True, False): "help", (False, True): "does not help"}.get(
        (helps, len(ids) == 1), "do not help"
    )
    head = f"{pages_named(ids)} {verb}"
    each = max(4, (words - len(head.split())) // len(ids))
    tail = format_note("", helps)
    parts = []
    for i in ids:
        said = notes[i - 1].removesuffix(tail).split()
        part = " ".join(said[:each]) + ("…" if len(said) > each else "")
        parts.append(part + '"' if part.count('"') % 2 else part)
    return f"{head}: {'; '.join(parts)}."


def _lines(text: str) -> list[str]:
    """Lines that hold words: printable, in single spaces, with nothing that could end a quote or act as a tag."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text.replace("\r", "\n"))
    text = re.sub(r"\.{4,}|(?:\. ){4,}", "… ", text)  # the leaders of a table of contents
    text = neutralize(re.sub('["“”„«»]', "'", text))
    return [" ".join(line.split()) for line in text.split("\n") if any(c.isalnum() for c in line)]


def _terms(text: str) -> dict[str, str]:
    """Content words in order: compared form (lower case, without a plural s) → as written."""
    terms: dict[str, str] = {}
    for word in re.findall(r"[^\W_]+", text):
        term = word.lower()
        if term in _UNTOLD or (len(term) == 1 and not term.isdigit()):
            continue
        if len(term) > 3 and term.endswith("s") and not term.endswith("ss"):
            term = term[:-1]
        terms.setdefault(term, word)
    return terms


def _passage(lines: Sequence[str], at: int) -> list[str]:
    """The words from a line on, to the end of its sentence or until they are enough for a quote."""
    words = lines[at].split()
    for line in lines[at + 1 :]:
        if len(words) >= QUOTE_WORDS or words[-1].endswith((".", "!", "?", ":")):
            break
        words += line.split()
    return words


def _best_line(lines: Sequence[str], asked: dict[str, str]) -> int:
    """Where the passage starts that shares most with the question; a word on few lines counts more."""
    found = [asked.keys() & _terms(" ".join(_passage(lines, at))).keys() for at in range(len(lines))]
    often = Counter(term for terms in found for term in terms)
    # Summed in a stated order: a set's own order changes from run to run, and the last digit with it.
    scores = [sum(1 / often[term] for term in sorted(terms)) for terms in found]
    at = scores.index(max(scores))
    while at + 1 < len(lines) and _is_heading(lines[at]) and scores[at + 1] == scores[at]:
        at += 1  # the words are below the heading, which is named before the quote
    return at


def _window(words: Sequence[str], size: int, asked: dict[str, str]) -> str:
    """The `size` words in a row with the most of the question's words, "…" where the passage goes on."""
    starts = range(max(1, len(words) - size + 1))
    shared = [len(asked.keys() & _terms(" ".join(words[at : at + size])).keys()) for at in starts]
    first = shared.index(max(shared))
    tied = next((k for k, count in enumerate(shared[first:]) if count < shared[first]), len(shared) - first)
    at = first and first + tied // 2  # the middle of equally good places: words around the match on both sides
    cut = " ".join(words[at : at + size])
    return ("…" if at else "") + cut + ("…" if at + size < len(words) else "")


def _heading(lines: Sequence[str], at: int) -> str:
    """The nearest heading above a line, "" where there is none."""
    return next((" ".join(x.split()[:HEADING_WORDS]) for x in reversed(lines[:at]) if _is_heading(x)), "")


def _is_heading(line: str) -> bool:
    """Whether a line looks like a heading: short, unpunctuated, mostly capitalised words."""
    words = re.findall(r"[^\W\d_]+", line)
    capital = sum(word[0].isupper() for word in words)
    short = len(line.split()) <= 8 and line[0].isalnum() and line[-1] not in ".,;:?!"
    return short and sum(map(len, words)) >= 3 and 2 * capital >= len(words)
