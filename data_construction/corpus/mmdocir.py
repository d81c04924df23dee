"""Reads a corpus in MMDocIR's evaluation format, page pictures included.

A corpus folder holds `MMDocIR_annotations.jsonl`, one document with its questions a line, and the pages:
either `MMDocIR_pages.parquet` (image bytes and OCR text, one page a row) or a folder of PDFs, rendered here.

What can't be used is left out and listed as `Skipped`: the questions of a document that can't be read, pages
that can't be shown, questions whose labels don't fit the document. What makes the corpus as a whole unusable
raises `InputError`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pypdfium2

from data_construction.corpus.annotations import Annotation, Corpus
from data_construction.corpus.page_cache import PageCache, PageImage, UnreadablePageError, page_text
from mmr5_train.ranking.files import InputError, file_hash
from mmr5_train.ranking.records import Page, Question, Skipped

NOT_READ = "document can't be read"
BATCH_ROWS = 32  # rows of the page table in memory at a time


@dataclass(frozen=True)
class Document:
    """A document with the pages that can be shown, in page order; their `image` is an absolute path."""

    doc_name: str
    domain: str
    n_pages: int
    sha256: str
    pages: tuple[Page, ...]
    questions: tuple[Question, ...]


class _UnreadableDocumentError(Exception):
    """A document that must be left out. The message says why, and what to do."""


def read_documents(corpus: Corpus, annotations: list[Annotation], skipped: list[Skipped]) -> Iterator[Document]:
    """Documents one after the other, in the order of `annotations`, their page pictures in the cache.

    Raises `InputError` at once where the pages as a whole can't be used.
    """
    path = corpus.pages_path
    cache = PageCache(corpus.page_cache, corpus.dpi, corpus.max_side)
    if path.is_dir():
        return _read_pdf_documents(path, cache, annotations, skipped)
    if path.is_file():
        columns = ["image_binary", "ocr_text"] + (["vlm_text"] if corpus.descriptions else [])
        table = _open_parquet(path, ["doc_name", "passage_id", *columns])
        return _read_parquet_documents(path, table, columns, cache, annotations, skipped)
    raise InputError(
        f"{path}: no such file or folder; corpus.pages names the page parquet or the folder of PDFs in "
        f"{corpus.folder}"
    )


def _document(
    annotation: Annotation, n_pages: int, sha256: str, pages: list[Page], skipped: list[Skipped]
) -> Document:
    """The document with those questions whose relevant pages are all there."""
    shown = {page.page for page in pages}
    questions = []
    for question in annotation.questions:
        relevant = [page.page for page in question.positives]
        beyond = [page for page in relevant if page >= n_pages]
        lost = [page for page in relevant if page not in shown]
        if beyond:
            reason, detail = "page beyond the document", f"page_id {beyond} of a document with {n_pages} pages"
        elif lost:
            reason, detail = "relevant page can't be shown", f"page_id {lost}"
        else:
            questions.append(question)
            continue
        skipped.append(Skipped(query_id=question.query_id, reason=reason, detail=detail))
    return Document(annotation.doc_name, annotation.domain, n_pages, sha256, tuple(pages), tuple(questions))


def _skip_document(annotation: Annotation, file: Path, why: str, skipped: list[Skipped]) -> None:
    skipped.append(Skipped(file=str(file), reason=NOT_READ, detail=why))
    for question in annotation.questions:
        skipped.append(Skipped(query_id=question.query_id, reason=NOT_READ, detail=str(file)))


def _skip_page(file: Path, annotation: Annotation, page: int, why: str, skipped: list[Skipped]) -> None:
    detail = f"page {page} of {annotation.doc_name}: {why}"
    skipped.append(Skipped(file=str(file), reason="page can't be shown", detail=detail))


def _page(annotation: Annotation, number: int, image: PageImage, text: str, description: str = "") -> Page:
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


# Pages from PDFs.


def _read_pdf_documents(
    folder: Path, cache: PageCache, annotations: list[Annotation], skipped: list[Skipped]
) -> Iterator[Document]:
    for annotation in annotations:
        path = folder / annotation.doc_name
        if not path.is_file():
            path = folder / f"{annotation.stem}.pdf"
        try:
            if Path(annotation.doc_name).name != annotation.doc_name:
                raise _UnreadableDocumentError("the document's name must be a plain file name")
            document = _read_pdf(path, cache, annotation, skipped)
        except _UnreadableDocumentError as error:
            _skip_document(annotation, path, str(error), skipped)
        else:
            yield document


def _read_pdf(path: Path, cache: PageCache, annotation: Annotation, skipped: list[Skipped]) -> Document:
    try:
        sha256 = file_hash(path)
        pdf = pypdfium2.PdfDocument(path)
    except FileNotFoundError:
        raise _UnreadableDocumentError("no such file; put the PDF there") from None
    except (OSError, pypdfium2.PdfiumError) as error:
        raise _UnreadableDocumentError(f"not a PDF that can be opened ({error}); fetch it again") from None
    with pdf:
        n_pages = len(pdf)
        if annotation.n_pages not in (None, n_pages):
            raise _UnreadableDocumentError(
                f"has {n_pages} pages, page_indices tell of {annotation.n_pages}: another edition, whose labels "
                "would be wrong; fetch the one that was annotated"
            )
        pdf.init_forms()  # so that what was filled in is drawn
        pages = []
        for number in range(n_pages):
            try:
                pages.append(_pdf_page(pdf, number, sha256, cache, annotation))
            except (pypdfium2.PdfiumError, UnreadablePageError) as error:
                _skip_page(path, annotation, number, str(error), skipped)
    return _document(annotation, n_pages, sha256, pages, skipped)


def _pdf_page(
    pdf: pypdfium2.PdfDocument, number: int, sha256: str, cache: PageCache, annotation: Annotation
) -> Page:
    page = pdf[number]
    try:
        image = cache.from_pdf(annotation.doc_name, number, page, sha256)
        text = page_text(page)
    finally:
        page.close()
    return _page(annotation, number, image, text)


# Pages from the page parquet.


def _read_parquet_documents(
    path: Path,
    table: pq.ParquetFile,
    columns: list[str],
    cache: PageCache,
    annotations: list[Annotation],
    skipped: list[Skipped],
) -> Iterator[Document]:
    """One pass over the rows; a document is yielded once its rows, and all documents before it, are read."""
    with table:
        rows = _locate_rows(path, table, annotations, skipped)  # of each document, row → page
        place = {row: (index, page) for index, pages in rows.items() for row, page in pages.items()}
        found: dict[int, dict[int, tuple[Page | None, str]]] = {index: {} for index in rows}
        for row, values in _wanted_rows(path, table, columns, set(place)):
            index, page = place[row]
            found[index][page] = _parquet_page(path, cache, annotations[index], page, values, skipped)
            while found and len(found[first := next(iter(found))]) == len(rows[first]):
                yield _parquet_document(path, annotations[first], found.pop(first), skipped)


def _open_parquet(path: Path, columns: list[str]) -> pq.ParquetFile:
    try:
        # Buffered: a row group of gigabytes is not read in one piece.
        table = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error}); fetch it again") from None
    names = table.schema_arrow.names
    missing = [name for name in columns if name not in names]
    if missing:
        raise InputError(f"{path}: lacks the column {', '.join(missing)}; found {', '.join(names)}")
    kind = table.schema_arrow.field("image_binary").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise InputError(f"{path}: column image_binary must hold bytes, found {kind}")
    return table


def _locate_rows(
    path: Path, table: pq.ParquetFile, annotations: list[Annotation], skipped: list[Skipped]
) -> dict[int, dict[int, int]]:
    """Index of a document → its rows → the page in each. Documents whose rows don't fit are left out."""
    keys = table.read(columns=["doc_name", "passage_id"])
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(keys["doc_name"].to_pylist()):
        rows_of.setdefault(str(name).removesuffix(".pdf"), []).append(row)
    passage_ids = keys["passage_id"].to_pylist()
    located = {}
    for index, annotation in enumerate(annotations):
        rows = rows_of.get(annotation.stem, [])
        numbers = _page_numbers([str(passage_ids[row]) for row in rows], rows, annotation)
        n_pages = annotation.n_pages or len(rows)
        beyond = [row for row, page in zip(rows, numbers, strict=True) if not 0 <= page < n_pages]
        if not rows or beyond:
            why = f"row {beyond[0]} is no page of it: it has {n_pages}" if beyond else "no row holds a page of it"
            _skip_document(annotation, path, f"{annotation.doc_name}: {why}", skipped)
            continue
        row_of: dict[int, int] = {}
        for row, page in zip(rows, numbers, strict=True):
            if row_of.setdefault(page, row) != row:
                detail = f"row {row} repeats row {row_of[page]}: page {page} of {annotation.doc_name}"
                skipped.append(Skipped(file=str(path), reason="duplicate row", detail=detail))
        located[index] = {row: page for page, row in row_of.items()}
    return located


