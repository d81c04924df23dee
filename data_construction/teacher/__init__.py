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

from data_construction.teacher.extractive import ExtractiveConfig, ExtractiveTeacher
from data_construction.teacher.vision import OpenAIConfig, OpenAITeacher, TeacherFailure
from mmr5_train.ranking.records import LocalId, Page

__all__ = ["Teacher", "TeacherConfig", "TeacherFailure", "make_teacher"]

TeacherConfig = Annotated[ExtractiveConfig | OpenAIConfig, Field(discriminator="name")]


class Teacher(Protocol):
    """Raises `TeacherFailure` where one question fails and `InputError` where none can succeed."""

    concurrency: int
    counts: Counter[str]

    async def explain(self, query: str, page: Page, image: Path, helps: bool, words: int) -> str: ...

    async def refine(self, query: str, notes: Sequence[str], positives: Sequence[LocalId], words: int) -> str: ...

    async def close(self) -> None: ...


def make_teacher(config: TeacherConfig) -> Teacher:
    return ExtractiveTeacher(config) if isinstance(config, ExtractiveConfig) else OpenAITeacher(config)
