"""Splits documents into train, select and heldout, and draws the train questions."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from itertools import chain
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmr5_train.ranking.records import RankingTask

SplitName = Literal["train", "select", "heldout"]


class Split(BaseModel):
    """Shares of the documents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: float = Field(ge=0, le=1)
    select: float = Field(ge=0, le=1)
    heldout: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.train + self.select + self.heldout
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + select + heldout must be 1, found {total:g}")
        return self


def split_documents(hashes: dict[str, str], split: Split, seed: int) -> dict[str, SplitName]:
    """doc_name → "train", "select" or "heldout". `hashes` has the content hash of each document name.

    Documents are shuffled by a hash of the seed and their names, then cut by the shares. Equal documents get the
    split of the first of them.
    """
    shuffled = sorted(hashes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    same_content: dict[str, list[str]] = {}
    for name in shuffled:
        same_content.setdefault(hashes[name], []).append(name)
    train_end = round(split.train * len(hashes))
    select_end = round((split.train + split.select) * len(hashes))
    split_of: dict[str, SplitName] = {}
    for names in same_content.values():
        i = len(split_of)
        name_of_split: SplitName = "train" if i < train_end else "select" if i < select_end else "heldout"
        split_of |= dict.fromkeys(names, name_of_split)
    return split_of


class Draw:
    """A sample of at most `per_domain` tasks of each domain.

    It holds the tasks with the smallest hash of seed and query id. So it does not depend on the order in which
    tasks are added, and only the sample is in memory. `not_drawn` counts the other tasks.
    """

    def __init__(self, per_domain: int, seed: int) -> None:
        self.per_domain = per_domain
        self.seed = seed
        self.not_drawn: Counter[str] = Counter()
        self._drawn: dict[str, list[tuple[int, int, str]]] = {}  # domain → heap of (−hash, position, line)

    def add(self, task: RankingTask) -> None:
        heap = self._drawn.setdefault(task.domain, [])
        line = task.model_dump_json()
        heapq.heappush(heap, (-self._hash("draw", task), self._hash("position", task), line))
        if len(heap) > self.per_domain:
            heapq.heappop(heap)
            self.not_drawn[task.domain] += 1

    def lines(self) -> list[str]:
        """The drawn tasks as JSON, shuffled, so that the first of them are a sample of all domains."""
        # By another hash: that of the draw is smaller in a domain with many tasks than in one with few.
        drawn = sorted((position, line) for _, position, line in chain.from_iterable(self._drawn.values()))
        return [line for _, line in drawn]

    def _hash(self, purpose: str, task: RankingTask) -> int:
        return int.from_bytes(hashlib.sha256(f"{purpose}/{self.seed}/{task.query_id}".encode()).digest())
