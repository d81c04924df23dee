"""Selects the questions that GRPO trains on.

    python -m mmr5_train.select questions=outputs/data/select.jsonl out=outputs/select
    python -m mmr5_train.select … seen=outputs/traces/traces.jsonl 'difficulty={checkpoint:outputs/sft/model}'

Three steps in this order. A step is skipped if its setting is null:

- seen: removes questions about documents that SFT was trained on.
- difficulty: a model answers each question several times, and each answer gets the reward that GRPO would give it
  (config group `reward`). A question is selected if its answers earn different rewards, since GRPO learns nothing
  from equal rewards, and if the mean reward is between `min_reward` and `max_reward`.
- balanced: MM-R5 (arXiv 2506.12364, section 3.3.1) splits the questions into 10 groups by image resolution and
  samples evenly from them. Its code and details are not public. Here, the resolution of a question is the mean
  pixel count of its candidate pages at their original size, before `corpus.max_side` shrank them. The groups have
  equal widths on a logarithmic scale from the smallest to the largest resolution, because groups of equal size
  would change nothing. If a group has too few questions, more questions are taken from the other groups.

Reads a `RankingTask` file and the pages.jsonl next to it. Writes

- questions.jsonl: the selected questions, in their original order
- rollouts.jsonl: the sampled answers, if a model was run
- skipped.jsonl: the questions that have too many tokens for that model, if there are any
- manifest.json: the number of removed questions by reason, and histograms by resolution and by difficulty, before
  and after the selection, without empty groups

If the run is interrupted while the model answers, the same command resumes it. Under `accelerate launch`, the
processes share the questions that the model answers.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.environment import is_first_process
from mmr5_train.common.files import (
    MANIFEST,
    InputError,
    file_hash,
    open_output,
    read_json_lines,
    read_records,
    write_json,
    write_manifest,
    write_records,
)
from mmr5_train.inference.rollouts import (
    PARTIAL,
    ROLLOUTS,
    RolloutConfig,
    leave_out_long_questions,
    load_sampler,
    read_rollouts,
    rollout_rewards,
    sample_rollouts,
)
from mmr5_train.models.config import CheckpointOptions
from mmr5_train.ranking.records import Page, PageId, RankingTask, Rollouts, Skipped, Trace, rebase_images
from mmr5_train.ranking.rewards import RewardConfig

GROUPS = 10
"""Number of groups by resolution, as in the paper."""

REWARD_EDGES = [i / 10 for i in range(11)]
"""Edges of the groups by mean reward."""

SKIPPED = "skipped.jsonl"

SEEN, NOT_DRAWN = "document seen by SFT", "not drawn"
"""Reasons for removing a question."""


class Difficulty(RolloutConfig):
    """The rollouts that measure difficulty, and bounds on a question's mean reward, which is at most 1."""

    min_reward: float = Field(default=0.0, description="lowest mean reward of a question")
    max_reward: float = Field(default=1.0, description="highest mean reward of a question")

    @model_validator(mode="after")
    def _bounds_ascend(self) -> Self:
        if self.min_reward > self.max_reward:
            raise ValueError(f"min_reward {self.min_reward:g} is above max_reward {self.max_reward:g}")
        return self


