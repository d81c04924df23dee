"""The reranker as a ranker component of Haystack (`pip install '.[haystack]'`).

from mmr5_train import Reranker
from mmr5_train.integrations.haystack import PageRanker

pipeline.add_component("ranker", PageRanker(Reranker("outputs/demo/grpo/model"), top_k=3))
"""

from __future__ import annotations

import dataclasses

from haystack import Document, component

from mmr5_train.inference.reranker import Reranker
from mmr5_train.integrations.page_of import page_of
from mmr5_train.models.pages import PageInput


@component
class PageRanker:
    """Ranks documents by their page images.

    A document's page is its blob, or found in its meta by `page_of`: "file_path" and "page_number", which
    Haystack's PDF converters and splitters write and count from 1.
    """

    def __init__(self, reranker: Reranker, top_k: int | None = None) -> None:
        self.reranker = reranker
        self.top_k = top_k

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """The documents, best first, with the reranker's score, and its note in their meta."""
        if not documents:
            return {"documents": []}
        pages = [document_page(document, index) for index, document in enumerate(documents)]
        ranked = [
            dataclasses.replace(
                documents[result.index],
                score=result.score,
                meta={**documents[result.index].meta, "note": result.note},
            )
            for result in self.reranker.rank(query, pages, self.top_k if top_k is None else top_k)
        ]
        return {"documents": ranked}


def document_page(document: Document, index: int) -> PageInput:
    if document.blob is not None:
        return document.blob.data
    return page_of(document.meta, content=document.content or "", first_page=1, name=f"document {index}")
