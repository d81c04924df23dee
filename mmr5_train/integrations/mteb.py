"""The reranker as a search model of MTEB, for its two-stage evaluation (`pip install '.[mteb]'`).

import mteb
from mmr5_train import Reranker
from mmr5_train.integrations.mteb import MtebReranker

task = mteb.get_task("Vidore3HrBM25sReranking.v2")
mteb.evaluate(MtebReranker(Reranker("outputs/grpo/model"), "org/my-model"), task)

MTEB's protocol for cross-encoders scores pairs, which a list-wise model can't do. `python -m mmr5_train.mteb` runs
a task with several systems, resumes, and adds intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mteb.models import ModelMeta
from tqdm import tqdm

from mmr5_train.common.files import InputError
from mmr5_train.inference.reranker import Reranker

Scores = dict[str, dict[str, float]]
"""Query id → page id → score, as MTEB expects the results of a search."""


def strictly_descending(order: Sequence[str]) -> dict[str, float]:
    """Page id → score by rank, so that no evaluator breaks ties in its own way. Scores are in (0, 1]."""
    return {page: 1 - index / len(order) for index, page in enumerate(order)}


def model_meta(name: str) -> Any:
    """MTEB's description of a model; `name` is "organization/model"."""
    if name.count("/") != 1:
        raise InputError(f"name: MTEB expects organization/model, found {name!r}")
    fields = {"name": name, "revision": "no_revision", "modalities": ["image", "text"]}
    return ModelMeta.create_empty(fields)


class MtebReranker:
    """Implements MTEB's `SearchProtocol`: ranks the candidates of each query by their page images."""

    def __init__(self, reranker: Reranker, name: str, batch_size: int = 8) -> None:
        """`batch_size` is the number of queries whose pages are in memory at once."""
        self.reranker, self.batch_size = reranker, batch_size
        self.mteb_model_meta = model_meta(name)
        self._corpus: Any = None
        self._rows: dict[str, int] = {}

    def index(self, corpus: Any, **_: Any) -> None:
        """Keeps the corpus, whose column "image" holds the pages."""
        if "image" not in corpus.column_names:
            raise InputError(f"corpus: expected page images in the column image, found {corpus.column_names}")
        self._corpus = corpus
        self._rows = {page: row for row, page in enumerate(corpus["id"])}

    def search(
        self, queries: Any, *, top_k: int, top_ranked: Mapping[str, Sequence[str]] | None = None, **_: Any
    ) -> Scores:
        """Ranks `top_ranked`, the candidates of each query. Raises `InputError` without them."""
        if top_ranked is None:
            raise InputError(
                "MTEB gave no candidates: this is a retrieval task; turn it into a reranking task with "
                "task.convert_to_reranking(…), or run python -m mmr5_train.mteb with first_stage=…"
            )
        scores: Scores = {}
        for start in tqdm(range(0, len(queries), self.batch_size), desc="rank", unit="batch"):
            batch = queries[start : start + self.batch_size]
            ids = [list(top_ranked[query]) for query in batch["id"]]
            pages = [[self._corpus[self._rows[page]]["image"] for page in row] for row in ids]
            for query, row, ranked in zip(
                batch["id"], ids, self.reranker.rank_many(batch["text"], pages), strict=True
            ):
                scores[query] = strictly_descending([row[index] for index in ranked.order][:top_k])
        return scores


class RecordedRankings:
    """A search model that returns rankings made before, so that MTEB computes their score."""

    def __init__(self, name: str, orders: Mapping[tuple[str, str], Mapping[str, Sequence[str]]]) -> None:
        """`orders` has, for each (subset, split), the page ids of each query, best first."""
        self.mteb_model_meta = model_meta(name)
        self.orders = orders

    def index(self, corpus: Any, **_: Any) -> None:
        """The rankings are known, so the pages are not needed."""

    def search(self, queries: Any, *, hf_split: str, hf_subset: str, top_k: int, **_: Any) -> Scores:
        orders = self.orders[hf_subset, hf_split]
        return {query: strictly_descending(orders[query][:top_k]) for query in queries["id"]}
