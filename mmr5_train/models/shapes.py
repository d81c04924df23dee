"""What published checkpoints look like inside, for planning and benchmarks without their weights."""

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


def _qwen2_5_vl(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int, **vision: Any):
    text = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary,
        "layer_types": ["full_attention"] * layers,
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"},
    }  # fmt: skip
    return {"text_config": text, "vision_config": {**_VISION, "out_hidden_size": hidden, **vision}}


# From the config.json of each checkpoint, where it differs from the shipped tiny model's.
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151_936),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152_064) | {"tie_word_embeddings": False},
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen2_5_vl(5120, 27648, 64, 40, 8, 152_064, intermediate_size=3456)
    | {"tie_word_embeddings": False},
}


def shape_config(path: str) -> Any:
    """The configuration of a checkpoint, or of one of `SHAPES` by its hub id, without a network."""
    if path not in SHAPES:
        try:
            return AutoConfig.from_pretrained(resolve_checkpoint(path))
        except (OSError, ValueError) as error:
            known = ", ".join(SHAPES)
            raise InputError(f"{path}: its config can't be read ({error}); known without it: {known}") from None
    described = AutoConfig.from_pretrained(resolve_checkpoint("tiny")).to_dict()
    for part, values in SHAPES[path].items():
        described[part] = described[part] | values if isinstance(values, dict) else values
    return type(AutoConfig.from_pretrained(resolve_checkpoint("tiny")))(**described)


def empty_model(path: str) -> Any:
    """The model without weights (on torch's meta device): every parameter's name and size."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(shape_config(path))
