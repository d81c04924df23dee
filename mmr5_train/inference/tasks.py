"""Ranks tasks, whose page images are files, with a backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from mmr5_train.models.pages import load_page
from mmr5_train.ranking.records import ModelAnswer, PromptedTask, Record

if TYPE_CHECKING:  # imports torch, which `select` does not need when it reads rollouts of an earlier run
    from mmr5_train.inference.local import LocalBackend
    from mmr5_train.inference.remote import RemoteBackend
    from mmr5_train.inference.vllm_engine import VllmBackend


class Batch(Record):
    """The results of one batch of questions: a line of a partial file. Stages add their own fields."""

    start: int = Field(ge=0, description="index of the first question")


def batch_seed(seed: int, start: int) -> int:
    """The sampling seed of the batch that begins with prompt `start`."""
    return seed * 1_000_003 + start


def rank_tasks(
    backend: LocalBackend | RemoteBackend | VllmBackend,
    tasks: Sequence[PromptedTask],
    folder: Path,
    *,
    batch_size: int,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[list[ModelAnswer]]:
    """The answers to each task, in order: one greedy answer, or `samples` sampled answers.

    Page paths are relative to `folder`; images are loaded a batch at a time. The same seed and batch size give the
    same samples.
    """
    for start in range(0, len(tasks), batch_size):
        batch = tasks[start : start + batch_size]
        limits = backend.limits
        images = [[load_page(folder / page.image, limits) for page in prompted.shown] for prompted in batch]
        yield from backend.generate(
            [prompted.task.query for prompted in batch],
            images,
            samples=samples,
            temperature=temperature,
            seed=batch_seed(seed, start),
        )
