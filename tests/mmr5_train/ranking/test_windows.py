import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.ranking.windows import fuse_orders, make_plan, sliding


def run_plan(plan, rank_window):
    """Runs a plan with a function that ranks one window. Returns the order and the windows of each round."""
    rounds, windows = [], next(plan)
    while True:
        rounds.append(windows)
        try:
            windows = plan.send([rank_window(window) for window in windows])
        except StopIteration as end:
            return end.value, rounds


def ranker_by_key(key):
    """A function that ranks a window by the pages' keys, ascending."""
    return lambda window: sorted(range(len(window)), key=lambda i: key[window[i]])


sizes = st.integers(1, 120)


@given(sizes, st.integers(2, 25), st.data())
@pytest.mark.parametrize("strategy", ["sliding", "tournament"])
def test_every_page_is_ranked_once_and_the_best_page_is_first(strategy, n, window, data):
    key = data.draw(st.permutations(range(n)))
    stride = data.draw(st.integers(1, window - 1))
    order, rounds = run_plan(make_plan(n, strategy, window, stride), ranker_by_key(key))
    assert sorted(order) == list(range(n))
    assert key[order[0]] == 0
    for windows in rounds:
        pages = [page for window_pages in windows for page in window_pages]
        assert len(set(pages)) == len(pages), "windows of one round overlap"
        assert all(len(window_pages) <= window for window_pages in windows)


@given(sizes, st.integers(2, 25), st.data())
def test_sliding_brings_the_best_pages_to_the_top(n, window, data):
    stride = data.draw(st.integers(1, window - 1))
    key = data.draw(st.permutations(range(n)))
    order, _ = run_plan(sliding(n, window, stride), ranker_by_key(key))
    best = min(n, window - stride)
    assert [key[page] for page in order[:best]] == list(range(best))


def test_pages_that_fit_in_one_window_are_ranked_at_once():
    assert run_plan(make_plan(7, "sliding", None, None), ranker_by_key(range(7)))[1] == [[list(range(7))]]
    assert run_plan(make_plan(7, "tournament", 7, None), ranker_by_key(range(7)))[1] == [[list(range(7))]]


def test_sliding_window_includes_the_best_pages_of_the_previous_window():
    _, rounds = run_plan(sliding(6, 3, 2), ranker_by_key([5, 4, 3, 2, 1, 0]))
    assert rounds == [[[3, 4, 5]], [[1, 2, 5]], [[0, 5]]]


def test_tournament_halves_the_windows_until_one_is_left():
    order, rounds = run_plan(make_plan(200, "tournament", 20, None), ranker_by_key(range(200)))
    assert [len(windows) for windows in rounds] == [10, 5, 3, 2, 1]
    assert order[:10] == list(range(10))


def test_invalid_window_sizes_raise_value_error():
    with pytest.raises(ValueError, match="less than window"):
        run_plan(sliding(30, 10, 10), ranker_by_key(range(30)))
    with pytest.raises(ValueError, match="at least 2"):
        run_plan(make_plan(30, "tournament", 1, None), ranker_by_key(range(30)))


def test_fuse_orders_by_mean_rank():
    assert fuse_orders([[2, 1, 3], [1, 2, 3], [1, 3, 2]]) == [1, 2, 3]
    assert fuse_orders([[3, 1, 2], [1, 3, 2]]) == [3, 1, 2]
    assert fuse_orders([[1, 2]]) == [1, 2]
