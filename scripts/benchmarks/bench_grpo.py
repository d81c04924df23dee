"""GRPO with shared prompt prefixes compared to TRL's trainer: time and memory of an update and of a complete step.

    python scripts/benchmarks/bench_grpo.py  # or: make bench-grpo; the complete table, on the CPU
    python scripts/benchmarks/bench_grpo.py --P 1200 --G 8 --C 100  # one cell of it
    python scripts/benchmarks/bench_grpo.py --single --P 2500 --G 2 --C 300  # micro-batches of one completion
    python scripts/benchmarks/bench_grpo.py --shape 3b --P 5250 --G 8 --C 256 --out grpo_3b.json  # on a GPU

For every prompt length P, group size G and completion length C, it runs the two trainers one after the other, each
in a separate process. Both train a Qwen2.5-VL with LoRA and a frozen vision tower on one question with five
generated pages that fill P tokens, with completions of exactly C sampled tokens, and with a KL penalty. `--shape
tiny` uses the shipped model in float32 on the CPU. `--shape 3b` uses the shape of Qwen2.5-VL-3B with random
weights in bfloat16, on a GPU if there is one.

*update* is forward pass, backward pass and optimizer step on a finished batch. *step* is the rollout, the
reference model's forward pass and the update. Memory is the peak during the update, minus the memory in use
before it. `bound` is the ratio of the processed tokens, G (P + C) / (P + G C). TRL also processes the pages with
the vision tower G times instead of once, so the speedup can exceed this bound. With `--single`, a micro-batch is
one completion, accumulated G times: TRL computes them one by one, and the shared trainer in one pass. The
roofline is the number of floating-point operations of the update, as PyTorch counts them, divided by the
measured rate of a large matrix product on the same machine. The time above the roofline is overhead and memory
traffic. Writes outputs/bench/grpo.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_common
import torch
from bench_common import OUTPUT, Row, argument_parser, at_least, print_targets, run_for_json, write_results
from tqdm import tqdm

SIZES = {"P": (600, 1200, 2500, 5000), "G": (4, 8, 16), "C": (100, 300)}
PAGES = 5
QUESTION = "Which page shows a red bar chart about water use?"
SHAPE_3B = "Qwen/Qwen2.5-VL-3B-Instruct"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one trainer at one size, in this process."""
    P, G, C = args.P[0], args.G[0], args.C[0]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    trainer, rows = make_trainer(args.one, args.shape, P, G, C, single=args.single)
    trainer.create_optimizer()
    model = trainer.model
    model.train()
    batch = trainer._generate_and_score_completions(rows)
    prompt_tokens, completion_tokens = int(batch["prompt_mask"][0].sum()), int(batch["completion_mask"].sum())
    if abs(prompt_tokens - P) > 0.02 * P or completion_tokens != G * C:
        actual = f"{prompt_tokens} and {completion_tokens}"
        raise RuntimeError(f"expected {P} prompt tokens and {G} × {C} completion tokens, found {actual}")

    def update(inputs: Any) -> None:
        parts = micro_batches(inputs, G if args.single else 1)
        for part in [parts] if args.one == "shared" else parts:  # the shared trainer takes them all at once
            trainer.compute_loss(model, part).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    def step() -> None:
        update(trainer._generate_and_score_completions(rows))

    update(batch)  # allocates the optimizer's state
    flops = count_flops(lambda: update(batch))
    return {
        "operations": flops,
        "mib": peak_mib(lambda: update(batch)),
        "update_s": median_s(lambda: update(batch), args.repeats),
        "step_s": median_s(step, args.repeats),
        "roofline_s": flops / matmul_rate(model.dtype, model.device),
    }


def micro_batches(batch: Any, count: int) -> list[Any]:
    """A rollout batch in `count` equal parts, split as TRL splits it."""
    from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

    return [
        unsplit_pixel_values_by_grid(part) for part in split_tensor_dict(split_pixel_values_by_grid(batch), count)
    ]


def make_trainer(
    kind: str, shape: str, P: int, G: int, C: int, *, single: bool
) -> tuple[Any, list[dict[str, Any]]]:
    """A trainer, and the G rows of its one prompt with about P tokens."""
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from mmr5_train.models.loading import vision_token_ids
    from mmr5_train.training.shared_grpo import SharedPrefixGRPOTrainer

    folder = Path(tempfile.mkdtemp())
    model_config, processor, data = make_data(folder, P, G)
    model = make_model(shape, model_config)
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=1 if single else G,
        gradient_accumulation_steps=G if single else 1, num_generations=G, max_completion_length=C,
        beta=0.04, temperature=1.0, learning_rate=1e-5, bf16=False, use_cpu=model.device.type == "cpu",
        gradient_checkpointing=False, report_to="none", remove_unused_columns=False, dataloader_pin_memory=False,
        generation_kwargs={"suppress_tokens": vision_token_ids(processor), "min_new_tokens": C},
    )  # fmt: skip
    layers = r".*language_model.*_proj"
    adapters = LoraConfig(r=64, lora_alpha=128, target_modules=layers, task_type="CAUSAL_LM")
    trainer = {"stock": GRPOTrainer, "shared": SharedPrefixGRPOTrainer}[kind](
        model=model, args=arguments, processing_class=processor, peft_config=adapters, train_dataset=data,
        reward_funcs=[lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids]],
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps
    return trainer, [data[i] for i in range(G)]


