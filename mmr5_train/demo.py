"""The whole pipeline, small: a corpus, candidates, traces, SFT, GRPO, evaluation, a report.

    make demo            or  python -m mmr5_train.demo seed=1

Every stage runs exactly as from the command line, with the overrides of configs/demo.yaml; the command of
each is printed before it runs. Writes outputs/demo/results.json and outputs/demo/report.html.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from typing import Any

from data_construction import candidates, traces
from data_construction.corpus import synthetic
from mmr5_train import evaluate, grpo, report, select, sft
from mmr5_train.config import StageConfig, compose_stage, run_stage
from mmr5_train.ranking.files import open_output, write_json, write_manifest
from mmr5_train.ranking.scoring import find_difference

# name in configs/demo.yaml → (the stage's module, its config model, its entry config)
STAGES: dict[str, tuple[Any, type[StageConfig], str]] = {
    "corpus": (synthetic, synthetic.SyntheticStage, "synthetic"),
    "candidates": (candidates, candidates.CandidatesStage, "candidates"),
    "traces": (traces, traces.TracesStage, "traces"),
    "sft": (sft, sft.SftStage, "sft"),
    "select": (select, select.SelectStage, "select"),
    "grpo": (grpo, grpo.GrpoStage, "grpo"),
    "evaluate": (evaluate, evaluate.EvaluateStage, "evaluate"),
    "report": (report, report.ReportStage, "report"),
}
FIGURES = (
    "system", "questions", "recall@1", "recall@3", "recall@5", "recall@10", "ndcg@5", "mrr",
    "recall@1_sampled", "complete_permutations", "true_descriptions", "tokens", "defects", "defects_sampled",
)  # fmt: skip


class DemoStage(StageConfig):
    """`python -m mmr5_train.demo` (configs/demo.yaml)."""

    stages: dict[str, list[str]]


def main(config: DemoStage) -> None:
    started = time.monotonic()
    out = open_output(config.out, config.overwrite)
    for name, overrides in config.stages.items():
        module, model, entry = STAGES[name]
        print(f"\n{name}: {shlex.join(['python', '-m', module.__name__, *overrides])}", flush=True)
        module.main(compose_stage(model, entry, overrides))
    seconds = time.monotonic() - started
    results = json.loads((out / "evaluation/results.json").read_text(encoding="utf-8"))
    write_json(out / "results.json", summary(results, config.seed, seconds))
    shutil.copyfile(out / "report/report.html", out / "report.html")
    write_manifest(out, stage="demo", config=config.model_dump(mode="json"))
    print(f"\ndemo: {seconds:.0f} s; figures in {out / 'results.json'}")
    print(f"open {(out / 'report.html').resolve()}")


def summary(results: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    """The demo's figures: a row a system, and what GRPO changed, with paired 95 % intervals."""
    difference = find_difference(results, "sft+grpo", "sft")
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "rows": [{name: row.get(name) for name in FIGURES} for row in results["rows"]],
        "grpo_minus_sft": {
            name: {key: difference[name][key] for key in ("mean", "low", "high")}
            for name in ("recall@1", "recall@1_sampled", "complete_permutations", "true_descriptions")
        },
    }


if __name__ == "__main__":
    run_stage(main, DemoStage, "demo")
