"""What the report shows of answers as such: what was wrong with them, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmr5_train.common.files import InputError
from mmr5_train.evaluation.answer_classes import CLASSES, DEFECTS, class_counts
from mmr5_train.evaluation.metrics import defect_counts
from mmr5_train.evaluation.scoring import writes_completions
from mmr5_train.ranking.records import Ranking

Rankings = Mapping[str, Sequence[Ranking]]

_DEFECTS = {"without_defect": "None of those below."} | {str(defect): text for defect, text in DEFECTS.items()}
# field of a system in timing.json, or a mean of its rankings; heading; how it is printed
_COST: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("seconds_per_question", "Seconds", "{:.3g}".format),
    ("tokens", "Completion tokens", "{:,.0f}".format),
    ("tokens_sampled", "Completion tokens, sampled", "{:,.0f}".format),
    ("prompt_tokens", "Prompt tokens", "{:,.0f}".format),
    ("visual_tokens", "Visual tokens", "{:,.0f}".format),
)


def answer_view(rankings: Rankings) -> dict[str, Any] | None:
    """The table of classes and defects, a column for a system's greedy answers and one for its sampled ones.

    None where no system writes answers. Everything that can be wrong has its row, also where nothing is.
    """
    columns = []
    for system, ranked in rankings.items():
        if not writes_completions(ranked):
            continue
        for kind, sampled in (("greedy", False), ("sampled", True)):
            defects = defect_counts(ranked, sampled=sampled)
            counts = {"classes": class_counts(ranked, sampled=sampled), "defects": defects}
            if defects["answers"]:
                columns.append({"system": system, "kind": kind, "answers": defects["answers"], "counts": counts})
    if not columns:
        return None
    groups = []
    for key, title, meanings in (
        ("classes", "One class for each answer", CLASSES),
        ("defects", "Defects, of which an answer can have several", _DEFECTS),
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
    """Seconds and tokens a question, means over questions; what no system has is left out. None without any.

    Completion tokens are counted in the rankings, so they are there without a `timing` too.
    """
    costs = {}
    for system, ranked in rankings.items():
        cost = dict(timing.get(system, {}))
        if writes_completions(ranked):
            cost["tokens"] = float(np.mean([ranking.greedy.tokens for ranking in ranked]))
            if drawn := [answered.tokens for ranking in ranked for answered in ranking.samples]:
                cost["tokens_sampled"] = float(np.mean(drawn))
        if cost:
            costs[system] = cost
    columns = [column for column in _COST if any(column[0] in cost for cost in costs.values())]
    if not columns:
        return None
    return {
        "headings": [heading for _, heading, _ in columns],
        "rows": [
            {"system": system, "cells": [form(cost[key]) if key in cost else "–" for key, _, form in columns]}
            for system, cost in costs.items()
        ],
    }


def read_timing(folder: Path) -> dict[str, dict[str, float]]:
    """timing.json of an evaluation: system → what it took. Empty where there is none."""
    path = folder / "timing.json"
    if not path.is_file():
        return {}
    try:
        timing = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}); remove it, or run the evaluate stage again") from None
    if not isinstance(timing, dict) or not all(isinstance(took, dict) for took in timing.values()):
        raise InputError(f"{path}: expected an object a system; remove it, or run the evaluate stage again")
    return timing
