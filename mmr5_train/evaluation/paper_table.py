"""The published tables extended with measured rows, and each measured row's difference from the published one.

The figures are the paper's: recall@1, @3 and @5, macro and micro.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmr5_train.common.files import InputError
from mmr5_train.evaluation.metrics import Difference, Interval
from mmr5_train.evaluation.published import FIGURES, OTHER_TABLES, PUBLISHED, QUESTIONS, SOURCE

RERANKERS = tuple(dict.fromkeys(name.partition(" + ")[2] for name in PUBLISHED if " + " in name))
"""The published rerankers, over all first stages: "SFT only", "MM-R5", …"""

NOTE = (
    "Differences are measured − published, with 95 % intervals. The published value is treated as exact, because "
    "its variance over questions is unknown: the interval is that of the measured figure, shifted."
)


@dataclass(frozen=True)
class Measured:
    """One measured row."""

    name: str
    first_stage: str
    published: str | None
    """The row of `PUBLISHED` it is compared with, if any."""
    questions: int
    figures: Mapping[str, Interval]
    """Each of `FIGURES`, with its 95 % interval."""

    @property
    def differences(self) -> dict[str, Difference]:
        """Measured − published, with the shifted interval; empty for a row without a published counterpart."""
        if self.published is None:
            return {}
        differences = {}
        for figure, value in PUBLISHED[self.published].items():
            measured = self.figures[figure]
            low, high = measured.low - value, measured.high - value
            differences[figure] = Difference(mean=measured.mean - value, low=low, high=high)
        return differences


@dataclass(frozen=True)
class Row:
    """A row of the table: published figures, or None, and the measured rows compared with them."""

    name: str
    published: Mapping[str, float] | None
    measured: tuple[Measured, ...]


def measured_rows(evaluations: Mapping[str, Mapping[str, Any]], rows: Mapping[str, str]) -> list[Measured]:
    """All rows of several results.json files; `evaluations` maps each first stage to its results.

    The first row of each results.json is the first stage itself, which is compared with the published row of the
    same name. `rows` maps each other system to one of `RERANKERS`. A row is not compared if the paper has no
    figures of that reranker with that first stage.

    Raises `InputError` for a system that no evaluation has, and for a reranker that is not in the paper.
    """
    systems = {row["system"] for results in evaluations.values() for row in results["rows"][1:]}
    for system, reranker in rows.items():
        if system not in systems:
            names = ", ".join(sorted(systems))
            raise InputError(f"rows.{system}: no evaluation has a system of that name (found: {names})")
        if reranker not in RERANKERS:
            names = "; ".join(RERANKERS)
            raise InputError(f"rows.{system}: no published row is called {reranker!r} (choices: {names})")
    measured = []
    for first_stage, results in evaluations.items():
        for i, row in enumerate(results["rows"]):
            counterpart = f"{first_stage} + {rows.get(row['system'], '')}" if i else first_stage
            measured.append(
                Measured(
                    name=f"{first_stage} + {row['system']}" if i else first_stage,
                    first_stage=first_stage,
                    published=counterpart if counterpart in PUBLISHED else None,
                    questions=row["questions"],
                    figures=_figures(row),
                )
            )
    return measured


def _figures(row: Mapping[str, Any]) -> dict[str, Interval]:
    figures = {}
    for figure in FIGURES:
        kind, _, metric = figure.partition(" ")
        means = row["macro"] if kind == "macro" else row
        figures[figure] = Interval(mean=means[metric], **means["intervals"][metric])
    return figures


def paper_table(measured: Iterable[Measured]) -> list[list[Row]]:
    """All published rows and all measured ones, grouped into one block per first stage.

    The paper's first stages come first, in its order; others follow in the order of `measured`. Within a block
    the published rows come first, then the measured rows without a published counterpart.
    """
    measured = list(measured)
    stages = [name.partition(" + ")[0] for name in PUBLISHED] + [row.first_stage for row in measured]
    blocks = []
    for stage in dict.fromkeys(stages):
        names = [name for name in PUBLISHED if name.partition(" + ")[0] == stage]
        block = [Row(n, PUBLISHED[n], tuple(row for row in measured if row.published == n)) for n in names]
        unpublished = [row for row in measured if row.first_stage == stage and row.published is None]
        blocks.append(block + [Row(row.name, None, (row,)) for row in unpublished])
    return blocks


def markdown(blocks: Sequence[Sequence[Row]]) -> str:
    """The table as Markdown, with separate lines for published figures, measured figures and their difference."""
    lines = [_line("", "", "questions", *FIGURES), "|" + "---|" * (3 + len(FIGURES))]
    for row in (row for block in blocks for row in block):
        if row.published:
            cells = [f"{row.published[figure]:.4f}" for figure in FIGURES]
            lines.append(_line(row.name, "published", f"{QUESTIONS:,}", *cells))
        for measured in row.measured:
            cells = [_with_interval(measured.figures[figure], "{:.4f}") for figure in FIGURES]
            lines.append(_line(f"**{measured.name}**", "measured", f"{measured.questions:,}", *cells))
            if measured.differences:
                cells = [_with_interval(measured.differences[figure], "{:+.4f}") for figure in FIGURES]
                lines.append(_line("", "difference", "", *cells))
    return "\n".join([*lines, "", SOURCE, NOTE, ""])


def other_tables_markdown() -> str:
    """The published tables of other rerankers, which are not comparable with MM-R5's, as Markdown."""
    lines = []
    for table in OTHER_TABLES:
        lines += [f"## {table.title}", "", _line("", *table.columns), "|" + "---|" * (1 + len(table.columns))]
        for name, values in table.rows.items():
            lines.append(_line(name, *("–" if value is None else f"{value:g}" for value in values)))
        lines += ["", table.source, ""]
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _with_interval(interval: Interval, form: str) -> str:
    return f"{form.format(interval.mean)} [{form.format(interval.low)}, {form.format(interval.high)}]"
