"""Small corpora in MMDocIR's formats: PDFs with a text layer, the page parquet, and the training set."""

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
    """Writes a PDF with one page per text. An empty text gives a page without a text layer."""
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
    """A row of the page parquet. Every page has its own colour unless image bytes are given."""
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


def write_parquet(path: Path, rows: list[dict[str, Any]], rows_per_group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=rows_per_group)


def question(text: str, pages: Any, kind: Any = "['Table']") -> dict[str, Any]:
    return {"Q": text, "A": "", "page_id": pages, "type": kind, "layout_mapping": []}


def line(
    doc_name: str, n_pages: int | None, *questions: dict[str, Any], first_row: int = 0, domain: str = "Guidebook"
) -> dict[str, Any]:
    indices = None if n_pages is None else [first_row, first_row + n_pages - 1]
    return {"doc_name": doc_name, "domain": domain, "page_indices": indices, "questions": list(questions)}


def write_lines(folder: Path, *lines: dict[str, Any] | str) -> None:
    """Writes the annotations file. A string is written unchanged, to test invalid lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines_text = [value if isinstance(value, str) else json.dumps(value) for value in lines]
    (folder / "MMDocIR_annotations.jsonl").write_text("\n".join(lines_text) + "\n")


# The training set.

LAYOUT = pa.struct([("type", pa.string()), ("bbox", pa.list_(pa.float64())), ("text", pa.string())])
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def train_page(file_name: str, page: Any, text: str = "", image: Any = None) -> dict[str, Any]:
    """A row of a subset's parquet, with one layout per line of `text`. Every page has its own image."""
    shade = sum(f"{file_name}{page}".encode())
    layouts = [{"type": "text", "bbox": [0.0, 0.0, 60.0, 8.0], "text": line} for line in text.split("\n")]
    return {
        "file_name": file_name,
        "page": page,
        "domain": "Research report",
        "image": image_bytes(f"rgb({shade % 256}, {shade // 256}, 90)") if image is None else image,
        "page_size": [60.0, 80.0],
        "layouts": layouts,
    }


def train_line(query_id: Any, query: str, *positives: tuple[str, Any]) -> dict[str, Any]:
    passages = [{"doc_name": name, "page_id": page} for name, page in positives]
    negative = [{"doc_name": "another document", "page_id": 0}]
    return {"query_id": query_id, "query": query, "positive_passages": passages, "negative_passages": negative}


def write_subset(
    folder: Path,
    subset: str,
    rows: Sequence[dict[str, Any]],
    lines: Sequence[dict[str, Any] | str],
    struct: bool = False,
    rows_per_group: int = 4,
) -> None:
    """Writes a subset of the training set. `struct`: images are structs with `bytes`, as `datasets` writes."""
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    if struct:
        columns["image"] = pa.array([{"bytes": data, "path": None} for data in columns["image"]], IMAGE)
    columns["layouts"] = pa.array(columns["layouts"], pa.list_(LAYOUT))
    (folder / "parquet").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"parquet/{subset}_filter.parquet", row_group_size=rows_per_group)
    questions = folder / f"annotations_top1_negative/{subset}_train.jsonl"
    questions.parent.mkdir(exist_ok=True)
    lines_text = [value if isinstance(value, str) else json.dumps(value) for value in lines]
    questions.write_text("\n".join(lines_text) + "\n")
