"""Metrics of many rankings: means over questions and domains, and bootstrap intervals.

mmr5_train/ranking/metrics.py has the metrics of one ranking. Array shapes: Q questions, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mmr5_train.ranking.answer import ORDER_PRESERVING_DEFECTS, Defect
from mmr5_train.ranking.metrics import ndcg_at_k, recall_at_k, reciprocal_rank
from mmr5_train.ranking.records import ModelAnswer, PageId, Ranking, Record

KS = (1, 3, 5, 10)
CONFIDENCE = 0.95
# Largest number of indices drawn at once: 64 MB at 64 bits each.
_MAX_INDICES = 8_000_000

Values = NDArray[np.float64]


def question_metrics(ranked: Sequence[PageId], positives: Collection[PageId]) -> dict[str, float]:
    """All metrics of one ranking: recall@k and ndcg@k for each k in `KS`, and mrr."""
    return {
        **{f"recall@{k}": recall_at_k(ranked, positives, k) for k in KS},
        **{f"ndcg@{k}": ndcg_at_k(ranked, positives, k) for k in KS},
        "mrr": reciprocal_rank(ranked, positives),
    }


@dataclass(frozen=True)
class QuestionTable:
    """One row per question, in the order of the rankings file. Every array in `metrics` has shape (Q,)."""

    query_ids: tuple[str, ...]
    domains: tuple[str, ...]
    question_types: tuple[tuple[str, ...], ...]
    metrics: dict[str, Values]


def question_table(rankings: Sequence[Ranking], *, sampled: bool = False) -> QuestionTable:
    """The metrics of each question: those of its greedy answer, or means over its sampled answers.

    In both cases a row is one question, so bootstrap intervals resample questions, not answers.
    """
    if not rankings:
        raise ValueError("no rankings to score")
    rows = []
    for ranking in rankings:
        answers = _answers(ranking, sampled)
        if not answers:
            raise ValueError(f"the ranking of {ranking.query_id} by {ranking.system} has no sampled answer")
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


def micro(values: Values) -> float:
    """Mean over questions."""
    return float(np.mean(values))


def macro(values: Values, domains: Sequence[str]) -> float:
    """Mean over domains of the mean over each domain's questions."""
    return float(np.mean([domain_values.mean() for domain_values in _split(values, domains)]))


def _split(values_Q: Values, labels: Sequence[str] | None) -> list[Values]:
    """The values of each label, labels in sorted order; one array with all values if `labels` is None."""
    if labels is None:
        return [values_Q]
    if len(labels) != len(values_Q):
        raise ValueError(f"{len(values_Q)} values and {len(labels)} group labels")
    names, index_Q = np.unique(labels, return_inverse=True)
    return [values_Q[index_Q == i] for i in range(len(names))]


def is_complete(answer: ModelAnswer) -> bool:
    """Whether the model's own list was a complete permutation, before `to_model_answer` completed it."""
    return {defect.value for defect in ORDER_PRESERVING_DEFECTS}.issuperset(answer.defects)


def defect_counts(rankings: Iterable[Ranking], *, sampled: bool = False) -> dict[str, int]:
    """Counts: `answers`, `complete_permutations`, `without_defect`, and each defect by name, zeros included."""
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
    """The mean of a − b over paired questions, and its interval."""


def bootstrap_mean(
    values: Sequence[float] | Values, *, samples: int = 10_000, seed: int, groups: Sequence[str] | None = None
) -> Interval:
    """The mean of one value per question, with its percentile bootstrap interval over questions (Efron 1979).

    With `groups`, one label per question (its domain), the mean is the macro mean, and questions are resampled
    within their group, so no group ever becomes empty. Raises ValueError if there is no question.
    """
    values_Q = np.asarray(values, dtype=np.float64)
    if values_Q.ndim != 1 or not len(values_Q):
        raise ValueError(f"expected one value per question, got an array of shape {values_Q.shape}")
    rng = np.random.default_rng(seed)
    members = _split(values_Q, groups)
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
    """The mean of a − b with its interval. a[q] and b[q] belong to question q, which is resampled as a pair.

    For sampled answers, pass each question's mean over its samples: the interval is over questions.
    """
    if len(a) != len(b):
        raise ValueError(f"paired values must belong to the same questions, got {len(a)} and {len(b)}")
    difference_Q = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    interval = bootstrap_mean(difference_Q, samples=samples, seed=seed, groups=groups)
    return Difference(**interval.model_dump())


def _resampled_means(values_Q: Values, samples: int, rng: np.random.Generator) -> Values:
    """Means of `samples` bootstrap samples of the values, shape (S,)."""
    if len(values_Q) == 1:  # scipy requires two values
        return np.full(samples, values_Q[0])
    result = stats.bootstrap(
        (values_Q,),
        np.mean,
        n_resamples=samples,
        batch=max(1, _MAX_INDICES // len(values_Q)),
        method="percentile",
        rng=rng,
    )
    return np.asarray(result.bootstrap_distribution, dtype=np.float64)
