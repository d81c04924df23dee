"""The records: one class for the lines of each JSON Lines file that a stage reads or writes.

There are two kinds of page id, and they never mix:

- A global id (`PageId`) is a document name and a zero-based page number. Files use it.
- A local id (`LocalId`) is a position from 1 to n in one prompt. Prompts and answers use it.

`PromptedTask` maps one kind to the other.
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
"""The position of a page image in one prompt, from 1 to n."""

Order = Literal["score", "shuffled"]
"""The order of the candidates in a prompt: by first-stage score, best first, or shuffled by seed and query id."""

Mode = Literal["reason", "direct", "logits"]
"""How a model ranks: it writes a think block and an answer (`reason`), it writes only the answer (`direct`), or it
writes nothing and the probabilities of the page ids at the start of the list give the order (`logits`)."""

SPLITS = ("train", "select", "heldout")


class Record(BaseModel):
    """Base class of all records: immutable, without undeclared fields, and with finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PageId(Record):
    """The global id of a page: its document and its position in that document."""

    doc_name: str = Field(min_length=1, description="name of the document, unique in its corpus")
    page: int = Field(ge=0, description="page number in the document, from 0")

    def __str__(self) -> str:
        return f"{self.doc_name}#{self.page}"


class Page(PageId):
    """A rendered page: a line of pages.jsonl, which `candidates` and `evaluate` write. Unique by its page id."""

    domain: str = Field(description="domain of the document, a label to average over")
    image: str = Field(description="path of the page image, relative to the folder of this file")
    width: int = Field(gt=0, description="width of the page image in pixels")
    height: int = Field(gt=0, description="height of the page image in pixels")
    source_width: int | None = Field(
        default=None,
        gt=0,
        description="width of the page in pixels before `corpus.max_side` shrank it; a PDF page at `corpus.dpi`; "
        "null in files of earlier versions, which did not record it",
    )
    source_height: int | None = Field(default=None, gt=0, description="its height in pixels")
    text: str = Field(
        default="", description="text layer or OCR of the page, which BM25 searches; empty for a scan without OCR"
    )
    text_source: Literal["corpus", "ocr"] | None = Field(
        default=None,
        description="`corpus`: the text is a PDF's text layer or comes with the corpus; `ocr`: recognized by "
        "`candidates`; null: no text, or a file of an earlier version",
    )
    description: str = Field(
        default="",
        description="what the page shows, if the corpus states it exactly (synthetic corpus), else empty",
    )

    @property
    def id(self) -> PageId:
        return PageId(doc_name=self.doc_name, page=self.page)

    @property
    def source_pixels(self) -> int:
        """Pixels of the page before `corpus.max_side` shrank it; without that size, of the page image."""
        return (self.source_width or self.width) * (self.source_height or self.height)


class Question(Record):
    """A question about one document, as a corpus reader returns it. No stage writes it to a file."""

    query_id: str = Field(min_length=1, description="id of the question, unique in its corpus")
    query: str = Field(min_length=1, description="text of the question")
    doc_name: str = Field(description="document that the question is about")
    domain: str = Field(description="domain of the document, a label to average over")
    question_types: tuple[str, ...] = Field(default=(), description="question types from the annotations")
    positives: tuple[PageId, ...] = Field(min_length=1, description="all pages that answer the question")


class Candidate(PageId):
    """A page that the first stage returned for a question. Several records hold a list of candidates."""

    image: str = Field(description="path of the page image, relative to the folder of the file with this record")
    score: float = Field(description="first-stage score; higher is better, and the scale depends on the retriever")

    @property
    def id(self) -> PageId:
        return PageId(doc_name=self.doc_name, page=self.page)


