"""Rewards of other rerankers, hand-computed from their formulas."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.published_rewards import (
    fidelity,
    ndcg,
    rank_biased_overlap,
    rearank,
    reasonrank,
    recall,
    recall_at_3,
)
from mmr5_train.ranking.rewards import NAMES, score_group

SECOND, THIRD = 1 / math.log2(3), 1 / 2  # discounts of ranks 2 and 3


def completion(*ids):
    return render_completion("Image 1: a table, so it helps.", ids)


@pytest.mark.parametrize(
    ("ids", "positives", "expected"),
    [
        ((1, 2, 3), {1}, 1),
        ((2, 1, 3), {1}, SECOND),
        ((2, 3, 1), {1}, THIRD),
        ((1, 3, 2), {1, 2}, (1 + THIRD) / (1 + SECOND)),
        ((2, 2, 1), {1}, THIRD),  # repeated ids take up positions
        ((9, 1), {1}, SECOND),
        ((1, 1), {1, 2}, 1 / (1 + SECOND)),
        ((), {1}, 0),
        ((3, 2), set(), 1),
    ],
)
def test_ndcg(ids, positives, expected):
    assert ndcg(completion(*ids), 3, positives) == pytest.approx(expected)


def test_recall():
    assert recall(completion(4, 2, 1, 3), 4, {1, 3}, k=3) == 1 / 2
    assert recall_at_3(completion(2, 2, 1), 3, {1}) == 1
    assert recall_at_3(completion(2, 2, 3, 1), 3, {1}) == 0
    assert recall_at_3("no list", 3, set()) == 0


@pytest.mark.parametrize(
    ("ids", "positives", "expected"),
    [
        ((2, 1, 3), {2}, 1),  # the whole possible gain: from 1/log2(3) to 1
        ((1, 2, 3), {2}, 0),  # the prompt's order
        ((1, 3, 2), {2}, (THIRD - SECOND) / (1 - SECOND)),
        ((1, 3), {2}, -1),  # −1.7 without the bound
        ((1, 2, 3), {1}, 1),  # the prompt's order is ideal: nDCG
        ((2, 1, 3), {1}, SECOND),
    ],
)
def test_rearank(ids, positives, expected):
    assert rearank(completion(*ids), 3, positives) == pytest.approx(expected)


def test_reasonrank():
    overlap = (0 + 0.9 * 1 + 0.81 * 1) / (1 + 0.9 + 0.81)
    assert rank_biased_overlap((2, 1, 3), (1, 2, 3)) == pytest.approx(overlap)
    reference = (1, 2, 3)
    assert reasonrank(completion(1, 2, 3), 3, {1}, reference=reference) == pytest.approx(1.3)
    expected = SECOND + 0.2 + 0.1 * overlap
    assert reasonrank(completion(2, 1, 3), 3, {1}, reference=reference) == pytest.approx(expected)
    for ids in ((1, 2), (1, 1, 2), (1, 2, 3, 3), ()):
        assert reasonrank(completion(*ids), 3, {1}, reference=reference) == 0
    assert reasonrank("<answer>[1, 2, 3]</answer>", 3, {1}, reference=reference) == -1


def test_fidelity():
    """Two completions that exchange two pages: σ² of both positions is 1/4, so the deviation is √1.5."""
    better, worse = fidelity([completion(1, 2), completion(2, 1)], 2, {1})
    probability = (1 + math.erf(1 / math.sqrt(1.5) / math.sqrt(2))) / 2
    assert better == pytest.approx(math.sqrt(probability))
    assert worse == pytest.approx(math.sqrt(1 - probability))
    # Without spread, only the added variance remains. A missing page comes after all others.
    probability = (1 + math.erf(2 / math.sqrt(2))) / 2
    assert fidelity([completion(1)] * 2, 2, {1}) == pytest.approx([math.sqrt(probability)] * 2)
    assert fidelity([completion(1, 2), "no list"], 2, {1, 2}) == [1, 0]


ORDERS = st.permutations([1, 2, 3, 4])


@given(ORDERS, ORDERS, st.sets(st.integers(1, 4), min_size=1), st.sampled_from(NAMES))
def test_relevant_pages_first_is_the_best_order(order, reference, positives, name):
    """`true_reasoning` depends on the notes, and `fidelity` on the spread of each page's position in the group."""
    assume(name not in ("true_reasoning", "fidelity"))
    reference = sorted(reference, key=lambda i: i not in positives)
    best, other = score_group(name, [completion(*reference), completion(*order)], 4, positives, reference)
    assert best >= other - 1e-9


@given(st.lists(ORDERS, max_size=6), st.integers(1, 4))
def test_moving_the_relevant_page_up_raises_the_fidelity_reward(others, relevant):
    rest = [i for i in range(1, 5) if i != relevant]
    group = [completion(*rest[:k], relevant, *rest[k:]) for k in range(4)] + [completion(*o) for o in others]
    rewards = fidelity(group, 4, {relevant})[:4]
    assert rewards == sorted(rewards, reverse=True)
    assert len(set(rewards)) == 4
