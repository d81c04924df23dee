"""Reads MMDocIR's training set (https://huggingface.co/datasets/MMDocIR/MMDocIR_Train_Dataset), streamed.

Seven subsets, each with a file of questions and a page parquet:

- `annotations_top1_negative/<subset>_train.jsonl`: `query_id`, `query`, `positive_passages` and
  `negative_passages`, lists of `{doc_name, page_id}`;
- `parquet/<subset>_filter.parquet`: `file_name`, `page`, `image` (bytes, or a struct with `bytes`), `layouts`.

The questions are held in memory, the pages are not: a document is yielded when its last row has been read.
Query ids repeat across subsets, and so may document names, hence both begin with the subset here:
`Wiki-ss/train_54030`. Page numbers are those of the files. A question whose relevant pages are in several
documents is left out, since a document is what the first stage searches; negative passages are not read, since the
first stage finds its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_construction.corpus.documents import Annotation, Document, skip_document
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
from mmr5_train.common.files import InputError, read_json_lines, validation_message
from mmr5_train.ranking.records import PageId, Question, Skipped

Subset = Literal["ArxivQA", "DUDE", "MP-DocVQA", "SciQAG", "SlideVQA", "TAT-DQA", "Wiki-ss"]
TEXT_KEYS = ("text", "ocr_text", "vlm_text")  # of a layout: what the evaluation set's layouts have


class TrainingSet(BaseModel):
    """Config group `corpus`: MMDocIR's training set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mmdocir_train"] = "mmdocir_train"
    folder: Path
    subsets: tuple[Subset, ...] = Field(min_length=1)
    questions: int | None = Field(default=None, gt=0, description="at most so many a subset, drawn by seed")
    page_cache: Path = Field(description="where page pictures are kept, to be made only once")
    max_side: int = Field(default=1024, ge=16, le=16384, description="pixels")

    def questions_path(self, subset: str) -> Path:
        return self.folder / "annotations_top1_negative" / f"{subset}_train.jsonl"

    def pages_path(self, subset: str) -> Path:
        return self.folder / "parquet" / f"{subset}_filter.parquet"

    @property
    def inputs(self) -> list[Path]:
        """The files whose hashes stand in the manifest. Not the 49 GB of pages: documents.jsonl has hashes."""
        return [self.questions_path(subset) for subset in self.subsets]


class _Passage(BaseModel):
    doc_name: str = Field(min_length=1)
    page_id: Annotated[int, Field(ge=0)]  # an integer, or one as text


class _Line(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True, coerce_numbers_to_str=True)

    query_id: str = Field(min_length=1)
    query: str = Field(min_length=1)
    positive_passages: list[_Passage] = Field(min_length=1)


def read_training_annotations(corpus: TrainingSet, seed: int, skipped: list[Skipped]) -> list[Annotation]:
    """The documents that questions ask about, subset by subset. What can't be used is added to `skipped`.

    At most `corpus.questions` of a subset are drawn from those that can be used; seed and subset decide which.
    Raises `InputError` for an absent folder or file and a line that is no JSON object.
    """
    if not corpus.folder.is_dir():
        raise InputError(f"{corpus.folder}: no such folder; say where the training set is with corpus.folder=…")
    annotations = []
    for subset in corpus.subsets:
        questions = list(_subset_questions(corpus.questions_path(subset), subset, skipped))
        if corpus.questions is not None and len(questions) > corpus.questions:
            drawn = random.Random(f"{seed}/{subset}").sample(range(len(questions)), corpus.questions)
            questions = [questions[i] for i in sorted(drawn)]
        of_document: dict[str, list[Question]] = {}
        for question in questions:
            of_document.setdefault(question.doc_name, []).append(question)
        annotations += [Annotation(name, subset, tuple(asked)) for name, asked in of_document.items()]
    return annotations


