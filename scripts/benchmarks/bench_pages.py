"""The part of a GRPO step that is data: pages of 2,000 × 2,600 pixels, opened at each reading of a row or ahead.

    python scripts/benchmarks/bench_pages.py  # or: make bench-pages
    python scripts/benchmarks/bench_pages.py --settings published --rollouts 2

Both ways train the shipped model with shared prompts on the same questions, one after the other, each in a
separate process. *at each reading*: the data set opens the pages of a row when the row is read, as usual with TRL.
*once*: `training.rollout_pages`, which the command grpo uses. Settings are those of a rank of the recipe
`recommended` (batch 8 × accumulation 4, G 8) and of a rank of `mm_r5` with whole groups (batch 1 × accumulation
4, G 4, two iterations).

Seconds are means per optimizer step. *data* is the time in which the training process opens pages or waits for
them. It includes the first rollout batch, whose pages nothing can open ahead. After decoding, pages are shrunk
to few visual tokens, so that the model's part fits a CPU. Writes outputs/bench/pages.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    OUTPUT,
    Row,
    argument_parser,
    at_least,
    equal,
    machine,
    print_targets,
    run_for_json,
    write_results,
)

WIDTH, HEIGHT, PAGES = 2000, 2600, 5
SETTINGS: dict[str, dict[str, int]] = {
    "recommended": {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_generations": 8,
        "num_iterations": 1,
    },
    "published": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_generations": 4,
        "num_iterations": 2,
    },
}  # fmt: skip
WAYS = ("at each reading", "once")


def prompts_per_rollout(settings: dict[str, int]) -> int:
    rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    return rows // settings["num_generations"]


def draw_pages(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Writes `count` JPEG files of pages of a synthetic document."""
    from data_construction.corpus.drawing import draw_page
    from data_construction.corpus.synthetic_documents import make_document

    pages = [page for index in range(count) for page in make_document(index, 0).pages][:count]
    for i, page in enumerate(pages):
        draw_page(page).convert("RGB").resize(size).save(folder / f"{i}.jpg", quality=90)


def measure(way: str, name: str, args: argparse.Namespace, folder: Path) -> Row:
    """Trains `args.rollouts` rollout batches in this process. Returns seconds per step and openings per page."""
    torch.set_num_threads(args.threads)
    settings = SETTINGS[name]
    questions = args.rollouts * prompts_per_rollout(settings)
    draw_pages(folder, questions * PAGES, (args.width, args.height))
    trainer = make_trainer(way, settings, questions, args, folder)
    opened, waited = instrument()
    started = time.perf_counter()
    trainer.train()
    steps = trainer.state.global_step
    return {
        "settings": name,
        "way": way,
        "steps": steps,
        "step_s": (time.perf_counter() - started) / steps,
        "data_s": sum(waited) / steps,
        "openings": max(opened.values()),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def make_trainer(way: str, settings: dict[str, int], questions: int, args: Any, folder: Path) -> Any:
    from peft import LoraConfig
    from trl import GRPOConfig

    from mmr5_train.common.config import compose_stage
    from mmr5_train.grpo import GrpoStage
    from mmr5_train.models.loading import load_model, load_processor, vision_token_ids
    from mmr5_train.ranking.records import Candidate
    from mmr5_train.training.callbacks import FiniteSharedGRPOTrainer
    from mmr5_train.training.dataset import prompt_dataset
    from mmr5_train.training.shared_grpo import SharedPrefixGRPOTrainer

    config = compose_stage(
        GrpoStage, "grpo", ["model=tiny", "prompt=default", f"model.max_pixels={args.tokens * 28 * 28}"]
    )
    processor = load_processor(config.model)
    shown = [
        [Candidate(doc_name="d", page=i, image=f"{i}.jpg", score=0) for i in range(q * PAGES, (q + 1) * PAGES)]
        for q in range(questions)
    ]
    queries = [f"Which page shows a red bar chart about water use in {1990 + q}?" for q in range(questions)]
    rows: list[dict[str, Any]] = [{}] * questions
    data = prompt_dataset(rows, queries, shown, folder, config.prompt, processor, open_pages=way != "once")
    trainer_class = FiniteSharedGRPOTrainer if way == "once" else SharedPrefixGRPOTrainer
    return trainer_class(
        model=load_model(config.model),
        args=GRPOConfig(
            output_dir=str(folder), num_train_epochs=1, max_completion_length=64, beta=0.04, bf16=False,
            use_cpu=True,
            gradient_checkpointing=False, report_to="none", remove_unused_columns=False, disable_tqdm=True,
            dataloader_pin_memory=False, save_strategy="no", logging_strategy="no",
            generation_kwargs={"suppress_tokens": vision_token_ids(processor)}, **settings,
        ),
        processing_class=processor,
        peft_config=LoraConfig(r=64, target_modules=r".*language_model.*_proj", task_type="CAUSAL_LM"),
        train_dataset=data,
        reward_funcs=[lambda completion_ids, **_: [sum(ids) % 97 / 97 for ids in completion_ids]],
    )  # fmt: skip


def instrument() -> tuple[Counter[str], list[float]]:
    """Counts how often each page file is opened, and times the training process where it opens or waits."""
    from threading import current_thread, main_thread

    from mmr5_train.models import inputs
    from mmr5_train.training import dataset, rollout_pages

    opened: Counter[str] = Counter()
    waited: list[float] = []

    def timed(work: Any) -> Any:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            result = work(*args)
            if current_thread() is main_thread():
                waited.append(time.perf_counter() - started)
            return result

        return call

    def count(path: Path, limits: Any, load_page: Any = inputs.load_page) -> Any:
        opened[path.name] += 1
        return load_page(path, limits)

    inputs.load_page = dataset.load_page = timed(count)
    rollout_pages.wait_for_pages = timed(rollout_pages.wait_for_pages)
    return opened, waited


def targets(rows: list[Row]) -> list[Row]:
    results = []
    for name in dict.fromkeys(row["settings"] for row in rows):
        before, after = (next(r for r in rows if (r["settings"], r["way"]) == (name, way)) for way in WAYS)
        results += [
            equal(f"{name}: openings of a page in a rollout cycle", after["openings"], 1),
            at_least(f"{name}: times less data time than at each reading", before["data_s"] / after["data_s"], 10),
        ]
    return results


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rollouts", type=int, default=2, help="rollout batches per run")
    parser.add_argument("--tokens", type=int, default=256, help="largest number of visual tokens per page")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the page files, in pixels")
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; other cores open pages")
    parser.add_argument("--out", type=Path, default=OUTPUT / "pages.json")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.one, args.settings[0], args, Path(folder))))
        return
    rows = []
    sizes = [f"--{name}={getattr(args, name)}" for name in ("rollouts", "tokens", "width", "height", "threads")]
    for name in args.settings:
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, "--settings", name, *sizes]
            row = run_for_json(command, f"bench_pages: {name}, {way}")
            rows.append(row)
            print(
                f"{name}, {way}: {row['step_s']:.2f} s per step, {row['data_s']:.2f} s of it data "
                f"({row['data_s'] / row['step_s']:.0%}); a page is opened {row['openings']} times; "
                f"peak memory {row['peak_gib']:.1f} GiB"
            )
    met = targets(rows)
    write_results(args.out, {"rows": rows, "machine": machine(threads=args.threads), "tokens": args.tokens}, met)
    print_targets(met)


if __name__ == "__main__":
    main()
