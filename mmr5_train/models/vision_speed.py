"""A faster vision tower on GPUs, with the same results up to rounding.

A tower of the Qwen family attends within each image, and in most layers of Qwen2.5-VL within windows of 64
patches. Without flash attention, transformers calls `scaled_dot_product_attention` once for each of them: 20 pages
of 1,024 visual tokens have 1,280 windows, in each of 28 layers. `batch_windows` makes windows of equal length the
rows of one batch. transformers gives the limits of the windows only to implementations with "flash" in their name.

Qwen2.5-VL's tower has MLPs of 3,420 units. Rows of 3,420 16-bit numbers are not aligned to 16 bytes, so GPUs
multiply them with slow kernels. `align_mlps` adds units whose weights are 0.

docs/benchmarks.md (One pass over many pages) has the times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION = "batched_windows_called_like_flash_attention"
KNOWN_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
UNITS = 64
"""The width of an MLP becomes a multiple of it."""


def batch_windows(model: Any) -> None:
    """Enables batched windows for a model of `KNOWN_MODELS` whose tower uses sdpa. Others stay as they are."""
    if model.config.model_type in KNOWN_MODELS and model.config.vision_config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, _attention)
        model.set_attn_implementation({"vision_config": ATTENTION})


def align_mlps(model: Any) -> None:
    """Widens the MLPs of Qwen2.5-VL's tower to a multiple of `UNITS`. Quantized layers stay as they are.

    For inference only: a saved model would have other shapes of weights than its config says.
    """
    if model.config.model_type != "qwen2_5_vl":
        return
    for block in model.base_model.visual.blocks:
        layers = block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj
        missing = -block.mlp.gate_proj.out_features % UNITS
        if missing == 0 or any(type(layer) is not nn.Linear for layer in layers):
            continue
        for layer in layers[:2]:
            layer.weight = _parameter(pad(layer.weight, (0, 0, 0, missing)))
            layer.bias = _parameter(pad(layer.bias, (0, missing)))
            layer.out_features += missing
        layers[2].weight = _parameter(pad(layers[2].weight, (0, missing)))
        layers[2].in_features += missing


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach(), requires_grad=False)


def _attention(
    module: Any,
    query_1HLD: Tensor,
    key_1HLD: Tensor,
    value_1HLD: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within windows of the L patches. Returns (1, L, H, D). `cu_seq_lens_q` has the windows' limits."""
    starts, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()
    inputs = [states[0] for states in (query_1HLD, key_1HLD, value_1HLD)]
    if len(set(lengths.tolist())) == 1:  # no copies
        query, key, value = (states.unflatten(1, (len(lengths), -1)).transpose(0, 1) for states in inputs)
        output = scaled_dot_product_attention(
            query, key, value, scale=scaling, dropout_p=dropout
        )  # (windows, H, length, D)
        return output.transpose(1, 2).flatten(0, 1)[None], None
    output_LHD = query_1HLD.new_empty(query_1HLD.shape[2], query_1HLD.shape[1], query_1HLD.shape[3])
    for length in lengths.unique().tolist():
        patches_WN = starts[lengths == length, None] + torch.arange(length, device=starts.device)
        query, key, value = (states[:, patches_WN].transpose(0, 1) for states in inputs)
        output = scaled_dot_product_attention(query, key, value, scale=scaling, dropout_p=dropout)
        output_LHD = output_LHD.index_put((patches_WN,), output.transpose(1, 2))
    return output_LHD[None], None