class Balanced(BaseModel):
    """Resolution-balanced sampling."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(gt=0, description="number of questions to select")
    groups: int = Field(default=GROUPS, gt=0, description="number of groups by resolution")


class SelectStage(StageConfig, CheckpointOptions):
    """`python -m mmr5_train.select` (configs/select.yaml)."""

    questions: Path = Field(description="RankingTask records")
    pages: Path | None = Field(
        default=None, description="Page records; null: pages.jsonl in the folder of `questions`"
    )
    seen: Path | None = Field(
        default=None,
        description="the data that SFT was trained on: traces.jsonl, or the train.jsonl of its questions",
    )
    difficulty: Difficulty | None = None
    max_too_long: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="largest share of questions that are left out because they have too many tokens for the model "
        "of `difficulty`; with more, the stage stops before it loads the model",
    )
    balanced: Balanced | None = None
    reward: RewardConfig


def main(config: SelectStage) -> None:
    sampling = config.difficulty is not None and config.difficulty.rollouts is None
    if not sampling and not is_first_process():
        return  # the processes of a launch share only the sampling
    pages_path = config.pages or config.questions.parent / "pages.jsonl"
    inputs = [path for path in (config.questions, pages_path, config.seen) if path]
    tasks = read_records(config.questions, RankingTask)
    pixels = resolutions(tasks, read_records(pages_path, Page, unique="id"), pages_path)
    edges = group_edges(pixels, config.balanced.groups if config.balanced else GROUPS)
    group = {task.query_id: group_of(value, edges) for task, value in zip(tasks, pixels, strict=True)}
    remaining, dropped = tasks, Counter[str]()
    if config.seen:
        seen = seen_documents(config.seen)
        remaining = keep(remaining, lambda task: SEEN if seen & documents(task) else None, dropped)
        check_remaining(remaining, dropped, "give questions about other documents, or seen=null")

    mean_rewards: dict[str, float] = {}
    skipped: list[Skipped] = []
    rollouts: dict[str, Rollouts] = {}
    if config.difficulty:
        skipped = long_questions(config, config.difficulty, remaining)
        too_long = {skip.query_id: skip.reason for skip in skipped}
        remaining = keep(remaining, lambda task: too_long.get(task.query_id), dropped)
        rollouts = read_or_sample_rollouts(config, config.difficulty, remaining, inputs)
        if not is_first_process():
            return
        rewards = {
            task.query_id: rollout_rewards(rollouts[task.query_id], task, config.reward.weights)
            for task in remaining
        }
        mean_rewards = {query_id: fmean(values) for query_id, values in rewards.items()}
        bounds = config.difficulty.min_reward, config.difficulty.max_reward
        remaining = keep(remaining, lambda task: why_unsuitable(rewards[task.query_id], *bounds), dropped)
        check_remaining(remaining, dropped, "run again with other bounds; finished rollouts are reused")
    if not sampling:  # sampling has already created the folder
        open_output(config.out, config.overwrite, inputs)

    if config.balanced:
        groups = [group[task.query_id] for task in remaining]
        selected_indices = balanced_sample(groups, config.balanced.count, config.seed)
        dropped[NOT_DRAWN] = len(remaining) - len(selected_indices)
        remaining = [remaining[i] for i in selected_indices]

    out = config.out
    write_records(out / "questions.jsonl", rebase_images(remaining, config.questions.parent, out))
    if sampling:
        write_records(out / ROLLOUTS, rollouts.values())
        shutil.rmtree(out / PARTIAL)
    if skipped:
        write_records(out / SKIPPED, skipped)
    counts = selection_counts(tasks, remaining, dropped, group, edges, mean_rewards)
    write_manifest(out, stage="select", config=config.model_dump(mode="json"), inputs=inputs, counts=counts)
    print(summary(counts, out))


def selection_counts(
    tasks: Sequence[RankingTask],
    remaining: Sequence[RankingTask],
    dropped: Mapping[str, int],
    group: Mapping[str, int],
    edges: Sequence[float],
    mean_rewards: Mapping[str, float],
) -> dict[str, Any]:
    """The manifest's counts. `group` and `edges` are by resolution; `mean_rewards` is empty without rollouts."""
    selected = {task.query_id for task in remaining}
    counts: dict[str, Any] = {
        "questions_before": len(tasks),
        "questions": len(remaining),
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "groups": histogram(group, [round(edge) for edge in edges], selected, "pixels"),
    }
    if mean_rewards:
        reward_group = {query_id: group_of(value, REWARD_EDGES) for query_id, value in mean_rewards.items()}
        counts["difficulty"] = histogram(reward_group, REWARD_EDGES, selected, "reward")
    return counts


def seen_documents(path: Path) -> set[str]:
    """Names of the documents in traces.jsonl or in a `RankingTask` file, as `document_stem` gives them."""
    _, first_record = next(read_json_lines(path), (0, {}))
    if "shown" in first_record:
        return {document_stem(page.doc_name) for trace in read_records(path, Trace) for page in trace.shown}
    return set().union(*(documents(task) for task in read_records(path, RankingTask)))


