"""Retrieval metrics on ranked pages, means over questions and domains, and bootstrap intervals. numpy only.

Relevance is binary. Every metric divides by *all* gold pages, those the first stage missed included, as
MMDocIR does. Array shapes: Q questions, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmr5_train.ranking.answer import ORDER_PRESERVING_DEFECTS, Defect
from mmr5_train.ranking.records import ModelAnswer, PageId, Ranking, Record

KS = (1, 3, 5, 10)
CONFIDENCE = 0.95
# Draws that are in memory at a time: 64 MB of 64-bit indices.
_DRAWS = 8_000_000

Values = NDArray[np.float64]


def recall_at_k(ranked: Sequence[PageId], positives: Collection[PageId], k: int) -> float:
    """Share of all gold pages among the first k."""
    return float(_hits(ranked, positives)[:k].sum()) / len(set(positives))


def ndcg_at_k(ranked: Sequence[PageId], positives: Collection[PageId], k: int) -> float:
    """Σ hit/log2(1 + rank) over the first k ÷ the same sum for all gold pages ranked first (Järvelin 2002)."""
    hits = _hits(ranked, positives)[:k]
    discount = 1 / np.log2(np.arange(2, k + 2))
    return float((hits * discount[: len(hits)]).sum() / discount[: len(set(positives))].sum())


def reciprocal_rank(ranked: Sequence[PageId], positives: Collection[PageId]) -> float:
    """1 / rank of the first gold page, 0 where none is ranked."""
    places = np.flatnonzero(_hits(ranked, positives))
    return 1 / (int(places[0]) + 1) if len(places) else 0.0


def _hits(ranked: Sequence[PageId], positives: Collection[PageId]) -> Values:
    """1.0 where a gold page stands, else 0.0, one a rank."""
    gold = set(positives)
    if not gold:
        raise ValueError("no metric is defined for a question without a gold page")
    if len(set(ranked)) != len(ranked):
        raise ValueError("a page stands twice in a ranking")
    return np.array([page in gold for page in ranked], dtype=np.float64)


def question_metrics(ranked: Sequence[PageId], positives: Collection[PageId]) -> dict[str, float]:
    """All metrics of one ranking: recall@k and ndcg@k for k of `KS`, and mrr."""
    return {
        **{f"recall@{k}": recall_at_k(ranked, positives, k) for k in KS},
        **{f"ndcg@{k}": ndcg_at_k(ranked, positives, k) for k in KS},
        "mrr": reciprocal_rank(ranked, positives),
    }


@dataclass(frozen=True)
class QuestionTable:
    """One row a question, in the order of the rankings file. Every array of `metrics` has the shape (Q,)."""

    query_ids: tuple[str, ...]
    domains: tuple[str, ...]
    question_types: tuple[tuple[str, ...], ...]
    metrics: dict[str, Values]


def question_table(rankings: Sequence[Ranking], *, sampled: bool = False) -> QuestionTable:
    """The metrics of each question: of its greedy answer, or the mean over its sampled answers.

    The question stays the unit either way, so intervals over rows are right for both.
    """
    if not rankings:
        raise ValueError("no rankings to score")
    rows = []
    for ranking in rankings:
        answers = _answers(ranking, sampled)
        if not answers:
            raise ValueError(f"the ranking of {ranking.query_id} by {ranking.system} holds no sampled answer")
        scores = [question_metrics(ranking.ranked_pages(answer), ranking.positives) for answer in answers]
        rows.append({name: float(np.mean([score[name] for score in scores])) for name in scores[0]})
    return QuestionTable(
        query_ids=tuple(ranking.query_id for ranking in rankings),
        domains=tuple(ranking.domain for ranking in rankings),
        question_types=tuple(ranking.question_types for ranking in rankings),
        metrics={name: np.array([row[name] for row in rows]) for name in rows[0]},
    )


def _answers(ranking: Ranking, sampled: bool) -> tuple[ModelAnswer, ...]:
    return ranking.samples if sampled else (ranking.greedy,)


class GroupMean(Record):
    mean: float
    questions: int


def micro(values: Values) -> float:
    """Mean over questions."""
    return float(np.mean(values))


def macro(values: Values, domains: Sequence[str]) -> float:
    """Mean over domains of the mean over each domain's questions."""
    return float(np.mean([group.mean for group in by_domain(values, domains).values()]))


def by_domain(values: Values, domains: Sequence[str]) -> dict[str, GroupMean]:
    return _by_label(values, [(domain,) for domain in domains])


