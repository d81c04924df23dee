"""SFT throughput and start-up beside the plain ways, and two processes beside one.

    python scripts/benchmarks/bench_train.py  # make bench-train
    python scripts/benchmarks/bench_train.py --swift VENV/bin/swift  # ms-swift too

The same traces, shipped model, adapters, batches and settings for each; every run is a process of its own, as a
user starts it, and logs to TensorBoard, whose events hold the time of each step. *Start* is from the launch to the
end of the first step. *Examples a second* are those of all later steps. Loss curves are compared step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from mmr5_train.common.files import read_records, write_json
from mmr5_train.ranking.records import Trace

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS, RATE = 16, 96, 1e-3  # three epochs of 512 traces
LORA = {"r": 16, "alpha": 32}
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def make_data(folder: Path) -> Path:
    """Traces of a synthetic corpus, as the demo makes them."""
    if not (folder / "traces/traces.jsonl").is_file():
        command = [sys.executable, "-m", "mmr5_train.recipe", "experiment=sft_only", "size=tiny", f"out={folder}"]
        later = "sft,select,grpo,teach,distill,evaluate,modes,report"
        command += ["stages.corpus.documents=120", f"leave_out=[{later}]"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "traces/traces.jsonl"


def settings(batch: int) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": batch, "max_steps": STEPS, "learning_rate": RATE, "warmup_steps": 0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "tensorboard", "save_strategy": "no",
        "gradient_checkpointing": False,
    }  # fmt: skip


def ours(data: Path, out: Path, processes: int = 1) -> list[str]:
    trainer = settings(BATCH // processes) | {"logging_first_step": False}
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


def bare_trl(data: Path, out: Path) -> list[str]:
    return [sys.executable, __file__, "--bare-trl", str(data), "--out", str(out)]


def run_bare_trl(data: Path, out: Path) -> None:
    """What a user would write with TRL alone: every picture opened at once, the trainer as it comes."""
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
            **settings(BATCH),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(TINY),
        peft_config=LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
    ).train()  # fmt: skip


def as_messages(trace: Trace) -> dict[str, Any]:
    """A trace in the chat format that trainers share: prompt and completion messages, pages as placeholders."""
    from mmr5_train.common.config import compose_stage
    from mmr5_train.ranking.prompt import build_messages, render_completion
    from mmr5_train.sft import SftStage

    prompt = compose_stage(SftStage, "sft", []).prompt
    return {
        "prompt": build_messages(prompt, trace.query, len(trace.shown)),
        "completion": [{"role": "assistant", "content": render_completion(trace.think, trace.answer)}],
        "images": [page.image for page in trace.shown],
    }


def swift(program: Path, data: Path, out: Path) -> list[str]:
    """ms-swift on the same traces in its own format: <image> where a page stands."""
    from mmr5_train.models.loading import TINY

    lines = []
    for trace in read_records(data, Trace):
        row = as_messages(trace)
        messages = [
            {"role": message["role"], "content": flat(message["content"])}
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
        **settings(BATCH),
    }  # fmt: skip
    return [
        str(program),
        "sft",
        *(f"--{key}={str(value).lower() if value in (True, False) else value}" for key, value in values.items()),
    ]


def flat(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def measure(command: list[str], out: Path, env: dict[str, str]) -> dict[str, Any]:
    for events_of_before in ("runs", "run"):
        shutil.rmtree(out / events_of_before, ignore_errors=True)
    started = time.time()
    with (out.parent / f"{out.name}.log").open("w") as log:
        ended = subprocess.run(command, cwd=ROOT, env=os.environ | env, stdout=log, stderr=subprocess.STDOUT)
    if ended.returncode:
        tail = (out.parent / f"{out.name}.log").read_text()[-2000:]
        raise SystemExit(f"bench_train: {' '.join(map(str, command[:6]))} … failed:\n{tail}")
    times, losses = events(out)
    return {
        "start_s": round(times[0] - started, 1),
        "examples_per_s": round(BATCH * (len(times) - 1) / (times[-1] - times[0]), 2),
        "losses": losses,
    }


def events(folder: Path) -> tuple[list[float], list[float]]:
    """When each step was logged, and its loss, from the TensorBoard files under a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in sorted(folder.rglob("events.out.tfevents.*")):
        found = EventAccumulator(str(path)).Reload()
        if "train/loss" in found.Tags()["scalars"]:
            scalars = found.Scalars("train/loss")
            return [event.wall_time for event in scalars], [event.value for event in scalars]
    raise SystemExit(f"bench_train: no TensorBoard events with a loss under {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swift", type=Path, help="the program `swift` of an environment with ms-swift")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench/train")
    parser.add_argument("--bare-trl", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare_trl:
        run_bare_trl(args.bare_trl, args.out)
        return
    data = make_data(args.out / "data")
    one_thread = {"OMP_NUM_THREADS": "1"}
    ways: dict[str, tuple[list[str], dict[str, str]]] = {
        "mmr5_train": (ours(data, args.out / "mmr5_train"), {}),
        "bare_trl": (bare_trl(data, args.out / "bare_trl"), {}),
        "two_processes": (ours(data, args.out / "two_processes", 2), one_thread),
        "one_thread": (ours(data, args.out / "one_thread"), one_thread),
    }
    if args.swift:
        limits = {"MIN_PIXELS": "784", "MAX_PIXELS": "9500", "USE_HF": "1"}
        ways["ms_swift"] = (swift(args.swift, data, args.out / "ms_swift"), limits)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(args.repeats):  # in turn, so that a slow hour of the machine is everyone's
        for name, (command, env) in ways.items():
            found[name].append(measure(command, args.out / name, env))
    rows = [
        {
            "way": name,
            "start_s": median(run["start_s"] for run in runs),
            "examples_per_s": median(run["examples_per_s"] for run in runs),
            "losses": runs[0]["losses"],
        }
        for name, runs in found.items()
    ]
    one, two = (
        next(row["losses"] for row in rows if row["way"] == way) for way in ("mmr5_train", "two_processes")
    )
    apart = max(abs(a - b) for a, b in zip(one, two, strict=True))
    write_json(args.out.parent / "train.json", {"rows": rows, "one_and_two_processes_apart": apart})
    for row in rows:
        print(f"{row['way']:<14} start {row['start_s']:>6.1f} s   {row['examples_per_s']:>7.2f} examples/s")
    print(f"losses of one and of two processes: {apart:.2g} apart at most")


if __name__ == "__main__":
    main()
