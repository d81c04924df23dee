"""One record for each file that a stage reads or writes.

Two kinds of page id, never mixed:

- `PageId` is global: a document and a zero-based page. It stands in files.
- `LocalId` is local: 1..n, the position of a page in one prompt. It stands in prompts and answers.

`PromptedTask` is the one place where the two meet.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NewType, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

LocalId = NewType("LocalId", int)
"""1..n: the position of a page image in one prompt."""

Order = Literal["score", "shuffled"]
"""How a prompt shows its candidates: best first-stage score first, or shuffled by seed and query id."""

Mode = Literal["reason", "direct", "logits"]
"""How a model is asked: for a think block and an answer, for the answer alone, or for no text at all (the
probabilities of the page ids where an answer would begin)."""

SPLITS = ("train", "select", "heldout")


class Record(BaseModel):
    """A line of a JSON Lines file: immutable, no field that is not declared, and every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PageId(Record):
    """A page everywhere but in prompts: its document and its zero-based position there."""

    doc_name: str = Field(min_length=1)
    page: int = Field(ge=0)

    def __str__(self) -> str:
        return f"{self.doc_name}#{self.page}"


class Page(PageId):
    """A rendered page. `image` is a path relative to the file that names it."""

    domain: str
    image: str
    width: int = Field(gt=0, description="pixels")
    height: int = Field(gt=0, description="pixels")
    text: str = Field(default="", description="the text layer or OCR; what the first stage searches")
    description: str = Field(default="", description="what the page shows, in words, where that is known")

    @property
    def id(self) -> PageId:
        return PageId(doc_name=self.doc_name, page=self.page)


class Question(Record):
    """A question about one document, and every page that answers it."""

    query_id: str = Field(min_length=1)
    query: str = Field(min_length=1)
    doc_name: str
    domain: str
    question_types: tuple[str, ...] = ()
    positives: tuple[PageId, ...] = Field(min_length=1)


class Candidate(PageId):
    """A page the first stage returned. `image` is a path relative to the file that names it."""

    image: str
    score: float

    @property
    def id(self) -> PageId:
        return PageId(doc_name=self.doc_name, page=self.page)