def by_question_type(values: Values, question_types: Sequence[Collection[str]]) -> dict[str, GroupMean]:
    """A question of several types counts in each; one of no type in none."""
    return _by_label(values, question_types)


def _by_label(values: Values, labels: Sequence[Collection[str]]) -> dict[str, GroupMean]:
    rows: dict[str, list[float]] = {}
    for value, names in zip(values, labels, strict=True):
        for name in set(names):
            rows.setdefault(name, []).append(float(value))
    return {name: GroupMean(mean=float(np.mean(rows[name])), questions=len(rows[name])) for name in sorted(rows)}


def is_complete(answered: ModelAnswer) -> bool:
    """Whether the answer was a complete permutation as written, before it was completed by rule."""
    return {defect.value for defect in ORDER_PRESERVING_DEFECTS}.issuperset(answered.defects)


def defect_counts(rankings: Iterable[Ranking], *, sampled: bool = False) -> dict[str, int]:
    """`answers`, `complete_permutations`, `without_defect`, and how many have each defect, zeros included."""
    names = ["answers", "complete_permutations", "without_defect", *(defect.value for defect in Defect)]
    counts = dict.fromkeys(names, 0)
    for ranking in rankings:
        for answer in _answers(ranking, sampled):
            counts["answers"] += 1
            counts["complete_permutations"] += is_complete(answer)
            counts["without_defect"] += not answer.defects
            for defect in answer.defects:
                counts[defect] += 1
    return counts


class Interval(Record):
    """A mean and its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float


class Difference(Interval):
    """The mean of a − b over the same questions, with its interval."""


def bootstrap_mean(
    values: Sequence[float] | Values, *, samples: int = 10_000, seed: int, groups: Sequence[str] | None = None
) -> Interval:
    """The mean of one value a question, with the interval over resampled questions (Efron 1979, percentile).

    With `groups`, one label a question (its domain), the mean is macro, and questions are resampled inside
    their group, so that no group is ever empty. Raises ValueError where there is no question.
    """
    values_Q = np.asarray(values, dtype=np.float64)
    if values_Q.ndim != 1 or not len(values_Q):
        raise ValueError(f"expected one value a question, got an array of shape {values_Q.shape}")
    labels = (
        np.zeros(len(values_Q), dtype=np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
    )
    if len(labels) != len(values_Q):
        raise ValueError(f"{len(values_Q)} values and {len(labels)} group labels")
    rng = np.random.default_rng(seed)
    members = [values_Q[labels == group] for group in range(int(labels.max()) + 1)]
    means_S = np.mean([_resampled_means(member, samples, rng) for member in members], axis=0)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means_S, [tail, 100 - tail])
    return Interval(mean=float(np.mean([member.mean() for member in members])), low=float(low), high=float(high))


def paired_bootstrap(
    a: Sequence[float] | Values,
    b: Sequence[float] | Values,
    *,
    samples: int = 10_000,
    seed: int,
    groups: Sequence[str] | None = None,
) -> Difference:
    """The mean of a − b with its interval: question q has the values a[q] and b[q] and is drawn as a pair.

    For sampled answers pass each question's mean over its samples: the question is the unit.
    """
    if len(a) != len(b):
        raise ValueError(f"paired values must be of the same questions, got {len(a)} and {len(b)}")
    difference_Q = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    interval = bootstrap_mean(difference_Q, samples=samples, seed=seed, groups=groups)
    return Difference(**interval.model_dump())


def compare(
    a: QuestionTable, b: QuestionTable, metric: str, *, samples: int = 10_000, seed: int, by_domain: bool = False
) -> Difference:
    """`paired_bootstrap` of two systems on one metric, micro or (`by_domain`) macro.

    Raises ValueError where the two tables are not of the same questions in the same order.
    """
    if a.query_ids != b.query_ids:
        raise ValueError("the two tables are not of the same questions in the same order")
    groups = a.domains if by_domain else None
    return paired_bootstrap(a.metrics[metric], b.metrics[metric], samples=samples, seed=seed, groups=groups)


def _resampled_means(values_Q: Values, samples: int, rng: np.random.Generator) -> Values:
    """Means of `samples` draws of Q values with replacement, shape (S,), in blocks of bounded memory."""
    block = max(1, _DRAWS // len(values_Q))
    means = []
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        drawn = rng.integers(0, len(values_Q), size=(rows, len(values_Q)))
        means.append(values_Q[drawn].mean(axis=1))
    return np.concatenate(means)
