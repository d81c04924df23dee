"""The benchmarks of many pages in one pass, at a small size."""

import json

import bench_pass
import bench_wide
import pytest

from mmr5_train.models.loading import TINY


@pytest.mark.long
def test_all_figures_of_many_pages_are_measured(monkeypatch):
    monkeypatch.setattr(bench_wide, "WIDE", 10)
    monkeypatch.setattr(bench_wide, "WIDEST", 12)
    monkeypatch.setattr(bench_wide, "REPEATS", 1)
    monkeypatch.setattr(bench_wide, "QUESTIONS", 2)
    monkeypatch.setattr(bench_wide, "TOKENS_PER_PAGE", 14)
    row = bench_wide.measure(str(TINY))
    assert row["windows"] == 2
    assert row["largest_error"] < 1e-5
    assert row["times_the_plain_loop"] == pytest.approx(
        row["pages_20"]["plain_loop"] / row["pages_20"]["one_pass"]
    )
    assert row["ten_questions_logits"]["times"] > 0
    names = [target["name"] for target in bench_wide.targets(row, "tiny")]
    assert len(names) == len(set(names)) == 4


def test_the_pass_is_measured_on_a_cpu_too(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_pass, "REPEATS", 1)
    bench_pass.main(["--shapes", "tiny", "--cases", "3x16", "--out", str(tmp_path / "pass.json")])
    [row] = json.loads((tmp_path / "pass.json").read_text())["rows"]
    assert (row["pages"], row["page_tokens"]) == (3, 16)
    assert row["prompt_tokens"] > 3 * 16
    assert row["vision_share"] > 0
    assert set(bench_pass.table([row]).splitlines()[0].split(" | ")) >= {"vision_ms", "prefill_ms", "again_ms"}
