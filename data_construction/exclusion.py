"""Documents that must stay out of a corpus, because questions about them are kept for evaluation.

Compared by name and by content. Names are compared without folder or subset, ".pdf", upper case, and an arXiv
version (`ArxivQA/2303.08559` is `2303.08559v2.pdf`); contents by the hash in documents.jsonl, which is equal where
the PDF files are equal, or where both come from parquets with the same page images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from mmr5_train.ranking.files import InputError, read_json_lines, validation_message

_ARXIV_VERSION = re.compile(r"(\d{4}\.\d{4,5})v\d+")


@dataclass(frozen=True)
class Excluded:
    """Names, as `plain_name` gives them, and content hashes."""

    names: frozenset[str]
    hashes: frozenset[str]


class _Line(BaseModel):
    doc_name: str
    sha256: str | None = None
    split: str = "heldout"


def plain_name(doc_name: str) -> str:
    """The part of a document's name by which two corpora can be compared."""
    name = doc_name.rpartition("/")[2].casefold().removesuffix(".pdf")
    arxiv = _ARXIV_VERSION.fullmatch(name)
    return arxiv[1] if arxiv else name


def read_excluded(paths: Iterable[Path]) -> Excluded:
    """The held-out documents of documents.jsonl files (names and contents) and MMDocIR annotations (names).

    Raises `InputError` for a file that is absent, broken or of another kind.
    """
    names: set[str] = set()
    hashes: set[str] = set()
    for path in paths:
        for number, value in read_json_lines(path):
            try:
                line = _Line.model_validate(value)
            except ValidationError as error:
                raise InputError(
                    f"{path}, line {number}: {validation_message(error)}; exclude=… takes the documents.jsonl "
                    "of a data folder, or MMDocIR_annotations.jsonl"
                ) from None
            if line.split == "heldout":
                names.add(plain_name(line.doc_name))
                hashes.update([line.sha256] if line.sha256 else [])
    return Excluded(frozenset(names), frozenset(hashes))
