"""Subsets of the pages of one answer: an order of n pages also gives an order of any subset of them.

Distillation trains on these subsets, together with the verdict and the hint that the reasoning gives on each page.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.notes import read_verdict, split_notes, text_before_verdict
from mmr5_train.ranking.records import Ranking

NO_VERDICT = -100
"""The verdict label of a page on which the reasoning gives no verdict. PyTorch's losses ignore this label."""


@dataclass(frozen=True)
class PageSubset:
    """Some pages of one answer, in prompt order, with what the answer says about them."""

    positions: tuple[int, ...]
    """Positions of the pages in the prompt that the model answered: from 1, ascending."""
    order: tuple[int, ...]
    """The ranking of the subset, best first: indices into `positions`, from 1."""
    verdicts: tuple[int, ...]
    """For each page: 0 if its note says that it helps, 1 if not, `NO_VERDICT` without a verdict."""
    hints: tuple[str, ...]
    """For each page: its note up to the verdict (`text_before_verdict`), or ""."""


def sample_subsets(ranking: Ranking, count: int, seed: int) -> Iterator[PageSubset]:
    """The greedy answer on all its pages, then `count` random subsets of at least two pages.

    Each subset holds the best page and k of the others, where k is drawn with probability proportional to 1/k.
    An answer on at most two pages has no random subsets. The draws depend on `seed` and the query id only.
    """
    think = parse_answer(ranking.greedy.completion, len(ranking.shown)).think or ""
    notes = split_notes(think)
    best, *others = ranking.greedy.order
    yield _subset(ranking, notes, [best, *others])
    rng = random.Random(f"{seed}/{ranking.query_id}")
    sizes = range(1, len(others) + 1)
    for _ in range(count if len(others) > 1 else 0):
        [size] = rng.choices(sizes, [1 / size for size in sizes])
        yield _subset(ranking, notes, [best, *rng.sample(others, size)])


def _subset(ranking: Ranking, notes: Mapping[int, str], pages: Sequence[int]) -> PageSubset:
    positions = sorted(pages)
    page_notes = [notes.get(position, "") for position in positions]
    verdicts = [read_verdict(note) for note in page_notes]
    return PageSubset(
        positions=tuple(positions),
        order=tuple(positions.index(page) + 1 for page in ranking.greedy.order if page in positions),
        verdicts=tuple(NO_VERDICT if helps is None else int(not helps) for helps in verdicts),
        hints=tuple(text_before_verdict(note) for note in page_notes),
    )


def sort_pairs_first(subsets: Sequence[tuple[Ranking, PageSubset]], seed: int) -> list[tuple[Ranking, PageSubset]]:
    """The subsets of two pages in random order, then all others in random order.

    From two pages, of which usually one helps, a model learns fastest what makes a page relevant.
    """
    rng = random.Random(seed)
    return sorted(subsets, key=lambda pair: (len(pair[1].positions) > 2, rng.random()))
