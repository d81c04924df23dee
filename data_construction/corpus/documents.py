"""What every corpus reader yields, documents with pages and questions, and how it lists what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_construction.corpus.page_cache import PageImage
from mmr5_train.ranking.records import Page, Question, Skipped

NOT_READ = "document can't be read"


@dataclass(frozen=True)
class Annotation:
    """A document as its questions name it, before its pages are read."""

    doc_name: str
    domain: str
    questions: tuple[Question, ...]
    rows: tuple[int, int] | None = None  # first and last row in MMDocIR's full page table, inclusive
    first_page: int = 0  # the number that whoever wrote the questions gives to the first page

    @property
    def stem(self) -> str:
        """The name MMDocIR's evaluation parquet uses."""
        return self.doc_name.removesuffix(".pdf")

    @property
    def n_pages(self) -> int | None:
        return None if self.rows is None else self.rows[1] - self.rows[0] + 1


@dataclass(frozen=True)
class Document:
    """A document with the pages that can be shown, in page order; their `image` is an absolute path."""

    doc_name: str
    domain: str
    n_pages: int
    sha256: str
    pages: tuple[Page, ...]
    questions: tuple[Question, ...]


def make_document(
    annotation: Annotation, n_pages: int, sha256: str, pages: list[Page], skipped: list[Skipped]
) -> Document:
    """The document with those questions whose relevant pages are all there; the others go to `skipped`."""
    shown = {page.page for page in pages}
    questions = []
    for question in annotation.questions:
        relevant = [page.page for page in question.positives]
        beyond = [page + annotation.first_page for page in relevant if page >= n_pages]
        lost = [page + annotation.first_page for page in relevant if page not in shown]
        if beyond:
            reason, detail = "page beyond the document", f"page_id {beyond} of a document with {n_pages} pages"
        elif lost:
            reason, detail = "relevant page can't be shown", f"page_id {lost}"
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
        text=text,
        description=description,
    )


def skip_document(
    annotation: Annotation, file: Path, why: str, skipped: list[Skipped], reason: str = NOT_READ
) -> None:
    """Lists the document and each of its questions."""
    skipped.append(Skipped(file=str(file), reason=reason, detail=why))
    for question in annotation.questions:
        skipped.append(Skipped(query_id=question.query_id, reason=reason, detail=str(file)))


def skip_page(file: Path, annotation: Annotation, page: int, why: str, skipped: list[Skipped]) -> None:
    detail = f"page {page} of {annotation.doc_name}: {why}"
    skipped.append(Skipped(file=str(file), reason="page can't be shown", detail=detail))
