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
    generate(model, prompts, G, generation_config)  # one prefill per prompt, then G completions are decoded

`mmr5_train/training/shared_grpo.py` uses it in TRL's GRPOTrainer. docs/shared_prefix.md has a picture.

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
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "shared_prefix"  # the attention function's name in transformers
# Model types that were compared with separate rows: tests/mmr5_train/models/test_shared_prefix.py
KNOWN_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen2", "qwen3", "llama")


@dataclass(frozen=True, eq=False)
class SharedPrompt:
    """A prompt, with what all of its completions share."""

    ids: Tensor  # (P,)
    positions: Tensor  # (A, P)
    images: tuple[Tensor, ...] = ()  # the tower's output per image (visual tokens, hidden size), if kept
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
    shape: tuple[int, int]  # (N, C)
    mask: Tensor  # (N, C) whether a completion has this token

    def unpack(self, values: Tensor) -> Tensor:
        """Values of next tokens along the packed row, (1, L − 1), as (N, C). Padding becomes 0."""
        return values.new_zeros(self.shape).masked_scatter(self.mask, values[self.labels[:, 1:] != -100])


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
    keep_features: bool = True,
) -> list[SharedPrompt]:
    """Makes a `SharedPrompt` of each prompt.

    `ids[b]` are prompt b's tokens, (P,), and `types[b]` the processor's `mm_token_type_ids`, (P,). `pixels` has
    `pixel_values` (patches, values of a patch) and `image_grid_thw` (images, 3) of all prompts together;
    `image_counts[b]` images belong to prompt b. With `keep_features`, the vision tower runs here, once and without
    gradients, and its output is kept instead of the pixels, if the model's forward accepts features.
    """
    pixels_by_prompt: list[dict[str, Tensor] | None] = [None] * len(ids)
    if pixels is not None:
        grids = pixels["image_grid_thw"].split(list(image_counts))
        patches = pixels["pixel_values"].split([int(grid.prod(-1).sum()) for grid in grids])
        pixels_by_prompt = [{"pixel_values": p, "image_grid_thw": g} for p, g in zip(patches, grids, strict=True)]
    positions = [
        _positions(model, ids_P, prompt_pixels, None if types is None else types[i])
        for i, (ids_P, prompt_pixels) in enumerate(zip(ids, pixels_by_prompt, strict=True))
    ]
    if pixels is None or not keep_features or not takes_image_features(model):
        return [SharedPrompt(*row) for row in zip(ids, positions, [()] * len(ids), pixels_by_prompt, strict=True)]
    with torch.no_grad():
        features = iter(model.get_image_features(**pixels, return_dict=True).pooler_output)
    images = [tuple(next(features) for _ in range(count)) for count in image_counts]
    return [SharedPrompt(*row) for row in zip(ids, positions, images, strict=True)]


def _positions(model: Any, ids_P: Tensor, pixels: dict[str, Tensor] | None, types_P: Tensor | None) -> Tensor:
    """The positions that the model itself gives a prompt's tokens: (A, P)."""
    if pixels is None or types_P is None:
        return torch.arange(ids_P.numel(), device=ids_P.device)[None]
    images = {"mm_token_type_ids": types_P[None], "image_grid_thw": pixels["image_grid_thw"]}
    positions_A1P, _ = model.base_model.get_rope_index(ids_P[None], **images)
    return positions_A1P[:, 0]


@dataclass(frozen=True)
class _Features:
    """The part of a vision tower's output that the model's forward reads."""

    pooler_output: list[Tensor]


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
        "shared_prefix": groups,
        **_image_inputs(prompts),
    }
    return Packed(inputs, torch.cat(labels)[None], tuple(mask.shape), mask.bool())  # type: ignore[arg-type]


def _layout(start: int, prompt_length: int, lengths: list[int], device: torch.device) -> _Group:
    lengths_n = torch.tensor(lengths, device=device) + 1  # with the copy of the prompt's last token
    steps_T = torch.arange(int(lengths_n.max()), device=device)
    filled_nT = steps_T < lengths_n[:, None]
    slots_nT = (lengths_n.cumsum(0) - lengths_n)[:, None] + steps_T
    stop = start + prompt_length + sum(lengths) + len(lengths)
    return _Group(start, prompt_length, stop, slots_nT * filled_nT, filled_nT)


