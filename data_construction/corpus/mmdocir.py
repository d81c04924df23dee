"""Reads a corpus in MMDocIR's evaluation format, page pictures included.

A corpus folder holds `MMDocIR_annotations.jsonl`, one document with its questions a line, and the pages:
either `MMDocIR_pages.parquet` (image bytes and OCR text, one page a row) or a folder of PDFs, rendered here.

What can't be used is left out and listed as `Skipped`: the questions of a document that can't be read, pages
that can't be shown, questions whose labels don't fit the document. What makes the corpus as a whole unusable
raises `InputError`.
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
    first_rows,
    from_pages,
    image_data,
    open_table,
    read_page,
    wanted_rows,
)
from data_construction.corpus.pdfs import read_pdf_documents
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Skipped


def read_evaluation_documents(
    corpus: EvaluationSet, annotations: list[Annotation], skipped: list[Skipped]
) -> Iterator[Document]:
    """Documents one after the other, in the order of `annotations`, their page pictures in the cache.

    Raises `InputError` at once where the pages as a whole can't be used.
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
        f"{path}: no such file or folder; corpus.pages names the page parquet or the folder of PDFs in "
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
    """One pass over the rows; a document is yielded once its rows, and all documents before it, are read."""
    with table:
        rows = _locate_rows(path, table, annotations, skipped)  # of each document, row → page
        place = {row: (index, page) for index, pages in rows.items() for row, page in pages.items()}
        found: dict[int, dict[int, ReadPage]] = {index: {} for index in rows}
        for row, values in wanted_rows(path, table, columns, set(place)):
            index, page = place[row]
            data, texts = (
                image_data(values["image_binary"]),
                (values["ocr_text"] or "", values.get("vlm_text") or ""),
            )
            found[index][page] = read_page(path, cache, annotations[index], page, data, texts, row, skipped)
            while found and len(found[first := next(iter(found))]) == len(rows[first]):
                yield _parquet_document(path, annotations[first], found.pop(first), skipped)


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
            skip_document(annotation, path, f"{annotation.doc_name}: {why}", skipped)
            continue
        located[index] = first_rows(path, annotation, rows, numbers, skipped)
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


def _parquet_document(
    path: Path, annotation: Annotation, found: dict[int, ReadPage], skipped: list[Skipped]
) -> Document:
    n_pages = annotation.n_pages or max(found) + 1
    for page in sorted(set(range(n_pages)) - set(found)):
        skip_page(path, annotation, page, "no row holds it", skipped)
    return from_pages(annotation, n_pages, found, skipped)
