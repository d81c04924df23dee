"""Measured rows in the frame of the published tables: each beside the row it stands against, with the difference.

Figures are those of the paper: recall@1, @3 and @5, macro and micro.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmr5_train.common.files import InputError
from mmr5_train.evaluation.metrics import Difference, Interval
from mmr5_train.evaluation.published import FIGURES, PUBLISHED, QUESTIONS, SOURCE

RERANKERS = tuple(dict.fromkeys(name.partition(" + ")[2] for name in PUBLISHED if " + " in name))
"""What was published on top of some first stage: "SFT only", "MM-R5", …"""

NOTE = (
    "Differences are measured − published, with their 95 % intervals. The published value is held to be "
    "exact: how it spreads over questions is not known, so the interval is that of the measured figure, shifted."
)


@dataclass(frozen=True)
class Measured:
    """One measured row."""

    name: str
    first_stage: str
    published: str | None
    """The row of `PUBLISHED` that it stands against."""
    questions: int
    figures: Mapping[str, Interval]
    """Each of `FIGURES`, with its 95 % interval."""

    @property
    def differences(self) -> dict[str, Difference]:
        """Measured − published, the interval shifted; empty for a row that stands alone."""
        if self.published is None:
            return {}
        gaps = {}
        for figure, theirs in PUBLISHED[self.published].items():
            ours = self.figures[figure]
            gaps[figure] = Difference(mean=ours.mean - theirs, low=ours.low - theirs, high=ours.high - theirs)
        return gaps


@dataclass(frozen=True)
class Row:
    """A published row, or None, and what was measured against it."""

    name: str
    published: Mapping[str, float] | None
    measured: tuple[Measured, ...]


def measured_rows(evaluations: Mapping[str, Mapping[str, Any]], rows: Mapping[str, str]) -> list[Measured]:
    """Every row of some results (results.json), by the name of their first stage.

    The first row of results is the first stage itself, and stands against the published one of that name. `rows`
    says what the others stand against: system → one of `RERANKERS`. A row that has no counterpart on its first
    stage stands alone.

    Raises `InputError` for a system that no evaluation has, and for a name that was never published.
    """
    found = {row["system"] for results in evaluations.values() for row in results["rows"][1:]}
    for system, reranker in rows.items():
        if system not in found:
            names = ", ".join(sorted(found))
            raise InputError(f"rows.{system}: no evaluation has a system of that name (found: {names})")
        if reranker not in RERANKERS:
            names = "; ".join(RERANKERS)
            raise InputError(f"rows.{system}: no published row is called {reranker!r} (choices: {names})")
    measured = []
    for first_stage, results in evaluations.items():
        for place, row in enumerate(results["rows"]):
            theirs = f"{first_stage} + {rows.get(row['system'], '')}" if place else first_stage
            measured.append(
                Measured(
                    name=f"{first_stage} + {row['system']}" if place else first_stage,
                    first_stage=first_stage,
                    published=theirs if theirs in PUBLISHED else None,
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
    """All published rows and all measured ones, a block a first stage.

    The paper's first stages come in its order, then the others in theirs. In a block the published rows come
    first, then what stands alone.
    """
    measured = list(measured)
    stages = [name.partition(" + ")[0] for name in PUBLISHED] + [row.first_stage for row in measured]
    blocks = []
    for stage in dict.fromkeys(stages):
        names = [name for name in PUBLISHED if name.partition(" + ")[0] == stage]
        block = [Row(n, PUBLISHED[n], tuple(row for row in measured if row.published == n)) for n in names]
        alone = [row for row in measured if row.first_stage == stage and row.published is None]
        blocks.append(block + [Row(row.name, None, (row,)) for row in alone])
    return blocks


def markdown(blocks: Sequence[Sequence[Row]]) -> str:
    """The table as Markdown: a line for what was published, for what was measured, and for their difference."""
    lines = [_line("", "", "questions", *FIGURES), "|" + "---|" * (3 + len(FIGURES))]
    for row in (row for block in blocks for row in block):
        if row.published:
            cells = [f"{row.published[figure]:.4f}" for figure in FIGURES]
            lines.append(_line(row.name, "published", f"{QUESTIONS:,}", *cells))
        for measured in row.measured:
            cells = [_spread(measured.figures[figure], "{:.4f}") for figure in FIGURES]
            lines.append(_line(f"**{measured.name}**", "measured", f"{measured.questions:,}", *cells))
            if measured.differences:
                cells = [_spread(measured.differences[figure], "{:+.4f}") for figure in FIGURES]
                lines.append(_line("", "difference", "", *cells))
    return "\n".join([*lines, "", SOURCE, NOTE, ""])


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _spread(interval: Interval, form: str) -> str:
    return f"{form.format(interval.mean)} [{form.format(interval.low)}, {form.format(interval.high)}]"
