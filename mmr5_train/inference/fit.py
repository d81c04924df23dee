"""Checks before a checkpoint is loaded whether its prompts and answers fit its context (`models.lengths`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmr5_train.inference.options import RankingOptions, window_size
from mmr5_train.models.config import MAX_SCORED_PAGES, answer_tokens
from mmr5_train.models.lengths import Sizes, check_all_fit, context_limit, count_tokens
from mmr5_train.models.pages import page_limits, visual_tokens
from mmr5_train.ranking.answer_constraints import LIST_OPEN
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Candidate, Mode, PromptedTask

BRANCH_TOKENS = 4
"""Of a page id and its separator, behind the opening of the list."""


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
    modes: tuple[Mode, ...] = ("logits", "reason") if options.mode == "adaptive" else (options.mode or "reason",)
    for mode in modes:
        _check_mode(source, model_path, processor, prompt, options, mode, prompted, sizes)


def _check_mode(
    source: str,
    model_path: str,
    processor: Any,
    prompt: Prompt,
    options: RankingOptions,
    mode: Mode,
    prompted: Sequence[PromptedTask],
    sizes: Sizes,
) -> None:
    window = (
        options.adaptive.pages if options.mode == "adaptive" and mode == "reason" else window_size(options, mode)
    )
    pages = min(max(len(p.shown) for p in prompted), window or MAX_SCORED_PAGES)
    if mode == "logits":
        list_open = len(processor.tokenizer(LIST_OPEN, add_special_tokens=False)["input_ids"]) + BRANCH_TOKENS
        reserved = {}
    else:
        list_open = 0
        reserved = {"max_new_tokens": options.max_new_tokens or answer_tokens(pages, think=mode == "reason")}
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
