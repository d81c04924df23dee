"""GRPO runs that collapse, and one that does not: which alarms each run raises, and at which step.

    python scripts/benchmarks/collapses.py                        # about 20 minutes on two cores
    python scripts/benchmarks/collapses.py --runs released constant

All runs train the shipped model on the synthetic corpus and start from the same SFT checkpoint, except for two
that start from an early SFT checkpoint. Each run fails in a known way, except `default`, which has the demo's
settings. Stages whose results exist for the same settings are skipped. Prints the table in docs/training.md, and
writes outputs/collapses/collapses.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from bench_common import ROOT, Row, argument_parser, at_least, equal, print_targets, run_with_log, write_results

from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import is_unfinished, read_manifest
from mmr5_train.evaluation.alarms import read_alarms
from mmr5_train.recipe import STAGES, is_up_to_date

# name → (description, SFT steps (None: as in the recipe), settings of GRPO)
RUNS: dict[str, tuple[str, int | None, str]] = {
    "released": (
        "the released rewards, a large learning rate, few questions, no KL penalty",
        None,
        "reward=mm_r5 lr=1e-3 questions=4 group=8 temperature=0.9 beta=0 steps=150",
    ),
    "duplicates": (
        "the released rewards, no KL penalty: repeated ids cost nothing",
        None,
        "reward=mm_r5 lr=3e-4 questions=12 group=8 temperature=0.8 beta=0 steps=100",
    ),
    "answer_only": (
        "rewards only for the answer, no KL penalty",
        None,
        "reward=permutation lr=6e-4 questions=16 group=8 temperature=1 beta=0 steps=110",
    ),
    "early": (
        "SFT stopped long before its answers follow its verdicts, no KL penalty",
        25,
        "reward=gated lr=6e-4 questions=16 group=8 temperature=0.6 beta=0 steps=100",
    ),
    "constant": (
        "SFT stopped early, a weak KL penalty, a low temperature",
        25,
        "reward=gated lr=1e-3 questions=16 group=8 temperature=0.7 beta=0.02 steps=100",
    ),
    "default": (
        "the demo's settings",
        None,
        "reward=true_reasoning lr=6e-4 questions=16 group=6 temperature=1 beta=0.04 steps=70 schedule=linear",
    ),
}


def grpo_overrides(settings: str) -> list[str]:
    values = dict(setting.split("=") for setting in settings.split())
    rows = int(values["questions"]) * int(values["group"])
    return [
        f"reward={values['reward']}",
        f"trainer.per_device_train_batch_size={rows}",
        f"trainer.num_generations={values['group']}",
        f"trainer.temperature={values['temperature']}",
        f"trainer.learning_rate={values['lr']}",
        f"trainer.beta={values['beta']}",
        f"trainer.max_steps={values['steps']}",
        f"trainer.lr_scheduler_type={values.get('schedule', 'constant')}",
        "trainer.max_completion_length=112",
        "trainer.save_steps=25",
    ]


def run_stage(name: str, out: Path, *overrides: str) -> None:
    """Runs a stage on one core, unless its folder already holds the result of these settings."""
    module, model, entry = STAGES[name]
    if is_up_to_date(compose_stage(model, entry, [f"out={out}", *overrides])):
        print(f"{name}: already in {out}", flush=True)
        return
    overwrite = [] if is_unfinished(out, entry) else ["overwrite=true"]
    command = [sys.executable, "-m", module.__name__, f"out={out}", *overrides, *overwrite]
    print(" ".join(command[2:]), flush=True)
    run_with_log(command, out.parent / f"{out.name}.log", f"collapses: {name}", {"OMP_NUM_THREADS": "1"})


def run_shared_stages(folder: Path, seed: int) -> None:
    """Runs corpus, candidates, traces and SFT of the demo's recipe."""
    command = [sys.executable, "-m", "mmr5_train.recipe", "experiment=recommended", "size=tiny", f"seed={seed}"]
    left_out = "leave_out=[grpo,teach,distill,calibrate,evaluate,modes,report]"
    command += [f"out={folder}", f"shared={folder}", left_out]
    subprocess.run(command, cwd=ROOT, check=True)