def _subset_questions(path: Path, subset: str, skipped: list[Skipped]) -> Iterator[Question]:
    seen: dict[str, tuple[int, int]] = {}  # query id → line, hash of its content
    for number, value in read_json_lines(path):
        try:
            line = _Line.model_validate(value)
        except ValidationError as error:
            detail = f"line {number}: {validation_message(error)}"
            skipped.append(Skipped(file=str(path), reason="question can't be understood", detail=detail))
            continue
        query_id, content = f"{subset}/{line.query_id}", hash(json.dumps(value, sort_keys=True))
        first, same = seen.setdefault(query_id, (number, content))
        if first != number:
            reason = "duplicate line" if same == content else "query id already used"
            detail = f"line {number}: {query_id} stands in line {first}" + (
                "" if same == content else ", other words"
            )
            skipped.append(Skipped(file=str(path), reason=reason, detail=detail))
            continue
        names = {passage.doc_name for passage in line.positive_passages}
        if len(names) > 1:
            detail = ", ".join(sorted(names))
            skipped.append(Skipped(query_id=query_id, reason="relevant pages in several documents", detail=detail))
            continue
        doc_name = f"{subset}/{names.pop()}"
        pages = dict.fromkeys(passage.page_id for passage in line.positive_passages)
        yield Question(
            query_id=query_id,
            query=line.query,
            doc_name=doc_name,
            domain=subset,
            positives=tuple(PageId(doc_name=doc_name, page=page) for page in pages),
        )


def read_training_documents(
    corpus: TrainingSet, annotations: list[Annotation], skipped: list[Skipped]
) -> Iterator[Document]:
    """The annotated documents, in the order in which the parquets complete them.

    Raises `InputError` at once where one of the parquets can't be used.
    """
    paths = {subset: corpus.pages_path(subset) for subset in corpus.subsets}
    for path in paths.values():
        open_table(path, ["file_name", "page", "layouts"], image="image").close()
    # There is no PDF to render, so the resolution decides nothing; it is part of a picture's name.
    cache = PageCache(corpus.page_cache, dpi=150, max_side=corpus.max_side)

    def read() -> Iterator[Document]:
        for subset, path in paths.items():
            asked = {annotation.doc_name: annotation for annotation in annotations if annotation.domain == subset}
            with open_table(path, [], image="image") as table:
                yield from _read_subset(path, table, subset, cache, asked, skipped)

    return read()


def _read_subset(
    path: Path,
    table: pq.ParquetFile,
    subset: str,
    cache: PageCache,
    asked: dict[str, Annotation],
    skipped: list[Skipped],
) -> Iterator[Document]:
    place, left = _locate_rows(path, table, subset, asked, skipped)
    found: dict[str, dict[int, ReadPage]] = {}
    for row, values in wanted_rows(path, table, ["image", "layouts"], set(place)):
        name, page = place[row]
        pages = found.setdefault(name, {})
        texts = (layout_text(values["layouts"]), "")
        pages[page] = read_page(path, cache, asked[name], page, image_data(values["image"]), texts, row, skipped)
        left[name] -= 1
        if not left[name]:
            pages = found.pop(name)
            yield from_pages(asked[name], max(pages) + 1, pages, skipped)


def _locate_rows(
    path: Path, table: pq.ParquetFile, subset: str, asked: dict[str, Annotation], skipped: list[Skipped]
) -> tuple[dict[int, tuple[str, int]], dict[str, int]]:
    """row → (document, page), and how many such rows each document has. Documents without any are left out."""
    keys = table.read(columns=["file_name", "page"])
    rows_of: dict[str, tuple[list[int], list[int]]] = {}
    for row, (file_name, page) in enumerate(
        zip(keys["file_name"].to_pylist(), keys["page"].to_pylist(), strict=True)
    ):
        name = f"{subset}/{file_name}"
        if name not in asked:
            continue
        if not str(page).isdecimal():
            detail = f"row {row}: page {page!r} of {name} is no page number"
            skipped.append(Skipped(file=str(path), reason="page can't be shown", detail=detail))
            continue
        rows, pages = rows_of.setdefault(name, ([], []))
        rows.append(row)
        pages.append(int(page))
    place: dict[int, tuple[str, int]] = {}
    left = {}
    for name, annotation in asked.items():
        if name not in rows_of:
            skip_document(annotation, path, f"{name}: no row holds a page of it", skipped)
            continue
        located = first_rows(path, annotation, *rows_of[name], skipped)
        place |= {row: (name, page) for row, page in located.items()}
        left[name] = len(located)
    return place, left


def layout_text(layouts: Any) -> str:
    """The words of a page's layouts: a list of structs with text, or the same as JSON text. None has none."""
    if isinstance(layouts, str):
        try:
            layouts = json.loads(layouts)
        except (ValueError, RecursionError):
            return ""
    if isinstance(layouts, dict):
        layouts = [layouts]
    if not isinstance(layouts, list):
        return ""
    texts = [layout.get(key) for layout in layouts if isinstance(layout, dict) for key in TEXT_KEYS]
    return "\n".join(text for text in texts if isinstance(text, str) and text.strip())
