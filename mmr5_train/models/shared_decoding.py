"""Decoding with shared prefixes: one prefill of each prompt, then all of its completions are decoded together.

    generate(model, prompts, G, generation_config)

`share_prefixes(model)` must have been called. `mmr5_train.models.shared_prefix` explains prompts, groups and the
letters in shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from mmr5_train.models.shared_prefix import SharedPrompt, image_inputs


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of the prompts, which the prefill computes and decoding reads."""

    layers: list[tuple[Tensor, Tensor]]  # for each layer the prompts' keys and values (B, K, P, D)
    mask: Tensor  # (B, 1, 1, P) is added to attention scores: 0 for the prompt's tokens, −inf for padding


def _attention(
    prefix: _Prefix, layer: int, query_NH1D: Tensor, key_NKUD: Tensor, value_NKUD: Tensor, scaling: float | None
) -> Tensor:
    """Attention of one new token of each completion. Returns (N, 1, H, D).

    The queries of all completions of a prompt attend to the single copy of its keys. The softmax runs over the
    prompt's and the completion's own scores together, so the result is exact.
    """
    prefix_key_BKPD, prefix_value_BKPD = prefix.layers[layer]
    B, K = prefix_key_BKPD.shape[:2]
    N, D = query_NH1D.shape[0], query_NH1D.shape[-1]
    query_NKRD = query_NH1D.reshape(N, K, -1, D) * (D**-0.5 if scaling is None else scaling)
    own_scores_NKRU = query_NKRD @ key_NKUD.transpose(-1, -2)
    query_BKGRD = query_NKRD.reshape(B, -1, K, query_NKRD.shape[2], D).transpose(1, 2)
    G, R = query_BKGRD.shape[2:4]
    scores = query_BKGRD.flatten(2, 3) @ prefix_key_BKPD.transpose(-1, -2) + prefix.mask  # (B, K, G R, P)
    scores_NKRP = scores.unflatten(2, (G, R)).transpose(1, 2).flatten(0, 1)
    all_scores = torch.cat([scores_NKRP, own_scores_NKRU], dim=-1)
    weights = all_scores.softmax(-1, dtype=torch.float32).to(value_NKUD.dtype)
    weights_NKRP, own_weights_NKRU = weights.split([scores_NKRP.shape[-1], own_scores_NKRU.shape[-1]], dim=-1)
    grouped_weights = weights_NKRP.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)  # (B, K, G R, P)
    output = grouped_weights @ prefix_value_BKPD  # (B, K, G R, D)
    output_NKRD = output.unflatten(2, (G, R)).transpose(1, 2).flatten(0, 1)
    return (output_NKRD + own_weights_NKRU @ value_NKUD).reshape(N, 1, -1, D)


def generate(
    model: Any,
    prompts: Sequence[SharedPrompt],
    group_size: int,
    config: Any,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
) -> Tensor:
    """Generates `group_size` completions of each prompt, with one prefill per prompt. Returns (N, new tokens).

    Completions are padded after their end token. `config` is a GenerationConfig. `model.generate` still prepares
    its logits processors and stopping criteria; only the decoding loop is replaced. Tokens are sampled in the same
    order from the same random stream as in the original loop, so the same seed gives the same completions.
    `logits_processor` and `stopping_criteria` apply in addition; their input rows are left-padded prompts followed
    by completions.
    """
    longest = max(prompt.ids.numel() for prompt in prompts)
    padding = [longest - prompt.ids.numel() for prompt in prompts]
    pad_id = config.pad_token_id if config.pad_token_id is not None else 0
    ids_BP = torch.stack([pad(p.ids, (n, 0), value=pad_id) for p, n in zip(prompts, padding, strict=True)])
    mask_BP = torch.stack([pad(torch.ones_like(p.ids), (n, 0)) for p, n in zip(prompts, padding, strict=True)])
    sequences = model.generate(
        input_ids=ids_BP,
        attention_mask=mask_BP,
        generation_config=config,
        custom_generate=partial(_decode, prompts, mask_BP, group_size, pad_id),
        num_return_sequences=1,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
    )
    return sequences[:, longest:]


def _decode(
    prompts: Sequence[SharedPrompt],
    prompt_mask: Tensor,
    group_size: int,
    pad_id: int,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    **_: Any,
) -> Tensor:
    """The decoding loop. `model.generate` passes the arguments from `model` on. Returns (N, P + new tokens)."""
    device = input_ids.device
    logits, prefix = _prefill(model, prompts, input_ids, prompt_mask)
    logits = logits.repeat_interleave(group_size, 0)  # (N, V)
    sequences = input_ids.repeat_interleave(group_size, 0)
    positions = torch.tensor([prompt.next_position for prompt in prompts], device=device)
    positions = positions.repeat_interleave(group_size)[:, None]  # (N, 1)
    axes = prompts[0].positions.shape[0]
    cache = DynamicCache(config=model.config.get_text_config())
    unfinished = torch.ones(len(sequences), dtype=torch.bool, device=device)
    while True:
        scores = logits_processor(sequences, logits.to(copy=True, dtype=torch.float32))
        do_sample = generation_config.do_sample
        tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if do_sample else scores.argmax(-1)
        tokens = torch.where(unfinished, tokens, pad_id)
        sequences = torch.cat([sequences, tokens[:, None]], dim=1)
        unfinished = unfinished & ~stopping_criteria(sequences, None)
        if not model._has_unfinished_sequences(not bool(unfinished.any()), synced_gpus, device=device):
            return sequences
        outputs = model(
            input_ids=tokens[:, None],
            position_ids=positions if axes == 1 else positions.expand(axes, -1, -1),
            past_key_values=cache,
            use_cache=True,
            shared_prefix=partial(_attention, prefix),
        )
        logits, positions = outputs.logits[:, -1], positions + 1


def _prefill(
    model: Any, prompts: Sequence[SharedPrompt], ids_BP: Tensor, mask_BP: Tensor
) -> tuple[Tensor, _Prefix]:
    """Runs the left-padded prompts. Returns the logits of their last tokens, (B, V), and their keys and values."""
    longest = ids_BP.shape[1]
    positions_ABP = torch.stack([pad(p.positions, (longest - p.ids.numel(), 0)) for p in prompts], dim=1)
    outputs = model(
        input_ids=ids_BP,
        attention_mask=mask_BP,
        position_ids=positions_ABP if positions_ABP.shape[0] > 1 else positions_ABP[0],
        use_cache=True,
        logits_to_keep=1,
        **image_inputs(prompts),
    )
    layers = [(layer.keys, layer.values) for layer in outputs.past_key_values.layers]
    score_mask_BP = torch.zeros(mask_BP.shape, dtype=layers[0][0].dtype, device=ids_BP.device)
    score_mask_BP.masked_fill_(mask_BP == 0, -torch.inf)
    return outputs.logits[:, -1], _Prefix(layers, score_mask_BP[:, None, None])
