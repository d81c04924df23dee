"""Selects the questions that GRPO trains on.

    python -m mmr5_train.select questions=outputs/data/select.jsonl out=outputs/select count=3000

Policies:

- all: every question;
- resolution_balanced: MM-R5 (arXiv 2506.12364, section 3.3.1) splits the questions into 10 groups by image
  resolution and samples evenly. Neither script nor details were released; as read here, a question's resolution
  is the mean pixel count of its candidate pages, groups are equally wide on a logarithmic scale between the
  smallest and the largest (groups of equal size would change nothing), and where a group has too few questions
  the others give more.

Reads a `RankingTask` file and the pages.jsonl beside it; writes questions.jsonl, the chosen ones in the order
they had, and manifest.json with the sizes of the groups, before and after (empty groups are left
out).
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from pydantic import Field

from mmr5_train.config import StageConfig, run_stage
from mmr5_train.ranking.files import InputError, open_output, read_records, write_manifest, write_records
from mmr5_train.ranking.records import Page, PageId, RankingTask, rebase_images


class SelectStage(StageConfig):
    """`python -m mmr5_train.select` (configs/select.yaml)."""

    questions: Path = Field(description="RankingTask records")
    pages: Path | None = Field(default=None, description="Page records; None: pages.jsonl beside `questions`")
    policy: Literal["all", "resolution_balanced"]
    count: int | None = Field(default=None, gt=0, description="how many for resolution_balanced; None: all")
    groups: int = Field(default=10, gt=0, description="groups by resolution")


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


def main(config: SelectStage) -> None:
    pages_path = config.pages or config.questions.parent / "pages.jsonl"
    tasks = read_records(config.questions, RankingTask)
    pixels = resolutions(tasks, read_records(pages_path, Page, unique="id"), pages_path)
    out = open_output(config.out, config.overwrite, inputs=[config.questions, pages_path])
    edges = group_edges(pixels, config.groups)
    groups = [group_of(value, edges) for value in pixels]
    chosen = list(range(len(tasks)))
    if config.policy == "resolution_balanced" and config.count is not None:
        chosen = balanced(groups, config.count, config.seed)
    records = rebase_images([tasks[i] for i in chosen], config.questions.parent, out)
    write_records(out / "questions.jsonl", records)
    after = [groups[i] for i in chosen]
    histogram = [
        {
            "group": group,
            "from_pixels": round(edges[group]),
            "to_pixels": round(edges[group + 1]),
            "before": groups.count(group),
            "after": after.count(group),
        }
        for group in sorted(set(groups))
    ]
    write_manifest(
        out,
        stage="select",
        config=config.model_dump(mode="json"),
        inputs=[config.questions, pages_path],
        counts={"questions_before": len(tasks), "questions": len(chosen), "groups": histogram},
    )
    print(
        f"select: {len(chosen)} of {len(tasks)} questions ({config.policy}), "
        f"from {len(set(after))} of {len(histogram)} resolution groups; in {out}"
    )


if __name__ == "__main__":
    run_stage(main, SelectStage, "select")
