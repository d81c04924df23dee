"""One prompt, many completions, one forward: the shared part of a GRPO group is computed once.

A group of G completions behind one prompt of P tokens costs G (P + C) tokens a pass when each completion carries
its own copy of the prompt. Here the group is one row,

    prompt without its last token · last token, completion 1 · last token, completion 2 · …

in which a completion sees the prompt and itself. Positions go on from the prompt's end in each completion, so
every token gets the same keys, the same positions and hence the same logits as in a row of its own. (Each
completion starts with a copy of the prompt's last token, the one that predicts its first: so "the label is the
next token" holds along the whole row, and the model's own loss head can be used as it is.)

This file knows transformers' attention interface and nothing of rewards or rankings:

    share_prefixes(model)                         # once: the model's text attention learns the shared layout
    prompts = shared_prompts(model, ids, types, pixels, image_counts)
    packed = pack(prompts, completions, mask)     # several groups, completions of any length, no padding
    outputs = model(**packed.inputs, labels=packed.labels)
    log_probs = packed.unpack(outputs.log_probs)  # (completions, longest completion)
    generate(model, prompts, G, generation_config)  # one prefill a prompt, G completions decoded behind it

`mmr5_train/training/shared_grpo.py` puts it into TRL's GRPOTrainer; docs/shared_prefix.md has a picture.

Shapes: B prompts, G completions a prompt, N = B G completions, P prompt tokens, T tokens of a completion, L tokens
of a packed row, H query heads, K key/value heads, R = H / K, D head size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "shared_prefix"
KNOWN_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen2", "qwen3", "llama")
"""Model types whose outputs were compared with the plain way (tests/mmr5_train/test_shared_prefix.py)."""


@dataclass(frozen=True, eq=False)
class SharedPrompt:
    """What the completions of a group have in common."""

    ids: Tensor  # (P,)
    positions: Tensor  # (1, P), or (3, P): time, height and width of Qwen's multimodal rotary embedding
    images: tuple[Tensor, ...] = ()  # per image the vision tower's output (tokens, hidden), where it is kept
    pixels: dict[str, Tensor] | None = None  # else what the tower needs, to be run inside each forward pass

    @property
    def next_position(self) -> int:
        return int(self.positions.max()) + 1


@dataclass(frozen=True)
class _Group:
    """Where one group lies in a packed row."""

    start: int  # of the prompt
    prompt: int  # prompt tokens, the last one not counted
    stop: int  # of the group's last completion
    slots: Tensor  # (n, T) index of each completion token, from the end of the prompt; 0 where there is none
    filled: Tensor  # (n, T) whether there is one


@dataclass(frozen=True)
class Packed:
    """Groups of completions in one row, and the way back to a (N, C) rectangle."""

    inputs: dict[str, Any]  # for the model's forward
    labels: Tensor  # (1, L): the completions' tokens, −100 elsewhere
    shape: tuple[int, int]  # (N, C)
    mask: Tensor  # (N, C): where the rectangle holds a token

    def unpack(self, values: Tensor) -> Tensor:
        """(1, L − 1) values of "the next token" along the row → (N, C), 0 where a completion holds no token."""
        picked = values[self.labels[:, 1:] != -100]
        return values.new_zeros(self.shape).masked_scatter(self.mask, picked)


def unsupported_model(model: Any) -> str | None:
    """Why `model` can't share prefixes, None if it can."""
    config = model.config
    text = config.get_text_config()
    if config.model_type not in KNOWN_MODELS:
        return f"model type {config.model_type} is not among the tested ones ({', '.join(KNOWN_MODELS)})"
    if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or []):
        return "it has attention layers that are not full attention"
    if getattr(text, "attention_dropout", 0):
        return "its attention has dropout"
    return None


def share_prefixes(model: Any) -> None:
    """Teaches the text part of `model` the shared layout; without one it attends as PyTorch's sdpa does.

    Raises `ValueError` for a model that `unsupported_model` names.
    """
    reason = unsupported_model(model)
    if reason is not None:
        raise ValueError(f"prefixes can't be shared: {reason}")
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    is_nested = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config": ATTENTION} if is_nested else ATTENTION)