def _page_numbers(passage_ids: list[str], rows: list[int], annotation: Annotation) -> list[int]:
    """Zero-based page of each row: its passage_id, counted from 0 or from 1; where those are no numbers, its
    distance from the first row of `page_indices`.
    """
    if all(text.isascii() and text.isdigit() for text in passage_ids):
        numbers = [int(text) for text in passage_ids]
        n_pages = annotation.n_pages or len(set(numbers))
        from_one = bool(numbers) and min(numbers) == 1 and max(numbers) == n_pages
        return [number - 1 for number in numbers] if from_one else numbers
    first = annotation.rows[0] if annotation.rows else rows[0]
    return [row - first for row in rows]


def _wanted_rows(
    path: Path, table: pq.ParquetFile, columns: list[str], wanted: set[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, values) of the wanted rows, in file order; row groups without any are not read."""
    first = 0
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group).num_rows
        if not wanted.isdisjoint(range(first, first + size)):
            row = first
            try:
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    for i in range(batch.num_rows):
                        if row + i in wanted:
                            yield row + i, {name: batch[name][i].as_py() for name in columns}
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path}: broken near row {row} ({error}); fetch it again") from None
        first += size


def _parquet_page(
    path: Path, cache: PageCache, annotation: Annotation, page: int, row: dict[str, Any], skipped: list[Skipped]
) -> tuple[Page | None, str]:
    """The page, None where it can't be shown, and the hash of its image bytes."""
    data = row["image_binary"] or b""
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = cache.from_bytes(annotation.doc_name, page, data)
    except UnreadablePageError as error:
        _skip_page(path, annotation, page, str(error), skipped)
        return None, digest
    made = _page(annotation, page, image, row["ocr_text"] or "", row.get("vlm_text") or "")
    return made, digest


def _parquet_document(
    path: Path, annotation: Annotation, found: dict[int, tuple[Page | None, str]], skipped: list[Skipped]
) -> Document:
    n_pages = annotation.n_pages or max(found) + 1
    for page in sorted(set(range(n_pages)) - set(found)):
        _skip_page(path, annotation, page, "no row holds it", skipped)
    in_order = [found[page] for page in sorted(found)]
    sha256 = hashlib.sha256("".join(digest for _, digest in in_order).encode()).hexdigest()
    return _document(annotation, n_pages, sha256, [page for page, _ in in_order if page], skipped)
