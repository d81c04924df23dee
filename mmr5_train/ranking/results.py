"""What a reranker gives back: pages in order, in the shape that users of the `rerankers` library know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmr5_train.ranking.records import ModelAnswer


@dataclass(frozen=True)
class Result:
    """One page at its place."""

    doc_id: int
    """Which of the pages that were given, from 0."""
    rank: int
    """From 1, the best."""
    score: float
    """Between 0 and 1, higher is better. `RankedResults.has_scores` says whether it means more than the rank."""
    document: Any
    """The page as it was given."""
    note: str = ""
    """What the reasoning says of this page, where it has a line on it."""


@dataclass(frozen=True)
class RankedResults:
    """All pages that were given for a query, best first, each exactly once; or the first of them (`top_k`)."""

    query: str
    results: tuple[Result, ...]
    reasoning: str
    """The think block; several, one after another, where the pages did not fit one prompt."""
    answers: tuple[ModelAnswer, ...]
    """The completions behind the order, as read: their text, their tokens, and what was wrong with them."""
    has_scores: bool
    """Whether scores are the model's own (`logits`); else they follow from the ranks alone."""

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, place: int) -> Result:
        return self.results[place]

    @property
    def order(self) -> list[int]:
        """Indices, from 0, into the pages that were given."""
        return [result.doc_id for result in self.results]

    @property
    def defects(self) -> tuple[str, ...]:
        """What was wrong with any of the completions, each kind once; the order was completed by rule."""
        return tuple(dict.fromkeys(defect for answered in self.answers for defect in answered.defects))

    def results_count(self) -> int:
        return len(self.results)

    def top_k(self, k: int) -> list[Result]:
        """The first `k` results."""
        return list(self.results[:k])

    def get_result_by_docid(self, doc_id: int) -> Result | None:
        """The result of one of the pages that were given; None where it is not among the first `top_k`."""
        return next((result for result in self.results if result.doc_id == doc_id), None)

    def get_score_by_docid(self, doc_id: int) -> float | None:
        result = self.get_result_by_docid(doc_id)
        return None if result is None else result.score


def rank_scores(n: int) -> list[float]:
    """Scores for an order without any: evenly spaced from 1, by rank."""
    return [1 - place / n for place in range(n)]


def build_results(
    query: str,
    documents: Sequence[Any],
    order: Sequence[int],
    *,
    scores: Sequence[float] | None = None,
    notes: dict[int, str] | None = None,
    reasoning: str = "",
    answers: Sequence[ModelAnswer] = (),
    top_k: int | None = None,
) -> RankedResults:
    """The results of an order of indices; `scores` by rank, `notes` by index."""
    by_rank = rank_scores(len(order)) if scores is None else scores
    results = [
        Result(index, rank, score, documents[index], (notes or {}).get(index, ""))
        for rank, (index, score) in enumerate(zip(order, by_rank, strict=True), 1)
    ]
    return RankedResults(query, tuple(results[:top_k]), reasoning, tuple(answers), scores is not None)
