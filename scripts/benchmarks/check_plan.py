"""Compares the GPU memory that `mmr5_train.plan` predicts with the memory that real training steps use.

    python scripts/benchmarks/check_plan.py  # on a GPU: 3B and 7B, pages of 512 and 1,024 tokens
    python scripts/benchmarks/check_plan.py --models tiny --tokens 12  # without a GPU: measures nothing

Runs two steps of SFT and of GRPO, each in a separate process with the settings of a recipe. The weights are
random, since memory use depends only on shapes, so nothing is downloaded. Prints the predicted and the measured
peak in GiB and the relative error, and writes them to outputs/bench/plan.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_common import OUTPUT, argument_parser, run_for_json, write_results

from mmr5_train import plan
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import write_records
from mmr5_train.models.loading import load_model
from mmr5_train.models.shapes import shape_config
from mmr5_train.ranking.notes import format_note, join_notes
from mmr5_train.ranking.records import Candidate, LocalId, PageId, RankingTask, Trace
from mmr5_train.recipe import LAUNCHED, STAGES, stage_overrides
from mmr5_train.training import run

PAGES, QUESTIONS = 5, 4
MODELS = {"3B": "Qwen/Qwen2.5-VL-3B-Instruct", "7B": "Qwen/Qwen2.5-VL-7B-Instruct", "tiny": "tiny"}


def make_data(folder: Path, tokens: int) -> None:
    """Writes questions and traces with pages of `tokens` visual tokens each."""
    from data_construction.corpus.drawing import draw_page
    from data_construction.corpus.synthetic_documents import make_document

    # Portrait format. max_pixels limits the exact size.
    width, height = 28 * round(tokens**0.5 * 0.84), 28 * round(tokens**0.5 / 0.84)
    pages = [page for index in range(2) for page in make_document(index, 0).pages][:PAGES]
    for i, page in enumerate(pages):
        draw_page(page).resize((2 * width, 2 * height)).save(folder / f"{i}.png")
    shown = tuple(Candidate(doc_name="d", page=i, image=f"{i}.png", score=-i) for i in range(PAGES))
    notes = [format_note("a page with a chart and some words about it", i == 0) for i in range(PAGES)]
    tasks, traces = [], []
    for q in range(QUESTIONS * 8):
        query = f"Which page shows a red bar chart about water use in {1990 + q}?"
        common_fields: dict[str, Any] = {"query_id": f"d/{q}", "query": query, "domain": "x"}
        tasks.append(RankingTask(**common_fields, candidates=shown, positives=(PageId(doc_name="d", page=0),)))
        order = tuple(LocalId(i) for i in range(1, PAGES + 1))
        traces.append(
            Trace(
                **common_fields,
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
    """Replaces `load_model`: a model of the same shape with random weights."""
    from transformers import AutoModelForImageTextToText

    if config.path == "tiny":
        return load_model(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(shape_config(config.path), dtype=torch.bfloat16)
    model.model.visual.requires_grad_(not config.freeze_vision)
    return model


def run_one(stage: str, model: str, tokens: int, experiment: str, folder: Path) -> dict[str, float | None]:
    """Runs two steps of a stage in this process. Returns the planned and the measured GiB."""
    make_data(folder, tokens)
    sizes = ["size=tiny"] if model == "tiny" else []
    overrides = [f"experiment={experiment}", "gpus=1", f"out={folder}/x", *sizes]
    recipe = compose_stage(plan.PlanStage, "plan", overrides)
    config = stage_config(stage, model, tokens, recipe, folder)
    network = plan.measure(config.model)
    prompt = plan.TEXT_TOKENS + PAGES * tokens
    if stage == "sft":
        work = plan.sft_work(config, [prompt], recipe)
    else:
        work = plan.grpo_work(config, {}, [prompt], recipe)
    planned = sum(plan.memory(network, work, "ddp", 1).values()) / plan.GIB
    module = STAGES[stage][0]
    module.load_model = random_model
    run.save_result = lambda *_, **__: None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    module.main(config)
    return {"planned_gib": planned, "measured_gib": peak_gib() if torch.cuda.is_available() else None}


def stage_config(stage: str, model: str, tokens: int, recipe: plan.PlanStage, folder: Path) -> Any:
    """The settings of a stage in a recipe, with the data in `folder`, and two steps."""
    _, kind, entry = STAGES[stage]
    replaced_settings = ("data=", "out=", "model.path=", "model=")
    overrides = [o for o in stage_overrides(recipe)[stage] if not o.startswith(replaced_settings)]
    data = folder / ("traces.jsonl" if stage == "sft" else "questions.jsonl")
    model_option = "tiny" if model == "tiny" else f"qwen2_5_vl_{model.lower()}"
    return compose_stage(
        kind, entry,
        [
            f"model={model_option}", *overrides, f"data={data}", f"out={folder}/out",
            f"model.path={MODELS[model]}", f"model.max_pixels={tokens * 28 * 28}", "trainer.max_steps=2",
            "trainer.save_strategy=no", "heldout=null",
        ],
    )  # fmt: skip


def peak_gib() -> float:
    """PyTorch's peak of reserved memory, plus the GPU memory that is used outside of PyTorch's allocator."""
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return (torch.cuda.max_memory_reserved() + outside) / plan.GIB


def describe(row: dict[str, Any]) -> str:
    planned, measured = row["planned_gib"], row["measured_gib"]
    comparison = f"{measured:.1f} GiB, error {planned / measured - 1:+.0%}" if measured else "nothing: no GPU"
    size = f"{PAGES} pages of {row['tokens']} tokens"
    return f"{row['model']} {row['stage']}, {size}: planned {planned:.1f} GiB, measured {comparison}"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["3B", "7B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024], help="visual tokens per page")
    parser.add_argument("--stages", nargs="+", choices=LAUNCHED, default=list(LAUNCHED))
    parser.add_argument("--experiment", default="recommended", help="an option of configs/experiment")
    parser.add_argument("--out", type=Path, default=OUTPUT / "plan.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            result = run_one(args.stages[0], args.models[0], args.tokens[0], args.experiment, Path(folder))
        print(json.dumps(result))
        return
    rows = []
    for model, tokens, stage in itertools.product(args.models, args.tokens, args.stages):
        command = [sys.executable, __file__, "--one", "--models", model, "--tokens", str(tokens)]
        command += ["--stages", stage, "--experiment", args.experiment]
        result = run_for_json(command, f"check_plan: {stage} of {model} with {tokens} tokens per page")
        rows.append({"model": model, "tokens": tokens, "stage": stage, **result})
        print(describe(rows[-1]))
    write_results(args.out, {"rows": rows, "experiment": args.experiment}, [])


if __name__ == "__main__":
    main()
