"""What explains a page: the offline extractive teacher, or a vision model behind an OpenAI-compatible server.

Both follow MM-R5 (arXiv 2506.12364, data construction): `explain` says why one page can or cannot help to
answer a question, in the direction of the label; `refine` turns the notes on all pages of a question into a
sentence on why the relevant pages help and one on why the others don't.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

from data_construction.teacher.calls import ChatServer, TeacherFailure
from data_construction.teacher.extractive import ExtractiveConfig, ExtractiveTeacher
from data_construction.teacher.store import AnswerStore
from data_construction.teacher.vision import OpenAIConfig, OpenAITeacher
from mmr5_train.ranking.records import LocalId, Page

__all__ = ["OpenAIConfig", "Teacher", "TeacherConfig", "TeacherFailure", "make_teacher"]

TeacherConfig = Annotated[ExtractiveConfig | OpenAIConfig, Field(discriminator="name")]


class Teacher(Protocol):
    """Raises `TeacherFailure` where one question fails and `InputError` where none can succeed.

    `problem` says what was wrong with the answer before, where the same is asked a second time. `counts` go into
    the manifest, so they must be the same however often the run was stopped; `status` is for the progress bar.
    """

    concurrency: int
    counts: Counter[str]

    async def explain(
        self, query: str, page: Page, image: Path, helps: bool, words: int, problem: str = ""
    ) -> str: ...

    async def refine(
        self, query: str, notes: Sequence[str], positives: Sequence[LocalId], words: int, problem: str = ""
    ) -> str: ...

    def status(self) -> str: ...

    async def close(self) -> None: ...


def make_teacher(config: TeacherConfig, answers: Path, max_words: int, accept_other: bool) -> Teacher:
    """The teacher that the config names; a paid one keeps its answers in the file `answers`.

    Raises `InputError` for a server or a store that can't be used, and for a store whose answers were asked for
    with other settings, unless `accept_other`.
    """
    if isinstance(config, ExtractiveConfig):
        return ExtractiveTeacher(config)
    server = ChatServer(config)  # before the store: without a key no file is made
    store = AnswerStore(answers)
    store.expect({**config.asked_with(), "max_words": max_words}, accept_other)
    return OpenAITeacher(config, server, store)
