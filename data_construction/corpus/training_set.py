"""Streams MMDocIR's training set (https://huggingface.co/datasets/MMDocIR/MMDocIR_Train_Dataset).

It has seven subsets, each with a file of questions and a page parquet:

- `annotations_top1_negative/<subset>_train.jsonl`: `query_id`, `query`, `positive_passages` and
  `negative_passages`, lists of `{doc_name, page_id}`;
- `parquet/<subset>_filter.parquet`: `file_name`, `page`, `image` (bytes, or a struct with `bytes`), `layouts`.

The questions are in memory, the pages are not: a document is yielded when its last row has been read. Query ids
repeat across subsets, and document names may too, so both start with the subset here: `Wiki-ss/train_54030`. Page
numbers are those of the files. A question with relevant pages in several documents is skipped if the first stage
searches within one document. The negative passages are not used, since the first stage finds negatives.
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
from data_construction.corpus.page_cache import MaxSide, PageCache
from data_construction.corpus.page_table import (
    ReadPage,
    assemble_document,
    first_rows,
    image_data,
    open_table,
    read_page,
    read_rows,
)
from mmr5_train.common.files import InputError, read_json_lines, validation_message
from mmr5_train.ranking.records import PageId, Question, Skipped

Subset = Literal["ArxivQA", "DUDE", "MP-DocVQA", "SciQAG", "SlideVQA", "TAT-DQA", "Wiki-ss"]
TEXT_KEYS = ("text", "ocr_text", "vlm_text")  # of a layout, as in the evaluation set


class TrainingSet(BaseModel):
    """Config group `corpus`: MMDocIR's training set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mmdocir_train"] = "mmdocir_train"
    folder: Path
    subsets: tuple[Subset, ...] = Field(min_length=1)
    questions: int | None = Field(
        default=None,
        gt=0,
        description="for a trial: read at most this many per subset, sampled with the seed, before any filter; "
        "candidates.train_per_domain draws after the filters",
    )
    page_cache: Path = Field(description="folder where page images are cached")
    max_side: MaxSide = None

    def questions_path(self, subset: str) -> Path:
        return self.folder / "annotations_top1_negative" / f"{subset}_train.jsonl"

    def pages_path(self, subset: str) -> Path:
        return self.folder / "parquet" / f"{subset}_filter.parquet"

    @property
    def inputs(self) -> list[Path]:
        """The files whose hashes are written to the manifest.

        The parquets (49 GB) are not among them: documents.jsonl has a hash of each document.
        """
        return [self.questions_path(subset) for subset in self.subsets]


class _Passage(BaseModel):
    doc_name: str = Field(min_length=1)
    page_id: Annotated[int, Field(ge=0)]  # an integer, or its decimal text


class _Line(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True, coerce_numbers_to_str=True)

    query_id: str = Field(min_length=1)
    query: str = Field(min_length=1)
    positive_passages: list[_Passage] = Field(min_length=1)


def read_training_annotations(
    corpus: TrainingSet, seed: int, skipped: list[Skipped], several_documents: bool = False
) -> list[Annotation]:
    """The documents of the questions, subset by subset. Adds unusable questions to `skipped`.

    If a subset has more than `corpus.questions` usable questions, that many are sampled; the sample depends on the
    seed and the subset. Raises `InputError` if the folder or a file does not exist, and for a line that is not a
    JSON object.
    """
    if not corpus.folder.is_dir():
        raise InputError(f"{corpus.folder}: no such folder; set corpus.folder=… to the folder of the training set")
    annotations = []
    for subset in corpus.subsets:
        questions = list(_subset_questions(corpus.questions_path(subset), subset, skipped, several_documents))
        if corpus.questions is not None and len(questions) > corpus.questions:
            sample = random.Random(f"{seed}/{subset}").sample(range(len(questions)), corpus.questions)
            questions = [questions[i] for i in sorted(sample)]
        by_document: dict[str, list[Question]] = {}
        for question in questions:
            by_document.setdefault(question.doc_name, []).append(question)
        for page in (page for question in questions for page in question.positives):
            by_document.setdefault(page.doc_name, [])  # a second document of a question
        annotations += [Annotation(name, subset, tuple(group)) for name, group in by_document.items()]
    return annotations