class RankingTask(Record):
    """A question, its candidates in first-stage order (best first), and all pages that answer it.

    `positives` holds every relevant page, those the first stage missed included: recall divides by them.
    """

    query_id: str = Field(min_length=1)
    query: str = Field(min_length=1)
    domain: str
    question_types: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    positives: tuple[PageId, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _candidates_are_distinct(self) -> Self:
        ids = [candidate.id for candidate in self.candidates]
        if len(set(ids)) != len(ids):
            twice = next(page for page in ids if ids.count(page) > 1)
            raise ValueError(f"candidates of {self.query_id}: page {twice} stands there twice")
        return self

    def in_prompt_order(self, order: Order, seed: int = 0) -> PromptedTask:
        """The task as one prompt shows it. A shuffle depends on `seed` and the query id alone."""
        shown = list(self.candidates)
        if order == "shuffled":
            digest = hashlib.sha256(f"{seed}/{self.query_id}".encode()).digest()
            random.Random(digest).shuffle(shown)
        return PromptedTask(task=self, shown=tuple(shown))


class PromptedTask(Record):
    """A task with the order its pages have in the prompt: local id i is `shown[i - 1]`."""

    task: RankingTask
    shown: tuple[Candidate, ...]

    @property
    def local_positives(self) -> tuple[LocalId, ...]:
        """Local ids of the relevant candidates, ascending."""
        relevant = set(self.task.positives)
        return tuple(LocalId(i) for i, page in enumerate(self.shown, 1) if page.id in relevant)


class Trace(Record):
    """A verified reasoning trace: what SFT learns from. Everything local refers to `shown`."""

    query_id: str
    query: str
    domain: str
    shown: tuple[Candidate, ...] = Field(min_length=1, description="candidates in prompt order")
    notes: tuple[str, ...] = Field(description="one note a shown page, before refinement")
    think: str = Field(min_length=1)
    answer: tuple[LocalId, ...] = Field(description="all relevant ids, then the rest, each ascending")
    positive_ids: tuple[LocalId, ...] = Field(description="the relevant ones, if there are any")

    @model_validator(mode="after")
    def _ids_fit_the_pages(self) -> Self:
        n = len(self.shown)
        if sorted(self.answer) != list(range(1, n + 1)):
            raise ValueError(f"answer {list(self.answer)} of {self.query_id} is not an order of 1..{n}")
        if not set(self.positive_ids) <= set(self.answer):
            raise ValueError(f"positive_ids {list(self.positive_ids)} of {self.query_id} are not in 1..{n}")
        if len(self.notes) != n:
            raise ValueError(f"{self.query_id} has {len(self.notes)} notes for {n} pages")
        return self


class ModelAnswer(Record):
    """One completion read by the answer grammar: a complete order, and what was wrong with the text."""

    completion: str
    order: tuple[LocalId, ...] = Field(description="all of 1..n, best first, completed by the stated rule")
    defects: tuple[str, ...] = ()
    tokens: int = Field(default=0, ge=0, description="completion length in tokens, end token included")
    prompt_tokens: int = Field(default=0, ge=0, description="of the prompt, visual tokens included")
    visual_tokens: int = Field(default=0, ge=0, description="of the prompt's pages")
    scores: tuple[float, ...] = Field(default=(), description="of each page of `order`, from the model; or none")


class Ranking(Record):
    """What one system made of one task: a line of a rankings file."""

    system: str
    query_id: str
    query: str
    domain: str
    question_types: tuple[str, ...] = ()
    shown: tuple[Candidate, ...]
    positives: tuple[PageId, ...]
    greedy: ModelAnswer
    samples: tuple[ModelAnswer, ...] = ()

    def ranked_pages(self, answer: ModelAnswer) -> tuple[PageId, ...]:
        """The ranked pages of one of this ranking's answers."""
        return tuple(self.shown[i - 1].id for i in answer.order)


class Rollouts(Record):
    """What a model sampled for one question: a line of rollouts.jsonl. Everything local refers to `shown`."""

    query_id: str
    shown: tuple[PageId, ...] = Field(min_length=1, description="candidates in prompt order")
    think: bool = Field(description="whether the model was taught a think block")
    samples: tuple[ModelAnswer, ...] = Field(min_length=2)


class SplitDocument(Record):
    """Which split a document went to: a line of documents.jsonl."""

    doc_name: str
    domain: str
    split: Literal["train", "select", "heldout"]
    pages: int = Field(ge=0)
    sha256: str = Field(description="of the PDF file or of the page images: equal for equal documents")


class Skipped(Record):
    """What a stage left out: a line of skipped.jsonl. Says which question, or which file, page or line of one."""

    query_id: str | None = None
    file: str | None = None
    reason: str = Field(min_length=1, description="short, the same for all of a kind: it is counted")
    detail: str = ""


ImagesT = TypeVar("ImagesT", Page, RankingTask, Trace, Ranking)


def rebase_images(records: Iterable[ImagesT], from_dir: Path, to_dir: Path) -> Iterator[ImagesT]:
    """The same records for a file in another folder: image paths relative to `to_dir`, not `from_dir`.

    An absolute image path becomes a relative one. Links in folder names are followed, since ".." is taken
    after that.
    """
    target = os.path.realpath(to_dir)

    def rebased(image: str) -> str:
        folder, name = os.path.split(os.path.join(from_dir, image))
        return Path(os.path.relpath(os.path.join(os.path.realpath(folder), name), target)).as_posix()

    for record in records:
        if isinstance(record, Page):
            yield record.model_copy(update={"image": rebased(record.image)})
            continue
        field = "candidates" if isinstance(record, RankingTask) else "shown"
        pages = tuple(c.model_copy(update={"image": rebased(c.image)}) for c in getattr(record, field))
        yield record.model_copy(update={field: pages})
