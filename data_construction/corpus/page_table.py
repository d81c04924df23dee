"""Page parquets, streamed: MMDocIR's evaluation set and each subset of its training set.

Both hold one page a row with its image bytes. Never more than a few rows and the documents that are not complete
yet are in memory, whatever the file's size.
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

BATCH_ROWS = 32  # rows of a page table in memory at a time

ReadPage = tuple[Page | None, str]
"""The page, None where it can't be shown, and the SHA-256 of its image bytes."""


def open_table(path: Path, columns: Sequence[str], image: str) -> pq.ParquetFile:
    """The open file.

    Raises `InputError` where it is absent, no parquet, or lacks a column, and where the column `image` holds
    neither bytes nor a struct with `bytes`.
    """
    try:
        # Buffered: a row group of gigabytes is not read in one piece.
        table = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error}); fetch it again") from None
    names = table.schema_arrow.names
    missing = [name for name in (*columns, image) if name not in names]
    if missing:
        raise InputError(f"{path}: lacks the column {', '.join(missing)}; found {', '.join(names)}")
    kind = table.schema_arrow.field(image).type
    held = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(held) or pa.types.is_large_binary(held)):
        raise InputError(f"{path}: column {image} must hold bytes, found {kind}")
    return table


def image_data(value: Any) -> bytes:
    """Image bytes of a cell: as they are, or in a struct with `bytes`; none where the cell is empty."""
    return (value.get("bytes") if isinstance(value, dict) else value) or b""


def wanted_rows(
    path: Path, table: pq.ParquetFile, columns: Sequence[str], wanted: set[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, values) of the wanted rows, in file order; row groups without any are not read."""
    first = 0
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group).num_rows
        if not wanted.isdisjoint(range(first, first + size)):
            row = first
            try:
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns)):
                    for i in range(batch.num_rows):
                        if row + i in wanted:
                            yield row + i, {name: batch[name][i].as_py() for name in columns}
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path}: broken near row {row} ({error}); fetch it again") from None
        first += size


def first_rows(
    path: Path, annotation: Annotation, rows: Sequence[int], pages: Sequence[int], skipped: list[Skipped]
) -> dict[int, int]:
    """row → page, the first row of each page; further rows of a page go to `skipped`."""
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
    """A page from its image bytes and its texts (text, description)."""
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = cache.from_bytes(annotation.doc_name, number, data)
    except UnreadablePageError as error:
        skip_page(path, annotation, number, f"{error} (row {row})", skipped)
        return None, digest
    return make_page(annotation, number, image, *texts), digest


def from_pages(
    annotation: Annotation, n_pages: int, found: dict[int, ReadPage], skipped: list[Skipped]
) -> Document:
    """The document made of the pages `found`, hashed over the hashes of its images in page order."""
    in_order = [found[page] for page in sorted(found)]
    sha256 = hashlib.sha256("".join(digest for _, digest in in_order).encode()).hexdigest()
    return make_document(annotation, n_pages, sha256, [page for page, _ in in_order if page], skipped)
