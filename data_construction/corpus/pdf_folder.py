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
MAX_RANGE = 1000
"""The largest number of pages in a range such as 3-5."""

_WORD = re.compile(r"\b(?:pages?|pp?|pgs?)\b\.?", re.I)
_RANGE = re.compile(r"(\d)\s*(?:[-–—‐‑]|\bto\b)\s*(\d)", re.I)
_SEPARATOR = re.compile(r"[\s,;&+]+|\band\b", re.I)
_NUMBERS = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


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
        """Accepts a list, a number, or text, which a CSV has (`read_page_numbers`)."""
        if isinstance(value, str):
            return read_page_numbers(value)
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


def read_page_numbers(text: str) -> list[int]:
    """The page numbers in a text such as "5", "12, 13", "3-5", "pp. 3 and 4" or "[3, 4]"; empty for an empty text.

    Raises `ValueError`, which shows the text as it stands, for anything else.
    """
    problem = f"expected page numbers such as 5, 12; 13 or 3-5, found {text.strip()[:80]!r}"
    content = text.strip()
    for opening, closing in ("[]", "()", "{}"):
        if content.startswith(opening) and content.endswith(closing):
            content = content[1:-1]
    numbers: list[int] = []
    for part in _SEPARATOR.split(_RANGE.sub(r"\1-\2", _WORD.sub(" ", content))):
        if not part:
            continue
        match = _NUMBERS.fullmatch(part)
        if match is None:
            raise ValueError(problem)
        first = int(match[1])
        last = int(match[2] or first)
        if not first <= last < first + MAX_RANGE:
            raise ValueError(problem)
        numbers += range(first, last + 1)
    if not numbers and text.strip():
        raise ValueError(problem)
    return numbers


def read_pdf_folder_annotations(corpus: PdfFolder, skipped: list[Skipped]) -> list[Annotation]:
    """The documents of the questions file, in the order of their first question.

    Adds to `skipped` the rows that are invalid or repeat a question on the same document. The id of a question is
    `<document>/<line number in the file>`. The domain of a document is that of its first question.

    Raises `InputError` if the folder does not exist, the file does not exist or can't be read, the header of a CSV
    lacks a column, or the file has no valid question.
    """
    if not corpus.folder.is_dir():
        raise InputError(f"{corpus.folder}: no such folder; set corpus.folder=… to the folder of the PDFs")
    path = corpus.questions
    rows_of: dict[str, list[tuple[int, _Row]]] = {}
    index_of: dict[tuple[str, str], int] = {}  # document and question → index in the document's rows
    for number, value in read_json_lines(path) if path.suffix == ".jsonl" else _csv_rows(path):
        try:
            row = _Row.model_validate(value)
        except ValidationError as error:
            detail = f"line {number}: {validation_message(error)}"
            skipped.append(Skipped(file=str(path), reason="question can't be understood", detail=detail))
            continue
        rows = rows_of.setdefault(row.document, [])
        same = index_of.setdefault((row.document, row.question), len(rows))
        if same == len(rows):
            rows.append((number, row))
            continue
        line, other = rows[same]
        rows[same] = line, other.model_copy(update={"pages": (*other.pages, *row.pages)})
        detail = f"line {number} repeats the question of line {line}, which gets its pages {list(row.pages)}"
        skipped.append(Skipped(file=str(path), reason="question repeated", detail=detail))
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
