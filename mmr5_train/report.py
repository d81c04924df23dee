"""Writes an HTML report on what training changed.

    python -m mmr5_train.report evaluation=outputs/evaluate sft=outputs/sft grpo=outputs/grpo out=outputs/report

Reads the folder of the evaluate stage (results.json, rankings/, pages.jsonl) and, if given, the folders of the
training stages (log_history.json) and data stages (manifest.json). Writes `report.html`, one file that contains
its pictures and needs no network. The same inputs and seed give the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import (
    InputError,
    atomic_write,
    open_output,
    read_manifest,
    read_records,
    write_manifest,
)
from mmr5_train.ranking.records import Page, PageId, Ranking
from mmr5_train.reporting.answers import answer_view, cost_view, read_timing
from mmr5_train.reporting.cases import OUTCOMES, Case, choose, make_case, outcome
from mmr5_train.reporting.modes import modes_view
from mmr5_train.reporting.page import picture_views, render_page, sheet_views
from mmr5_train.reporting.pictures import Picture, inline_pictures
from mmr5_train.reporting.views import (
    breakdowns,
    headline,
    label,
    overview,
    provenance,
    read_results,
    stage_view,
    trained_text,
    training_view,
)

PICTURE_BUDGET = 6_500_000  # characters of page pictures; keeps the whole file below 8 MB


class ReportStage(StageConfig):
    """Config of `python -m mmr5_train.report` (configs/report.yaml)."""

    evaluation: Path = Field(description="folder of the evaluate stage")
    sft: Path | None = Field(default=None, description="folder of the SFT stage, for its training curves")
    grpo: Path | None = Field(default=None, description="folder of the GRPO stage, for its training curves")
    modes: Path | None = Field(default=None, description="evaluate folder of one checkpoint in several modes")
    data: list[Path] = Field(default=[], description="folders of the data stages, for their counts")
    questions: int = Field(default=12, ge=0, description="held-out questions shown with their pages")


def main(config: ReportStage) -> None:
    for name, folder in (("sft", config.sft), ("grpo", config.grpo)):
        if folder is not None:
            check_stage(name, folder)
    results, rankings, pages = read_evaluation(config.evaluation)
    html, unreadable = render(config, results, rankings, pages)
    folders = (config.evaluation, config.sft, config.grpo, config.modes, *config.data)
    out = open_output(config.out, config.overwrite, inputs=[folder for folder in folders if folder is not None])
    with atomic_write(out / "report.html") as stream:
        stream.write(html)
    inputs = [config.evaluation / "results.json", config.evaluation / "pages.jsonl"]
    inputs += [config.evaluation / "rankings" / f"{system}.jsonl" for system in rankings]
    optional = [config.evaluation / "timing.json"]
    if config.modes is not None:
        optional += [config.modes / "results.json", config.modes / "timing.json"]
    inputs += [path for path in optional if path.is_file()]
    write_manifest(
        out,
        stage="report",
        config=config.model_dump(mode="json"),
        inputs=inputs,
        counts={
            "questions": results["questions"],
            "systems": len(rankings),
            "pictures_not_shown": unreadable,
        },
    )
    problem = f"; {unreadable} page pictures could not be read" if unreadable else ""
    print(f"report: {', '.join(rankings)} on {results['questions']} questions in {out / 'report.html'}{problem}")


def check_stage(name: str, folder: Path) -> None:
    """Raises `InputError` if another stage wrote the folder."""
    stage = read_manifest(folder).get("stage")
    if stage != name:
        raise InputError(f"{name}: {folder} is a folder of the stage {stage}; give one of {name}")


def read_evaluation(folder: Path) -> tuple[dict[str, Any], dict[str, list[Ranking]], list[Page]]:
    """Output of the evaluate stage: results, rankings by system in the order of the results, pages."""
    results = read_results(folder)
    systems = [row["system"] for row in results["rows"]]
    rankings = {system: read_records(folder / "rankings" / f"{system}.jsonl", Ranking) for system in systems}
    questions = {ranking.query_id for ranking in rankings[systems[0]]}
    for system, system_rankings in rankings.items():
        if {ranking.query_id for ranking in system_rankings} != questions:
            raise InputError(
                f"{folder}/rankings: {system} and {systems[0]} did not rank the same questions; evaluate again"
            )
    return results, rankings, read_records(folder / "pages.jsonl", Page, unique=None)


def render(
    config: ReportStage,
    results: Mapping[str, Any],
    rankings: Mapping[str, Sequence[Ranking]],
    pages: Sequence[Page],
) -> tuple[str, int]:
    """The HTML, and the number of page pictures that could not be read."""
    pages_by_id = {page.id: page for page in pages}
    cases, outcome_counts = choose_cases(config, rankings, pages_by_id)
    images = {
        c.id: c.image
        for system_rankings in rankings.values()
        for ranking in system_rankings
        for c in ranking.shown
    }
    files = {page: config.evaluation / "rankings" / images[page] for case in cases for page in case.numbers}
    pictures = inline_pictures(files, PICTURE_BUDGET)
    folders = [*config.data, config.sft, config.grpo, config.evaluation]
    groups = breakdowns(results)
    training = [view for view in (training_view(config.sft, "sft"), training_view(config.grpo, "grpo")) if view]
    evaluated = read_manifest(config.evaluation)
    answers, cost = answer_view(rankings), cost_view(rankings, read_timing(config.evaluation))
    modes = modes_view(config.modes)
    html = render_page(
        "report.html.j2",
        **headline(results),
        **overview(results),
        trained=trained_text(config.sft, config.grpo),
        **provenance(evaluated),
        temperature=(evaluated.get("config") or {}).get("temperature", "?"),
        checkpoints=(evaluated.get("counts") or {}).get("checkpoints", {}),
        breakdowns=groups,
        training=training,
        cases=[_case_view(i, case, pages_by_id, pictures) for i, case in enumerate(cases, 1)],
        outcome_counts=outcome_counts,
        answers=answers,
        cost=cost,
        modes=modes,
        label_last=label(list(rankings)[-1]),
        pictures=picture_views(pictures),
        stages=[
            *(stage_view(folder) for folder in folders if folder),
            *([stage_view(config.modes) | {"name": "Modes"}] if config.modes else []),
        ],
        seed=config.seed,
        sections=_sections(groups, training=training, cases=cases, answers=answers, cost=cost, modes=modes),
    )
    return html, sum(not picture.url for picture in pictures.values())


def choose_cases(
    config: ReportStage, rankings: Mapping[str, Sequence[Ranking]], pages: Mapping[PageId, Page]
) -> tuple[list[Case], dict[str, int]]:
    """The example questions, and how many of all questions have each outcome (last system against the first)."""
    by_question: dict[str, list[Ranking]] = {}
    for ranked in rankings.values():
        for ranking in ranked:
            by_question.setdefault(ranking.query_id, []).append(ranking)
    outcomes = {query_id: outcome(ranked[0], ranked[-1]) for query_id, ranked in by_question.items()}
    descriptions = {page: record.description for page, record in pages.items()}
    chosen = choose(outcomes, config.questions, config.seed)
    counts = Counter(outcomes.values())
    cases = [make_case(by_question[query_id], descriptions) for query_id in chosen]
    return cases, {kind: counts[kind] for kind in OUTCOMES}


def _case_view(
    index: int, case: Case, pages: Mapping[PageId, Page], pictures: Mapping[PageId, Picture]
) -> dict[str, Any]:
    """The fields of a case, plus anchor, aspect ratio and enlargeable pages for the template."""
    relevant = {place.page for place in (*case.first, *case.last) if place.relevant}
    fields = {name: getattr(case, name) for name in case.__dataclass_fields__}
    return fields | sheet_views(f"q{index}", case.numbers, relevant, pages, pictures)


def _sections(groups: Sequence[Mapping[str, Any]], **others: Any) -> list[tuple[str, str]]:
    """(anchor, name) of each section. `others` maps the anchors of optional sections to their content."""
    names = {"training": "Training", "cases": "Questions", "answers": "Answers", "cost": "Cost", "modes": "Modes"}
    sections = [("results", "Results"), *((str(g["anchor"]), str(g["title"])) for g in groups)]
    sections += [(key, names[key]) for key in names if others[key]]
    return [*sections, ("stages", "Stages and configurations")]


if __name__ == "__main__":
    run_stage(main, ReportStage, "report")
