"""GRPO with shared prompts beside TRL's own trainer: seconds and memory of an update and of a whole step.

    python scripts/benchmarks/bench_grpo.py  # make bench-grpo: the whole table, on the CPU
    python scripts/benchmarks/bench_grpo.py --P 1200 --G 8 --C 100  # one cell of it
    python scripts/benchmarks/bench_grpo.py --shape 3b --P 5250 --G 8 --C 256 --out grpo_3b.json  # on a GPU

For every prompt length P, group size G and completion length C, the two trainers run in turn, each in a
process of its own: a Qwen2.5-VL with LoRA and a frozen tower, one question with five drawn pages that fill P
tokens, completions of exactly C sampled tokens, KL on. `--shape tiny` is the shipped model in float32 on the CPU;
`3b` has the shape of Qwen2.5-VL-3B with random weights in bfloat16, on the GPU where there is one. *update* is
forward, backward and optimizer step on a finished batch; *step* is the rollout, the reference pass and the update.
Memory is the peak of the update above what was held before it. `bound` is the ratio of tokens, G (P + C) over
P + G C; pages go through the tower G times on the one side and once on the other, on top. The rooflines are the
operations of the update, as PyTorch counts them, at the rate of a large matrix product on the same machine: what
an update takes beyond that is overhead and memory traffic.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmr5_train.common.files import write_json

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"P": (600, 1200, 2500, 5000), "G": (4, 8, 16), "C": (100, 300)}
PAGES = 5
QUESTION = "Which page shows a red bar chart about water use?"
SHAPE_3B = "Qwen/Qwen2.5-VL-3B-Instruct"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One trainer at one size, in this process."""
    P, G, C = args.P[0], args.G[0], args.C[0]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    trainer, rows = make_trainer(args.one, args.shape, P, G, C)
    trainer.create_optimizer()
    model = trainer.model
    model.train()
    batch = trainer._generate_and_score_completions(rows)
    found = int(batch["prompt_mask"][0].sum())
    if abs(found - P) > 0.02 * P or batch["completion_mask"].sum() != G * C:
        raise RuntimeError(f"a batch of {found} prompt tokens, not {P}, or not {G} × {C} completion tokens")

    def update(inputs: Any) -> None:
        trainer.compute_loss(model, inputs).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    def step() -> None:
        update(trainer._generate_and_score_completions(rows))

    update(batch)  # the optimizer's state is there from now on
    done = operations(lambda: update(batch))
    return {
        "operations": done,
        "mib": peak_mib(lambda: update(batch)),
        "update_s": median_s(lambda: update(batch), args.repeats),
        "step_s": median_s(step, args.repeats),
        "roofline_s": done / matmul_rate(model.dtype, model.device),
    }


def make_trainer(kind: str, shape: str, P: int, G: int, C: int) -> tuple[Any, list[dict[str, Any]]]:
    """A trainer and the G rows of its one prompt, which holds about P tokens."""
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from mmr5_train.common.config import compose_stage
    from mmr5_train.grpo import GrpoStage
    from mmr5_train.models.loading import load_processor, vision_token_ids
    from mmr5_train.ranking.records import Candidate
    from mmr5_train.training.dataset import prompt_dataset
    from mmr5_train.training.shared_grpo import SharedPrefixGRPOTrainer

    config = compose_stage(GrpoStage, "grpo", [])
    processor = load_processor(config.model)
    text = len(processor.tokenizer(QUESTION)["input_ids"]) + 120  # the prompt's own words and markers
    side = int(((P - text) / PAGES) ** 0.5) * 28  # words fill the rest
    limits = {"min_pixels": 28 * 28, "max_pixels": side * side}
    model_config = config.model.model_copy(update=limits)
    processor = load_processor(model_config)
    folder = Path(tempfile.mkdtemp())
    shown = [Candidate(doc_name="d", page=i, image=f"{i}.png", score=0) for i in range(PAGES)]
    draw_pages(folder, side)
    query, missing = QUESTION, P
    while missing > 0:
        data = prompt_dataset([{}] * G, [query] * G, [shown] * G, folder, config.prompt, processor)
        rows = [data[i] for i in range(G)]
        missing = P - prompt_length(processor, rows[0])
        query += " water" * missing
    model = make_model(shape, model_config)
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=G, num_generations=G, max_completion_length=C,
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
    trainer.current_gradient_accumulation_steps = 1
    return trainer, rows


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
    """The peak of memory while `work` runs, above what was held before: the GPU's, else resident (Linux)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    work()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1])


def median_s(work: Any, repeats: int) -> float:
    return statistics.median(_seconds(work) for _ in range(repeats))


def _seconds(work: Any) -> float:
    """Of one call, the GPU's part included."""
    _synchronize()
    started = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def operations(work: Any) -> int:
    """Floating-point operations of the matrix products and attentions in `work`."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a product of large square matrices, the median of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, dtype=dtype, device=device)
    a @ a  # the first one also sets up
    return 2 * n**3 / median_s(lambda: a @ a, 10)


def run_pair(P: int, G: int, C: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both trainers in turn, each in a fresh process: the two rows of a size."""
    results = {}
    for kind in ("stock", "shared"):
        command = [sys.executable, __file__, "--one", kind, "--P", str(P), "--G", str(G), "--C", str(C)]
        command += ["--shape", args.shape, "--repeats", str(args.repeats), "--threads", str(args.threads)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"bench_grpo: {kind} at P {P}, G {G}, C {C} failed:\n{ended.stderr[-3000:]}")
        results[kind] = json.loads(ended.stdout.splitlines()[-1])
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


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(COLUMNS).replace('_', ' ')} |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [format(row[key], form) if key in row else "" for key, form in COLUMNS.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times faster, and the memory of the largest groups, over the prompt's length."""
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
        panel.set(title=f"{what}, C = {C}: times as fast as TRL (dotted: bound)", xlabel="prompt tokens", ylim=0)
        panel.legend()
    largest = [row for row in rows if (row["what"], row["G"], row["C"]) == ("update", sizes[-1], C)]
    for kind, name, color in (("stock", "TRL", "#808080"), ("shared", "shared", "#ca3c25")):
        values = [row[f"{kind}_mib"] for row in largest]
        panels[2].plot([row["P"] for row in largest], values, "o-", color=color, label=name)
    panels[2].set(title=f"update: peak MiB, G = {sizes[-1]}", xlabel="prompt tokens", ylim=0)
    panels[2].legend()
    plt.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in SIZES.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=list(values))
    parser.add_argument("--shape", choices=("tiny", "3b"), default="tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench/grpo.json")
    parser.add_argument("--figure", type=Path, help="draw the table there, as .svg or .png")
    parser.add_argument("--one", choices=("stock", "shared"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    rows: list[dict[str, Any]] = []
    for P, G, C in tqdm(list(itertools.product(args.P, args.G, args.C)), unit="size"):
        rows += run_pair(P, G, C, args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"rows": rows, "machine": machine(args), "repeats": args.repeats})
    if args.figure:
        figure(rows, args.figure)
    print(table(rows))
    print(f"bench-grpo: {len(rows)} rows in {args.out}")


def machine(args: argparse.Namespace) -> str:
    if args.shape != "tiny" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {args.threads} threads"


if __name__ == "__main__":
    main()