def takes_image_features(model: Any) -> bool:
    """Whether the model's forward takes the vision tower's output in the place of pixels."""
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
    """Prompts, ready to be shared.

    `ids[b]` and `types[b]` (the processor's mm_token_type_ids) are (P,) of prompt b; `pixels` are `pixel_values`
    (all patches, patch values) and `image_grid_thw` (all images, 3) of all prompts, `image_counts[b]` images each.
    With `keep_features` the tower reads them here, in one call without gradients, and its output is what is kept,
    where the model's forward can take it.
    """
    parts: list[dict[str, Tensor] | None] = [None] * len(ids)
    if pixels is not None:
        grids = pixels["image_grid_thw"].split(list(image_counts))
        patches = pixels["pixel_values"].split([int(grid.prod(-1).sum()) for grid in grids])
        parts = [{"pixel_values": p, "image_grid_thw": g} for p, g in zip(patches, grids, strict=True)]
    positions = [
        _positions(model, row, part, None if types is None else types[i])
        for i, (row, part) in enumerate(zip(ids, parts, strict=True))
    ]
    if pixels is None or not keep_features or not takes_image_features(model):
        return [SharedPrompt(*row) for row in zip(ids, positions, [()] * len(ids), parts, strict=True)]
    with torch.no_grad():
        features = iter(model.get_image_features(**pixels, return_dict=True).pooler_output)
    images = [tuple(next(features) for _ in range(count)) for count in image_counts]
    return [SharedPrompt(*row) for row in zip(ids, positions, images, strict=True)]


def _positions(model: Any, ids: Tensor, pixels: dict[str, Tensor] | None, types: Tensor | None) -> Tensor:
    """The positions of a prompt's tokens, as the model would number them: (1, P), or (3, P) with images."""
    if pixels is None or types is None:
        return torch.arange(ids.numel(), device=ids.device)[None]
    grid = pixels["image_grid_thw"]
    positions, _ = model.base_model.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=grid)
    return positions[:, 0]


@dataclass(frozen=True)
class _Features:
    """The part of a vision tower's output that the forward reads."""

    pooler_output: list[Tensor]


def pack(prompts: Sequence[SharedPrompt], completions: Sequence[Tensor], mask: Tensor) -> Packed:
    """Lays groups out in one row.

    `completions[b]` is (G, C) token ids of prompt b's completions, right-padded; `mask` (N, C), in the same order,
    is 1 where they hold a token.
    """
    device = prompts[0].ids.device
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    positions: list[Tensor] = []
    groups: list[_Group] = []
    lengths = mask.sum(1).tolist()
    start = row = 0
    for prompt, rows in zip(prompts, completions, strict=True):
        ids.append(prompt.ids[:-1])
        labels.append(torch.full_like(prompt.ids[:-1], -100))
        positions.append(prompt.positions[:, :-1])
        last, first = prompt.ids[-1:], prompt.next_position
        counts = [int(length) for length in lengths[row : row + len(rows)]]
        for tokens, count in zip(rows, counts, strict=True):
            ids += [last, tokens[:count]]
            labels += [torch.full_like(last, -100), tokens[:count]]
            after = torch.arange(first, first + count, device=device).expand(len(prompt.positions), -1)
            positions += [prompt.positions[:, -1:], after]
        group = _layout(start, prompt.ids.numel() - 1, counts, device)
        groups.append(group)
        start, row = group.stop, row + len(rows)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "shared_prefix": groups,
        **_image_inputs(prompts),
    }
    if inputs["position_ids"].shape[0] == 1:
        inputs["position_ids"] = inputs["position_ids"][0]
    return Packed(inputs, torch.cat(labels)[None], tuple(mask.shape), mask.bool())  # type: ignore[arg-type]


