"""The result of a reranker: the pages in order, with the interface of the `rerankers` library's results."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmr5_train.ranking.records import ModelAnswer

DocId = int | str


@dataclass(frozen=True)
class Document:
    """A page to rank, with what its result returns. `Reranker` also takes the `rerankers` library's `Document`."""

    page: Any = None
    """A path, bytes, an open file or a PIL image; in a result "<path>#page=<number>" for a page of a whole PDF."""
    doc_id: DocId | None = None
    """None: the index of the page, from 0."""
    text: str = ""
    """Returned with the result. The model does not read it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    document_type = "image"

    @property
    def image_path(self) -> str | None:
        return str(self.page) if isinstance(self.page, str | Path) else None

    @property
    def base64(self) -> str | None:
        return base64.b64encode(self.page).decode() if isinstance(self.page, bytes) else None

    def __str__(self) -> str:
        return self.image_path or f"page {self.doc_id}"


@dataclass(frozen=True)
class Result:
    """One ranked page."""

    index: int
    """Index of the page in the input, from 0; each page of a PDF counts."""
    rank: int
    """Rank from 1, the best."""
    score: float
    """Score between 0 and 1, higher is better. Computed from the rank if `RankedResults.has_scores` is false."""
    document: Document
    note: str = ""
    """The note on this page in the reasoning, or ""."""

    @property
    def doc_id(self) -> DocId:
        """The id that the caller gave the page, or else its index."""
        return self.index if self.document.doc_id is None else self.document.doc_id

    @property
    def page(self) -> Any:
        """The page as it was passed in."""
        return self.document.page

    @property
    def text(self) -> str:
        return self.document.text

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.document.metadata


@dataclass(frozen=True)
class RankedResults:
    """The ranked pages for one query, best first, each page once. With `top_k`, only the first `top_k` pages."""

    query: str
    results: list[Result]
    reasoning: str
    """The think block. If the pages did not fit in one prompt, the think blocks of all prompts, in order."""
    answers: tuple[ModelAnswer, ...]
    """The parsed completions that gave the order, with their texts, token counts and defects."""
    has_scores: bool
    """Whether the scores come from the model (mode `logits`). Otherwise they are computed from the ranks."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each part of the call that ranked this query (`mmr5_train.common.part_times.PARTS`)."""

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> Result:
        return self.results[index]

    @property
    def order(self) -> list[int]:
        """Indices of the pages in the input, from 0, best first."""
        return [result.index for result in self.results]

    @property
    def defects(self) -> tuple[str, ...]:
        """The distinct defects of the completions. The order is complete even if there are defects."""
        return tuple(dict.fromkeys(defect for answer in self.answers for defect in answer.defects))

    def results_count(self) -> int:
        return len(self.results)

    def top_k(self, k: int) -> list[Result]:
        """The first `k` results."""
        return self.results[:k]

    def get_result_by_docid(self, doc_id: DocId) -> Result | None:
        """The result for the page with this id, or None if there is none or `top_k` removed it."""
        return next((result for result in self.results if result.doc_id == doc_id), None)

    def get_score_by_docid(self, doc_id: DocId) -> float | None:
        """The score of the page with this id, or None if there is none or `top_k` removed it."""
        result = self.get_result_by_docid(doc_id)
        return None if result is None else result.score


def rank_scores(n: int) -> list[float]:
    """Scores for an order without model scores: evenly spaced, from 1 for the first rank down to 1/n."""
    return [1 - index / n for index in range(n)]


def build_results(
    query: str,
    documents: Sequence[Document],
    order: Sequence[int],
    *,
    scores: Sequence[float] | None = None,
    notes: dict[int, str] | None = None,
    reasoning: str = "",
    answers: Sequence[ModelAnswer] = (),
    timing: Mapping[str, float] | None = None,
    top_k: int | None = None,
) -> RankedResults:
    """The results for an order of `documents`.

    Args:
        query: the query.
        documents: the pages.
        order: indices into `documents`, best first.
        scores: the model's scores in the order of `order`, or None.
        notes: notes by index into `documents`.
        reasoning: the think block or blocks.
        answers: the completions that gave the order.
        timing: seconds of each part of the call.
        top_k: number of results to keep, or None for all.
    """
    scores_by_rank = rank_scores(len(order)) if scores is None else scores
    results = [
        Result(index, rank, score, documents[index], (notes or {}).get(index, ""))
        for rank, (index, score) in enumerate(zip(order, scores_by_rank, strict=True), 1)
    ]
    return RankedResults(query, results[:top_k], reasoning, tuple(answers), scores is not None, dict(timing or {}))
