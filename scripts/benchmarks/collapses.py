"""GRPO runs that collapse, and the one that holds: which alarm rings, and when.

    python scripts/benchmarks/collapses.py                        # about 20 minutes on two cores
    python scripts/benchmarks/collapses.py --runs released constant

The shipped model on the synthetic corpus, from one SFT (two of the runs start from one that was stopped early).
Each run fails in a way that trainings are known to fail; `default` is the recipe of the demo. What was made is not
made again. docs/training.md holds the table that this writes, and outputs/collapses/collapses.json the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import is_unfinished, read_manifest, write_json
from mmr5_train.evaluation.alarms import read_alarms
from mmr5_train.recipe import STAGES, is_up_to_date

ROOT = Path(__file__).resolve().parents[2]
# name → (what is wrong with it, SFT steps (None: the recipe's), settings of GRPO)
RUNS: dict[str, tuple[str, int | None, str]] = {
    "released": (
        "the released rewards, a large learning rate, few questions, no KL",
        None,
        "reward=mm_r5 lr=1e-3 questions=4 group=8 temperature=0.9 beta=0 steps=150",
    ),
    "duplicates": (
        "the released rewards, no KL: an id twice costs nothing",
        None,
        "reward=mm_r5 lr=3e-4 questions=12 group=8 temperature=0.8 beta=0 steps=100",
    ),
    "unheld": (
        "only the answer is paid, no KL",
        None,
        "reward=permutation lr=6e-4 questions=16 group=8 temperature=1 beta=0 steps=110",
    ),
    "early": (
        "SFT stopped long before its answers follow its verdicts, no KL",
        25,
        "reward=gated lr=6e-4 questions=16 group=8 temperature=0.6 beta=0 steps=100",
    ),
    "constant": (
        "SFT stopped early, a weak KL, a low temperature",
        25,
        "reward=gated lr=1e-3 questions=16 group=8 temperature=0.7 beta=0.02 steps=100",
    ),
    "default": (
        "the recipe of the demo",
        None,
        "reward=gated lr=3e-4 questions=16 group=6 temperature=1 beta=0.04 steps=100 schedule=linear",
    ),
}


def grpo_overrides(settings: str) -> list[str]:
    given = dict(setting.split("=") for setting in settings.split())
    rows = int(given["questions"]) * int(given["group"])
    return [
        f"reward={given['reward']}",
        f"trainer.per_device_train_batch_size={rows}",
        f"trainer.num_generations={given['group']}",
        f"trainer.temperature={given['temperature']}",
        f"trainer.learning_rate={given['lr']}",
        f"trainer.beta={given['beta']}",
        f"trainer.max_steps={given['steps']}",
        f"trainer.lr_scheduler_type={given.get('schedule', 'constant')}",
        "trainer.max_completion_length=112",
        "trainer.save_steps=25",
    ]


def stage(name: str, out: Path, *overrides: str) -> None:
    """Runs a stage, on one core, unless its folder holds what these settings make."""
    module, model, entry = STAGES[name]
    if is_up_to_date(compose_stage(model, entry, [f"out={out}", *overrides])):
        print(f"{name}: already in {out}", flush=True)
        return
    anew = [] if is_unfinished(out, entry) else ["overwrite=true"]
    command = [sys.executable, "-m", module.__name__, f"out={out}", *overrides, *anew]
    print(" ".join(command[2:]), flush=True)
    log = out.parent / f"{out.name}.log"
    with log.open("w") as stream:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise SystemExit(f"collapses: {name} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")


def make_shared(folder: Path, seed: int) -> None:
    """Corpus, candidates, traces and SFT of the demo's recipe."""
    command = [sys.executable, "-m", "mmr5_train.recipe", "experiment=recommended", "size=tiny", f"seed={seed}"]
    command += [f"out={folder}", f"shared={folder}", "leave_out=[grpo,teach,distill,evaluate,modes,report]"]
    subprocess.run(command, cwd=ROOT, check=True)


def start(name: str, folder: Path, seed: int) -> Path:
    """The SFT checkpoint that a run starts from; made first, since runs at a time may share it."""
    steps = RUNS[name][1]
    if steps is None:
        return folder / "sft/model"
    config = read_manifest(folder / "sft")["config"]
    lora = config["model"]["lora"]
    stage(
        "sft", folder / f"sft_{steps}", f"data={folder}/traces/traces.jsonl", f"seed={seed}",
        f"model.lora={{r:{lora['r']},alpha:{lora['alpha']}}}", f"trainer.max_steps={steps}",
        f"trainer.learning_rate={config['trainer']['learning_rate']}", "trainer.warmup_steps=5",
    )  # fmt: skip
    return folder / f"sft_{steps}/model"


def run(name: str, model: Path, folder: Path, seed: int) -> dict[str, Any]:
    what, _, settings = RUNS[name]
    out = folder / name
    stage(
        "grpo", out, f"data={folder}/select/questions.jsonl", f"model.path={model}", f"seed={seed}",
        f"heldout={{data:{folder}/data/heldout.jsonl,limit:128,batch_size:64,max_new_tokens:112}}",
        *grpo_overrides(settings),
    )  # fmt: skip
    return {"run": name, "what": what, **summary(out)}


def summary(out: Path) -> dict[str, Any]:
    """First and last of what matters: five logged steps each, or the held-out questions' greedy answers."""
    history = json.loads((out / "log_history.json").read_text(encoding="utf-8"))

    def ends(key: str) -> list[float] | None:
        values = [entry[key] for entry in history if entry.get(key) is not None]
        return [round(fmean(values[:5]), 3), round(fmean(values[-5:]), 3)] if values else None

    heldout = [entry["heldout/recall@1"] for entry in history if "heldout/recall@1" in entry]
    keys = ("answers/reranking", "answers/complete", "answers/true_verdicts", "answers/follow_verdicts", "entropy")
    return {
        "heldout": [round(value, 3) for value in heldout],
        **{key: ends(key) for key in keys},
        "alarms": [[alarm.name, alarm.step] for alarm in read_alarms(out)],
    }


def table(rows: list[dict[str, Any]]) -> str:
    heads = {
        "heldout": "greedy R@1", "answers/reranking": "sampled reward", "answers/complete": "complete orders",
        "answers/true_verdicts": "true verdicts", "answers/follow_verdicts": "answers follow",
        "entropy": "entropy",
    }  # fmt: skip
    lines = ["| run | " + " | ".join(heads.values()) + " | alarms (step) |", "|" + "---|" * (len(heads) + 2)]
    for row in rows:
        cells = [f"{row[key][0]:.3f} → {row[key][-1]:.3f}" if row[key] else "–" for key in heads]
        rang = ", ".join(f"{name} ({step})" for name, step in row["alarms"]) or "none"
        lines.append(f"| {row['run']} | " + " | ".join(cells) + f" | {rang} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, default=Path("outputs/collapses"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    args = parser.parse_args()
    make_shared(args.out, args.seed)
    models = {name: start(name, args.out, args.seed) for name in args.runs}
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda name: run(name, models[name], args.out, args.seed), args.runs))
    write_json(args.out / "collapses.json", {"seed": args.seed, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
