"""The script that checks the memory plan runs both stages. Without a GPU it reports no measured memory."""

import check_plan
import pytest
import torch

from mmr5_train.training import run


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
@pytest.mark.parametrize("stage", check_plan.LAUNCHED)
def test_stage_runs_with_the_settings_of_a_recipe(stage, tmp_path, monkeypatch, capsys):
    module, _, _ = check_plan.STAGES[stage]
    # The script replaces these functions. monkeypatch restores them after the test.
    monkeypatch.setattr(module, "load_model", module.load_model)
    monkeypatch.setattr(run, "save_result", run.save_result)
    result = check_plan.run_one(stage, "tiny", 12, "recommended", tmp_path)
    assert result["measured_gib"] is None
    assert 1 < result["planned_gib"] < 4
    assert f"{stage}: " in capsys.readouterr().out
