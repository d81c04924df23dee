"""Distillation: a reasoning model learns to rank in one forward pass, and keeps its reasoning.

    python -m mmr5_train.evaluate data=outputs/data/train.jsonl 'systems={teacher:outputs/grpo/model}' \\
        out=outputs/taught
    python -m mmr5_train.distill data=outputs/taught/rankings/teacher.jsonl model.path=outputs/grpo/model \\
        out=outputs/distill

What the model answered with reasoning, on questions that are not evaluated, is what it learns from. At the place
where its list would begin without a thought, the probabilities of the page ids are drawn towards its own order, by
a listwise loss: cross-entropy with targets that fall geometrically with the rank (ZipRerank, arXiv 2605.11864,
trains such scores from a teacher's ranking). Beside it, its own completions are taught again, so that one
checkpoint serves the modes `reason` and `logits`. Writes what sft writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mmr5_train.config import StageConfig, run_stage
from mmr5_train.models.answering import identifier_ids, with_list_open
from mmr5_train.models.checkpoints import open_training_output, run_settings
from mmr5_train.models.finetune import (
    MODEL,
    best_counts,
    lora_config,
    prompt_dataset,
    save_result,
    settings_checked,
    train,
    trained_parameters,
    trainer_arguments,
    weigh_tokens_alike,
)
from mmr5_train.models.inputs import check_images, encode_messages
from mmr5_train.models.loading import ModelConfig, load_model, load_processor
from mmr5_train.models.watching import FiniteSFTTrainer, HeldOutConfig, held_out
from mmr5_train.ranking.files import InputError, read_records, write_manifest
from mmr5_train.ranking.metrics import is_complete
from mmr5_train.ranking.prompt import Prompt, with_images
from mmr5_train.ranking.records import Ranking


class DistillStage(StageConfig):
    """`python -m mmr5_train.distill` (configs/distill.yaml)."""

    data: Path = Field(description="rankings of the reasoning model, as evaluate writes them")
    limit: int | None = Field(default=None, gt=0, description="use the first so many")
    decay: float = Field(gt=0, lt=1, description="how much less a page's target is than that of the one before it")
    weight: float = Field(gt=0, description="of the listwise loss; that of the completions has 1")
    model: ModelConfig
    prompt: Prompt
    heldout: HeldOutConfig | None = None
    trainer: dict[str, Any] = Field(description="fields of trl.SFTConfig")


@dataclass
class Collator:
    """TRL's collator for the completions, and the same prompts with an answer begun behind them."""

    processor: Any
    completions: DataCollatorForVisionLanguageModeling
    decay: float

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.completions([dict(row) for row in rows])
        asked = [
            with_images(row["prompt"], [{"type": "image", "image": image} for image in row["images"]])
            for row in rows
        ]
        begun = with_list_open(encode_messages(self.processor, asked), self.processor.tokenizer)
        most = max(len(row["order"]) for row in rows)
        batch["begun"] = {
            **begun,
            "targets": torch.stack([targets(row["order"], self.decay, most) for row in rows]),
        }
        return batch


