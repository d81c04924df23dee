"""The data report on the outputs of the data stages for a small synthetic corpus."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from html_reader import Reader

from data_construction import candidates, synthetic, traces
from data_construction.report import DataReportStage, main
from data_construction.reporting.views import histogram
from mmr5_train import select
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_records, write_json, write_records
from mmr5_train.ranking.records import Trace


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of all data stages for six documents. The traces manifest has the counts of a paid teacher."""
    root = tmp_path_factory.mktemp("stages")
    for stage, model, entry, overrides in (
        (synthetic, synthetic.SyntheticStage, "synthetic", ["documents=6", "workers=1", f"out={root}/corpus"]),
        (
            candidates,
            candidates.CandidatesStage,
            "candidates",
            ["corpus=synthetic", f"corpus.folder={root}/corpus", f"corpus.page_cache={root}/pages",
             f"out={root}/data", "split={train:0.5,select:0.5,heldout:0}"],
        ),
        (traces, traces.TracesStage, "traces", [f"data={root}/data/train.jsonl", f"out={root}/traces"]),
        (
            select,
            select.SelectStage,
            "select",
            [f"questions={root}/data/select.jsonl", f"seen={root}/traces/traces.jsonl", f"out={root}/select",
             "balanced.count=5"],
        ),
    ):  # fmt: skip
        stage.main(compose_stage(model, entry, overrides))
    manifest = json.loads((root / "traces/manifest.json").read_text())
    manifest["counts"]["teacher"] = {"requests": 1234, "prompt_tokens": 5_000_000, "cost_usd": 12.5}
    manifest["counts"]["skipped"] = {"check direction": 2}
    write_json(root / "traces/manifest.json", manifest)
    skipped = {"query_id": "x/0", "file": None, "reason": "check direction", "detail": "image 3 <b>helps</b>"}
    (root / "traces/skipped.jsonl").write_text(json.dumps(skipped) + "\n")
    return root


def write(folders: Path, out: Path, **more: Any) -> str:
    inputs = {name: folders / name for name in ("data", "traces", "select")}
    main(DataReportStage.model_validate({"out": out, **inputs, **more}))
    return (out / "data_report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(folders: Path) -> str:
    return write(folders, folders / "report")


def counts(folders: Path, stage: str) -> dict[str, Any]:
    return json.loads((folders / stage / "manifest.json").read_text())["counts"]


def test_report_contains_the_counts_of_every_stage(folders: Path, html: str) -> None:
    text = Reader(html).text
    data, selected = counts(folders, "data"), counts(folders, "select")
    n_traces = counts(folders, "traces")["traces"]
    assert f"{n_traces} reasoning traces on questions about 6 documents" in text
    assert f"Questions {sum(data['questions'].values())} train {data['questions']['train']}" in text
    assert f"Selected questions 5 of {selected['questions_before']} questions" in text
    for reason, count in (*data["skipped"].items(), *selected["dropped"].items()):
        assert f"{reason} {count}" in text
    assert "check direction 2 first: x/0: image 3 <b>helps</b>" in text
    assert "requests 1,234" in text
    assert "prompt tokens 5,000,000" in text
    assert f"cost $12.50 cost per trace ${12.5 / n_traces:.2g}" in text
    assert f"480 – 480 {selected['questions_before']} 5" in text


def test_report_shows_traces_with_pages_and_notes(folders: Path, html: str) -> None:
    records = read_records(folders / "traces/traces.jsonl", Trace)
    page = Reader(html)
    shown = [trace for trace in records if trace.query_id in page.text]
    assert 0 < len(shown) == min(30, len(records))
    for trace in shown:
        notes = [
            f"{'Relevant' if i in trace.positive_ids else 'Not relevant'} {note}"
            for i, note in enumerate(trace.notes, 1)
        ]
        assert trace.query in page.text
        assert all(note in page.text for note in notes)
    assert len(re.findall(r'<div class="place gold">', html)) == sum(len(trace.positive_ids) for trace in shown)
    assert html.count("data:image/jpeg;base64,") == len({page.id for trace in shown for page in trace.shown})


def test_report_is_self_contained(folders: Path, html: str) -> None:
    page = Reader(html)
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[\w+/=]+", "", html))
    assert "script" not in {tag for tag, _ in page.tags}
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    links = {value[1:] for value in page.values("href") if value.startswith("#")}
    assert links | set(page.values("popovertarget") + page.values("aria-labelledby")) <= set(ids)
    assert len(html.encode()) < 6_000_000


def test_the_same_inputs_give_the_same_bytes(folders: Path, html: str, tmp_path: Path) -> None:
    assert write(folders, tmp_path / "again") == html
    assert write(folders, tmp_path / "few", shown=3) != write(folders, tmp_path / "other", shown=3, seed=1)


def test_traces_and_select_are_optional(folders: Path, tmp_path: Path) -> None:
    text = Reader(write(folders, tmp_path / "data", traces=None, select=None)).text
    assert "questions about 6 documents" in text
    assert not re.search("Reasoning traces|Teacher|Selected|Selection|Position of relevant", text)
    text = Reader(write(folders, tmp_path / "traces", select=None, shown=0)).text
    assert "Position of relevant pages" in text
    assert "random sample with seed" not in text
    with pytest.raises(InputError, match=r"nowhere/manifest.json: no such file"):
        write(folders, tmp_path / "x", traces=tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"data: was written by the stage candidates, expected traces"):
        write(folders, tmp_path / "x", traces=folders / "data")


def test_hostile_text_is_escaped(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "<script>alert(1)</script> \"><img src=x onerror=alert(2)> ' & {{ 7*7 }}"
    shutil.copytree(folders / "traces", tmp_path / "traces")
    records = read_records(tmp_path / "traces/traces.jsonl", Trace)
    fields = {"query": hostile, "domain": hostile, "think": hostile, "notes": (hostile,) * 5}
    write_records(tmp_path / "traces/traces.jsonl", [trace.model_copy(update=fields) for trace in records])
    page = Reader(
        write(folders, tmp_path / "out", traces=tmp_path / "traces")
    )  # a copy, so its page images are missing
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert hostile in page.text
    assert "page image not found" in page.text
    assert "page images could not be shown" in capsys.readouterr().out


def test_histogram_uses_round_bin_widths() -> None:
    rows = histogram([1, 1, 3])
    assert [(row["label"], row["count"]) for row in rows] == [("1", 2), ("2", 0), ("3", 1)]
    spans = histogram([7, 19, 20, 95])
    assert [row["label"] for row in spans][:2] == ["0 – 19", "20 – 39"]
    assert [row["count"] for row in spans] == [2, 1, 0, 0, 1]
    assert sum(row["count"] for row in histogram(list(range(1000, 99_000, 7)))) == 14_000
