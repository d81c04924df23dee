"""Rollouts for question selection: sampled answers to each question, and the rewards that GRPO would give them.

Sampling takes long, so each finished batch of rollouts is appended to `PARTIAL`. Each batch has its own seed, so a
resumed run ends with the same samples as an uninterrupted one. Torch is imported only for sampling; rollouts
of an earlier run are read and scored without it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from tqdm import tqdm

from mmr5_train.common.files import InputError, atomic_write, read_records
from mmr5_train.inference.tasks import rank_tasks
from mmr5_train.ranking.records import LocalId, ModelAnswer, Order, PromptedTask, RankingTask, Rollouts
from mmr5_train.ranking.rewards import REWARDS, RewardConfig

if TYPE_CHECKING:
    from mmr5_train.inference.local import LocalBackend
    from mmr5_train.models.lengths import Fitting

ROLLOUTS, PARTIAL = "rollouts.jsonl", "rollouts.partial.jsonl"


class RolloutConfig(BaseModel):
    """The source of rollouts: a checkpoint that samples them, or a file of an earlier run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str | None = Field(default=None, description="a model that sft or grpo wrote")
    rollouts: Path | None = Field(
        default=None, description="rollouts.jsonl of an earlier run, instead of a checkpoint"
    )
    samples: int = Field(default=8, ge=2, description="answers per question")
    temperature: float = Field(default=1.0, gt=0)
    order: Order = Field(default="shuffled", description="order of the candidates in a prompt, as in grpo")
    batch_size: int = Field(default=64, gt=0, description="answers per batch")
    max_new_tokens: int = Field(default=2048, gt=0, description="largest number of tokens in an answer")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.checkpoint is None) == (self.rollouts is None):
            raise ValueError("give either checkpoint (a model that samples rollouts) or rollouts (a file of them)")
        return self


def leave_out_long_questions(
    config: RolloutConfig, tasks: Sequence[RankingTask], source: Path, max_share: float
) -> Fitting:
    """The tasks whose prompt and answer fit the checkpoint's context. `source` is their file.

    Raises `InputError` for a page image that can't be read, and if more than `max_share` of the tasks do not fit.
    """
    from mmr5_train.models.lengths import context_limit, count_tokens, image_sizes, leave_out_too_long
    from mmr5_train.models.loading import load_processor, read_settings

    checkpoint = str(config.checkpoint)
    settings = read_settings(checkpoint)
    if settings is None:
        raise InputError(f"difficulty.checkpoint: {checkpoint} was not trained by sft or grpo of this project")
    sizes = image_sizes((page for task in tasks for page in task.candidates), source.parent)
    processor = load_processor(settings.to_model_config(checkpoint))
    queries, shown = [task.query for task in tasks], [task.candidates for task in tasks]
    counts = count_tokens(processor, settings.prompt, queries, shown, sizes)
    limit = context_limit(checkpoint, {"difficulty.max_new_tokens": config.max_new_tokens})
    return leave_out_too_long(source, [task.query_id for task in tasks], counts, limit, max_share)


def load_sampler(config: RolloutConfig, reward: RewardConfig) -> LocalBackend:
    """The backend that samples.

    Raises `InputError` if the checkpoint can't be used, or if it writes no verdicts and `reward` needs them.
    """
    from mmr5_train.inference.local import load_backend
    from mmr5_train.models.loading import writes_verdicts

    reward.check_verdicts(writes_verdicts(str(config.checkpoint)), str(config.checkpoint))
    return load_backend(str(config.checkpoint), max_new_tokens=config.max_new_tokens)


def sample_rollouts(
    backend: LocalBackend, tasks: Sequence[RankingTask], folder: Path, path: Path, config: RolloutConfig, seed: int
) -> dict[str, Rollouts]:
    """Samples the rollouts of each task and appends them to `path`. Returns all of them by query id.

    Tasks whose rollouts are already in `path` are skipped. Page paths are relative to `folder`. The same seed and
    batch size give the same samples.
    """
    prompted = [task.in_prompt_order(config.order, seed) for task in tasks]
    size = max(1, config.batch_size // config.samples)
    rollouts = read_finished_batches(path, len(tasks), size)
    if rollouts:
        print(f"rollouts: {len(rollouts)} of {len(tasks)} questions are already done")
    with (
        path.open("a", encoding="utf-8") as stream,
        tqdm(total=len(tasks), initial=len(rollouts), desc="rollouts", unit="question") as bar,
    ):
        for start in range(len(rollouts), len(tasks), size):
            batch = prompted[start : start + size]
            answers = rank_tasks(
                backend,
                batch,
                folder,
                batch_size=size,
                samples=config.samples,
                temperature=config.temperature,
                # Depends only on the batch, so that a resumed run samples the same.
                seed=random.Random(f"{seed}/{start}").getrandbits(32),
            )
            records = [_record(*row, backend.think) for row in zip(batch, answers, strict=True)]
            stream.writelines(record.model_dump_json() + "\n" for record in records)
            stream.flush()
            rollouts += records
            bar.update(len(batch))
    return {record.query_id: record for record in rollouts}


def _record(prompted: PromptedTask, samples: Sequence[ModelAnswer], think: bool) -> Rollouts:
    shown = tuple(page.id for page in prompted.shown)
    return Rollouts(query_id=prompted.task.query_id, shown=shown, think=think, samples=tuple(samples))


def read_finished_batches(path: Path, total: int, size: int) -> list[Rollouts]:
    """The rollouts of all complete batches in `path`. The lines of an incomplete batch are removed from the file.

    `total` is the number of questions, `size` the number of questions per batch.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as stream:
        lines = [line for line in stream if line.endswith("\n")]
    complete = lines if len(lines) == total else lines[: len(lines) // size * size]
    with atomic_write(path) as stream:
        stream.writelines(complete)
    return read_records(path, Rollouts) if complete else []


def read_rollouts(path: Path, tasks: Sequence[RankingTask]) -> dict[str, Rollouts]:
    """The rollouts of an earlier run, by query id.

    Raises `InputError` if a task has no rollouts, or rollouts with other candidates.
    """
    rollouts = {record.query_id: record for record in read_records(path, Rollouts)}
    for task in tasks:
        if task.query_id not in rollouts:
            raise InputError(
                f"{path}: has no rollouts for {task.query_id}; sample them with difficulty.checkpoint"
            )
        if set(rollouts[task.query_id].shown) != {candidate.id for candidate in task.candidates}:
            raise InputError(
                f"{path}: the rollouts for {task.query_id} show other candidates than the question has now; "
                "sample them again with difficulty.checkpoint"
            )
    return rollouts


def rollout_rewards(rollouts: Rollouts, task: RankingTask, weights: Mapping[str, float]) -> list[float]:
    """The reward of each sample: the weighted mean of the rewards in `weights`, so that 1 is the highest."""
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
