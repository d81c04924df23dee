"""Writes files in MMDocIR's formats with the published numbers of documents and questions, and tiny pages.

The training set has 7 subsets, 6,878 documents and 73,843 questions; the evaluation set has 313 documents and
1,658 questions. Subsets differ in size and in pages per document, as the published ones do. `scale` shrinks all
numbers.

BM25 finds the relevant page of most questions among its first five pages; `MISSED` of the questions ask for words
of another page. Some documents have fewer than five pages. Some training documents equal an evaluation document by
name or by content, and some are copies of another one. Pages have a few pixels, in several sizes.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


class SubsetSize(NamedTuple):
    documents: int
    questions: int
    pages: int
    """Mean number of pages of a document."""


SUBSETS = {
    "MP-DocVQA": SubsetSize(875, 15_266, 47),
    "SlideVQA": SubsetSize(2_011, 11_066, 49),
    "TAT-DQA": SubsetSize(163, 15_814, 147),
    "ArxivQA": SubsetSize(1_579, 12_314, 19),
    "SciQAG": SubsetSize(1_197, 4_976, 9),
    "DUDE": SubsetSize(779, 3_173, 16),
    "Wiki-ss": SubsetSize(274, 11_234, 30),
}
EVALUATION = SubsetSize(313, 1_658, 8)  # the published documents have 65 pages

MISSED = 0.15  # share of the questions that ask for words of another page
SAME_NAME, SAME_CONTENT, COPIES = 0.01, 0.01, 0.01  # shares of the training documents

THINGS = ("survey", "budget", "harvest", "market", "river", "bridge", "school", "engine", "forest", "museum")
VERBS = ("reports", "compares", "describes", "measures", "explains")
LAYOUT = pa.struct([("type", pa.string()), ("bbox", pa.list_(pa.float64())), ("text", pa.string())])
TRAINING_SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("page", pa.int64()),
        ("domain", pa.string()),
        ("image", pa.binary()),
        ("page_size", pa.list_(pa.float64())),
        ("layouts", pa.list_(LAYOUT)),
    ]
)
EVALUATION_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("doc_name", "domain", "passage_id", "image_path", "ocr_text", "vlm_text")]
    + [("image_binary", pa.binary())]
)
ROWS_PER_GROUP = 1000


class StandInDocument(NamedTuple):
    """A document's name, the size of its pages, their images, their codes, and its questions (query, page)."""

    name: str
    size: tuple[float, float]
    images: list[bytes]
    codes: list[str]
    questions: list[tuple[str, int]]

    def text(self, page: int) -> str:
        thing, verb = THINGS[page % len(THINGS)], VERBS[page % len(VERBS)]
        return f"The {thing} {self.codes[page]} {verb} figures for the region. All values are from a survey."


def write_standin(folder: Path, scale: float = 1.0, seed: int = 0) -> dict[str, int]:
    """Writes `folder`/mmdocir and `folder`/mmdocir_train. Returns the training set's counts."""
    rng = random.Random(seed)
    base_images = list(_base_images())
    evaluation = [
        _document(f"evaluation-{i:04d}", pages, questions, rng, base_images)
        for i, (pages, questions) in enumerate(_sizes(EVALUATION, scale, rng))
    ]
    _write_evaluation(folder / "mmdocir", evaluation)
    counts = {"documents": 0, "questions": 0, "pages": 0}
    for subset, size in SUBSETS.items():
        documents: dict[str, StandInDocument] = {}
        for i, (pages, questions) in enumerate(_sizes(size, scale, rng)):
            name, draw = f"{subset.lower()}-{i:05d}", rng.random()
            twin = rng.choice(evaluation)
            if draw < SAME_CONTENT:
                document = _copy(name, twin, questions, rng)
            elif draw < SAME_CONTENT + COPIES and documents:
                document = _copy(name, next(reversed(documents.values())), questions, rng)
            else:
                document = _document(name, pages, questions, rng, base_images)
                if draw > 1 - SAME_NAME and twin.name not in documents:
                    document = document._replace(name=twin.name)
            documents[document.name] = document
        _write_subset(folder / "mmdocir_train", subset, list(documents.values()))
        counts["documents"] += len(documents)
        counts["questions"] += sum(len(document.questions) for document in documents.values())
        counts["pages"] += sum(len(document.images) for document in documents.values())
    return counts


