"""Shared prefixes: compute the prompt of a GRPO group once for all of its completions.

If each completion carries its own copy of the prompt, a pass over a group costs G (P + C) tokens. Here a group is
one packed row: prompt without its last token · last token, completion 1 · last token, completion 2 · …

In it, each completion attends to the prompt and to itself, and its positions continue from the prompt's end. So
every token has the same keys, positions and logits as in a separate row. The copy of the prompt's last token
predicts the first token of its completion. With these copies, labels are next tokens along the whole row, and the
model's own loss head needs no change.

This module uses transformers' attention interface. It imports nothing of this project:

    share_prefixes(model)                           # once: the text model can then read packed rows
    prompts = shared_prompts(model, ids, types, pixels, image_counts)
    packed = pack(prompts, completions, mask)       # several groups, completions of any length, no padding
    outputs = model(**packed.inputs, labels=packed.labels)
    log_probs_NC = packed.unpack(outputs.log_probs)

`mmr5_train.models.shared_decoding` generates completions after one prefill of each prompt.
`mmr5_train/training/shared_grpo.py` uses both in TRL's GRPOTrainer, and `mmr5_train/models/page_scores.py` scores
pages. docs/shared_prefix.md has a picture.

Letters in shapes and in the suffixes of tensor names, such as `query_1HLD` (1 is a dimension of size one):

    B  prompts           G  completions per prompt    N  all completions (B G)    n  completions of one group
    P  prompt tokens     Q  P − 1, without the last   L  tokens of a packed row   S  tokens of one group in it
    C  tokens of the longest completion               U  tokens of a completion decoded so far
    T  tokens of a group's longest completion, with the copy of the prompt's last token
    A  position axes: 1, or 3 (time, height, width) in Qwen's multimodal rotary embedding
    H  query heads       K  key/value heads           R  query heads per key head (H / K)
    D  head size         V  vocabulary
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "shared_prefix"  # the attention function's name in transformers
# Model types that were compared with separate rows: tests/mmr5_train/models/test_shared_prefix.py
KNOWN_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2", "qwen3", "llama")
SHORT_TOKENS = 1024
"""Completions of a group are one block with a mask if together they have at most this many tokens, and at most a
quarter of the prompt's."""


@dataclass(frozen=True, eq=False)
class SharedPrompt:
    """A prompt, with what all of its completions share."""

    ids: Tensor  # (P,)
    positions: Tensor  # (A, P)
    images: tuple[tuple[Tensor, ...], ...] = ()  # the tower's output for each image (`image_features`), if kept
    pixels: dict[str, Tensor] | None = None  # otherwise the tower's inputs: the tower runs in each forward pass

    @property
    def next_position(self) -> int:
        """The position of a completion's first token."""
        return int(self.positions.max()) + 1


@dataclass(frozen=True)
class _Group:
    """The position of one group in a packed row."""

    start: int  # index of the prompt's first token in the packed row
    prompt_length: int  # Q
    stop: int  # index after the last token of the last completion
    slots: Tensor  # (n, T) for each completion token, its index from the end of the prompt; 0 for padding
    filled: Tensor  # (n, T) whether the completion has this token


@dataclass(frozen=True)
class Packed:
    """Groups of completions in one row, and how to get back to one row per completion."""

    inputs: dict[str, Any]  # arguments of the model's forward
    labels: Tensor  # (1, L) the completions' tokens, −100 elsewhere
    mask: Tensor  # (N, C) whether a completion has this token
    groups: list[_Group]

    def unpack(self, values: Tensor) -> Tensor:
        """Values of next tokens along the packed row, (1, L − 1), as (N, C). Padding becomes 0."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values[self.labels[:, 1:] != -100])


def unsupported_reason(model: Any) -> str | None:
    """Why `model` can't share prefixes; None if it can."""
    config, text_config = model.config, model.config.get_text_config()
    if config.model_type not in KNOWN_MODELS:
        return f"model type {config.model_type} is not among the tested ones ({', '.join(KNOWN_MODELS)})"
    if any(kind != "full_attention" for kind in getattr(text_config, "layer_types", None) or []):
        return "it has attention layers that are not full attention"
    if getattr(text_config, "attention_dropout", 0):
        return "its attention has dropout"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "it is spread over several devices"
    return None


