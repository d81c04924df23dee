"""Held-out ranking, alarms, and stopping at non-finite values during training."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, Trainer

from mmr5_train import grpo, sft
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_manifest
from mmr5_train.evaluation import alarms
from mmr5_train.models.loading import read_settings
from mmr5_train.ranking.rewards import REWARDS
from mmr5_train.training import callbacks
from mmr5_train.training.checkpoints import COMPLETE

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
def rewards_differ_within_groups(monkeypatch):
    monkeypatch.setitem(REWARDS, "reranking", lambda text, *_, **__: len(text) % 7 / 6)


def run(stage, data, out, *overrides):
    main, model, settings = STAGES[stage]
    main(compose_stage(model, stage, [f"data={data[stage]}", f"out={out}", *settings, *overrides]))
    return json.loads((out / "log_history.json").read_text())


@pytest.mark.parametrize("lora", ["null", "{r:4,alpha:8}"], ids=["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_model_is_the_best_checkpoint_and_the_last_is_kept(stage, lora, data, tmp_path, monkeypatch, capfd):
    recalls = iter([0.5, 0.2, 0.9, 0.9])  # at the start, and at steps 2, 4 and 6: step 4 is the earliest best
    monkeypatch.setattr(callbacks, "_metrics", lambda prompted, answer: (next(recalls), 1.0))
    heldout = f"heldout={{data:{data['grpo']},limit:1,max_new_tokens:4}}"
    same = ("trainer.lr_scheduler_type=constant", f"model.lora={lora}")
    history = run(stage, data, tmp_path / "out", heldout, *same)
    ranked = [(e["step"], e["heldout/recall@1"]) for e in history if "heldout/recall@1" in e]
    assert ranked == [(0, 0.5), (2, 0.2), (4, 0.9), (6, 0.9)]
    logged = [entry["step"] for entry in history if "loss" in entry]
    assert logged == [1, 2, 3, 4, 5, 6]
    counts = read_manifest(tmp_path / "out")["counts"]
    assert (counts["best_step"], counts["heldout/recall@1"], counts["model_step"]) == (4, 0.9, 4)
    origin = "step 4 of 6, the best by held-out recall@1 (0.900)"
    assert origin in capfd.readouterr().out
    assert read_settings(tmp_path / "out/model").origin == origin
    assert read_settings(tmp_path / "out/last").origin == "step 6 of 6"

    run(stage, data, tmp_path / "four", "trainer.max_steps=4", *same)
    model, last, four = (weights(tmp_path / folder) for folder in ("out/model", "out/last", "four/model"))
    assert model.keys() == four.keys()
    assert all(torch.equal(model[name], four[name]) for name in model)
    assert any(not torch.equal(model[name], last[name]) for name in model)
    if lora != "null":
        adapters = [tmp_path / folder / "adapter/adapter_model.safetensors" for folder in ("out", "four")]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_the_last_checkpoint_can_be_chosen(data, tmp_path, monkeypatch):
    recalls = iter([0.5, 0.9, 0.2])
    monkeypatch.setattr(callbacks, "_metrics", lambda prompted, answer: (next(recalls), 1.0))
    heldout = f"heldout={{data:{data['grpo']},limit:1,max_new_tokens:4,choose:last}}"
    run("sft", data, tmp_path / "out", heldout, "trainer.max_steps=4")
    counts = read_manifest(tmp_path / "out")["counts"]
    assert (counts["best_step"], counts["model_step"]) == (2, 4)
    steps = {name: read_settings(tmp_path / "out" / name).step for name in ("model", "best")}
    assert steps == {"model": 4, "best": 2}
    assert not (tmp_path / "out/last").exists()
    model, best = weights(tmp_path / "out/model"), weights(tmp_path / "out/best")
    assert any(not torch.equal(model[name], best[name]) for name in model)


@pytest.mark.parametrize("stage", STAGES)
def test_held_out_ranking_does_not_change_the_losses(stage, data, tmp_path):
    plain = run(stage, data, tmp_path / "plain")
    watched = run(
        stage, data, tmp_path / "watched", f"heldout={{data:{data['grpo']},batch_size:3,max_new_tokens:8}}"
    )
    assert [e["loss"] for e in plain if "loss" in e] == [e["loss"] for e in watched if "loss" in e]
    ranked = [entry for entry in watched if "heldout/recall@1" in entry]
    assert [entry["step"] for entry in ranked] == [0, 2, 4, 6]
    assert all(0 <= entry["heldout/recall@1"] <= 1 for entry in ranked)


def test_save_settings_must_keep_the_best_checkpoint(data, tmp_path):
    for settings in ("trainer.save_total_limit=2", "trainer.save_strategy=no", "trainer.save_strategy=epoch"):
        with pytest.raises(
            InputError, match="heldout: the run keeps the best checkpoint in addition to the last 2"
        ):
            run("grpo", data, tmp_path / "out", f"heldout={{data:{data['grpo']}}}", settings)
    assert not (tmp_path / "out").exists()


def alarm_from(step):
    alarm = alarms.Alarm("ranking falls", step, "it fell", "turn the knob")
    return lambda history, now: [alarm] if now >= step else []


def test_an_alarm_is_printed_once_and_saved(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(callbacks, "raised_alarms", alarm_from(2))
    run("grpo", data, tmp_path / "out")
    assert capsys.readouterr().out.count("grpo: alarm at step 2: ranking falls: it fell. turn the knob") == 1
    assert [alarm.step for alarm in alarms.read_alarms(tmp_path / "out")] == [2]
    assert read_manifest(tmp_path / "out")["counts"]["alarms"] == 1
    assert read_manifest(tmp_path / "out")["counts"]["steps"] == 6


def test_an_alarm_can_stop_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "raised_alarms", alarm_from(3))
    run("grpo", data, tmp_path / "out", "alarms=stop")
    assert read_manifest(tmp_path / "out")["counts"]["steps"] == 3
    assert (tmp_path / "out/model/model.safetensors").is_file()
    run("grpo", data, tmp_path / "off", "alarms=off")
    assert alarms.read_alarms(tmp_path / "off") == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_non_finite_value_stops_training_and_keeps_checkpoints(stage, data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"step \d: the (loss|gradient norm|next-token probabilities) ") as raised:
        run(stage, data, out, "trainer.learning_rate=1e30", "trainer.save_steps=1", "trainer.warmup_steps=0")
    assert f"{out}/checkpoint-" in str(raised.value)
    assert "is unchanged" in str(raised.value)
    assert list(out.glob(f"checkpoint-*/{COMPLETE}"))
    assert not (out / "model").exists()


def take_step(monkeypatch, outcome, losses_of_all_ranks=()):
    """A training step of FiniteTrainer for a step of transformers' Trainer with this loss or error."""

    def step(trainer):
        if isinstance(outcome, Exception):
            raise outcome
        return torch.tensor(outcome)

    monkeypatch.setattr(Trainer, "training_step", step)
    trainer = callbacks.FiniteTrainer.__new__(callbacks.FiniteTrainer)
    trainer._losses = []
    trainer.args, trainer.state = SimpleNamespace(output_dir="nowhere"), SimpleNamespace(global_step=7)
    gathered = torch.tensor(losses_of_all_ranks)
    trainer.accelerator = SimpleNamespace(sync_gradients=True, gather=lambda losses: gathered)
    return trainer.training_step()


def test_a_non_finite_loss_of_another_rank_stops_this_rank_too(monkeypatch):
    assert take_step(monkeypatch, 0.5, [0.5, 0.25]) == 0.5
    with pytest.raises(InputError, match="step 8: the loss is nan; no checkpoint was written yet"):
        take_step(monkeypatch, 0.5, [0.5, float("nan")])


def test_the_error_of_a_gpu_that_samples_from_nan_is_recognized(monkeypatch):
    message = "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported at another call"
    with pytest.raises(InputError, match=r"step 8: the next-token probabilities are not finite.*CUDA_LAUNCH"):
        take_step(monkeypatch, torch.AcceleratorError(message))
    with pytest.raises(RuntimeError, match="out of memory"):
        take_step(monkeypatch, torch.AcceleratorError("CUDA error: out of memory"))
