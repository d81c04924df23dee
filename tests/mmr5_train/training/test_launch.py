"""The launch files for GPUs, run on CPUs: a real DeepSpeed engine with two processes and checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sample_runs import make_evaluation
from transformers import AutoModelForImageTextToText

from mmr5_train.common.files import read_manifest
from mmr5_train.training.checkpoints import COMPLETE

ROOT = Path(__file__).resolve().parents[3]
SFT = ["trainer={per_device_train_batch_size:1,max_steps:2,logging_steps:1,warmup_steps:0}"]
GRPO = ["trainer={per_device_train_batch_size:4,num_generations:4,max_steps:2,max_completion_length:12}"]


def launch(stage, launch_file, processes, out, *overrides):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"configs/accelerate/{launch_file}.yaml",
    ]
    command += ["--num_processes", str(processes), "-m", f"mmr5_train.{stage}", f"out={out}", *overrides]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("stage", "launch_file", "lora"),
    [("sft", "zero2", "{r:4,alpha:8}"), ("grpo", "zero3", "{r:4,alpha:8}"), ("grpo", "zero3_offload", "null")],
)
def test_stage_trains_with_two_deepspeed_processes(stage, launch_file, lora, traces, questions, tmp_path):
    data = {"sft": [f"data={traces}", *SFT], "grpo": [f"data={questions}", *GRPO]}[stage]
    heldout = f"heldout={{data:{questions},limit:3,max_new_tokens:4}}"
    result = launch(stage, launch_file, 2, tmp_path / "out", *data, f"model.lora={lora}", heldout)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{stage}: 2 processes (deepspeed)" in result.stdout
    counts = read_manifest(tmp_path / "out")["counts"]
    assert (counts["processes"], counts["steps"]) == (2, 2)
    assert (tmp_path / f"out/checkpoint-2/{COMPLETE}").is_file()
    history = json.loads((tmp_path / "out/log_history.json").read_text())
    assert [entry["step"] for entry in history if "heldout/recall@1" in entry] == [0, 2]
    for folder in ("model", "best"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / folder)


def test_distillation_at_batch_size_1_under_zero3(tmp_path):
    """A quarter of the prompts train a completion, in the same micro-batches on both processes."""
    make_evaluation(tmp_path / "evaluation", questions=5, draws=10)
    trainer = "trainer={per_device_train_batch_size:1,gradient_accumulation_steps:3,logging_steps:1}"
    data = f"data={tmp_path}/evaluation/rankings/sft+grpo.jsonl"
    result = launch(
        "distill", "zero3", 2, tmp_path / "out", data, trainer, "subsets=2", "model.lora={r:4,alpha:8}"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    history = json.loads((tmp_path / "out/log_history.json").read_text())
    steps = [entry for entry in history if "listwise_loss" in entry]
    # The fourth micro-batch of each process, which is the first one of the second step, has the completions.
    assert ["mean_token_accuracy" in entry for entry in steps][:2] == [False, True]
