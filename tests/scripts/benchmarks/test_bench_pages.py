"""The benchmark of GRPO's data time, at a small size: how often pages are opened, and its targets."""

from argparse import Namespace

import bench_pages
import pytest


@pytest.mark.parametrize(("way", "openings"), [("at each reading", 32), ("once", 1)])
def test_counts_how_often_a_page_is_opened_in_a_rollout_cycle(way, openings, tmp_path, monkeypatch):
    from mmr5_train.models import inputs
    from mmr5_train.training import dataset, rollout_pages

    # The script replaces these functions. monkeypatch restores them after the test.
    monkeypatch.setattr(inputs, "load_page", inputs.load_page)
    monkeypatch.setattr(dataset, "load_page", dataset.load_page)
    monkeypatch.setattr(rollout_pages, "wait_for_pages", rollout_pages.wait_for_pages)
    # Larger than the pages that are cached for the whole run.
    args = Namespace(rollouts=1, tokens=100, width=300, height=400, threads=1)
    row = bench_pages.measure(way, "published", args, tmp_path)
    assert row["openings"] == openings
    assert row["steps"] == 2
    assert 0 < row["data_s"] < row["step_s"]


def test_targets_compare_the_two_ways():
    rows = [
        {"settings": "published", "way": "at each reading", "step_s": 5, "data_s": 4, "openings": 32},
        {"settings": "published", "way": "once", "step_s": 1, "data_s": 0.05, "openings": 1},
    ]
    assert [target["met"] for target in bench_pages.targets(rows)] == [True, True]
    rows[1]["data_s"] = 0.9
    assert [target["met"] for target in bench_pages.targets(rows)] == [True, False]
