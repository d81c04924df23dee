"""Rollouts: what a model samples for each question, and what GRPO would pay for it.

Sampling is long work. Finished rollouts are appended to `PARTIAL` a batch at a time, each batch with a seed of its
own, so a run that was stopped goes on where it was and ends with the same samples. Torch is loaded for sampling
alone: rollouts of an earlier run are read and scored without it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from tqdm import tqdm

from mmr5_train.common.files import InputError, atomic_write, read_records
from mmr5_train.ranking.records import LocalId, ModelAnswer, Order, PromptedTask, RankingTask, Rollouts
from mmr5_train.ranking.rewards import REWARDS

if TYPE_CHECKING:
    from mmr5_train.inference.local import LocalBackend

ROLLOUTS, PARTIAL = "rollouts.jsonl", "rollouts.partial.jsonl"


class RolloutConfig(BaseModel):
    """Where rollouts come from: a checkpoint that makes them, or a file of an earlier run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str | None = Field(default=None, description="a model that sft or grpo wrote")
    rollouts: Path | None = Field(default=None, description="rollouts.jsonl of an earlier run, instead of one")
    samples: int = Field(default=8, ge=2, description="answers a question")
    temperature: float = Field(default=1.0, gt=0)
    order: Order = Field(default="shuffled", description="how a prompt shows its candidates, as in grpo")
    batch_size: int = Field(default=64, gt=0, description="answers generated at a time")
    max_new_tokens: int = Field(default=2048, gt=0, description="longest answer")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.checkpoint is None) == (self.rollouts is None):
            raise ValueError("give either checkpoint (a model that makes rollouts) or rollouts (a file of them)")
        return self


def load_sampler(config: RolloutConfig, tasks: Sequence[RankingTask], folder: Path) -> LocalBackend:
    """The checkpoint. Raises `InputError` where it, or the page images of the tasks, can't be used."""
    from mmr5_train.inference.local import load_backend
    from mmr5_train.models.inputs import check_images

    check_images((page for task in tasks for page in task.candidates), folder)
    return load_backend(str(config.checkpoint), max_new_tokens=config.max_new_tokens)


def sample_rollouts(
    backend: LocalBackend, tasks: Sequence[RankingTask], folder: Path, path: Path, config: RolloutConfig, seed: int
) -> dict[str, Rollouts]:
    """The rollouts of each task, by query id. They are written to `path`; those that stand there stay.

    Page paths are relative to `folder`. The same seed and batch size give the same samples.
    """
    prompted = [task.in_prompt_order(config.order, seed) for task in tasks]
    size = max(1, config.batch_size // config.samples)
    made = finished_batches(path, len(tasks), size)
    if made:
        print(f"rollouts: {len(made)} of {len(tasks)} questions were done before")
    with (
        path.open("a", encoding="utf-8") as stream,
        tqdm(total=len(tasks), initial=len(made), desc="rollouts", unit="question") as bar,
    ):
        for start in range(len(made), len(tasks), size):
            batch = prompted[start : start + size]
            answers = backend.answer(
                batch,
                folder,
                batch_size=size,
                samples=config.samples,
                temperature=config.temperature,
                # Of the batch alone: a run that goes on later draws the same.
                seed=random.Random(f"{seed}/{start}").getrandbits(32),
            )
            records = [_record(*row, backend.think) for row in zip(batch, answers, strict=True)]
            stream.writelines(record.model_dump_json() + "\n" for record in records)
            stream.flush()
            made += records
            bar.update(len(batch))
    return {rollouts.query_id: rollouts for rollouts in made}


def _record(question: PromptedTask, samples: Sequence[ModelAnswer], think: bool) -> Rollouts:
    shown = tuple(page.id for page in question.shown)
    return Rollouts(query_id=question.task.query_id, shown=shown, think=think, samples=tuple(samples))


def finished_batches(path: Path, total: int, size: int) -> list[Rollouts]:
    """The rollouts of the batches that a stopped run ended; what it left of the next one is cut off the file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as stream:
        lines = [line for line in stream if line.endswith("\n")]
    whole = lines if len(lines) == total else lines[: len(lines) // size * size]
    with atomic_write(path) as stream:
        stream.writelines(whole)
    return read_records(path, Rollouts) if whole else []


def read_rollouts(path: Path, tasks: Sequence[RankingTask]) -> dict[str, Rollouts]:
    """Rollouts of an earlier run, by query id. Raises `InputError` where a task has none that fit."""
    rollouts = {made.query_id: made for made in read_records(path, Rollouts)}
    for task in tasks:
        if task.query_id not in rollouts:
            raise InputError(f"{path}: lacks rollouts of {task.query_id}; make them: difficulty.checkpoint")
        if set(rollouts[task.query_id].shown) != {candidate.id for candidate in task.candidates}:
            raise InputError(
                f"{path}: {task.query_id} was shown other candidates than it has now; make rollouts anew: "
                "difficulty.checkpoint"
            )
    return rollouts


def rewards_of(rollouts: Rollouts, task: RankingTask, weights: Mapping[str, float]) -> list[float]:
    """What each sample earns: the weighted mean of the rewards, so that 1 is the most there is."""
    relevant = set(task.positives)
    positives = [LocalId(i) for i, page in enumerate(rollouts.shown, 1) if page in relevant]
    n = len(rollouts.shown)
    return [
        sum(
            weight * REWARDS[name](sample.completion, n, positives, expect_think=rollouts.think)
            for name, weight in weights.items()
        )
        / sum(weights.values())
        for sample in rollouts.samples
    ]
