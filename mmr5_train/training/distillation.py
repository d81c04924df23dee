"""The parts of distillation: which rows train what, the batches, and the losses.

The scoring losses of an optimizer step are means over the step's prompts, for any batch size, accumulation and
number of processes. The completion loss is a mean over the step's completion tokens. Small steps can't all have
the same share of completions, so it is scaled by the step's share divided by `completion_share`: its mean weight
is 1.

All processes make the same forward passes. Under ZeRO-3 each pass gathers the weights from all processes, so a
pass that only some of them make would never end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mmr5_train.common.files import InputError
from mmr5_train.models.inputs import append_list_open, encode, page_id_tokens
from mmr5_train.ranking.notes import format_note
from mmr5_train.ranking.page_subsets import NO_VERDICT
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.training.callbacks import FiniteSFTTrainer


@dataclass(frozen=True)
class ScoreTokens:
    """The tokens whose logits score pages."""

    identifiers: Tensor  # (largest number of pages,) the token of each page id at the start of the answer list
    verdicts: Tensor  # (2,) the tokens in which "it helps" and "it does not help" first differ


def score_tokens(tokenizer: Any, max_pages: int, source: str | Path) -> ScoreTokens:
    """The score tokens for prompts of up to `max_pages` pages. `source` says where the number comes from.

    Raises `InputError` if the first tokens of the ids 1..`max_pages` are not distinct.
    """
    identifiers = page_id_tokens(tokenizer, max_pages)
    if len(identifiers) < max_pages:
        raise InputError(
            f"{source}: prompts have up to {max_pages} pages, but only {len(identifiers)} page ids start with "
            "distinct tokens in this tokenizer, so one forward pass can't score more; use at most "
            f"{len(identifiers)} candidates per question"
        )
    helps, helps_not = tokenizer([format_note("", True), format_note("", False)])["input_ids"]
    pair = next([a, b] for a, b in zip(helps, helps_not, strict=False) if a != b)
    return ScoreTokens(torch.tensor(identifiers), torch.tensor(pair))


def rows_with_completion(rows: int, share: float, batch_size: int, processes: int) -> list[bool]:
    """Whether each row of the data set also trains its completion: `share` of the rows.

    Rows are read in order, `batch_size` per micro-batch, and consecutive micro-batches go to different processes.
    All processes train equally many completions in the same micro-batch, and they are spread evenly over the
    micro-batches: with a share of ¼ and a batch size of 1, every fourth micro-batch of each process has one.
    """
    per_batch = Fraction(str(share)) * batch_size
    flags = []
    for row in range(rows):
        micro_batch = row // (batch_size * processes)
        count = int(per_batch * (micro_batch + 1)) - int(per_batch * micro_batch)
        flags.append(row % batch_size < count)
    return flags


@dataclass
class Collator:
    """Makes batches of two parts: "scoring", inputs and labels of the one-pass scores, and a batch of completions.

    "scoring" holds the model inputs of B prompts on subsets of pages, each followed by the opening of the answer
    list. It also holds `targets` (B, `max_pages`), the target probabilities of the page ids; `verdicts` (P,) on
    all P pages of the batch; and `page_ends` (B, T), true at the last token of each page or of its hint.

    The other entries are TRL's batch of the examples with `trains_completion`, if there are any.
    """

    processor: Any
    completions: DataCollatorForVisionLanguageModeling
    prompt: Prompt
    decay: float
    max_pages: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pages = [[example["images"][position - 1] for position in example["positions"]] for example in examples]
        inputs = encode(self.processor, self.prompt, [example["query"] for example in examples], pages)
        inputs = append_hints(
            inputs, [hint for example in examples for hint in example["hints"]], self.processor.tokenizer
        )
        page_ends = inputs.pop("page_ends")
        inputs = append_list_open(inputs, self.processor.tokenizer)
        labels = {
            "targets": torch.stack(
                [rank_targets(example["order"], self.decay, self.max_pages) for example in examples]
            ),
            "verdicts": torch.tensor([verdict for example in examples for verdict in example["verdicts"]]),
            "page_ends": pad(page_ends, (0, inputs["input_ids"].shape[1] - page_ends.shape[1])),
        }
        trained = [dict(example) for example in examples if example["trains_completion"]]
        batch = self.completions(trained) if trained else {}
        return {**batch, "scoring": {**inputs, **labels}}


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
        self,
        *args: Any,
        score_tokens: ScoreTokens,
        completion_share: float,
        listwise_weight: float,
        verdict_weight: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # as in `normalize_loss_by_tokens`
        self.score_tokens = score_tokens
        self.completion_share = completion_share
        self.listwise_weight, self.verdict_weight = listwise_weight, verdict_weight
        self.step_prompts = 0  # prompts of the current optimizer step on this process

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """What the step's sum of token losses is divided by.

        It is the number of completion tokens in the step, over all processes, times the expected number of
        completions divided by the actual one.
        """
        self.step_prompts = sum(len(batch["scoring"]["targets"]) for batch in batch_samples)
        with_completions = [batch for batch in batch_samples if "labels" in batch]
        if not with_completions:
            return torch.ones((), device=device)
        tokens: Any = super()._get_num_items_in_batch(with_completions, device)
        completions = sum(len(batch["labels"]) for batch in with_completions)
        return tokens * (self.completion_share * self.step_prompts / completions)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        scoring = inputs.pop("scoring")
        completion_loss = 0.0
        if "labels" in inputs:
            completion_loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        listwise, verdict = self._scoring_losses(model, scoring)
        share_of_step = len(scoring["input_ids"]) / self.step_prompts
        return completion_loss + share_of_step * (self.listwise_weight * listwise + self.verdict_weight * verdict)

    def _scoring_losses(self, model: Any, scoring: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The listwise loss and the verdict loss of a batch, each a mean over its prompts. Logs both."""
        labels = ("targets", "verdicts", "page_ends")
        targets_BN, verdicts_P, page_ends_BT = (scoring[name] for name in labels)
        inputs = {name: value for name, value in scoring.items() if name not in labels}
        # The vocabulary is large, so compute logits only at the positions where a page or a prompt ends.
        positions_K = torch.tensor([-1], device=page_ends_BT.device)
        if self.verdict_weight:
            positions_K = torch.cat([page_ends_BT.any(0).nonzero()[:, 0], positions_K])
        logits_BKV = model(**inputs, logits_to_keep=positions_K, use_cache=False).logits.float()
        identifiers_N = self.score_tokens.identifiers.to(logits_BKV.device)
        listwise = listwise_loss(logits_BKV[:, -1], identifiers_N, targets_BN)
        verdict = torch.zeros_like(listwise)
        if self.verdict_weight:
            logits_PV = logits_BKV[:, :-1][page_ends_BT[:, positions_K[:-1]]]
            logits_P2 = logits_PV[:, self.score_tokens.verdicts.to(logits_PV.device)]
            verdict = verdict_loss(logits_P2, verdicts_P, page_ends_BT.nonzero()[:, 0])
            self._log_mean("verdict_loss", verdict)
        self._log_mean("listwise_loss", listwise)
        return listwise, verdict

    def _log_mean(self, name: str, value: Tensor) -> None:
        self._metrics["train"][name].append(self.accelerator.gather(value.detach()).mean().item())