def _image_inputs(prompts: Sequence[SharedPrompt]) -> dict[str, Any]:
    """The forward's arguments for the images, once per prompt: features if they are kept, else pixels."""
    images = [image for prompt in prompts for image in prompt.images]
    if images:
        return {"mm_encoder_outputs": {"image": _Features(images)}}
    pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
    return {key: torch.cat([values[key] for values in pixels]) for key in (pixels[0] if pixels else ())}


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

    `shared_prefix` is an argument of the model's forward: the groups of a packed row, or a `_Prefix` in decoding.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if isinstance(shared_prefix, _Prefix):
        return _decoding_attention(module.layer_idx, query, key, value, shared_prefix, scaling), None
    groups = [_group_attention(query, key, value, group, scaling) for group in shared_prefix]
    return torch.cat(groups, dim=1), None


def _group_attention(
    query_1HLD: Tensor, key_1KLD: Tensor, value_1KLD: Tensor, group: _Group, scaling: float | None
) -> Tensor:
    """Attention within one group of a packed row. Returns (1, S, H, D).

    The prompt attends causally to itself. The completions become rows of a batch, (n, T), and each row attends to
    a copy of the prompt's keys followed by its own. Work and memory grow with P² + n T (P + T), not with L².
    """
    H, K, Q = query_1HLD.shape[1], key_1KLD.shape[1], group.prompt_length
    (n, T), R = group.slots.shape, H // K
    prompt, completions = slice(group.start, group.start + Q), slice(group.start + Q, group.stop)
    output_1HQD = scaled_dot_product_attention(
        query_1HLD[:, :, prompt],
        key_1KLD[:, :, prompt].repeat_interleave(R, 1),
        value_1KLD[:, :, prompt].repeat_interleave(R, 1),
        is_causal=True,
        scale=scaling,
    )
    query_nHTD, key_nKTD, value_nKTD = (
        states[0, :, completions][:, group.slots].transpose(0, 1) for states in (query_1HLD, key_1KLD, value_1KLD)
    )
    keys, values = (  # (n, K, Q + T, D): of the prompt and of the completion itself
        torch.cat([of_row[:, :, prompt].expand(n, -1, -1, -1), of_completions], dim=2)
        for of_row, of_completions in ((key_1KLD, key_nKTD), (value_1KLD, value_nKTD))
    )
    # The R query heads of a key head become R T queries of that head, so keys are not repeated for them.
    queries = query_nHTD.reshape(n, K, R * T, -1)
    mask = torch.ones(T, Q + T, dtype=torch.bool, device=queries.device).tril(Q).repeat(R, 1)
    output = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    output_nTHD = output.reshape(n, H, T, -1).transpose(1, 2)
    return torch.cat([output_1HQD.transpose(1, 2), output_nTHD[group.filled][None]], dim=1)


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of the prompts, which the prefill computes and decoding reads."""

    layers: list[tuple[Tensor, Tensor]]  # for each layer the prompts' keys and values (B, K, P, D)
    mask: Tensor  # (B, 1, 1, P) is added to attention scores: 0 for the prompt's tokens, −inf for padding


def _decoding_attention(
    layer: int, query_NH1D: Tensor, key_NKUD: Tensor, value_NKUD: Tensor, prefix: _Prefix, scaling: float | None
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
    model: Any, prompts: Sequence[SharedPrompt], group_size: int, config: Any, logits_processor: Any = None
) -> Tensor:
    """Generates `group_size` completions of each prompt, with one prefill per prompt. Returns (N, new tokens).

    Completions are padded after their end token. `config` is a GenerationConfig. `model.generate` still prepares
    its logits processors and stopping criteria; only the decoding loop is replaced. Tokens are sampled in the same
    order from the same random stream as in the original loop, so the same seed gives the same completions.
    `logits_processor` is applied in addition; its input rows are left-padded prompts followed by completions.
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
            shared_prefix=prefix,
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
        **_image_inputs(prompts),
    )
    layers = [(layer.keys, layer.values) for layer in outputs.past_key_values.layers]
    score_mask_BP = torch.zeros(mask_BP.shape, dtype=layers[0][0].dtype, device=ids_BP.device)
    score_mask_BP.masked_fill_(mask_BP == 0, -torch.inf)
    return outputs.logits[:, -1], _Prefix(layers, score_mask_BP[:, None, None])
