"""Which pages of a first-stage ranking become the candidates of a training question.

`rule: top` is MM-R5's data construction (arXiv 2506.12364): the best n pages, whatever they are.
`rule: all_relevant` is the second rule its authors describe: all relevant pages, filled up with the best
irrelevant ones. The other options choose the irrelevant pages, for either rule. Candidates stand in first-stage
order; the order in the prompt is chosen later, by the stage that builds it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mmr5_train.ranking.records import Candidate, PageId


class Policy(BaseModel):
    """Section `policy` of configs/candidates.yaml. Held-out questions always have the first stage's best pages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Literal["top", "all_relevant"] = "top"
    insert_missed: bool = Field(
        default=False,
        description="train only: where no relevant page is among the candidates, the best one replaces the last",
    )
    skip_irrelevant: int = Field(
        default=0,
        ge=0,
        description="so many of the best irrelevant pages are passed over: they may be unlabelled answers",
    )
    draw_from: int | None = Field(
        default=None,
        gt=0,
        description="irrelevant pages are drawn by seed from so many of the best; None: best first",
    )

    def reach(self, n: int) -> int:
        """How many irrelevant pages of a ranking can matter for n candidates."""
        return self.skip_irrelevant + max(n, self.draw_from or 0)


def choose(
    ranked: Sequence[Candidate], positives: Sequence[PageId], n: int, policy: Policy, insert: bool, seed: str
) -> tuple[Candidate, ...]:
    """At most n candidates of a ranking, in its order.

    `ranked` holds at least the first n pages, every relevant page, and the best `policy.reach(n)` irrelevant.
    `insert`: whether `policy.insert_missed` counts here. `seed` decides what is drawn.
    """
    gold = set(positives)
    relevant = [i for i, page in enumerate(ranked) if page.id in gold]
    irrelevant = [i for i, page in enumerate(ranked) if page.id not in gold][policy.skip_irrelevant :]
    chosen = relevant[:n] if policy.rule == "all_relevant" else [i for i in relevant if i < n]
    if not chosen and insert and policy.insert_missed:
        chosen = relevant[:1]
    wanted = n - len(chosen)
    if policy.draw_from is not None:
        pool = irrelevant[: policy.draw_from]
        irrelevant = random.Random(seed).sample(pool, min(wanted, len(pool)))
    return tuple(ranked[i] for i in sorted(chosen + irrelevant[:wanted]))