def rank_targets(order: Sequence[int], decay: float, size: int) -> Tensor:
    """(size,) target probability of each page id from 1: proportional to decay^rank. 0 for ids without a page."""
    weights = torch.zeros(size)
    weights[torch.tensor(order) - 1] = decay ** torch.arange(len(order), dtype=torch.float32)
    return weights / weights.sum()


def listwise_loss(logits_BV: Tensor, identifiers_N: Tensor, targets_BN: Tensor) -> Tensor:
    """The loss of each prompt's page ids where the answer list begins, averaged over prompts.

    `identifiers_N` are the tokens of the page ids from 1; a target of 0 marks an id that the prompt does not have.
    The loss is a sum of two terms: the cross-entropy between the targets and the softmax over the prompt's page
    ids, and −log of the probability that any page id comes next. With the second term, a generated list begins
    with the best page, and not with white space, which the answer's grammar allows.
    """
    logits_BN = logits_BV[:, identifiers_N]
    is_id_B = logits_BN.logsumexp(-1) - logits_BV.logsumexp(-1)
    missing_BN = targets_BN == 0
    log_probs_BN = logits_BN.masked_fill(missing_BN, -torch.inf).log_softmax(-1).masked_fill(missing_BN, 0)
    return -((targets_BN * log_probs_BN).sum(-1) + is_id_B).mean()


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
