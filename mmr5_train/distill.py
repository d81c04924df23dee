"""Distillation: a reasoning model also learns to rank in one forward pass.

    python -m mmr5_train.evaluate data=outputs/data/train.jsonl 'systems={teacher:outputs/grpo/model}' \\
        out=outputs/teacher_rankings
    python -m mmr5_train.distill data=outputs/teacher_rankings/rankings/teacher.jsonl \\
        model.path=outputs/grpo/model out=outputs/distill

The training data are the model's own reasoned rankings of questions that are not evaluated. The result answers in
the modes `reason`, `direct` and `logits`. Writes what sft writes. The loss has three terms:

- *Listwise*: the probabilities with which the ids come first in the answer's list (`models.page_scores`) are
  trained towards the model's own order. With `gold_first`, relevant pages come first in it; ZipRerank (arXiv
  2605.11864) trains such scores so, from a teacher's ranking. `rank_loss` chooses the loss.
- *Verdicts*: at the last token of each page, the model predicts the verdict of its reasoning on the page: that it
  helps or does not help. The order follows from these verdicts.
- *Completions*: some of the completions are trained as in SFT, so that the model keeps its reasoning.

An order of n pages also orders any subset of them, so the first two terms also use subsets of the pages. A subset
keeps the page order of the prompt, because an answer may use it to order equally helpful pages. Subsets of two
pages come first. In the first prompts, a hint follows each page: the reasoning on that page up to its verdict.
Hints lose tokens from prompt to prompt until none are left, as Deng et al. (arXiv 2405.14838) remove a chain of
thought step by step. Without hints, training can get stuck on pages that match half of the question.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from pydantic import Field
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mmr5_train.common.config import run_stage
from mmr5_train.common.files import InputError, read_records
from mmr5_train.evaluation.metrics import is_complete
from mmr5_train.models.config import MAX_SCORED_PAGES
from mmr5_train.models.lengths import (
    TokenCount,
    context_limit,
    count_tokens,
    image_sizes,
    leave_out_too_long,
    lowest,
    setting_limit,
)
from mmr5_train.models.loading import load_model, load_processor, load_tokenizer
from mmr5_train.models.page_scores import id_branches
from mmr5_train.models.shared_prefix import unsupported_reason
from mmr5_train.ranking.page_subsets import NO_VERDICT, PageSubset, sample_subsets, sort_pairs_first
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Ranking, RankingTask
from mmr5_train.training.adapters import lora_config
from mmr5_train.training.arguments import rejected_settings_as_input_errors, trainer_arguments
from mmr5_train.training.dataset import prompt_dataset
from mmr5_train.training.distillation import Collator, DistillTrainer, RankLoss, rows_with_completion
from mmr5_train.training.run import (
    TrainingStage,
    check_training_pages,
    finish_run,
    policy_settings,
    start_run,
    train,
)

NO_VERDICTS = (
    "the reasoning states no verdict on any page, as refined reasoning does not: the verdict loss and the hints "
    "are off, and only the order is distilled. Without them, scores may stay at chance: compare the modes logits "
    "and reason on held-out questions, or train SFT on traces with refine=false"
)


class DistillStage(TrainingStage):
    """`python -m mmr5_train.distill` (configs/distill.yaml)."""

    data: Path = Field(description="rankings of the reasoning model, as evaluate writes them")
    subsets: int = Field(ge=0, description="prompts with a subset of the pages per ranking, besides the full one")
    hint_share: float = Field(ge=0, lt=1, description="share of the prompts, from the first on, that have hints")
    completion_share: float = Field(gt=0, le=1, description="share of the prompts that also train a completion")
    rank_loss: RankLoss = Field(
        description="listwise: cross-entropy with falling targets; ranknet: pairs; listmle: the whole order"
    )
    decay: float = Field(gt=0, lt=1, description="ratio of a page's listwise target to that of the page before it")
    gold_first: bool = Field(description="put the relevant pages before the others in the model's own order")
    listwise_weight: float = Field(
        gt=0, description="weight of the listwise loss; the completion loss has weight 1"
    )
    verdict_weight: float = Field(
        ge=0,
        description="weight of the verdict loss; 0, or reasoning without verdicts: verdicts are not trained",
    )
    trainer: dict[str, Any] = Field(description="fields of trl.SFTConfig")


def main(config: DistillStage) -> None:
    rankings = read_rankings(config)
    check_training_pages(config, rankings)
    policy = policy_settings("distill", config)
    sizes = image_sizes((page for ranking in rankings for page in ranking.shown), config.data.parent)
    processor = load_processor(policy.model)
    check_pages(processor.tokenizer, max(len(ranking.shown) for ranking in rankings), config.data)
    arguments = trainer_arguments(SFTConfig, config.trainer, out=config.out, seed=config.seed, model=policy.model)
    check_order(arguments)
    lengths = longest_sequences(rankings, policy.prompt, processor, sizes)
    limit = lowest(setting_limit("trainer.max_length", arguments.max_length), context_limit(config.model.path))
    query_ids = [ranking.query_id for ranking in rankings]
    fitting = leave_out_too_long(config.data, query_ids, lengths, limit, config.max_too_long)
    rankings = [rankings[i] for i in fitting.indices]
    verdicts = verdict_counts(rankings)
    run = start_run("distill", config, policy, arguments, processor, fitting)
    if PartialState().is_main_process and (note := describe_verdicts(verdicts)):
        print(f"distill: {note}", flush=True)

    model = load_model(policy.model)
    if reason := unsupported_reason(model):
        raise InputError(f"{policy.model.path}: distill needs a model whose prompts can be shared, but {reason}")
    completions = DataCollatorForVisionLanguageModeling(
        processor, max_length=arguments.max_length, completion_only_loss=True
    )
    with rejected_settings_as_input_errors("distill"):
        trainer = DistillTrainer(
            model=model,
            args=arguments,
            train_dataset=subset_dataset(rankings, config, policy.prompt, processor, arguments),
            data_collator=Collator(processor, completions, policy.prompt),
            processing_class=processor,
            peft_config=lora_config(policy.model),
            completion_share=config.completion_share,
            rank_loss=config.rank_loss,
            decay=config.decay,
            listwise_weight=config.listwise_weight,
            verdict_weight=config.verdict_weight if verdicts["pages_with_verdict"] else 0,
        )

    labels = {"loss": "loss", "listwise_loss": "listwise", "verdict_loss": "verdicts"}
    train(run, trainer, progress=labels)
    finish_run(run, trainer, counts={"rankings": len(rankings), **verdicts}, metric="listwise_loss")


def check_recipe(stages: Mapping[str, Any]) -> None:
    """Raises `InputError` if distill could not use the rankings of teach, which takes hours.

    `stages` maps the stages of a recipe to their configs. Called when a recipe starts, and again before teach,
    when its questions and its checkpoint exist. Prints what the distillation will lack.
    """
    if "teach" not in stages or "distill" not in stages:
        return
    if "traces" in stages and stages["traces"].refine:
        print(f"distill: {NO_VERDICTS} (stages.traces.refine=true)")
    teach, checkpoint = stages["teach"], stages["distill"].model.path
    if teach.data.is_file():
        tasks = read_records(teach.data, RankingTask)[: teach.limit]
        pages, source = max(len(task.candidates) for task in tasks), str(teach.data)
    elif "candidates" in stages:
        pages = stages["candidates"].candidates
        source = f"stages.candidates.candidates={pages}"
    else:
        return
    if "sft" in stages and not Path(checkpoint).is_dir():
        checkpoint = stages["sft"].model.path  # has the same tokenizer
    try:
        tokenizer = load_tokenizer(checkpoint)
    except InputError as error:
        print(f"distill: the number of pages is checked before teach, not yet: {error}")
        return
    check_pages(tokenizer, pages, source)


def check_order(arguments: Any) -> None:
    """Raises `InputError` for settings with which processes would not read the rows in order."""
    if arguments.train_sampling_strategy != "sequential" or arguments.accelerator_config.split_batches:
        raise InputError(
            "trainer: distill reads its prompts in order (few pages and many hints first, completions in the same "
            "micro-batch on all processes); expected train_sampling_strategy=sequential without "
            f"accelerator_config.split_batches, found {arguments.train_sampling_strategy} and "
            f"{arguments.accelerator_config.split_batches}"
        )


def read_rankings(config: DistillStage) -> list[Ranking]:
    """The rankings with a completion that orders all pages. Raises `InputError` if there are none."""
    rankings = read_records(config.data, Ranking)
    usable = [ranking for ranking in rankings if ranking.greedy.completion and is_complete(ranking.greedy)]
    if not usable:
        raise InputError(
            f"{config.data}: none of {len(rankings)} answers has reasoning and a list of all pages; give the "
            "rankings of a reasoning model, rankings/<system>.jsonl of evaluate"
        )
    return [gold_first(ranking) if config.gold_first else ranking for ranking in usable[: config.limit]]


def gold_first(ranking: Ranking) -> Ranking:
    """The ranking with its relevant pages first; otherwise pages keep their order."""
    relevant = [i for i in ranking.greedy.order if ranking.shown[i - 1].id in ranking.positives]
    order = (*relevant, *(i for i in ranking.greedy.order if i not in relevant))
    return ranking.model_copy(update={"greedy": ranking.greedy.model_copy(update={"order": order})})


def check_pages(tokenizer: Any, pages: int, source: object) -> None:
    """Raises `InputError` if one forward pass can't score so many pages. `source` begins the message."""
    if pages > MAX_SCORED_PAGES:
        raise InputError(
            f"{source}: prompts have up to {pages} pages, and one forward pass scores at most {MAX_SCORED_PAGES}; "
            f"use at most {MAX_SCORED_PAGES} candidates per question"
        )
    id_branches(tokenizer, pages)


