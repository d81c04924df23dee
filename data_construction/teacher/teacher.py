"""The interface of a teacher, and the choice between the two: extractive (offline) and OpenAI-compatible.

Both follow the data construction of MM-R5 (arXiv 2506.12364). `explain` says why one page can or cannot help to
answer a question; the page's label decides which. It also states a verdict on the page, as a field. `refine` turns
the notes on all pages of a question into one sentence on the relevant pages and one on the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from data_construction.teacher.calls import ChatServer
from data_construction.teacher.extractive import ExtractiveConfig, ExtractiveTeacher
from data_construction.teacher.replies import PageNote
from data_construction.teacher.store import AnswerStore
from data_construction.teacher.vision import OpenAIConfig, OpenAITeacher
from mmr5_train.ranking.records import LocalId, Page

TeacherConfig = Annotated[ExtractiveConfig | OpenAIConfig, Field(discriminator="name")]


class Teacher(Protocol):
    """Both methods raise `TeacherFailure` if one question fails, and `InputError` if no question can succeed.

    `words` is the maximum length of the text in words; the verdict on a page does not count. On a second try,
    `problem` describes what was wrong with the previous answer; otherwise it is "". `counts` are written to the
    manifest, so they must not depend on how often the run was interrupted. `status` is for the progress bar.
    """

    concurrency: int
    counts: Counter[str]

    @property
    def resolved(self) -> dict[str, Any]: ...  # for the manifest: settings that the config leaves to the server

    async def explain(
        self, query: str, page: Page, image: Path, helps: bool, words: int, problem: str = ""
    ) -> PageNote: ...

    async def refine(
        self, query: str, notes: Sequence[str], positives: Sequence[LocalId], words: int, problem: str = ""
    ) -> str: ...

    def status(self) -> str: ...

    async def close(self) -> None: ...


def make_teacher(config: TeacherConfig, answers: Path, max_words: int, accept_other_settings: bool) -> Teacher:
    """Makes the teacher that the config names. A paid teacher stores its answers in the file `answers`.

    Raises `InputError` if the server or the store can't be used, and if the answers in the store were requested
    with other settings, unless `accept_other_settings`.
    """
    if isinstance(config, ExtractiveConfig):
        return ExtractiveTeacher(config)
    server = ChatServer(config)  # before the store, so that no file is created if the key is missing
    store = AnswerStore(answers)
    store.register_settings({**config.request_settings(), "max_words": max_words}, accept_other_settings)
    server.remember_dialect(store)
    return OpenAITeacher(config, server, store)
