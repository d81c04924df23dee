"""Runs the recommended recipe at a small size, on a synthetic corpus.

    python -m mmr5_train.demo seed=1                           # make demo SEED=1
    python -m mmr5_train.demo overwrite=false leave_out=[]     # make demo-modes

Every stage runs as from the command line, and its command is printed first. Writes outputs/demo/results.json and
outputs/demo/report.html. The second command reuses the stages of the first, then distills the model so that it
also ranks in one forward pass, and adds a comparison of the modes to the report.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_construction.corpus.synthetic_documents import CATALOGUE, USERS, USERS_UNSEEN
from mmr5_train.common.config import run_stage
from mmr5_train.common.files import RECIPE, open_output, write_json, write_manifest
from mmr5_train.evaluation.scoring import find_difference, score_rankings
from mmr5_train.recipe import RecipeStage, run_stages, stage_overrides
from mmr5_train.report import read_evaluation
from mmr5_train.reporting.answers import read_timing
from mmr5_train.reporting.views import read_results

POPULATIONS = (CATALOGUE, USERS, USERS_UNSEEN)
FIGURES = (
    "system", "questions", "recall@1", "recall@3", "recall@5", "recall@10", "ndcg@5", "mrr",
    "recall@1_sampled", "complete_permutations", "true_descriptions", "tokens", "defects", "defects_sampled",
)  # fmt: skip
COMPARED = ("recall@1", "recall@1_sampled", "complete_permutations", "true_descriptions")


def main(config: RecipeStage) -> None:
    out = open_output(config.out, True) if config.overwrite else config.out
    run_stages(stage_overrides(config), config)
    stages = json.loads((out / RECIPE).read_text(encoding="utf-8"))["stages"]
    times = [stage["seconds"] for stage in stages.values()]
    # A run that was stopped has recorded no times, so they are unknown for the stages that it had finished.
    seconds = None if None in times else round(sum(times), 1)
    figures = {"seed": config.seed, "seconds": seconds} | summary(out / "evaluation")
    if "modes" not in config.leave_out:
        figures |= modes_summary(out / "modes")
    write_json(out / "results.json", figures)
    shutil.copyfile(out / "report/report.html", out / "report.html")
    write_manifest(out, stage="demo", config=config.model_dump(mode="json"))
    print(f"\ndemo: {'' if seconds is None else f'{seconds:.0f} s; '}figures in {out / 'results.json'}")
    print(f"open {(out / 'report.html').resolve()}")


def summary(folder: Path) -> dict[str, Any]:
    """For each population of questions: the figures of each system, and the paired differences of GRPO from SFT.

    The differences have 95 % intervals. A population without questions has no rows.
    """
    _, rankings, pages = read_evaluation(folder)
    rows, differences = [], {}
    for population in POPULATIONS:
        selected = {
            system: [ranking for ranking in system_rankings if population in ranking.question_types]
            for system, system_rankings in rankings.items()
        }
        if not any(selected.values()):
            continue
        results = score_rankings(selected, pages)
        rows += [{"population": population} | {name: row.get(name) for name in FIGURES} for row in results["rows"]]
        differences[population] = _difference(results, "sft+grpo", "sft", COMPARED)
    return {"rows": rows, "grpo_minus_sft": differences}


def modes_summary(folder: Path) -> dict[str, Any]:
    """Figures and speed of the distilled checkpoint in each mode, and the differences from `reason`."""
    results, timing = read_results(folder), read_timing(folder)
    rows = [
        {name: row.get(name) for name in ("system", "questions", "recall@1", "complete_permutations")}
        | {"seconds_per_question": timing[row["system"]]["seconds_per_question"]}
        for row in results["rows"]
        if row["system"] in timing
    ]
    differences = {
        f"{mode}_minus_reason": _difference(results, mode, "reason", ["recall@1"])
        for mode in ("logits", "adaptive")
    }
    return {"modes": rows, **differences}


def _difference(results: dict[str, Any], system: str, baseline: str, figures: Sequence[str]) -> dict[str, Any]:
    difference = find_difference(results, system, baseline)
    return {name: {key: difference[name][key] for key in ("mean", "low", "high")} for name in figures}


if __name__ == "__main__":
    run_stage(main, RecipeStage, "demo")
