"""Reads your own documents: a folder of PDFs, and a CSV or JSON Lines file with questions about them.

    question,document,pages
    How many days of leave are there?,handbook.pdf,5
    Which sites closed?,annual-report.pdf,"12, 13"

Pages **count from 1** in this file, as people read them, and from 0 in every file that is written from it.
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
from mmr5_train.common.files import InputError, read_json_lines, validation_message
from mmr5_train.ranking.records import PageId, Question, Skipped

COLUMNS = ("question", "document", "pages")
SURPLUS = "fields beyond the header"


class PdfFolder(BaseModel):
    """Config group `corpus`: a folder of PDFs with a file of questions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["pdf_folder"] = "pdf_folder"
    folder: Path = Field(description="of PDFs")
    questions: Path = Field(description="CSV or JSON Lines: question, document, pages, and a domain if you like")
    page_cache: Path = Field(description="where page pictures are kept, to be made only once")
    dpi: int = Field(default=150, gt=0, le=1200)
    max_side: int = Field(default=1024, ge=16, le=16384, description="pixels")

    @property
    def inputs(self) -> list[Path]:
        """The files whose hashes stand in the manifest."""
        return [self.questions]


class _Row(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)

    question: str = Field(min_length=1)
    document: str = Field(min_length=1)
    pages: tuple[int, ...] = Field(min_length=1)
    domain: str = Field(default="documents", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _fits_the_header(cls, value: Any) -> Any:
        if SURPLUS in value:
            raise ValueError("more fields than the header has; put a field that holds the separator in quotes")
        return value

    @field_validator("document")
    @classmethod
    def _file_name(cls, value: str) -> str:
        return value if value.lower().endswith(".pdf") else f"{value}.pdf"

    @field_validator("pages", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """A list; or a number or text such as "5" or "12, 13", as a CSV has it."""
        if isinstance(value, str):
            value = re.split(r"[\s,;]+", value.strip()) if value.strip() else []
        return value if isinstance(value, list) else [value]

    @field_validator("pages")
    @classmethod
    def _from_one(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value and min(value) < 1:
            raise ValueError(f"pages count from 1 here, found {min(value)}")
        return value

    @field_validator("domain", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return "documents" if value is None or value == "" else value


def read_pdf_folder_annotations(corpus: PdfFolder, skipped: list[Skipped]) -> list[Annotation]:
    """The documents that questions ask about, in the order of their first question.

    A row that can't be understood is added to `skipped`. The id of a question is `<document>/<line in the file>`.
    A document takes the domain of its first question.

    Raises `InputError` for an absent folder, an absent or unreadable file, a CSV whose header is not as expected,
    and a file without a question.
    """
    if not corpus.folder.is_dir():
        raise InputError(f"{corpus.folder}: no such folder; say where the PDFs are with corpus.folder=…")
    path = corpus.questions
    asked: dict[str, list[tuple[int, _Row]]] = {}
    for number, value in read_json_lines(path) if path.suffix == ".jsonl" else _csv_rows(path):
        try:
            row = _Row.model_validate(value)
        except ValidationError as error:
            detail = f"line {number}: {validation_message(error)}"
            skipped.append(Skipped(file=str(path), reason="question can't be understood", detail=detail))
            continue
        asked.setdefault(row.document, []).append((number, row))
    if not asked:
        first = f"; first: {skipped[0].detail}" if skipped else ""
        raise InputError(f"{path}: holds no question that can be understood{first}")
    return [_annotation(name, rows) for name, rows in asked.items()]


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
    """(line, row) of a CSV with a header, separated by commas, semicolons or tabs: whichever its header uses."""
    if path.suffix != ".csv":
        raise InputError(f"{path}: the name of a questions file must end in .csv or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            stream.seek(0)
            rows = csv.DictReader(stream, restkey=SURPLUS, delimiter=max(",;\t", key=header.count), strict=True)
            names = [(name or "").strip() for name in rows.fieldnames or ()]
            missing = [column for column in COLUMNS if column not in names]
            if missing:
                raise InputError(
                    f"{path}: its first line must name the columns {', '.join(COLUMNS)} (and domain, if wanted), "
                    f"found {', '.join(names) or 'nothing'}"
                )
            rows.fieldnames = names
            for row in rows:
                yield rows.line_num, row
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; corpus.questions=… names the file of questions") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