class RankingTask(Record):
    """A question with its candidates: a line of train.jsonl, select.jsonl or heldout.jsonl.

    `candidates` writes these files, and `select` writes the chosen questions in the same form to questions.jsonl.
    Unique by `query_id`.
    """

    query_id: str = Field(min_length=1, description="id of the question, unique in the file")
    query: str = Field(min_length=1, description="text of the question")
    domain: str = Field(description="domain of the document, a label to average over")
    question_types: tuple[str, ...] = Field(default=(), description="question types from the annotations")
    candidates: tuple[Candidate, ...] = Field(
        min_length=1, description="candidates in first-stage order, best first; each page at most once"
    )
    positives: tuple[PageId, ...] = Field(
        min_length=1,
        description="all relevant pages, including those that the first stage missed (recall divides by them all)",
    )

    @model_validator(mode="after")
    def _candidates_are_distinct(self) -> Self:
        ids = [candidate.id for candidate in self.candidates]
        if len(set(ids)) != len(ids):
            repeated = next(page for page in ids if ids.count(page) > 1)
            raise ValueError(f"candidates of {self.query_id}: page {repeated} is listed more than once")
        return self

    def in_prompt_order(self, order: Order, seed: int = 0) -> PromptedTask:
        """The task with its candidates in prompt order. A shuffle depends only on `seed` and the query id."""
        shown = list(self.candidates)
        if order == "shuffled":
            digest = hashlib.sha256(f"{seed}/{self.query_id}".encode()).digest()
            random.Random(digest).shuffle(shown)
        return PromptedTask(task=self, shown=tuple(shown))


class PromptedTask(Record):
    """A task with its pages in prompt order: local id i is `shown[i - 1]`. No stage writes it to a file."""

    task: RankingTask = Field(description="the question and its candidates")
    shown: tuple[Candidate, ...] = Field(description="the candidates in prompt order")

    @property
    def local_positives(self) -> tuple[LocalId, ...]:
        """Local ids of the relevant candidates, ascending."""
        relevant = set(self.task.positives)
        return tuple(LocalId(i) for i, page in enumerate(self.shown, 1) if page.id in relevant)

    @property
    def reference_order(self) -> tuple[LocalId, ...]:
        """All local ids: the relevant candidates first, and both kinds in the order of the first stage."""
        relevant, local_ids = set(self.task.positives), {page.id: i for i, page in enumerate(self.shown, 1)}
        ordered = sorted(self.task.candidates, key=lambda page: page.id not in relevant)
        return tuple(LocalId(local_ids[page.id]) for page in ordered)


class Trace(Record):
    """A verified reasoning trace, which SFT trains on: a line of traces.jsonl, which `traces` writes.

    Unique by `query_id`. Local ids refer to `shown`.
    """

    query_id: str = Field(description="id of the question, unique in the file")
    query: str = Field(description="text of the question")
    domain: str = Field(description="domain of the document, a label to average over")
    shown: tuple[Candidate, ...] = Field(min_length=1, description="the candidates in prompt order")
    notes: tuple[str, ...] = Field(
        description="the teacher's note on each page of `shown`, with its verdict (`notes.format_note`), before "
        "refinement"
    )
    think: str = Field(
        min_length=1, description="content of the think block: the notes, one line per page, or their refinement"
    )
    answer: tuple[LocalId, ...] = Field(
        description="all local ids 1..n: the relevant pages first, then the others, each group ascending"
    )
    positive_ids: tuple[LocalId, ...] = Field(
        description="local ids of the relevant pages; empty only with `missed: keep`, if no candidate is relevant"
    )

    @model_validator(mode="after")
    def _ids_fit_the_pages(self) -> Self:
        n = len(self.shown)
        if sorted(self.answer) != list(range(1, n + 1)):
            raise ValueError(f"answer {list(self.answer)} of {self.query_id} is not a permutation of 1..{n}")
        if not set(self.positive_ids) <= set(self.answer):
            raise ValueError(f"positive_ids {list(self.positive_ids)} of {self.query_id} must be in 1..{n}")
        if len(self.notes) != n:
            raise ValueError(
                f"{self.query_id} has {len(self.notes)} notes for {n} pages, expected one note per page"
            )
        return self


