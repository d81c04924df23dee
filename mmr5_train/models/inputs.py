"""Model inputs for a query and its pages. Training, evaluation and inference build messages and tensors here."""

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
from mmr5_train.models.pages import MAX_CACHED_PAGES, load_page, page_limits
from mmr5_train.ranking.prompt import Prompt, build_messages, insert_images
from mmr5_train.ranking.records import Candidate


def check_images(candidates: Iterable[Candidate], folder: Path) -> None:
    """Raises `InputError` for the first page image that does not exist, so that a long run does not fail late."""
    for image in {candidate.image: None for candidate in candidates}:
        if not (folder / image).is_file():
            raise InputError(f"{folder / image}: no such page image; build the data again, or correct the path")


def load_pages(candidates: Sequence[Candidate], folder: Path, processor: Any) -> list[Image.Image]:
    """The prepared page images of the candidates, whose paths are relative to `folder`."""
    limits = page_limits(processor)
    return [load_page(folder / candidate.image, limits) for candidate in candidates]


def cache_small_pages(candidates: Iterable[Candidate], folder: Path, processor: Any) -> None:
    """Loads all page images into the cache, if they are small enough for it (`PageLimits.are_small`).

    Loading them in parallel here saves time: on a CPU, loading one page at a time can't overlap with training.
    """
    limits = page_limits(processor)
    if limits.are_small:
        paths = list({folder / candidate.image: None for candidate in candidates})
        with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes and resizes
            for _ in pool.map(lambda path: load_page(path, limits), paths[:MAX_CACHED_PAGES]):
                pass


def encode(
    processor: Any, prompt: Prompt, queries: Sequence[str], images: Sequence[Sequence[Image.Image]]
) -> BatchFeature:
    """Left-padded inputs of a batch of prompts, ready for `generate`.

    `images[b]` are the prepared page images of `queries[b]`. In the result, `input_ids`, `attention_mask` and
    `mm_token_type_ids` are (batch, longest prompt), `pixel_values` is (patches of all pages, values of a patch),
    and `image_grid_thw` is (all pages, 3).
    """
    conversations = []
    for query, page_images in zip(queries, images, strict=True):
        messages = build_messages(prompt, query, len(page_images))
        conversations.append(insert_images(messages, [{"type": "image", "image": image} for image in page_images]))
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def prompt_token_ids(
    processor: Any, prompt: Prompt, queries: Sequence[str], page_counts: Sequence[int]
) -> list[list[int]]:
    """The token ids of each prompt without padding, with one placeholder for each of its pages.

    `encode` repeats the placeholder of a page for each of its features; otherwise the ids are the same.
    """
    messages = [build_messages(prompt, query, n) for query, n in zip(queries, page_counts, strict=True)]
    texts = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[list[int]] = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def repeat_placeholders(ids: Sequence[int], image_token: int, counts: Sequence[int]) -> list[int]:
    """The result of `prompt_token_ids` with the placeholder of page i `counts[i]` times, as `encode` has it."""
    remaining = iter(counts)
    return [i for token in ids for i in [token] * (next(remaining) if token == image_token else 1)]


def openai_messages(prompt: Prompt, query: str, n_pages: int) -> list[dict[str, Any]]:
    """The same prompt as messages of the OpenAI API. Each image has an empty URL: `data_url` gives it."""
    parts = [{"type": "image_url", "image_url": {"url": ""}} for _ in range(n_pages)]
    return insert_images(build_messages(prompt, query, n_pages), parts)


def data_url(image: Image.Image) -> str:
    """A prepared page image as a PNG data URL (lossless)."""
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
