"""Plans for ranking more pages than fit in one prompt, and the fusion of several orders.

A plan is a generator. It yields the windows that it needs ranked next: each window is a list of page indices,
from 0, in the best order known so far. The caller ranks them and sends back one order per window: positions in
the window, from 0, best first. Finally the plan returns the order of all page indices. The windows of one yield
are independent of each other, so the caller can rank them in one batch, also together with windows of other
questions.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Literal

Strategy = Literal["sliding", "tournament"]
Plan = Generator[list[list[int]], list[Sequence[int]], list[int]]


def make_plan(n: int, strategy: Strategy, window: int | None, stride: int | None) -> Plan:
    """The plan for `n` pages and windows of at most `window` pages (None: no limit).

    Pages that fit in one window are ranked in one prompt. The sliding strategy uses `stride`, which defaults to
    half the window.
    """
    if window is None or n <= window:
        return _single_window(n)
    if strategy == "tournament":
        return tournament(n, window)
    return sliding(n, window, stride or max(1, window // 2))


def _single_window(n: int) -> Plan:
    [order] = yield [list(range(n))]
    return list(order)


def sliding(n: int, window: int, stride: int) -> Plan:
    """A window that slides from the last page to the first (RankGPT, arXiv 2304.09542, section 4.1).

    Each window includes the best `window − stride` pages of the window before it, so a page can move from the end
    to the top.

    Raises:
        ValueError: if consecutive windows would not overlap.
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
    """Rounds of groups: the better half of each group advances, until the remaining pages fit in one window.

    Pages are dealt to the groups in turn, so the best pages of the first stage are in different groups at first.
    The groups of one round are independent of each other. Pages that lose in the same round are ordered by their
    rank in their group; pages that lose in a later round come before them.

    Raises:
        ValueError: if `window` is less than 2.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    remaining = list(range(n))
    eliminated: list[int] = []
    while len(remaining) > window:
        n_groups = -(-len(remaining) // window)
        groups = [remaining[i::n_groups] for i in range(n_groups)]
        orders = yield groups
        ranked = [[group[i] for i in order] for group, order in zip(groups, orders, strict=True)]
        # A page's rank relative to the middle of its group: negative for the half that advances.
        by_rank = [(rank - (len(group) + 1) // 2, page) for group in ranked for rank, page in enumerate(group)]
        by_rank.sort(key=lambda entry: entry[0])
        remaining = [page for rank, page in by_rank if rank < 0]
        eliminated = [page for rank, page in by_rank if rank >= 0] + eliminated
    [order] = yield [remaining]
    return [remaining[i] for i in order] + eliminated


def fuse_orders(orders: Sequence[Sequence[int]]) -> list[int]:
    """One order from several orders of the same items, by mean rank (Borda). The first order breaks ties."""
    total_rank = {item: sum(order.index(item) for order in orders) for item in orders[0]}
    return sorted(orders[0], key=lambda item: total_rank[item])
