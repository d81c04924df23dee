"""Reads the questions about your own documents (a folder of PDFs) from a CSV or JSON Lines file.

    question,document,pages
    How many days of leave are there?,handbook.pdf,5
    Which sites closed?,annual-report.pdf,"12, 13"

Pages **count from 1** in this file, as people count them, and from 0 in all files that the stages write.
Format: docs/data_formats.md, "Questions file".
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_construction.corpus.documents import Annotation
from data_construction.corpus.page_cache import MaxSide
from mmr5_train.common.files import InputError, read_json_lines, validation_message
from mmr5_train.ranking.records import PageId, Question, Skipped

COLUMNS = ("question", "document", "pages")
EXTRA_FIELDS = "fields beyond the header"


class PdfFolder(BaseModel):
    """Config group `corpus`: a folder of PDFs with a file of questions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["pdf_folder"] = "pdf_folder"
    folder: Path = Field(description="of PDFs")
    questions: Path = Field(description="CSV or JSON Lines: question, document, pages, and optionally domain")
    page_cache: Path = Field(description="folder where page images are cached")
    dpi: int = Field(default=150, gt=0, le=1200)
    max_side: MaxSide = None

    @property
    def inputs(self) -> list[Path]:
        """The files whose hashes are written to the manifest."""
        return [self.questions]


class _Row(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)

    question: str = Field(min_length=1)
    document: str = Field(min_length=1)
    pages: tuple[int, ...] = Field(min_length=1)
    domain: str = Field(default="documents", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _has_no_extra_fields(cls, value: Any) -> Any:
        if EXTRA_FIELDS in value:
            raise ValueError("more fields than the header; put quotes around a field that contains the separator")
        return value

    @field_validator("document")
    @classmethod
    def _with_pdf_suffix(cls, value: str) -> str:
        return value if value.lower().endswith(".pdf") else f"{value}.pdf"

    @field_validator("pages", mode="before")
    @classmethod
    def _split_numbers(cls, value: Any) -> Any:
        """Accepts a list, a number, or text such as "5" or "12, 13", which a CSV has."""
        if isinstance(value, str):
            value = re.split(r"[\s,;]+", value.strip()) if value.strip() else []
        return value if isinstance(value, list) else [value]

    @field_validator("pages")
    @classmethod
    def _counts_from_one(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value and min(value) < 1:
            raise ValueError(f"pages count from 1 here, found {min(value)}")
        return value

    @field_validator("domain", mode="before")
    @classmethod
    def _default_domain(cls, value: Any) -> Any:
        return "documents" if value is None or value == "" else value


def read_pdf_folder_annotations(corpus: PdfFolder, skipped: list[Skipped]) -> list[Annotation]:
    """The documents of the questions file, in the order of their first question.

    Adds invalid rows to `skipped`. The id of a question is `<document>/<line number in the file>`. The domain of a
    document is that of its first question.

    Raises `InputError` if the folder does not exist, the file does not exist or can't be read, the header of a CSV
    lacks a column, or the file has no valid question.
    """
    if not corpus.folder.is_dir():
        raise InputError(f"{corpus.folder}: no such folder; set corpus.folder=… to the folder of the PDFs")
    path = corpus.questions
    rows_of: dict[str, list[tuple[int, _Row]]] = {}
    for number, value in read_json_lines(path) if path.suffix == ".jsonl" else _csv_rows(path):
        try:
            row = _Row.model_validate(value)
        except ValidationError as error:
            detail = f"line {number}: {validation_message(error)}"
            skipped.append(Skipped(file=str(path), reason="question can't be understood", detail=detail))
            continue
        rows_of.setdefault(row.document, []).append((number, row))
    if not rows_of:
        first = f"; first: {skipped[0].detail}" if skipped else ""
        raise InputError(f"{path}: contains no valid question{first}")
    return [_annotation(name, rows) for name, rows in rows_of.items()]


def _annotation(doc_name: str, rows: list[tuple[int, _Row]]) -> Annotation:
    domain = rows[0][1].domain
    questions = [
        Question(
            query_id=f"{doc_name}/{number}",
            query=row.question,
            doc_name=doc_name,
            domain=domain,
            positives=tuple(PageId(doc_name=doc_name, page=page - 1) for page in dict.fromkeys(row.pages)),
        )
        for number, row in rows
    ]
    return Annotation(doc_name, domain, tuple(questions), first_page=1)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, row) of a CSV with a header. The separator is a comma, a semicolon or a tab."""
    if path.suffix != ".csv":
        raise InputError(f"{path}: the name of a questions file must end in .csv or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            stream.seek(0)
            rows = csv.DictReader(
                stream, restkey=EXTRA_FIELDS, delimiter=max(",;\t", key=header.count), strict=True
            )
            names = [(name or "").strip() for name in rows.fieldnames or ()]
            missing = [column for column in COLUMNS if column not in names]
            if missing:
                raise InputError(
                    f"{path}: the first line must name the columns {', '.join(COLUMNS)} (and optionally domain), "
                    f"found {', '.join(names) or 'nothing'}"
                )
            rows.fieldnames = names
            for row in rows:
                yield rows.line_num, row
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; set corpus.questions=… to the file of questions") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
