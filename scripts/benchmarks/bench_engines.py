"""vLLM beside transformers on one machine: equal answers, questions per second, and GRPO with vLLM's rollouts.

    VLLM_ENV=FOLDER python scripts/benchmarks/bench_engines.py    # make test-vllm

`VLLM_ENV` is a virtual environment with vLLM and this project. On a machine without a GPU, it needs a build of
vLLM for CPUs. All models are in float32, and both engines have the same cores.

- *offline*: `mmr5_train.evaluate` ranks the same questions in process and with `backend: vllm`, with and without
  constraints, with the tiny model and with a small model that has the tokenizer of Qwen2.5.
- *servers*: `vllm serve` with and without reasoning parsers, asked by `mmr5_train.evaluate` for constrained
  answers.
- *rollouts*: three GRPO steps with vLLM in colocate mode (vllm_grpo.py). Then the same completions again without
  vLLM, with TRL's trainer and with shared prefixes; and three steps with the trainer's own rollouts.

Writes outputs/bench/engines.json. Parts whose output exists are not run again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_common import (
    OUTPUT,
    ROOT,
    Row,
    argument_parser,
    at_least,
    at_most,
    equal,
    machine,
    print_targets,
    run_with_log,
    write_results,
)
from standin import write_standin
from standin_form import train_form

from mmr5_train.common.files import read_records
from mmr5_train.models.loading import TINY
from mmr5_train.ranking.records import Ranking

ENGINE = "{enforce_eager:true,gpu_memory_utilization:0.3}"
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # no effect with a GPU
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
PARSERS = ("", "deepseek_r1", "qwen3")
STEPS = 3
TRAINER = (
    "per_device_train_batch_size:24,gradient_accumulation_steps:1,num_generations:6,num_iterations:1,"
    f"max_steps:{STEPS},learning_rate:0.0,warmup_steps:0,max_completion_length:160,save_strategy:'no'"
)
COLOCATE = (
    "use_vllm=true",
    "vllm_mode=colocate",
    "vllm_gpu_memory_utilization=0.3",
    "vllm_enable_sleep_mode=false",
)
UNCORRECTED = "vllm_importance_sampling_correction=false"
ANSWERS_EQUAL, RATIO, REWARD, LOSS = 0.99, 0.02, 0.1, 1e-4


def vllm_python() -> str:
    folder = os.environ.get("VLLM_ENV")
    if not folder or not (Path(folder) / "bin/python").exists():
        raise SystemExit("bench-engines: set VLLM_ENV to a virtual environment with vLLM and this project")
    return str(Path(folder) / "bin/python")


def prepare(folder: Path) -> dict[str, Path]:
    """The checkpoints. Writes a small synthetic corpus and its candidates, too."""
    if not (folder / "data/manifest.json").exists():
        for module, overrides in (
            ("synthetic", ["documents=40", f"out={folder / 'corpus'}"]),
            ("candidates", [f"corpus.folder={folder / 'corpus'}", f"out={folder / 'data'}", "missed=keep"]),
        ):
            command = [sys.executable, "-m", f"data_construction.{module}", "seed=0", "overwrite=true", *overrides]
            run_with_log(command, folder / f"{module}.log", module)
    standin = folder / "standin"
    if not (standin / "trained").exists():
        shutil.rmtree(standin, ignore_errors=True)
        write_standin(standin, "qwen2_5_vl")
        train_form(standin)
        (standin / "trained").touch()
    return {"tiny": TINY, "standin": standin}


def evaluate(python: str, folder: Path, name: str, systems: str, *overrides: str) -> Path:
    """Runs `mmr5_train.evaluate`, unless it has run. Returns its output folder."""
    out = folder / name
    if not (out / "results.json").exists():
        command = [python, "-m", "mmr5_train.evaluate", f"data={folder / 'data/heldout.jsonl'}", f"out={out}"]
        settings = [
            "model.dtype=float32",
            "batch_size=100",
            "max_new_tokens=200",
            f"systems={systems}",
            *overrides,
        ]
        run_with_log([*command, *settings], folder / f"{name}.log", name, CPU | QUIET)
    return out


def share_equal(out: Path, system: str, reference: str) -> float:
    """The share of questions to which both systems gave the same text."""
    texts = [
        [ranking.greedy.completion for ranking in read_records(out / f"rankings/{name}.jsonl", Ranking)]
        for name in (system, reference)
    ]
    return sum(a == b for a, b in zip(*texts, strict=True)) / len(texts[0])


def offline(folder: Path, checkpoints: dict[str, Path], questions: int) -> Iterator[Row]:
    for model, checkpoint in checkpoints.items():
        base = f"checkpoint:{checkpoint}"
        engine = f"{base},backend:vllm,vllm:{ENGINE}"
        systems = f"{{process:{{{base}}},vllm:{{{engine}}},"
        systems += f"process_constrained:{{{base},constrain:true}},vllm_constrained:{{{engine},constrain:true}}}}"
        settings = (
            [] if model == "tiny" else ["prompt=default", "override_checkpoint=true", "model.max_pixels=50176"]
        )
        out = evaluate(vllm_python(), folder, f"offline_{model}", systems, f"limit={questions}", *settings)
        timing = json.loads((out / "timing.json").read_text(encoding="utf-8"))
        for suffix in ("", "_constrained"):
            seconds = {name: timing[name + suffix]["seconds_per_question"] for name in ("process", "vllm")}
            yield {
                "part": "offline", "model": model, "constrained": bool(suffix), "questions": questions,
                "equal": share_equal(out, f"vllm{suffix}", f"process{suffix}"),
                "process_questions_per_s": 1 / seconds["process"], "vllm_questions_per_s": 1 / seconds["vllm"],
            }  # fmt: skip


@contextmanager
def vllm_server(checkpoint: Path, log: Path, parser: str) -> Iterator[str]:
    """Runs `vllm serve`. Yields its base URL."""
    port = 8765
    command = [str(Path(vllm_python()).with_name("vllm")), "serve", str(checkpoint), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "m", "--dtype", "float32", "--enforce-eager"]
    command += ["--gpu-memory-utilization", "0.3", *(["--reasoning-parser", parser] if parser else [])]
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, **CPU, **QUIET})
    try:
        opener, deadline = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + 300
        while True:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench-engines: vllm serve did not start:\n{log.read_text()[-2000:]}")
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def servers(folder: Path, checkpoint: Path, questions: int) -> Iterator[Row]:
    """Constrained answers over HTTP, compared to those in process."""
    for parser in PARSERS:
        name = f"server_{parser or 'plain'}"
        if not (folder / name / "results.json").exists():
            with vllm_server(checkpoint, folder / f"{name}.server.log", parser) as url:
                server = f"{{url:'{url}',model:m,structured:vllm}}"
                systems = (
                    f"{{process:{{checkpoint:{checkpoint}}},server:{{checkpoint:{checkpoint},server:{server}}}}}"
                )
                evaluate(sys.executable, folder, name, systems, f"limit={questions}", "constrain=true")
        yield {
            "part": "servers", "reasoning_parser": parser, "questions": questions,
            "equal": share_equal(folder / name, "server", "process"),
        }  # fmt: skip


def rollouts(folder: Path, checkpoint: Path) -> Row:
    """GRPO with vLLM's rollouts, the same completions without vLLM, and the trainer's own rollouts."""
    recorded = folder / "rollouts.json"
    runs = {
        "vllm": ("record", "never", COLOCATE),
        "vllm_uncorrected": ("record", "never", (*COLOCATE, UNCORRECTED)),
        "replay_trl": ("replay", "never", ()),
        "replay_shared": ("replay", "always", ()),
        "own": ("own", "always", ()),
    }
    for name, (kind, shared, fields) in runs.items():
        if (folder / name / "manifest.json").exists():
            continue
        script = [str(ROOT / "scripts/benchmarks/vllm_grpo.py"), kind, str(recorded)]
        command = [vllm_python(), *(["-m", "mmr5_train.grpo"] if kind == "own" else script)]
        trainer = [f"trainer={{{TRAINER}}}", *(f"+trainer.{field}" for field in fields)]
        command += [f"data={folder / 'data/select.jsonl'}", f"model.path={checkpoint}", "model.dtype=float32"]
        command += [
            "prompt=default",
            f"out={folder / name}",
            f"shared_prefix={shared}",
            "seed=0",
            "overwrite=true",
        ]
        environment = CPU | QUIET | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        run_with_log([*command, "reward=gated", *trainer], folder / f"{name}.log", name, environment)
    steps = {name: logged_steps(folder / name) for name in runs}
    ratio = [step["sampling/importance_sampling_ratio/mean"] for step in steps["vllm"]]
    return {
        "part": "rollouts", "steps": STEPS, "importance_ratio": ratio,
        "importance_ratio_least": [step["sampling/importance_sampling_ratio/min"] for step in steps["vllm"]],
        "reward": {name: [step["reward"] for step in rows] for name, rows in steps.items()},
        "loss": {name: [step["loss"] for step in rows] for name, rows in steps.items()},
    }  # fmt: skip


def logged_steps(folder: Path) -> list[Row]:
    history = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    return [entry for entry in history if "reward" in entry]


def targets(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        if row["part"] == "offline":
            name = f"{row['model']}{', constrained' if row['constrained'] else ''}"
            yield at_least(f"offline, {name}: equal answers", row["equal"], ANSWERS_EQUAL)
            relative = row["vllm_questions_per_s"] / row["process_questions_per_s"]
            yield at_least(f"offline, {name}: questions per second, relative to in process", relative, 1)
        elif row["part"] == "servers":
            yield at_least(
                f"server, reasoning parser {row['reasoning_parser'] or 'none'}: equal answers",
                row["equal"],
                ANSWERS_EQUAL,
            )
        else:
            yield from rollout_targets(row)


def rollout_targets(row: Row) -> Iterator[Row]:
    yield equal("rollouts: steps in which vLLM read the trainer's tokens", len(row["importance_ratio"]), STEPS)
    largest = max(abs(ratio - 1) for ratio in row["importance_ratio"])
    yield at_most("rollouts: mean importance ratio, difference from 1", largest, RATIO)
    reward, loss = row["reward"], row["loss"]
    means = {name: sum(values) / STEPS for name, values in reward.items()}
    yield at_most("rollouts: mean reward below that of own rollouts", means["own"] - means["vllm"], REWARD)
    for name in ("replay_trl", "replay_shared"):
        for what, bound, values in (("loss", LOSS, loss), ("reward", 1e-6, reward)):
            pairs = zip(values["vllm_uncorrected"], values[name], strict=True)
            difference = max(abs(a - b) for a, b in pairs)
            yield at_most(f"rollouts: difference in {what}, the same completions, {name}", difference, bound)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=OUTPUT / "engines", help="folder of the runs")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--parts", nargs="+", default=["offline", "servers", "rollouts"])
    parser.add_argument("--out", type=Path, default=OUTPUT / "engines.json")
    args = parser.parse_args()
    vllm_python()
    args.folder.mkdir(parents=True, exist_ok=True)
    checkpoints = prepare(args.folder)
    rows: list[Row] = []
    if "offline" in args.parts:
        rows += offline(args.folder, checkpoints, args.questions)
    if "servers" in args.parts:
        rows += servers(args.folder, checkpoints["tiny"], min(40, args.questions))
    if "rollouts" in args.parts:
        rows.append(rollouts(args.folder, checkpoints["tiny"]))
    results: dict[str, Any] = {"machine": machine(), "rows": rows}
    checked = list(targets(rows))
    write_results(args.out, results, checked)
    for row in rows:
        print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}))
    print_targets(checked)
    if not all(target["met"] for target in checked):
        raise SystemExit("bench-engines: a target is not met")


if __name__ == "__main__":
    main()
