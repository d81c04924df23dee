"""Documents that must stay out of a corpus, because questions about them are kept for evaluation.

Compared by name and by content. Names are compared without folder or subset, ".pdf", upper case, and an arXiv
version (`ArxivQA/2303.08559` is `2303.08559v2.pdf`); contents by the hash in documents.jsonl, which is equal where
the PDF files are equal, or where both come from parquets with the same page images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from data_construction.corpus.documents import Annotation, Document, skip_document
from mmr5_train.common.files import InputError, read_json_lines, validation_message
from mmr5_train.ranking.records import Skipped

SAME_NAME = "kept for evaluation: the same name"
SAME_CONTENT = "kept for evaluation: the same content"
REASONS = (SAME_NAME, SAME_CONTENT)
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


def exclude_names(asked: list[Annotation], excluded: Excluded, skipped: list[Skipped]) -> list[Annotation]:
    """The documents whose names are not excluded; the others go to `skipped`, before a page of them is read."""
    kept = []
    for annotation in asked:
        if plain_name(annotation.doc_name) in excluded.names:
            skip_document(annotation, Path(annotation.doc_name), "exclude names it", skipped, SAME_NAME)
        else:
            kept.append(annotation)
    return kept


def exclude_contents(read: Iterable[Document], excluded: Excluded, skipped: list[Skipped]) -> Iterator[Document]:
    """The documents whose content is not excluded; the others go to `skipped`."""
    for document in read:
        if document.sha256 not in excluded.hashes:
            yield document
            continue
        annotation = Annotation(document.doc_name, document.domain, document.questions)
        skip_document(annotation, Path(document.doc_name), f"sha256 {document.sha256}", skipped, SAME_CONTENT)
