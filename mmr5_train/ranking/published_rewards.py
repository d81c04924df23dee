"""Rewards that other rerankers were trained with, for comparison with MM-R5's.

As in `rewards`: a reward scores completions for n ≥ 1 pages, P is the set of local ids of the relevant pages,
and L is the list of ids in the answer as generated. Repeated ids and ids out of 1..n take up positions in L and
count as irrelevant. If no page is relevant, every list earns the full reward.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from math import sqrt
from statistics import NormalDist, fmean, pvariance

from mmr5_train.ranking.answer import ParsedAnswer, parse_answer
from mmr5_train.ranking.metrics import ndcg_at_k, recall_at_k
from mmr5_train.ranking.records import LocalId

DEPTH = 10
"""Number of ranks that REARANK and ReasonRank score."""
PERSISTENCE = 0.9
"""Parameter p of rank-biased overlap."""
RECALL_WEIGHT, OVERLAP_WEIGHT = 0.2, 0.1
"""ReasonRank's weights of recall@10 and of rank-biased overlap, next to nDCG@10."""
MIN_VARIANCE = 1.0
"""Added to the variance of a difference of two positions, which is 0 in a group without spread."""


def ndcg(completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True) -> float:
    """nDCG of the whole list, in 0..1 (Järvelin and Kekäläinen 2002). 0 if no list can be read."""
    ids = parse_answer(completion, n, expect_think=expect_think).ids
    return _ndcg(ids, n, positives, max(n, len(ids)))


def recall(completion: str, n: int, positives: Collection[LocalId], *, k: int, expect_think: bool = True) -> float:
    """Recall@k of the list, in 0..1: the relevant pages among the first k ÷ all relevant candidates."""
    ids = parse_answer(completion, n, expect_think=expect_think).ids
    if not positives:
        return float(bool(ids))
    return recall_at_k(_distinct(ids, n), positives, k)


recall_at_1, recall_at_3, recall_at_5 = (partial(recall, k=k) for k in (1, 3, 5))


def rearank(completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True) -> float:
    """REARANK's ranking reward (arXiv 2505.20046): gain in nDCG@10 over the prompt's order ÷ possible gain.

    In −1..1. Its definition has no lower bound: if the prompt's order is nearly ideal, the loss is a multiple of
    the possible gain. Here it ends at −1. If the prompt's order is ideal, the reward is nDCG@10.
    """
    ids = parse_answer(completion, n, expect_think=expect_think).ids
    achieved, initial = (_ndcg(order, n, positives, DEPTH) for order in (ids, range(1, n + 1)))
    return max(-1.0, (achieved - initial) / (1 - initial)) if initial < 1 else achieved


def reasonrank(
    completion: str,
    n: int,
    positives: Collection[LocalId],
    *,
    reference: Sequence[LocalId],
    expect_think: bool = True,
) -> float:
    """ReasonRank's reward (arXiv 2508.07050): nDCG@10 + 0.2 recall@10 + 0.1 rank-biased overlap with `reference`.

    `reference` is the order to imitate, of all pages. The reward is −1 if the structure is invalid, 0 if L is not
    a permutation of 1..n, else in 0..1.3.
    """
    answer = parse_answer(completion, n, expect_think=expect_think)
    if not answer.structure_valid:
        return -1.0
    if not answer.is_complete_permutation:
        return 0.0
    found = recall_at_k(answer.ids, positives, DEPTH) if positives else 1.0
    overlap = rank_biased_overlap(answer.ids, reference)
    return _ndcg(answer.ids, n, positives, DEPTH) + RECALL_WEIGHT * found + OVERLAP_WEIGHT * overlap


def rank_biased_overlap(a: Sequence[int], b: Sequence[int], p: float = PERSISTENCE) -> float:
    """Rank-biased overlap (Webber, Moffat and Zobel 2010) of two orders of the same pages, in 0..1.

    Σ_d p^(d−1) · |a[:d] ∩ b[:d]| / d over the depths d = 1..n, divided by Σ_d p^(d−1): 1 for equal orders.
    """
    weights = [p**depth for depth in range(len(a))]
    shares = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, len(a) + 1)]
    return sum(w * share for w, share in zip(weights, shares, strict=True)) / sum(weights)


def fidelity(
    completions: Sequence[str], n: int, positives: Collection[LocalId], *, expect_think: bool = True
) -> list[float]:
    """A pairwise fidelity reward after VisualQuality-R1 (arXiv 2505.14460): one value in 0..1 per completion.

    `completions` are the samples of one prompt, its group. Thurstone's model gives the probability that relevant
    page i precedes irrelevant page j: Φ((d_j − d_i) / √(σ_i² + σ_j² + 1)), where d is a page's position in the
    completion and σ² the variance of its position over the group. A page that is missing from L has position
    n + 1. The reward is the mean of √probability over all pairs: the fidelity to a label that prefers i.
    VisualQuality-R1 compares a sample with the other image's mean over the group; here both pages are in one
    completion, so both positions are its own. A completion without a readable list earns 0.
    """
    answers = [parse_answer(completion, n, expect_think=expect_think) for completion in completions]
    relevant = set(positives)
    others = [j for j in range(1, n + 1) if j not in relevant]
    positions = [_positions(answer, n) for answer in answers]
    variance = {i: pvariance([position[i] for position in positions]) for i in range(1, n + 1)}

    def preference(position: dict[int, int], i: int, j: int) -> float:
        deviation = sqrt(variance[i] + variance[j] + MIN_VARIANCE)
        return NormalDist().cdf((position[j] - position[i]) / deviation)

    return [
        (fmean(sqrt(preference(position, i, j)) for i in relevant for j in others) if relevant and others else 1.0)
        if answer.ids
        else 0.0
        for answer, position in zip(answers, positions, strict=True)
    ]


def _positions(answer: ParsedAnswer, n: int) -> dict[int, int]:
    """The first position of each page in the answer's list, from 1; n + 1 if it is missing."""
    first = {i: position for position, i in reversed(list(enumerate(answer.ids, 1)))}
    return {i: first.get(i, n + 1) for i in range(1, n + 1)}


def _ndcg(ids: Sequence[int], n: int, positives: Collection[LocalId], k: int) -> float:
    if not positives:
        return float(bool(ids))
    return ndcg_at_k(_distinct(ids, n), positives, k)


def _distinct(ids: Sequence[int], n: int) -> list[int]:
    """The ids with repeated ones and those out of 1..n replaced by distinct ids that no page has."""
    seen: set[int] = set()
    distinct = []
    for position, i in enumerate(ids):
        valid = 1 <= i <= n and i not in seen
        seen.add(i)
        distinct.append(i if valid else -1 - position)
    return distinct
