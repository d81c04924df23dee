"""The script that measures on a GPU, at a small size on the CPU: every kind of work, and the table."""

from argparse import Namespace

import bench_gpu
import pytest
import torch
from small_shape import SMALL

from mmr5_train.models.shapes import SHAPES
from mmr5_train.training import run

ARGS = Namespace(completion=6, rounds=2, gpu="h100", plan=False)


@pytest.fixture
def restored(monkeypatch):
    """The script replaces these functions. monkeypatch restores them after the test."""
    for stage in ("sft", "grpo"):
        module = bench_gpu.STAGES[stage][0]
        monkeypatch.setattr(module, "load_model", module.load_model)
        monkeypatch.setattr(module, "train", module.train)
    monkeypatch.setattr(run, "save_result", run.save_result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
@pytest.mark.parametrize("work", bench_gpu.WORK)
def test_measures_a_shape_with_the_published_settings(work, tmp_path, monkeypatch, capsys, restored):
    monkeypatch.setitem(SHAPES, bench_gpu.MODELS["7B"], SMALL)
    row = bench_gpu.measure(work, "7B", 12, ARGS, tmp_path)
    assert row["measured_gib"] is None
    assert 1 < row["planned_gib"] < 2  # nearly all of it for kernels
    assert row["measured_s"] > 0
    assert row["planned_s"] > 0
    printed = capsys.readouterr().out
    if work == "grpo shared":
        assert "grpo: prompts are shared: each prompt is computed once for its 4 completions" in printed
    if work == "grpo stock":
        assert "grpo: prompts are not shared" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_measures_a_checkpoint_with_the_real_tokenizer(standin, tmp_path, restored):
    row = bench_gpu.measure("grpo shared", str(standin), 12, ARGS, tmp_path)
    assert row["measured_s"] > 0


def test_the_table_to_fill_in_has_the_forecasts_of_the_real_shape(tmp_path):
    args = Namespace(completion=300, rounds=2, gpu="h100", plan=True)
    stock, shared = (bench_gpu.measure(f"grpo {kind}", "7B", 2772, args, tmp_path) for kind in ("stock", "shared"))
    assert stock.keys() == {"planned_gib", "planned_s"}
    assert 20 < shared["planned_gib"] < stock["planned_gib"]
    assert stock["planned_s"] > 2 * shared["planned_s"]


@pytest.mark.parametrize(
    ("model", "work", "gib", "seconds"),
    [
        ("7B", "sft", 28.8, 15.1),
        ("7B", "grpo stock", 46.3, 35.0),
        ("7B", "grpo shared", 29.7, 12.0),
        ("7B", "logits", 21.7, 1.6),
        ("3B", "sft", 15.9, 10.7),
    ],
)
def test_forecasts_are_close_to_what_an_h200_measured(model, work, gib, seconds, tmp_path):
    """The measurements of docs/benchmarks.md, at five pages of 2,772 tokens."""
    args = Namespace(completion=300, rounds=2, gpu="h200", plan=True)
    row = bench_gpu.measure(work, model, 2772, args, tmp_path)
    assert row["planned_gib"] == pytest.approx(gib, rel=0.1)
    assert row["planned_s"] == pytest.approx(seconds, rel=0.3)


@pytest.mark.parametrize(("tokens", "sides"), [(1024, (32, 32)), (2772, (44, 63)), (12, (3, 4))])
def test_pages_have_exactly_the_stated_tokens(tokens, sides):
    assert bench_gpu.page_sides(tokens) == sides


def test_table_has_a_dash_for_what_was_not_measured_and_the_error_of_a_failed_row():
    row = {"model": "7B", "page_tokens": 2772, "planned_gib": 41.26, "measured_gib": None, "planned_s": 3.04}
    rows = [
        {**row, "work": "sft", "measured_s": 0.0512},
        {"model": "7B", "page_tokens": 2772, "work": "grpo stock", "error": "out of memory"},
    ]
    assert bench_gpu.table(rows).splitlines() == [
        "| model | tokens per page | work | GiB, planned | GiB, measured | s, planned | s, measured |",
        "|---|---|---|---|---|---|---|",
        "| 7B | 2,772 | sft | 41.3 | – | 3.0 | 0.051 |",
        "| 7B | 2,772 | grpo stock | – | – | – | – | out of memory",
    ]
