"""The page `compare.html` of mmr5_train.compare."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmr5_train.common.files import code_version
from mmr5_train.evaluation.paper_table import Row as PaperRow
from mmr5_train.reporting.curves import PLACEHOLDERS, STYLE, inline
from mmr5_train.reporting.page import render_page
from mmr5_train.reporting.paper import paper_view

Row = Mapping[str, Any]


def comparison_page(
    rows: Sequence[Row],
    rows_by_type: Mapping[str, Sequence[Row]],
    figures: Mapping[str, str],
    data: str,
    published: Sequence[Sequence[PaperRow]],
) -> str:
    """The HTML for the rows of mmr5_train.compare, the baseline first.

    `rows_by_type` holds the same rows on the questions of single types. `figures` maps a figure to its heading.
    `published` holds the published tables with the recipes that reproduce a published row; it is empty if none
    does.
    """
    shown_figures = {key: heading for key, heading in figures.items() if any(key in row for row in rows)}
    tables = [("Results", "table", rows)]
    tables += [(f"Questions of type {name}", f"type-{i}", r) for i, (name, r) in enumerate(rows_by_type.items())]
    return render_page(
        "compare.html.j2",
        title=f"{len(rows)} recipes",
        baseline=rows[0]["recipe"],
        figures=shown_figures,
        data=data,
        published=paper_view(published) if published else None,
        code=code_version(),
        pictures={},
        tables=[
            (title, anchor, table_rows, [(h, forest(table_rows, k, anchor)) for k, h in shown_figures.items()])
            for title, anchor, table_rows in tables
        ],
    )


def forest(rows: Sequence[Row], key: str, anchor: str) -> str:
    """Forest plot of the recipes' paired differences from the baseline with 95 % intervals, as inline SVG."""
    compared = [row for row in rows[1:] if row.get(key, {}).get("difference")]
    color = list(PLACEHOLDERS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 0.5 + 0.24 * max(1, len(compared))))
        axes = figure.add_axes((0.36, 0.3 / figure.get_figheight(), 0.61, 1 - 0.38 / figure.get_figheight()))
        axes.axvline(0, color=color[1], linewidth=1)
        for y, row in enumerate(compared):
            difference = row[key]["difference"]
            axes.plot([difference["low"], difference["high"]], [y, y], color=color[2], linewidth=2.4)
            axes.plot(difference["mean"], y, "o", color=color[2], markersize=5)
        axes.set_yticks(range(len(compared)), [row["recipe"] for row in compared])
        axes.set_ylim(len(compared) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return inline(stream.getvalue(), f"forest-{anchor}-{''.join(filter(str.isalnum, key))}")
