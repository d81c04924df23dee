"""The report's tables of answer classes and defects, and of cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmr5_train.common.files import InputError
from mmr5_train.evaluation.answer_classes import CLASSES, DEFECTS, class_counts
from mmr5_train.evaluation.metrics import defect_counts
from mmr5_train.evaluation.scoring import known_mean, writes_completions
from mmr5_train.ranking.records import Ranking

Rankings = Mapping[str, Sequence[Ranking]]

_DEFECTS = {"without_defect": "None of the defects below."} | {
    str(defect): text for defect, text in DEFECTS.items()
}
# (field of a system in timing.json or mean over its rankings, column heading, format)
_COST: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("seconds_per_question", "Seconds", "{:.3g}".format),
    ("tokens", "Completion tokens", "{:,.0f}".format),
    ("tokens_sampled", "Completion tokens, sampled", "{:,.0f}".format),
    ("prompt_tokens", "Prompt tokens", "{:,.0f}".format),
    ("visual_tokens", "Visual tokens", "{:,.0f}".format),
)


def answer_view(rankings: Rankings) -> dict[str, Any] | None:
    """The table of classes and defects. Each system has one column for its greedy and one for its sampled answers.

    Every class and defect has a row, even if its count is 0. None if no system writes completions.
    """
    columns = []
    for system, system_rankings in rankings.items():
        if not writes_completions(system_rankings):
            continue
        for kind, sampled in (("greedy", False), ("sampled", True)):
            defects = defect_counts(system_rankings, sampled=sampled)
            counts = {"classes": class_counts(system_rankings, sampled=sampled), "defects": defects}
            if defects["answers"]:
                columns.append({"system": system, "kind": kind, "answers": defects["answers"], "counts": counts})
    if not columns:
        return None
    groups = []
    for key, title, meanings in (
        ("classes", "Classes: each answer has one", CLASSES),
        ("defects", "Defects: an answer can have several", _DEFECTS),
    ):
        rows = [
            {"name": name, "meaning": meaning, "cells": [_cell(column, key, name) for column in columns]}
            for name, meaning in meanings.items()
        ]
        groups.append({"title": title, "rows": rows})
    return {"columns": columns, "groups": groups}


def _cell(column: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    count = column["counts"][key][name]
    return {"count": count, "share": f"{100 * count / column['answers']:.1f} %"}


def cost_view(rankings: Rankings, timing: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """Seconds and tokens per question, means over questions. None if no system has any of them.

    `timing` is the content of timing.json. It may be empty, since the rankings contain the completion tokens.
    """
    costs = {}
    for system, system_rankings in rankings.items():
        cost = dict(timing.get(system, {}))
        if writes_completions(system_rankings):
            counts = {
                "tokens": known_mean(ranking.greedy.tokens for ranking in system_rankings),
                "tokens_sampled": known_mean(
                    answer.tokens for ranking in system_rankings for answer in ranking.samples
                ),
            }
            cost |= {name: count for name, count in counts.items() if count is not None}
        if cost:
            costs[system] = cost
    columns = [column for column in _COST if any(column[0] in cost for cost in costs.values())]
    if not columns:
        return None
    return {
        "headings": [heading for _, heading, _ in columns],
        "rows": [
            {
                "system": system,
                "cells": [text(cost[key]) if key in cost else "–" for key, _, text in columns],
            }
            for system, cost in costs.items()
        ],
    }


def read_timing(folder: Path) -> dict[str, dict[str, float]]:
    """timing.json of an evaluation: system → its cost by field. Empty if the file does not exist."""
    path = folder / "timing.json"
    if not path.is_file():
        return {}
    try:
        timing = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}); remove it, or run the evaluate stage again") from None
    if not isinstance(timing, dict) or not all(isinstance(cost, dict) for cost in timing.values()):
        raise InputError(f"{path}: expected one object per system; remove it, or run the evaluate stage again")
    return timing
