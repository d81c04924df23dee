"""SFT compared to simple alternatives: training speed and startup time; and two processes compared to one.

    python scripts/benchmarks/bench_train.py  # or: make bench-train
    python scripts/benchmarks/bench_train.py --swift VENV/bin/swift  # also measures ms-swift

All alternatives train the same model on the same traces, with the same adapters, batches and settings. Each run is
a separate process, started as a user starts it. It logs to TensorBoard, which records the time of each step.

*Start* is the time from the launch to the end of the first step. *Examples per second* covers all later steps. The
loss curves of one and of two processes are compared step by step. Writes outputs/bench/train.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench_common import (
    OUTPUT,
    ROOT,
    Row,
    argument_parser,
    at_least,
    at_most,
    print_targets,
    run_with_log,
    write_results,
)

from mmr5_train.common.files import read_records
from mmr5_train.ranking.records import Trace

BATCH, STEPS, LEARNING_RATE = 16, 96, 1e-3  # three epochs of 512 traces
LORA = {"r": 16, "alpha": 32}
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def make_data(folder: Path) -> Path:
    """Creates the traces of a synthetic corpus with the demo's recipe, unless they exist."""
    if not (folder / "traces/traces.jsonl").is_file():
        command = [sys.executable, "-m", "mmr5_train.recipe", "experiment=sft_only", "size=tiny", f"out={folder}"]
        skipped = "sft,select,grpo,teach,distill,calibrate,evaluate,modes,report"
        command += ["stages.corpus.documents=120", f"leave_out=[{skipped}]"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "traces/traces.jsonl"


def trainer_settings(batch: int) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": batch, "max_steps": STEPS, "learning_rate": LEARNING_RATE,
        "warmup_steps": 0, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "tensorboard",
        "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip


def project_command(data: Path, out: Path, processes: int = 1) -> list[str]:
    trainer = trainer_settings(BATCH // processes) | {"logging_first_step": False}
    overrides = [f"trainer.{key}={str(value).lower()}" for key, value in trainer.items()]
    overrides += [
        f"data={data}",
        f"out={out}",
        "overwrite=true",
        f"model.lora={{r:{LORA['r']},alpha:{LORA['alpha']}}}",
    ]
    if processes == 1:
        return [sys.executable, "-m", "mmr5_train.sft", *overrides]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    return [*launch, "--num_processes", str(processes), "-m", "mmr5_train.sft", *overrides]


def bare_trl_command(data: Path, out: Path) -> list[str]:
    return [sys.executable, __file__, "--bare-trl", str(data), "--out", str(out)]


def run_bare_trl(data: Path, out: Path) -> None:
    """A minimal script with TRL's trainer and default settings. It opens all images before training."""
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    from mmr5_train.models.loading import TINY

    rows = [as_messages(trace) for trace in read_records(data, Trace)]
    for row in rows:
        row["images"] = [Image.open(data.parent / path).convert("RGB").resize((84, 112)) for path in row["images"]]
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype="float32")
    model.model.visual.requires_grad_(False)
    SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(out), seed=42, use_cpu=True, bf16=False, max_length=None, dataloader_pin_memory=False,
            **trainer_settings(BATCH),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(TINY),
        peft_config=LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
    ).train()  # fmt: skip


def as_messages(trace: Trace) -> dict[str, Any]:
    """A trace in the chat format of TRL and ms-swift: prompt and completion messages with image placeholders."""
    from mmr5_train.common.config import compose_stage
    from mmr5_train.ranking.prompt import build_messages, render_completion
    from mmr5_train.sft import SftStage

    prompt = compose_stage(SftStage, "sft", ["prompt=default"]).prompt
    return {
        "prompt": build_messages(prompt, trace.query, len(trace.shown)),
        "completion": [{"role": "assistant", "content": render_completion(trace.think, trace.answer)}],
        "images": [page.image for page in trace.shown],
    }


