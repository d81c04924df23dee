"""The reranker with the interface of sentence-transformers' `CrossEncoder`.

from mmr5_train import Reranker
from mmr5_train.integrations.cross_encoder import ListwiseCrossEncoder

model = ListwiseCrossEncoder(Reranker("outputs/demo/distill/model", mode="logits"))
model.predict([("Which page …?", "a.png"), ("Which page …?", "b.png")])  # array([0.91, 0.08])
model.rank("Which page …?", ["a.png", "b.png"], top_k=1)  # [{"corpus_id": 0, "score": 0.91}]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmr5_train.inference.documents import to_documents
from mmr5_train.inference.reranker import Reranker
from mmr5_train.models.pages import PageInput
from mmr5_train.ranking.results import Document


class ListwiseCrossEncoder:
    """Scores (query, page) pairs. All pages of a query in one call are ranked together."""

    def __init__(self, reranker: Reranker) -> None:
        self.reranker = reranker

    def predict(self, inputs: Sequence[tuple[str, PageInput | Document]], **_: Any) -> npt.NDArray[np.float32]:
        """One score from 0 to 1 for each pair, shape (pairs,).

        A list-wise model compares the pages that it sees together, so scores are comparable within a query only,
        and depend on the other pages of the query. In modes without scores, they are computed from the ranks.
        Further arguments of `CrossEncoder.predict`, such as `batch_size`, are ignored: `Reranker` has its own.
        """
        if len(inputs) == 2 and isinstance(inputs[0], str):  # a single pair
            return self.predict([(inputs[0], inputs[1])])[0]
        rows: dict[str, list[int]] = {}
        for index, (query, _page) in enumerate(inputs):
            rows.setdefault(query, []).append(index)
        ranked = self.reranker.rank_many(list(rows), [[inputs[i][1] for i in row] for row in rows.values()])
        scores = np.zeros(len(inputs), dtype=np.float32)
        for row, results in zip(rows.values(), ranked, strict=True):
            for result in results:
                scores[row[result.index]] = result.score
        return scores

    def rank(
        self,
        query: str,
        documents: Sequence[PageInput | Document],
        top_k: int | None = None,
        return_documents: bool = False,
        **_: Any,
    ) -> list[dict[str, Any]]:
        """The pages, best first: "corpus_id" (their index), "score", and with `return_documents` "document"."""
        pages = to_documents(documents)
        return [
            {"corpus_id": result.index, "score": result.score}
            | ({"document": documents[result.index]} if return_documents else {})
            for result in self.reranker.rank(query, pages, top_k)
        ]
