"""The report's example questions: choosing them, and each system's ranking and reasoning."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.notes import read_verdict, split_notes, states_description
from mmr5_train.ranking.records import PageId, Ranking

Outcome = Literal["improved", "unchanged", "worsened"]
OUTCOMES: tuple[Outcome, ...] = ("improved", "unchanged", "worsened")


@dataclass(frozen=True)
class Place:
    """A page at one position of a ranking. `number` is the number that the report gives the page."""

    page: PageId
    number: int
    relevant: bool
    moved: int  # positions gained (positive) or lost relative to the first stage


@dataclass(frozen=True)
class NoteLine:
    """A line of reasoning. `number` is 0 if it is not about one page; the `_true` fields are None if unknown."""

    number: int
    text: str
    relevant: bool = False
    description_true: bool | None = None
    verdict_true: bool | None = None
    shows: str = ""  # true description of the page


@dataclass(frozen=True)
class Reasoning:
    """The completion and ranking of one system."""

    system: str
    lines: tuple[NoteLine, ...]
    places: tuple[Place, ...]
    defects: tuple[str, ...]
    completion: str


@dataclass(frozen=True)
class Case:
    """A question in the report: the rankings of the first and the last system, and the reasoning of each system.

    `numbers` maps a page to its number in the report, which is its image number in the last system's prompt.
    """

    query_id: str
    query: str
    domain: str
    question_types: tuple[str, ...]
    outcome: Outcome
    before: int | None  # position of the first relevant page; None if no candidate is relevant
    after: int | None
    missed: int  # relevant pages that are not candidates
    numbers: dict[PageId, int]
    first: tuple[Place, ...]
    last: tuple[Place, ...]
    reasonings: tuple[Reasoning, ...]


def first_relevant(ranking: Ranking) -> int | None:
    """Position (from 1) of the first relevant page in the greedy order; None if no candidate is relevant."""
    relevant = set(ranking.positives)
    pages = ranking.ranked_pages(ranking.greedy)
    return next((i for i, page in enumerate(pages, 1) if page in relevant), None)


def outcome(before: Ranking, after: Ranking) -> Outcome:
    """Whether the first relevant page moved up, stayed, or moved down."""
    old_rank, new_rank = first_relevant(before), first_relevant(after)
    if old_rank is None or new_rank is None or old_rank == new_rank:
        return "unchanged"
    return "improved" if new_rank < old_rank else "worsened"


def choose(outcomes: Mapping[str, Outcome], count: int, seed: int) -> list[str]:
    """`count` query ids drawn with `seed`, taken from the outcomes in turn until their questions run out."""
    groups = {kind: sorted(q for q, o in outcomes.items() if o == kind) for kind in OUTCOMES}
    for kind, group in groups.items():
        random.Random(f"{seed}/{kind}").shuffle(group)
    chosen: dict[Outcome, list[str]] = {kind: [] for kind in OUTCOMES}
    while sum(map(len, chosen.values())) < count and any(groups.values()):
        for kind in OUTCOMES:
            if groups[kind] and sum(map(len, chosen.values())) < count:
                chosen[kind].append(groups[kind].pop())
    return [query_id for kind in OUTCOMES for query_id in chosen[kind]]


def make_case(rankings: Sequence[Ranking], descriptions: Mapping[PageId, str]) -> Case:
    """The case of one question. `rankings` holds one ranking per system, in the order of the results."""
    first, last = rankings[0], rankings[-1]
    first_stage_ranks = {page: i for i, page in enumerate(first.ranked_pages(first.greedy), 1)}
    # Pages that only other systems ranked get the numbers after those of the last system's pages.
    pages = dict.fromkeys(page.id for ranking in reversed(rankings) for page in ranking.shown)
    numbers = {page: i for i, page in enumerate(pages, 1)}
    return Case(
        query_id=last.query_id,
        query=last.query,
        domain=last.domain,
        question_types=last.question_types,
        outcome=outcome(first, last),
        before=first_relevant(first),
        after=first_relevant(last),
        missed=len(set(last.positives) - {page.id for page in last.shown}),
        numbers=numbers,
        first=_places(first, first_stage_ranks, numbers),
        last=_places(last, first_stage_ranks, numbers),
        reasonings=tuple(
            Reasoning(
                system=ranking.system,
                lines=tuple(note_lines(ranking, numbers, descriptions)),
                places=_places(ranking, first_stage_ranks, numbers),
                defects=ranking.greedy.defects,
                completion=ranking.greedy.completion,
            )
            for ranking in rankings
            if ranking.greedy.completion or ranking.greedy.defects
        ),
    )


def _places(
    ranking: Ranking, first_stage_ranks: Mapping[PageId, int], numbers: Mapping[PageId, int]
) -> tuple[Place, ...]:
    relevant = set(ranking.positives)
    return tuple(
        Place(page=page, number=numbers[page], relevant=page in relevant, moved=first_stage_ranks.get(page, i) - i)
        for i, page in enumerate(ranking.ranked_pages(ranking.greedy), 1)
    )


def note_lines(
    ranking: Ranking, numbers: Mapping[PageId, int], descriptions: Mapping[PageId, str]
) -> list[NoteLine]:
    """The lines of the greedy think block, each with its page and, if known, whether it is true."""
    relevant = set(ranking.positives)
    think = parse_answer(ranking.greedy.completion, len(ranking.shown)).think or ""
    lines: list[NoteLine] = []
    for text in filter(None, (line.strip() for line in think.splitlines())):
        image, note = next(iter(split_notes(text).items()), (0, text))
        if 1 <= image <= len(ranking.shown):
            page = ranking.shown[image - 1].id
            lines.append(_checked(note, numbers[page], page in relevant, descriptions.get(page, "")))
        else:
            lines.append(NoteLine(0, text))
    return lines


def _checked(note: str, number: int, relevant: bool, description: str) -> NoteLine:
    verdict = read_verdict(note)
    return NoteLine(
        number=number,
        text=note,
        relevant=relevant,
        description_true=states_description(note, description) if description else None,
        verdict_true=None if verdict is None else verdict == relevant,
        shows=description,
    )
