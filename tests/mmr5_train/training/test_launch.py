"""The launch files for GPUs, run on CPUs: a real DeepSpeed engine with two processes and checkpoints."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sample_runs import make_evaluation
from transformers import AutoModelForImageTextToText

from mmr5_train.common.files import read_manifest, write_records
from mmr5_train.training.checkpoints import COMPLETE

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.launch
GRPO = [
    "trainer={per_device_train_batch_size:4,num_generations:4,max_steps:2,save_steps:1,max_completion_length:12}"
]


@pytest.fixture
def five_questions(tasks, page_folder):
    """The path of a file of five ranking tasks in the page folder."""
    copy = tasks[0].model_copy(update={"query_id": "doc/4"})
    write_records(page_folder / "five.jsonl", [*tasks, copy])
    return page_folder / "five.jsonl"


LIMIT = 600  # seconds: ends a launch whose processes wait for each other; DeepSpeed first compiles its operators


def run_with_limit(command, seconds, **environment):
    """Runs a launcher. Ends it with all its processes after `seconds`, for example if they wait for each other."""
    path = os.pathsep.join([str(ROOT / "tests/mmr5_train"), str(ROOT)])
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"not finished after {seconds} s:\n{output[-3000:]}")
    return process.returncode, output


def launch(launch_file, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", f"configs/accelerate/{launch_file}.yaml", "-m", *arguments]
    returncode, output = run_with_limit(command, LIMIT)
    assert returncode == 0, output[-3000:]
    return output


@pytest.mark.parametrize(
    ("launch_file", "settings"),
    [
        ("zero3", ["model.lora={r:4,alpha:8}", "+trainer.ds3_gather_for_generation=false"]),
        ("zero3_offload", ["model.lora=null"]),
    ],
)
def test_grpo_trains_with_two_deepspeed_processes(launch_file, settings, questions, five_questions, tmp_path):
    heldout = f"heldout={{data:{five_questions},batch_size:1,max_new_tokens:4}}"
    out = tmp_path / "out"
    output = launch(launch_file, "launched", "grpo", f"data={questions}", f"out={out}", *GRPO, *settings, heldout)
    assert "grpo: 2 processes (deepspeed)" in output
    counts = read_manifest(out)["counts"]
    # All answers are cut off, so the checkpoints rank equally well, and the first is the best.
    assert (counts["processes"], counts["steps"], counts["model_step"]) == (2, 2, 1)
    assert (out / f"checkpoint-2/{COMPLETE}").is_file()
    history = json.loads((out / "log_history.json").read_text())
    ranked = [(e["step"], e["heldout/questions"]) for e in history if "heldout/recall@1" in e]
    assert ranked == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 5), (2, 5)]
    model, last = (AutoModelForImageTextToText.from_pretrained(out / name) for name in ("model", "last"))
    assert model.state_dict().keys() == last.state_dict().keys()
    if (out / "adapter").is_dir():
        name = "adapter_model.safetensors"
        assert (out / "adapter" / name).read_bytes() == (out / "checkpoint-1" / name).read_bytes()
    else:
        best = AutoModelForImageTextToText.from_pretrained(out / "checkpoint-1").state_dict()
        assert all(torch.equal(weight, best[name]) for name, weight in model.state_dict().items())


def test_distillation_at_batch_size_1_under_zero3(tmp_path):
    """A quarter of the prompts train a completion, in the same micro-batches on both processes."""
    make_evaluation(tmp_path / "evaluation", questions=5, draws=10)
    trainer = "trainer={per_device_train_batch_size:1,gradient_accumulation_steps:3,logging_steps:1}"
    data = f"data={tmp_path}/evaluation/rankings/sft+grpo.jsonl"
    settings = [data, trainer, f"out={tmp_path}/out", "subsets=2", "model.lora={r:4,alpha:8}"]
    launch("zero3", "mmr5_train.distill", *settings)
    history = json.loads((tmp_path / "out/log_history.json").read_text())
    steps = [entry for entry in history if "listwise_loss" in entry]
    # The fourth micro-batch of each process, which is the first one of the second step, has the completions.
    assert ["mean_token_accuracy" in entry for entry in steps][:2] == [False, True]


# Stand-ins for SLURM's programs. As with --kill-on-bad-exit, a machine that fails ends the others.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
command = sys.argv[sys.argv.index("bash"):]
nodes = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(i)}}, start_new_session=True)
    for i in range(int(os.environ["SLURM_NNODES"]))
]
while not any(node.poll() for node in nodes) and any(node.poll() is None for node in nodes):
    time.sleep(0.1)
failed = [node.returncode for node in nodes if node.returncode]
for node in nodes:
    if node.poll() is None:
        os.killpg(node.pid, signal.SIGKILL)
sys.exit(1 if failed else 0)
"""
SCONTROL = """#!/bin/sh
test "$1 $2 $3" = "show hostnames node[1-2]" && printf '127.0.0.1\\nlocalhost\\n'
"""


@pytest.fixture
def slurm(tmp_path, free_port):
    """Runs `scripts/train.slurm ARGUMENT…` as a job on two machines with one process each."""
    programs = tmp_path / "slurm"
    programs.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def submit(launch_file, restarts, *arguments):
        return run_with_limit(
            ["scripts/train.slurm", *arguments], LIMIT,
            PATH=f"{programs}{os.pathsep}{os.environ['PATH']}", PYTHON=sys.executable,
            LAUNCH=f"configs/accelerate/{launch_file}.yaml", GPUS_A_NODE="1", MASTER_PORT=str(free_port),
            SLURM_NNODES="2", SLURM_JOB_NODELIST="node[1-2]", SLURM_RESTART_COUNT=str(restarts),
        )  # fmt: skip

    return submit


@pytest.mark.parametrize(
    ("launch_file", "dtype"),
    [("zero2", "float32"), ("cpu", "bfloat16")],  # cpu: without DeepSpeed
)
def test_a_job_on_two_machines_survives_the_failure_of_one(
    launch_file, dtype, slurm, traces, five_questions, tmp_path
):
    out = tmp_path / "out"
    heldout = f"heldout={{data:{five_questions},batch_size:1,max_new_tokens:4}}"
    trainer = "trainer={per_device_train_batch_size:1,max_steps:4,save_steps:2,logging_steps:1,warmup_steps:0}"
    stage = ["launched", "sft", f"data={traces}", f"out={out}", trainer, heldout, f"model.dtype={dtype}"]
    stage += ["override_checkpoint=true"]
    returncode, output = slurm(launch_file, 0, *stage)
    assert returncode != 0, output[-3000:]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2"], output[-3000:]
    returncode, output = slurm(launch_file, 1, *stage)
    assert returncode == 0, output[-3000:]
    assert output.count(f"sft: resumes from {out / 'checkpoint-2'}") == 1
    counts = read_manifest(out)["counts"]
    assert (counts["processes"], counts["steps"]) == (2, 4)
    history = json.loads((out / "log_history.json").read_text())
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    ranked = [(e["step"], e["heldout/questions"]) for e in history if "heldout/recall@1" in e]
    assert ranked == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (2, 5), (4, 5)]
    weights = load_file(out / "model/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
