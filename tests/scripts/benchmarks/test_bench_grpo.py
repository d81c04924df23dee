"""The GRPO benchmark at a small size, with both model shapes and both trainers."""

import argparse

import bench_grpo as bench
import pytest
from small_shape import SMALL

from mmr5_train.models.shapes import SHAPES


@pytest.mark.long
@pytest.mark.parametrize(("shape", "single"), [("tiny", False), ("3b", False), ("tiny", True)])
def test_measures_both_trainers(shape, single, monkeypatch):
    monkeypatch.setitem(SHAPES, bench.SHAPE_3B, SMALL)
    sizes = {"P": [400], "G": [4], "C": [10], "shape": shape, "repeats": 1, "threads": 2, "single": single}
    stock, shared = (bench.measure(argparse.Namespace(one=kind, **sizes)) for kind in ("stock", "shared"))
    for measured in (stock, shared):
        assert min(measured[time] for time in ("step_s", "update_s", "roofline_s")) > 0
    assert shared["mib"] > 0
    assert single or stock["mib"] > shared["mib"]
    assert stock["operations"] > 2 * shared["operations"]  # it processes 3.7 times the tokens


def test_table_figure_and_targets_show_the_rows(tmp_path):
    row = {"P": 1200, "G": 8, "C": 100, "stock_s": 3.2, "shared_s": 0.8, "speedup": 4.0, "bound": 5.2}
    memory = {"stock_mib": 1500.0, "shared_mib": 250.0, "stock_roofline_s": 1.0, "shared_roofline_s": 0.25}
    rows = [{"what": "update", **row, **memory}, {"what": "step", **row}]
    lines = bench.table(rows).splitlines()
    assert lines[2] == "| update | 1,200 | 8 | 100 | 3.20 | 0.80 | 4.00 | 5.20 | 1,500 | 250 | 1.00 | 0.25 |"
    assert lines[3] == "| step | 1,200 | 8 | 100 | 3.20 | 0.80 | 4.00 | 5.20 |  |  |  |  |"
    bench.figure(rows, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("<svg") == 1
    targets = {target["name"]: target["met"] for target in bench.targets(rows)}
    assert targets == {
        "smallest speedup of an update with P >= 1,200, as a share of the bound": True,
        "speedup of an update at P 1,200, G 8, C 100": True,
        "speedup of a step at P 1,200, G 8, C 100": True,
    }