def _sizes(size: SubsetSize, scale: float, rng: random.Random) -> Iterator[tuple[int, int]]:
    """(pages, questions) of each document; the questions add up to the scaled number."""
    documents, questions = max(2, round(size.documents * scale)), round(size.questions * scale)
    for i in range(documents):
        yield rng.randint(2, 2 * size.pages - 2), questions * (i + 1) // documents - questions * i // documents


def _base_images() -> Iterator[tuple[tuple[float, float], bytes]]:
    """(width and height, JPEG) in eight sizes."""
    for k in range(8):
        width, height = 6 + 3 * k, 8 + 4 * k
        stream = io.BytesIO()
        Image.new("RGB", (width, height), (200, 200, 25 * k)).save(stream, "JPEG")
        yield (width, height), stream.getvalue()


def _document(
    name: str, pages: int, questions: int, rng: random.Random, base_images: list[tuple[tuple[float, float], bytes]]
) -> StandInDocument:
    size, image = rng.choice(base_images)
    # Decoders ignore bytes after a JPEG's end, which make each file unique.
    images = [image + rng.randbytes(8) for _ in range(pages)]
    codes = [f"{rng.choice('BDFGKLMNPRST')}{rng.choice('aeiou')}{rng.randrange(10**6):06d}" for _ in images]
    return StandInDocument(name, size, images, codes, _questions(codes, questions, rng))


def _copy(name: str, document: StandInDocument, questions: int, rng: random.Random) -> StandInDocument:
    """A document with the same pages and other questions."""
    return document._replace(name=name, questions=_questions(document.codes, questions, rng))


def _questions(codes: list[str], count: int, rng: random.Random) -> list[tuple[str, int]]:
    questions = []
    for _ in range(count):
        page = rng.randrange(len(codes))
        asked = rng.randrange(len(codes)) if rng.random() < MISSED else page
        questions.append((f"Which figures does the report {codes[asked]} give for the region?", page))
    return questions


def _write_subset(folder: Path, subset: str, documents: list[StandInDocument]) -> None:
    questions = folder / "annotations_top1_negative" / f"{subset}_train.jsonl"
    pages = folder / "parquet" / f"{subset}_filter.parquet"
    for path in (questions, pages):
        path.parent.mkdir(parents=True, exist_ok=True)
    with questions.open("w", encoding="utf-8") as lines:
        number = 0
        for document in documents:
            for query, page in document.questions:
                passage = {"doc_name": document.name, "page_id": page}
                line = {"query_id": f"train_{number}", "query": query, "positive_passages": [passage]}
                lines.write(json.dumps(line | {"negative_passages": []}) + "\n")
                number += 1
    rows = (
        {
            "file_name": document.name,
            "page": page,
            "domain": subset,
            "image": image,
            "page_size": document.size,
            "layouts": [{"type": "text", "bbox": [0.0, 0.0, 1.0, 1.0], "text": document.text(page)}],
        }
        for document in documents
        for page, image in enumerate(document.images)
    )
    write_rows(pages, TRAINING_SCHEMA, rows)


def _write_evaluation(folder: Path, documents: list[StandInDocument]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    first_row = 0
    with (folder / "MMDocIR_annotations.jsonl").open("w", encoding="utf-8") as lines:
        for document in documents:
            questions = [
                {"Q": query, "A": "", "page_id": [page], "type": "['Text']", "layout_mapping": []}
                for query, page in document.questions
            ]
            rows = [first_row, first_row + len(document.images) - 1]
            line = {"doc_name": f"{document.name}.pdf", "domain": "Guidebook", "page_indices": rows}
            lines.write(json.dumps(line | {"questions": questions}) + "\n")
            first_row += len(document.images)
    page_rows = (
        {
            "doc_name": document.name,
            "domain": "Guidebook",
            "passage_id": str(page),
            "image_path": f"{document.name}_{page}.jpg",
            "ocr_text": document.text(page),
            "vlm_text": "",
            "image_binary": image,
        }
        for document in documents
        for page, image in enumerate(document.images)
    )
    write_rows(folder / "MMDocIR_pages.parquet", EVALUATION_SCHEMA, page_rows)


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a parquet of these rows, a group of rows at a time."""
    with pq.ParquetWriter(path, schema) as table:
        group: list[dict[str, Any]] = []
        for row in rows:
            group.append(row)
            if len(group) == ROWS_PER_GROUP:
                table.write_table(pa.Table.from_pylist(group, schema=schema))
                group = []
        if group:
            table.write_table(pa.Table.from_pylist(group, schema=schema))