def make_data(folder: Path, P: int, G: int) -> tuple[Any, Any, Any]:
    """Page images in `folder` and a data set of G equal prompts with about P tokens.

    Returns the model's config, the processor and the data set.
    """
    from mmr5_train.common.config import compose_stage
    from mmr5_train.grpo import GrpoStage
    from mmr5_train.models.loading import load_processor
    from mmr5_train.ranking.records import Candidate
    from mmr5_train.training.dataset import prompt_dataset

    config = compose_stage(GrpoStage, "grpo", ["model=tiny", "prompt=default"])
    processor = load_processor(config.model)
    text_tokens = len(processor.tokenizer(QUESTION)["input_ids"]) + 120  # 120: the prompt's text and markers
    side = int(((P - text_tokens) / PAGES) ** 0.5) * 28
    model_config = config.model.model_copy(update={"min_pixels": 28 * 28, "max_pixels": side * side})
    processor = load_processor(model_config)
    draw_pages(folder, side)
    pages = [Candidate(doc_name="d", page=i, image=f"{i}.png", score=0) for i in range(PAGES)]
    query, missing = QUESTION, P
    while missing > 0:  # append words until the prompt has P tokens
        data = prompt_dataset([{}] * G, [query] * G, [pages] * G, folder, config.prompt, processor)
        missing = P - prompt_length(processor, data[0])
        query += " water" * missing
    return model_config, processor, data