def _subset_questions(
    path: Path, subset: str, skipped: list[Skipped], several_documents: bool
) -> Iterator[Question]:
    seen: dict[str, tuple[int, int]] = {}  # query id → line, hash of its content
    for number, value in read_json_lines(path):
        try:
            line = _Line.model_validate(value)
        except ValidationError as error:
            detail = f"line {number}: {validation_message(error)}"
            skipped.append(Skipped(file=str(path), reason="question can't be understood", detail=detail))
            continue
        query_id, content = f"{subset}/{line.query_id}", hash(json.dumps(value, sort_keys=True))
        first, first_content = seen.setdefault(query_id, (number, content))
        if first != number:
            reason = "duplicate line" if first_content == content else "query id already used"
            detail = f"line {number}: {query_id} is already in line {first}" + (
                "" if first_content == content else ", with other content"
            )
            skipped.append(Skipped(file=str(path), reason=reason, detail=detail))
            continue
        names = {passage.doc_name for passage in line.positive_passages}
        if len(names) > 1 and not several_documents:
            detail = ", ".join(sorted(names))
            skipped.append(Skipped(query_id=query_id, reason="relevant pages in several documents", detail=detail))
            continue
        pages = dict.fromkeys(
            PageId(doc_name=f"{subset}/{passage.doc_name}", page=passage.page_id)
            for passage in line.positive_passages
        )
        yield Question(
            query_id=query_id,
            query=line.query,
            doc_name=next(iter(pages)).doc_name,
            domain=subset,
            positives=tuple(pages),
        )


def read_training_documents(
    corpus: TrainingSet, annotations: list[Annotation], skipped: list[Skipped]
) -> Iterator[Document]:
    """Yields the annotated documents, each when its last row has been read.

    Raises `InputError` at the call, not at the first document, if a parquet can't be used.
    """
    paths = {subset: corpus.pages_path(subset) for subset in corpus.subsets}
    for path in paths.values():
        open_table(path, ["file_name", "page", "layouts"], image="image").close()
    # dpi has no effect on image bytes, but it is part of the cache key.
    cache = PageCache(corpus.page_cache, dpi=150, max_side=corpus.max_side)

    def read() -> Iterator[Document]:
        for subset, path in paths.items():
            by_name = {a.doc_name: a for a in annotations if a.domain == subset}
            with open_table(path, [], image="image") as table:
                yield from _read_subset(path, table, subset, cache, by_name, skipped)

    return read()


def _read_subset(
    path: Path,
    table: pq.ParquetFile,
    subset: str,
    cache: PageCache,
    annotations: dict[str, Annotation],
    skipped: list[Skipped],
) -> Iterator[Document]:
    location, missing_rows = _locate_rows(path, table, subset, annotations, skipped)
    pages_of: dict[str, dict[int, ReadPage]] = {}
    for row, values in read_rows(path, table, ["image", "layouts"], set(location)):
        name, page = location[row]
        pages = pages_of.setdefault(name, {})
        texts = (layout_text(values["layouts"]), "")
        data = image_data(values["image"])
        pages[page] = read_page(path, cache, annotations[name], page, data, texts, row, skipped)
        missing_rows[name] -= 1
        if not missing_rows[name]:
            del pages_of[name]
            yield assemble_document(annotations[name], max(pages) + 1, pages, skipped)


def _locate_rows(
    path: Path, table: pq.ParquetFile, subset: str, annotations: dict[str, Annotation], skipped: list[Skipped]
) -> tuple[dict[int, tuple[str, int]], dict[str, int]]:
    """row → (document, page), and the number of rows of each document. Skips documents without rows."""
    keys = table.read(columns=["file_name", "page"])
    rows_of: dict[str, tuple[list[int], list[int]]] = {}
    for row, (file_name, page) in enumerate(
        zip(keys["file_name"].to_pylist(), keys["page"].to_pylist(), strict=True)
    ):
        name = f"{subset}/{file_name}"
        if name not in annotations:
            continue
        if not str(page).isdecimal():
            detail = f"row {row}: page {page!r} of {name} is not a page number"
            skipped.append(Skipped(file=str(path), reason="page can't be shown", detail=detail))
            continue
        rows, pages = rows_of.setdefault(name, ([], []))
        rows.append(row)
        pages.append(int(page))
    location: dict[int, tuple[str, int]] = {}
    n_rows = {}
    for name, annotation in annotations.items():
        if name not in rows_of:
            skip_document(annotation, path, f"{name}: the parquet has no row for it", skipped)
            continue
        page_of_row = first_rows(path, annotation, *rows_of[name], skipped)
        location |= {row: (name, page) for row, page in page_of_row.items()}
        n_rows[name] = len(page_of_row)
    return location, n_rows


def layout_text(layouts: Any) -> str:
    """The text of a page's layouts: a list of structs, or its JSON text. "" for any other value."""
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
