"""The report's comparison of one checkpoint in several modes: ranking quality and time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmr5_train.common.files import read_records
from mmr5_train.evaluation.adaptive import margin_curve
from mmr5_train.ranking.metrics import recall_at_k
from mmr5_train.ranking.records import Ranking
from mmr5_train.reporting.answers import read_timing
from mmr5_train.reporting.curves import PLACEHOLDERS, SERIES, STYLE, inline, show
from mmr5_train.reporting.views import read_results

FIGURE = "recall@1"
SIZE = (6.2, 2.3)  # inches at 72 points


def modes_view(folder: Path | None) -> dict[str, Any] | None:
    """One row per mode, slowest first, and a chart of quality over time. None without a folder."""
    if folder is None:
        return None
    results, timing = read_results(folder), read_timing(folder)
    rows = [
        {
            "name": row["system"],
            "value": row[FIGURE],
            **row["intervals"][FIGURE],
            "ms": 1000 * timing[row["system"]]["seconds_per_question"],
            "tokens": timing[row["system"]].get("tokens"),
        }
        for row in results["rows"]
        if row["system"] in timing
    ]
    rows.sort(key=lambda row: -row["ms"])
    return {
        "rows": [row | {"times": rows[0]["ms"] / row["ms"], "shown_ms": show(row["ms"])} for row in rows],
        "questions": results["questions"],
        "ceiling": results["ceiling"][FIGURE],
        "chart": draw(rows, results["ceiling"][FIGURE], curve_of(folder, timing)),
    }


def curve_of(folder: Path, timing: Mapping[str, Mapping[str, float]]) -> list[dict[str, float]]:
    """Mode adaptive at every margin, from the rankings of logits and reason. Empty if one of them is missing.

    It assumes that adaptive reasons about all pages of a prompt.
    """
    paths = [folder / f"rankings/{mode}.jsonl" for mode in ("logits", "reason")]
    if not all(path.is_file() and path.stem in timing for path in paths):
        return []
    quick, slow = (read_records(path, Ranking) for path in paths)
    if any(len(ranking.greedy.scores) < 2 for ranking in quick):
        return []
    quick_recall, slow_recall = (
        [recall_at_k(ranking.ranked_pages(ranking.greedy), ranking.positives, 1) for ranking in rankings]
        for rankings in (quick, slow)
    )
    margins = [ranking.greedy.scores[0] - ranking.greedy.scores[1] for ranking in quick]
    quick_seconds, slow_seconds = (timing[mode]["seconds_per_question"] for mode in ("logits", "reason"))
    return margin_curve(margins, quick_recall, slow_recall, quick_seconds, slow_seconds)


def draw(rows: Sequence[Mapping[str, Any]], ceiling: float, curve: Sequence[Mapping[str, float]] = ()) -> str:
    """Chart of recall@1 with its 95 % interval over milliseconds per question, as inline SVG.

    `curve` is mode adaptive at every margin.
    """
    colors = list(PLACEHOLDERS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes((0.08, 0.2, 0.9, 0.76))
        axes.axhline(ceiling, color=colors[1], linewidth=1, linestyle=(0, (3, 3)))
        times = [1000 * row["seconds_per_question"] for row in curve]
        axes.plot(times, [row[FIGURE] for row in curve], color=colors[1], linewidth=1.2)
        for i, row in enumerate(rows):
            color = colors[2 + i % len(SERIES)]
            axes.plot([row["ms"]] * 2, [row["low"], row["high"]], color=color, linewidth=2.4)
            axes.plot(row["ms"], row["value"], "o", color=color, markersize=6)
            axes.annotate(row["name"], (row["ms"], row["high"]), (0, 4), textcoords="offset points", ha="center")
        axes.margins(y=0.2)
        axes.set_xlim(0, 1.15 * max(row["ms"] for row in rows))
        axes.set_xlabel("milliseconds per question")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return inline(stream.getvalue(), "modes")
