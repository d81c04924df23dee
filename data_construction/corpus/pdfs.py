"""Reads documents from a folder of PDFs: renders every page into the page cache and reads its text layer."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

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
    folder: Path,
    cache: PageCache,
    annotations: Iterable[Annotation],
    skipped: list[Skipped],
    workers: int | None = None,
) -> Iterator[Document]:
    """Yields the annotated documents, in their order. Adds documents and pages that can't be read to `skipped`.

    Other processes open the PDFs (`PdfProcess`), `workers` at a time; None: one per core.
    """
    with closing(Renderers(workers or os.cpu_count() or 1)) as renderers:
        for annotation, path, rendered in renderers.render_all(_requests(folder, cache, annotations)):
            problem = rendered.error or _wrong_number_of_pages(annotation, rendered.n_pages)
            if problem:
                skip_document(annotation, path, problem, skipped)
            else:
                yield _document(path, annotation, rendered, skipped)


Request = tuple[Annotation, Path, PdfRequest | None]
"""A document with its PDF; None if its name is not a plain file name."""


def _requests(folder: Path, cache: PageCache, annotations: Iterable[Annotation]) -> Iterator[Request]:
    for annotation in annotations:
        path = folder / annotation.doc_name
        if Path(annotation.doc_name).name != annotation.doc_name:
            yield annotation, path, None
            continue
        if not path.is_file():
            path = folder / f"{annotation.stem}.pdf"
        request = PdfRequest(path=path, doc_name=annotation.doc_name, pages=annotation.n_pages, cache=cache)
        yield annotation, path, request


class Renderers:
    """Several renderer processes. Each starts with its first document."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: SimpleQueue[PdfProcess] = SimpleQueue()
        self._processes = [PdfProcess() for _ in range(count)]
        for process in self._processes:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(count, "renderer")

    def render_all(self, requests: Iterable[Request]) -> Iterator[tuple[Annotation, Path, RenderedPdf]]:
        """The rendered PDFs in the order of the requests; at most two per process are rendered ahead."""
        running: deque[tuple[Annotation, Path, Future[RenderedPdf]]] = deque()
        for annotation, path, request in requests:
            running.append((annotation, path, self._threads.submit(self._render, request)))
            if len(running) > 2 * self._count:
                annotation, path, future = running.popleft()
                yield annotation, path, future.result()
        for annotation, path, future in running:
            yield annotation, path, future.result()

    def _render(self, request: PdfRequest | None) -> RenderedPdf:
        if request is None:
            return RenderedPdf(error="the document's name must be a plain file name")
        process = self._free.get()
        try:
            return process.render(request)
        finally:
            self._free.put(process)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.close()
        self._threads.shutdown()


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
