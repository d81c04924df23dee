"""Writes small data sets in the formats of MMDocIR, with pages of real sizes, and first-stage scores.

    python scripts/benchmarks/rehearsal_data.py OUT

- OUT/mmdocir_train: the training set, seven subsets, each with a questions file and a page parquet;
- OUT/mmdocir: the evaluation set, annotations and a page parquet;
- OUT/scores/train and OUT/scores/evaluation: first-stage scores in the JSON of MM-R5's released pipeline.

Most pages have the pixels of an A4 page at 36 dpi, some at 72 dpi. With `large`, one document has A4 pages at
150 dpi, and one has pages of 1,700 × 2,200 pixels, five of which have 24,000 tokens.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mmdocir_standin import EVALUATION_SCHEMA, TRAINING_SCHEMA, write_rows
from PIL import Image, ImageDraw, ImageFont

from data_construction.corpus.training_set import Subset

Size = tuple[int, int]  # width × height in pixels
A4_36_DPI, A4_72_DPI, A4_150_DPI, LARGE = (298, 421), (595, 842), (1240, 1754), (1700, 2200)
WORDS = ("sales", "ships", "harbour", "water", "export", "forest", "island", "engine", "winter", "paper", "school")
PAGES, EVALUATION_PAGES = 7, 12  # of each document


@dataclass(frozen=True)
class PaperDocument:
    """A document with the words of each page, and questions: (id, text, relevant page)."""

    name: str
    size: Size
    pages: list[str]
    questions: list[tuple[str, str, int]]


def write_rehearsal_data(
    out: Path, documents: int = 4, evaluation: int = 3, large: bool = True, seed: int = 0
) -> None:
    """Writes `documents` per subset with one question each, and `evaluation` documents with two each."""
    rng = random.Random(seed)
    for subset in get_args(Subset):
        subset_documents = [
            make_document(f"{subset.lower()}-{i}", page_size(subset, i, large), PAGES, 1, rng)
            for i in range(documents)
        ]
        write_subset(out / "mmdocir_train", subset, subset_documents)
        write_scores(out / "scores/train" / f"{subset}.json", subset_documents, rng)
    heldout = [
        make_document(f"report-{i}", A4_72_DPI if i == 1 else A4_36_DPI, EVALUATION_PAGES, 2, rng)
        for i in range(evaluation)
    ]
    write_evaluation_set(out / "mmdocir", heldout)
    write_scores(out / "scores/evaluation" / "all.json", heldout, rng)


def page_size(subset: str, document: int, large: bool) -> Size:
    """The size of a document's pages. With seed 42, SFT trains on documents 0 and 3 of ArxivQA."""
    if subset == "ArxivQA" and document in (0, 3):
        return A4_72_DPI if not large else LARGE if document == 0 else A4_150_DPI
    return A4_72_DPI if large and document == 1 else A4_36_DPI


def make_document(name: str, size: Size, n_pages: int, n_questions: int, rng: random.Random) -> PaperDocument:
    pages = [" ".join(rng.choices(WORDS, k=60)) + f" {rng.randint(1000, 9999)}" for _ in range(n_pages)]
    questions = []
    for i in range(n_questions):
        page = rng.randrange(n_pages)
        questions.append((f"{name}/{i}", f"Which page of {name} ends with {pages[page].split()[-1]}?", page))
    return PaperDocument(name, size, pages, questions)


def draw_text_page(text: str, size: Size) -> bytes:
    """The JPEG of a page with the words of `text`."""
    width, height = size
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=width // 40)
    words = text.split()
    for line, start in enumerate(range(0, len(words), 8)):
        draw.text(
            (width // 12, height // 12 + line * width // 25), " ".join(words[start : start + 8]), "black", font
        )
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def write_subset(folder: Path, subset: str, documents: list[PaperDocument]) -> None:
    """Writes one subset of the training set: its questions and its page parquet."""
    lines = (
        {
            "query_id": query_id,
            "query": query,
            "positive_passages": [{"doc_name": document.name, "page_id": page}],
            "negative_passages": [{"doc_name": document.name, "page_id": (page + 1) % len(document.pages)}],
        }
        for document in documents
        for query_id, query, page in document.questions
    )
    write_lines(folder / "annotations_top1_negative" / f"{subset}_train.jsonl", lines)
    rows = [
        {
            "file_name": document.name,
            "page": number,
            "domain": subset,
            "image": draw_text_page(text, document.size),
            "page_size": [float(side) for side in document.size],
            "layouts": [{"type": "text", "bbox": [0.0, 0.0, 1.0, 1.0], "text": text}],
        }
        for document in documents
        for number, text in enumerate(document.pages)
    ]
    (folder / "parquet").mkdir(exist_ok=True)
    write_rows(folder / "parquet" / f"{subset}_filter.parquet", TRAINING_SCHEMA, rows)


def write_evaluation_set(folder: Path, documents: list[PaperDocument]) -> None:
    """Writes annotations and a page parquet in the format of MMDocIR's evaluation set."""
    annotations, rows = [], []
    for document in documents:
        annotations.append(
            {
                "doc_name": document.name,
                "domain": "Research report / Introduction",
                "page_indices": [len(rows), len(rows) + len(document.pages) - 1],
                "layout_indices": [0, 0],
                "questions": [
                    {"Q": query, "A": "", "page_id": [page], "type": "['Pure-text']", "layout_mapping": []}
                    for _, query, page in document.questions
                ],
            }
        )
        rows += [
            {
                "doc_name": document.name,
                "domain": "Research report / Introduction",
                "passage_id": str(number),
                "image_path": f"{document.name}_{number}.jpg",
                "image_binary": draw_text_page(text, document.size),
                "ocr_text": text,
                "vlm_text": "",
            }
            for number, text in enumerate(document.pages)
        ]
    write_lines(folder / "MMDocIR_annotations.jsonl", annotations)
    write_rows(folder / "MMDocIR_pages.parquet", EVALUATION_SCHEMA, rows)


def write_scores(path: Path, documents: list[PaperDocument], rng: random.Random) -> None:
    """Writes first-stage scores of all pages. The relevant page is among the first four."""
    scores: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        for query_id, query, relevant in document.questions:
            order = [page for page in range(len(document.pages)) if page != relevant]
            rng.shuffle(order)
            order.insert(rng.randrange(4), relevant)
            scores[query_id] = [
                {
                    "image_path": f"{document.name}_{page}.jpg",
                    "query": query,
                    "tag": "positive" if page == relevant else "negative",
                    "score": 1 - rank / len(order),
                }
                for rank, page in enumerate(order)
            ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores))


def write_lines(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write small files in the formats of MMDocIR.")
    parser.add_argument("out", type=Path)
    write_rehearsal_data(parser.parse_args().out)


if __name__ == "__main__":
    main()
