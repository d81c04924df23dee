"""The reranker's modes: speed compared to a plain loop, quality over seeds, and the server under load.

    python scripts/benchmarks/bench_rerank.py          # or: make bench-rerank

First, it trains the distilled model of the demo for each of `--seeds` under `--models`, unless it exists already.

*Quality* is the recall@1 of each model and mode on the held-out questions, and the time of mode adaptive.

*Speed* is measured with the model of the first seed. The *plain loop* works like MM-R5's own inference: it ranks
one question at a time with `generate` of transformers, and opens each page when it needs it. Here it uses the
same model, pages, prompt and number of new tokens, with greedy decoding. The modes run through
`Reranker.rank_many`. All run in one process and take turns, so that a slow minute of the machine affects each of
them; the result is the median. A page can be a candidate of several questions, and a reranker opens it only once,
so there is a second measurement on questions that share no page.

*Wide* prompts of 20 and 50 pages are measured as in bench_wide.py, with the model of the first seed, and with a
random one that has the real tokenizer (standin.py). Distillation of rankings of 20 pages is measured as in
bench_distill.py, and the *server* as in bench_serve.py. Writes outputs/bench/rerank.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import bench_distill
import bench_serve
import bench_wide
import torch
from bench_common import OUTPUT, ROOT, Row, argument_parser, at_least, at_most, print_targets, write_results
from PIL import Image
from standin import write_standin
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmr5_train import Reranker
from mmr5_train.common.files import read_records
from mmr5_train.demo import modes_summary
from mmr5_train.models.config import ModelOptions
from mmr5_train.models.inputs import encode
from mmr5_train.models.loading import read_settings
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.metrics import recall_at_k
from mmr5_train.ranking.records import RankingTask
from mmr5_train.reporting.views import read_results

RankFunction = Callable[[Sequence[RankingTask], Path], list[list[int]]]


def plain_loop(checkpoint: str, max_new_tokens: int) -> RankFunction:
    """A function that ranks one question at a time. It returns page indices, from 0, in ranked order."""
    settings = read_settings(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)

    def rank(tasks: Sequence[RankingTask], folder: Path) -> list[list[int]]:
        orders = []
        for task in tasks:
            pages = [Image.open(folder / page.image).convert("RGB") for page in task.candidates]
            inputs = encode(processor, settings.prompt, [task.query], [pages])
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            orders.append([i - 1 for i in to_model_answer(text, len(pages)).order])
        return orders

    return rank


def reranker_mode(checkpoint: str, name: Any, max_new_tokens: int, batch_size: int) -> RankFunction:
    reranker = Reranker(checkpoint, mode=name, max_new_tokens=max_new_tokens, batch_size=batch_size)

    def rank(tasks: Sequence[RankingTask], folder: Path) -> list[list[int]]:
        pages = [[folder / page.image for page in task.candidates] for task in tasks]
        return [ranked.order for ranked in reranker.rank_many([task.query for task in tasks], pages)]

    return rank


def measure(
    methods: dict[str, RankFunction], tasks: Sequence[RankingTask], folder: Path, repeats: int
) -> list[dict[str, Any]]:
    """One row per method: questions per second, speedup over the plain loop, and recall@1."""
    for rank in methods.values():
        rank(tasks[:2], folder)  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    orders: dict[str, list[list[int]]] = {}
    for _ in range(repeats):
        for name, rank in methods.items():
            started = time.perf_counter()
            orders[name] = rank(tasks, folder)
            seconds[name].append(time.perf_counter() - started)
    plain = median(seconds["plain_loop"])
    return [
        {
            "way": name,
            "questions_per_s": round(len(tasks) / median(durations), 2),
            "times_the_plain_loop": round(plain / median(durations), 2),
            "recall@1": round(mean_recall(orders[name], tasks), 4),
        }
        for name, durations in seconds.items()
    ]


def mean_recall(orders: Sequence[Sequence[int]], tasks: Sequence[RankingTask]) -> float:
    recalls = [
        recall_at_k([task.candidates[i].id for i in order], task.positives, 1)
        for order, task in zip(orders, tasks, strict=True)
    ]
    return sum(recalls) / len(recalls)


def without_shared_pages(tasks: Sequence[RankingTask]) -> list[RankingTask]:
    """The tasks that share no page with an earlier selected task."""
    seen: set[str] = set()
    selected = []
    for task in tasks:
        pages = {page.image for page in task.candidates}
        if not pages & seen:
            selected.append(task)
            seen |= pages
    return selected


def train_model(folder: Path, seed: int) -> None:
    command = [sys.executable, "-m", "mmr5_train.recipe", "experiment=[recommended,distilled]", "size=tiny"]
    subprocess.run([*command, f"seed={seed}", f"out={folder}"], cwd=ROOT, check=True)


def quality(folder: Path) -> dict[str, Any]:
    """Recall of each mode on the held-out questions, and the difference of `logits` to `reason`."""
    return {"ceiling": read_results(folder / "modes")["ceiling"]["recall@1"], **modes_summary(folder / "modes")}


def speed(folder: Path, questions: int, repeats: int, batch_size: int, max_new_tokens: int) -> dict[str, Any]:
    checkpoint, data = str(folder / "distill/model"), folder / "data/heldout.jsonl"
    tasks = read_records(data, RankingTask)
    methods = {"plain_loop": plain_loop(checkpoint, max_new_tokens)}
    for name in ("reason", "direct", "logits"):
        methods[name] = reranker_mode(checkpoint, name, max_new_tokens, batch_size)
    measured = {}
    for name, candidates in (("as_they_come", tasks), ("no_page_twice", without_shared_pages(tasks))):
        selected = candidates[:questions]
        images = [page.image for task in selected for page in task.candidates]
        measured[name] = {
            "questions": len(selected),
            "pages": len(images),
            "different_pages": len(set(images)),
            "rows": measure(methods, selected, data.parent, repeats),
        }
    return {"batch_size": batch_size, **measured}


def wide(folder: Path, models: Path) -> dict[str, Row]:
    """The figures of bench_wide.py for the trained model and for the random one with the real tokenizer."""
    standin = models / "standin"
    if not standin.is_dir():
        write_standin(standin)
    model = ModelOptions(dtype="float32", min_pixels=3136, max_pixels=128 * 28 * 28)
    return {
        "tiny": bench_wide.measure(str(folder / "distill/model")),
        "standin": bench_wide.measure(str(standin), prompt="default", model=model),
    }


def targets(result: dict[str, Any]) -> list[Row]:
    rows = {row["way"]: row for row in result["speed"]["as_they_come"]["rows"]}
    apart = {row["way"]: row for row in result["speed"]["no_page_twice"]["rows"]}
    results = [
        at_least("speedup of reason over the plain loop", rows["reason"]["times_the_plain_loop"], 2),
        at_least("speedup of logits over the plain loop", rows["logits"]["times_the_plain_loop"], 10),
        at_least("speedup of reason, no page twice", apart["reason"]["times_the_plain_loop"], 5),
    ]
    for name, row in result["wide"].items():
        results += bench_wide.targets(row, name)
    for seed, quality_of_seed in result["quality"].items():
        difference = quality_of_seed["logits_minus_reason"]["recall@1"]["mean"]
        results.append(at_least(f"recall@1 of logits minus that of reason, seed {seed}", difference, -0.03))
        recall = {row["system"]: row["recall@1"] for row in quality_of_seed["modes"]}
        direct = recall["direct"] - recall["reason"]
        results.append(at_least(f"recall@1 of direct minus that of reason, seed {seed}", direct, -0.03))
        adaptive = quality_of_seed["adaptive_minus_reason"]["recall@1"]["mean"]
        results.append(at_least(f"recall@1 of adaptive minus that of reason, seed {seed}", adaptive, -0.005))
        seconds = {row["system"]: row["seconds_per_question"] for row in quality_of_seed["modes"]}
        share = seconds["adaptive"] / seconds["reason"]
        results.append(at_most(f"time of adaptive as a share of reason, seed {seed}", share, 0.5))
    results += bench_distill.targets(result["twenty_pages"])
    return results + bench_serve.targets(result["server"])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", type=Path, default=OUTPUT / "rerank", help="folder of the models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--limit", type=int, default=300, help="held-out questions with 20 candidates")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=112)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=OUTPUT / "rerank.json")
    args = parser.parse_args()
    folders = {seed: (args.models / str(seed)).resolve() for seed in args.seeds}
    for seed, folder in folders.items():
        train_model(folder, seed)
    first = folders[args.seeds[0]]
    result = {
        "quality": {str(seed): quality(folder) for seed, folder in folders.items()},
        "speed": speed(first, args.questions, args.repeats, args.batch_size, args.max_new_tokens),
        "wide": wide(first, args.models),
        "twenty_pages": bench_distill.measure(args.models.resolve() / "20", args.seeds, args.limit),
        "server": bench_serve.measure(
            str(first / "distill/model"), args.clients, args.seconds, args.malformed, []
        ),
    }
    write_results(args.out, result, targets(result))
    print(json.dumps(result, indent=2))
    print_targets(targets(result))
    if bench_serve.has_wrong_response(result["server"]):
        sys.exit("bench_rerank: the server gave a wrong response; see above")


if __name__ == "__main__":
    main()
