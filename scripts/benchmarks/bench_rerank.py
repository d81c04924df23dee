"""How fast the reranker's modes are beside the plain loop, how well they rank, and the server under load.

    python scripts/benchmarks/bench_rerank.py          # make bench-rerank; writes outputs/bench/rerank.json

Makes the distilled model of the demo for each of `--seeds` first, under `--models` (what is there already stays).
*Quality* is each one's recall@1 on its held-out questions, by mode. *Speed* is measured with the first: the *plain
loop* is what MM-R5's own inference does: one question after another, `generate` as transformers has it, each page
opened as it is needed; here with the same model, pages, prompt and number of tokens, greedily. The modes are asked
through `Reranker.rank_many`. All in one process, in turn, so that a slow minute is everyone's; medians.
Pages are candidates of several questions, and a reranker opens each once; so there is a second measurement, on
questions no two of which share a page. The *server* is scripts/benchmarks/bench_serve.py's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import bench_serve
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmr5_train import Reranker
from mmr5_train.common.files import read_records, write_json
from mmr5_train.demo import of_modes
from mmr5_train.evaluation.metrics import recall_at_k
from mmr5_train.models.inputs import encode
from mmr5_train.models.loading import read_settings
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.records import RankingTask
from mmr5_train.reporting.views import read_results

ROOT = Path(__file__).resolve().parents[2]
Ranks = Callable[[Sequence[RankingTask], Path], list[list[int]]]


def plain_loop(checkpoint: str, max_new_tokens: int) -> Ranks:
    """Orders of indices from 0, one question at a time."""
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


def mode(checkpoint: str, name: Any, max_new_tokens: int, batch_size: int) -> Ranks:
    reranker = Reranker(checkpoint, mode=name, max_new_tokens=max_new_tokens, batch_size=batch_size)

    def rank(tasks: Sequence[RankingTask], folder: Path) -> list[list[int]]:
        pages = [[folder / page.image for page in task.candidates] for task in tasks]
        return [ranked.order for ranked in reranker.rank_many([task.query for task in tasks], pages)]

    return rank


def measure(
    ways: dict[str, Ranks], tasks: Sequence[RankingTask], folder: Path, repeats: int
) -> list[dict[str, Any]]:
    """A row a way: questions a second, how many times the plain loop's, recall@1 of its orders."""
    for rank in ways.values():
        rank(tasks[:2], folder)  # what is slow the first time is not what is measured
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    orders: dict[str, list[list[int]]] = {}
    for _ in range(repeats):
        for name, rank in ways.items():
            started = time.perf_counter()
            orders[name] = rank(tasks, folder)
            seconds[name].append(time.perf_counter() - started)
    plain = median(seconds["plain_loop"])
    return [
        {
            "way": name,
            "questions_per_s": round(len(tasks) / median(taken), 2),
            "times_the_plain_loop": round(plain / median(taken), 2),
            "recall@1": round(recall(orders[name], tasks), 4),
        }
        for name, taken in seconds.items()
    ]


def recall(orders: Sequence[Sequence[int]], tasks: Sequence[RankingTask]) -> float:
    found = [
        recall_at_k([task.candidates[i].id for i in order], task.positives, 1)
        for order, task in zip(orders, tasks, strict=True)
    ]
    return sum(found) / len(found)


def without_common_pages(tasks: Sequence[RankingTask]) -> list[RankingTask]:
    """Those, from the first on, that share no page with one before."""
    seen: set[str] = set()
    apart = []
    for task in tasks:
        pages = {page.image for page in task.candidates}
        if not pages & seen:
            apart.append(task)
            seen |= pages
    return apart


def make_model(folder: Path, seed: int) -> None:
    command = [sys.executable, "-m", "mmr5_train.recipe", "experiment=[recommended,distilled]", "size=tiny"]
    subprocess.run([*command, f"seed={seed}", f"out={folder}"], cwd=ROOT, check=True)


def quality(folder: Path) -> dict[str, Any]:
    """Each mode on the held-out questions, and what `logits` loses or gains, with its interval."""
    return {"ceiling": read_results(folder / "modes")["ceiling"]["recall@1"], **of_modes(folder / "modes")}


def speed(folder: Path, questions: int, repeats: int, batch_size: int, max_new_tokens: int) -> dict[str, Any]:
    checkpoint, data = str(folder / "distill/model"), folder / "data/heldout.jsonl"
    tasks = read_records(data, RankingTask)
    ways = {"plain_loop": plain_loop(checkpoint, max_new_tokens)}
    for name in ("reason", "direct", "logits"):
        ways[name] = mode(checkpoint, name, max_new_tokens, batch_size)
    measured = {}
    for name, asked in (("as_they_come", tasks), ("no_page_twice", without_common_pages(tasks))):
        chosen = asked[:questions]
        shown = [page.image for task in chosen for page in task.candidates]
        measured[name] = {
            "questions": len(chosen),
            "pages": len(shown),
            "different_pages": len(set(shown)),
            "rows": measure(ways, chosen, data.parent, repeats),
        }
    return {"batch_size": batch_size, **measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "outputs/bench/rerank")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=112)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench/rerank.json")
    args = parser.parse_args()
    folders = {seed: (args.models / str(seed)).resolve() for seed in args.seeds}
    for seed, folder in folders.items():
        make_model(folder, seed)
    first = folders[args.seeds[0]]
    result = {
        "quality": {str(seed): quality(folder) for seed, folder in folders.items()},
        "speed": speed(first, args.questions, args.repeats, args.batch_size, args.max_new_tokens),
        "server": bench_serve.measure(
            str(first / "distill/model"), args.clients, args.seconds, args.malformed, []
        ),
    }
    write_json(args.out, result)
    print(json.dumps(result, indent=2))
    if bench_serve.unanswered(result["server"]):
        sys.exit("bench_rerank: a request to the server was not answered as it must be; see above")


if __name__ == "__main__":
    main()