def make_model(shape: str, config: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    from mmr5_train.models.loading import load_model
    from mmr5_train.models.shapes import shape_config

    if shape == "tiny":
        return load_model(config)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(shape_config(SHAPE_3B), dtype=torch.bfloat16)
    model.model.visual.requires_grad_(False)
    return model


def draw_pages(folder: Path, side: int) -> None:
    from data_construction.corpus.drawing import draw_page
    from data_construction.corpus.synthetic_documents import make_document

    pages = [page for index in range(2) for page in make_document(index, 0).pages][:PAGES]
    for i, page in enumerate(pages):
        draw_page(page).resize((side, side)).save(folder / f"{i}.png")


def prompt_length(processor: Any, row: dict[str, Any]) -> int:
    from trl.data_utils import prepare_multimodal_messages

    messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
    tokens = processor.apply_chat_template([messages], add_generation_prompt=True, tokenize=True, return_dict=True)
    return len(tokens["input_ids"][0])


def peak_mib(work: Any) -> float:
    """Peak memory while `work` runs minus memory before it: of the GPU, or else resident memory (Linux only)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    work()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status: expected the field {field}, found none")
    return int(match[1])


def median_s(work: Any, repeats: int) -> float:
    return statistics.median(_seconds(work) for _ in range(repeats))


def _seconds(work: Any) -> float:
    """Seconds of one call, including its work on the GPU."""
    _synchronize()
    started = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def count_flops(work: Any) -> int:
    """Floating-point operations of the matrix products and attention in `work`."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a product of large square matrices, the median of ten.

    A CPU without bfloat16 instructions takes minutes for a large product, so the size grows until one takes 0.1 s.
    """
    n = 8192 if device.type == "cuda" else 256
    while True:
        a = torch.randn(n, n, dtype=dtype, device=device)
        a @ a  # the first product also initializes the library
        if device.type == "cuda" or n == 2048 or _seconds(lambda a=a: a @ a) > 0.1:
            return 2 * n**3 / median_s(lambda a=a: a @ a, 10)
        n *= 2


def run_pair(P: int, G: int, C: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures both trainers, each in a separate process. Returns the two rows of a size."""
    results = {}
    for kind in ("stock", "shared"):
        command = [sys.executable, __file__, "--one", kind, "--P", str(P), "--G", str(G), "--C", str(C)]
        command += ["--shape", args.shape, "--repeats", str(args.repeats), "--threads", str(args.threads)]
        command += ["--single"] if args.single else []
        results[kind] = run_for_json(command, f"bench_grpo: {kind} at P {P}, G {G}, C {C}")
    rows = []
    for what in ("update", "step"):
        row: dict[str, Any] = {"what": what, "P": P, "G": G, "C": C}
        row |= {f"{kind}_s": results[kind][f"{what}_s"] for kind in results}
        row |= {"speedup": row["stock_s"] / row["shared_s"], "bound": G * (P + C) / (P + G * C)}
        for kind in results if what == "update" else ():
            row |= {f"{kind}_{key}": results[kind][key] for key in ("mib", "roofline_s")}
        rows.append(row)
    return rows


COLUMNS = {
    "what": "", "P": ",", "G": "", "C": "", "stock_s": ".2f", "shared_s": ".2f", "speedup": ".2f", "bound": ".2f",
    "stock_mib": ",.0f", "shared_mib": ",.0f", "stock_roofline_s": ".2f", "shared_roofline_s": ".2f",
}  # fmt: skip


def targets(rows: list[Row]) -> list[Row]:
    """The targets on the CPU with the tiny model, for the sizes that were measured."""
    updates = {(row["P"], row["G"], row["C"]): row for row in rows if row["what"] == "update"}
    steps = {(row["P"], row["G"], row["C"]): row for row in rows if row["what"] == "step"}
    results = []
    shares = [row["speedup"] / row["bound"] for row in updates.values() if row["P"] >= 1200]
    if shares:
        name = "smallest speedup of an update with P >= 1,200, as a share of the bound"
        results.append(at_least(name, min(shares), 0.75))
    for size, speedup in (((1200, 8, 100), 4), ((5000, 16, 100), 5.5)):
        if size in updates:
            name = f"speedup of an update at P {size[0]:,}, G {size[1]}, C {size[2]}"
            results.append(at_least(name, updates[size]["speedup"], speedup))
    savings = [row["stock_mib"] / row["shared_mib"] for (P, G, _), row in updates.items() if (P, G) == (5000, 16)]
    if savings:
        results.append(at_least("TRL's peak memory relative to the shared one at P 5,000, G 16", min(savings), 3))
    if (1200, 8, 100) in steps:
        results.append(at_least("speedup of a step at P 1,200, G 8, C 100", steps[1200, 8, 100]["speedup"], 2))
    return results


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(COLUMNS).replace('_', ' ')} |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [format(row[key], form) if key in row else "" for key, form in COLUMNS.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots the speedups, and the memory of the largest groups, against the prompt's length."""
    import matplotlib.pyplot as plt

    panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")[1]
    C = min(row["C"] for row in rows)
    sizes = sorted({row["G"] for row in rows})
    colors = dict(zip(sizes, ("#7fb069", "#e6aa68", "#ca3c25"), strict=False))
    for panel, what in zip(panels, ("update", "step"), strict=False):
        for G in sizes:
            line = [row for row in rows if (row["what"], row["G"], row["C"]) == (what, G, C)]
            lengths = [row["P"] for row in line]
            panel.plot(lengths, [row["speedup"] for row in line], "o-", color=colors.get(G), label=f"G = {G}")
            panel.plot(lengths, [row["bound"] for row in line], ":", color=colors.get(G))
        panel.set(title=f"{what}, C = {C}: speedup over TRL (dotted: bound)", xlabel="prompt tokens", ylim=0)
        panel.legend()
    largest = [row for row in rows if (row["what"], row["G"], row["C"]) == ("update", sizes[-1], C)]
    for kind, name, color in (("stock", "TRL", "#808080"), ("shared", "shared", "#ca3c25")):
        values = [row[f"{kind}_mib"] for row in largest]
        panels[2].plot([row["P"] for row in largest], values, "o-", color=color, label=name)
    panels[2].set(title=f"update: peak MiB, G = {sizes[-1]}", xlabel="prompt tokens", ylim=0)
    panels[2].legend()
    plt.savefig(path)


def main() -> None:
    parser = argument_parser(__doc__)
    names = {"P": "prompt lengths in tokens", "G": "completions per prompt", "C": "completion lengths in tokens"}
    for name, values in SIZES.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=list(values), help=names[name])
    parser.add_argument("--shape", choices=("tiny", "3b"), default="tiny")
    parser.add_argument(
        "--single", action="store_true", help="micro-batches of one completion, accumulated G times"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUTPUT / "grpo.json")
    parser.add_argument("--figure", type=Path, help="file for a plot of the table, .svg or .png")
    parser.add_argument("--one", choices=("stock", "shared"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    rows: list[dict[str, Any]] = []
    for P, G, C in tqdm(list(itertools.product(args.P, args.G, args.C)), unit="size"):
        rows += run_pair(P, G, C, args)
        results = {"rows": rows, "machine": machine(args), "repeats": args.repeats, "single": args.single}
        write_results(args.out, results, targets(rows) if args.shape == "tiny" else [])
    if args.figure:
        figure(rows, args.figure)
    print(table(rows))
    print_targets(targets(rows) if args.shape == "tiny" else [])
    print(f"bench-grpo: {len(rows)} rows in {args.out}")


def machine(args: argparse.Namespace) -> str:
    if args.shape != "tiny" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return bench_common.machine(threads=args.threads)


if __name__ == "__main__":
    main()
