"""The training benchmark: ms-swift gets the same traces, and the plain TRL script trains."""

import json
from pathlib import Path

import bench_train

from mmr5_train.common.files import read_records
from mmr5_train.ranking.records import Trace


def test_ms_swift_gets_the_same_traces(traces, tmp_path):
    command = bench_train.swift_command(Path("swift"), traces, tmp_path / "out")
    assert command[:2] == ["swift", "sft"]
    assert f"--dataset={tmp_path / 'out/data.jsonl'}" in command
    assert "--freeze_vit=true" in command
    rows = [json.loads(line) for line in (tmp_path / "out/data.jsonl").read_text().splitlines()]
    records = read_records(traces, Trace)
    assert len(rows) == len(records)
    for row, trace in zip(rows, records, strict=True):
        text = "".join(message["content"] for message in row["messages"])
        assert text.count("<image>") == len(trace.shown) == len(row["images"])
        assert all(Path(image).is_file() for image in row["images"])
        assert trace.query in text
        assert row["messages"][-1]["content"].endswith("</answer>")


def test_plain_trl_script_trains_and_logs_events(traces, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "STEPS", 2)
    monkeypatch.setattr(bench_train, "BATCH", 2)
    bench_train.run_bare_trl(traces, tmp_path / "out")
    times, losses = bench_train.read_events(tmp_path / "out")
    assert len(times) == len(losses) == 2
    assert times[0] < times[1]


def test_targets_compare_to_the_fastest_alternative():
    speeds = {"mmr5_train": 40.0, "bare_trl": 38.0, "ms_swift": 50.0, "two_processes": 60.0}
    assert [target["met"] for target in bench_train.targets(speeds, 8.5e-5)] == [False, True]
    assert [target["met"] for target in bench_train.targets(speeds | {"ms_swift": 26.0}, 6e-3)] == [True, False]
