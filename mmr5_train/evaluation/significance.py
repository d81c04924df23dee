"""Whether two systems differ by more than chance: paired randomization tests, and Holm's correction. numpy only.

Array shapes: Q questions, F figures, S draws of signs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmr5_train.evaluation.metrics import Values

# So many non-zero differences have few enough signs (4,096) to go through them all.
EXACT = 12
# Signs that are in memory at a time: 64 MB of 64-bit floats, twice.
_DRAWS = 8_000_000


def randomization_test(
    a: Sequence[float] | Values, b: Sequence[float] | Values, *, samples: int = 10_000, seed: int
) -> float:
    """Two-sided p-value of the mean of a − b over paired questions (Fisher's randomization test).

    If a and b did not differ, each question's difference could as well have the other sign: p is the share of
    signs that give a mean at least as far from zero (Smucker, Allan and Carterette, CIKM 2007, section 3). It is
    symmetric in a and b and never 0.
    """
    if len(a) != len(b):
        raise ValueError(f"paired values must be of the same questions, got {len(a)} and {len(b)}")
    difference_Q = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(randomization_tests(difference_Q[:, None], samples=samples, seed=seed)[0])


def randomization_tests(differences_QF: Values, *, samples: int = 10_000, seed: int) -> Values:
    """p-values of several figures over the same questions, shape (F,); a question without a figure has 0 there.

    Up to `EXACT` non-zero differences: all signs, so p is exact. Beyond: `samples` drawn ones, the same for every
    figure, and p = (b + 1)/(samples + 1) for b draws as far from zero, since the signs found are one draw as well
    (Davison and Hinkley 1997, section 4.2.2).
    """
    if differences_QF.ndim != 2 or not len(differences_QF):
        raise ValueError(f"expected questions × figures, got an array of shape {differences_QF.shape}")
    if not np.isfinite(differences_QF).all():
        raise ValueError("a difference is not finite; a question without the figure has 0 there")
    p_F = np.empty(differences_QF.shape[1])
    few_F = np.count_nonzero(differences_QF, axis=0) <= EXACT
    for figure in np.flatnonzero(few_F):
        column_Q = differences_QF[:, figure]
        p_F[figure] = _exact(column_Q[column_Q != 0])
    if not few_F.all():
        p_F[~few_F] = _drawn(differences_QF[:, ~few_F], samples, seed)
    return p_F


def _exact(nonzero: Values) -> float:
    """Over all 2^k signs of k differences; 1 where there is none."""
    signs_SK = 1 - 2.0 * (np.arange(2 ** len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1)
    return float(_as_far(signs_SK @ nonzero[:, None], nonzero[:, None]).mean())


def _drawn(differences_QF: Values, samples: int, seed: int) -> Values:
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWS // len(differences_QF))
    as_far_F = np.zeros(differences_QF.shape[1])
    for start in range(0, samples, block):
        kept_SQ = rng.random((min(block, samples - start), len(differences_QF))) < 0.5
        sums_SF = 2 * (kept_SQ.astype(np.float64) @ differences_QF) - differences_QF.sum(axis=0)
        as_far_F += _as_far(sums_SF, differences_QF).sum(axis=0)
    return (as_far_F + 1) / (samples + 1)


def _as_far(sums_SF: Values, differences_QF: Values) -> NDArray[np.bool_]:
    """Where a sum is at least as far from zero as the one found. Equal sums differ in rounding, and must count."""
    slack_F = 1e-9 * np.abs(differences_QF).sum(axis=0)
    return np.asarray(np.abs(sums_SF) >= np.abs(differences_QF.sum(axis=0)) - slack_F)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected over all that are given, in their order (Holm 1979, step-down).

    The k-th smallest of m is multiplied by m − k + 1; none falls below one before it, and none exceeds 1. Those
    below α are then wrong, any of them, with a probability of at most α, however the tests depend on each other.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for passed, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - passed) * p_values[i]))
        corrected[i] = highest
    return corrected
