"""Checks before a checkpoint is loaded whether its prompts and answers fit its context (`models.lengths`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmr5_train.inference.local import MAX_SCORED_PAGES
from mmr5_train.inference.reranker import RankingOptions
from mmr5_train.models.inputs import page_id_tokens
from mmr5_train.models.lengths import Sizes, check_all_fit, context_limit, count_tokens
from mmr5_train.models.pages import page_limits, visual_tokens
from mmr5_train.ranking.answer_constraints import LIST_OPEN
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Candidate, PromptedTask


def check_prompts_fit(
    source: str,
    model_path: str,
    processor: Any,
    prompt: Prompt,
    options: RankingOptions,
    prompted: Sequence[PromptedTask],
    sizes: Sizes,
) -> None:
    """Raises `InputError` that lists the questions whose prompt and answer do not fit the context of a model.

    `source` begins the message. With windows, a question counts as the window of its largest pages, because any
    pages may meet in a window. `sizes` are those of all pages (`image_sizes`).
    """
    window = options.window
    reserved: dict[str, int] = {"max_new_tokens": options.max_new_tokens}
    list_open = 0
    if options.mode == "logits":
        window = min(window or MAX_SCORED_PAGES, len(page_id_tokens(processor.tokenizer, MAX_SCORED_PAGES)))
        list_open, reserved = len(processor.tokenizer(LIST_OPEN, add_special_tokens=False)["input_ids"]), {}
    limits = page_limits(processor)

    def largest(pages: Sequence[Candidate]) -> Sequence[Candidate]:
        return sorted(pages, key=lambda page: -visual_tokens(*sizes[page.image], limits))[:window]

    queries, shown = [p.task.query for p in prompted], [largest(p.shown) for p in prompted]
    counts = [
        count._replace(completion=list_open) for count in count_tokens(processor, prompt, queries, shown, sizes)
    ]
    limit = context_limit(model_path, reserved)
    if limit is not None:
        limit = replace(limit, advice=f"{limit.advice}, or rank in smaller windows")
    check_all_fit(source, [p.task.query_id for p in prompted], counts, limit)
