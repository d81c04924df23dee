"""What the data report's template shows, made from the folders of the data stages: plain dicts."""

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

BINS = 8
"""Most rows of a histogram."""


@dataclass(frozen=True)
class StageFolder:
    """What a stage says about its own work; empty where it has not run (yet)."""

    name: str
    manifest: Mapping[str, Any]
    skipped: Sequence[Skipped]

    @property
    def counts(self) -> Mapping[str, Any]:
        return self.manifest.get("counts") or {}


@dataclass(frozen=True)
class DataFolder:
    """What the candidates stage wrote."""

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
    """The manifest and the list of what was left out. Raises `InputError` for another stage's folder."""
    if folder is None:
        return StageFolder(name, {}, ())
    manifest = read_manifest(folder)
    if manifest.get("stage") != name:
        raise InputError(f"{folder}: written by the stage {manifest.get('stage')}, expected one of {name}")
    return StageFolder(name, manifest, _records(folder / "skipped.jsonl", Skipped, unique=None))


def _records(path: Path, kind: type[RecordT], unique: str | None = "query_id") -> list[RecordT]:
    """The records of a file that may be absent, or empty: a split without questions, nothing left out."""
    return read_records(path, kind, unique) if path.is_file() and path.stat().st_size else []


def headline(data: DataFolder, traces: Sequence[Trace]) -> str:
    documents = f"{len(data.documents):,} documents"
    if traces:
        return f"{len(traces):,} reasoning traces on questions about {documents}"
    return f"{sum(map(len, data.tasks.values())):,} questions about {documents}"


def cards(data: DataFolder, made: StageFolder, chosen: StageFolder) -> list[dict[str, str]]:
    """The counts that say how much there is."""
    splits = ", ".join(f"{split} {len(tasks):,}" for split, tasks in data.tasks.items())
    found = [
        ("Documents", len(data.documents), f"{len(data.pages):,} pages"),
        ("Questions", sum(map(len, data.tasks.values())), splits),
    ]
    if made.manifest:
        found.append(("Reasoning traces", made.counts["traces"], f"of {made.counts['questions']:,} questions"))
    if chosen.manifest:
        before = chosen.counts["questions_before"]
        found.append(("Selected for GRPO", chosen.counts["questions"], f"of {before:,} questions"))
    return [{"name": name, "value": f"{value:,}", "under": under} for name, value, under in found]


def steps(data: DataFolder, made: StageFolder, chosen: StageFolder) -> list[dict[str, Any]]:
    """What went into each stage and what came out, with each reason for the rest and a case of it."""
    kept = sum(map(len, data.tasks.values()))
    lost = len({skip.query_id for skip in data.stage.skipped if skip.query_id})
    flows = [(data.stage, kept + lost, kept, "skipped")]
    if made.manifest:
        flows.append((made, made.counts["questions"], made.counts["traces"], "skipped"))
    if chosen.manifest:
        flows.append((chosen, chosen.counts["questions_before"], chosen.counts["questions"], "dropped"))
    return [
        {
            "name": STAGES[stage.name],
            "before": before,
            "after": after,
            "share": after / before if before else 0,
            "reasons": _reasons(stage, stage.counts.get(key) or {}),
        }
        for stage, before, after, key in flows
    ]


def _reasons(stage: StageFolder, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    cases: dict[str, str] = {}
    for skip in stage.skipped:
        what = ": ".join(part for part in (skip.query_id or skip.file, skip.detail) if part)
        cases.setdefault(skip.reason, what)
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"reason": reason, "count": count, "case": cases.get(reason, "")} for reason, count in by_count]


def domains(data: DataFolder, traces: Sequence[Trace]) -> dict[str, Any]:
    """A row a domain: its documents, pages, questions by split and traces; the most questions first."""
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
    """Histograms of what a prompt and a think block hold."""
    tasks = [task for split in ("train", "select") for task in data.tasks[split]]
    relevant = [len({c.id for c in task.candidates} & set(task.positives)) for task in tasks]
    pixels = [page.width * page.height // 1000 for page in data.pages.values()]
    found: list[tuple[str, str, Sequence[int]]] = [
        ("Pages a document", "", [document.pages for document in data.documents]),
        ("Page size", "thousand pixels", pixels),
        ("Candidates a question", "train and select", [len(task.candidates) for task in tasks]),
        ("Relevant candidates a question", "train and select", relevant),
    ]
    if traces:
        places = [i for trace in traces for i in trace.positive_ids]
        words = [len(note.split()) for trace in traces for note in trace.notes]
        reasoning = [len(trace.think.split()) for trace in traces]
        found += [
            ("Place of the relevant pages", "image number in the prompt; even is good", places),
            ("Words a note", "the teacher’s, one a page", words),
            ("Words a think block", "what the model learns to write", reasoning),
        ]
    return [
        {"title": title, "note": note, "rows": histogram(values), "mean": f"{sum(values) / len(values):.1f}"}
        for title, note, values in found
        if values
    ]


def histogram(values: Sequence[int]) -> list[dict[str, Any]]:
    """A row a value, or a span of values where those are too many; the share is that of the longest bar."""
    low, high = min(values), max(values)
    width = span_width(high - low + 1)
    start = low // width * width if width > 1 else low
    counts = Counter((value - start) // width for value in values)
    longest = max(counts.values())
    rows = []
    for i in range(max(counts) + 1):
        first = start + i * width
        label = f"{first:,}" if width == 1 else f"{first:,} – {first + width - 1:,}"
        rows.append({"label": label, "count": counts[i], "share": counts[i] / longest})
    return rows


def span_width(values: int) -> int:
    """The least of 1, 2, 5, 10, 20, 50 … of which `BINS` spans hold so many successive values."""
    exponent = 0
    while True:
        for digit in (1, 2, 5):
            if digit * 10**exponent * BINS >= values:
                return digit * 10**exponent
        exponent += 1


def teacher_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Who explained, and all that the manifest counts of the work: requests, tokens, dollars, what there is."""
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
        facts += [("cost", _dollars(cost)), ("cost a trace", _dollars(cost / counts["traces"]))]
    return facts


def _dollars(value: float) -> str:
    return f"${value:,.2f}" if value >= 1 or not value else f"${value:.2g}"


def selection(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The histograms of the select stage, before and after, each on a scale of its own longest bar."""
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
        ("By page resolution", "thousand pixels a page, mean over a question’s candidates", resolution),
        ("By difficulty", "mean reward of the model’s answers to a question; 1 is the most there is", difficulty),
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
