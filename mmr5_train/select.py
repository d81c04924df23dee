"""Selects the questions that GRPO trains on.

    python -m mmr5_train.select questions=outputs/data/select.jsonl out=outputs/select
    python -m mmr5_train.select … seen=outputs/traces/traces.jsonl 'difficulty={checkpoint:outputs/sft/model}'

Three steps, one after the other; each is left out where its setting is null:

- seen: questions about documents that SFT learned from fall out.
- difficulty: a model answers each question several times, and what GRPO would pay for the answers (config group
  `reward`) is looked at. A question stays if its answers don't all earn the same, for only then GRPO learns from
  it, and if they earn between `min_reward` and `max_reward` in the mean.
- balanced: MM-R5 (arXiv 2506.12364, section 3.3.1) splits the questions into 10 groups by image resolution and
  samples evenly. Neither script nor details were released; as read here, a question's resolution is the mean pixel
  count of its candidate pages, groups are equally wide on a logarithmic scale between the smallest and the largest
  (groups of equal size would change nothing), and where a group has too few questions the others give more.

Reads a `RankingTask` file and the pages.jsonl beside it; writes questions.jsonl, the chosen ones in the order they
had, rollouts.jsonl where a model answered, and manifest.json with what fell out and why, and the histograms by
resolution and by difficulty, before and after (empty groups are left out). A run that is stopped while the model
answers goes on with the same command.
"""

from __future__ import annotations

import json
import random
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
    load_sampler,
    read_rollouts,
    rewards_of,
    sample_rollouts,
)
from mmr5_train.ranking.records import Page, PageId, RankingTask, Rollouts, Trace, rebase_images
from mmr5_train.ranking.rewards import RewardConfig

GROUPS = 10
"""By resolution, as in the paper."""

TENTHS = [i / 10 for i in range(11)]
"""Edges of the groups by mean reward."""

SEEN, NOT_DRAWN = "document seen by SFT", "not drawn"


class Difficulty(RolloutConfig):
    """Which questions are neither too hard nor too easy for a model. 1 is the highest reward there is."""

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

    count: int = Field(gt=0, description="how many questions")
    groups: int = Field(default=GROUPS, gt=0, description="groups by resolution")


class SelectStage(StageConfig):
    """`python -m mmr5_train.select` (configs/select.yaml)."""

    questions: Path = Field(description="RankingTask records")
    pages: Path | None = Field(default=None, description="Page records; None: pages.jsonl beside `questions`")
    seen: Path | None = Field(default=None, description="what SFT learned from: traces.jsonl, or its train.jsonl")
    difficulty: Difficulty | None = None
    balanced: Balanced | None = None
    reward: RewardConfig


