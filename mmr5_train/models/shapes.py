"""Configurations of published checkpoints, so that planning and benchmarks need no download and no weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mmr5_train.common.files import InputError
from mmr5_train.models.loading import resolve_checkpoint

_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
}  # fmt: skip


def _qwen2_5_vl(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **vision: Any
) -> dict[str, Any]:
    text = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "layer_types": ["full_attention"] * layers,
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"},
    }  # fmt: skip
    return {"text_config": text, "vision_config": {**_VISION, "out_hidden_size": hidden, **vision}}


SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151_936),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152_064) | {"tie_word_embeddings": False},
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen2_5_vl(5120, 27648, 64, 40, 8, 152_064, intermediate_size=3456)
    | {"tie_word_embeddings": False},
}
"""By hub id: the values of the checkpoint's config.json that differ from those of the tiny model."""


def shape_config(path: str) -> Any:
    """The configuration of a checkpoint. For the hub ids in `SHAPES` it needs no network.

    Raises `InputError` if the configuration can't be read.
    """
    if path not in SHAPES:
        try:
            return AutoConfig.from_pretrained(resolve_checkpoint(path))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: its config can't be read ({error}); available without a network: {', '.join(SHAPES)}"
            ) from None
    tiny = AutoConfig.from_pretrained(resolve_checkpoint("tiny"))
    values = tiny.to_dict()
    for key, changed in SHAPES[path].items():
        values[key] = values[key] | changed if isinstance(changed, dict) else changed
    return type(tiny)(**values)


def empty_model(path: str) -> Any:
    """The model on torch's meta device: the names and shapes of all parameters, without weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(shape_config(path))
