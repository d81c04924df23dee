"""Prepares the data of the data report's template, as plain dicts, from the folders of the data stages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from mmr5_train.common.files import InputError, read_manifest, read_records
from mmr5_train.ranking.records import (
    SPLITS,
    Page,
    PageId,
    RankingTask,
    Skipped,
    SplitDocument,
    Trace,
)
from mmr5_train.reporting.views import STAGES, flat_counts, words

RecordT = TypeVar("RecordT", bound=BaseModel)

MAX_BINS = 8
"""Maximum number of rows of a histogram."""


@dataclass(frozen=True)
class StageFolder:
    """The manifest and skipped records of one stage; empty if the stage has not run."""

    name: str
    manifest: Mapping[str, Any]
    skipped: Sequence[Skipped]

    @property
    def counts(self) -> Mapping[str, Any]:
        return self.manifest.get("counts") or {}


@dataclass(frozen=True)
class DataFolder:
    """The output of the candidates stage."""

    stage: StageFolder
    tasks: Mapping[str, Sequence[RankingTask]]  # by split
    documents: Sequence[SplitDocument]
    pages: Mapping[PageId, Page]
    first_stage: Mapping[str, Any]


def read_data(folder: Path) -> DataFolder:
    stage = read_stage(folder, "candidates")
    pages = read_records(folder / "pages.jsonl", Page, unique="id")
    path = folder / "first_stage.json"
    try:
        first_stage = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}); run the candidates stage again") from None
    return DataFolder(
        stage=stage,
        tasks={split: _records(folder / f"{split}.jsonl", RankingTask) for split in SPLITS},
        documents=_records(folder / "documents.jsonl", SplitDocument, unique="doc_name"),
        pages={page.id: page for page in pages},
        first_stage=first_stage,
    )


def read_stage(folder: Path | None, name: str) -> StageFolder:
    """The manifest and the skipped records of a folder. Raises `InputError` if another stage wrote it."""
    if folder is None:
        return StageFolder(name, {}, ())
    manifest = read_manifest(folder)
    if manifest.get("stage") != name:
        raise InputError(f"{folder}: was written by the stage {manifest.get('stage')}, expected {name}")
    return StageFolder(name, manifest, _records(folder / "skipped.jsonl", Skipped, unique=None))


def _records(path: Path, kind: type[RecordT], unique: str | None = "query_id") -> list[RecordT]:
    """The records of a file; none if the file does not exist or is empty."""
    return read_records(path, kind, unique) if path.is_file() and path.stat().st_size else []


def headline(data: DataFolder, traces: Sequence[Trace]) -> str:
    documents = f"{len(data.documents):,} documents"
    if traces:
        return f"{len(traces):,} reasoning traces on questions about {documents}"
    return f"{sum(map(len, data.tasks.values())):,} questions about {documents}"


def cards(data: DataFolder, traces: StageFolder, select: StageFolder) -> list[dict[str, str]]:
    """The main counts, shown at the top of the page."""
    splits = ", ".join(f"{split} {len(tasks):,}" for split, tasks in data.tasks.items())
    counts = [
        ("Documents", len(data.documents), f"{len(data.pages):,} pages"),
        ("Questions", sum(map(len, data.tasks.values())), splits),
    ]
    if traces.manifest:
        counts.append(
            ("Reasoning traces", traces.counts["traces"], f"of {traces.counts['questions']:,} questions")
        )
    if select.manifest:
        before = select.counts["questions_before"]
        counts.append(("Selected for GRPO", select.counts["questions"], f"of {before:,} questions"))
    return [{"name": name, "value": f"{value:,}", "under": under} for name, value, under in counts]


def steps(data: DataFolder, traces: StageFolder, select: StageFolder) -> list[dict[str, Any]]:
    """Questions before and after each stage, and the reasons for the dropped ones, each with an example."""
    n_tasks = sum(map(len, data.tasks.values()))
    dropped = len({skip.query_id for skip in data.stage.skipped if skip.query_id})
    reasons: dict[str, int] = dict(data.stage.counts.get("skipped") or {})
    if not_drawn := sum((data.stage.counts.get("train_not_drawn") or {}).values()):
        reasons["train question, not drawn"] = not_drawn
    stages = [(data.stage, n_tasks + dropped + not_drawn, n_tasks, reasons)]
    if traces.manifest:
        stages.append(
            (traces, traces.counts["questions"], traces.counts["traces"], traces.counts.get("skipped") or {})
        )
    if select.manifest:
        stages.append(
            (
                select,
                select.counts["questions_before"],
                select.counts["questions"],
                select.counts.get("dropped") or {},
            )
        )
    return [
        {
            "name": STAGES[stage.name],
            "before": before,
            "after": after,
            "share": after / before if before else 0,
            "reasons": _reasons(stage, reasons),
        }
        for stage, before, after, reasons in stages
    ]


def _reasons(stage: StageFolder, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    examples: dict[str, str] = {}
    for skip in stage.skipped:
        text = ": ".join(part for part in (skip.query_id or skip.file, skip.detail) if part)
        examples.setdefault(skip.reason, text)
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"reason": reason, "count": count, "example": examples.get(reason, "")} for reason, count in by_count]


def domains(data: DataFolder, traces: Sequence[Trace]) -> dict[str, Any]:
    """One row per domain with its documents, pages, questions by split, and traces; most questions first."""
    columns: dict[str, Counter[str]] = {
        "Documents": Counter(document.domain for document in data.documents),
        "Pages": Counter(page.domain for page in data.pages.values()),
        **{f"{split} questions": Counter(t.domain for t in tasks) for split, tasks in data.tasks.items()},
    }
    if traces:
        columns["Traces"] = Counter(trace.domain for trace in traces)
    questions = Counter(task.domain for tasks in data.tasks.values() for task in tasks)
    names = sorted(columns["Documents"], key=lambda name: (-questions[name], name))
    rows = [(name, [f"{column[name]:,}" for column in columns.values()]) for name in names]
    total = [f"{column.total():,}" for column in columns.values()]
    return {"columns": list(columns), "rows": rows, "total": total}


def lengths(data: DataFolder, traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Histograms of the lengths of prompts and think blocks."""
    tasks = [task for split in ("train", "select") for task in data.tasks[split]]
    relevant = [len({c.id for c in task.candidates} & set(task.positives)) for task in tasks]
    pixels = [page.width * page.height // 1000 for page in data.pages.values()]
    histograms: list[tuple[str, str, Sequence[int]]] = [
        ("Pages per document", "", [document.pages for document in data.documents]),
        ("Page size", "thousand pixels", pixels),
        ("Candidates per question", "train and select", [len(task.candidates) for task in tasks]),
        ("Relevant candidates per question", "train and select", relevant),
    ]
    if traces:
        positions = [i for trace in traces for i in trace.positive_ids]
        note_words = [len(note.split()) for trace in traces for note in trace.notes]
        think_words = [len(trace.think.split()) for trace in traces]
        histograms += [
            ("Position of relevant pages", "image number in the prompt; should be uniform", positions),
            ("Words per note", "written by the teacher, one note per page", note_words),
            ("Words per think block", "written by the model after SFT", think_words),
        ]
    return [
        {"title": title, "note": note, "rows": histogram(values), "mean": f"{sum(values) / len(values):.1f}"}
        for title, note, values in histograms
        if values
    ]


def histogram(values: Sequence[int]) -> list[dict[str, Any]]:
    """One row per value, or per range of values if there are many. `share` is relative to the longest bar."""
    low, high = min(values), max(values)
    width = bin_width(high - low + 1)
    start = low // width * width if width > 1 else low
    counts = Counter((value - start) // width for value in values)
    longest = max(counts.values())
    rows = []
    for i in range(max(counts) + 1):
        first = start + i * width
        label = f"{first:,}" if width == 1 else f"{first:,} – {first + width - 1:,}"
        rows.append({"label": label, "count": counts[i], "share": counts[i] / longest})
    return rows


def bin_width(values: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 … such that `MAX_BINS` bins cover this many successive values."""
    exponent = 0
    while True:
        for digit in (1, 2, 5):
            if digit * 10**exponent * MAX_BINS >= values:
                return digit * 10**exponent
        exponent += 1


def teacher_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The teacher, its settings, and all counts of its work in the manifest, such as requests, tokens and cost."""
    config, counts = manifest.get("config") or {}, manifest.get("counts") or {}
    teacher = config.get("teacher") or {}
    facts = [(key, str(teacher[key])) for key in ("name", "model") if teacher.get(key)]
    facts += [(words(key), str(config[key])) for key in ("max_words", "order") if key in config]
    facts += [("refined", "yes" if config["refine"] else "no")] if "refine" in config else []
    work = {
        key: value for key, value in counts.items() if key not in ("questions", "traces", "skipped", "teacher")
    }
    work |= counts.get("teacher") or {}
    cost = work.pop("cost_usd", None)
    facts += [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in flat_counts(work)]
    if cost is not None:
        facts += [("cost", _dollars(cost)), ("cost per trace", _dollars(cost / counts["traces"]))]
    return facts


def _dollars(value: float) -> str:
    return f"${value:,.2f}" if value >= 1 or not value else f"${value:.2g}"


def selection(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Histograms of the select stage, before and after. `share` is relative to the longest bar of a histogram."""
    counts = manifest.get("counts") or {}
    resolution = [
        (f"{group['from_pixels'] / 1000:,.0f} – {group['to_pixels'] / 1000:,.0f}", group)
        for group in counts.get("groups") or []
    ]
    difficulty = [
        (f"{group['from_reward']:.1f} – {group['to_reward']:.1f}", group)
        for group in counts.get("difficulty") or []
    ]
    charts = (
        ("By page resolution", "thousand pixels per page, mean over a question’s candidates", resolution),
        ("By difficulty", "mean reward of the model’s answers to a question; the maximum is 1", difficulty),
    )
    return [{"title": t, "note": note, "rows": _before_after(groups)} for t, note, groups in charts if groups]


def _before_after(groups: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    longest = max(group["before"] for _, group in groups)
    return [
        {
            "label": label,
            "bars": [
                {"name": name, "count": group[name], "share": group[name] / longest}
                for name in ("before", "after")
            ],
        }
        for label, group in groups
    ]
