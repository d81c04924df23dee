"""First-stage retrieval: the pages of a question's own document, best first.

Two ways (config group `retriever`): BM25 over page text, built in; or the scores of any other retriever, from
a file. MMDocIR retrieves pages within a document, so each document is its own index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import bm25s
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_construction.corpus.mmdocir import Document
from mmr5_train.ranking.files import InputError, read_json_lines, validation_message
from mmr5_train.ranking.records import Page, PageId, Question, Skipped

Ranked = list[tuple[Page, float]]
"""Pages with their scores, best first."""

RankDocument = Callable[[Document], list[Ranked]]
"""Ranks the pages of a document for each of its questions."""

TREC_SUFFIXES = (".trec", ".run", ".txt")


class Retriever(BaseModel):
    """Config group `retriever`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["bm25", "scores"]
    file: Path | None = Field(default=None, description="for `scores`: JSON Lines, or a TREC run")

    @model_validator(mode="after")
    def _file_fits_name(self) -> Self:
        if self.name == "scores" and self.file is None:
            raise ValueError("retriever=scores needs a file: retriever.file=…")
        if self.name == "bm25" and self.file is not None:
            raise ValueError("a file needs retriever=scores")
        return self


class ScoreLine(BaseModel):
    """A line of a score file."""

    model_config = ConfigDict(extra="ignore")

    query_id: str
    doc_name: str
    page: int = Field(ge=0)
    score: float = Field(allow_inf_nan=False)


def open_retriever(retriever: Retriever, questions: Sequence[Question], skipped: list[Skipped]) -> RankDocument:
    """The first stage for these questions. Reads a score file whole, so that its mistakes show at once."""
    if retriever.file is None:
        return rank_by_bm25
    path = retriever.file
    scores = read_scores(path, questions, skipped)
    return lambda document: rank_by_scores(path, scores, document)


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
        scored = [(page, of_pages[page.page]) for page in document.pages if page.page in of_pages]
        rankings.append(sorted(scored, key=lambda pair: -pair[1]))
    return rankings


def read_scores(path: Path, questions: Sequence[Question], skipped: list[Skipped]) -> dict[str, dict[int, float]]:
    """query id → page → score, from JSON Lines (query_id, doc_name, page, score) or a TREC run.

    Raises `InputError` for a broken or repeated line, a page of another document, and a question that has no
    score. Scores of questions that are not asked are passed over and noted in `skipped`.
    """
    asked = {question.query_id: question for question in questions}
    scores: dict[str, dict[int, float]] = {query_id: {} for query_id in asked}
    unknown: dict[str, None] = {}
    for number, line in _score_lines(path):
        if line.query_id not in asked:
            unknown[line.query_id] = None
            continue
        question = asked[line.query_id]
        if line.doc_name.removesuffix(".pdf") != question.doc_name.removesuffix(".pdf"):
            raise InputError(
                f"{path}, line {number}: scores a page of {line.doc_name!r} for {line.query_id}, which asks about "
                f"{question.doc_name!r}"
            )
        if line.page in scores[line.query_id]:
            page = PageId(doc_name=line.doc_name, page=line.page)
            raise InputError(f"{path}, line {number}: a second score of page {page} for {line.query_id}")
        scores[line.query_id][line.page] = line.score
    lacking = [query_id for query_id in asked if not scores[query_id]]
    if lacking:
        raise InputError(
            f"{path}: lacks scores for {len(lacking)} of {len(asked)} questions, the first is {lacking[0]!r}; "
            "query ids are <doc_name>/<number of the question in its line, from 0>"
        )
    if unknown:
        detail = f"{len(unknown)} questions, the first is {next(iter(unknown))}"
        skipped.append(Skipped(file=str(path), reason="scores of questions not in the corpus", detail=detail))
    return scores


def _score_lines(path: Path) -> Iterator[tuple[int, ScoreLine]]:
    if path.suffix == ".jsonl":
        lines = read_json_lines(path)
    elif path.suffix in TREC_SUFFIXES:
        lines = _trec_lines(path)
    else:
        raise InputError(
            f"{path}: the name must end in .jsonl (JSON Lines of query_id, doc_name, page, score) or in "
            f"{', '.join(TREC_SUFFIXES)} (a TREC run)"
        )
    for number, value in lines:
        try:
            yield number, ScoreLine.model_validate(value)
        except ValidationError as error:
            raise InputError(f"{path}, line {number}: {validation_message(error)}") from None


def _trec_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines of `qid Q0 docid rank score tag`; docid is <doc_name>#<page>. The rank is not read: scores decide."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; write it with your retriever first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 6:
            raise InputError(
                f"{path}, line {number}: expected `qid Q0 docid rank score tag`, found {len(fields)} fields; "
                "names with spaces need JSON Lines"
            )
        doc_name, mark, page = fields[2].rpartition("#")
        if not mark or not page.isdecimal():
            raise InputError(f"{path}, line {number}: docid must be <doc_name>#<page>, found {fields[2]!r}")
        yield number, {"query_id": fields[0], "doc_name": doc_name, "page": page, "score": fields[4]}
