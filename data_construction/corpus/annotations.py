"""Reads MMDocIR's evaluation annotations: documents, their questions, and the pages that answer them.

One JSON object per line: `doc_name`, `domain`, `page_indices`, `questions[{Q, page_id, type, …}]`. Format:
https://github.com/MMDocRAG/MMDocIR, dataset/README.md (facts only).
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_construction.corpus.documents import Annotation
from data_construction.corpus.page_cache import MaxSide
from mmr5_train.common.files import InputError, read_json_lines, validation_message
from mmr5_train.ranking.records import PageId, Question, Skipped


class EvaluationSet(BaseModel):
    """Config group `corpus`: documents and questions in the format of MMDocIR's evaluation set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mmdocir"] = "mmdocir"
    folder: Path
    annotations: str = Field(default="MMDocIR_annotations.jsonl", description="file in `folder`")
    pages: str = Field(description="in `folder`: the page parquet, or a folder of PDFs")
    descriptions: bool = Field(description="whether the parquet's vlm_text describes each page exactly")
    page_cache: Path = Field(description="folder where page images are cached")
    dpi: int = Field(default=150, gt=0, le=1200)
    max_side: MaxSide = None

    @property
    def annotations_path(self) -> Path:
        return self.folder / self.annotations

    @property
    def pages_path(self) -> Path:
        return self.folder / self.pages

    @property
    def inputs(self) -> list[Path]:
        """The files whose hashes are written to the manifest."""
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
        """Accepts a list, a list as text ("['Table', 'Chart']"), or a single name."""
        names = value
        if isinstance(value, str):
            names = _parse_list(value) if value.lstrip().startswith("[") else [value]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a list of quoted names, found {str(value)[:80]!r}")
        return tuple(name for name in names if name)


def _parse_list(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def read_evaluation_annotations(corpus: EvaluationSet, skipped: list[Skipped]) -> list[Annotation]:
    """All documents of the annotations file. Adds invalid questions to `skipped`.

    Raises `InputError` if the folder or file does not exist, a line is invalid, two different lines have the same
    document name, or the file has no documents.
    """
    if not corpus.folder.is_dir():
        raise InputError(f"{corpus.folder}: no such folder; set corpus.folder=… to the folder of the corpus")
    path = corpus.annotations_path
    annotations: list[Annotation] = []
    seen: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, value in read_json_lines(path):
        try:
            line = _Line.model_validate(value)
            rows = line.page_indices
            if rows is not None and rows[1] < rows[0]:
                raise InputError(
                    f"{path}, line {number}: page_indices {list(rows)}: the last is smaller than the first"
                )
        except ValidationError as error:
            raise InputError(f"{path}, line {number}: {validation_message(error)}") from None
        stem = line.doc_name.removesuffix(".pdf")
        if stem in seen:
            first, first_value = seen[stem]
            if value != first_value:
                raise InputError(
                    f"{path}, line {number}: document {line.doc_name!r} is already in line {first}, with "
                    "different content; merge the two lines"
                )
            detail = f"line {number} repeats line {first}: {line.doc_name}"
            skipped.append(Skipped(file=str(path), reason="duplicate line", detail=detail))
            continue
        seen[stem] = (number, value)
        annotations.append(Annotation(line.doc_name, line.domain, _read_questions(line, skipped), rows))
    if not annotations:
        raise InputError(f"{path}: contains no documents")
    return annotations


def _read_questions(line: _Line, skipped: list[Skipped]) -> tuple[Question, ...]:
    """The valid questions. The number in a query id is the zero-based position in the line."""
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
        relevant = dict.fromkeys(fields.page_id)  # some lines repeat a page
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
