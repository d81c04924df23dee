"""Reads MMDocIR's evaluation annotations: documents, their questions, and the pages that answer them.

One JSON object a line: `doc_name`, `domain`, `page_indices`, `questions[{Q, page_id, type, …}]`. Format:
https://github.com/MMDocRAG/MMDocIR, dataset/README.md (facts only).
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_construction.corpus.documents import Annotation
from mmr5_train.common.files import InputError, read_json_lines, validation_message
from mmr5_train.ranking.records import PageId, Question, Skipped


class EvaluationSet(BaseModel):
    """Config group `corpus`: documents and questions in MMDocIR's evaluation format."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mmdocir"] = "mmdocir"
    folder: Path
    annotations: str = Field(default="MMDocIR_annotations.jsonl", description="file in `folder`")
    pages: str = Field(description="in `folder`: the page parquet, or the folder of PDFs")
    descriptions: bool = Field(description="whether the parquet's vlm_text states exactly what a page shows")
    page_cache: Path = Field(description="where page pictures are kept, to be made only once")
    dpi: int = Field(default=150, gt=0, le=1200)
    max_side: int = Field(default=1024, ge=16, le=16384, description="pixels")

    @property
    def annotations_path(self) -> Path:
        return self.folder / self.annotations

    @property
    def pages_path(self) -> Path:
        return self.folder / self.pages

    @property
    def inputs(self) -> list[Path]:
        """The files whose hashes stand in the manifest."""
        return [path for path in (self.annotations_path, self.pages_path) if path.is_file()]


class _Line(BaseModel):
    doc_name: str = Field(min_length=1)
    domain: str = Field(min_length=1)
    page_indices: tuple[Annotated[int, Field(ge=0)], int] | None = None
    questions: list[dict[str, Any]]


class _QuestionFields(BaseModel):
    model_config = ConfigDict(strict=True, str_strip_whitespace=True)

    Q: str = Field(min_length=1)
    page_id: list[Annotated[int, Field(ge=0)]]
    type: tuple[str, ...] = ()

    @field_validator("type", mode="before")
    @classmethod
    def _names(cls, value: Any) -> tuple[str, ...]:
        """Names from a list, from a list written out as text ("['Table', 'Chart']"), or one name as it is."""
        names = value
        if isinstance(value, str):
            names = _written_list(value) if value.lstrip().startswith("[") else [value]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a list of quoted names, found {str(value)[:80]!r}")
        return tuple(name for name in names if name)


def _written_list(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def read_evaluation_annotations(corpus: EvaluationSet, skipped: list[Skipped]) -> list[Annotation]:
    """All documents of the annotations file. Questions that can't be understood are added to `skipped`.

    Raises `InputError` for an absent folder or file, a broken line, a document that is named by two
    different lines, and a file without documents.
    """
    if not corpus.folder.is_dir():
        raise InputError(f"{corpus.folder}: no such folder; say where the corpus is with corpus.folder=…")
    path = corpus.annotations_path
    annotations: list[Annotation] = []
    seen: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, value in read_json_lines(path):
        try:
            line = _Line.model_validate(value)
            rows = line.page_indices
            if rows is not None and rows[1] < rows[0]:
                raise InputError(f"{path}, line {number}: page_indices {list(rows)} end before they begin")
        except ValidationError as error:
            raise InputError(f"{path}, line {number}: {validation_message(error)}") from None
        stem = line.doc_name.removesuffix(".pdf")
        if stem in seen:
            first, same = seen[stem]
            if value != same:
                raise InputError(
                    f"{path}, line {number}: document {line.doc_name!r} already stands in line {first} with other "
                    "content; merge the two lines"
                )
            detail = f"line {number} repeats line {first}: {line.doc_name}"
            skipped.append(Skipped(file=str(path), reason="duplicate line", detail=detail))
            continue
        seen[stem] = (number, value)
        annotations.append(Annotation(line.doc_name, line.domain, _read_questions(line, skipped), rows))
    if not annotations:
        raise InputError(f"{path}: holds no document")
    return annotations


def _read_questions(line: _Line, skipped: list[Skipped]) -> tuple[Question, ...]:
    """The questions that can be understood. A question's number is its place in the line, from 0."""
    questions = []
    for k, value in enumerate(line.questions):
        query_id = f"{line.doc_name}/{k}"
        try:
            fields = _QuestionFields.model_validate(value)
        except ValidationError as error:
            detail = validation_message(error)
            skipped.append(Skipped(query_id=query_id, reason="question can't be understood", detail=detail))
            continue
        if not fields.page_id:
            skipped.append(Skipped(query_id=query_id, reason="no relevant page", detail="page_id is empty"))
            continue
        relevant = dict.fromkeys(fields.page_id)  # some lines name a page twice
        questions.append(
            Question(
                query_id=query_id,
                query=fields.Q,
                doc_name=line.doc_name,
                domain=line.domain,
                question_types=fields.type,
                positives=tuple(PageId(doc_name=line.doc_name, page=page) for page in relevant),
            )
        )
    return tuple(questions)
