"""The documents that corpus readers yield, and helpers to record what they skip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_construction.corpus.page_cache import PageImage
from mmr5_train.ranking.records import Page, Question, Skipped

NOT_READ = "document can't be read"


@dataclass(frozen=True)
class Annotation:
    """A document with its questions, before its pages are read."""

    doc_name: str
    domain: str
    questions: tuple[Question, ...]
    rows: tuple[int, int] | None = None  # first and last row in MMDocIR's full page table, inclusive
    first_page: int = 0  # page number of the first page in the source of the questions

    @property
    def stem(self) -> str:
        """The document's name in MMDocIR's evaluation parquet."""
        return self.doc_name.removesuffix(".pdf")

    @property
    def n_pages(self) -> int | None:
        return None if self.rows is None else self.rows[1] - self.rows[0] + 1


@dataclass(frozen=True)
class Document:
    """A document with its readable pages in page order. `image` of a page is an absolute path."""

    doc_name: str
    domain: str
    n_pages: int
    sha256: str
    pages: tuple[Page, ...]
    questions: tuple[Question, ...]


def make_document(
    annotation: Annotation, n_pages: int, sha256: str, pages: list[Page], skipped: list[Skipped]
) -> Document:
    """The document with the questions whose relevant pages are all readable; adds the others to `skipped`."""
    readable = {page.page for page in pages}
    questions = []
    for question in annotation.questions:
        relevant = [page.page for page in question.positives if page.doc_name == annotation.doc_name]
        beyond = [page + annotation.first_page for page in relevant if page >= n_pages]
        unreadable = [page + annotation.first_page for page in relevant if page not in readable]
        if beyond:
            reason, detail = "page beyond the document", f"page_id {beyond} of a document with {n_pages} pages"
        elif unreadable:
            reason, detail = "relevant page can't be shown", f"page_id {unreadable}"
        else:
            questions.append(question)
            continue
        if annotation.first_page:
            detail = f"{detail.replace('page_id', 'page')}, counted from {annotation.first_page}"
        skipped.append(Skipped(query_id=question.query_id, reason=reason, detail=detail))
    return Document(annotation.doc_name, annotation.domain, n_pages, sha256, tuple(pages), tuple(questions))


def make_page(annotation: Annotation, number: int, image: PageImage, text: str, description: str = "") -> Page:
    return Page(
        doc_name=annotation.doc_name,
        page=number,
        domain=annotation.domain,
        image=image.path.as_posix(),
        width=image.width,
        height=image.height,
        source_width=image.source_width,
        source_height=image.source_height,
        text=text,
        text_source="corpus" if text.strip() else None,
        description=description,
    )


def skip_document(
    annotation: Annotation, file: Path, detail: str, skipped: list[Skipped], reason: str = NOT_READ
) -> None:
    """Adds the document and each of its questions to `skipped`."""
    skipped.append(Skipped(file=str(file), reason=reason, detail=detail))
    for question in annotation.questions:
        skipped.append(Skipped(query_id=question.query_id, reason=reason, detail=str(file)))


def skip_page(file: Path, annotation: Annotation, page: int, problem: str, skipped: list[Skipped]) -> None:
    detail = f"page {page} of {annotation.doc_name}: {problem}"
    skipped.append(Skipped(file=str(file), reason="page can't be shown", detail=detail))
