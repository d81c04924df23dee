"""More pages than fit a prompt: plans that rank windows of pages until all are in order. And orders fused.

A plan is a generator. It yields the windows that it needs ranked next, each a list of indices (from 0, best first
as far as known), is sent an order of each window (positions in it, from 0, best first), and returns an order of
all indices. So windows that don't wait for each other, also of several questions, can be ranked in one batch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Literal

Strategy = Literal["sliding", "tournament"]
Plan = Generator[list[list[int]], list[Sequence[int]], list[int]]


def make_plan(n: int, strategy: Strategy, window: int | None, stride: int | None) -> Plan:
    """How `n` pages are ranked `window` at a time; all at once where they fit, or where there is no limit."""
    if window is None or n <= window:
        return _at_once(n)
    if strategy == "tournament":
        return tournament(n, window)
    return sliding(n, window, stride or max(1, window // 2))


def _at_once(n: int) -> Plan:
    [order] = yield [list(range(n))]
    return list(order)


def sliding(n: int, window: int, stride: int) -> Plan:
    """A window slides from the end to the beginning (RankGPT, arXiv 2304.09542, section 4.1).

    Each takes the best `window − stride` of the one behind it along, so that many can rise from the end to the
    top. Raises ValueError where windows would not overlap.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride must be at least 1 and less than window ({window}), got {stride}")
    order = list(range(n))
    for end in range(n, 0, -stride):
        start = max(0, end - window)
        [ranked] = yield [order[start:end]]
        order[start:end] = [order[start + i] for i in ranked]
        if start == 0:
            break
    return order


def tournament(n: int, window: int) -> Plan:
    """Rounds of groups, of which the better halves go on, until the rest fits one window.

    The pages are dealt out to groups like cards, so that those the first stage holds best don't meet at once. A
    round's groups don't wait for each other. Pages that lost in the same round stand by their place in a group.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    left = list(range(n))
    lost: list[int] = []
    while len(left) > window:
        count = -(-len(left) // window)
        groups = [left[i::count] for i in range(count)]
        orders = yield groups
        ranked = [[group[i] for i in order] for group, order in zip(groups, orders, strict=True)]
        by_place = [
            (place - (len(group) + 1) // 2, group[place]) for group in ranked for place in range(len(group))
        ]
        by_place.sort(key=lambda entry: entry[0])
        left, beaten = [page for place, page in by_place if place < 0], [p for place, p in by_place if place >= 0]
        lost = beaten + lost
    [order] = yield [left]
    return [left[i] for i in order] + lost


def fuse_orders(orders: Sequence[Sequence[int]]) -> list[int]:
    """One order of several of the same items: by mean rank (Borda); ties as in the first order."""
    place = {item: sum(order.index(item) for order in orders) for item in orders[0]}
    return sorted(orders[0], key=lambda item: place[item])