def share_prefixes(model: Any) -> None:
    """Enables the model's text part to read packed rows. Other inputs use PyTorch's sdpa, as usual.

    Raises `ValueError` for a model that `unsupported_reason` rejects.
    """
    if reason := unsupported_reason(model):
        raise ValueError(f"prefixes can't be shared: {reason}")
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    is_nested = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config": ATTENTION} if is_nested else ATTENTION)


def takes_image_features(model: Any) -> bool:
    """Whether the model's forward accepts the vision tower's output instead of pixels."""
    return "mm_encoder_outputs" in inspect.signature(type(model.base_model).forward).parameters


def shared_prompts(
    model: Any,
    ids: Sequence[Tensor],
    types: Sequence[Tensor] | None = None,
    pixels: dict[str, Tensor] | None = None,
    image_counts: Sequence[int] = (),
    *,
    features: Sequence[tuple[Tensor, ...]] | None = None,
    keep_features: bool = True,
) -> list[SharedPrompt]:
    """Makes a `SharedPrompt` of each prompt.

    `ids[b]` are prompt b's tokens, (P,), and `types[b]` the processor's `mm_token_type_ids`, (P,). `pixels` has
    `pixel_values` (patches, values of a patch) and `image_grid_thw` (images, 3) of all prompts together;
    `image_counts[b]` images belong to prompt b. With `keep_features`, the vision tower runs here, once and without
    gradients, and its output is kept instead of the pixels, if the model's forward accepts features. With
    `features` of all images (`image_features`), `pixels` needs no `pixel_values`.
    """
    counts = list(image_counts)
    grids: Sequence[Any] = [None] * len(ids) if pixels is None else pixels["image_grid_thw"].split(counts)
    positions = [
        _positions(model, ids_P, grid, None if types is None else types[i])
        for i, (ids_P, grid) in enumerate(zip(ids, grids, strict=True))
    ]
    if pixels is None:
        return [SharedPrompt(*row) for row in zip(ids, positions, strict=True)]
    if features is None and keep_features and takes_image_features(model):
        features = image_features(model, pixels)
    if features is None:
        patches = pixels["pixel_values"].split([int(grid.prod(-1).sum()) for grid in grids])
        kept = [{"pixel_values": p, "image_grid_thw": g} for p, g in zip(patches, grids, strict=True)]
        return [SharedPrompt(*row) for row in zip(ids, positions, [()] * len(ids), kept, strict=True)]
    remaining = iter(features)
    images = [tuple(next(remaining) for _ in range(count)) for count in counts]
    return [SharedPrompt(*row) for row in zip(ids, positions, images, strict=True)]


