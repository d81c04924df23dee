"""What the training benchmark compares: the same traces for each way, and a bare TRL script that trains."""

import json
from pathlib import Path

import bench_train

from mmr5_train.common.files import read_records
from mmr5_train.ranking.records import Trace


def test_ms_swift_gets_the_same_traces(traces, tmp_path):
    command = bench_train.swift(Path("swift"), traces, tmp_path / "out")
    assert command[:2] == ["swift", "sft"]
    assert f"--dataset={tmp_path / 'out/data.jsonl'}" in command
    assert "--freeze_vit=true" in command
    rows = [json.loads(line) for line in (tmp_path / "out/data.jsonl").read_text().splitlines()]
    made = read_records(traces, Trace)
    assert len(rows) == len(made)
    for row, trace in zip(rows, made, strict=True):
        text = "".join(message["content"] for message in row["messages"])
        assert text.count("<image>") == len(trace.shown) == len(row["images"])
        assert all(Path(image).is_file() for image in row["images"])
        assert trace.query in text
        assert row["messages"][-1]["content"].endswith("</answer>")


def test_a_bare_script_trains_and_its_events_are_read(traces, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "STEPS", 2)
    monkeypatch.setattr(bench_train, "BATCH", 2)
    bench_train.run_bare_trl(traces, tmp_path / "out")
    times, losses = bench_train.events(tmp_path / "out")
    assert len(times) == len(losses) == 2
    assert times[0] < times[1]