def verdict_counts(rankings: Sequence[Ranking]) -> dict[str, int]:
    """The number of pages in the rankings, and of those on which the reasoning states a verdict."""
    verdicts = [verdict for ranking in rankings for verdict in _all_pages(ranking).verdicts]
    return {"pages": len(verdicts), "pages_with_verdict": sum(verdict != NO_VERDICT for verdict in verdicts)}


def describe_verdicts(counts: dict[str, int]) -> str:
    """What missing verdicts change; empty if every page has one."""
    pages, stated = counts["pages"], counts["pages_with_verdict"]
    if stated == 0:
        return NO_VERDICTS
    if stated < pages:
        return f"{stated:,} of {pages:,} pages have a verdict; the verdict loss and the hints use only these"
    return ""


def longest_sequences(rankings: Sequence[Ranking], prompt: Prompt, processor: Any, sizes: Any) -> list[TokenCount]:
    """The tokens of each ranking's longest sequence: all its pages, and either the completion or all hints."""
    completions = [ranking.greedy.completion for ranking in rankings]
    queries, shown = [ranking.query for ranking in rankings], [ranking.shown for ranking in rankings]
    counts = count_tokens(processor, prompt, queries, shown, sizes, completions)
    longest = []
    for ranking, count in zip(rankings, counts, strict=True):
        opening, rows = id_branches(processor.tokenizer, len(ranking.shown))
        branches = len(opening) + max(map(len, rows))
        hints = sample_hint_tokens(_all_pages(ranking).hints, 1, processor.tokenizer, random.Random(0))
        longest.append(count._replace(completion=max(count.completion, sum(map(len, hints)) + branches)))
    return longest