def main(config: SelectStage) -> None:
    pages_path = config.pages or config.questions.parent / "pages.jsonl"
    inputs = [path for path in (config.questions, pages_path, config.seen) if path]
    tasks = read_records(config.questions, RankingTask)
    pixels = resolutions(tasks, read_records(pages_path, Page, unique="id"), pages_path)
    edges = group_edges(pixels, config.balanced.groups if config.balanced else GROUPS)
    group = {task.query_id: group_of(value, edges) for task, value in zip(tasks, pixels, strict=True)}
    left, dropped = tasks, Counter[str]()
    if config.seen:
        seen = seen_documents(config.seen)
        left = keep(left, lambda task: SEEN if seen & documents(task) else None, dropped)
        check_left(left, dropped, "give questions about other documents, or seen=null")

    means: dict[str, float] = {}
    if config.difficulty:
        rollouts = given_or_made(config, config.difficulty, left, inputs)
        rewards = {
            task.query_id: rewards_of(rollouts[task.query_id], task, config.reward.weights) for task in left
        }
        means = {query_id: fmean(earned) for query_id, earned in rewards.items()}
        bounds = config.difficulty.min_reward, config.difficulty.max_reward
        left = keep(left, lambda task: unfit(rewards[task.query_id], *bounds), dropped)
        check_left(left, dropped, "run again with other bounds; rollouts that were made are not made again")
    if config.difficulty is None or config.difficulty.rollouts:  # or else rollouts are in it already
        open_output(config.out, config.overwrite, inputs)

    if config.balanced:
        drawn = balanced([group[task.query_id] for task in left], config.balanced.count, config.seed)
        dropped[NOT_DRAWN] = len(left) - len(drawn)
        left = [left[i] for i in drawn]

    out = config.out
    write_records(out / "questions.jsonl", rebase_images(left, config.questions.parent, out))
    if (out / PARTIAL).is_file():
        (out / PARTIAL).rename(out / ROLLOUTS)
    chosen = {task.query_id for task in left}
    tenths = {query_id: group_of(value, TENTHS) for query_id, value in means.items()}
    counts = {
        "questions_before": len(tasks),
        "questions": len(left),
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "groups": histogram(group, [round(edge) for edge in edges], chosen, "pixels"),
    }
    if means:
        counts |= {"difficulty": histogram(tenths, TENTHS, chosen, "reward")}
    write_manifest(out, stage="select", config=config.model_dump(mode="json"), inputs=inputs, counts=counts)
    print(summary(counts, out))


def seen_documents(path: Path) -> set[str]:
    """Names of the documents in traces.jsonl or in a `RankingTask` file, without a final ".pdf"."""
    _, first = next(read_json_lines(path), (0, {}))
    if "shown" in first:
        return {stem(page.doc_name) for trace in read_records(path, Trace) for page in trace.shown}
    return set().union(*(documents(task) for task in read_records(path, RankingTask)))


def documents(task: RankingTask) -> set[str]:
    """Names of the documents that a question's prompt shows, or that answer it."""
    return {stem(page.doc_name) for page in (*task.candidates, *task.positives)}


def stem(doc_name: str) -> str:
    return doc_name.removesuffix(".pdf")  # one corpus may write it and another not


def keep(
    tasks: Sequence[RankingTask], why_not: Callable[[RankingTask], str | None], dropped: Counter[str]
) -> list[RankingTask]:
    """The tasks for which `why_not` gives no reason; the others are counted by their reason."""
    reasons = [why_not(task) for task in tasks]
    dropped.update(reason for reason in reasons if reason)
    return [task for task, reason in zip(tasks, reasons, strict=True) if not reason]


def check_left(left: Sequence[RankingTask], dropped: Mapping[str, int], advice: str) -> None:
    if not left:
        raise InputError(f"no question is left ({_counted(dropped)}); {advice}")


def given_or_made(
    config: SelectStage, difficulty: Difficulty, tasks: Sequence[RankingTask], inputs: list[Path]
) -> dict[str, Rollouts]:
    """The rollouts of each task, by query id, from the file given (which joins `inputs`) or made in `out`.

    An output folder in which the same command was stopped is taken up as it is.
    """
    if difficulty.rollouts:
        inputs.append(difficulty.rollouts)
        return read_rollouts(difficulty.rollouts, tasks)
    folder, partial = config.questions.parent, config.out / PARTIAL
    backend = load_sampler(difficulty, tasks, folder)
    asked = difficulty.model_dump(mode="json", exclude={"min_reward", "max_reward", "rollouts"})
    asked |= {"seed": config.seed, "questions": file_hash(config.questions)}
    asked |= {"seen": file_hash(config.seen) if config.seen else None}
    if partial.is_file() and not config.overwrite:
        check_same_rollouts(config.out, asked)
    else:
        open_output(config.out, config.overwrite, [*inputs, Path(str(difficulty.checkpoint))])
        write_json(config.out / MANIFEST, {"finished": False, "rollouts": asked})
    try:
        return sample_rollouts(backend, tasks, folder, partial, difficulty, config.seed)
    except KeyboardInterrupt:
        print(f"finished rollouts are kept in {partial}; the same command goes on from there", file=sys.stderr)
        raise


