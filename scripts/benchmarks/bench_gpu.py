"""What only a GPU can show: time and memory of the real shapes, next to what `mmr5_train.plan` forecasts.

    python scripts/benchmarks/bench_gpu.py --gpu h100  # on a GPU: 3B and 7B, five pages of 1,024 and 2,772 tokens
    python scripts/benchmarks/bench_gpu.py --rounds 2 --models 7B  # less of it, in less time
    python scripts/benchmarks/bench_gpu.py --plan  # without a GPU: the table to fill in, with the forecasts
    python scripts/benchmarks/bench_gpu.py --models FOLDER --page-tokens 64  # a small checkpoint, also on a CPU

Measures a step of SFT, a step of GRPO with TRL's trainer and with shared prompts, and one question in mode
logits. Settings are those of MM-R5 for one GPU, except that GRPO accumulates a whole group (4) instead of half
of one: a rollout batch of one GPU must hold whole groups. The weights are random and nothing is downloaded,
because time and memory depend only on shapes. The shape 3B or 7B is written as a checkpoint folder without
weights, with the shipped model's processor. Each measurement runs in a separate process, whose messages are kept
in outputs/bench/gpu_logs. One that fails, for example for lack of memory, becomes a row that says so.

Prints a table in the format of docs/benchmarks.md, and writes outputs/bench/gpu.json after each row. Seconds of
GRPO are means over the optimizer steps of a rollout batch, sampling included. The last of `--rounds` counts.
Memory is the peak of PyTorch's reserved memory plus what other libraries use on the GPU. On a CPU,
memory is not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_common import OUTPUT, ROOT, Row, argument_parser, machine, write_results
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from mmr5_train import plan
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import write_records
from mmr5_train.inference.local import LocalBackend
from mmr5_train.models.loading import TINY, choose_attention, load_processor
from mmr5_train.models.pages import load_page
from mmr5_train.models.shapes import shape_config
from mmr5_train.ranking.notes import format_note, join_notes
from mmr5_train.ranking.records import Candidate, LocalId, PageId, RankingTask, Trace
from mmr5_train.recipe import STAGES, stage_overrides
from mmr5_train.recipes import cost
from mmr5_train.training import run

PAGES, QUESTIONS = 5, 16
MODELS = {"3B": "Qwen/Qwen2.5-VL-3B-Instruct", "7B": "Qwen/Qwen2.5-VL-7B-Instruct"}
LIMITS = {"shortest_edge": 3136, "longest_edge": 12_845_056}  # pixels of a page, as published
WORK = ("sft", "grpo stock", "grpo shared", "logits")


def write_shape(folder: Path, path: str) -> Path:
    """A checkpoint folder without weights: the configuration of a hub id and the shipped model's processor."""
    shape_config(path).save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(TINY)
    processor.image_processor.size = LIMITS
    processor.save_pretrained(folder)
    return folder


def page_sides(tokens: int) -> tuple[int, int]:
    """Width and height in visual tokens, with the product `tokens` and a ratio close to that of A4."""
    widths = [width for width in range(1, tokens + 1) if tokens % width == 0]
    width = min(widths, key=lambda width: abs(tokens / width**2 - 2**0.5))
    return width, tokens // width


def make_data(folder: Path, tokens: int, token_side: int) -> None:
    """Writes questions and traces about five pages of `tokens` visual tokens, `token_side` pixels wide each."""
    from data_construction.corpus.drawing import draw_page
    from data_construction.corpus.synthetic_documents import make_document

    width, height = (side * token_side for side in page_sides(tokens))
    pages = [page for index in range(2) for page in make_document(index, 0).pages][:PAGES]
    for i, page in enumerate(pages):
        draw_page(page).resize((width, height)).save(folder / f"{i}.png")
    shown = tuple(Candidate(doc_name="d", page=i, image=f"{i}.png", score=-i) for i in range(PAGES))
    notes = [format_note("a page with a chart and some words about it", i == 0) for i in range(PAGES)]
    order = tuple(LocalId(i) for i in range(1, PAGES + 1))
    tasks, traces = [], []
    for q in range(QUESTIONS):
        query = f"Which page shows a red bar chart about water use in {1990 + q}?"
        common_fields: dict[str, Any] = {"query_id": f"d/{q}", "query": query, "domain": "x"}
        tasks.append(RankingTask(**common_fields, candidates=shown, positives=(PageId(doc_name="d", page=0),)))
        reasoning = {"notes": tuple(notes), "think": join_notes(notes)}
        traces.append(Trace(**common_fields, shown=shown, **reasoning, answer=order, positive_ids=order[:1]))
    write_records(folder / "questions.jsonl", tasks)
    write_records(folder / "traces.jsonl", traces)


