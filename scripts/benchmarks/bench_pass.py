"""One forward pass over many pages on a GPU: mode logits at the 3B and 7B shapes, in bfloat16.

    python scripts/benchmarks/bench_pass.py                     # make bench-pass: writes outputs/bench/pass.json
    python scripts/benchmarks/bench_pass.py --shapes tiny --cases 4x64  # a small one, also on a CPU

For each case, PAGESxTOKENS, it measures the milliseconds of a query whose pages are open: cutting pages into
patches (encode), the vision tower, and the text model with the branches of all page ids (prefill). FLOPs are those
that PyTorch counts in the two forward passes; it counts causal attention in full. The card's rate is that of a
product of two 8,192 × 8,192 matrices. Weights are random, and nothing is downloaded. Each figure is the median of
five.

`places` is the prefill with the order decoded place by place. `windows` is the tower's time without
`mmr5_train.models.vision_speed`, and `copies` the prefill with a copy of the prompt's keys for each branch.
`again` is a second query on the same pages with the page cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_common import OUTPUT, Row, argument_parser, machine, write_results
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from mmr5_train.common.part_times import PartTimes
from mmr5_train.inference.local import LocalBackend
from mmr5_train.models import shared_prefix
from mmr5_train.models.config import ModelOptions
from mmr5_train.models.loading import TINY, load_processor
from mmr5_train.models.page_features import PageCache, encode_prompts, synchronize
from mmr5_train.models.page_places import place_by_place
from mmr5_train.models.page_scores import first_page_log_probs, id_branches
from mmr5_train.models.settings import complete_model
from mmr5_train.models.shapes import shape_config
from mmr5_train.models.vision_speed import align_mlps, batch_windows
from mmr5_train.ranking.prompt import read_prompt

SHAPES = {"3B": "Qwen/Qwen2.5-VL-3B-Instruct", "7B": "Qwen/Qwen2.5-VL-7B-Instruct", "tiny": "tiny"}
CASES = ("20x512", "20x1024", "50x512", "100x512")
LIMITS = {"shortest_edge": 3136, "longest_edge": 12_845_056}  # pixels of a page, as published
QUERY = "Which page shows a red bar chart about water use?"
REPEATS = 5


def backend(shape: str, device: torch.device) -> LocalBackend:
    """A model of the shape with random weights in bfloat16 (float32 on a CPU)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            shape_config(SHAPES[shape]), dtype=dtype, attn_implementation="sdpa"
        )
    processor = load_processor(complete_model(ModelOptions(path=str(TINY))))
    processor.image_processor.size = LIMITS
    return LocalBackend(model.eval(), processor, read_prompt("default"), mode="logits")


def make_pages(count: int, tokens: int, factor: int) -> list[Image.Image]:
    """Pages of noise that have `tokens` visual tokens each."""
    width = next(w for w in range(int(tokens**0.5), 0, -1) if tokens % w == 0)
    size = (width * factor, tokens // width * factor)
    return [Image.effect_noise(size, 40 + i).convert("RGB") for i in range(count)]


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """The median, after one run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return median(times[1:])


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a product of two square matrices in the benchmark's dtype."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: a @ b, device) / 1000)


def flops(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


@contextmanager
def short_completions(tokens: int) -> Iterator[None]:
    """Within the block, at most `tokens` completion tokens are one masked block."""
    before, shared_prefix.SHORT_TOKENS = shared_prefix.SHORT_TOKENS, tokens
    try:
        yield
    finally:
        shared_prefix.SHORT_TOKENS = before


@torch.inference_mode()
def parts_ms(ranker: LocalBackend, images: list[Image.Image]) -> dict[str, float]:
    """The times of cutting pages into patches and of the vision tower."""
    runs = []
    for _ in range(REPEATS + 1):
        times = PartTimes()
        encode_prompts(ranker.model, ranker.processor, ranker.prompt, [QUERY], [images], times=times)
        runs.append(times.seconds)
    return {part: 1000 * median(run[part] for run in runs[1:]) for part in ("encode", "vision")}


@torch.inference_mode()
def measure(ranker: LocalBackend, images: list[Image.Image], device: torch.device, rate: float) -> Row:
    model, processor = ranker.model, ranker.processor
    branches = [id_branches(processor.tokenizer, len(images))]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row: Row = {f"{part}_ms": value for part, value in parts_ms(ranker, images).items()}
    prompts = encode_prompts(model, processor, ranker.prompt, [QUERY], [images])
    row["prompt_tokens"] = len(prompts.ids[0])
    row["prefill_ms"] = milliseconds(lambda: first_page_log_probs(model, prompts, branches), device)
    with short_completions(0):
        row["copies_ms"] = milliseconds(lambda: first_page_log_probs(model, prompts, branches), device)
    tokenizer = processor.tokenizer
    row["places_ms"] = milliseconds(lambda: place_by_place(model, tokenizer, prompts), device, repeats=1)
    row["total_ms"] = milliseconds(lambda: ranker.generate([QUERY], [images]), device)
    row["vision_share"] = row["vision_ms"] / row["total_ms"]
    ranker.page_cache = PageCache(2**33)
    row["again_ms"] = milliseconds(lambda: ranker.generate([QUERY], [images]), device)
    ranker.page_cache = None
    row["teraflop"] = flops(lambda: ranker.generate([QUERY], [images])) / 1e12
    row["share_of_card"] = row["teraflop"] * 1e12 / (row["total_ms"] / 1000) / rate
    row["prefill_share_of_card"] = (
        flops(lambda: first_page_log_probs(model, prompts, branches)) / (row["prefill_ms"] / 1000) / rate
    )
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    names = [
        "shape", "pages", "page_tokens", "total_ms", "encode_ms", "vision_ms", "windows_ms", "prefill_ms",
        "copies_ms", "places_ms", "again_ms", "vision_share", "teraflop", "share_of_card",
        "prefill_share_of_card", "peak_gib",
    ]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        values = [row.get(name, "–") for name in names]
        lines.append(f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else f'{v}' for v in values)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["3B", "7B"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="PAGESxTOKENS")
    parser.add_argument("--out", type=Path, default=OUTPUT / "pass.json")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matrix_rate(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else machine()
    results = {"device": name, "matrix_tflops": rate / 1e12, "rows": []}
    for shape in args.shapes:
        ranker = backend(shape, device)
        cases = {case: tuple(map(int, case.split("x"))) for case in args.cases}
        pages = {case: make_pages(*sizes, ranker.limits.factor) for case, sizes in cases.items()}
        windows_ms = {case: parts_ms(ranker, images)["vision"] for case, images in pages.items()}
        batch_windows(ranker.model)
        align_mlps(ranker.model)
        for case, (count, tokens) in cases.items():
            row = {"shape": shape, "pages": count, "page_tokens": tokens, "windows_ms": windows_ms[case]}
            row |= measure(ranker, pages[case], device, rate)
            results["rows"].append(row)
            print(table([row]).splitlines()[-1], flush=True)
            write_results(args.out, results, [])
        del ranker
    print(f"\n{name}, {rate / 1e12:.0f} TFLOP/s\n{table(results['rows'])}")


if __name__ == "__main__":
    main()