def _layout(start: int, prompt: int, counts: list[int], device: torch.device) -> _Group:
    lengths = torch.tensor(counts, device=device) + 1  # with the copy of the prompt's last token
    steps = torch.arange(int(lengths.max()), device=device)
    filled = steps < lengths[:, None]
    slots = (lengths.cumsum(0) - lengths)[:, None] + steps
    return _Group(start, prompt, start + prompt + sum(counts) + len(counts), slots * filled, filled)


def _image_inputs(prompts: Sequence[SharedPrompt]) -> dict[str, Any]:
    """All images of the row, once a prompt: the tower's output where it was kept, else what the tower needs."""
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
    """transformers' attention interface: output (B, L, H, D)."""
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if isinstance(shared_prefix, _Prefix):
        return _decoding_attention(module.layer_idx, query, key, value, shared_prefix, scaling), None
    parts = [_group_attention(query, key, value, group, scaling) for group in shared_prefix]
    return torch.cat(parts, dim=1), None


def _group_attention(query: Tensor, key: Tensor, value: Tensor, group: _Group, scaling: float | None) -> Tensor:
    """Attention inside one group of a packed row: (1, tokens of the group, H, D).

    The prompt attends causally to itself. The completions are set side by side, (n, T), each behind a view of the
    prompt's keys: work and memory follow P² + n T (P + T), not the square of the row.
    """
    middle = group.start + group.prompt
    repeats = query.shape[1] // key.shape[1]
    prompt = slice(group.start, middle)
    first = scaled_dot_product_attention(
        query[:, :, prompt],
        key[:, :, prompt].repeat_interleave(repeats, 1),
        value[:, :, prompt].repeat_interleave(repeats, 1),
        is_causal=True,
        scale=scaling,
    )
    n, steps = group.slots.shape
    own_query, own_key, own_value = (
        states[0, :, middle : group.stop][:, group.slots].transpose(0, 1) for states in (query, key, value)
    )  # (n, H or K, T, D)
    keys, values = (
        torch.cat([states[:, :, prompt].expand(n, -1, -1, -1), own], dim=2)
        for states, own in ((key, own_key), (value, own_value))
    )  # (n, K, P + T, D)
    # The R query heads of a key head become R T queries of it: keys need no copies for them.
    folded = own_query.reshape(n, key.shape[1], repeats * steps, -1)
    causal = torch.ones(steps, group.prompt + steps, dtype=torch.bool, device=query.device).tril(group.prompt)
    second = scaled_dot_product_attention(folded, keys, values, attn_mask=causal.repeat(repeats, 1), scale=scaling)
    second = second.reshape(n, query.shape[1], steps, -1).transpose(1, 2)  # (n, T, H, D)
    return torch.cat([first.transpose(1, 2), second[group.filled][None]], dim=1)