class ModelAnswer(Record):
    """One answer of a model: its completion, and the order that was read from it.

    It is the type of `greedy` and `samples` in rankings and rollouts.
    """

    completion: str = Field(
        description="the generated text without special tokens; empty for the first stage and in mode `logits`"
    )
    order: tuple[LocalId, ...] = Field(
        description="all local ids 1..n, best first; an incomplete list is completed by `answer.complete_order`"
    )
    defects: tuple[str, ...] = Field(
        default=(), description="what is wrong with the completion: names of `answer.Defect`, in its order"
    )
    tokens: int | None = Field(
        default=0,
        ge=0,
        description="length of the completion in tokens, including the end token; null: the server does not say",
    )
    prompt_tokens: int | None = Field(
        default=0,
        ge=0,
        description="length of the prompt in tokens, including the visual tokens; null: as `tokens`",
    )
    visual_tokens: int = Field(default=0, ge=0, description="number of visual tokens of the prompt's pages")
    scores: tuple[float, ...] = Field(
        default=(),
        description="the model's scores by rank (mode `logits`, cross-encoders and endpoints), else empty",
    )


class Ranking(Record):
    """A system's answers to one question: a line of rankings/<system>.jsonl, which `evaluate` writes.

    Unique by `query_id`. All files of one evaluation hold the same questions. Local ids refer to `shown`.
    """

    system: str = Field(description="name of the system, which is also the name of the file")
    query_id: str = Field(description="id of the question, unique in the file")
    query: str = Field(description="text of the question")
    domain: str = Field(description="domain of the document, a label to average over")
    question_types: tuple[str, ...] = Field(default=(), description="question types from the annotations")
    shown: tuple[Candidate, ...] = Field(description="the candidates in prompt order")
    positives: tuple[PageId, ...] = Field(
        description="all relevant pages, including those that the first stage missed"
    )
    greedy: ModelAnswer = Field(description="the answer from greedy decoding")
    samples: tuple[ModelAnswer, ...] = Field(default=(), description="sampled answers, if any were requested")

    def ranked_pages(self, answer: ModelAnswer) -> tuple[PageId, ...]:
        """The pages in the order of one of this ranking's answers, best first."""
        return tuple(self.shown[i - 1].id for i in answer.order)


class Rollouts(Record):
    """Sampled answers of a checkpoint to one question: a line of rollouts.jsonl, which `select` writes.

    `select` uses them to measure how difficult a question is. Unique by `query_id`, in the order of the questions.
    Local ids refer to `shown`.
    """

    query_id: str = Field(description="id of the question, unique in the file")
    shown: tuple[PageId, ...] = Field(min_length=1, description="the candidates in prompt order")
    think: bool = Field(description="whether the checkpoint was trained to write a think block")
    samples: tuple[ModelAnswer, ...] = Field(min_length=2, description="the sampled answers")


class SplitDocument(Record):
    """The split of one document: a line of documents.jsonl, which `candidates` writes. Unique by `doc_name`."""

    doc_name: str = Field(description="name of the document")
    domain: str = Field(description="domain of the document")
    split: Literal["train", "select", "heldout"] = Field(description="split that holds the document's questions")
    pages: int = Field(
        ge=0, description="number of pages; in MMDocIR's training set, the highest page number plus 1"
    )
    sha256: str = Field(
        description="SHA-256 of the PDF file, or of the hashes of the page images in page order; documents with "
        "equal hashes are in the same split"
    )


class Skipped(Record):
    """An item that a stage left out: a line of skipped.jsonl, which `candidates` and `traces` write.

    The item is a question, or a file or part of a file.
    """

    query_id: str | None = Field(default=None, description="id of the skipped question, null for other items")
    file: str | None = Field(default=None, description="path of the file that holds the item, null for questions")
    reason: str = Field(
        min_length=1, description="short reason, identical for all items of one kind: the manifest counts it"
    )
    detail: str = Field(default="", description="details of this item, such as the line, the page or the error")


ImagesT = TypeVar("ImagesT", Page, RankingTask, Trace, Ranking)


def rebase_images(records: Iterable[ImagesT], from_dir: Path, to_dir: Path) -> Iterator[ImagesT]:
    """The records with image paths relative to `to_dir` instead of `from_dir`, for a file in another folder.

    An absolute image path becomes a relative one. Symbolic links in the folder names are resolved first, because
    ".." in a relative path refers to the resolved folder.
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
        pages = tuple(page.model_copy(update={"image": rebased(page.image)}) for page in getattr(record, field))
        yield record.model_copy(update={field: pages})
