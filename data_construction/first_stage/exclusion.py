"""Excludes documents from a corpus, because questions about them are reserved for evaluation.

Documents are compared by name and by content. The comparison of names ignores the folder or subset, ".pdf", case,
and the arXiv version (`ArxivQA/2303.08559` equals `2303.08559v2.pdf`). The comparison of contents uses the hashes
in documents.jsonl. They are equal for equal PDF files, and for two parquets with the same page images.
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
class ExcludedDocuments:
    """The names (from `normalize_name`) and content hashes of the excluded documents."""

    names: frozenset[str]
    hashes: frozenset[str]


class _Line(BaseModel):
    doc_name: str
    sha256: str | None = None
    split: str = "heldout"


def normalize_name(doc_name: str) -> str:
    """The form of a document's name that is compared between corpora."""
    name = doc_name.rpartition("/")[2].casefold().removesuffix(".pdf")
    arxiv = _ARXIV_VERSION.fullmatch(name)
    return arxiv[1] if arxiv else name


def read_excluded(paths: Iterable[Path]) -> ExcludedDocuments:
    """Reads the documents to exclude.

    `paths` are documents.jsonl files, whose held-out documents are excluded by name and content, and MMDocIR
    annotations, whose documents are all excluded by name. Raises `InputError` if a file does not exist, is broken
    or has another format.
    """
    names: set[str] = set()
    hashes: set[str] = set()
    for path in paths:
        for number, value in read_json_lines(path):
            try:
                line = _Line.model_validate(value)
            except ValidationError as error:
                raise InputError(
                    f"{path}, line {number}: {validation_message(error)}; exclude=… takes documents.jsonl "
                    "of a candidates folder, or MMDocIR_annotations.jsonl"
                ) from None
            if line.split == "heldout":
                names.add(normalize_name(line.doc_name))
                hashes.update([line.sha256] if line.sha256 else [])
    return ExcludedDocuments(frozenset(names), frozenset(hashes))


def exclude_names(
    annotations: list[Annotation], excluded: ExcludedDocuments, skipped: list[Skipped]
) -> list[Annotation]:
    """The documents whose names are not excluded. Adds the others to `skipped`, before any page is read."""
    remaining = []
    for annotation in annotations:
        if normalize_name(annotation.doc_name) in excluded.names:
            skip_document(
                annotation, Path(annotation.doc_name), "its name is in a file of exclude", skipped, SAME_NAME
            )
        else:
            remaining.append(annotation)
    return remaining


def exclude_contents(
    documents: Iterable[Document], excluded: ExcludedDocuments, skipped: list[Skipped]
) -> Iterator[Document]:
    """Yields the documents whose content is not excluded. Adds the others to `skipped`."""
    for document in documents:
        if document.sha256 not in excluded.hashes:
            yield document
            continue
        annotation = Annotation(document.doc_name, document.domain, document.questions)
        skip_document(annotation, Path(document.doc_name), f"sha256 {document.sha256}", skipped, SAME_CONTENT)
