"""The choice of the margin of mode adaptive, and the stage with the tiny model."""

import json
import shutil

import pytest
from sample_runs import make_data

from mmr5_train import Reranker, calibrate
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_manifest, write_records
from mmr5_train.evaluation.adaptive import choose, margin_curve
from mmr5_train.models.loading import TINY, read_settings


def test_the_curve_has_the_recall_share_and_time_of_each_margin():
    rows = margin_curve([0.8, 0.2, 0.1], [1, 0, 0], [0, 1, 1], 0.1, 2.0)
    assert [row["reasoned"] for row in rows] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert [row["recall@1"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 2 / 3])
    assert [row["seconds_per_question"] for row in rows] == pytest.approx(
        [0.1 + 2 * i / 3 for i in (0, 1, 2, 3, 3)]
    )
    margins = [row["margin"] for row in rows]
    assert margins == sorted(margins)
    assert 0.1 <= margins[1] < 0.2 < margins[2] < 0.8 < margins[3]


def test_the_cheapest_margin_within_the_tolerance_is_chosen():
    rows = [
        {"margin": margin, "recall@1": recall, "reasoned": margin}
        for margin, recall in ((0.0, 0.70), (0.2, 0.796), (0.5, 0.80), (1.0, 0.79))
    ]
    curve = {"modes": {"reason": {"recall@1": 0.80}}, "adaptive": rows}
    assert choose(curve, 0.005)["margin"] == 0.2
    assert choose(curve, 0.0)["margin"] == 0.5
    assert choose(curve, 0.2)["margin"] == 0.0
    curve["modes"]["reason"]["recall@1"] = 0.9  # out of reach: the best row
    assert choose(curve, 0.005)["margin"] == 0.5


def test_the_margin_is_stored_and_used(tmp_path):
    tasks = make_data(tmp_path / "data", questions=6)
    write_records(tmp_path / "data/tasks.jsonl", tasks)
    shutil.copytree(TINY, tmp_path / "model")
    overrides = [f"data={tmp_path}/data/tasks.jsonl", f"checkpoint={tmp_path}/model", f"out={tmp_path}/out"]
    settings = ["pages=3", "batch_size=3", "max_new_tokens=60"]
    calibrate.main(compose_stage(calibrate.CalibrateStage, "calibrate", [*overrides, *settings]))
    curve = json.loads((tmp_path / "out/curve.json").read_text())
    assert curve["chosen"] in curve["adaptive"]
    assert curve["adaptive"][0]["reasoned"] == 0
    assert curve["adaptive"][-1]["reasoned"] == 1
    assert curve["modes"]["logits"]["recall@1"] == curve["adaptive"][0]["recall@1"]
    stored = read_settings(tmp_path / "model").adaptive
    assert (stored.pages, stored.margin) == (3, curve["chosen"]["margin"])
    assert read_manifest(tmp_path / "out")["counts"]["questions"] == 6
    assert Reranker(tmp_path / "model", mode="adaptive").margin == stored.margin


def test_a_checkpoint_of_another_project_is_refused(tmp_path):
    tasks = make_data(tmp_path / "data", questions=1)
    write_records(tmp_path / "data/tasks.jsonl", tasks)
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model/reranker.json").unlink()
    overrides = [f"data={tmp_path}/data/tasks.jsonl", f"checkpoint={tmp_path}/model", f"out={tmp_path}/out"]
    with pytest.raises(InputError, match=r"model: has no reranker.json; expected a checkpoint of this project"):
        calibrate.main(compose_stage(calibrate.CalibrateStage, "calibrate", overrides))
