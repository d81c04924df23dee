"""Chooses the candidates of a training question from a first-stage ranking.

`rule: top` is MM-R5's data construction (arXiv 2506.12364): the best n pages, relevant or not.
`rule: all_relevant` is the second rule that its authors describe: all relevant pages, then the best irrelevant
ones. The other options choose the irrelevant pages, for both rules. Candidates are in first-stage order; the stage
that builds the prompt chooses the order in the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mmr5_train.ranking.records import Candidate, PageId


class Policy(BaseModel):
    """Section `policy` of configs/candidates.yaml. Held-out questions always get the first stage's best pages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Literal["top", "all_relevant"] = "top"
    insert_missed: bool = Field(
        default=False,
        description="train only: if no candidate is relevant, the best relevant page replaces the last candidate",
    )
    skip_irrelevant: int = Field(
        default=0,
        ge=0,
        description="skip this many of the best irrelevant pages, since they may be unlabeled answers",
    )
    draw_from: int | None = Field(
        default=None,
        gt=0,
        description="sample irrelevant pages, with the seed, from this many of the best; None: take the best",
    )

    def max_irrelevant(self, n: int) -> int:
        """Number of irrelevant pages of a ranking that can influence the choice of n candidates."""
        return self.skip_irrelevant + max(n, self.draw_from or 0)


def choose_candidates(
    ranked: Sequence[Candidate], positives: Sequence[PageId], n: int, policy: Policy, insert: bool, seed: str
) -> tuple[Candidate, ...]:
    """At most n candidates of a ranking, in its order.

    `ranked` contains at least the first n pages, every relevant page, and the best `policy.max_irrelevant(n)`
    irrelevant pages. `insert`: apply `policy.insert_missed`. `seed` is for the sampling of irrelevant pages.
    """
    gold = set(positives)
    relevant = [i for i, page in enumerate(ranked) if page.id in gold]
    irrelevant = [i for i, page in enumerate(ranked) if page.id not in gold][policy.skip_irrelevant :]
    chosen = relevant[:n] if policy.rule == "all_relevant" else [i for i in relevant if i < n]
    if not chosen and insert and policy.insert_missed:
        chosen = relevant[:1]
    n_irrelevant = n - len(chosen)
    if policy.draw_from is not None:
        pool = irrelevant[: policy.draw_from]
        irrelevant = random.Random(seed).sample(pool, min(n_irrelevant, len(pool)))
    return tuple(ranked[i] for i in sorted(chosen + irrelevant[:n_irrelevant]))
