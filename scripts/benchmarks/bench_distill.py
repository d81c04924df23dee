"""Distillation of rankings of 20 pages, with each loss: does one forward pass rank as well as reasoning?

    python scripts/benchmarks/bench_distill.py    # part of make bench-rerank; writes outputs/bench/distill.json

The shipped model has seen at most eight pages, so the benchmark first continues its pretraining on prompts of up
to 20 pages. For each seed, it then makes a synthetic corpus whose sections have 20 pages, trains by SFT with 20
candidates per question, ranks other questions with the SFT model, and distills a model from these rankings with
each loss of `LOSSES`. All rank the same held-out questions: the SFT model with reasoning, the distilled models in
one forward pass. The table has the paired differences from reasoning over the seeds. The same command resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from bench_common import (
    OUTPUT,
    ROOT,
    Row,
    argument_parser,
    at_least,
    machine,
    print_targets,
    run_with_log,
    write_results,
)
from bench_reasoning import read_runs

from mmr5_train.common.files import MANIFEST, is_unfinished
from mmr5_train.compare import Run, difference
from mmr5_train.models.loading import TINY

PAGES = 20
COMPLETION = 440  # tokens: 20 notes of up to 19 tokens, the list and the tags
WIDER = (
    "{steps: 600, batch_size: 24, learning_rate: 8.0e-4, pages: [8, 12, 16, 20, 20], text_batches: 0.3, "
    "random_negatives: 0.1, max_verdict_pages: 20, list_ids: true, form: true, extra_loss: 2}"
)
# Model → overrides of distill. The first is the default of configs/distill.yaml.
LOSSES = {
    "listwise": [],
    "listwise_gold_first": ["gold_first=true"],
    "ranknet": ["rank_loss=ranknet"],
    "listmle": ["rank_loss=listmle"],
}
MAX_LOSS = 0.03  # of recall@1, of logits to reason


def finished(folder: Path, stage: str) -> bool:
    return (folder / MANIFEST).is_file() and not is_unfinished(folder, stage)


def run_stage(stage: str, folder: Path, arguments: Sequence[str], name: str = "") -> None:
    """Runs a stage, whose output goes to a log file in `folder`."""
    name = name or stage
    run_with_log([sys.executable, "-m", f"mmr5_train.{stage}", *arguments], folder / f"{name}.log", name)


def pretrain(out: Path) -> None:
    """Continues the pretraining of the shipped model on prompts of up to `PAGES` pages."""
    if finished(out, "tiny"):
        return
    command = [
        sys.executable, "scripts/pretrain_tiny.py", f"out={out}", f"weights={TINY}", "pages=2400", "seed=20",
        f"+phases.wider={WIDER}", "from_phase=wider", "overwrite=true",
    ]  # fmt: skip
    run_with_log(command, out.with_suffix(".log"), "pretraining on up to 20 pages")


def train(folder: Path, base: Path, seed: int) -> None:
    """SFT on traces about `PAGES` pages, and the SFT model's rankings of other questions."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = [
        "experiment=recommended", "size=tiny", f"seed={seed}", f"out={folder}",
        "leave_out=[sft,select,grpo,teach,distill,calibrate,evaluate,modes,report]",
        "stages.corpus.documents=60", f"+stages.corpus.section_pages={PAGES}",
        f"stages.candidates.candidates={PAGES}",
    ]  # fmt: skip
    run_stage("recipe", folder, recipe)
    sft = [
        f"data={folder}/traces/traces.jsonl", f"model.path={base}", f"out={folder}/sft", f"seed={seed}",
        "model.lora={r:16,alpha:32}", "trainer.per_device_train_batch_size=16", "trainer.max_steps=60",
        "trainer.learning_rate=4.0e-3", "trainer.warmup_steps=5",
    ]  # fmt: skip
    if not finished(folder / "sft", "sft"):
        run_stage("sft", folder, sft)
    teach = [
        f"data={folder}/data/select.jsonl", "any_split=true", f"systems={{teacher:{folder}/sft/model}}",
        f"out={folder}/teach", "order=shuffled", "limit=500", f"seed={seed}", "batch_size=32",
        f"max_new_tokens={COMPLETION}",
    ]  # fmt: skip
    if not finished(folder / "teach", "evaluate"):
        run_stage("evaluate", folder, teach, "teach")


