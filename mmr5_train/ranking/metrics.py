"""Retrieval metrics of one ranking, for pages or any other ids.

Relevance is binary. Every metric divides by *all* gold pages, including those that the first stage missed, as
MMDocIR does.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray


def recall_at_k(ranked: Sequence[Hashable], positives: Collection[Hashable], k: int) -> float:
    """Number of gold pages among the first k ÷ number of all gold pages."""
    return float(_hits(ranked, positives)[:k].sum()) / len(set(positives))


def ndcg_at_k(ranked: Sequence[Hashable], positives: Collection[Hashable], k: int) -> float:
    """Σ hit/log2(1 + rank) over the first k ÷ the same sum with all gold pages ranked first (Järvelin 2002)."""
    hits = _hits(ranked, positives)[:k]
    discount = 1 / np.log2(np.arange(2, k + 2))
    return float((hits * discount[: len(hits)]).sum() / discount[: len(set(positives))].sum())


def reciprocal_rank(ranked: Sequence[Hashable], positives: Collection[Hashable]) -> float:
    """1 / rank of the first gold page, 0 if none is ranked."""
    hit_indices = np.flatnonzero(_hits(ranked, positives))
    return 1 / (int(hit_indices[0]) + 1) if len(hit_indices) else 0.0


def _hits(ranked: Sequence[Hashable], positives: Collection[Hashable]) -> NDArray[np.float64]:
    """One value per rank: 1.0 for a gold page, else 0.0."""
    gold = set(positives)
    if not gold:
        raise ValueError("metrics are undefined for a question without a gold page")
    if len(set(ranked)) != len(ranked):
        raise ValueError("a page occurs twice in a ranking")
    return np.array([page in gold for page in ranked], dtype=np.float64)
