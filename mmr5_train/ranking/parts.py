"""What a ranking teaches besides itself: the same question on some of its pages."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.notes import before_verdict, split_notes, verdict
from mmr5_train.ranking.records import Ranking

UNSAID = -100  # the verdict on a page of which the thought says nothing


@dataclass(frozen=True)
class Part:
    """Some pages of an answer."""

    places: tuple[int, ...]  # of the pages in the prompt that was answered, from 1, rising
    order: tuple[int, ...]  # best first; these are places among `places`, from 1
    verdicts: tuple[int, ...]  # of each page: 0 that it helps, 1 that it does not, else UNSAID
    hints: tuple[str, ...]  # what the thought says of each page before its verdict


def divide(ranking: Ranking, count: int, seed: int) -> Iterator[Part]:
    """All pages of an answer, and `count` times its best page with some others, where there are enough.

    k others are drawn in proportion to 1/k.
    """
    think = parse_answer(ranking.greedy.completion, len(ranking.shown)).think or ""
    notes = split_notes(think)
    best, *others = ranking.greedy.order
    yield _part(ranking, notes, [best, *others])
    rng = random.Random(f"{seed}/{ranking.query_id}")
    sizes = range(1, len(others) + 1)
    for _ in range(count if len(others) > 1 else 0):
        [size] = rng.choices(sizes, [1 / size for size in sizes])
        yield _part(ranking, notes, [best, *rng.sample(others, size)])


def _part(ranking: Ranking, notes: Mapping[int, str], chosen: Sequence[int]) -> Part:
    places = sorted(chosen)
    said = [notes.get(place, "") for place in places]
    found = [verdict(note) for note in said]
    return Part(
        places=tuple(places),
        order=tuple(places.index(place) + 1 for place in ranking.greedy.order if place in places),
        verdicts=tuple(UNSAID if helps is None else int(not helps) for helps in found),
        hints=tuple(before_verdict(note) for note in said),
    )


def pairs_first(parts: Sequence[tuple[Ranking, Part]], seed: int) -> list[tuple[Ranking, Part]]:
    """Parts of two pages, then all others: on two, one of which helps, it is soonest learned what helps."""
    rng = random.Random(seed)
    return sorted(parts, key=lambda row: (len(row[1].places) > 2, rng.random()))