def documents(task: RankingTask) -> set[str]:
    """Names of the documents that a question's candidates and positives are from."""
    return {document_stem(page.doc_name) for page in (*task.candidates, *task.positives)}


def document_stem(doc_name: str) -> str:
    """The name without ".pdf": some corpora name the same document with it, others without."""
    return doc_name.removesuffix(".pdf")


def keep(
    tasks: Sequence[RankingTask], why_not: Callable[[RankingTask], str | None], dropped: Counter[str]
) -> list[RankingTask]:
    """The tasks for which `why_not` returns None. Counts the reasons for the others in `dropped`."""
    reasons = [why_not(task) for task in tasks]
    dropped.update(reason for reason in reasons if reason)
    return [task for task, reason in zip(tasks, reasons, strict=True) if not reason]


def check_remaining(remaining: Sequence[RankingTask], dropped: Mapping[str, int], advice: str) -> None:
    if not remaining:
        raise InputError(f"no question is left ({_format_counts(dropped)}); {advice}")


def long_questions(config: SelectStage, difficulty: Difficulty, tasks: Sequence[RankingTask]) -> list[Skipped]:
    """The questions that have no rollouts because they do not fit the checkpoint's context.

    With `difficulty.rollouts`, they are listed in skipped.jsonl next to that file. Raises `InputError` if more
    than `max_too_long` of the questions do not fit.
    """
    if difficulty.rollouts is None:
        fitting = leave_out_long_questions(
            difficulty, config, tasks, config.questions, config.reward, config.max_too_long
        )
        if fitting.message and is_first_process():
            print(f"select: {fitting.message}; listed in {config.out / SKIPPED}")
        return fitting.skipped
    path = difficulty.rollouts.with_name(SKIPPED)
    return read_records(path, Skipped) if path.is_file() else []


def read_or_sample_rollouts(
    config: SelectStage, difficulty: Difficulty, tasks: Sequence[RankingTask], inputs: list[Path]
) -> dict[str, Rollouts]:
    """The rollouts of each task, by query id: from `difficulty.rollouts`, or sampled into the output folder.

    The file `difficulty.rollouts` is added to `inputs`. If an interrupted run of the same command is in the output
    folder, its finished rollouts are used. Call on all processes: they share the questions.
    """
    if difficulty.rollouts:
        inputs.append(difficulty.rollouts)
        return read_rollouts(difficulty.rollouts, tasks)
    from mmr5_train.inference.processes import on_main_process, start_inference_processes  # imports torch

    processes = start_inference_processes()
    folder = config.questions.parent
    backend = load_sampler(difficulty, config, str(processes.device))
    on_main_process(lambda: prepare_output(config, difficulty, inputs))
    try:
        return sample_rollouts(backend, tasks, folder, config.out / PARTIAL, difficulty, config.seed)
    except KeyboardInterrupt:
        print(
            f"finished rollouts are in {config.out / PARTIAL}; the same command resumes the run", file=sys.stderr
        )
        raise


def prepare_output(config: SelectStage, difficulty: Difficulty, inputs: Sequence[Path]) -> None:
    """Opens the output folder, or keeps that of an interrupted run with the same settings for the rollouts."""
    settings = difficulty.model_dump(mode="json", exclude={"min_reward", "max_reward", "rollouts"})
    settings |= {"seed": config.seed, "questions": file_hash(config.questions)}
    settings |= {"seen": file_hash(config.seen) if config.seen else None}
    if (config.out / PARTIAL).is_dir() and not config.overwrite:
        check_rollout_settings(config.out, settings)
    else:
        open_output(config.out, config.overwrite, [*inputs, Path(str(difficulty.checkpoint))])
        write_json(config.out / MANIFEST, {"finished": False, "rollouts": settings})
        (config.out / PARTIAL).mkdir()


