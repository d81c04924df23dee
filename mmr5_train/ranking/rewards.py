"""What GRPO pays for a completion, by name, each with a weight from the config group `reward`.

A reward reads a completion for n pages, n ≥ 1, with the local ids P of the relevant ones; L is the list of
ids in its answer as written, repeated and impossible ids included.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Protocol

from pydantic import Field, field_validator

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.notes import read_verdict, split_notes
from mmr5_train.ranking.records import LocalId, Record

GATE = 0.3
"""What is left of the reranking reward for an answer that is not a complete permutation."""


class Reward(Protocol):
    def __call__(
        self, completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True
    ) -> float: ...


def reranking(completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True) -> float:
    """MM-R5's reranking reward (section 3.3): Σ_{p∈P} 1/rank(p)³ ÷ Σ_{i=1..|P|} 1/i³, in 0..1.

    rank(p) is the first place of p in L, from 1; a page that L lacks adds 0. Edge cases, as in the reference:
    repeated and impossible ids take up places but cost nothing else; nothing is asked of the text around
    the list; 0 where no list of integers can be read. Where no page is relevant (the paper has no such
    questions) every list earns 1.
    """
    relevant = set(positives)
    if not all(1 <= p <= n for p in relevant):
        raise ValueError(f"relevant ids must be among 1..{n}, got {sorted(relevant)}")
    ids = parse_answer(completion, n, expect_think=expect_think).ids
    if not relevant:
        return 1.0 if ids else 0.0
    rank = {i: place for place, i in reversed(list(enumerate(ids, 1)))}
    gain = sum(1 / rank[p] ** 3 for p in sorted(relevant) if p in rank)
    return gain / sum(1 / i**3 for i in range(1, len(relevant) + 1))


def template(completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True) -> float:
    """MM-R5's composite template reward (section 3.3): structure × length × range.

    structure is 1 for a whole text in the right form, else 0; length is (n − ||L| − n|) / n; range is the
    share of L in 1..n. Edge cases, as in the reference: repeated ids cost nothing, so [1, 1, 1] earns all of
    it at n = 3; length goes below 0 past 2n ids, and the reward with it, without a bound; an empty list
    earns 0. The relevant pages play no part.
    """
    answer = parse_answer(completion, n, expect_think=expect_think)
    if not answer.structure_valid or not answer.ids:
        return 0.0
    length = (n - abs(len(answer.ids) - n)) / n
    in_range = sum(1 <= i <= n for i in answer.ids) / len(answer.ids)
    return length * in_range


def permutation(completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True) -> float:
    """This project's template reward: structure × coverage, in 0..1.

    coverage is the multiset Jaccard similarity of L and 1..n: good / (n + extra), where good counts the
    different ids of L in 1..n, and extra the repeated and impossible ones. Every missing, repeated and
    impossible id costs, and each one mended earns more, so there is a way up from every list. structure is 1
    for a whole text in the right form, ½ where a list can be read but the text around it is wrong, 0 where
    none can. Only a complete permutation in the right form earns 1. The relevant pages play no part.
    """
    answer = parse_answer(completion, n, expect_think=expect_think)
    good = sum(1 <= i <= n for i in set(answer.ids))
    coverage = good / (n + len(answer.ids) - good)
    return coverage if answer.structure_valid else coverage / 2


def gated_reranking(
    completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True
) -> float:
    """The reranking reward, times `GATE` unless `permutation` is 1, in 0..1.

    A form that is right earns nothing by itself: a valid but constant answer is no way out.
    """
    complete = permutation(completion, n, positives, expect_think=expect_think) == 1
    return reranking(completion, n, positives, expect_think=expect_think) * (1 if complete else GATE)


def true_reasoning(completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True) -> float:
    """This project's reward for reasoning: true verdicts × an answer that follows them, in 0..1.

    A page's verdict is what its note in the think block ("Image i: …") says of it, helps or not; one without a
    verdict is wrong. True is the mean of two shares: of the relevant pages that are said to help, and of the
    others that are said not to (one share alone where there are no pages of the other kind), so that a verdict
    which is always the same earns a half. The answer follows if the k pages said to help are the first k ids of L,
    in any order.
    """
    answer = parse_answer(completion, n, expect_think=expect_think)
    said = page_verdicts(answer.think or "", n)
    relevant = set(positives)
    kinds = [
        [said.get(i) == (i in relevant) for i in range(1, n + 1) if (i in relevant) == kind]
        for kind in (True, False)
    ]
    shares = [sum(kind) / len(kind) for kind in kinds if kind]
    return follows_verdicts(answer.ids, said) * sum(shares) / len(shares)


def page_verdicts(think: str, n: int) -> dict[int, bool]:
    """What a think block says of each page that it gives a verdict on, by local id."""
    said = {i: read_verdict(note) for i, note in split_notes(think).items() if 1 <= i <= n}
    return {i: helps for i, helps in said.items() if helps is not None}


def follows_verdicts(ids: Sequence[int], said: Mapping[int, bool]) -> bool:
    """Whether the pages that are said to help come first, in any order, and there is an answer at all."""
    helping = {i for i, helps in said.items() if helps}
    return bool(ids) and set(ids[: len(helping)]) == helping


REWARDS: dict[str, Reward] = {
    "reranking": reranking,
    "template": template,
    "permutation": permutation,
    "gated_reranking": gated_reranking,
    "true_reasoning": true_reasoning,
}


class RewardConfig(Record):
    """Config group `reward`: which rewards GRPO adds up, each times its weight. A weight of 0 only logs."""

    name: str
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)

    @field_validator("weights")
    @classmethod
    def _rewards_exist(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in REWARDS:
                raise ValueError(f"no reward is called {name!r} (choices: {', '.join(REWARDS)})")
        if not any(value.values()):
            raise ValueError("at least one weight must be above 0, or there is nothing to learn from")
        return value
