"""Reads documents from a folder of PDFs: renders every page into the page cache and reads its text layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from data_construction.corpus.documents import (
    Annotation,
    Document,
    make_document,
    make_page,
    skip_document,
    skip_page,
)
from data_construction.corpus.page_cache import PageCache
from data_construction.corpus.pdf_process import PdfProcess, PdfRequest, RenderedPdf
from mmr5_train.ranking.records import Skipped


def read_pdf_documents(
    folder: Path, cache: PageCache, annotations: Iterable[Annotation], skipped: list[Skipped]
) -> Iterator[Document]:
    """Yields the annotated documents. Adds documents and pages that can't be read to `skipped`.

    Another process opens the PDFs (`PdfProcess`).
    """
    with closing(PdfProcess()) as process:
        for annotation in annotations:
            path = folder / annotation.doc_name
            if not path.is_file():
                path = folder / f"{annotation.stem}.pdf"
            problem, rendered = "the document's name must be a plain file name", RenderedPdf()
            if Path(annotation.doc_name).name == annotation.doc_name:
                request = PdfRequest(
                    path=path, doc_name=annotation.doc_name, pages=annotation.n_pages, cache=cache
                )
                rendered = process.render(request)
                problem = rendered.error or _wrong_number_of_pages(annotation, rendered.n_pages)
            if problem:
                skip_document(annotation, path, problem, skipped)
            else:
                yield _document(path, annotation, rendered, skipped)


def _wrong_number_of_pages(annotation: Annotation, n_pages: int) -> str:
    if annotation.n_pages in (None, n_pages):
        return ""
    return (
        f"the PDF has {n_pages} pages, but page_indices {annotation.n_pages}: another edition, for which the "
        "labels are wrong; download the annotated edition"
    )


def _document(path: Path, annotation: Annotation, rendered: RenderedPdf, skipped: list[Skipped]) -> Document:
    pages = []
    for number, page in enumerate(rendered.pages):
        if page.image is None:
            skip_page(path, annotation, number, page.problem, skipped)
        else:
            pages.append(make_page(annotation, number, page.image, page.text))
    return make_document(annotation, rendered.n_pages, rendered.sha256, pages, skipped)
