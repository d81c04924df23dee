"""Reads documents from a folder of PDFs: renders every page into the page cache and reads its text layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pypdfium2

from data_construction.corpus.documents import (
    Annotation,
    Document,
    make_document,
    make_page,
    skip_document,
    skip_page,
)
from data_construction.corpus.page_cache import PageCache, UnreadablePageError, page_text
from mmr5_train.common.files import file_hash
from mmr5_train.ranking.records import Page, Skipped


class _UnreadableDocumentError(Exception):
    """A document that can't be used. The message gives the reason and what to do."""


def read_pdf_documents(
    folder: Path, cache: PageCache, annotations: Iterable[Annotation], skipped: list[Skipped]
) -> Iterator[Document]:
    """Yields the annotated documents. Adds documents and pages that can't be read to `skipped`."""
    for annotation in annotations:
        path = folder / annotation.doc_name
        if not path.is_file():
            path = folder / f"{annotation.stem}.pdf"
        try:
            if Path(annotation.doc_name).name != annotation.doc_name:
                raise _UnreadableDocumentError("the document's name must be a plain file name")
            document = _read_pdf(path, cache, annotation, skipped)
        except _UnreadableDocumentError as error:
            skip_document(annotation, path, str(error), skipped)
        else:
            yield document


def _read_pdf(path: Path, cache: PageCache, annotation: Annotation, skipped: list[Skipped]) -> Document:
    try:
        sha256 = file_hash(path)
        pdf = pypdfium2.PdfDocument(path)
    except FileNotFoundError:
        raise _UnreadableDocumentError("no such file; copy the PDF there") from None
    except (OSError, pypdfium2.PdfiumError) as error:
        raise _UnreadableDocumentError(f"not a readable PDF ({error}); download it again") from None
    with pdf:
        n_pages = len(pdf)
        if annotation.n_pages not in (None, n_pages):
            raise _UnreadableDocumentError(
                f"the PDF has {n_pages} pages, but page_indices {annotation.n_pages}: another edition, for which "
                "the labels are wrong; download the annotated edition"
            )
        pdf.init_forms()  # render the contents of form fields
        pages = []
        for number in range(n_pages):
            try:
                pages.append(_pdf_page(pdf, number, sha256, cache, annotation))
            except (pypdfium2.PdfiumError, UnreadablePageError) as error:
                skip_page(path, annotation, number, str(error), skipped)
    return make_document(annotation, n_pages, sha256, pages, skipped)


def _pdf_page(
    pdf: pypdfium2.PdfDocument, number: int, sha256: str, cache: PageCache, annotation: Annotation
) -> Page:
    page = pdf[number]
    try:
        image = cache.from_pdf(annotation.doc_name, number, page, sha256)
        text = page_text(page)
    finally:
        page.close()
    return make_page(annotation, number, image, text)
