"""The options of the config group `corpus`, and the reader of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from data_construction.corpus.annotations import EvaluationSet, read_evaluation_annotations
from data_construction.corpus.documents import Annotation, Document
from data_construction.corpus.mmdocir import read_evaluation_documents
from data_construction.corpus.page_cache import PageCache
from data_construction.corpus.pdf_folder import PdfFolder, read_pdf_folder_annotations
from data_construction.corpus.pdfs import read_pdf_documents
from data_construction.corpus.training_set import TrainingSet, read_training_annotations, read_training_documents
from mmr5_train.ranking.records import Skipped

CorpusConfig = Annotated[EvaluationSet | TrainingSet | PdfFolder, Field(discriminator="format")]


def read_annotations(
    corpus: CorpusConfig, seed: int, skipped: list[Skipped], *, several_documents: bool = False
) -> list[Annotation]:
    """The documents of a corpus with their questions; no page is read yet.

    `several_documents`: keep questions of MMDocIR's training set whose relevant pages are in several documents.
    """
    if isinstance(corpus, TrainingSet):
        return read_training_annotations(corpus, seed, skipped, several_documents)
    if isinstance(corpus, PdfFolder):
        return read_pdf_folder_annotations(corpus, skipped)
    return read_evaluation_annotations(corpus, skipped)


def read_corpus(corpus: CorpusConfig, annotations: list[Annotation], skipped: list[Skipped]) -> Iterator[Document]:
    """Yields the documents with their pages. Raises `InputError` at the call if the pages can't be used at all."""
    if isinstance(corpus, TrainingSet):
        return read_training_documents(corpus, annotations, skipped)
    if isinstance(corpus, PdfFolder):
        cache = PageCache(corpus.page_cache, corpus.dpi, corpus.max_side)
        return read_pdf_documents(corpus.folder, cache, annotations, skipped)
    return read_evaluation_documents(corpus, annotations, skipped)