def _all_pages(ranking: Ranking) -> PageSubset:
    return next(sample_subsets(ranking, 0, seed=0))


def subset_dataset(
    rankings: Sequence[Ranking], config: DistillStage, prompt: Prompt, processor: Any, arguments: SFTConfig
) -> Dataset:
    """One row per subset: its pages, order, verdicts and hints, and the completion on all pages.

    With several processes, the first rows are repeated at the end, so that all processes get equally many batches.
    """
    subsets = sort_pairs_first(
        [
            (ranking, subset)
            for ranking in rankings
            for subset in sample_subsets(ranking, config.subsets, config.seed)
        ],
        config.seed,
    )
    rng = random.Random(config.seed)
    rows_with_hints = config.hint_share * len(subsets)
    rows = []
    for i, (ranking, subset) in enumerate(subsets):
        token_share = max(0, 1 - i / rows_with_hints) if rows_with_hints else 0
        rows.append(
            {
                "query": ranking.query,
                "completion": [{"role": "assistant", "content": ranking.greedy.completion}],
                **asdict(subset),
                "hints": sample_hint_tokens(subset.hints, token_share, processor.tokenizer, rng),
            }
        )
    batch_size, processes = arguments.train_batch_size, arguments.world_size
    indices = list(range(len(rows)))
    if processes > 1:
        indices += islice(cycle(indices[:]), -len(rows) % (batch_size * processes))
    flags = rows_with_completion(len(indices), config.completion_share, batch_size, processes)
    return prompt_dataset(
        [{**rows[i], "trains_completion": flag} for i, flag in zip(indices, flags, strict=True)],
        [subsets[i][0].query for i in indices],
        [subsets[i][0].shown for i in indices],
        config.data.parent,
        prompt,
        processor,
    )


def sample_hint_tokens(hints: Sequence[str], share: float, tokenizer: Any, rng: random.Random) -> list[list[int]]:
    """The token ids of each hint. Each token is kept with probability `share`."""
    tokens = [tokenizer(f" {hint}")["input_ids"] if hint and share else [] for hint in hints]
    return [[token for token in ids if rng.random() < share] for ids in tokens]


if __name__ == "__main__":
    run_stage(main, DistillStage, "distill")
