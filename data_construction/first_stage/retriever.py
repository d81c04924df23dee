"""First-stage retrieval: ranks the pages of a question's document.

The config group `retriever` has three options: BM25 over page texts (`bm25.py`), a visual retriever (`dense.py`),
and scores of any other retriever from files (`score_files.py`). As in MMDocIR, retrieval is within one document,
so each document is its own index; `corpus_scope.py` ranks the pages of all documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_construction.corpus.documents import Document
from data_construction.first_stage.bm25 import rank_by_bm25
from data_construction.first_stage.dense import Dense, open_dense
from data_construction.first_stage.score_files import read_scores, score_files
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Page, Question, Skipped

RankedPages = list[tuple[Page, float]]
"""Pages with their scores, best first."""

RankDocument = Callable[[Document], list[RankedPages]]
"""Ranks the pages of a document for each of its questions."""


class Retriever(BaseModel):
    """Config group `retriever`: BM25, or scores from files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["bm25", "scores"]
    file: Path | None = Field(
        default=None, description="for `scores`: JSON Lines, a TREC run, or MM-R5's score JSON"
    )
    scope: Literal["document", "corpus"] = Field(
        default="document",
        description="bm25: rank the pages of the question's document, or of all documents of its split",
    )

    @model_validator(mode="after")
    def _file_fits_name(self) -> Self:
        if self.name == "scores" and self.file is None:
            raise ValueError("retriever=scores needs retriever.file=…")
        if self.name == "bm25" and self.file is not None:
            raise ValueError("retriever.file is only for retriever=scores")
        if self.name == "scores" and self.scope == "corpus":
            raise ValueError("retriever.scope=corpus is only for retriever=bm25")
        return self

    @property
    def inputs(self) -> list[Path]:
        """The files whose hashes are written to the manifest."""
        return [] if self.file is None else score_files(self.file)


RetrieverConfig = Annotated[Retriever | Dense, Field(discriminator="name")]


def open_retriever(
    retriever: RetrieverConfig, questions: Sequence[Question], skipped: list[Skipped]
) -> RankDocument:
    """The first stage for these questions.

    Loads a dense model, or reads and checks all score files, before it returns.
    """
    if isinstance(retriever, Dense):
        score = open_dense(retriever)
        return lambda document: [best_first(document.pages, scores) for scores in score(document)]
    if retriever.file is None:
        return rank_by_bm25
    path = retriever.file
    scores = read_scores(path, questions, skipped)
    return lambda document: rank_by_scores(path, scores, document)


def best_first(pages: Sequence[Page], scores: Sequence[float]) -> RankedPages:
    """Pages with their scores, highest first; equal scores in page order."""
    return sorted(zip(pages, scores, strict=True), key=lambda pair: -pair[1])


def rank_by_scores(path: Path, scores: dict[str, dict[int, float]], document: Document) -> list[RankedPages]:
    """For each question of the document, the pages that have a score, highest first; equal scores in page order.

    Raises `InputError` if a score is for a page that the document does not have.
    """
    rankings = []
    for question in document.questions:
        page_scores = scores[question.query_id]
        for page in page_scores:
            if page >= document.n_pages:
                raise InputError(
                    f"{path}: scores page {page} for {question.query_id}, but {document.doc_name} has "
                    f"{document.n_pages} pages, counted from 0"
                )
        scored = [page for page in document.pages if page.page in page_scores]
        rankings.append(best_first(scored, [page_scores[page.page] for page in scored]))
    return rankings