def check_rollout_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raises `InputError` if the interrupted run in `out` sampled rollouts with other settings."""
    earlier = json.loads((out / MANIFEST).read_text(encoding="utf-8")).get("rollouts", {})
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise InputError(
                f"{out / PARTIAL}: has rollouts of an interrupted run with {name} {earlier.get(name)}, but this "
                f"run has {value}; use the same settings to resume it, choose another out=…, or set "
                "overwrite=true to start over"
            )


def why_unsuitable(rewards: Sequence[float], lowest: float, highest: float) -> str | None:
    """Why GRPO learns too little from a question whose answers earn these rewards; None for a suitable one."""
    if min(rewards) == max(rewards):
        return "all answers earn the same"
    if fmean(rewards) < lowest:
        return f"mean reward below {lowest:g}"
    return f"mean reward above {highest:g}" if fmean(rewards) > highest else None


def resolutions(tasks: Sequence[RankingTask], pages: Sequence[Page], pages_path: Path) -> list[float]:
    """Mean pixel count of each task's candidates, at the original sizes of the pages.

    Raises `InputError` for a candidate that is not in `pages`.
    """
    pixels: dict[PageId, int] = {page.id: page.source_pixels for page in pages}
    means = []
    for task in tasks:
        for candidate in task.candidates:
            if candidate.id not in pixels:
                raise InputError(f"{pages_path}: lacks page {candidate.id}, a candidate of {task.query_id}")
        means.append(sum(pixels[candidate.id] for candidate in task.candidates) / len(task.candidates))
    return means


def group_edges(pixels: Sequence[float], groups: int) -> list[float]:
    """`groups` + 1 ascending edges from the smallest to the largest resolution, with equal ratios between them."""
    low, high = min(pixels), max(pixels)
    return [low * (high / low) ** (i / groups) for i in range(groups)] + [high]


def group_of(value: float, edges: Sequence[float]) -> int:
    """The group of a value, from 0: the number of inner edges below it."""
    return bisect_left(edges, value, 1, len(edges) - 1) - 1


def balanced_sample(groups: Sequence[int], count: int, seed: int) -> list[int]:
    """Ascending indices of `count` questions, taken as evenly from the groups as possible; all if there are fewer.

    `groups[i]` is the group of question i. Each group is shuffled; then questions are taken from the groups in
    turn.
    """
    rng = random.Random(seed)
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    shuffled = [rng.sample(members[group], len(members[group])) for group in sorted(members)]
    round_robin = [index for turn in zip_longest(*shuffled) for index in turn if index is not None]
    return sorted(round_robin[:count])


def histogram(
    group: Mapping[str, int], edges: Sequence[float], selected: set[str], unit: str
) -> list[dict[str, float]]:
    """The number of questions in each group before and after the selection. Omits empty groups.

    `group` maps query ids to groups. `selected` holds the query ids of the selected questions.
    """
    before, after = Counter(group.values()), Counter(group[query_id] for query_id in selected)
    return [
        {
            "group": i,
            f"from_{unit}": edges[i],
            f"to_{unit}": edges[i + 1],
            "before": before[i],
            "after": after[i],
        }
        for i in sorted(before)
    ]


def summary(counts: Mapping[str, Any], out: Path) -> str:
    """Both histograms as tables, and the result in one line."""
    lines = []
    for key, title, unit in (("groups", "pixels per page", "pixels"), ("difficulty", "mean reward", "reward")):
        rows = counts.get(key, [])
        lines += [f"{title:>24}  before   after"] if rows else []
        for row in rows:
            span = f"{row[f'from_{unit}']:,} to {row[f'to_{unit}']:,}"
            lines.append(f"{span:>24} {row['before']:7,} {row['after']:7,}")
    dropped = f" ({_format_counts(counts['dropped'])})" if counts["dropped"] else ""
    lines.append(f"select: {counts['questions']} of {counts['questions_before']} questions{dropped}; in {out}")
    return "\n".join(lines)


def _format_counts(dropped: Mapping[str, int]) -> str:
    return "; ".join(f"{reason}: {count:,}" for reason, count in dropped.items() if count)


if __name__ == "__main__":
    run_stage(main, SelectStage, "select")
