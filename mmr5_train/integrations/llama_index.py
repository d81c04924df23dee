"""The reranker as a node postprocessor of LlamaIndex (`pip install '.[llama-index]'`).

from mmr5_train import Reranker
from mmr5_train.integrations.llama_index import RerankerPostprocessor

postprocessor = RerankerPostprocessor(reranker=Reranker("outputs/demo/grpo/model"), top_n=3)
index.as_query_engine(node_postprocessors=[postprocessor])
"""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, QueryBundle

from mmr5_train.common.files import InputError
from mmr5_train.integrations.page_of import data_uri, page_of
from mmr5_train.models.pages import PageInput


class RerankerPostprocessor(BaseNodePostprocessor):
    """Ranks nodes by their page images, and returns the first `top_n`.

    A node's page is the image of an `ImageNode`, or found in the metadata by `page_of`: LlamaIndex's PDF readers
    write "file_path" and "page_label", which counts from 1.
    """

    reranker: Any = Field(description="a `Reranker`", exclude=True)
    top_n: int = Field(default=3, gt=0)

    @classmethod
    def class_name(cls) -> str:
        return "RerankerPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """The best nodes, best first, with the reranker's score, and its note in the metadata."""
        if query_bundle is None:
            raise InputError("RerankerPostprocessor: give the query, as query_bundle or query_str")
        if not nodes:
            return []
        pages = [node_page(node, index) for index, node in enumerate(nodes)]
        ranked = []
        for result in self.reranker.rank(query_bundle.query_str, pages, self.top_n):
            node = nodes[result.index].node.model_copy(deep=True)
            node.metadata = {**node.metadata, "note": result.note}
            ranked.append(NodeWithScore(node=node, score=result.score))
        return ranked


def node_page(scored: NodeWithScore, index: int) -> PageInput:
    node, name = scored.node, f"node {index}"
    if isinstance(node, ImageNode):
        if node.image:
            return data_uri(node.image, name)
        if node.image_path:
            return node.image_path
    return page_of(node.metadata, content=node.get_content(MetadataMode.NONE), first_page=1, name=name)
