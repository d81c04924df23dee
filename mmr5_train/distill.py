"""Distillation: a reasoning model learns to rank in one forward pass, and keeps its reasoning.

    python -m mmr5_train.evaluate data=outputs/data/train.jsonl 'systems={teacher:outputs/grpo/model}' \\
        out=outputs/taught
    python -m mmr5_train.distill data=outputs/taught/rankings/teacher.jsonl model.path=outputs/grpo/model \\
        out=outputs/distill

What the model answered with reasoning, on questions that are not evaluated, is what it learns from. At the place
where its list would begin without a thought, the probabilities of the page ids are drawn towards its own order, by
a listwise loss: cross-entropy with targets that fall geometrically with the rank (ZipRerank, arXiv 2605.11864,
trains such scores from a teacher's ranking). What its thought said of each page, that it helps or not, is taught
at the page's own last token, before any thought: the order follows from that. And its completions are taught
again, so that one checkpoint serves the modes `reason` and `logits`. Writes what sft writes.

An order of n pages holds for any of them: scores are taught on all pages of an answer, and on `parts` of them.
These stay in the order of the prompt, since an answer's order among pages that help alike may be that one. Prompts
with two pages come first. In the first of these, what the thought says of a page before its verdict stands behind
the page, and fewer of its tokens from prompt to prompt until none are left (as Deng et al., arXiv 2405.14838, take
a chain of thought away step by step). Without that, training can stop where a page fits half of the question.
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

from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import InputError, read_records, write_manifest
from mmr5_train.evaluation.metrics import is_complete
from mmr5_train.inference.local import identifier_ids, with_list_open
from mmr5_train.models.inputs import check_images, encode
from mmr5_train.models.loading import ModelConfig, load_model, load_processor
from mmr5_train.ranking.notes import format_note
from mmr5_train.ranking.parts import NO_VERDICT, sample_subsets, sort_pairs_first
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Ranking
from mmr5_train.training.callbacks import FiniteSFTTrainer, HeldOutConfig, held_out
from mmr5_train.training.checkpoints import open_training_output, run_settings
from mmr5_train.training.finetune import (
    MODEL,
    best_counts,
    lora_config,
    normalize_loss_by_tokens,
    prompt_dataset,
    save_result,
    settings_checked,
    train,
    trained_parameters,
    trainer_arguments,
)


class DistillStage(StageConfig):
    """`python -m mmr5_train.distill` (configs/distill.yaml)."""

    data: Path = Field(description="rankings of the reasoning model, as evaluate writes them")
    limit: int | None = Field(default=None, gt=0, description="use the first so many")
    parts: int = Field(ge=0, description="prompts with some of an answer's pages, besides its own")
    hinted: float = Field(ge=0, lt=1, description="share of the prompts that are begun with hints behind pages")
    kept: float = Field(gt=0, le=1, description="share of each batch whose whole answers are taught again")
    decay: float = Field(gt=0, lt=1, description="how much less a page's target is than that of the one before it")
    listwise: float = Field(gt=0, description="weight of the listwise loss; that of the completions has 1")
    verdicts: float = Field(ge=0, description="weight of the verdicts on single pages; 0: they are not taught")
    model: ModelConfig
    prompt: Prompt
    heldout: HeldOutConfig | None = None
    trainer: dict[str, Any] = Field(description="fields of trl.SFTConfig")


@dataclass
class Collator:
    """TRL's collator for the answers of some rows, and the parts of all as prompts with an answer begun behind.

    `begun` holds these prompts' inputs, with the `targets` (B, N) of their page ids, the `verdicts` (P,) on all
    pages, and where they are taught: `ends` (B, T), true at the last token of a page or of the hint behind it.
    """

    processor: Any
    completions: DataCollatorForVisionLanguageModeling
    prompt: Prompt
    decay: float
    kept: float

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pages = [[row["images"][position - 1] for position in row["positions"]] for row in rows]
        begun = encode(self.processor, self.prompt, [row["query"] for row in rows], pages)
        begun = with_hints(begun, [hint for row in rows for hint in row["hints"]], self.processor.tokenizer)
        ends = begun.pop("ends")
        begun = with_list_open(begun, self.processor.tokenizer)
        ends = pad(ends, (0, begun["input_ids"].shape[1] - ends.shape[1]))
        most = max(len(row["order"]) for row in rows)
        wanted = torch.stack([targets(row["order"], self.decay, most) for row in rows])
        said = torch.tensor([verdict for row in rows for verdict in row["verdicts"]])
        batch = self.completions([dict(row) for row in rows[: math.ceil(self.kept * len(rows))]])
        return batch | {"begun": {**begun, "targets": wanted, "verdicts": said, "ends": ends}}


@dataclass(frozen=True)
class Readout:
    """Which tokens speak for a page."""

    identifiers: Tensor  # (most pages,) of each page id, where the list begins
    verdicts: Tensor  # (2,) of "helps" and of "does not help"


class DistillTrainer(FiniteSFTTrainer):
    """SFT on completions, with the listwise loss and that of the verdicts beside it."""

    readout: Readout
    weights: tuple[float, float]  # of the listwise loss, of the verdicts

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        begun = inputs.pop("begun")
        targets_BN, verdicts_P, ends_BT = (begun.pop(name) for name in ("targets", "verdicts", "ends"))
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # The head is large: only where some prompt has a page's end, and where the lists begin.
        kept_T = torch.cat([ends_BT.any(0).nonzero()[:, 0], torch.tensor([-1], device=ends_BT.device)])
        logits_BTV = model(**begun, logits_to_keep=kept_T, use_cache=False).logits.float()
        identifiers_N = self.readout.identifiers[: targets_BN.shape[1]].to(logits_BTV.device)
        listwise = listwise_loss(logits_BTV[:, -1, identifiers_N], targets_BN)
        logits_PV = logits_BTV[:, :-1][ends_BT[:, kept_T[:-1]]]
        logits_P2 = logits_PV[:, self.readout.verdicts.to(logits_PV.device)]
        said = verdict_loss(logits_P2, verdicts_P, ends_BT.nonzero()[:, 0])
        for name, value in (("listwise_loss", listwise), ("verdict_loss", said)):
            self._metrics["train"][name].append(self.accelerator.gather(value.detach()).mean().item())
        # Where the loss of the completions is a share of the whole step's, these are too.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + (self.weights[0] * listwise + self.weights[1] * said) / steps


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


def verdict_loss(logits_P2: Tensor, verdicts_P: Tensor, prompts_P: Tensor) -> Tensor:
    """Cross-entropy of the verdicts: mean over a prompt's pages of which something was said, then over prompts.

    `prompts_P` is the row of the batch that each page stands in. 0 where nothing was said of any page.
    """
    said_P = verdicts_P != NO_VERDICT
    if not said_P.any():
        return logits_P2.sum() * 0
    pages_B = torch.bincount(prompts_P[said_P], minlength=int(prompts_P.max()) + 1)
    losses_P = cross_entropy(logits_P2[said_P], verdicts_P[said_P], reduction="none")
    return (losses_P / pages_B[prompts_P[said_P]]).sum() / len(pages_B)


def main(config: DistillStage) -> None:
    rankings = read_taught(config)
    processor = load_processor(config.model)
    readout = make_readout(processor, max(len(ranking.shown) for ranking in rankings), config.data)
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
            data_collator=Collator(processor, completions, config.prompt, config.decay, config.kept),
            processing_class=processor,
            peft_config=lora_config(config.model),
        )
    trainer.readout, trainer.weights = readout, (config.listwise, config.verdicts)
    normalize_loss_by_tokens(trainer)
    trained = trained_parameters(trainer)
    shown = {"loss": "loss", "listwise_loss": "listwise", "verdict_loss": "verdicts"}
    train(trainer, "distill", shown, settings, checkpoint, watch)
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


def make_readout(processor: Any, most: int, data: Path) -> Readout:
    """The tokens of the processor's vocabulary that speak for pages, at most `most` in a prompt.

    Raises `InputError` where prompts hold more pages than the ids' first tokens tell apart.
    """
    identifiers = identifier_ids(processor.tokenizer, most)
    if len(identifiers) < most:
        raise InputError(
            f"{data}: prompts of up to {most} pages, and this tokenizer tells {len(identifiers)} apart by their "
            "ids' first token; rank fewer candidates a question"
        )
    helps, helps_not = processor.tokenizer([format_note("", True), format_note("", False)])["input_ids"]
    pair = next([a, b] for a, b in zip(helps, helps_not, strict=False) if a != b)
    return Readout(torch.tensor(identifiers), torch.tensor(pair))


def with_hints(inputs: Any, hints: Sequence[Sequence[int]], tokenizer: Any) -> Any:
    """The inputs of left-padded prompts with a hint (token ids, or none) behind each page, all in one list.

    `ends` (B, T) is true at the last token of each page's hint, or of the page itself where it has none.
    """
    page_end = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    names = ("input_ids", "mm_token_type_ids", "attention_mask", "ends")
    left = iter(hints)
    rows = []
    for ids, types, there in zip(*(inputs[name] for name in names[:3]), strict=True):
        row: list[tuple[int, ...]] = []
        for token, kind in zip(ids[there == 1].tolist(), types[there == 1].tolist(), strict=True):
            is_end = token == page_end
            tokens = [(token, kind), *((said, 0) for said in (next(left) if is_end else ()))]
            row += [(*one, 1, False) for one in tokens[:-1]] + [(*tokens[-1], 1, is_end)]
        rows.append(row)
    padding = (tokenizer.pad_token_id, 0, 0, False)
    longest = max(map(len, rows))
    columns = torch.tensor([[padding] * (longest - len(row)) + row for row in rows]).unbind(-1)
    return {**inputs, **dict(zip(names, columns, strict=True)), "ends": columns[-1].bool()}


def thinned(hints: Sequence[str], share: float, tokenizer: Any, rng: random.Random) -> list[list[int]]:
    """Each hint's token ids, of which about `share` are kept."""
    tokens = [tokenizer(f" {hint}")["input_ids"] if hint and share else [] for hint in hints]
    return [[token for token in ids if rng.random() < share] for ids in tokens]


def taught_dataset(rankings: Sequence[Ranking], config: DistillStage, processor: Any) -> Dataset:
    """A row is a part of an answer, and the whole answer."""
    parts = sort_pairs_first(
        [(one, part) for one in rankings for part in sample_subsets(one, config.parts, config.seed)], config.seed
    )
    rng = random.Random(config.seed)
    hinted = config.hinted * len(parts)
    rows = [
        {
            "query": ranking.query,
            "completion": [{"role": "assistant", "content": ranking.greedy.completion}],
            **asdict(part),
            "hints": thinned(part.hints, max(0, 1 - i / hinted) if hinted else 0, processor.tokenizer, rng),
        }
        for i, (ranking, part) in enumerate(parts)
    ]
    queries, shown = [ranking.query for ranking, _ in parts], [ranking.shown for ranking, _ in parts]
    return prompt_dataset(rows, queries, shown, config.data.parent, config.prompt, processor)


if __name__ == "__main__":
    run_stage(main, DistillStage, "distill")