@dataclass(frozen=True)
class _Prefix:
    """The prompts behind which completions are decoded."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values (B, K, P, D)
    mask: Tensor  # (B, 1, 1, P): 0 for the prompt's tokens, −inf for padding


def _decoding_attention(
    layer: int, query: Tensor, key: Tensor, value: Tensor, prefix: _Prefix, scaling: float | None
) -> Tensor:
    """One new token of each completion: query (N, H, 1, D), own keys (N, K, t, D) → (N, 1, H, D).

    All completions of a prompt ask its keys at once; softmax runs over both parts, so the result is exact.
    """
    prefix_key, prefix_value = prefix.layers[layer]
    prompts, heads = prefix_key.shape[:2]
    rows, size = query.shape[0], query.shape[-1]
    queries = query.reshape(rows, heads, -1, size) * (size**-0.5 if scaling is None else scaling)  # (N, K, R, D)
    own = queries @ key.transpose(-1, -2)  # (N, K, R, t)
    grouped = queries.reshape(prompts, -1, heads, queries.shape[2], size).transpose(1, 2)  # (B, K, G, R, D)
    shape = grouped.shape[:-1]
    scores = grouped.flatten(2, 3) @ prefix_key.transpose(-1, -2) + prefix.mask  # (B, K, G R, P)
    scores = scores.unflatten(2, shape[2:]).transpose(1, 2).flatten(0, 1)  # (N, K, R, P)
    weights = torch.cat([scores, own], dim=-1).softmax(-1, dtype=torch.float32).to(value.dtype)
    behind, beside = weights.split([scores.shape[-1], own.shape[-1]], dim=-1)
    behind = behind.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3) @ prefix_value  # (B, K, G R, D)
    behind = behind.unflatten(2, shape[2:]).transpose(1, 2).flatten(0, 1)  # (N, K, R, D)
    return (behind + beside @ value).reshape(rows, 1, -1, size)


def generate(
    model: Any, prompts: Sequence[SharedPrompt], group_size: int, config: Any, logits_processor: Any = None
) -> Tensor:
    """Samples `group_size` completions of each prompt: (N, new tokens), padded after their end.

    Everything that `model.generate` does with `config` (a GenerationConfig) is done by it; only its decoding loop
    is another, in which a prompt is read once. Tokens are drawn in the same order from the same random stream.
    `logits_processor` is applied besides those of the config, to rows of left-padded prompt and completion.
    """
    longest = max(prompt.ids.numel() for prompt in prompts)
    padding = [longest - prompt.ids.numel() for prompt in prompts]
    pad_id = config.pad_token_id if config.pad_token_id is not None else 0
    ids = torch.stack([_left_pad(p.ids, n, pad_id) for p, n in zip(prompts, padding, strict=True)])
    mask = torch.stack([_left_pad(torch.ones_like(p.ids), n, 0) for p, n in zip(prompts, padding, strict=True)])

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **_: Any,
    ) -> Tensor:
        logits, prefix = _prefill(model, prompts, input_ids, mask)
        logits = logits.repeat_interleave(group_size, 0)
        sequences = input_ids.repeat_interleave(group_size, 0)
        positions = torch.tensor([prompt.next_position for prompt in prompts], device=ids.device)
        positions = positions.repeat_interleave(group_size)[:, None]
        rank = prompts[0].positions.shape[0]
        cache = DynamicCache(config=model.config.get_text_config())
        unfinished = torch.ones(len(sequences), dtype=torch.bool, device=ids.device)
        while True:
            scores = logits_processor(sequences, logits.to(copy=True, dtype=torch.float32))
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            tokens = torch.where(unfinished, tokens, pad_id)
            sequences = torch.cat([sequences, tokens[:, None]], dim=1)
            unfinished = unfinished & ~stopping_criteria(sequences, None)
            finished = not bool(unfinished.any())
            if not model._has_unfinished_sequences(finished, synced_gpus, device=ids.device):
                return sequences
            outputs = model(
                input_ids=tokens[:, None],
                position_ids=positions if rank == 1 else positions.expand(rank, -1, -1),
                past_key_values=cache,
                use_cache=True,
                shared_prefix=prefix,
            )
            logits, positions = outputs.logits[:, -1], positions + 1

    sequences = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        custom_generate=loop,
        num_return_sequences=1,
        logits_processor=logits_processor,
    )
    return sequences[:, longest:]


def _prefill(model: Any, prompts: Sequence[SharedPrompt], ids: Tensor, mask: Tensor) -> tuple[Tensor, _Prefix]:
    """Reads the left-padded prompts (B, P): the logits of their last tokens (B, V), and their keys and values."""
    positions = torch.stack([_left_pad(p.positions, ids.shape[1] - p.ids.numel(), 0) for p in prompts], dim=1)
    outputs = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions if positions.shape[0] > 1 else positions[0],
        use_cache=True,
        logits_to_keep=1,
        **_image_inputs(prompts),
    )
    layers = [(layer.keys, layer.values) for layer in outputs.past_key_values.layers]
    visible = torch.zeros(mask.shape, dtype=layers[0][0].dtype, device=ids.device)
    visible.masked_fill_(mask == 0, -torch.inf)
    return outputs.logits[:, -1], _Prefix(layers, visible[:, None, None])


def _left_pad(values: Tensor, count: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (count, 0), value=fill)
