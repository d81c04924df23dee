"""BM25 over the page texts of one document, built in: needs no model and no index on disk."""

from __future__ import annotations

from data_construction.corpus.documents import Document
from data_construction.first_stage.words import languages_of, to_words
from mmr5_train.common.bm25s_import import bm25s
from mmr5_train.ranking.records import Page


def rank_by_bm25(document: Document) -> list[list[tuple[Page, float]]]:
    """For each question of the document, its pages with their scores, best first.

    bm25s is used with its default parameters. Pages with equal scores are in page order; pages without text come
    after all others. So a scan without any text stays in page order.
    """
    pages = document.pages
    texts = [page.text for page in pages]
    languages = languages_of(texts)
    tokens = to_words(texts, languages)
    index = None
    if any(tokens.ids):
        index = bm25s.BM25()
        index.index(tokens, show_progress=False)
    queries = to_words([question.query for question in document.questions], languages, return_ids=False)
    rankings = []
    for words in queries:
        scores = [float(score) for score in index.get_scores(words)] if index and words else [0.0] * len(pages)
        order = sorted(range(len(pages)), key=lambda i: (not pages[i].text.strip(), -scores[i], i))
        rankings.append([(pages[i], scores[i]) for i in order])
    return rankings