@torch.no_grad()
def image_features(model: Any, pixels: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """What the vision tower gives for each image: its features, (visual tokens, hidden size).

    Features that DeepStack (arXiv 2406.04334) adds in the first text layers follow, if the model has them.
    """
    output = model.get_image_features(**pixels, return_dict=True)
    return list(zip(output.pooler_output, *(getattr(output, "deepstack_features", None) or ()), strict=True))


def _positions(model: Any, ids_P: Tensor, grid: Tensor | None, types_P: Tensor | None) -> Tensor:
    """The positions that the model itself gives a prompt's tokens: (A, P)."""
    if grid is None or types_P is None:
        return torch.arange(ids_P.numel(), device=ids_P.device)[None]
    images = {"mm_token_type_ids": types_P[None], "image_grid_thw": grid}
    positions_A1P, _ = model.base_model.get_rope_index(ids_P[None], **images)
    return positions_A1P[:, 0]


@dataclass(frozen=True)
class _Features:
    """The part of a vision tower's output that the model's forward reads: a tensor for each image."""

    pooler_output: tuple[Tensor, ...]
    deepstack_features: list[tuple[Tensor, ...]]


def pack(prompts: Sequence[SharedPrompt], completions: Sequence[Tensor], mask: Tensor) -> Packed:
    """Packs groups into one row.

    `completions[b]` are the tokens of prompt b's completions, (G, C), right-padded; G may differ between prompts.
    `mask`, (N, C) in the same order, is 1 where a completion has a token.
    """
    device = prompts[0].ids.device
    ids, labels, positions, groups = list[Tensor](), list[Tensor](), list[Tensor](), list[_Group]()
    lengths_N = mask.sum(1).tolist()
    start = first_row = 0
    for prompt, completions_GC in zip(prompts, completions, strict=True):
        ids.append(prompt.ids[:-1])
        labels.append(torch.full_like(prompt.ids[:-1], -100))
        positions.append(prompt.positions[:, :-1])
        last_token, first_position = prompt.ids[-1:], prompt.next_position
        lengths = [int(length) for length in lengths_N[first_row : first_row + len(completions_GC)]]
        for tokens_C, length in zip(completions_GC, lengths, strict=True):
            ids += [last_token, tokens_C[:length]]
            labels += [torch.full_like(last_token, -100), tokens_C[:length]]
            next_positions = torch.arange(first_position, first_position + length, device=device)
            positions += [prompt.positions[:, -1:], next_positions.expand(len(prompt.positions), -1)]
        groups.append(_layout(start, prompt.ids.numel() - 1, lengths, device))
        start, first_row = groups[-1].stop, first_row + len(completions_GC)
    positions_A1L = torch.cat(positions, dim=1)[:, None]
    inputs: dict[str, Any] = {
        "input_ids": torch.cat(ids)[None],
        "position_ids": positions_A1L if len(positions_A1L) > 1 else positions_A1L[0],
        "shared_prefix": partial(_packed_attention, groups),
        **image_inputs(prompts),
    }
    return Packed(inputs, torch.cat(labels)[None], mask.bool(), groups)


def _layout(start: int, prompt_length: int, lengths: list[int], device: torch.device) -> _Group:
    lengths_n = torch.tensor(lengths, device=device) + 1  # with the copy of the prompt's last token
    steps_T = torch.arange(int(lengths_n.max()), device=device)
    filled_nT = steps_T < lengths_n[:, None]
    slots_nT = (lengths_n.cumsum(0) - lengths_n)[:, None] + steps_T
    stop = start + prompt_length + sum(lengths) + len(lengths)
    return _Group(start, prompt_length, stop, slots_nT * filled_nT, filled_nT)


def image_inputs(prompts: Sequence[SharedPrompt]) -> dict[str, Any]:
    """The forward's arguments for the images, once per prompt: features if they are kept, else pixels."""
    images = [image for prompt in prompts for image in prompt.images]
    if images:
        return image_inputs_of(images)
    pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
    return {key: torch.cat([values[key] for values in pixels]) for key in (pixels[0] if pixels else ())}


def image_inputs_of(features: Sequence[tuple[Tensor, ...]]) -> dict[str, Any]:
    """The forward's arguments for images whose features are known (`image_features`)."""
    final, *deepstack = zip(*features, strict=True)
    return {"mm_encoder_outputs": {"image": _Features(final, deepstack)}}


def _attention(
    module: Any,
    query: Tensor,  # (B, H, L, D)
    key: Tensor,  # (B, K, L, D)
    value: Tensor,  # (B, K, L, D)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    shared_prefix: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer. Returns (B, L, H, D).

    `shared_prefix` is an argument of the model's forward: the attention of a packed row, or of a decoding step.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return shared_prefix(module.layer_idx, query, key, value, scaling), None


def _packed_attention(
    groups: Sequence[_Group], layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    return torch.cat([_group_attention(query, key, value, group, scaling) for group in groups], dim=1)


def _group_attention(
    query_1HLD: Tensor, key_1KLD: Tensor, value_1KLD: Tensor, group: _Group, scaling: float | None
) -> Tensor:
    """Attention within one group of a packed row. Returns (1, S, H, D).

    The prompt attends causally to itself. Long completions become rows of a batch, (n, T), and each row attends to
    a copy of the prompt's keys followed by its own. Work and memory grow with P² + n T (P + T), not with L². Short
    completions together are one block with a mask: many of them would cost more in copies than in attention.
    """
    H, K, Q = query_1HLD.shape[1], key_1KLD.shape[1], group.prompt_length
    R, prompt = H // K, slice(group.start, group.start + Q)
    output_1HQD = scaled_dot_product_attention(
        query_1HLD[:, :, prompt],
        key_1KLD[:, :, prompt].repeat_interleave(R, 1),
        value_1KLD[:, :, prompt].repeat_interleave(R, 1),
        is_causal=True,
        scale=scaling,
    )
    tokens = group.stop - group.start - Q
    attend = _short_completions if tokens <= min(SHORT_TOKENS, Q // 4) else _long_completions
    output_SHD = attend(query_1HLD, key_1KLD, value_1KLD, group, scaling)
    return torch.cat([output_1HQD.transpose(1, 2), output_SHD[None]], dim=1)


def _short_completions(
    query_1HLD: Tensor, key_1KLD: Tensor, value_1KLD: Tensor, group: _Group, scaling: float | None
) -> Tensor:
    """Attention of all completion tokens of a group as one block, (tokens, H, D)."""
    H, K, Q = query_1HLD.shape[1], key_1KLD.shape[1], group.prompt_length
    rows = slice(group.start, group.stop)
    completion_M = group.filled.nonzero()[:, 0]  # M completion tokens: which completion each belongs to
    M = len(completion_M)
    mask_MS = torch.ones(M, Q + M, dtype=torch.bool, device=query_1HLD.device)
    mask_MS[:, Q:] = (completion_M[:, None] == completion_M).tril()
    # The R query heads of a key head become R M queries of that head, so keys are not repeated for them.
    queries = query_1HLD[:, :, group.start + Q : group.stop].reshape(1, K, H // K * M, -1)
    output = scaled_dot_product_attention(
        queries, key_1KLD[:, :, rows], value_1KLD[:, :, rows], attn_mask=mask_MS.repeat(H // K, 1), scale=scaling
    )
    return output.reshape(H, M, -1).transpose(0, 1)


def _long_completions(
    query_1HLD: Tensor, key_1KLD: Tensor, value_1KLD: Tensor, group: _Group, scaling: float | None
) -> Tensor:
    """Attention of the completion tokens of a group with a row for each completion, (tokens, H, D)."""
    H, K, Q = query_1HLD.shape[1], key_1KLD.shape[1], group.prompt_length
    (n, T), R = group.slots.shape, H // K
    prompt, completions = slice(group.start, group.start + Q), slice(group.start + Q, group.stop)
    query_nHTD, key_nKTD, value_nKTD = (
        states[0, :, completions][:, group.slots].transpose(0, 1) for states in (query_1HLD, key_1KLD, value_1KLD)
    )
    keys, values = (  # (n, K, Q + T, D): of the prompt and of the completion itself
        torch.cat([of_row[:, :, prompt].expand(n, -1, -1, -1), of_completions], dim=2)
        for of_row, of_completions in ((key_1KLD, key_nKTD), (value_1KLD, value_nKTD))
    )
    queries = query_nHTD.reshape(n, K, R * T, -1)
    mask = torch.ones(T, Q + T, dtype=torch.bool, device=queries.device).tril(Q).repeat(R, 1)
    output = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    output_nTHD = output.reshape(n, H, T, -1).transpose(1, 2)
    return output_nTHD[group.filled]
