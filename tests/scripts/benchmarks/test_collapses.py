"""The settings of the collapsing runs are valid, and the table shows their results."""

import json

import collapses
import pytest

from mmr5_train.common.config import compose_stage
from mmr5_train.grpo import GrpoStage


@pytest.mark.parametrize("name", collapses.RUNS)
def test_settings_are_valid(name):
    _, _, settings = collapses.RUNS[name]
    config = compose_stage(GrpoStage, "grpo", [*collapses.grpo_overrides(settings), "alarms=warn"])
    assert config.trainer["per_device_train_batch_size"] % config.trainer["num_generations"] == 0


def test_default_run_has_the_settings_of_the_demo():
    from mmr5_train.recipe import RecipeStage, stage_settings

    run_config = compose_stage(GrpoStage, "grpo", collapses.grpo_overrides(collapses.RUNS["default"][2]))
    theirs = stage_settings(compose_stage(RecipeStage, "demo", []))["grpo"]
    for name, value in run_config.trainer.items():
        if name != "save_steps":
            assert theirs[f"trainer.{name}"] == value, name
    assert theirs["reward.name"] == run_config.reward.name


def test_table_and_targets_show_recall_and_alarms(tmp_path):
    history = [
        {"step": step, "answers/reranking": 0.5 + step / 100, "answers/complete": 1.0, "entropy": 0.02}
        for step in range(1, 21)
    ]
    history += [{"step": step, "heldout/recall@1": value} for step, value in ((0, 0.8), (20, 0.3))]
    (tmp_path / "log_history.json").write_text(json.dumps(history))
    alarm = {"name": "ranking falls", "step": 40, "seen": "x", "knob": "y"}
    (tmp_path / "alarms.json").write_text(json.dumps([alarm]))
    row = {"run": "released", "what": "w", **collapses.summary(tmp_path)}
    assert row["heldout"] == [0.8, 0.3]
    line = collapses.table([row]).splitlines()[-1]
    assert line == (
        "| released | 0.800 → 0.300 | 0.530 → 0.680 | 1.000 → 1.000 | – | – | 0.020 → 0.020 | ranking falls (40) |"
    )
    (target,) = collapses.targets([row])
    assert target == {
        "name": "alarms of the run released", "measured": 1, "wanted": "at least 1", "met": True
    }  # fmt: skip
    assert not collapses.targets([row | {"run": "default"}])[0]["met"]
