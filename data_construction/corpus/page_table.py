"""Streams page parquets: that of MMDocIR's evaluation set, and those of its training subsets.

Each row is one page with its image bytes. Only a few rows and the incomplete documents are in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_construction.corpus.documents import Annotation, Document, make_document, make_page, skip_page
from data_construction.corpus.page_cache import PageCache, UnreadablePageError
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Page, Skipped

BATCH_ROWS = 32  # rows read at a time

ReadPage = tuple[Page | None, str]
"""The page (None if its image is unreadable) and the SHA-256 of its image bytes."""


def open_table(path: Path, columns: Sequence[str], image: str) -> pq.ParquetFile:
    """Opens a parquet file.

    Raises `InputError` if it does not exist, is not a parquet file, lacks a column, or if the column `image`
    contains neither bytes nor a struct with `bytes`.
    """
    try:
        # Buffered, so that a row group of gigabytes is not read at once.
        table = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error}); download it again") from None
    names = table.schema_arrow.names
    missing = [name for name in (*columns, image) if name not in names]
    if missing:
        raise InputError(f"{path}: has no column {', '.join(missing)}; found {', '.join(names)}")
    kind = table.schema_arrow.field(image).type
    values = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(values) or pa.types.is_large_binary(values)):
        raise InputError(f"{path}: column {image} must contain bytes, found {kind}")
    return table


def image_data(value: Any) -> bytes:
    """Image bytes of a cell, which has bytes or a struct with `bytes`; b"" if the cell is empty."""
    return (value.get("bytes") if isinstance(value, dict) else value) or b""


def read_rows(
    path: Path, table: pq.ParquetFile, columns: Sequence[str], rows: set[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row, values) for `rows`, in file order. Row groups without such a row are not read."""
    first = 0
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group).num_rows
        if not rows.isdisjoint(range(first, first + size)):
            row = first
            try:
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns)):
                    for i in range(batch.num_rows):
                        if row + i in rows:
                            yield row + i, {name: batch[name][i].as_py() for name in columns}
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path}: corrupt near row {row} ({error}); download it again") from None
        first += size


def first_rows(
    path: Path, annotation: Annotation, rows: Sequence[int], pages: Sequence[int], skipped: list[Skipped]
) -> dict[int, int]:
    """row → page, with the first row of each page. Adds further rows of a page to `skipped`."""
    row_of: dict[int, int] = {}
    for row, page in zip(rows, pages, strict=True):
        if row_of.setdefault(page, row) != row:
            detail = f"row {row} repeats row {row_of[page]}: page {page} of {annotation.doc_name}"
            skipped.append(Skipped(file=str(path), reason="duplicate row", detail=detail))
    return {row: page for page, row in row_of.items()}


def read_page(
    path: Path,
    cache: PageCache,
    annotation: Annotation,
    number: int,
    data: bytes,
    texts: tuple[str, str],
    row: int,
    skipped: list[Skipped],
) -> ReadPage:
    """A page from its image bytes and `texts` (text, description). Adds an unreadable page to `skipped`."""
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = cache.from_bytes(annotation.doc_name, number, data)
    except UnreadablePageError as error:
        skip_page(path, annotation, number, f"{error} (row {row})", skipped)
        return None, digest
    return make_page(annotation, number, image, *texts), digest


def assemble_document(
    annotation: Annotation, n_pages: int, pages: dict[int, ReadPage], skipped: list[Skipped]
) -> Document:
    """The document with these pages. Its hash is over the hashes of its images in page order."""
    in_order = [pages[page] for page in sorted(pages)]
    sha256 = hashlib.sha256("".join(digest for _, digest in in_order).encode()).hexdigest()
    return make_document(annotation, n_pages, sha256, [page for page, _ in in_order if page], skipped)