def distill(folder: Path, name: str, seed: int) -> None:
    out = folder / name
    if finished(out, "distill"):
        return
    arguments = [
        f"data={folder}/teach/rankings/teacher.jsonl", f"model.path={folder}/sft/model", f"out={out}",
        f"seed={seed}", "subsets=3", "trainer.per_device_train_batch_size=4",
        "trainer.gradient_accumulation_steps=4", *LOSSES[name],
    ]  # fmt: skip
    run_stage("distill", folder, arguments, name)


def evaluate(folder: Path, seed: int, limit: int) -> None:
    systems = [f"reasoning:{folder}/sft/model"]
    systems += [f"{name}:{{checkpoint:{folder}/{name}/model,mode:logits}}" for name in LOSSES]
    arguments = [
        f"data={folder}/data/heldout.jsonl", f"systems={{{','.join(systems)}}}", f"out={folder}/evaluation",
        f"limit={limit}", f"seed={seed}", "batch_size=32", f"max_new_tokens={COMPLETION}", "overwrite=true",
    ]  # fmt: skip
    run_stage("evaluate", folder, arguments, "evaluation")


def table_rows(runs: Sequence[Run]) -> list[Row]:
    """One row per model: mean recall over seeds, paired difference from reasoning, seconds of a question."""
    baseline = {run.seed: run for run in runs if run.name == "reasoning"}
    rows = []
    for name in ("reasoning", *LOSSES):
        chosen = [run for run in runs if run.name == name]
        row: Row = {"model": name, "seconds": fmean(run.seconds for run in chosen)}
        for figure in ("recall@1", "recall@3", "recall@5"):
            row[figure] = fmean(float(np.mean(run.values[figure])) for run in chosen)
        if name != "reasoning":
            row["difference"] = difference(chosen, baseline, "recall@1", 0)
            row["by_seed"] = {
                run.seed: float(np.mean(run.values["recall@1"] - baseline[run.seed].values["recall@1"]))
                for run in chosen
            }
        rows.append(row)
    return rows


def targets(rows: Sequence[Row]) -> list[Row]:
    default = next(row for row in rows if row["model"] == next(iter(LOSSES)))
    return [
        at_least(f"recall@1 of logits minus that of reason, {PAGES} pages, seed {seed}", value, -MAX_LOSS)
        for seed, value in default["by_seed"].items()
    ]


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| model | recall@1 | difference | recall@3 | recall@5 | ms per question |", "|" + "---|" * 6]
    for row in rows:
        gap = row.get("difference")
        shown = f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap else "–"
        lines.append(
            f"| {row['model']} | {row['recall@1']:.3f} | {shown} | {row['recall@3']:.3f} | {row['recall@5']:.3f} "
            f"| {1000 * row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def measure(out: Path, seeds: Sequence[int], limit: int) -> list[Row]:
    out.mkdir(parents=True, exist_ok=True)
    pretrain(out / "base")
    runs: list[Run] = []
    for seed in seeds:
        folder = out / str(seed)
        train(folder, out / "base", seed)
        for name in LOSSES:
            distill(folder, name, seed)
        evaluate(folder, seed, limit)
        runs += read_runs(folder, seed, ("reasoning", *LOSSES))
    return table_rows(runs)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", type=Path, default=ROOT / "outputs/distill_20", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--limit", type=int, default=300, help="held-out questions")
    parser.add_argument("--out", type=Path, default=OUTPUT / "distill.json")
    args = parser.parse_args()
    rows = measure(args.models.resolve(), args.seeds, args.limit)
    result: dict[str, Any] = {"machine": machine(), "pages": PAGES, "rows": rows}
    write_results(args.out, result, targets(rows))
    print(json.dumps(rows, indent=2))
    print(markdown(rows))
    print_targets(targets(rows))


if __name__ == "__main__":
    main()
