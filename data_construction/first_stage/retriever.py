"""First-stage retrieval: the pages of a question's own document, best first.

Three ways (config group `retriever`): BM25 over page text, built in; a visual retriever (`dense.py`); or the
scores of any other, from files (`score_files.py`). MMDocIR retrieves pages within a document, so each document is
its own index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import bm25s
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_construction.corpus.documents import Document
from data_construction.first_stage.dense import Dense, open_dense
from data_construction.first_stage.score_files import read_scores, score_files
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Page, Question, Skipped

Ranked = list[tuple[Page, float]]
"""Pages with their scores, best first."""

RankDocument = Callable[[Document], list[Ranked]]
"""Ranks the pages of a document for each of its questions."""


class Retriever(BaseModel):
    """Config group `retriever`: BM25, or scores from files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["bm25", "scores"]
    file: Path | None = Field(
        default=None, description="for `scores`: JSON Lines, a TREC run, or MM-R5's score JSON"
    )

    @model_validator(mode="after")
    def _file_fits_name(self) -> Self:
        if self.name == "scores" and self.file is None:
            raise ValueError("retriever=scores needs a file: retriever.file=…")
        if self.name == "bm25" and self.file is not None:
            raise ValueError("a file needs retriever=scores")
        return self

    @property
    def inputs(self) -> list[Path]:
        """The files whose hashes stand in the manifest."""
        return [] if self.file is None else score_files(self.file)


RetrieverConfig = Annotated[Retriever | Dense, Field(discriminator="name")]


def open_retriever(
    retriever: RetrieverConfig, questions: Sequence[Question], skipped: list[Skipped]
) -> RankDocument:
    """The first stage for these questions. Reads score files whole, so that their mistakes show at once."""
    if isinstance(retriever, Dense):
        score = open_dense(retriever)
        return lambda document: [best_first(document.pages, scores) for scores in score(document)]
    if retriever.file is None:
        return rank_by_bm25
    path = retriever.file
    scores = read_scores(path, questions, skipped)
    return lambda document: rank_by_scores(path, scores, document)


def best_first(pages: Sequence[Page], scores: Sequence[float]) -> Ranked:
    """Pages with their scores, equal scores in page order."""
    return sorted(zip(pages, scores, strict=True), key=lambda pair: -pair[1])


def rank_by_bm25(document: Document) -> list[Ranked]:
    """BM25 (bm25s with its default parameters and English stop words) over the pages of one document.

    Equal scores stand in page order, pages without text behind all others; so a scanned document without any
    text stays in page order.
    """
    pages = document.pages
    tokens = bm25s.tokenize([page.text for page in pages], stopwords="en", show_progress=False)
    index = None
    if any(tokens.ids):
        index = bm25s.BM25()
        index.index(tokens, show_progress=False)
    asked = bm25s.tokenize(
        [question.query for question in document.questions],
        stopwords="en",
        return_ids=False,
        show_progress=False,
    )
    rankings = []
    for words in asked:
        scores = [float(score) for score in index.get_scores(words)] if index and words else [0.0] * len(pages)
        order = sorted(range(len(pages)), key=lambda i: (not pages[i].text.strip(), -scores[i], i))
        rankings.append([(pages[i], scores[i]) for i in order])
    return rankings


def rank_by_scores(path: Path, scores: dict[str, dict[int, float]], document: Document) -> list[Ranked]:
    """The scored pages of each question, highest score first, equal scores in page order.

    Raises `InputError` for a score of a page that the document does not have.
    """
    rankings = []
    for question in document.questions:
        of_pages = scores[question.query_id]
        for page in of_pages:
            if page >= document.n_pages:
                raise InputError(
                    f"{path}: scores page {page} for {question.query_id}, but {document.doc_name} has "
                    f"{document.n_pages} pages, counted from 0"
                )
        scored = [page for page in document.pages if page.page in of_pages]
        rankings.append(best_first(scored, [of_pages[page.page] for page in scored]))
    return rankings
