"""Small corpora in MMDocIR's format: PDFs with a text layer, and the page parquet."""

from __future__ import annotations

import ctypes
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pypdfium2
import pypdfium2.raw as pdfium
from PIL import Image

SCHEMA = pa.schema(
    [
        ("doc_name", pa.string()),
        ("domain", pa.string()),
        ("passage_id", pa.string()),
        ("image_path", pa.string()),
        ("image_binary", pa.binary()),
        ("ocr_text", pa.string()),
        ("vlm_text", pa.string()),
    ]
)


def write_pdf(path: Path, texts: Sequence[str], size: tuple[float, float] = (300, 400)) -> None:
    """A PDF with one page a text; an empty text gives a page without a text layer."""
    pdf = pypdfium2.PdfDocument.new()
    for text in texts:
        page = pdf.new_page(*size)
        for k, line in enumerate(text.split("\n") if text else []):
            words = pdfium.FPDFPageObj_NewTextObj(pdf, b"Helvetica", 12.0)
            units = [ord(letter) for letter in line] + [0]  # UTF-16
            pdfium.FPDFText_SetText(words, (ctypes.c_ushort * len(units))(*units))
            pdfium.FPDFPageObj_Transform(words, 1, 0, 0, 1, 20, size[1] - 40 - 20 * k)
            pdfium.FPDFPage_InsertObject(page, words)
        page.gen_content()
    path.parent.mkdir(parents=True, exist_ok=True)
    pdf.save(path)


def image_bytes(color: str = "white", size: tuple[int, int] = (60, 80), kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, kind)
    return stream.getvalue()


def page_row(
    doc_name: str, page: int | str, text: str = "", image: bytes | None = None, **more: Any
) -> dict[str, Any]:
    """A row of the page parquet; every page has its own colour unless image bytes are given."""
    number = int(page) if str(page).isdigit() else 0
    data = image_bytes(f"rgb({40 * number % 256}, 200, {len(doc_name)})") if image is None else image
    row = {
        "doc_name": doc_name,
        "domain": "Guidebook",
        "passage_id": str(page),
        "image_path": f"page_images/{doc_name}_{page}.jpg",
        "image_binary": data,
        "ocr_text": text,
        "vlm_text": f"a model's reading of page {page}",
    }
    return row | more


def write_parquet(path: Path, rows: list[dict[str, Any]], rows_a_group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=rows_a_group)


def question(text: str, pages: Any, kind: Any = "['Table']") -> dict[str, Any]:
    return {"Q": text, "A": "", "page_id": pages, "type": kind, "layout_mapping": []}


def line(
    doc_name: str, n_pages: int | None, *questions: dict[str, Any], first_row: int = 0, domain: str = "Guidebook"
) -> dict[str, Any]:
    indices = None if n_pages is None else [first_row, first_row + n_pages - 1]
    return {"doc_name": doc_name, "domain": domain, "page_indices": indices, "questions": list(questions)}


def write_lines(folder: Path, *lines: dict[str, Any] | str) -> None:
    """The annotations file; a string is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [value if isinstance(value, str) else json.dumps(value) for value in lines]
    (folder / "MMDocIR_annotations.jsonl").write_text("\n".join(written) + "\n")
