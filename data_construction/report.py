"""Writes an HTML report on the training data, for a review before training.

    python -m data_construction.report data=outputs/data traces=outputs/traces select=outputs/select

Reads the output folders of candidates and, if given, of traces and select. Writes `data_report.html`: counts of
each step with the reasons for dropped questions, domains and lengths, the teacher's work and cost, the questions
before and after the selection, and a sample of traces with their pages and notes. The file contains its images and
needs no network. The same inputs and seed give the same bytes.
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
MAX_IMAGE_CHARACTERS = 5_000_000  # characters of base64 images: thirty traces with pages of a few hundred pixels


class DataReportStage(StageConfig):
    """`python -m data_construction.report` (configs/data_report.yaml)."""

    data: Path = Field(description="folder of the candidates stage")
    traces: Path | None = Field(default=None, description="folder of the traces stage")
    select: Path | None = Field(default=None, description="folder of the select stage")
    shown: int = Field(default=30, ge=0, description="number of traces shown with their pages")

    @property
    def folders(self) -> list[Path]:
        """The given folders, in the order of the stages."""
        return [folder for folder in (self.data, self.traces, self.select) if folder]


def main(config: DataReportStage) -> None:
    data = read_data(config.data)
    traces_stage, select_stage = read_stage(config.traces, "traces"), read_stage(config.select, "select")
    traces = read_records(config.traces / "traces.jsonl", Trace) if config.traces else []
    html, missing_images = render(config, data, traces_stage, select_stage, traces)
    out = open_output(config.out, config.overwrite, inputs=config.folders)
    with atomic_write(out / "data_report.html") as stream:
        stream.write(html)
    write_manifest(
        out,
        stage="data_report",
        config=config.model_dump(mode="json"),
        inputs=[folder / "manifest.json" for folder in config.folders],
        counts={"traces_shown": min(config.shown, len(traces)), "pictures_not_shown": missing_images},
    )
    problem = f"; {missing_images} page images could not be shown" if missing_images else ""
    print(f"data report: {headline(data, traces)} in {out / 'data_report.html'}{problem}")


def render(
    config: DataReportStage,
    data: DataFolder,
    traces_stage: StageFolder,
    select_stage: StageFolder,
    traces: Sequence[Trace],
) -> tuple[str, int]:
    """The page as HTML, and the number of page images that could not be shown."""
    sample = random.Random(config.seed).sample(range(len(traces)), min(config.shown, len(traces)))
    cases = [traces[i] for i in sorted(sample)]
    images = {page.id: page.image for trace in cases for page in trace.shown}
    root = config.traces or config.data  # image paths in its files are relative to it
    pictures = inline_pictures({page: root / image for page, image in images.items()}, MAX_IMAGE_CHARACTERS)
    html = render_page(
        "data_report.html.j2",
        TEMPLATES,
        title=headline(data, traces),
        cards=cards(data, traces_stage, select_stage),
        first_stage=data.first_stage,
        steps=steps(data, traces_stage, select_stage),
        domains=domains(data, traces),
        lengths=lengths(data, traces),
        teacher=teacher_facts(traces_stage.manifest),
        selection=selection(select_stage.manifest),
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
    """One trace for the template: its pages with their notes, and the completion that SFT trains on."""
    local_ids = {candidate.id: i for i, candidate in enumerate(trace.shown, 1)}
    relevant = {page for page, i in local_ids.items() if i in trace.positive_ids}
    return {
        "query_id": trace.query_id,
        "query": trace.query,
        "domain": trace.domain,
        "lines": [
            {"page": page, "number": i, "relevant": page in relevant, "note": trace.notes[i - 1]}
            for page, i in local_ids.items()
        ],
        "refined": "" if trace.think == join_notes(trace.notes) else trace.think,
        "answer": [{"number": i, "relevant": i in trace.positive_ids} for i in trace.answer],
        "completion": render_completion(trace.think, trace.answer),
        **sheet_views(f"t{index}", local_ids, relevant, pages, pictures),
    }


if __name__ == "__main__":
    run_stage(main, DataReportStage, "data_report")
