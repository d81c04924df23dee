"""A question and its pages as model inputs: the one way from a `PromptedTask` to messages, images and tensors."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BatchFeature

from mmr5_train.common.files import InputError
from mmr5_train.models.pages import KEPT_PAGES, is_small, load_page
from mmr5_train.ranking.prompt import Prompt, build_messages, insert_images
from mmr5_train.ranking.records import Candidate


def check_images(shown: Iterable[Candidate], folder: Path) -> None:
    """Raises `InputError` for a page image that is not there: worth knowing before the first hour."""
    for image in {candidate.image: None for candidate in shown}:
        if not (folder / image).is_file():
            raise InputError(f"{folder / image}: no such page image; build the data again, or mend the path")


def load_pages(shown: Sequence[Candidate], folder: Path, processor: Any) -> list[Image.Image]:
    """The prepared page images of `shown`, whose paths are relative to `folder`."""
    return [load_page(folder / candidate.image, processor) for candidate in shown]


def keep_small_pages(shown: Iterable[Candidate], folder: Path, processor: Any) -> None:
    """Opens all pages that are small enough to be kept in memory, at once: on a CPU no later step can hide it."""
    if is_small(processor):
        paths = {folder / candidate.image: None for candidate in shown}
        with ThreadPoolExecutor() as pool:  # Pillow lets others work while it decodes and resizes
            for _ in pool.map(lambda path: load_page(path, processor), list(paths)[:KEPT_PAGES]):
                pass


def encode(
    processor: Any, prompt: Prompt, queries: Sequence[str], pages: Sequence[Sequence[Image.Image]]
) -> BatchFeature:
    """Left-padded inputs of a batch of prompts, ready for `generate`.

    `input_ids` and `attention_mask` are (batch, longest prompt); `pixel_values` is (all patches of all pages,
    patch values); `image_grid_thw` is (all pages, 3).
    """
    conversations = []
    for query, images in zip(queries, pages, strict=True):
        messages = build_messages(prompt, query, len(images))
        conversations.append(insert_images(messages, [{"type": "image", "image": image} for image in images]))
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def openai_messages(prompt: Prompt, query: str, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """The same prompt for an OpenAI-compatible server: prepared pages as lossless data URLs."""
    parts = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
    return insert_images(build_messages(prompt, query, len(images)), parts)


def _data_url(image: Image.Image) -> str:
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
