"""The benchmark of distillation at 20 pages: its commands compose, and its table pairs models over seeds."""

import json

import bench_distill
import numpy as np
import pytest

from data_construction.synthetic import SyntheticStage
from mmr5_train.common.config import compose_stage
from mmr5_train.compare import Run
from mmr5_train.distill import DistillStage
from mmr5_train.evaluate import EvaluateStage
from mmr5_train.recipe import RecipeStage, compose_stages, stage_overrides
from mmr5_train.sft import SftStage
from scripts import pretrain_tiny


@pytest.fixture
def commands(monkeypatch):
    """The commands that the benchmark would run, in their order."""
    seen = {}
    monkeypatch.setattr(bench_distill, "run_with_log", lambda command, *_: seen.update({str(command): command}))
    return seen


def arguments(command):
    return [part for part in command if "=" in part]


def test_each_command_composes(commands, tmp_path):
    bench_distill.pretrain(tmp_path / "base")
    bench_distill.train(tmp_path / "10", tmp_path / "base", 10)
    pretraining, recipe, sft, teach = commands.values()
    phases = compose_stage(pretrain_tiny.TinyStage, "tiny", arguments(pretraining)).phases
    assert max(phases["wider"].pages) == bench_distill.PAGES
    stages = compose_stages(stage_overrides(compose_stage(RecipeStage, "recipe", arguments(recipe))))
    assert list(stages) == ["corpus", "candidates", "traces"]
    assert isinstance(stages["corpus"], SyntheticStage)
    assert stages["corpus"].section_pages == stages["candidates"].candidates == bench_distill.PAGES
    trained = compose_stage(SftStage, "sft", arguments(sft))
    assert trained.model.path == str(tmp_path / "base")
    assert trained.data == stages["traces"].out / "traces.jsonl"
    teaching = compose_stage(EvaluateStage, "evaluate", arguments(teach))
    assert teaching.systems["teacher"].checkpoint == str(trained.out / "model")
    assert teaching.data == stages["candidates"].out / "select.jsonl"

    commands.clear()
    bench_distill.distill(tmp_path / "10", "ranknet", 10)
    (distillation,) = commands.values()
    assert compose_stage(DistillStage, "distill", arguments(distillation)).rank_loss == "ranknet"
    commands.clear()
    bench_distill.evaluate(tmp_path / "10", 10, 30)
    (evaluation,) = commands.values()
    systems = compose_stage(EvaluateStage, "evaluate", arguments(evaluation)).systems
    assert list(systems) == ["reasoning", *bench_distill.LOSSES]


def test_finished_parts_are_skipped(commands, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/manifest.json").write_text(json.dumps({"stage": "tiny"}))
    bench_distill.pretrain(tmp_path / "base")
    assert not commands


def run(name, seed, recall):
    values = {figure: np.array(recall) for figure in ("recall@1", "recall@3", "recall@5")}
    return Run(
        name=name, seed=seed, query_ids=list("abcd"), domains=["d"] * 4, types=[("users",)] * 4,
        values=values, data="", seconds=0.5,
    )  # fmt: skip


def test_the_target_is_for_the_default_loss_and_each_seed():
    better, worse = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    runs = [run("reasoning", seed, better) for seed in (10, 11)]
    runs += [run(name, 10, better) for name in bench_distill.LOSSES]
    runs += [run(name, 11, worse) for name in bench_distill.LOSSES]
    rows = bench_distill.table_rows(runs)
    assert [row["model"] for row in rows] == ["reasoning", *bench_distill.LOSSES]
    assert rows[1]["by_seed"] == {10: 0.0, 11: -0.25}
    assert rows[1]["difference"]["mean"] == pytest.approx(-0.125)
    assert [target["met"] for target in bench_distill.targets(rows)] == [True, False]
    assert bench_distill.markdown(rows).count("\n") == 1 + len(rows)
