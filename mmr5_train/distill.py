"""Distillation: a reasoning model also learns to rank in one forward pass.

    python -m mmr5_train.evaluate data=outputs/data/train.jsonl 'systems={teacher:outputs/grpo/model}' \\
        out=outputs/teacher_rankings
    python -m mmr5_train.distill data=outputs/teacher_rankings/rankings/teacher.jsonl \\
        model.path=outputs/grpo/model out=outputs/distill

The training data are the model's own reasoned rankings of questions that are not evaluated. The result answers in
the modes `reason` and `logits`. Writes what sft writes. The loss has three terms:

- *Listwise*: after the prompt and the opening of the answer list, the probabilities of the page ids are trained
  towards the model's own order. The targets fall geometrically with the rank. (ZipRerank, arXiv 2605.11864, trains
  such scores from a teacher's ranking.)
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

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mmr5_train.common.config import run_stage
from mmr5_train.common.files import InputError, read_records
from mmr5_train.evaluation.metrics import is_complete
from mmr5_train.models.inputs import append_list_open, check_images, encode, page_id_tokens
from mmr5_train.models.loading import load_model, load_processor
from mmr5_train.ranking.notes import format_note
from mmr5_train.ranking.page_subsets import NO_VERDICT, sample_subsets, sort_pairs_first
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Ranking
from mmr5_train.training.adapters import lora_config
from mmr5_train.training.arguments import rejected_settings_as_input_errors, trainer_arguments
from mmr5_train.training.callbacks import FiniteSFTTrainer
from mmr5_train.training.dataset import prompt_dataset
from mmr5_train.training.run import TrainingStage, finish_run, normalize_loss_by_tokens, start_run, train


class DistillStage(TrainingStage):
    """`python -m mmr5_train.distill` (configs/distill.yaml)."""

    data: Path = Field(description="rankings of the reasoning model, as evaluate writes them")
    subsets: int = Field(ge=0, description="prompts with a subset of the pages per ranking, besides the full one")
    hint_share: float = Field(ge=0, lt=1, description="share of the prompts, from the first on, that have hints")
    completion_share: float = Field(gt=0, le=1, description="share of each batch that also trains its completions")
    decay: float = Field(gt=0, lt=1, description="ratio of a page's listwise target to that of the page before it")
    listwise_weight: float = Field(
        gt=0, description="weight of the listwise loss; the completion loss has weight 1"
    )
    verdict_weight: float = Field(ge=0, description="weight of the verdict loss; 0: verdicts are not trained")
    trainer: dict[str, Any] = Field(description="fields of trl.SFTConfig")


def main(config: DistillStage) -> None:
    rankings = read_rankings(config)
    processor = load_processor(config.model)
    tokens = score_tokens(processor, max(len(ranking.shown) for ranking in rankings), config.data)
    arguments = trainer_arguments(SFTConfig, config.trainer, out=config.out, seed=config.seed, model=config.model)
    run = start_run("distill", config, arguments, processor)

    model = load_model(config.model)
    completions = DataCollatorForVisionLanguageModeling(
        processor, max_length=arguments.max_length, completion_only_loss=True
    )
    with rejected_settings_as_input_errors("distill"):
        trainer = DistillTrainer(
            model=model,
            args=arguments,
            train_dataset=subset_dataset(rankings, config, processor),
            data_collator=Collator(processor, completions, config.prompt, config.decay, config.completion_share),
            processing_class=processor,
            peft_config=lora_config(config.model),
            score_tokens=tokens,
            listwise_weight=config.listwise_weight,
            verdict_weight=config.verdict_weight,
        )
    normalize_loss_by_tokens(trainer)

    labels = {"loss": "loss", "listwise_loss": "listwise", "verdict_loss": "verdicts"}
    train(run, trainer, progress=labels)
    finish_run(run, trainer, counts={"rankings": len(rankings)}, metric="listwise_loss")


def read_rankings(config: DistillStage) -> list[Ranking]:
    """The rankings with a completion that orders all pages. Raises `InputError` if there are none."""
    rankings = read_records(config.data, Ranking)
    usable = [ranking for ranking in rankings if ranking.greedy.completion and is_complete(ranking.greedy)]
    if not usable:
        raise InputError(
            f"{config.data}: none of {len(rankings)} answers has reasoning and a list of all pages; give the "
            "rankings of a reasoning model, rankings/<system>.jsonl of evaluate"
        )
    check_images((page for ranking in usable for page in ranking.shown), config.data.parent)
    return usable[: config.limit]


@dataclass(frozen=True)
class ScoreTokens:
    """The tokens whose logits score pages."""

    identifiers: Tensor  # (largest number of pages,) the token of each page id at the start of the answer list
    verdicts: Tensor  # (2,) the tokens in which "it helps" and "it does not help" first differ


def score_tokens(processor: Any, max_pages: int, data: Path) -> ScoreTokens:
    """The score tokens for prompts of up to `max_pages` pages. Errors name `data`, the rankings file.

    Raises `InputError` if the first tokens of the ids 1..`max_pages` are not distinct.
    """
    identifiers = page_id_tokens(processor.tokenizer, max_pages)
    if len(identifiers) < max_pages:
        raise InputError(
            f"{data}: prompts have up to {max_pages} pages, but only {len(identifiers)} page ids start with "
            "distinct tokens in this tokenizer; use fewer candidates per question"
        )
    helps, helps_not = processor.tokenizer([format_note("", True), format_note("", False)])["input_ids"]
    pair = next([a, b] for a, b in zip(helps, helps_not, strict=False) if a != b)
    return ScoreTokens(torch.tensor(identifiers), torch.tensor(pair))


def subset_dataset(rankings: Sequence[Ranking], config: DistillStage, processor: Any) -> Dataset:
    """One row per subset: its pages, order, verdicts and hints, and the completion on all pages."""
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
    queries, shown = [ranking.query for ranking, _ in subsets], [ranking.shown for ranking, _ in subsets]
    return prompt_dataset(rows, queries, shown, config.data.parent, config.prompt, processor)


def sample_hint_tokens(hints: Sequence[str], share: float, tokenizer: Any, rng: random.Random) -> list[list[int]]:
    """The token ids of each hint. Each token is kept with probability `share`."""
    tokens = [tokenizer(f" {hint}")["input_ids"] if hint and share else [] for hint in hints]
    return [[token for token in ids if rng.random() < share] for ids in tokens]


@dataclass
class Collator:
    """Batches the completions with TRL's collator and adds "scoring": inputs and labels of the one-pass scores.

    "scoring" holds the model inputs of B prompts on subsets of pages, each followed by the opening of the answer
    list. It also holds `targets` (B, N), the target probabilities of their page ids; `verdicts` (P,) on all P
    pages of the batch; and `page_ends` (B, T), true at the last token of each page or of its hint.
    """

    processor: Any
    completions: DataCollatorForVisionLanguageModeling
    prompt: Prompt
    decay: float
    completion_share: float

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pages = [[example["images"][position - 1] for position in example["positions"]] for example in examples]
        inputs = encode(self.processor, self.prompt, [example["query"] for example in examples], pages)
        inputs = append_hints(
            inputs, [hint for example in examples for hint in example["hints"]], self.processor.tokenizer
        )
        page_ends = inputs.pop("page_ends")
        inputs = append_list_open(inputs, self.processor.tokenizer)
        max_pages = max(len(example["order"]) for example in examples)
        labels = {
            "targets": torch.stack(
                [rank_targets(example["order"], self.decay, max_pages) for example in examples]
            ),
            "verdicts": torch.tensor([verdict for example in examples for verdict in example["verdicts"]]),
            "page_ends": pad(page_ends, (0, inputs["input_ids"].shape[1] - page_ends.shape[1])),
        }
        count = math.ceil(self.completion_share * len(examples))
        batch = self.completions([dict(example) for example in examples[:count]])
        return batch | {"scoring": {**inputs, **labels}}


def append_hints(inputs: Any, hints: Sequence[Sequence[int]], tokenizer: Any) -> Any:
    """Inserts a hint (token ids, may be empty) after each page of the left-padded prompts `inputs`.

    `hints` lists the hints of all pages of all prompts. Adds `page_ends` (B, T): true at the last token of each
    hint, or of the page itself where its hint is empty.
    """
    page_end = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    names = ("input_ids", "mm_token_type_ids", "attention_mask", "page_ends")
    remaining = iter(hints)
    sequences = []
    for ids, types, mask in zip(*(inputs[name] for name in names[:3]), strict=True):
        sequence: list[tuple[int, ...]] = []
        for token, kind in zip(ids[mask == 1].tolist(), types[mask == 1].tolist(), strict=True):
            is_end = token == page_end
            tokens = [(token, kind), *((hint_token, 0) for hint_token in (next(remaining) if is_end else ()))]
            sequence += [(*pair, 1, False) for pair in tokens[:-1]] + [(*tokens[-1], 1, is_end)]
        sequences.append(sequence)
    padding = (tokenizer.pad_token_id, 0, 0, False)
    longest = max(map(len, sequences))
    columns = torch.tensor([[padding] * (longest - len(sequence)) + sequence for sequence in sequences]).unbind(-1)
    return {**inputs, **dict(zip(names, columns, strict=True)), "page_ends": columns[-1].bool()}


class DistillTrainer(FiniteSFTTrainer):
    """SFT on completions, plus the listwise loss and the verdict loss."""

    def __init__(
        self, *args: Any, score_tokens: ScoreTokens, listwise_weight: float, verdict_weight: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.score_tokens = score_tokens
        self.listwise_weight = listwise_weight
        self.verdict_weight = verdict_weight

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        scoring = inputs.pop("scoring")
        targets_BN, verdicts_P, page_ends_BT = (scoring.pop(name) for name in ("targets", "verdicts", "page_ends"))
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # The vocabulary is large, so compute logits only at the positions where a page or a prompt ends.
        positions_K = torch.cat(
            [page_ends_BT.any(0).nonzero()[:, 0], torch.tensor([-1], device=page_ends_BT.device)]
        )
        logits_BKV = model(**scoring, logits_to_keep=positions_K, use_cache=False).logits.float()
        identifiers_N = self.score_tokens.identifiers[: targets_BN.shape[1]].to(logits_BKV.device)
        listwise = listwise_loss(logits_BKV[:, -1, identifiers_N], targets_BN)
        logits_PV = logits_BKV[:, :-1][page_ends_BT[:, positions_K[:-1]]]
        logits_P2 = logits_PV[:, self.score_tokens.verdicts.to(logits_PV.device)]
        verdict = verdict_loss(logits_P2, verdicts_P, page_ends_BT.nonzero()[:, 0])
        for name, value in (("listwise_loss", listwise), ("verdict_loss", verdict)):
            self._metrics["train"][name].append(self.accelerator.gather(value.detach()).mean().item())
        # With num_items_in_batch, the completion loss is this micro-batch's share of the step's loss, so the other
        # losses must be shares as well.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + (self.listwise_weight * listwise + self.verdict_weight * verdict) / steps


def rank_targets(order: Sequence[int], decay: float, size: int) -> Tensor:
    """(size,) target probability of each page id from 1: proportional to decay^rank. 0 for ids without a page."""
    weights = torch.zeros(size)
    weights[torch.tensor(order) - 1] = decay ** torch.arange(len(order), dtype=torch.float32)
    return weights / weights.sum()


def listwise_loss(logits_BN: Tensor, targets_BN: Tensor) -> Tensor:
    """Cross-entropy between the targets and the softmax over each prompt's page ids, averaged over prompts.

    A target of 0 marks padding: the prompt has no page of that id.
    """
    padding_BN = targets_BN == 0
    log_probs_BN = logits_BN.masked_fill(padding_BN, -torch.inf).log_softmax(-1).masked_fill(padding_BN, 0)
    return -(targets_BN * log_probs_BN).sum(-1).mean()


def verdict_loss(logits_P2: Tensor, verdicts_P: Tensor, prompts_P: Tensor) -> Tensor:
    """Cross-entropy of the verdicts: averaged over the pages with a verdict of each prompt, then over prompts.

    `prompts_P` is each page's row in the batch. The loss is 0 if no page has a verdict.
    """
    labeled_P = verdicts_P != NO_VERDICT
    if not labeled_P.any():
        return logits_P2.sum() * 0
    pages_B = torch.bincount(prompts_P[labeled_P], minlength=int(prompts_P.max()) + 1)
    losses_P = cross_entropy(logits_P2[labeled_P], verdicts_P[labeled_P], reduction="none")
    return (losses_P / pages_B[prompts_P[labeled_P]]).sum() / len(pages_B)


if __name__ == "__main__":
    run_stage(main, DistillStage, "distill")
