"""Writes a small random checkpoint with the real Qwen tokenizer, which stands in for a published checkpoint.

    python scripts/benchmarks/standin.py OUT [--family qwen3_vl] [--seed 1]

The checkpoint has the architecture, tokenizer, chat template, image processor limits and generation config of
Qwen2.5-VL or Qwen3-VL. So code meets what a published checkpoint has: page ids and tags of several tokens, token
ids without text, large pages, sampling settings in the generation config. Only the network is small: 20 million
parameters, nearly all of them embeddings.

The tokenizer (tokenizer.json and tokenizer_config.json of Qwen2.5) is read from the folder that the environment
variable QWEN_TOKENIZER names.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    AddedToken,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from mmr5_train.models.loading import TINY

Family = Literal["qwen2_5_vl", "qwen3_vl"]

DEFAULT_TOKENIZER = Path(__file__).resolve().parents[2] / "../shared/qwen2_5_tokenizer"
VOCABULARY = {"qwen2_5_vl": 152_064, "qwen3_vl": 151_936}  # rows of the embeddings of the 7B and 8B models
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128}
SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # of Qwen2.5-VL's template by default
# Tokens that Qwen3's tokenizer has in addition to Qwen2.5's, in the order of their ids.
QWEN3_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")


def tokenizer_folder() -> Path:
    """The folder with the tokenizer files. Raises `FileNotFoundError` if it does not exist."""
    folder = Path(os.environ.get("QWEN_TOKENIZER") or DEFAULT_TOKENIZER)
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no tokenizer.json of Qwen2.5; set QWEN_TOKENIZER to a folder with the tokenizer files of "
            "a Qwen2.5 checkpoint"
        )
    return folder


def write_standin(out: Path, family: Family = "qwen2_5_vl", seed: int = 0) -> Path:
    """Writes the checkpoint with random weights into the folder `out`, and returns `out`.

    Raises `FileNotFoundError` if the tokenizer files are missing.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    if family == "qwen3_vl":
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN3_TOKENS])
    torch.manual_seed(seed)
    model = _qwen2_5_vl(tokenizer) if family == "qwen2_5_vl" else _qwen3_vl(tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1e-6,
        repetition_penalty=1.05,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")],
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    model.save_pretrained(out)
    _processor(tokenizer, family).save_pretrained(out)
    return out


def _processor(tokenizer: Any, family: Family) -> Any:
    template = AutoProcessor.from_pretrained(TINY).chat_template  # has the form of Qwen-VL's turns and images
    if family == "qwen2_5_vl":
        images = Qwen2VLImageProcessor(size={"shortest_edge": 3_136, "longest_edge": 12_845_056})
        system = "{%- if messages[0].role != 'system' -%}" + SYSTEM_TURN + "{% endif -%}"
        return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=system + template)
    images = Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 65_536, "longest_edge": 16_777_216})
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(patch_size=16), chat_template=template)


def _token_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {field: tokenizer.convert_tokens_to_ids(token) for field, token in names.items()}


def _qwen2_5_vl(tokenizer: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    text = TEXT | {
        "vocab_size": VOCABULARY["qwen2_5_vl"],
        "max_position_embeddings": 128_000,
        "rope_parameters": rope,
    }
    vision = VISION | {"window_size": 112, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **_token_ids(tokenizer)
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(tokenizer: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = TEXT | {
        "vocab_size": VOCABULARY["qwen3_vl"],
        "head_dim": 32,
        "max_position_embeddings": 262_144,
        "rope_parameters": rope,
    }
    vision = VISION | {"num_position_embeddings": 2304, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **_token_ids(tokenizer)
    )
    return Qwen3VLForConditionalGeneration(config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small random checkpoint with the real Qwen tokenizer.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=get_args(Family), default="qwen2_5_vl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_standin(arguments.out, arguments.family, arguments.seed))


if __name__ == "__main__":
    main()
