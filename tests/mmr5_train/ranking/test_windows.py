import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.ranking.windows import fuse_orders, make_plan, sliding


def follow(plan, judge):
    """What a plan makes of a judge of single windows, and the windows it asked for, round by round."""
    rounds, windows = [], next(plan)
    while True:
        rounds.append(windows)
        try:
            windows = plan.send([judge(window) for window in windows])
        except StopIteration as end:
            return end.value, rounds


def by_key(key):
    return lambda window: sorted(range(len(window)), key=lambda i: key[window[i]])


sizes = st.integers(1, 120)


@given(sizes, st.integers(2, 25), st.data())
@pytest.mark.parametrize("strategy", ["sliding", "tournament"])
def test_every_page_is_ranked_once_and_the_best_is_first(strategy, n, window, data):
    key = data.draw(st.permutations(range(n)))
    stride = data.draw(st.integers(1, window - 1))
    order, rounds = follow(make_plan(n, strategy, window, stride), by_key(key))
    assert sorted(order) == list(range(n))
    assert key[order[0]] == 0
    for windows in rounds:
        asked = [page for one in windows for page in one]
        assert len(set(asked)) == len(asked), "windows of a round wait for each other"
        assert all(len(one) <= window for one in windows)


@given(sizes, st.integers(2, 25), st.data())
def test_sliding_brings_the_best_of_a_window_to_the_top(n, window, data):
    stride = data.draw(st.integers(1, window - 1))
    key = data.draw(st.permutations(range(n)))
    order, _ = follow(sliding(n, window, stride), by_key(key))
    best = min(n, window - stride)
    assert [key[page] for page in order[:best]] == list(range(best))


def test_what_fits_is_ranked_at_once():
    assert follow(make_plan(7, "sliding", None, None), by_key(range(7)))[1] == [[list(range(7))]]
    assert follow(make_plan(7, "tournament", 7, None), by_key(range(7)))[1] == [[list(range(7))]]


def test_a_window_takes_along_what_the_one_before_found():
    _, rounds = follow(sliding(6, 3, 2), by_key([5, 4, 3, 2, 1, 0]))
    assert rounds == [[[3, 4, 5]], [[1, 2, 5]], [[0, 5]]]


def test_a_tournament_takes_few_rounds():
    order, rounds = follow(make_plan(200, "tournament", 20, None), by_key(range(200)))
    assert [len(windows) for windows in rounds] == [10, 5, 3, 2, 1]
    assert order[:10] == list(range(10))


def test_windows_must_overlap():
    with pytest.raises(ValueError, match="less than window"):
        follow(sliding(30, 10, 10), by_key(range(30)))
    with pytest.raises(ValueError, match="at least 2"):
        follow(make_plan(30, "tournament", 1, None), by_key(range(30)))


def test_orders_are_fused_by_mean_rank():
    assert fuse_orders([[2, 1, 3], [1, 2, 3], [1, 3, 2]]) == [1, 2, 3]
    assert fuse_orders([[3, 1, 2], [1, 3, 2]]) == [3, 1, 2]
    assert fuse_orders([[1, 2]]) == [1, 2]
