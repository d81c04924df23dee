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
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mmr5_train.models.inputs import encode
from mmr5_train.models.page_scores import id_branches, pack_branches
from mmr5_train.models.shared_prefix import Packed, share_prefixes, shared_prompts
from mmr5_train.ranking.notes import format_note
from mmr5_train.ranking.page_subsets import NO_VERDICT
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.training.adapters import without_adapter
from mmr5_train.training.callbacks import FiniteSFTTrainer

RankLoss = Literal["listwise", "ranknet", "listmle"]
"""How the log-probabilities of the page ids are trained towards an order: `rank_loss`."""


def verdict_tokens(tokenizer: Any) -> tuple[int, int]:
    """The tokens in which "it helps" and "it does not help" first differ."""
    helps, helps_not = tokenizer([format_note("", True), format_note("", False)])["input_ids"]
    return next((a, b) for a, b in zip(helps, helps_not, strict=False) if a != b)


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

    "scoring" holds the model inputs of B prompts on subsets of pages. It also holds `ranks` (B, most pages), the
    rank of each page id from 0, or −1 for an id that the prompt does not have; `verdicts` (P,) on all P pages of
    the batch; and `page_ends` (B, T), true at the last token of each page or of its hint.

    The other entries are TRL's batch of the examples with `trains_completion`, if there are any.
    """

    processor: Any
    completions: DataCollatorForVisionLanguageModeling
    prompt: Prompt

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pages = [[example["images"][position - 1] for position in example["positions"]] for example in examples]
        inputs = encode(self.processor, self.prompt, [example["query"] for example in examples], pages)
        inputs = append_hints(
            inputs, [hint for example in examples for hint in example["hints"]], self.processor.tokenizer
        )
        labels = {
            "ranks": rank_matrix([example["order"] for example in examples]),
            "verdicts": torch.tensor([verdict for example in examples for verdict in example["verdicts"]]),
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


@dataclass(frozen=True)
class ScoringBatch:
    """The prompts of a batch in one packed row."""

    packed: Packed
    page_counts: list[int]
    page_ends: Tensor
    """(P,) for each page of the batch, the index in the row of its last token, or of its hint's."""