def check_same_rollouts(out: Path, asked: dict[str, Any]) -> None:
    """Raises `InputError` where the stopped run in `out` was asked for other rollouts."""
    begun = json.loads((out / MANIFEST).read_text(encoding="utf-8")).get("rollouts", {})
    for name, value in asked.items():
        if begun.get(name) != value:
            raise InputError(
                f"{out / PARTIAL}: rollouts of a run that was stopped, with another {name} (then "
                f"{begun.get(name)}, now {value}); run its command again, choose another out=…, or set "
                "overwrite=true to begin anew"
            )


def unfit(rewards: Sequence[float], lowest: float, highest: float) -> str | None:
    """Why a question with these rewards teaches too little, None where it does not."""
    if min(rewards) == max(rewards):
        return "all answers earn the same"
    if fmean(rewards) < lowest:
        return f"mean reward below {lowest:g}"
    return f"mean reward above {highest:g}" if fmean(rewards) > highest else None


def resolutions(tasks: Sequence[RankingTask], pages: Sequence[Page], pages_path: Path) -> list[float]:
    """Mean pixels of each task's candidate pages. Raises `InputError` for a candidate that is not in `pages`."""
    pixels: dict[PageId, int] = {page.id: page.width * page.height for page in pages}
    means = []
    for task in tasks:
        for candidate in task.candidates:
            if candidate.id not in pixels:
                raise InputError(f"{pages_path}: lacks page {candidate.id}, a candidate of {task.query_id}")
        means.append(sum(pixels[candidate.id] for candidate in task.candidates) / len(task.candidates))
    return means


def group_edges(pixels: Sequence[float], groups: int) -> list[float]:
    """`groups` + 1 ascending edges in pixels, equal ratios between them, from the smallest to the largest."""
    low, high = min(pixels), max(pixels)
    return [low * (high / low) ** (i / groups) for i in range(groups)] + [high]


def group_of(pixels: float, edges: Sequence[float]) -> int:
    """0-based group of a resolution: how many inner edges lie below it."""
    return bisect_left(edges, pixels, 1, len(edges) - 1) - 1


def balanced(groups: Sequence[int], count: int, seed: int) -> list[int]:
    """Indices of `count` questions, as evenly from the groups as they allow; question i is of `groups[i]`.

    Shuffles each group, then takes one of each in turn until there are enough.
    """
    rng = random.Random(seed)
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    shuffled = [rng.sample(members[group], len(members[group])) for group in sorted(members)]
    in_turn = [index for row in zip_longest(*shuffled) for index in row if index is not None]
    return sorted(in_turn[:count])


def histogram(
    group: Mapping[str, int], edges: Sequence[float], chosen: set[str], unit: str
) -> list[dict[str, float]]:
    """How many questions a group has, before and after; `group` is by query id, empty groups are left out."""
    before, after = Counter(group.values()), Counter(group[query_id] for query_id in chosen)
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
    """Both histograms as tables, then the result in a line."""
    lines = []
    for key, title, unit in (("groups", "pixels a page", "pixels"), ("difficulty", "mean reward", "reward")):
        rows = counts.get(key, [])
        lines += [f"{title:>24}  before   after"] if rows else []
        for row in rows:
            span = f"{row[f'from_{unit}']:,} to {row[f'to_{unit}']:,}"
            lines.append(f"{span:>24} {row['before']:7,} {row['after']:7,}")
    dropped = f" ({_counted(counts['dropped'])})" if counts["dropped"] else ""
    lines.append(f"select: {counts['questions']} of {counts['questions_before']} questions{dropped}; in {out}")
    return "\n".join(lines)


def _counted(dropped: Mapping[str, int]) -> str:
    return "; ".join(f"{reason}: {count:,}" for reason, count in dropped.items() if count)


if __name__ == "__main__":
    run_stage(main, SelectStage, "select")