class DistillTrainer(FiniteSFTTrainer):
    """SFT on completions, and the listwise loss beside it."""

    listwise_weight: float
    identifiers: Tensor  # (most pages,) token of each page id

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        begun = inputs.pop("begun")
        targets_BN = begun.pop("targets")
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        logits_BV = model(**begun, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        identifiers_N = self.identifiers[: targets_BN.shape[1]].to(logits_BV.device)
        listwise = listwise_loss(logits_BV[:, identifiers_N], targets_BN)
        self._metrics["train"]["listwise_loss"].append(self.accelerator.gather(listwise.detach()).mean().item())
        # Where the loss of the completions is a share of the whole step's, this one is too.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + self.listwise_weight * listwise / steps


def targets(order: Sequence[int], decay: float, most: int) -> Tensor:
    """(most,) target of each page id from 1, in the shape decay^rank and of sum 1; 0 where there is no page."""
    weights = torch.zeros(most)
    weights[torch.tensor(order) - 1] = decay ** torch.arange(len(order), dtype=torch.float32)
    return weights / weights.sum()


def listwise_loss(logits_BN: Tensor, targets_BN: Tensor) -> Tensor:
    """Cross-entropy of the targets and the probabilities among the ids of each prompt's pages, mean over prompts.

    Pages stand first in a row; those whose target is 0 are not there.
    """
    absent = targets_BN == 0
    log_probs_BN = logits_BN.masked_fill(absent, -torch.inf).log_softmax(-1).masked_fill(absent, 0)
    return -(targets_BN * log_probs_BN).sum(-1).mean()


def main(config: DistillStage) -> None:
    rankings = read_taught(config)
    processor = load_processor(config.model)
    identifiers = page_identifiers(processor, rankings, config.data)
    arguments = trainer_arguments(SFTConfig, config.trainer, out=config.out, seed=config.seed, model=config.model)
    watch = held_out(config.heldout, arguments, processor, config.prompt, True)
    settings, inputs = run_settings(config), [config.data, Path(config.model.path)]
    checkpoint = open_training_output(config.out, config.overwrite, inputs, "distill", settings)
    completions = DataCollatorForVisionLanguageModeling(
        processor, max_length=arguments.max_length, completion_only_loss=True
    )
    with settings_checked("distill"):
        trainer = DistillTrainer(
            model=load_model(config.model),
            args=arguments,
            train_dataset=taught_dataset(rankings, config, processor),
            data_collator=Collator(processor, completions, config.decay),  # type: ignore[arg-type]
            processing_class=processor,
            peft_config=lora_config(config.model),
        )
    trainer.listwise_weight, trainer.identifiers = config.weight, torch.tensor(identifiers)
    weigh_tokens_alike(trainer)
    trained = trained_parameters(trainer)
    train(trainer, "distill", {"loss": "loss", "listwise_loss": "listwise"}, settings, checkpoint, watch)
    save_result(trainer, processor, config.model, config.prompt, True, config.out)
    if trainer.accelerator.is_main_process:
        steps = trainer.state.global_step
        counts = {"rankings": len(rankings), "steps": steps, "trained_parameters": trained}
        counts |= {"processes": trainer.accelerator.num_processes} | best_counts(trainer)
        values = config.model_dump(mode="json")
        write_manifest(config.out, stage="distill", config=values, inputs=[config.data], counts=counts)
        losses = [entry["listwise_loss"] for entry in trainer.state.log_history if "listwise_loss" in entry]
        learned = f"listwise loss {losses[0]:.3f} → {losses[-1]:.3f}, " if losses else ""
        print(f"distill: {len(rankings)} rankings, {steps} steps, {learned}in {config.out / MODEL}")


def read_taught(config: DistillStage) -> list[Ranking]:
    """The rankings whose answers are whole. Raises `InputError` where none has any reasoning."""
    read = read_records(config.data, Ranking)
    whole = [ranking for ranking in read if ranking.greedy.completion and is_complete(ranking.greedy)]
    if not whole:
        raise InputError(
            f"{config.data}: none of {len(read)} answers has reasoning and a list of all pages; give the rankings "
            "of a reasoning model, rankings/<system>.jsonl of evaluate"
        )
    check_images((page for ranking in whole for page in ranking.shown), config.data.parent)
    return whole[: config.limit]


def page_identifiers(processor: Any, rankings: Sequence[Ranking], data: Path) -> list[int]:
    """The token of each page id. Raises `InputError` where prompts hold more pages than these tell apart."""
    most = max(len(ranking.shown) for ranking in rankings)
    identifiers = identifier_ids(processor.tokenizer, most)
    if len(identifiers) < most:
        raise InputError(
            f"{data}: prompts of up to {most} pages, and this tokenizer tells {len(identifiers)} apart by their "
            "ids' first token; rank fewer candidates a question"
        )
    return identifiers


def taught_dataset(rankings: Sequence[Ranking], config: DistillStage, processor: Any) -> Dataset:
    """The model's own completions, and the orders in them."""
    rows = [
        {
            "completion": [{"role": "assistant", "content": ranking.greedy.completion}],
            "order": list(ranking.greedy.order),
        }
        for ranking in rankings
    ]
    queries, shown = [ranking.query for ranking in rankings], [ranking.shown for ranking in rankings]
    return prompt_dataset(rows, queries, shown, config.data.parent, config.prompt, processor)


if __name__ == "__main__":
    run_stage(main, DistillStage, "distill")
