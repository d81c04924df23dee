"""Significance of differences between two systems: paired randomization tests and Holm's correction.

The test is that of scipy.stats.permutation_test; the unit tests compare their p-values. This module differs in two
ways. It tests all figures at once with one matrix product (0.3 s instead of 8 s for 9 figures of 1,658 questions).
It also counts sums as equal if they differ only by rounding, which matters for recall values such as 1/3.
Array shapes: Q questions, F figures, S draws of signs, K non-zero differences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmr5_train.evaluation.metrics import Values

# Up to this many non-zero differences, the test enumerates all signs (at most 4,096).
MAX_EXACT = 12
# Largest number of signs drawn at once: 64 MB of 64-bit floats, twice.
_MAX_SIGNS = 8_000_000


def randomization_tests(differences_QF: Values, *, samples: int = 10_000, seed: int) -> Values:
    """p-values of the mean differences of several figures over the same questions, shape (F,).

    Fisher's randomization test, two-sided: under the null hypothesis the sign of each question's difference is
    arbitrary. p is the share of sign assignments whose mean is at least as far from zero as the observed mean
    (Smucker, Allan and Carterette, CIKM 2007, section 3). p is never 0. Pass 0 where a question lacks a figure.

    A figure with at most `MAX_EXACT` non-zero differences gets the exact p over all signs. Otherwise `samples`
    sign assignments are drawn, the same for every figure, and p = (b + 1)/(samples + 1), where b counts the draws
    at least as far from zero; the observed assignment is the additional one (Davison and Hinkley 1997, section
    4.2.2).
    """
    if differences_QF.ndim != 2 or not len(differences_QF):
        raise ValueError(f"expected questions × figures, got an array of shape {differences_QF.shape}")
    if not np.isfinite(differences_QF).all():
        raise ValueError("a difference is not finite; pass 0 where a question lacks the figure")
    p_F = np.empty(differences_QF.shape[1])
    exact_F = np.count_nonzero(differences_QF, axis=0) <= MAX_EXACT
    for figure in np.flatnonzero(exact_F):
        column_Q = differences_QF[:, figure]
        p_F[figure] = _exact_p(column_Q[column_Q != 0])
    if not exact_F.all():
        p_F[~exact_F] = _sampled_p(differences_QF[:, ~exact_F], samples, seed)
    return p_F


def _exact_p(differences_K: Values) -> float:
    """p over all 2^K signs; 1 if there is no difference."""
    k = len(differences_K)
    signs_SK = 1 - 2.0 * (np.arange(2**k)[:, None] >> np.arange(k) & 1)
    return float(_is_extreme(signs_SK @ differences_K[:, None], differences_K[:, None]).mean())


def _sampled_p(differences_QF: Values, samples: int, seed: int) -> Values:
    rng = np.random.default_rng(seed)
    block = max(1, _MAX_SIGNS // len(differences_QF))
    extreme_F = np.zeros(differences_QF.shape[1])
    for start in range(0, samples, block):
        positive_SQ = rng.random((min(block, samples - start), len(differences_QF))) < 0.5
        sums_SF = 2 * (positive_SQ.astype(np.float64) @ differences_QF) - differences_QF.sum(axis=0)
        extreme_F += _is_extreme(sums_SF, differences_QF).sum(axis=0)
    return (extreme_F + 1) / (samples + 1)


def _is_extreme(sums_SF: Values, differences_QF: Values) -> NDArray[np.bool_]:
    """Whether a sum is at least as far from zero as the observed one. The slack allows for rounding."""
    slack_F = 1e-9 * np.abs(differences_QF).sum(axis=0)
    return np.asarray(np.abs(sums_SF) >= np.abs(differences_QF.sum(axis=0)) - slack_F)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple testing, in the given order (Holm 1979, step-down).

    The k-th smallest of m values is multiplied by m − k + 1, then raised to the largest corrected value before it
    and capped at 1. If all hypotheses with a corrected value of at most α are rejected, the probability of a false
    rejection is at most α, for any dependence between the tests.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected
