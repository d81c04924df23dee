"""Exact scores of all pages from one forward pass (mode `logits`).

A page's score is the probability that the answer's list begins with its id, among the ids of all pages. With most
tokenizers an id has several tokens, and 10 begins with the token of 1. So the probability of an id is the product
along its tokens and the separator after it. The ids are branches after one reading of the prompt
(`mmr5_train.models.shared_prefix`), so the pass costs the prompt and a few tokens for each page. Logits are
computed in float32: in bfloat16, logits near 20 have steps of 0.125, so pages would tie.

FIRST (arXiv 2406.15657) ranks by the logits of the first identifier, and ZipRerank (arXiv 2605.11864) ranks pages
so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmr5_train.common.files import InputError
from mmr5_train.models import shared_prefix
from mmr5_train.models.page_features import EncodedPrompts
from mmr5_train.models.shared_prefix import Packed, SharedPrompt, pack
from mmr5_train.ranking.answer_constraints import LIST_OPEN

VOCABULARY_CHUNK = 16_384  # rows of the head that are converted to float32 at a time


class Branches(NamedTuple):
    """How a list may go on at one place: with the id of any page."""

    opening: tuple[int, ...]
    """The tokens before the id that all ids share."""
    tokens: tuple[tuple[int, ...], ...]
    """For each id from 1 on, its tokens after `opening` and the first token of the separator after it."""


@lru_cache(maxsize=256)
def id_branches(tokenizer: Any, n: int) -> Branches:
    """The first place in the list of an answer on n pages, as the tokenizer writes it, after `LIST_OPEN`."""
    ends = [", 2", *[", 1"] * (n - 1)] if n > 1 else ["]"]
    return _branches(tokenizer, n, [LIST_OPEN] * n, [0] * n, ends)


@lru_cache(maxsize=256)
def next_branches(tokenizer: Any, n: int) -> Branches:
    """Any later place but the last. `opening` begins after the id of the place before."""
    before = [f"{LIST_OPEN}{1 if i > 1 else 2}" for i in range(1, n + 1)]
    return _branches(tokenizer, n, [f"{text}, " for text in before], [len(text) for text in before], [", 1"] * n)


def _branches(tokenizer: Any, n: int, before: list[str], starts: list[int], after: list[str]) -> Branches:
    """The tokens of the ids 1..n from the character `starts[i]` of their text on, between `before` and `after`.

    Raises `InputError` if a token joins characters of an id and of what follows it.
    """
    texts = [f"{text}{i}{end}" for i, text, end in zip(range(1, n + 1), before, after, strict=True)]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    rows, shared_lengths = [], []
    for i, text, start, ids, offsets in zip(
        range(1, n + 1), before, starts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        id_end = len(text) + len(str(i))
        first = next(k for k, (_, end) in enumerate(offsets) if end > start)
        last = next(k for k, (_, end) in enumerate(offsets) if end > id_end)
        if offsets[last][0] < id_end or offsets[first][0] < start:
            raise InputError(
                f"mode logits: the tokenizer joins a page id with the text around it ({texts[i - 1]!r}), so its "
                "probability is not defined; use mode reason or direct"
            )
        rows.append(tuple(ids[first : last + 1]))
        shared_lengths.append(sum(end <= len(text) for _, end in offsets[first:last]))
    shared = min(shared_lengths)
    while any(row[:shared] != rows[0][:shared] for row in rows):
        shared -= 1
    return Branches(rows[0][:shared], tuple(row[shared:] for row in rows))


def first_page_log_probs(model: Any, prompts: EncodedPrompts, branches: Sequence[Branches]) -> list[Tensor]:
    """For each prompt the log-probability of each branch, (n,). Their exponentials sum to at most 1.

    A model that can't share prefixes reads the prompts one after another, and continues with each branch from its
    cache.
    """
    prompts = prompts.followed_by([branch.opening for branch in branches])
    if shared_prefix.unsupported_reason(model) is None:
        with attention_restored(model):
            shared_prefix.share_prefixes(model)
            return _packed_log_probs(model, prompts.shared(model), branches)
    return [_cached_log_probs(model, *prompt) for prompt in zip(prompts.split(), branches, strict=True)]


def pack_branches(prompts: Sequence[SharedPrompt], branches: Sequence[Branches]) -> Packed:
    """One row with all prompts, which end with the openings, each followed by its branches."""
    device = prompts[0].ids.device
    rows = [torch.tensor(tokens, device=device) for branch in branches for tokens in branch.tokens]
    tokens = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    return pack(prompts, tokens.split([len(branch.tokens) for branch in branches]), mask)


def _packed_log_probs(model: Any, prompts: Sequence[SharedPrompt], branches: Sequence[Branches]) -> list[Tensor]:
    """All branches of all prompts from one forward pass."""
    packed = pack_branches(prompts, branches)
    hidden_LH = model.base_model(**packed.inputs).last_hidden_state[0]
    labels = packed.labels[0, 1:]
    values = next_token_log_probs(hidden_LH[:-1][labels != -100], labels[labels != -100], model)
    along_row = torch.zeros(1, len(labels), device=values.device)
    along_row[0, labels != -100] = values
    return [branch.sum(1) for branch in packed.unpack(along_row).split([len(b.tokens) for b in branches])]


def _cached_log_probs(model: Any, prompt: EncodedPrompts, branches: Branches) -> Tensor:
    """The branches of one prompt, each from a copy of the prompt's cache."""
    inputs = prompt.padded(pad_id=0)
    del inputs["attention_mask"]  # all ones: with it, some models give positions to the whole sequence
    prefill = model.base_model(**inputs, use_cache=True)
    totals = []
    for row in branches.tokens:
        tokens = torch.tensor(row, device=prompt.ids[0].device)
        hidden = prefill.last_hidden_state[0, -1:]
        if len(tokens) > 1:
            cache = copy.deepcopy(prefill.past_key_values)
            following = model.base_model(input_ids=tokens[None, :-1], past_key_values=cache, use_cache=True)
            hidden = torch.cat([hidden, following.last_hidden_state[0]])
        totals.append(next_token_log_probs(hidden, tokens, model).sum())
    return torch.stack(totals)


def next_token_log_probs(hidden_MH: Tensor, tokens_M: Tensor, model: Any) -> Tensor:
    """(M,) the log-probability of each token, in float32. The head is converted a part at a time."""
    head = model.get_output_embeddings()
    weight_VH = head.weight
    if weight_VH.is_meta:  # the weights of a spread model that are in CPU memory: only the module can load them
        return head(hidden_MH).float().log_softmax(-1).gather(1, tokens_M[:, None].to(hidden_MH.device))[:, 0]
    hidden_MH, tokens_M = hidden_MH.to(weight_VH.device, torch.float32), tokens_M.to(weight_VH.device)
    own_M = (hidden_MH * weight_VH[tokens_M].float()).sum(1)
    totals = [torch.logsumexp(hidden_MH @ part.float().T, 1) for part in weight_VH.split(VOCABULARY_CHUNK)]
    return own_M - torch.logsumexp(torch.stack(totals), 0)


@contextmanager
def attention_restored(model: Any) -> Iterator[None]:
    """After the block, the model's text part has the attention that it had before."""
    earlier = model.config.get_text_config()._attn_implementation
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": earlier})
