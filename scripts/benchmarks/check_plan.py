"""What `mmr5_train.plan` says a GPU must hold, beside what it held: real steps of both stages with random weights.

    python scripts/benchmarks/check_plan.py  # on a GPU: 3B and 7B, pages of 512 and 1,024 tokens
    python scripts/benchmarks/check_plan.py --models tiny --tokens 12  # without a GPU: no peak is measured

Each stage runs as from the command line for two steps, in a process of its own, with the settings of a recipe.
Weights are drawn, so nothing is downloaded; what a step holds depends on shapes alone. Prints peak and plan in
GiB, and the error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmr5_train import plan
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import write_json, write_records
from mmr5_train.models.loading import load_model
from mmr5_train.models.shapes import shape_config
from mmr5_train.ranking.notes import format_note, join_notes
from mmr5_train.ranking.records import Candidate, LocalId, PageId, RankingTask, Trace
from mmr5_train.recipe import LAUNCHED, STAGES, stage_overrides
from mmr5_train.training import run

ROOT = Path(__file__).resolve().parents[2]
PAGES, QUESTIONS = 5, 4
FULL = {"3B": "Qwen/Qwen2.5-VL-3B-Instruct", "7B": "Qwen/Qwen2.5-VL-7B-Instruct", "tiny": "tiny"}


def make_data(folder: Path, tokens: int) -> None:
    """Questions and traces with pages that fill `tokens` visual tokens each."""
    from data_construction.corpus.drawing import draw_page
    from data_construction.corpus.synthetic_documents import make_document

    side = 28 * round(tokens**0.5 * 0.84), 28 * round(tokens**0.5 / 0.84)  # portrait; the limit trims the rest
    pages = [page for index in range(2) for page in make_document(index, 0).pages][:PAGES]
    for i, page in enumerate(pages):
        draw_page(page).resize((side[0] * 2, side[1] * 2)).save(folder / f"{i}.png")
    shown = tuple(Candidate(doc_name="d", page=i, image=f"{i}.png", score=-i) for i in range(PAGES))
    notes = [format_note("a page with a chart and some words about it", i == 0) for i in range(PAGES)]
    tasks, traces = [], []
    for q in range(QUESTIONS * 8):
        query = f"Which page shows a red bar chart about water use in {1990 + q}?"
        known: dict[str, Any] = {"query_id": f"d/{q}", "query": query, "domain": "x"}
        tasks.append(RankingTask(**known, candidates=shown, positives=(PageId(doc_name="d", page=0),)))
        order = tuple(LocalId(i) for i in range(1, PAGES + 1))
        traces.append(
            Trace(
                **known,
                shown=shown,
                notes=tuple(notes),
                think=join_notes(notes),
                answer=order,
                positive_ids=order[:1],
            )
        )
    write_records(folder / "questions.jsonl", tasks)
    write_records(folder / "traces.jsonl", traces)


def random_model(config: Any, path: Any = None) -> Any:
    """In the place of `load_model`: the same shape, drawn weights."""
    from transformers import AutoModelForImageTextToText

    if config.path == "tiny":
        return load_model(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(shape_config(config.path), dtype=torch.bfloat16)
    model.model.visual.requires_grad_(not config.freeze_vision)
    return model


def run_one(stage: str, model: str, tokens: int, experiment: str, folder: Path) -> dict[str, float | None]:
    """Two steps of a stage in this process: planned and measured GiB."""
    make_data(folder, tokens)
    module, kind, entry = STAGES[stage]
    pixels = tokens * 28 * 28
    sizes = ["size=tiny"] if model == "tiny" else []
    whole = compose_stage(
        plan.PlanStage, "plan", [f"experiment={experiment}", "gpus=1", f"out={folder}/x", *sizes]
    )
    overrides = [
        o for o in stage_overrides(whole)[stage] if not o.startswith(("data=", "out=", "model.path=", "model="))
    ]
    data = folder / ("traces.jsonl" if stage == "sft" else "questions.jsonl")
    base = "tiny" if model == "tiny" else f"qwen2_5_vl_{model.lower()}"
    config = compose_stage(
        kind, entry,
        [
            f"model={base}", *overrides, f"data={data}", f"out={folder}/out", f"model.path={FULL[model]}",
            f"model.max_pixels={pixels}", "trainer.max_steps=2", "trainer.save_strategy=no", "heldout=null",
        ],
    )  # fmt: skip
    network = plan.measure(config.model)
    prompt = plan.TEXT_TOKENS + PAGES * tokens
    if stage == "sft":
        work = plan.sft_work(config, [prompt], whole)
    else:
        work = plan.grpo_work(config, {}, [prompt], whole)
    planned = sum(plan.memory(network, work, "ddp", 1).values()) / plan.GIB
    module.load_model = random_model
    run.save_result = lambda *_, **__: None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    module.main(config)
    if not torch.cuda.is_available():
        return {"planned_gib": planned, "measured_gib": None}
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.max_memory_reserved() + (total - free - torch.cuda.memory_reserved())
    return {"planned_gib": planned, "measured_gib": held / plan.GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(FULL), default=["3B", "7B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--stages", nargs="+", choices=LAUNCHED, default=list(LAUNCHED))
    parser.add_argument("--experiment", default="recommended")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench/plan.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            found = run_one(args.stages[0], args.models[0], args.tokens[0], args.experiment, Path(folder))
        print(json.dumps(found))
        return
    rows = []
    for model in args.models:
        for tokens in args.tokens:
            for stage in args.stages:
                command = [sys.executable, __file__, "--one", "--models", model, "--tokens", str(tokens)]
                command += ["--stages", stage, "--experiment", args.experiment]
                ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if ended.returncode:
                    raise SystemExit(
                        f"check_plan: {stage} of {model}, {tokens} tokens, failed:\n{ended.stderr[-3000:]}"
                    )
                found = json.loads(ended.stdout.splitlines()[-1])
                rows.append({"model": model, "tokens": tokens, "stage": stage, **found})
                held = found["measured_gib"]
                error = (
                    f"{held:.1f} GiB, {found['planned_gib'] / held - 1:+.0%}" if held else "not measured: no GPU"
                )
                planned = f"{PAGES} pages of {tokens}: plan {found['planned_gib']:.1f} GiB"
                print(f"{model} {stage}, {planned}, held {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"rows": rows, "experiment": args.experiment})


if __name__ == "__main__":
    main()
