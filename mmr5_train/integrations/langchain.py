"""The reranker as a document compressor of LangChain (`pip install '.[langchain]'`).

from langchain.retrievers import ContextualCompressionRetriever
from mmr5_train import Reranker
from mmr5_train.integrations.langchain import RerankerCompressor

compressor = RerankerCompressor(reranker=Reranker("outputs/demo/grpo/model"), top_n=3)
ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field

from mmr5_train.integrations.page_of import page_of


class RerankerCompressor(BaseDocumentCompressor):
    """Ranks documents by their page images, and returns the first `top_n`.

    A document's page is found by `page_of`: an image in its metadata, a data URI as its content, or "source" and
    "page", which LangChain's PDF loaders write and count from 0.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    reranker: Any = Field(description="a `Reranker`")
    top_n: int = Field(default=3, gt=0)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Copies of the best documents, best first, with "relevance_score" and "note" in their metadata."""
        if not documents:
            return []
        pages = [
            page_of(document.metadata, content=document.page_content, first_page=0, name=f"document {index}")
            for index, document in enumerate(documents)
        ]
        compressed = []
        for result in self.reranker.rank(query, pages, self.top_n):
            document = documents[result.index]
            metadata = {**document.metadata, "relevance_score": result.score, "note": result.note}
            compressed.append(document.model_copy(update={"metadata": metadata}))
        return compressed
