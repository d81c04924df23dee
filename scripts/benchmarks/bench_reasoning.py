"""Does reasoning pay? Models that reason and models that answer directly, from the same base and data.

    python scripts/benchmarks/bench_reasoning.py    # make bench-reasoning: writes outputs/bench/reasoning.json

For each seed and number of candidates, `size=tiny` trains (SFT, then GRPO):

- reasoning: the recipe `recommended`, and from it by distillation `logits`, which ranks in one forward pass
- direct: the recipe `no_think`, with the same numbers of steps
- direct_compute: the same with as many tokens read and written in training as `reasoning`
- direct_time: the same with as many seconds of training as `reasoning`

All of them rank the same held-out questions. The table has recall@k with paired differences from `reasoning`, and
the seconds of a question. Runs JOBS jobs at a time, with one thread each. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import numpy as np
from bench_common import (
    OUTPUT,
    ROOT,
    Row,
    argument_parser,
    equal,
    machine,
    print_targets,
    run_with_log,
    write_results,
)

from mmr5_train.common.files import read_records
from mmr5_train.compare import Run, difference
from mmr5_train.evaluation.metrics import question_table
from mmr5_train.evaluation.scoring import question_values
from mmr5_train.ranking.records import Ranking

MODELS = ("reasoning", "direct", "direct_compute", "direct_time", "logits")
TYPES = ("catalogue", "users", "users_unseen")
FIGURES = ("recall@1", "recall@3", "recall@5")
STEPS = {"sft": 50, "grpo": 40}
COMPLETION = {5: 112, 8: 160}  # candidates → longest completion that the reasoning about them needs
GROUP = 6  # completions of a prompt, which is read once for all of them
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def run_stage(arguments: Sequence[str], log: Path) -> None:
    run_with_log([sys.executable, "-m", *arguments], log, str(log), ENVIRONMENT)


def train(name: str, folder: Path, seed: int, candidates: int, steps: dict[str, int]) -> None:
    """Trains one model; `logits` belongs to `reasoning`. Stages that are up to date are skipped."""
    experiment = "[recommended,distilled]" if name == "reasoning" else "[recommended,no_think]"
    distilling = "" if name == "reasoning" else ",teach,distill"
    overrides = [
        f"experiment={experiment}", "size=tiny", f"seed={seed}",
        f"shared={folder / 'shared'}", f"out={folder / name}",
        f"leave_out=[evaluate,report,calibrate,modes{distilling}]", f"stages.candidates.candidates={candidates}",
        *(f"stages.{stage}.trainer.max_steps={count}" for stage, count in steps.items()),
    ]  # fmt: skip
    if name == "reasoning":
        overrides += [
            f"stages.grpo.trainer.max_completion_length={COMPLETION[candidates]}",
            f"stages.teach.max_new_tokens={COMPLETION[candidates]}",
        ]
    run_stage(["mmr5_train.recipe", *overrides], folder / f"{name}.log")


def training_cost(recipe: Path) -> dict[str, Row]:
    """Stage → seconds, and tokens read and written per step, from the logs of a finished recipe."""
    stages = json.loads((recipe / "recipe.json").read_text(encoding="utf-8"))["stages"]
    costs: dict[str, Row] = {}
    for stage in STEPS:
        out = Path(stages[stage]["out"])
        history = json.loads((out / "log_history.json").read_text(encoding="utf-8"))
        entries = [entry for entry in history if "num_tokens" in entry]
        tokens, steps = entries[-1]["num_tokens"], entries[-1]["step"]
        if stage == "grpo":  # the log counts the prompt once for each completion
            written = fmean(entry["completions/mean_length"] for entry in entries)
            share = written / (tokens / steps / rollouts(out))
            tokens *= share + (1 - share) / GROUP
        costs[stage] = {"seconds": stages[stage]["seconds"], "tokens": tokens, "steps": steps}
    return costs


def rollouts(grpo: Path) -> int:
    """Completions of a step."""
    trainer = json.loads((grpo / "manifest.json").read_text(encoding="utf-8"))["config"]["trainer"]
    batch: int = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]
    return batch


def equal_steps(reasoning: dict[str, Row], direct: dict[str, Row], cost: str) -> dict[str, int]:
    """Stage → steps with which the direct model costs as much as the reasoning model."""
    return {stage: round(STEPS[stage] * reasoning[stage][cost] / direct[stage][cost]) for stage in STEPS}


def run_job(out: Path, seed: int, candidates: int, limit: int) -> Row:
    """Trains and evaluates all models of one seed. Returns the steps of each and their seconds of training."""
    folder = out / str(candidates) / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("reasoning", "direct"):
        train(name, folder, seed, candidates, STEPS)
    costs = {name: training_cost(folder / name) for name in ("reasoning", "direct")}
    for name, cost in (("direct_compute", "tokens"), ("direct_time", "seconds")):
        steps = equal_steps(costs["reasoning"], costs["direct"], cost)
        train(name, folder, seed, candidates, steps)
        costs[name] = training_cost(folder / name)
    systems = ",".join(f"{name}:{folder / name / 'grpo/model'}" for name in MODELS[:-1])
    logits = f"{{checkpoint:{folder / 'reasoning/distill/model'},mode:logits}}"
    run_stage(
        [
            "mmr5_train.evaluate", f"data={folder / 'shared/data/heldout.jsonl'}", f"out={folder / 'evaluation'}",
            f"systems={{{systems},logits:{logits}}}", f"limit={limit}", f"seed={seed}", "batch_size=64",
            f"max_new_tokens={COMPLETION[candidates]}", "overwrite=true",
        ],
        folder / "evaluation.log",
    )  # fmt: skip
    return {"seed": seed, "candidates": candidates, "training": costs}


def read_runs(folder: Path, seed: int, names: Sequence[str] = MODELS) -> list[Run]:
    """The models that `folder/evaluation` evaluated on one seed, as runs that `compare` can pair."""
    runs = []
    timing = json.loads((folder / "evaluation/timing.json").read_text(encoding="utf-8"))
    for name in names:
        rankings = read_records(folder / f"evaluation/rankings/{name}.jsonl", Ranking)
        runs.append(
            Run(
                name=name,
                seed=seed,
                query_ids=[ranking.query_id for ranking in rankings],
                domains=[ranking.domain for ranking in rankings],
                types=[ranking.question_types for ranking in rankings],
                values=question_values(rankings, question_table(rankings), {}),
                data="",
                seconds=timing[name]["seconds_per_question"],
            )
        )
    return runs


def table_rows(runs: Sequence[Run], candidates: int) -> list[Row]:
    """One row per model and type of questions; `seconds` are those of a question."""
    rows = []
    for kind in TYPES:
        of_kind = [run.of_type(kind) for run in runs]
        baseline = {run.seed: run for run in of_kind if run.name == "reasoning"}
        for name in MODELS:
            chosen = [run for run in of_kind if run.name == name]
            row: Row = {"candidates": candidates, "questions": kind, "model": name}
            row["seconds"] = fmean(run.seconds for run in chosen)
            for figure in FIGURES:
                row[figure] = fmean(float(np.mean(run.values[figure])) for run in chosen)
            if name != "reasoning":
                row["difference"] = difference(chosen, baseline, "recall@1", 0)
            rows.append(row)
    return rows


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| candidates | questions | model | recall@1 | difference | recall@3 | recall@5 | ms per question |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gap = row.get("difference")
        shown = f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap else "–"
        figures = [f"{row[figure]:.3f}" for figure in FIGURES]
        cells = [str(row["candidates"]), row["questions"], row["model"], figures[0], shown, *figures[1:]]
        lines.append(f"| {' | '.join(cells)} | {1000 * row['seconds']:.0f} |")
    return "\n".join(lines)


def targets(jobs: Sequence[Row], args: argparse.Namespace) -> list[Row]:
    done = sorted((job["candidates"], job["seed"]) for job in jobs)
    wanted = sorted((candidates, seed) for candidates in args.candidates for seed in args.seeds)
    return [equal("runs (candidates, seed)", done, wanted), equal("seeds", len(args.seeds), 3)]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/reasoning", help="folder of the runs")
    parser.add_argument("--json", type=Path, default=OUTPUT / "reasoning.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--candidates", type=int, nargs="+", choices=list(COMPLETION), default=list(COMPLETION))
    parser.add_argument("--limit", type=int, default=600, help="held-out questions")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        pairs = [(candidates, seed) for candidates in args.candidates for seed in args.seeds]
        jobs = list(pool.map(lambda pair: run_job(args.out, pair[1], pair[0], args.limit), pairs))
    rows = []
    for candidates in args.candidates:
        runs = [run for seed in args.seeds for run in read_runs(args.out / f"{candidates}/{seed}", seed)]
        rows += table_rows(runs, candidates)
    write_results(args.json, {"machine": machine(), "rows": rows, "runs": jobs}, targets(jobs, args))
    print(markdown(rows))
    print_targets(targets(jobs, args))


if __name__ == "__main__":
    main()
