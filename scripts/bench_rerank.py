"""How fast the reranker's modes are beside the plain loop, and how well they rank.

    python scripts/bench_rerank.py --checkpoint outputs/demo/grpo/model \
        --data outputs/demo/data/heldout.jsonl        # make bench-rerank; writes outputs/bench/rerank.json

The *plain loop* is what MM-R5's own inference does: one question after another, `generate` as transformers has it,
each page opened as it is needed. Here with the same model, pages, prompt and number of tokens, greedily. The modes
are asked through `Reranker.rank_many`. All in one process, in turn, so that a slow minute is everyone's; medians
of the repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmr5_train import Reranker
from mmr5_train.models.inputs import encode
from mmr5_train.models.loading import read_settings
from mmr5_train.ranking.answer import read_answer
from mmr5_train.ranking.files import read_records, write_json
from mmr5_train.ranking.metrics import recall_at_k
from mmr5_train.ranking.records import RankingTask

ROOT = Path(__file__).resolve().parents[1]
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
            orders.append([i - 1 for i in read_answer(text, len(pages)).order])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="outputs/demo/grpo/model")
    parser.add_argument("--data", type=Path, default=Path("outputs/demo/data/heldout.jsonl"))
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=112)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench/rerank.json")
    args = parser.parse_args()
    tasks = read_records(args.data, RankingTask)[: args.questions]
    ways = {"plain_loop": plain_loop(args.checkpoint, args.max_new_tokens)}
    for name in ("reason", "direct", "logits"):
        ways[name] = mode(args.checkpoint, name, args.max_new_tokens, args.batch_size)
    rows = measure(ways, tasks, args.data.parent, args.repeats)
    write_json(args.out, {"questions": len(tasks), "batch_size": args.batch_size, "rows": rows})
    for row in rows:
        print(
            f"{row['way']:<11} {row['questions_per_s']:>7.2f} questions/s   {row['times_the_plain_loop']:>6.2f} ×"
            f"   recall@1 {row['recall@1']:.3f}"
        )


if __name__ == "__main__":
    main()