class DistillTrainer(FiniteSFTTrainer):
    """SFT on completions, plus the listwise loss and the verdict loss."""

    def __init__(
        self,
        *args: Any,
        completion_share: float,
        rank_loss: RankLoss,
        decay: float,
        listwise_weight: float,
        verdict_weight: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # as in `normalize_loss_by_tokens`
        self.tokenizer: Any = self.processing_class.tokenizer  # type: ignore[union-attr]
        self.verdict_tokens = torch.tensor(verdict_tokens(self.tokenizer))
        self.completion_share, self.rank_loss, self.decay = completion_share, rank_loss, decay
        self.listwise_weight, self.verdict_weight = listwise_weight, verdict_weight
        self.base = without_adapter(self.accelerator.unwrap_model(self.model))
        share_prefixes(self.base)
        self._tower_is_frozen = not any(p.requires_grad for p in self.base.base_model.visual.parameters())
        self.step_prompts = 0  # prompts of the current optimizer step on this process

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """What the step's sum of token losses is divided by.

        It is the number of completion tokens in the step, over all processes, times the expected number of
        completions divided by the actual one.
        """
        self.step_prompts = sum(len(batch["scoring"]["ranks"]) for batch in batch_samples)
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
        batch = self._pack(scoring)
        labels_L = batch.packed.labels[0, 1:]
        next_ids = (labels_L != -100).nonzero()[:, 0]  # where tokens of page ids come next
        positions_K = torch.cat([batch.page_ends, next_ids]) if self.verdict_weight else next_ids
        # The vocabulary is large, so compute logits only at these positions.
        logits_KV = model(**batch.packed.inputs, logits_to_keep=positions_K, use_cache=False).logits[0].float()
        logits_MV = logits_KV[-len(next_ids) :]
        log_probs_M = -cross_entropy(logits_MV, labels_L[next_ids].to(logits_MV.device), reduction="none")
        rows_M = torch.arange(len(batch.packed.mask), device=logits_MV.device).repeat_interleave(
            batch.packed.mask.sum(1).to(logits_MV.device)
        )
        log_probs = log_probs_M.new_zeros(len(batch.packed.mask)).index_add(0, rows_M, log_probs_M)
        log_probs_BN = pad_sequence(log_probs.split(batch.page_counts), batch_first=True, padding_value=-torch.inf)
        listwise = rank_loss(log_probs_BN, scoring["ranks"].to(log_probs_BN.device), self.rank_loss, self.decay)
        verdict = torch.zeros_like(listwise)
        if self.verdict_weight:
            logits_P2 = logits_KV[: len(batch.page_ends), self.verdict_tokens.to(logits_KV.device)]
            prompts_P = torch.arange(len(batch.page_counts), device=logits_KV.device).repeat_interleave(
                torch.tensor(batch.page_counts, device=logits_KV.device)
            )
            verdict = verdict_loss(logits_P2, scoring["verdicts"], prompts_P)
            self._log_mean("verdict_loss", verdict)
        self._log_mean("listwise_loss", listwise)
        return listwise, verdict

    def _pack(self, scoring: dict[str, Any]) -> ScoringBatch:
        """One row with the prompts of a batch, each with a branch for each page id."""
        masks = scoring["attention_mask"].bool()
        page_counts = (scoring["ranks"] >= 0).sum(1).tolist()
        branches = [id_branches(self.tokenizer, n) for n in page_counts]
        openings = [torch.tensor(branch.opening, device=masks.device) for branch in branches]
        ids = [
            torch.cat([row[mask], opening])
            for row, mask, opening in zip(scoring["input_ids"], masks, openings, strict=True)
        ]
        types = [
            torch.cat([row[mask], torch.zeros_like(opening)])
            for row, mask, opening in zip(scoring["mm_token_type_ids"], masks, openings, strict=True)
        ]
        pixels = {name: scoring[name] for name in ("pixel_values", "image_grid_thw")}
        prompts = shared_prompts(self.base, ids, types, pixels, page_counts, keep_features=self._tower_is_frozen)
        packed = pack_branches(prompts, branches)
        starts = [group.start for group in packed.groups]
        ends = [
            row[mask].nonzero()[:, 0] + start
            for row, mask, start in zip(scoring["page_ends"], masks, starts, strict=True)
        ]
        return ScoringBatch(packed, page_counts, torch.cat(ends))

    def _log_mean(self, name: str, value: Tensor) -> None:
        self._metrics["train"][name].append(self.accelerator.gather(value.detach()).mean().item())


def rank_matrix(orders: Sequence[Sequence[int]]) -> Tensor:
    """(B, most pages) the rank, from 0, of each page id from 1; −1 for ids that an order does not have."""
    ranks = torch.full((len(orders), max(map(len, orders))), -1)
    for row, order in zip(ranks, orders, strict=True):
        row[torch.tensor(order) - 1] = torch.arange(len(order))
    return ranks


def rank_loss(log_probs_BN: Tensor, ranks_BN: Tensor, kind: RankLoss, decay: float) -> Tensor:
    """The loss of the log-probabilities with which each page id comes first, a mean over prompts.

    It is a sum of two terms. The second is −log of the probability that any page id comes next: with it, a
    generated list begins with the best page, and not with white space, which the answer's grammar allows. The
    first is, for the order that `ranks_BN` gives (`rank_matrix`),

    - listwise: the cross-entropy between targets that fall by `decay` with each rank, and the softmax over the ids
      (ListNet, Cao et al. 2007);
    - ranknet: the logistic loss of the differences of all pairs, a mean (RankNet, Burges et al. 2005);
    - listmle: −log of the Plackett–Luce probability of the order, divided by its length (Xia et al. 2008).
    """
    present_BN = ranks_BN >= 0
    any_id_B = log_probs_BN.logsumexp(-1)
    scores_BN = log_probs_BN.masked_fill(~present_BN, -torch.inf)
    if kind == "listwise":
        weights_BN = (decay ** ranks_BN.double()).masked_fill(~present_BN, 0)
        targets_BN = (weights_BN / weights_BN.sum(1, keepdim=True)).to(scores_BN.dtype)
        order_B = -(targets_BN * scores_BN.log_softmax(-1).masked_fill(~present_BN, 0)).sum(-1)
    elif kind == "ranknet":
        before_BNN = (ranks_BN[:, :, None] < ranks_BN[:, None]) & present_BN[:, :, None] & present_BN[:, None]
        finite_BN = scores_BN.masked_fill(~present_BN, 0)
        losses_BNN = softplus(finite_BN[:, None] - finite_BN[:, :, None])
        order_B = (losses_BNN * before_BNN).sum((1, 2)) / before_BNN.sum((1, 2)).clamp(min=1)
    else:
        best_first_BN = ranks_BN.masked_fill(~present_BN, ranks_BN.shape[1]).argsort(-1)
        # A finite number: the gradient of logcumsumexp at −inf is not a number.
        finite_BN = scores_BN.masked_fill(~present_BN, -1e9)
        sorted_BN, kept_BN = finite_BN.gather(1, best_first_BN), present_BN.gather(1, best_first_BN)
        remaining_BN = sorted_BN.flip(1).logcumsumexp(1).flip(1)
        order_B = (remaining_BN - sorted_BN).masked_fill(~kept_BN, 0).sum(1) / present_BN.sum(1)
    return (order_B - any_id_B).mean()


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
