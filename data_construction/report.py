"""The data report: what the data stages made, and what a person should see of it before a model learns from it.

    python -m data_construction.report data=outputs/data traces=outputs/traces select=outputs/select

Reads the output folders of candidates and, where given, of traces and select. Writes `data_report.html`: counts at
each step and why things were left out, domains and lengths, the teacher's work and its cost, the selection before
and after, and some traces, drawn by `seed`, with their pages and notes. One file that holds its pictures and needs
no network. The same inputs and seed give the same bytes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from data_construction.reporting.views import (
    DataFolder,
    StageFolder,
    cards,
    domains,
    headline,
    lengths,
    read_data,
    read_stage,
    selection,
    steps,
    teacher_facts,
)
from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import atomic_write, open_output, read_records, write_manifest
from mmr5_train.ranking.notes import join_notes
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import Page, PageId, Trace
from mmr5_train.reporting.page import picture_views, render_page, sheet_views
from mmr5_train.reporting.pictures import Picture, inline_pictures
from mmr5_train.reporting.views import provenance, stage_view

TEMPLATES = Path(__file__).parent / "templates"
PICTURE_BUDGET = 5_000_000  # characters of page pictures, a few hundred pixels each for thirty traces


class DataReportStage(StageConfig):
    """`python -m data_construction.report` (configs/data_report.yaml)."""

    data: Path = Field(description="folder of the candidates stage")
    traces: Path | None = Field(default=None, description="folder of the traces stage")
    select: Path | None = Field(default=None, description="folder of the select stage")
    shown: int = Field(default=30, ge=0, description="traces shown with their pages")

    @property
    def folders(self) -> list[Path]:
        """Those there are, in the order of the stages."""
        return [folder for folder in (self.data, self.traces, self.select) if folder]


def main(config: DataReportStage) -> None:
    data = read_data(config.data)
    made, chosen = read_stage(config.traces, "traces"), read_stage(config.select, "select")
    traces = read_records(config.traces / "traces.jsonl", Trace) if config.traces else []
    html, unseen = render(config, data, made, chosen, traces)
    out = open_output(config.out, config.overwrite, inputs=config.folders)
    with atomic_write(out / "data_report.html") as stream:
        stream.write(html)
    write_manifest(
        out,
        stage="data_report",
        config=config.model_dump(mode="json"),
        inputs=[folder / "manifest.json" for folder in config.folders],
        counts={"traces_shown": min(config.shown, len(traces)), "pictures_not_shown": unseen},
    )
    problem = f"; {unseen} page pictures could not be shown" if unseen else ""
    print(f"data report: {headline(data, traces)} in {out / 'data_report.html'}{problem}")


def render(
    config: DataReportStage, data: DataFolder, made: StageFolder, chosen: StageFolder, traces: Sequence[Trace]
) -> tuple[str, int]:
    """The page as HTML, and how many page pictures could not be shown."""
    drawn = random.Random(config.seed).sample(range(len(traces)), min(config.shown, len(traces)))
    cases = [traces[i] for i in sorted(drawn)]
    images = {page.id: page.image for trace in cases for page in trace.shown}
    root = config.traces or config.data  # image paths are relative to it
    pictures = inline_pictures({page: root / image for page, image in images.items()}, PICTURE_BUDGET)
    html = render_page(
        "data_report.html.j2",
        TEMPLATES,
        title=headline(data, traces),
        cards=cards(data, made, chosen),
        first_stage=data.first_stage,
        steps=steps(data, made, chosen),
        domains=domains(data, traces),
        lengths=lengths(data, traces),
        teacher=teacher_facts(made.manifest),
        selection=selection(chosen.manifest),
        cases=[case_view(i, trace, data.pages, pictures) for i, trace in enumerate(cases, 1)],
        traces=len(traces),
        pictures=picture_views(pictures),
        stages=[stage_view(folder) for folder in config.folders],
        seed=config.seed,
        **provenance(data.stage.manifest),
    )
    return html, sum(not picture.url for picture in pictures.values())


def case_view(
    index: int, trace: Trace, pages: Mapping[PageId, Page], pictures: Mapping[PageId, Picture]
) -> dict[str, Any]:
    """A trace as the template shows it: its pages with their notes, and what SFT reads."""
    shown = {candidate.id: i for i, candidate in enumerate(trace.shown, 1)}
    relevant = {page for page, i in shown.items() if i in trace.positive_ids}
    return {
        "query_id": trace.query_id,
        "query": trace.query,
        "domain": trace.domain,
        "lines": [
            {"page": page, "number": i, "relevant": page in relevant, "note": trace.notes[i - 1]}
            for page, i in shown.items()
        ],
        "refined": "" if trace.think == join_notes(trace.notes) else trace.think,
        "answer": [{"number": i, "relevant": i in trace.positive_ids} for i in trace.answer],
        "completion": render_completion(trace.think, trace.answer),
        **sheet_views(f"t{index}", shown, relevant, pages, pictures),
    }


if __name__ == "__main__":
    run_stage(main, DataReportStage, "data_report")