def random_model(config: Any, path: Any = None) -> Any:
    """Replaces `load_model`: a model of the checkpoint's shape with random weights."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(config.path),
            dtype=getattr(torch, config.dtype),
            attn_implementation=choose_attention(config),
        )
    model.model.visual.requires_grad_(not config.freeze_vision)
    return model


class StepTimes(TrainerCallback):
    """The time at the end of each optimizer step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(now())


def now() -> float:
    """Seconds of a clock, after all work on the GPU has ended."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(work: str, model: str, tokens: int, args: argparse.Namespace, folder: Path) -> Row:
    """Planned GiB and seconds, and the measured ones unless `args.plan`: then nothing runs."""
    checkpoint = write_shape(folder / "checkpoint", MODELS[model]) if model in MODELS else Path(model)
    recipe = compose_stage(plan.PlanStage, "plan", ["experiment=mm_r5", "gpus=1", f"out={folder}/x"])
    recipe = recipe.model_copy(update={"completion_tokens": args.completion})
    stage = "grpo" if work.startswith("grpo") else "sft"  # logits: only the model of the stage is used
    config = stage_config(stage, work, checkpoint, recipe, args, folder)
    network, prompt = cost.measure(config.model), plan.TEXT_TOKENS + PAGES * tokens
    if work == "logits":
        network, load = (
            replace(network, trained=0, adapters=0, adapted_inputs=0, adapted_input=0),
            one_pass(prompt),
        )
    elif stage == "sft":
        load = plan.sft_work(config, [prompt], QUESTIONS, recipe)
    else:
        load = plan.grpo_work(config, [prompt], QUESTIONS, recipe)
    row: Row = {
        "planned_gib": sum(cost.memory(network, load, "ddp", 1).values()) / cost.GIB,
        "planned_s": cost.seconds(network, load, cost.GPUS[args.gpu], 1) / load.updates,
    }
    if args.plan:
        return row
    make_data(folder, tokens, network.token_side)
    seconds = time_logits(config, folder) if work == "logits" else time_training(stage, config, args.rounds)
    return row | {"measured_s": seconds, "measured_gib": peak_gib() if torch.cuda.is_available() else None}


def one_pass(prompt: int) -> cost.Workload:
    """One question in mode logits: one forward pass over its prompt."""
    return cost.Workload(
        prompts=[prompt], rows=1, groups=1, completion=1, expected=1, updates=1, sequences=0, passes=0, rollouts=1,
        checkpointing=True, sampled_rows=1, sampled_prompts=1,
    )  # fmt: skip


def stage_config(
    stage: str, work: str, checkpoint: Path, recipe: Any, args: argparse.Namespace, folder: Path
) -> Any:
    """The settings of MM-R5 for one GPU, with the data in `folder`."""
    _, kind, entry = STAGES[stage]
    replaced_settings = ("data=", "out=", "model.path=", "heldout=")
    overrides = [o for o in stage_overrides(recipe)[stage] if not o.startswith(replaced_settings)]
    data = folder / ("traces.jsonl" if stage == "sft" else "questions.jsonl")
    iterations = 2 if stage == "grpo" else 1
    overrides += [
        f"data={data}", f"out={folder}/out", f"model.path={checkpoint}", "heldout=null",
        "trainer.save_strategy=no", f"trainer.max_steps={args.rounds * iterations}",
    ]  # fmt: skip
    if not torch.cuda.is_available():
        overrides += ["model.dtype=float32"]
    if stage == "grpo":  # in a recipe, its checkpoint states these settings
        overrides = ["model=qwen2_5_vl_7b", "prompt=default", *overrides]
        overrides += [
            "trainer.gradient_accumulation_steps=4", f"trainer.max_completion_length={args.completion}",
            f"+trainer.generation_kwargs={{min_new_tokens:{args.completion}}}", "alarms='off'",
            f"shared_prefix={'always' if work == 'grpo shared' else 'never'}",
        ]  # fmt: skip
    return compose_stage(kind, entry, overrides)


def time_training(stage: str, config: Any, rounds: int) -> float:
    """Seconds of an optimizer step: the mean of the last round. In GRPO a round is a rollout batch."""
    module: Any = STAGES[stage][0]
    times, train = StepTimes(), run.train

    def timed_train(started: Any, trainer: Any, progress: Any) -> None:
        trainer.add_callback(times)
        train(started, trainer, progress)

    module.load_model, module.train = random_model, timed_train
    run.save_result = lambda trainer, processor, model, settings, *_: settings  # random weights are not kept
    module.main(config)
    steps = len(times.ends) // rounds
    return (times.ends[-1] - times.ends[-1 - steps]) / steps


def time_logits(config: Any, folder: Path) -> float:
    """Seconds of one question whose pages are open: the median of three, after one that is not counted."""
    processor = load_processor(config.model)
    model = random_model(config.model).eval()
    backend = LocalBackend(model, processor, config.prompt, mode="logits", max_new_tokens=1)
    pages = [load_page(folder / f"{i}.png", backend.limits) for i in range(PAGES)]
    times = [now()]
    for _ in range(4):
        backend.generate(["Which page shows a red bar chart about water use?"], [pages])
        times.append(now())
    return median(end - start for start, end in itertools.pairwise(times[1:]))


def peak_gib() -> float:
    """PyTorch's peak of reserved memory, plus the GPU memory that is used outside of PyTorch's allocator."""
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return (torch.cuda.max_memory_reserved() + outside) / cost.GIB


def run_in_process(work: str, model: str, tokens: int, args: argparse.Namespace) -> Row:
    """The results of `measure`. If the work fails, `error` is the last line of its messages."""
    command = [sys.executable, __file__, "--one", work, "--models", model, "--page-tokens", str(tokens)]
    command += ["--completion", str(args.completion), "--rounds", str(args.rounds), "--gpu", args.gpu]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = args.out.parent / "gpu_logs" / f"{Path(model).name}_{tokens}_{work.replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(process.stdout + process.stderr, encoding="utf-8")
    if process.returncode:
        return {"error": process.stderr.strip().splitlines()[-1][:200]}
    result: Row = json.loads(process.stdout.splitlines()[-1])
    return result


COLUMNS = {
    "planned_gib": "GiB, planned", "measured_gib": "GiB, measured", "planned_s": "s, planned",
    "measured_s": "s, measured",
}  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows in Markdown; what was not measured is a dash."""
    titles = ["model", "tokens per page", "work", *COLUMNS.values()]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        cells = [row["model"], f"{row['page_tokens']:,}", row["work"]]
        values = (row.get(key) for key in COLUMNS)
        cells += ["–" if value is None else f"{value:.1f}" if value >= 1 else f"{value:.2g}" for value in values]
        lines.append(f"| {' | '.join(cells)} |" + (f" {row['error']}" if "error" in row else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="3B, 7B or checkpoint folders")
    parser.add_argument("--page-tokens", nargs="+", type=int, default=[1024, 2772], help="visual tokens per page")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--completion", type=int, default=300, help="tokens of a completion in GRPO")
    parser.add_argument("--rounds", type=int, default=3, help="training rounds, of which the last is measured")
    parser.add_argument("--plan", action="store_true", help="measure nothing: print the table to fill in")
    parser.add_argument("--gpu", choices=list(cost.GPUS), default="h100", help="the GPU that the plan is for")
    parser.add_argument("--out", type=Path, default=OUTPUT / "gpu.json")
    parser.add_argument("--one", choices=WORK, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(args.one, args.models[0], args.page_tokens[0], args, Path(folder))
        print(json.dumps(row))
        return
    rows: list[Row] = []
    results = {"rows": rows, "gpu": args.gpu, "completion": args.completion}
    for model, tokens, work in itertools.product(args.models, args.page_tokens, args.work):
        row: Row = {"model": Path(model).name, "page_tokens": tokens, "work": work}
        if args.plan:
            with tempfile.TemporaryDirectory() as folder:
                row |= measure(work, model, tokens, args, Path(folder))
        else:
            row |= run_in_process(work, model, tokens, args)
        rows.append(row)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        write_results(args.out, results, [])
    # Only now: this process uses no memory of the GPU while others measure it.
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine()
    write_results(args.out, results | {"device": device}, [])
    print(f"\n{device}; planned for {args.gpu}\n{table(rows)}")


if __name__ == "__main__":
    main()
