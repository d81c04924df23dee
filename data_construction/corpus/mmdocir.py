"""Reads the documents of a corpus in MMDocIR's evaluation format, including page images.

A corpus folder contains `MMDocIR_annotations.jsonl` (one document with its questions per line) and the pages:
either `MMDocIR_pages.parquet` (image bytes and OCR text, one page per row) or a folder of PDFs to render.

What can't be used is skipped and recorded as `Skipped`: unreadable documents with their questions, unreadable
pages, and questions whose labels do not fit the document. A problem of the whole corpus raises `InputError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from data_construction.corpus.annotations import EvaluationSet
from data_construction.corpus.documents import Annotation, Document, skip_document, skip_page
from data_construction.corpus.page_cache import PageCache
from data_construction.corpus.page_table import (
    ReadPage,
    assemble_document,
    first_rows,
    image_data,
    open_table,
    read_page,
    read_rows,
)
from data_construction.corpus.pdfs import read_pdf_documents
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Skipped


def read_evaluation_documents(
    corpus: EvaluationSet, annotations: list[Annotation], skipped: list[Skipped]
) -> Iterator[Document]:
    """Yields the documents in the order of `annotations`, with their page images in the cache.

    Raises `InputError` at the call, not at the first document, if the parquet or the folder can't be used.
    """
    path = corpus.pages_path
    cache = PageCache(corpus.page_cache, corpus.dpi, corpus.max_side)
    if path.is_dir():
        return read_pdf_documents(path, cache, annotations, skipped)
    if path.is_file():
        columns = ["ocr_text"] + (["vlm_text"] if corpus.descriptions else [])
        table = open_table(path, ["doc_name", "passage_id", *columns], image="image_binary")
        return _read_parquet_documents(path, table, [*columns, "image_binary"], cache, annotations, skipped)
    raise InputError(
        f"{path}: no such file or folder; set corpus.pages=… to the page parquet or the folder of PDFs in "
        f"{corpus.folder}"
    )


def _read_parquet_documents(
    path: Path,
    table: pq.ParquetFile,
    columns: list[str],
    cache: PageCache,
    annotations: list[Annotation],
    skipped: list[Skipped],
) -> Iterator[Document]:
    """Reads the rows once. Yields a document when its rows and all documents before it have been read."""
    with table:
        rows = _locate_rows(path, table, annotations, skipped)
        location = {row: (index, page) for index, pages in rows.items() for row, page in pages.items()}
        pages_of: dict[int, dict[int, ReadPage]] = {index: {} for index in rows}
        for row, values in read_rows(path, table, columns, set(location)):
            index, page = location[row]
            data = image_data(values["image_binary"])
            texts = (values["ocr_text"] or "", values.get("vlm_text") or "")
            pages_of[index][page] = read_page(path, cache, annotations[index], page, data, texts, row, skipped)
            while pages_of and len(pages_of[first := next(iter(pages_of))]) == len(rows[first]):
                yield _parquet_document(path, annotations[first], pages_of.pop(first), skipped)


def _locate_rows(
    path: Path, table: pq.ParquetFile, annotations: list[Annotation], skipped: list[Skipped]
) -> dict[int, dict[int, int]]:
    """Index of a document → row → page. Adds documents whose rows do not fit the annotation to `skipped`."""
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
            problem = (
                f"row {beyond[0]} is not one of its {n_pages} pages" if beyond else "the parquet has no row for it"
            )
            skip_document(annotation, path, f"{annotation.doc_name}: {problem}", skipped)
            continue
        located[index] = first_rows(path, annotation, rows, numbers, skipped)
    return located


def _page_numbers(passage_ids: list[str], rows: list[int], annotation: Annotation) -> list[int]:
    """Zero-based page of each row.

    It is the passage_id, which may count from 0 or from 1. If the ids are not numbers, it is the distance from the
    first row of `page_indices`.
    """
    if all(text.isascii() and text.isdigit() for text in passage_ids):
        numbers = [int(text) for text in passage_ids]
        n_pages = annotation.n_pages or len(set(numbers))
        from_one = bool(numbers) and min(numbers) == 1 and max(numbers) == n_pages
        return [number - 1 for number in numbers] if from_one else numbers
    first = annotation.rows[0] if annotation.rows else rows[0]
    return [row - first for row in rows]


def _parquet_document(
    path: Path, annotation: Annotation, pages: dict[int, ReadPage], skipped: list[Skipped]
) -> Document:
    n_pages = annotation.n_pages or max(pages) + 1
    for page in sorted(set(range(n_pages)) - set(pages)):
        skip_page(path, annotation, page, "the parquet has no row for it", skipped)
    return assemble_document(annotation, n_pages, pages, skipped)
