"""A training that is watched: the best checkpoint is kept, alarms are kept, and NaNs stop it."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmr5_train import grpo, sft
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_manifest
from mmr5_train.evaluation import alarms
from mmr5_train.inference.reranker import Reranker
from mmr5_train.ranking.rewards import REWARDS
from mmr5_train.training import callbacks as watching
from mmr5_train.training.checkpoints import WHOLE

GRPO = [
    "trainer={per_device_train_batch_size:8,num_generations:4,max_steps:6,save_steps:2,max_completion_length:16}",
    "trainer.learning_rate=1e-3",
]
SFT = ["trainer={per_device_train_batch_size:2,max_steps:6,save_steps:2,logging_steps:1,warmup_steps:0}"]
STAGES = {"sft": (sft.main, sft.SftStage, SFT), "grpo": (grpo.main, grpo.GrpoStage, GRPO)}


@pytest.fixture
def data(traces, questions):
    return {"sft": traces, "grpo": questions}


@pytest.fixture(autouse=True)
def answers_differ_in_what_they_earn(monkeypatch):
    monkeypatch.setitem(REWARDS, "reranking", lambda text, *_, **__: len(text) % 7 / 6)


def run(stage, data, out, *overrides):
    main, model, settings = STAGES[stage]
    main(compose_stage(model, stage, [f"data={data[stage]}", f"out={out}", *settings, *overrides]))
    return json.loads((out / "log_history.json").read_text())


@pytest.mark.parametrize("lora", ["null", "{r:4,alpha:8}"], ids=["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_best_checkpoint_is_kept_beside_the_last(stage, lora, data, tmp_path, monkeypatch):
    recalls = iter([0.5, 0.2, 0.9, 0.9])  # at the start, and at steps 2, 4, 6: step 4 is the first of the best
    monkeypatch.setattr(watching, "_figures", lambda asked, answer: (next(recalls), 1.0))
    heldout = f"heldout={{data:{data['grpo']},limit:1,max_new_tokens:4}}"
    same = ("trainer.lr_scheduler_type=constant", f"model.lora={lora}")
    history = run(stage, data, tmp_path / "out", heldout, *same)
    ranked = [(e["step"], e["heldout/recall@1"]) for e in history if "heldout/recall@1" in e]
    assert ranked == [(0, 0.5), (2, 0.2), (4, 0.9), (6, 0.9)]
    logged = [entry["step"] for entry in history if "loss" in entry]
    assert logged == [1, 2, 3, 4, 5, 6]
    counts = read_manifest(tmp_path / "out")["counts"]
    assert (counts["best_step"], counts["heldout/recall@1"]) == (4, 0.9)

    run(stage, data, tmp_path / "four", "trainer.max_steps=4", *same)
    best, last, four = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / made).state_dict()
        for made in ("out/best", "out/model", "four/model")
    )
    assert best.keys() == four.keys()
    assert all(torch.equal(best[name], four[name]) for name in best)
    assert any(not torch.equal(best[name], last[name]) for name in best)
    Reranker(tmp_path / "out/best")


@pytest.mark.parametrize("stage", STAGES)
def test_ranking_held_out_questions_changes_no_loss(stage, data, tmp_path):
    plain = run(stage, data, tmp_path / "plain")
    watched = run(
        stage, data, tmp_path / "watched", f"heldout={{data:{data['grpo']},batch_size:3,max_new_tokens:8}}"
    )
    assert [e["loss"] for e in plain if "loss" in e] == [e["loss"] for e in watched if "loss" in e]
    ranked = [entry for entry in watched if "heldout/recall@1" in entry]
    assert [entry["step"] for entry in ranked] == [0, 2, 4, 6]
    assert all(0 <= entry["heldout/recall@1"] <= 1 for entry in ranked)


def test_room_for_the_best_is_needed(data, tmp_path):
    for settings in ("trainer.save_total_limit=2", "trainer.save_strategy=no"):
        with pytest.raises(InputError, match="heldout: needs checkpoints, and room for the best"):
            run("grpo", data, tmp_path / "out", f"heldout={{data:{data['grpo']}}}", settings)
    assert not (tmp_path / "out").exists()


def alarm_from(step):
    alarm = alarms.Alarm("ranking falls", step, "it fell", "turn the knob")
    return lambda history, now: [alarm] if now >= step else []


def test_an_alarm_is_said_once_and_kept(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watching, "raised_alarms", alarm_from(2))
    run("grpo", data, tmp_path / "out")
    assert capsys.readouterr().out.count("grpo: alarm at step 2: ranking falls: it fell. turn the knob") == 1
    assert [alarm.step for alarm in alarms.read_alarms(tmp_path / "out")] == [2]
    assert read_manifest(tmp_path / "out")["counts"]["alarms"] == 1
    assert read_manifest(tmp_path / "out")["counts"]["steps"] == 6


def test_an_alarm_can_stop_the_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "raised_alarms", alarm_from(3))
    run("grpo", data, tmp_path / "out", "alarms=stop")
    assert read_manifest(tmp_path / "out")["counts"]["steps"] == 3
    assert (tmp_path / "out/model/model.safetensors").is_file()
    run("grpo", data, tmp_path / "off", "alarms=off")
    assert alarms.read_alarms(tmp_path / "off") == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_none_stops_and_keeps_what_is_there(stage, data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"step \d: the (loss|norm of|probabilities) ") as raised:
        run(stage, data, out, "trainer.learning_rate=1e30", "trainer.save_steps=1", "trainer.warmup_steps=0")
    assert f"{out}/checkpoint-" in str(raised.value)
    assert "stays as it is" in str(raised.value)
    assert list(out.glob(f"checkpoint-*/{WHOLE}"))
    assert not (out / "model").exists()
