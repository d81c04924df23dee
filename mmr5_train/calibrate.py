"""Chooses when mode adaptive reasons, and stores it in the checkpoint.

    python -m mmr5_train.calibrate data=outputs/data/select.jsonl checkpoint=outputs/distill/model \\
        out=outputs/calibrate

Mode adaptive ranks with `logits`, and reasons about the first pages where the two best scores differ by less than
a margin. This stage ranks each question in both ways, and computes recall@1 and the time of every margin. It
chooses the smallest margin with which recall@1 is at most `tolerance` below that of reasoning about all pages.
Give it questions that the checkpoint was not trained on, and that it is not evaluated on.

Writes curve.json: the margins, each with its recall@1, its share of reasoned questions and its seconds per
question, and the same figures of the modes logits and reason. Stores the margin and the number of pages in the
checkpoint's reranker.json, unless `store` is false.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field
from tqdm import tqdm

from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import InputError, open_output, read_records, write_json, write_manifest
from mmr5_train.evaluation.adaptive import choose, margin_curve
from mmr5_train.inference.reranker import Reranker
from mmr5_train.models.config import SETTINGS, Adaptive, CheckpointOptions
from mmr5_train.models.loading import read_settings
from mmr5_train.models.pages import load_page
from mmr5_train.ranking.metrics import recall_at_k
from mmr5_train.ranking.records import Order, PromptedTask, RankingTask


class CalibrateStage(StageConfig, CheckpointOptions):
    """`python -m mmr5_train.calibrate` (configs/calibrate.yaml)."""

    data: Path = Field(description="ranking tasks that the checkpoint was not trained on")
    checkpoint: Path = Field(description="a distilled model folder of this project")
    limit: int | None = Field(default=None, gt=0, description="use only the first questions, at most this many")
    order: Order = Field(default="score", description="order of the candidates in a prompt")
    pages: int = Field(default=5, ge=2, description="how many of the first pages mode adaptive reasons about")
    tolerance: float = Field(default=0.005, ge=0, description="recall@1 that adaptive may lose to reason")
    batch_size: int = Field(default=8, gt=0, description="prompts per batch")
    max_new_tokens: int | None = Field(default=None, gt=0, description="limit of an answer; null: by its pages")
    store: bool = Field(default=True, description="write the margin into the checkpoint's reranker.json")


class _Timed:
    """One way to rank: the rankings of all questions, and its seconds per question."""

    def __init__(
        self, rank: Callable[[Sequence[PromptedTask]], list[Any]], tasks: Sequence[PromptedTask], size: int
    ) -> None:
        start, self.rankings = time.perf_counter(), list[Any]()
        for first in tqdm(range(0, len(tasks), size), desc="calibrate", unit="batch"):
            self.rankings += rank(tasks[first : first + size])
        self.seconds = (time.perf_counter() - start) / len(tasks)


def main(config: CalibrateStage) -> None:
    settings = read_settings(config.checkpoint)
    if settings is None:
        raise InputError(f"{config.checkpoint}: has no {SETTINGS}; expected a checkpoint of this project")
    tasks = [task.in_prompt_order(config.order, config.seed) for task in read_records(config.data, RankingTask)]
    tasks = tasks[: config.limit]
    out = open_output(config.out, config.overwrite, inputs=[config.data], stage="calibrate")
    reranker = load_reranker(config)
    curve = measure(reranker, tasks, config)
    chosen = choose(curve, config.tolerance)
    write_json(out / "curve.json", {**curve, "chosen": chosen})
    if config.store:
        adaptive = Adaptive(pages=config.pages, margin=chosen["margin"])
        record = settings.model_copy(update={"adaptive": adaptive})
        write_json(config.checkpoint / SETTINGS, record.model_dump(mode="json"))
    counts = {"questions": len(tasks), "margin": chosen["margin"], "reasoned": chosen["reasoned"]}
    write_manifest(
        out, stage="calibrate", config=config.model_dump(mode="json"), inputs=[config.data], counts=counts
    )
    print(describe(curve, chosen, config))


def load_reranker(config: CalibrateStage) -> Reranker:
    return Reranker(
        config.checkpoint,
        prompt=config.prompt,
        model=config.model,
        override_checkpoint=config.override_checkpoint,
        mode="adaptive",
        adaptive={"pages": config.pages, "margin": 0.0},
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        page_cache=0,  # a question that reasons must read its pages, as in use
        window=None,
    )


def measure(reranker: Reranker, tasks: Sequence[PromptedTask], config: CalibrateStage) -> dict[str, Any]:
    """The content of curve.json without the chosen margin."""

    def ranked(batch: Sequence[PromptedTask], mode: Any, orders: Sequence[list[int]] | None = None) -> list[Any]:
        folder, limits = config.data.parent, reranker.backend.limits
        shown = [p.shown if orders is None else [p.shown[i] for i in orders[n]] for n, p in enumerate(batch)]
        images = [[load_page(folder / page.image, limits) for page in pages] for pages in shown]
        return reranker.rank_in_mode(mode, [p.task.query for p in batch], images)

    size = config.batch_size
    scored = _Timed(lambda batch: ranked(batch, "logits"), tasks, size)
    orders = [sorted(ranking.order[: config.pages]) for ranking in scored.rankings]
    firsts = {p.task.query_id: order for p, order in zip(tasks, orders, strict=True)}
    shortened = _Timed(
        lambda batch: ranked(batch, "reason", [firsts[p.task.query_id] for p in batch]), tasks, size
    )
    reasoned = _Timed(lambda batch: ranked(batch, "reason"), tasks, size)
    quick = [recall(p, r.order) for p, r in zip(tasks, scored.rankings, strict=True)]
    slow = [
        recall(p, [order[i] for i in r.order])
        for p, order, r in zip(tasks, orders, shortened.rankings, strict=True)
    ]
    return {
        "modes": {
            "logits": {"recall@1": fmean(quick), "seconds_per_question": scored.seconds},
            "reason": {
                "recall@1": fmean([recall(p, r.order) for p, r in zip(tasks, reasoned.rankings, strict=True)]),
                "seconds_per_question": reasoned.seconds,
            },
        },
        "adaptive": margin_curve(
            [ranking.margin for ranking in scored.rankings], quick, slow, scored.seconds, shortened.seconds
        ),
    }


def recall(prompted: PromptedTask, order: Sequence[int]) -> float:
    """Recall@1 of an order of the shown pages, indices from 0."""
    return recall_at_k([prompted.shown[i].id for i in order], prompted.task.positives, 1)


def describe(curve: dict[str, Any], chosen: dict[str, float], config: CalibrateStage) -> str:
    rows = {**curve["modes"], f"adaptive, margin {chosen['margin']:g}": chosen}
    lines = [
        f"  {name}: recall@1 {row['recall@1']:.3f}, {1000 * row['seconds_per_question']:.0f} ms per question"
        for name, row in rows.items()
    ]
    where = f"stored in {config.checkpoint / SETTINGS}" if config.store else "not stored"
    share = f"the first {config.pages} pages of {chosen['reasoned']:.0%} of questions"
    return "\n".join([f"calibrate: adaptive reasons about {share}; {where}", *lines])


if __name__ == "__main__":
    run_stage(main, CalibrateStage, "calibrate")