def start_checkpoint(name: str, folder: Path, seed: int) -> Path:
    """Trains the SFT checkpoint that a run starts from. It must exist before parallel runs that share it start."""
    steps = RUNS[name][1]
    if steps is None:
        return folder / "sft/model"
    config = read_manifest(folder / "sft")["config"]
    lora = config["model"]["lora"]
    run_stage(
        "sft", folder / f"sft_{steps}", f"data={folder}/traces/traces.jsonl", f"seed={seed}",
        f"model.lora={{r:{lora['r']},alpha:{lora['alpha']}}}", f"trainer.max_steps={steps}",
        f"trainer.learning_rate={config['trainer']['learning_rate']}", "trainer.warmup_steps=5",
    )  # fmt: skip
    return folder / f"sft_{steps}/model"


def run_grpo(name: str, model: Path, folder: Path, seed: int) -> dict[str, Any]:
    description, _, settings = RUNS[name]
    out = folder / name
    run_stage(
        "grpo", out, f"data={folder}/select/questions.jsonl", f"model.path={model}", f"seed={seed}",
        f"heldout={{data:{folder}/data/heldout.jsonl,limit:128,batch_size:64,max_new_tokens:112}}",
        *grpo_overrides(settings),
    )  # fmt: skip
    return {"run": name, "what": description, **summary(out)}


def summary(out: Path) -> dict[str, Any]:
    """Means over the first and last five logged steps, held-out recall of greedy answers, and alarms."""
    history = json.loads((out / "log_history.json").read_text(encoding="utf-8"))

    def first_and_last(key: str) -> list[float] | None:
        values = [entry[key] for entry in history if entry.get(key) is not None]
        return [round(fmean(values[:5]), 3), round(fmean(values[-5:]), 3)] if values else None

    heldout = [entry["heldout/recall@1"] for entry in history if "heldout/recall@1" in entry]
    keys = ("answers/reranking", "answers/complete", "answers/true_verdicts", "answers/follow_verdicts", "entropy")
    return {
        "heldout": [round(value, 3) for value in heldout],
        **{key: first_and_last(key) for key in keys},
        "alarms": [[alarm.name, alarm.step] for alarm in read_alarms(out)],
    }


def targets(rows: list[Row]) -> list[Row]:
    results = []
    for row in rows:
        alarms = len(row["alarms"])
        if row["run"] == "default":
            results.append(equal("alarms of the run default", alarms, 0))
        else:
            results.append(at_least(f"alarms of the run {row['run']}", alarms, 1))
    return results


def table(rows: list[dict[str, Any]]) -> str:
    headers = {
        "heldout": "greedy R@1", "answers/reranking": "sampled reward", "answers/complete": "complete orders",
        "answers/true_verdicts": "true verdicts", "answers/follow_verdicts": "answers follow",
        "entropy": "entropy",
    }  # fmt: skip
    lines = ["| run | " + " | ".join(headers.values()) + " | alarms (step) |", "|" + "---|" * (len(headers) + 2)]
    for row in rows:
        cells = [f"{row[key][0]:.3f} → {row[key][-1]:.3f}" if row[key] else "–" for key in headers]
        alarms = ", ".join(f"{name} ({step})" for name, step in row["alarms"]) or "none"
        lines.append(f"| {row['run']} | " + " | ".join(cells) + f" | {alarms} |")
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, default=Path("outputs/collapses"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs, one core each")
    args = parser.parse_args()
    run_shared_stages(args.out, args.seed)
    models = {name: start_checkpoint(name, args.out, args.seed) for name in args.runs}
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda name: run_grpo(name, models[name], args.out, args.seed), args.runs))
    write_results(args.out / "collapses.json", {"seed": args.seed, "rows": rows}, targets(rows))
    print(table(rows))
    print_targets(targets(rows))


if __name__ == "__main__":
    main()
