"""Rollouts for question selection: sampled answers to each question, and the rewards that GRPO would give them.

Sampling takes long, so the processes of a launch share it, and each saves its finished batches in the folder
`PARTIAL`. Each batch has its own seed, so neither interruptions nor the number of processes change the samples.
Torch is imported only for sampling; rollouts of an earlier run are read and scored without it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import Field, model_validator

from mmr5_train.common.files import InputError, read_records
from mmr5_train.inference.tasks import Batch, rank_tasks
from mmr5_train.models.config import MAX_NEW_TOKENS, BackendOptions, CheckpointOptions
from mmr5_train.ranking.records import ModelAnswer, Order, PromptedTask, RankingTask, Rollouts
from mmr5_train.ranking.rewards import RewardConfig, score_group

if TYPE_CHECKING:
    from mmr5_train.inference.local import LocalBackend
    from mmr5_train.inference.vllm_engine import VllmBackend
    from mmr5_train.models.lengths import Fitting

ROLLOUTS = "rollouts.jsonl"
PARTIAL = "partial"
"""Folder in the output folder of an unfinished run, with its finished batches."""


class RolloutConfig(BackendOptions):
    """The source of rollouts: a checkpoint that samples them, or a file of an earlier run."""

    checkpoint: str | None = Field(default=None, description="a model that sft or grpo wrote")
    rollouts: Path | None = Field(
        default=None, description="rollouts.jsonl of an earlier run, instead of a checkpoint"
    )
    samples: int = Field(default=8, ge=2, description="answers per question")
    temperature: float = Field(default=1.0, gt=0)
    order: Order = Field(default="shuffled", description="order of the candidates in a prompt, as in grpo")
    batch_size: int = Field(default=64, gt=0, description="answers per batch")
    max_new_tokens: int = Field(default=MAX_NEW_TOKENS, gt=0, description="largest number of tokens in an answer")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.checkpoint is None) == (self.rollouts is None):
            raise ValueError("give either checkpoint (a model that samples rollouts) or rollouts (a file of them)")
        return self


class RolloutBatch(Batch):
    """The rollouts of one batch of questions: a line of a partial file."""

    rollouts: tuple[Rollouts, ...]


def leave_out_long_questions(
    config: RolloutConfig,
    options: CheckpointOptions,
    tasks: Sequence[RankingTask],
    source: Path,
    reward: RewardConfig,
    max_share: float,
) -> Fitting:
    """The tasks whose prompt and answer fit the checkpoint's context. `source` is their file.

    Raises `InputError` for a page image that can't be read, if the checkpoint writes no verdicts and `reward`
    needs them, and if more than `max_share` of the tasks do not fit.
    """
    from mmr5_train.models.lengths import context_limit, count_tokens, image_sizes, leave_out_too_long
    from mmr5_train.models.loading import load_processor, writes_verdicts
    from mmr5_train.models.settings import resolve_settings

    checkpoint = str(config.checkpoint)
    reward.check_verdicts(writes_verdicts(checkpoint), checkpoint)  # reads one small file, so it comes first
    sizes = image_sizes((page for task in tasks for page in task.candidates), source.parent)
    settings = resolve_settings(checkpoint, options)
    processor = load_processor(settings.model)
    queries, shown = [task.query for task in tasks], [task.candidates for task in tasks]
    counts = count_tokens(processor, settings.prompt, queries, shown, sizes)
    limit = context_limit(settings.model.path, {"difficulty.max_new_tokens": config.max_new_tokens})
    return leave_out_too_long(source, [task.query_id for task in tasks], counts, limit, max_share)


def load_sampler(config: RolloutConfig, options: CheckpointOptions, device: str) -> LocalBackend | VllmBackend:
    """The backend that samples. The settings of the checkpoint are its own, unless `options` override them.

    Raises `InputError` if the checkpoint can't be used.
    """
    checkpoint = str(config.checkpoint)
    if config.backend == "vllm":
        from mmr5_train.inference.vllm_engine import load_vllm_backend

        return load_vllm_backend(
            checkpoint, options, window=None, max_new_tokens=config.max_new_tokens, arguments=config.vllm
        )
    from mmr5_train.inference.local import load_backend

    return load_backend(checkpoint, options, device=device, max_new_tokens=config.max_new_tokens)


def sample_rollouts(
    backend: LocalBackend | VllmBackend,
    tasks: Sequence[RankingTask],
    folder: Path,
    partial: Path,
    config: RolloutConfig,
    seed: int,
) -> dict[str, Rollouts]:
    """Samples the rollouts of each task into the folder `partial`. Returns all of them by query id.

    Call on all processes. Batches that are already in `partial` are skipped. Page paths are relative to `folder`.
    The same seed and batch size give the same samples.
    """
    from mmr5_train.inference.processes import finished_batches, run_unfinished

    prompted = [task.in_prompt_order(config.order, seed) for task in tasks]
    size = max(1, config.batch_size // config.samples)

    def sample(start: int) -> RolloutBatch:
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
        records = tuple(_record(*row, backend.think) for row in zip(batch, answers, strict=True))
        return RolloutBatch(start=start, rollouts=records)

    run_unfinished(partial, "rollouts", RolloutBatch, range(0, len(tasks), size), lambda: sample)
    batches = finished_batches(partial, "rollouts", RolloutBatch)
    return {record.query_id: record for start in sorted(batches) for record in batches[start].rollouts}


def _record(prompted: PromptedTask, samples: Sequence[ModelAnswer], think: bool) -> Rollouts:
    shown = tuple(page.id for page in prompted.shown)
    return Rollouts(query_id=prompted.task.query_id, shown=shown, think=think, samples=tuple(samples))


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
    """The reward of each sample: the weighted mean of the rewards in `weights`.

    Its highest value is 1, as that of most rewards; `reasonrank` has 1.3.
    """
    candidates = {candidate.id: candidate for candidate in task.candidates}
    prompted = PromptedTask(task=task, shown=tuple(candidates[page] for page in rollouts.shown))
    completions = [sample.completion for sample in rollouts.samples]
    values = np.array(
        [
            score_group(
                name,
                completions,
                len(rollouts.shown),
                prompted.local_positives,
                prompted.reference_order,
                expect_think=rollouts.think,
            )
            for name in weights
        ]
    )
    return [float(value) for value in np.average(values, axis=0, weights=list(weights.values()))]
