"""GRPO with shared prompts beside TRL's own trainer: seconds and memory of an update and of a whole step.

    python scripts/bench_grpo.py                           # make bench-grpo: the whole table
    python scripts/bench_grpo.py --P 1200 --G 8 --C 100    # one cell of it

For every prompt length P, group size G and completion length C, the two trainers run in turn, each in a
process of its own: the shipped tiny Qwen2.5-VL with LoRA and a frozen tower, float32, one question with five
drawn pages that fill P tokens, completions of exactly C sampled tokens, KL on. *update* is forward, backward and
optimizer step on a finished batch; *step* is the rollout, the reference pass and the update. Memory is the peak of
the update above what the process held before it. Rows go to outputs/bench/grpo.json; `bound` is the ratio of
tokens, G (P + C) / (P + G C). Pages go through the tower G times on the one side and once on the other, on top.
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

from tqdm import tqdm

from mmr5_train.ranking.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"P": (600, 1200, 2500, 5000), "G": (4, 8, 16), "C": (100, 300)}
PAGES = 5
QUESTION = "Which page shows a red bar chart about water use?"


def measure(kind: str, P: int, G: int, C: int, repeats: int, threads: int) -> dict[str, Any]:
    """One trainer at one size, in this process."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    trainer, rows = make_trainer(kind, P, G, C)
    trainer.create_optimizer()
    model = trainer.model
    model.train()
    batch = trainer._generate_and_score_completions(rows)
    found = int(batch["prompt_mask"][0].sum())
    if abs(found - P) > 0.02 * P or batch["completion_mask"].sum() != G * C:
        raise RuntimeError(f"a batch of {found} prompt tokens, not {P}, or not {G} × {C} completion tokens")

    def update(inputs: Any) -> None:
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(model, inputs).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    def step() -> None:
        update(trainer._generate_and_score_completions(rows))

    memory = peak_mib(lambda: update(batch))
    return {"P": found, "update_s": median_s(lambda: update(batch), repeats), "step_s": median_s(step, repeats),
            "mib": memory}  # fmt: skip


def make_trainer(kind: str, P: int, G: int, C: int) -> tuple[Any, list[dict[str, Any]]]:
    """A trainer and the G rows of its one prompt, which holds about P tokens."""
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from mmr5_train.config import compose_stage
    from mmr5_train.grpo import GrpoStage
    from mmr5_train.models.finetune import prompt_dataset
    from mmr5_train.models.loading import load_model, load_processor, vision_token_ids
    from mmr5_train.ranking.records import Candidate
    from mmr5_train.shared_grpo import SharedPrefixGRPOTrainer

    config = compose_stage(GrpoStage, "grpo", [])
    processor = load_processor(config.model)
    text = len(processor.tokenizer(QUESTION)["input_ids"]) + 120  # the prompt's own words and markers
    side = round(((P - text) / PAGES) ** 0.5) * 28
    limits = {"min_pixels": 28 * 28, "max_pixels": side * side}
    model_config = config.model.model_copy(update=limits)
    processor = load_processor(model_config)
    folder = Path(tempfile.mkdtemp())
    shown = [Candidate(doc_name="d", page=i, image=f"{i}.png", score=0) for i in range(PAGES)]
    draw_pages(folder, side)
    rows, filler = [], ""
    while not rows or prompt_length(processor, rows[0]) < P:
        missing = P - prompt_length(processor, rows[0]) if rows else 0
        filler += " water" * max(1, missing) if rows else ""
        data = prompt_dataset([{}] * G, [QUESTION + filler] * G, [shown] * G, folder, config.prompt, processor)
        rows = [data[i] for i in range(G)]
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=G, num_generations=G, max_completion_length=C,
        beta=0.04, temperature=1.0, learning_rate=1e-5, bf16=False, use_cpu=True, gradient_checkpointing=False,
        report_to="none", remove_unused_columns=False, dataloader_pin_memory=False,
        generation_kwargs={"suppress_tokens": vision_token_ids(processor), "min_new_tokens": C},
    )  # fmt: skip
    layers = r".*language_model.*_proj"
    adapters = LoraConfig(r=64, lora_alpha=128, target_modules=layers, task_type="CAUSAL_LM")
    trainer = {"stock": GRPOTrainer, "shared": SharedPrefixGRPOTrainer}[kind](
        model=load_model(model_config), args=arguments, processing_class=processor, peft_config=adapters,
        train_dataset=data, reward_funcs=[lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids]],
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer, rows


def draw_pages(folder: Path, side: int) -> None:
    from data_construction.corpus.drawing import draw_page
    from data_construction.corpus.synthetic import make_document

    pages = [page for index in range(2) for page in make_document(index, 0).pages][:PAGES]
    for i, page in enumerate(pages):
        draw_page(page).resize((side, side)).save(folder / f"{i}.png")


def prompt_length(processor: Any, row: dict[str, Any]) -> int:
    from trl.data_utils import prepare_multimodal_messages

    messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
    tokens = processor.apply_chat_template([messages], add_generation_prompt=True, tokenize=True, return_dict=True)
    return len(tokens["input_ids"][0])


def peak_mib(work: Any) -> float:
    """The peak of resident memory while `work` runs, above what was held before (Linux)."""
    gc.collect()
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
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def run_pair(P: int, G: int, C: int, repeats: int, threads: int) -> list[dict[str, Any]]:
    """Both trainers in turn, each in a fresh process: the two rows of a size."""
    results = {}
    for kind in ("stock", "shared"):
        command = [sys.executable, __file__, "--one", kind, "--P", str(P), "--G", str(G), "--C", str(C)]
        command += ["--repeats", str(repeats), "--threads", str(threads)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"bench_grpo: {kind} at P {P}, G {G}, C {C} failed:\n{ended.stderr[-3000:]}")
        results[kind] = json.loads(ended.stdout.splitlines()[-1])
    stock, shared = results["stock"], results["shared"]
    bound = G * (P + C) / (P + G * C)
    rows = []
    for what in ("update", "step"):
        stock_s, shared_s = stock[f"{what}_s"], shared[f"{what}_s"]
        rows.append(
            {"what": what, "P": P, "G": G, "C": C, "stock_s": stock_s, "shared_s": shared_s,
             "speedup": stock_s / shared_s, "bound": bound,
             "stock_mib": stock["mib"] if what == "update" else None,
             "shared_mib": shared["mib"] if what == "update" else None}
        )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | P | G | C | stock s | shared s | times | bound | stock MiB | shared MiB |"]
    lines.append("|" + "---|" * 10)
    for row in rows:
        memory = [f"{row[key]:,.0f}" if row[key] is not None else "" for key in ("stock_mib", "shared_mib")]
        figures = [f"{row[key]:.2f}" for key in ("stock_s", "shared_s", "speedup", "bound")]
        cells = [row["what"], f"{row['P']:,}", str(row["G"]), str(row["C"]), *figures, *memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in SIZES.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=list(values))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench/grpo.json")
    parser.add_argument("--one", choices=("stock", "shared"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = list(itertools.product(args.P, args.G, args.C))
    if args.one:
        print(json.dumps(measure(args.one, *sizes[0], args.repeats, args.threads)))
        return
    rows: list[dict[str, Any]] = []
    for P, G, C in tqdm(sizes, unit="size"):
        rows += run_pair(P, G, C, args.repeats, args.threads)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"rows": rows, "machine": f"{platform.processor() or platform.machine()}, "
                              f"{args.threads} threads", "repeats": args.repeats})  # fmt: skip
    print(table(rows))
    print(f"bench-grpo: {len(rows)} rows in {args.out}")


if __name__ == "__main__":
    main()