def swift_command(program: Path, data: Path, out: Path) -> list[str]:
    """The command of ms-swift. Writes the traces in its format, with <image> where each page goes."""
    from mmr5_train.models.loading import TINY

    lines = []
    for trace in read_records(data, Trace):
        row = as_messages(trace)
        messages = [
            {"role": message["role"], "content": flatten_content(message["content"])}
            for message in row["prompt"] + row["completion"]
        ]
        images = [str((data.parent / path).resolve()) for path in row["images"]]
        lines.append(json.dumps({"messages": messages, "images": images}))
    out.mkdir(parents=True, exist_ok=True)
    (out / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values: dict[str, Any] = {
        "model": TINY, "model_type": "qwen2_5_vl", "template": "qwen2_5_vl", "dataset": out / "data.jsonl",
        "output_dir": out / "run", "tuner_type": "lora", "lora_rank": LORA["r"], "lora_alpha": LORA["alpha"],
        "target_regex": TARGETS, "freeze_vit": True, "torch_dtype": "float32", "attn_impl": "sdpa",
        "max_length": 32768, "split_dataset_ratio": 0, "seed": 42, "use_hf": True, "check_model": False,
        **trainer_settings(BATCH),
    }  # fmt: skip
    return [
        str(program),
        "sft",
        *(f"--{key}={str(value).lower() if value in (True, False) else value}" for key, value in values.items()),
    ]


def flatten_content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def measure(command: list[str], out: Path, env: dict[str, str]) -> dict[str, Any]:
    """Runs a training with its log in OUT.log, and returns its speed and losses."""
    for earlier_events in ("runs", "run"):
        shutil.rmtree(out / earlier_events, ignore_errors=True)
    started = time.time()
    run_with_log(command, out.parent / f"{out.name}.log", f"bench_train: {' '.join(map(str, command[:6]))} …", env)
    times, losses = read_events(out)
    return {
        "start_s": round(times[0] - started, 1),
        "examples_per_s": round(BATCH * (len(times) - 1) / (times[-1] - times[0]), 2),
        "losses": losses,
    }


def read_events(folder: Path) -> tuple[list[float], list[float]]:
    """The time and the loss of each logged step, from the TensorBoard files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            scalars = events.Scalars("train/loss")
            return [event.wall_time for event in scalars], [event.value for event in scalars]
    raise SystemExit(f"bench_train: {folder}: expected TensorBoard events with train/loss, found none")


def measure_all(
    runs: dict[str, tuple[list[str], dict[str, str]]], folder: Path, repeats: int
) -> list[dict[str, Any]]:
    """One row per run with the medians. Runs take turns, so that a slow hour of the machine affects all."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (command, env) in runs.items():
            measured[name].append(measure(command, folder / name, env))
    return [
        {
            "way": name,
            "start_s": median(result["start_s"] for result in results),
            "examples_per_s": median(result["examples_per_s"] for result in results),
            "losses": results[0]["losses"],
        }
        for name, results in measured.items()
    ]


def targets(speeds: dict[str, float], loss_difference: float) -> list[Row]:
    fastest_alternative = max(speed for name, speed in speeds.items() if name in ("bare_trl", "ms_swift"))
    return [
        at_least("examples per second, relative to the fastest alternative",
                 speeds["mmr5_train"] / fastest_alternative, 1),
        at_most("largest difference between the losses of one and of two processes", loss_difference, 1e-3),
    ]  # fmt: skip


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--swift", type=Path, help="the program `swift` in an environment with ms-swift")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUTPUT / "train", help="folder of the runs")
    parser.add_argument("--bare-trl", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare_trl:
        run_bare_trl(args.bare_trl, args.out)
        return
    data = make_data(args.out / "data")
    one_thread = {"OMP_NUM_THREADS": "1"}
    runs: dict[str, tuple[list[str], dict[str, str]]] = {
        "mmr5_train": (project_command(data, args.out / "mmr5_train"), {}),
        "bare_trl": (bare_trl_command(data, args.out / "bare_trl"), {}),
        "two_processes": (project_command(data, args.out / "two_processes", 2), one_thread),
        "one_thread": (project_command(data, args.out / "one_thread"), one_thread),
    }
    if args.swift:
        limits = {"MIN_PIXELS": "784", "MAX_PIXELS": "9500", "USE_HF": "1"}
        runs["ms_swift"] = (swift_command(args.swift, data, args.out / "ms_swift"), limits)
    rows = measure_all(runs, args.out, args.repeats)
    losses = {row["way"]: row["losses"] for row in rows}
    pairs = zip(losses["mmr5_train"], losses["two_processes"], strict=True)
    difference = max(abs(first - second) for first, second in pairs)
    met = targets({row["way"]: row["examples_per_s"] for row in rows}, difference)
    write_results(args.out.parent / "train.json", {"rows": rows, "one_and_two_processes_apart": difference}, met)
    for row in rows:
        print(f"{row['way']:<14} start {row['start_s']:>6.1f} s   {row['examples_per_s']:>7.2f} examples/s")
    print(f"largest difference between the losses of one and of two processes: {difference:.2g}")
    print_targets(met)


if __name__ == "__main__":
    main()
