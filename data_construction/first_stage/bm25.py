"""BM25 over the page texts of one document, built in: needs no model and no index on disk."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from data_construction.corpus.documents import Document
from mmr5_train.common.bm25s_import import bm25s
from mmr5_train.ranking.records import Page

# Han and kana, which are written without spaces between words, and Hangul, whose words carry endings.
_UNSPACED = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff々]+"
)


def split_unspaced(text: str) -> str:
    """The text with spaces around the pairs of neighboring characters in scripts without spaces between words.

    So a question in Chinese or Japanese matches a page on which its words stand, without a dictionary (Nie et al.
    2000, "On the use of words and n-grams for Chinese information retrieval").
    """
    if not _UNSPACED.search(text):
        return text

    def pairs(match: re.Match[str]) -> str:
        run = match[0]
        words = [run[i : i + 2] for i in range(len(run) - 1)] or [run * 2]  # a word has at least two characters
        return f" {' '.join(words)} "

    return _UNSPACED.sub(pairs, unicodedata.normalize("NFKC", text))


def _words(texts: Sequence[str], **options: Any) -> Any:
    return bm25s.tokenize([split_unspaced(text) for text in texts], stopwords="en", show_progress=False, **options)


def rank_by_bm25(document: Document) -> list[list[tuple[Page, float]]]:
    """For each question of the document, its pages with their scores, best first.

    bm25s is used with its default parameters and English stop words; `split_unspaced` prepares texts in Chinese or
    Japanese. Pages with equal scores are in page order;
    pages without text come after all others. So a scan without any text stays in page order.
    """
    pages = document.pages
    tokens = _words([page.text for page in pages])
    index = None
    if any(tokens.ids):
        index = bm25s.BM25()
        index.index(tokens, show_progress=False)
    queries = _words([question.query for question in document.questions], return_ids=False)
    rankings = []
    for words in queries:
        scores = [float(score) for score in index.get_scores(words)] if index and words else [0.0] * len(pages)
        order = sorted(range(len(pages)), key=lambda i: (not pages[i].text.strip(), -scores[i], i))
        rankings.append([(pages[i], scores[i]) for i in order])
    return rankings
