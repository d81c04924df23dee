"""Runs the data stages of the recipe `mm_r5` on full-size files, and counts what SFT and GRPO get.

    python scripts/benchmarks/bench_amounts.py   # or: make bench-amounts; about ten minutes, and 3 GB of disk

Writes files with the published numbers of documents and questions and pages of a few pixels (mmdocir_standin.py).
Then it runs the stages `heldout`, `candidates`, `traces` and `select` with the recipe's settings, except that BM25
replaces ColQwen and the offline teacher replaces GPT-4o. Each stage runs in its own process, for its peak memory.
Before, after the candidates and at the end, it prints the recipe's forecast of the numbers of examples.

Writes outputs/bench/amounts.json. Its targets: 7,200 traces for SFT and 3,000 questions for GRPO, from at most
1,200 questions per subset, no document in two splits or in the evaluation set, and a true forecast.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
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
    write_results,
)
from mmdocir_standin import SUBSETS, write_standin

from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import read_json_lines, read_manifest
from mmr5_train.recipe import STAGES, RecipeStage, compose_stages, stage_overrides
from mmr5_train.recipes.forecast import forecasts

MEASURED = ("heldout", "candidates", "traces", "select")
MAX_PEAK_MIB = 2048


def recipe_overrides(folder: Path, scale: float = 1.0) -> dict[str, list[str]]:
    """The overrides of the stages of `mm_r5` on the files in `folder`, with BM25 and the offline teacher.

    `scale` shrinks the numbers of examples.
    """
    overrides = [f"out={folder}/mm_r5", "experiment=mm_r5"]
    overrides += ["stages.heldout.retriever=bm25", "stages.candidates.retriever=bm25"]
    overrides += ["stages.traces.teacher=extractive", "stages.traces.refine=false"]
    if scale != 1:
        overrides.append(f"stages.candidates.train_per_domain={round(1200 * scale)}")
        overrides.append(f"stages.sft.limit={round(7200 * scale)}")
        overrides.append(f"stages.select.balanced.count={round(3000 * scale)}")
    config = compose_stage(RecipeStage, "recipe", overrides)
    values = {name: dict(stage) if stage else stage for name, stage in config.stages.items()}
    for stage, corpus in (("heldout", "mmdocir"), ("candidates", "mmdocir_train")):
        settings = {"corpus.folder": f"{folder}/{corpus}", "corpus.page_cache": f"{folder}/cache"}
        values[stage] = (values[stage] or {}) | settings
    return stage_overrides(config.model_copy(update={"stages": values}))


def recipe_stages(folder: Path, scale: float = 1.0) -> dict[str, Any]:
    """The configs of these stages."""
    return compose_stages(recipe_overrides(folder, scale))


def run_stage(name: str, overrides: list[str]) -> Row:
    """Runs a stage's command. Returns its seconds and the peak memory of its process (0 except on Linux)."""
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen([sys.executable, "-m", STAGES[name].module.__name__, *overrides], cwd=ROOT)
    while process.poll() is None:  # getrusage would count the memory of this process before the child's exec
        peak = max(peak, _resident_peak(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"bench-amounts: {name} failed")
    return {"stage": name, "seconds": round(time.perf_counter() - start, 1), "peak_mib": round(peak)}


def _resident_peak(pid: int) -> float:
    """The largest resident memory of a running process so far, in MiB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return 0
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) / 1024 if match else 0


def run_all(folder: Path, scale: float) -> dict[str, Any]:
    """Writes the files and runs the stages, each in its own process."""
    overrides, stages = recipe_overrides(folder, scale), recipe_stages(folder, scale)
    results: dict[str, Any] = {"scale": scale, "forecast": {}, "stages": []}
    results["forecast"]["no files"] = show_forecast(stages)
    start = time.perf_counter()
    results["files"] = write_standin(folder, scale) | {"seconds": round(time.perf_counter() - start)}
    results["forecast"]["annotations"] = show_forecast(stages)
    for name in MEASURED:
        results["stages"].append(run_stage(name, overrides[name]))
        results["forecast"][name] = show_forecast(stages)
    return results | count_examples(stages)


def show_forecast(stages: dict[str, Any]) -> dict[str, int | None]:
    """Prints the forecast, and returns the number of examples that each training would use."""
    found = forecasts(stages)
    for name, forecast in found.items():
        print(f"{name}: {forecast}", flush=True)
    return {name: forecast.used for name, forecast in found.items()}


def count_examples(stages: dict[str, Any]) -> dict[str, Any]:
    """The examples of SFT and GRPO, and what they have in common with each other and with the evaluation."""
    traces = [value for _, value in read_json_lines(stages["sft"].data)][: stages["sft"].limit]
    questions = [value for _, value in read_json_lines(stages["grpo"].data)]
    split_documents = [value for _, value in read_json_lines(stages["candidates"].out / "documents.jsonl")]
    heldout = [value for _, value in read_json_lines(stages["heldout"].out / "documents.jsonl")]
    sft_documents = {trace["shown"][0]["doc_name"] for trace in traces}
    grpo_documents = {question["candidates"][0]["doc_name"] for question in questions}
    split_of_content: dict[str, set[str]] = {}
    for document in split_documents:
        split_of_content.setdefault(document["sha256"], set()).add(document["split"])
    names = {document["doc_name"].removesuffix(".pdf") for document in heldout}
    return {
        "sft_traces": len(traces),
        "sft_traces_by_subset": Counter(trace["domain"] for trace in traces),
        "grpo_questions": len(questions),
        "grpo_questions_by_subset": Counter(question["domain"] for question in questions),
        "grpo_groups": read_manifest(stages["select"].out)["counts"]["groups"],
        "documents_of_both": len(sft_documents & grpo_documents),
        "contents_in_two_splits": sum(len(splits) > 1 for splits in split_of_content.values()),
        "evaluation_documents_in_training": sum(
            document["doc_name"].split("/")[-1] in names for document in split_documents
        )
        + len(split_of_content.keys() & {document["sha256"] for document in heldout}),
    }


def targets(results: dict[str, Any]) -> list[Row]:
    scale = results["scale"]
    sft, grpo = round(7200 * scale), round(3000 * scale)
    forecast = results["forecast"]
    return [
        equal("SFT traces", results["sft_traces"], sft),
        equal("GRPO questions", results["grpo_questions"], grpo),
        equal("subsets with SFT traces", len(results["sft_traces_by_subset"]), len(SUBSETS)),
        at_most("SFT traces of a subset", max(results["sft_traces_by_subset"].values()), round(1200 * scale)),
        at_least("SFT traces of the smallest subset", min(results["sft_traces_by_subset"].values()), 900 * scale),
        at_least("groups of page resolution among the GRPO questions", _groups(results), 2),
        equal("documents of both SFT and GRPO", results["documents_of_both"], 0),
        equal("contents in two splits", results["contents_in_two_splits"], 0),
        equal("evaluation documents in training", results["evaluation_documents_in_training"], 0),
        equal("forecast after the candidates", forecast["candidates"], {"sft": sft, "grpo": grpo}),
        equal("forecast from the annotations", forecast["annotations"], {"sft": sft, "grpo": grpo}),
        *(
            at_most(f"{row['stage']}: peak memory, MiB", row["peak_mib"], MAX_PEAK_MIB)
            for row in results["stages"]
        ),
    ]


def _groups(results: dict[str, Any]) -> int:
    return sum(group["after"] > 0 for group in results["grpo_groups"])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the published numbers")
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=OUTPUT / "amounts.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = run_all(args.folder or Path(temporary), args.scale)
    write_results(args.out, {**results, "machine": machine()}, targets(results))
    for row in results["stages"]:
        print(json.dumps(row))
    print_targets(targets(results))
    print(f"bench-amounts: results in {args.out}")


if __name__ == "__main__":
    main()
