"""The rewards of GRPO. The config group `reward` names the rewards to use and their weights.

This module has MM-R5's and the project's own rewards, and the registry of all; published_rewards.py has those of
other rerankers. A reward scores one completion for n ≥ 1 pages, given P, the local ids of the relevant pages. In
the formulas, L is the list of ids in the answer as generated, including repeated ids and ids out of 1..n.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Protocol

from pydantic import Field, field_validator

from mmr5_train.common.files import InputError
from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.notes import page_verdicts
from mmr5_train.ranking.published_rewards import (
    fidelity,
    ndcg,
    rearank,
    reasonrank,
    recall_at_1,
    recall_at_3,
    recall_at_5,
)
from mmr5_train.ranking.records import LocalId, Record

GATE = 0.3
"""Factor of the reranking reward for an answer that is not a complete permutation in a valid structure."""


class Reward(Protocol):
    def __call__(
        self, completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True
    ) -> float: ...


def reranking(completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True) -> float:
    """MM-R5's reranking reward (section 3.3): Σ_{p∈P} 1/rank(p)³ ÷ Σ_{i=1..|P|} 1/i³, in 0..1.

    rank(p) is the first position of p in L, from 1. A page that is missing from L contributes 0. Edge cases, as in
    the reference code: repeated ids and ids out of range take up positions but have no other cost; the text around
    the list does not matter; the reward is 0 if no list of integers can be read. If no page is relevant (the paper
    has no such questions), every list earns 1.

    Raises:
        ValueError: if a relevant id is not in 1..n.
    """
    relevant = set(positives)
    if not all(1 <= p <= n for p in relevant):
        raise ValueError(f"relevant ids must be in 1..{n}, got {sorted(relevant)}")
    ids = parse_answer(completion, n, expect_think=expect_think).ids
    if not relevant:
        return 1.0 if ids else 0.0
    rank = {i: position for position, i in reversed(list(enumerate(ids, 1)))}
    gain = sum(1 / rank[p] ** 3 for p in sorted(relevant) if p in rank)
    return gain / sum(1 / i**3 for i in range(1, len(relevant) + 1))


def template(completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True) -> float:
    """MM-R5's composite template reward (section 3.3): structure × length × range.

    structure is 1 if the structure of the completion is valid, else 0. length is (n − ||L| − n|) / n. range is the
    share of ids in L that are in 1..n. Edge cases, as in the reference code: repeated ids have no cost, so
    [1, 1, 1] earns the full reward for n = 3; with more than 2n ids, length is negative, and so is the reward,
    without a lower bound; an empty list earns 0. `positives` is not used.
    """
    answer = parse_answer(completion, n, expect_think=expect_think)
    if not answer.structure_valid or not answer.ids:
        return 0.0
    length = (n - abs(len(answer.ids) - n)) / n
    in_range = sum(1 <= i <= n for i in answer.ids) / len(answer.ids)
    return length * in_range


def permutation(completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True) -> float:
    """This project's template reward: structure × coverage, in 0..1.

    coverage is the multiset Jaccard similarity of L and 1..n: valid / (n + extra), where valid is the number of
    distinct ids of L in 1..n, and extra is the number of repeated ids and ids out of range. Each missing, repeated
    or out-of-range id lowers the reward, and fixing any one of them raises it, so every list can improve in small
    steps. structure is 1 if the structure of the completion is valid, ½ if only a list can be read, and 0 if no
    list can be read. Only a complete permutation with a valid structure earns 1. `positives` is not used.
    """
    answer = parse_answer(completion, n, expect_think=expect_think)
    valid = sum(1 <= i <= n for i in set(answer.ids))
    coverage = valid / (n + len(answer.ids) - valid)
    return coverage if answer.structure_valid else coverage / 2


def gated_reranking(
    completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True
) -> float:
    """The reranking reward, multiplied by `GATE` unless `permutation` is 1, in 0..1.

    A valid form earns no reward by itself, so a policy can't raise its reward with a valid but constant answer.
    """
    complete = permutation(completion, n, positives, expect_think=expect_think) == 1
    return reranking(completion, n, positives, expect_think=expect_think) * (1 if complete else GATE)


def true_reasoning(completion: str, n: int, positives: Collection[LocalId], *, expect_think: bool = True) -> float:
    """This project's reward for reasoning: accuracy of the verdicts × consistency of the answer, in 0..1.

    The verdict on a page is at the end of its note in the think block: "Image i: …, so it helps." A missing
    verdict counts as wrong. accuracy is the mean of two shares: the relevant pages whose note says that they
    help, and the other pages whose note says that they do not. (If all pages are of one kind, it is the share of
    that kind.) So the same verdict on every page earns ½. consistency is 1 if the k pages that help according to
    the notes are the first k ids of L, in any order, else 0.
    """
    answer = parse_answer(completion, n, expect_think=expect_think)
    verdicts = page_verdicts(answer.think or "", n)
    relevant = set(positives)
    correct_by_kind = [
        [verdicts.get(i) == (i in relevant) for i in range(1, n + 1) if (i in relevant) == kind]
        for kind in (True, False)
    ]
    shares = [sum(correct) / len(correct) for correct in correct_by_kind if correct]
    return follows_verdicts(answer.ids, verdicts) * sum(shares) / len(shares)


def follows_verdicts(ids: Sequence[int], verdicts: Mapping[int, bool]) -> bool:
    """Whether `ids` is not empty and starts with exactly the pages that help by `verdicts`, in any order."""
    helping = {i for i, helps in verdicts.items() if helps}
    return bool(ids) and set(ids[: len(helping)]) == helping


REWARDS: dict[str, Reward] = {
    "reranking": reranking,
    "template": template,
    "permutation": permutation,
    "gated_reranking": gated_reranking,
    "true_reasoning": true_reasoning,
    "ndcg": ndcg,
    "recall@1": recall_at_1,
    "recall@3": recall_at_3,
    "recall@5": recall_at_5,
    "rearank": rearank,
}
"""The rewards of a single completion by name."""

GROUP_REWARDS = ("fidelity",)
"""The rewards that compare all completions of a prompt."""
NAMES = (*REWARDS, "reasonrank", *GROUP_REWARDS)
"""All rewards. `reasonrank` also needs a reference order."""


def score_group(
    name: str,
    completions: Sequence[str],
    n: int,
    positives: Collection[LocalId],
    reference: Sequence[LocalId],
    *,
    expect_think: bool = True,
) -> list[float]:
    """The rewards of the completions of one prompt. `reference` is an order of all pages (`reference_order`)."""
    if name == "fidelity":
        return fidelity(completions, n, positives, expect_think=expect_think)
    if name == "reasonrank":
        return [
            reasonrank(completion, n, positives, reference=reference, expect_think=expect_think)
            for completion in completions
        ]
    return [REWARDS[name](completion, n, positives, expect_think=expect_think) for completion in completions]


NEED_VERDICTS = ("true_reasoning",)
"""The rewards that can only score reasoning with a verdict on each page. Refined reasoning has none."""


class RewardConfig(Record):
    """The rewards whose weighted sum GRPO maximizes: a file of the config group `reward`."""

    name: str = Field(description="name of the choice")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        min_length=1, description="weight of each reward by name; a reward with weight 0 is only logged"
    )

    @field_validator("weights")
    @classmethod
    def _rewards_exist(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in NAMES:
                raise ValueError(f"unknown reward {name!r} (choices: {', '.join(NAMES)})")
        if not any(value.values()):
            raise ValueError("at least one weight must be above 0, else all completions earn the same reward")
        return value

    def check_verdicts(self, verdicts: bool | None, model: str) -> None:
        """Raises `InputError` if a weighted reward needs verdicts and `verdicts` is False: `model` writes none."""
        needed = [name for name in NEED_VERDICTS if self.weights.get(name)]
        if verdicts is False and needed:
            raise InputError(
                f"reward={self.name}: {needed[0]} rewards the verdict on each page in the think block, but "
                f"{model} was trained on answers without verdicts (refined reasoning, or no think block); train "
                "SFT on traces with refine=false, or choose another reward"
            )
