"""A killed run resumes from its last complete checkpoint and ends with the same losses and weights."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmr5_train import grpo, sft
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError
from mmr5_train.ranking.rewards import REWARDS
from mmr5_train.training.checkpoints import COMPLETE, last_checkpoint

ROOT = Path(__file__).resolve().parents[3]
# Eight steps, four per epoch, and a checkpoint every two steps.
SETTINGS = {
    "sft": [
        "model.lora={r:4,alpha:8,dropout:0.2,plus_ratio:4}",
        "trainer={per_device_train_batch_size:1,max_steps:8,save_steps:2,logging_steps:1,warmup_steps:2}",
    ],
    "grpo": [
        "trainer={per_device_train_batch_size:8,num_generations:4,num_iterations:2,max_completion_length:16}",
        "trainer={max_steps:8,save_steps:2}",
        "reward=permutation",
        "trainer.learning_rate=1e-3",
    ],
}
STAGES = {"sft": (sft.main, sft.SftStage), "grpo": (grpo.main, grpo.GrpoStage)}
# The stage's command with other rewards. It kills itself at step 8, after that checkpoint is written and before it
# is marked complete.
KILLED_RUN = """
import os, signal, sys
from mmr5_train import grpo, sft
from mmr5_train.common.config import run_stage
from mmr5_train.training.checkpoints import MarkComplete
mark = MarkComplete.on_save
def die(self, args, state, control, **rest):
    if state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    mark(self, args, state, control, **rest)
MarkComplete.on_save = die
from mmr5_train.ranking.rewards import REWARDS
REWARDS["reranking"] = lambda text, *_, **__: len(text) % 7 / 6
stage = sys.argv.pop(1)
STAGES = {"sft": (sft.main, sft.SftStage), "grpo": (grpo.main, grpo.GrpoStage)}
run_stage(*STAGES[stage], stage)
"""


@pytest.fixture
def data(traces, questions):
    return {"sft": traces, "grpo": questions}


def run(stage, data, out, *overrides):
    main, model = STAGES[stage]
    main(compose_stage(model, stage, [f"data={data}", f"out={out}", *SETTINGS[stage], *overrides]))
    entries = json.loads((out / "log_history.json").read_text())
    varying = ("step_time", "num_tokens")  # seconds, and a count that TRL restarts
    return [{key: entry[key] for key in entry if key not in varying} for entry in entries if "loss" in entry]


@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.long), "grpo"])
def test_a_killed_run_resumes_with_the_same_losses(stage, data, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(REWARDS, "reranking", lambda text, *_, **__: len(text) % 7 / 6)
    uninterrupted = run(stage, data[stage], tmp_path / "uninterrupted")
    assert len(uninterrupted) == 8
    assert len({entry["loss"] for entry in uninterrupted}) > 4

    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_RUN, stage, f"data={data[stage]}", f"out={out}", *SETTINGS[stage]]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert (out / "checkpoint-8/optimizer.pt").is_file()
    assert last_checkpoint(out) == out / "checkpoint-6"

    assert run(stage, data[stage], out) == uninterrupted
    assert f"{stage}: resumes from {out / 'checkpoint-6'}" in capfd.readouterr().out
    for folder in ("uninterrupted", "killed"):
        assert (tmp_path / folder / "model/model.safetensors").is_file()
    assert (out / "model/model.safetensors").read_bytes() == (
        tmp_path / "uninterrupted/model/model.safetensors"
    ).read_bytes()


def test_resuming_needs_the_same_settings(data, tmp_path):
    out = tmp_path / "out"
    run("sft", data["sft"], out, "trainer.max_steps=2")
    (out / "manifest.json").write_text('{"finished": false, "stage": "sft"}')
    with pytest.raises(
        InputError, match="stopped run with seed 42, but this run has 7; use the same settings to resume it"
    ):
        run("sft", data["sft"], out, "trainer.max_steps=2", "seed=7")
    assert (out / "checkpoint-2" / COMPLETE).is_file()
    data["sft"].write_text(data["sft"].read_text().replace("a page", "a picture"))
    with pytest.raises(InputError, match="stopped run with data"):
        run("sft", data["sft"], out, "trainer.max_steps=2")
    assert run("sft", data["sft"], out, "trainer.max_steps=2", "seed=7", "overwrite=true")


def test_a_run_without_a_complete_checkpoint_starts_over(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text('{"finished": false, "stage": "sft"}')
    (out / "checkpoint-2").mkdir()
    assert len(run("sft", data["sft"], out, "trainer.max_steps=1")) == 1


def test_save_settings_that_prevent_a_resume_are_rejected(data, tmp_path):
    with pytest.raises(InputError, match="save_total_limit: expected 2 or more, found 1"):
        run("sft", data["sft"], tmp_path / "out", "trainer.save_total_limit=1")
    with pytest.raises(InputError, match=r"expected a multiple of 2, .* found 5; the nearest are 4 and 6"):
        run("grpo", data["grpo"], tmp_path / "out", "trainer.save_steps=5")
    assert not (tmp_path / "out").exists()
