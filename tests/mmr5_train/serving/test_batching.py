"""Which requests are ranked together, and in which order."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.serving.batching import Job, take_batch

NOW = 100.0


def jobs(*sizes_and_waits):
    return deque(Job(f"{pages}", [b""] * pages, submitted=NOW - waited) for pages, waited in sizes_and_waits)


def taken(queue, size=8, max_pages=64):
    return [len(job.pages) for job in take_batch(queue, size, max_pages, NOW)]


def test_short_requests_are_not_stuck_behind_long_ones():
    queue = jobs((50, 1), (3, 0), (5, 0), (40, 0), (6, 0))
    assert taken(queue) == [3, 5, 6], "the others have more than twice the pages"
    assert [taken(queue), taken(queue)] == [[40], [50]], "together they have more than 64 pages"
    assert taken(queue) == []


def test_a_long_request_is_not_overtaken_forever():
    assert taken(jobs((50, 23), (3, 0))) == [3]
    assert taken(jobs((50, 24), (3, 0))) == [50, 3]


def test_a_batch_is_limited_by_requests_and_pages():
    assert taken(jobs(*[(4, i) for i in range(10)]), size=3) == [4, 4, 4]
    assert taken(jobs(*[(10, i) for i in range(10)]), max_pages=25) == [10, 10]
    assert taken(jobs((100, 0)), max_pages=25) == [100], "a single request may have more"


def test_equal_requests_keep_their_order():
    queue = jobs((5, 3), (5, 2), (5, 1))
    first = [job.submitted for job in take_batch(queue, 2, 64, NOW)]
    assert first == [NOW - 3, NOW - 2]


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 100)), max_size=30), st.integers(1, 8))
def test_every_request_is_taken_once(waiting, size):
    queue = jobs(*waiting)
    rounds = 0
    sizes = []
    while queue:
        batch = taken(queue, size)
        assert 1 <= len(batch) <= size
        sizes += batch
        rounds += 1
    assert sorted(sizes) == sorted(pages for pages, _ in waiting)
    assert rounds <= len(waiting)
