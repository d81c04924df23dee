import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mmr5_train.evaluation.significance import MAX_EXACT, holm, randomization_tests

values = st.sampled_from([0.0, 1 / 3, 0.5, 1.0])


def randomization_test(a, b, **options):
    """The p-value of one figure of two systems."""
    return float(randomization_tests((np.asarray(a, float) - np.asarray(b, float))[:, None], **options)[0])


def exact_p(a, b):
    """p over the signs of all differences, zeros included, in integer arithmetic (sixths)."""
    gaps = [round(6 * (x - y)) for x, y in zip(a, b, strict=True)]
    sums = [
        abs(sum(s * g for s, g in zip(signs, gaps, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(gaps))
    ]
    return sum(total >= abs(sum(gaps)) for total in sums) / len(sums)


def test_p_equals_hand_computed_values():
    # Differences 3, 2, −1 have the sum 4. Of 8 sums, ±(3 + 2 + 1) and ±(3 + 2 − 1) are at least as far from 0.
    assert randomization_test([3, 2, 0], [0, 0, 1], seed=0) == 0.5
    assert randomization_test([1] * 6, [0] * 6, seed=0) == 2 / 2**6
    assert randomization_test([1, 0, 1], [1, 0, 1], seed=0) == 1
    assert randomization_test([1, 0], [0, 1], seed=0) == 1  # the differences cancel


@given(st.lists(st.tuples(values, values), min_size=1, max_size=9))
def test_few_differences_give_the_exact_p(pairs):
    a, b = zip(*pairs, strict=True)
    assert randomization_test(a, b, seed=0) == pytest.approx(exact_p(a, b), abs=1e-12)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=40), st.integers(0, 5))
def test_p_is_symmetric_bounded_and_ignores_equal_questions(pairs, seed):
    a, b = (list(side) for side in zip(*pairs, strict=True))
    p = randomization_test(a, b, samples=200, seed=seed)
    assert p == randomization_test(b, a, samples=200, seed=seed)
    assert 0 < p <= 1
    if sum(x != y for x, y in pairs) <= MAX_EXACT:
        assert p == randomization_test([*a, 0.5, 1], [*b, 0.5, 1], samples=200, seed=seed)


def test_sampled_p_approximates_the_exact_p(monkeypatch):
    rng = np.random.default_rng(0)
    gaps = rng.choice([-1.0, -1 / 3, 0, 1 / 3, 1], size=(MAX_EXACT, 4))
    exact = randomization_tests(gaps, seed=0)
    monkeypatch.setattr("mmr5_train.evaluation.significance.MAX_EXACT", 0)
    assert randomization_tests(gaps, samples=20_000, seed=0) == pytest.approx(exact, abs=0.015)


def test_p_is_never_zero():
    """With 200 wins in 200 questions no draw is as extreme, so p = 1/(draws + 1)."""
    assert randomization_test(np.ones(200), np.zeros(200), samples=999, seed=0) == 1 / 1000


def test_p_depends_on_the_seed_and_not_on_block_size_or_other_figures(monkeypatch):
    rng = np.random.default_rng(0)
    gaps = rng.choice([-1.0, 0, 0, 1 / 3, 1], size=(100, 3))
    first = randomization_tests(gaps, samples=1000, seed=5)
    assert first.tolist() == [
        randomization_test(gaps[:, f], np.zeros(100), samples=1000, seed=5) for f in range(3)
    ]
    assert randomization_tests(gaps, samples=1000, seed=6).tolist() != first.tolist()
    monkeypatch.setattr("mmr5_train.evaluation.significance._MAX_SIGNS", 12_345)
    assert randomization_tests(gaps, samples=1000, seed=5).tolist() == first.tolist()


def test_p_is_uniform_under_the_null_hypothesis():
    """A share of about α of the tests between two equal systems has p ≤ α."""
    rng = np.random.default_rng(1)
    gaps = rng.normal(size=(40, 2000))
    p = randomization_tests(gaps, samples=999, seed=0)
    for level in (0.01, 0.05, 0.2, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=3.5 * np.sqrt(level * (1 - level) / 2000))


@pytest.mark.parametrize(("size", "tolerance"), [(8, 1e-12), (60, 0.03)], ids=["exact", "sampled"])
def test_p_equals_that_of_scipy(size, tolerance):
    """Exactly if all signs are enumerated, else within 4 standard errors. scipy gets integers: it does not count
    sums of thirds as equal if they differ in rounding."""
    rng = np.random.default_rng(2)
    for _ in range(10):
        a, b = rng.integers(0, 4, size), rng.integers(0, 4, size)
        expected = stats.permutation_test(
            (a, b), lambda x, y, axis: np.sum(x - y, axis=axis), permutation_type="samples",
            vectorized=True, n_resamples=20_000, rng=np.random.default_rng(0),
        )  # fmt: skip
        ours = randomization_test(a / 3, b / 3, samples=20_000, seed=0)
        assert ours == pytest.approx(expected.pvalue, abs=tolerance)


def test_invalid_input_is_rejected():
    with pytest.raises(ValueError, match=r"shape \(0, 2\)"):
        randomization_tests(np.zeros((0, 2)), seed=0)
    with pytest.raises(ValueError, match="not finite"):
        randomization_tests(np.array([[np.nan]]), seed=0)


def test_holm_equals_hand_computed_values():
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04; the last is raised to .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=8))
def test_holm_preserves_order_and_is_bounded_by_bonferroni(p_values):
    corrected = holm(p_values)
    for p, c in zip(p_values, corrected, strict=True):
        assert p <= c <= min(1, len(p_values) * p)
    for (p, c), (q, d) in itertools.combinations(zip(p_values, corrected, strict=True), 2):
        if p <= q:
            assert c <= d
        if p >= q:
            assert c >= d
