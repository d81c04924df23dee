"""The rehearsal of the published recipes: what it changes, and its short form."""

import json
import os
import sys
from unittest.mock import patch

import pytest
import rehearse
from rehearse import ROOT, RUNS, SHORT_RUNS, changed_settings, is_allowed

from mmr5_train.common.files import read_manifest


@pytest.mark.parametrize("run", RUNS + SHORT_RUNS, ids=lambda run: f"{run.name}-{len(run.overrides)}")
def test_only_checkpoint_amounts_and_device_are_changed(run):
    changed = {
        f"{stage}.{key}": is_allowed(stage, key) for stage, key, *_ in changed_settings(run.recipe, run.overrides)
    }
    assert [setting for setting, allowed in changed.items() if not allowed] == []
    assert {"sft.model.path", "sft.model.dtype", "sft.limit", "grpo.trainer.max_steps"} <= changed.keys()


def test_other_settings_are_not_allowed():
    [*_, (stage, key, *_)] = (
        change
        for change in changed_settings("mm_r5", ["stages.grpo.trainer.max_completion_length=64"])
        if change[1] == "trainer.max_completion_length"
    )
    assert not is_allowed(stage, key)


@pytest.mark.launch
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_short_form_runs_the_recipe_from_the_data_to_the_table(family, standin, tmp_path, monkeypatch, capfd):
    """With two DeepSpeed processes; `standin` skips the test where the tokenizer is missing.

    The stand-in of Qwen3-VL has one token for each think tag. The main process of the rehearsal is this one, which
    has imported the libraries already.
    """
    folder, result = str(tmp_path / "out"), tmp_path / "rehearsal.json"
    arguments = ["--short", "--family", family, "--out", folder, "--json", str(result)]
    monkeypatch.setattr(sys, "argv", ["rehearse.py", *arguments])
    monkeypatch.chdir(ROOT)
    with patch.dict(os.environ):  # the rehearsal sets variables for the processes that it starts
        rehearse.main()
    targets = json.loads(result.read_text())["targets"]
    assert [target for target in targets if not target["met"] and target["name"] != "minutes"] == []
    assert len(targets) > 4
    assert "sft.model.dtype: float32 (published: bfloat16)" in capfd.readouterr().out
    counts = read_manifest(tmp_path / "out/mm_r5_zero2/grpo")["counts"]
    assert (counts["processes"], counts["steps"]) == (2, 2)
