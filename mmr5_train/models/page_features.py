"""Prompts whose pages are vision features. The tower reads each distinct page once; a cache keeps the features.

    prompts = encode_prompts(model, processor, prompt, queries, images, cache=PageCache(2**30))
    model.generate(**prompts.padded(pad_id))

The token ids are those of `mmr5_train.models.inputs.encode`, and the features those that the model computes from
its pixels. It needs a model whose forward accepts features (`takes_image_features`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from mmr5_train.common.part_times import PartTimes
from mmr5_train.models.inputs import prompt_token_ids, repeat_placeholders
from mmr5_train.models.placement import input_device
from mmr5_train.models.shared_prefix import SharedPrompt, image_features, image_inputs_of, shared_prompts
from mmr5_train.ranking.prompt import Prompt

MAX_TOWER_PATCHES = 65_536
"""Patches that the vision tower reads in one call: 16 pages of 1,024 visual tokens. It bounds the memory."""


@dataclass(frozen=True, eq=False)
class PageFeatures:
    """What the text model reads of a page."""

    grid: tuple[int, int, int]
    """Patches in time, height and width."""
    levels: tuple[Tensor, ...]
    """(visual tokens, hidden size) each: `mmr5_train.models.shared_prefix.image_features`."""

    @property
    def tokens(self) -> int:
        return len(self.levels[0])

    @property
    def nbytes(self) -> int:
        return sum(level.nbytes for level in self.levels)


class PageCache:
    """The features of the pages that were used last, of at most `max_bytes` together. Threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._pages: OrderedDict[bytes, PageFeatures] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._pages)

    def get(self, key: bytes) -> PageFeatures | None:
        with self._lock:
            if key in self._pages:
                self._pages.move_to_end(key)
            return self._pages.get(key)

    def put(self, key: bytes, page: PageFeatures) -> None:
        with self._lock:
            if key in self._pages or page.nbytes > self.max_bytes:
                return
            self._pages[key] = page
            self.nbytes += page.nbytes
            while self.nbytes > self.max_bytes:
                _, dropped = self._pages.popitem(last=False)
                self.nbytes -= dropped.nbytes


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """A batch of prompts, on the model's device."""

    ids: list[Tensor]
    """For each prompt its token ids, (P,)."""
    types: list[Tensor]
    """For each prompt 1 where a token is visual, else 0, (P,)."""
    pages: list[list[PageFeatures]]

    @property
    def page_counts(self) -> list[int]:
        return [len(pages) for pages in self.pages]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(ids) for ids in self.ids)

    @property
    def grids(self) -> Tensor:
        """(all pages, 3), as the processor's `image_grid_thw`."""
        return torch.tensor([page.grid for pages in self.pages for page in pages], device=self.ids[0].device)

    @property
    def levels(self) -> list[tuple[Tensor, ...]]:
        return [page.levels for pages in self.pages for page in pages]

    def padded(self, pad_id: int) -> dict[str, Any]:
        """Arguments of `generate`, with left-padded rows."""
        left = [self.longest - len(ids) for ids in self.ids]
        return {
            "input_ids": _rows(self.ids, left, pad_id),
            "attention_mask": _rows([torch.ones_like(ids) for ids in self.ids], left, 0),
            "mm_token_type_ids": _rows(self.types, left, 0),
            "image_grid_thw": self.grids,
            **image_inputs_of(self.levels),
        }

    def split(self) -> list[EncodedPrompts]:
        """Each prompt as a batch of one."""
        return [
            EncodedPrompts([ids], [types], [pages])
            for ids, types, pages in zip(self.ids, self.types, self.pages, strict=True)
        ]

    def repeated(self, count: int) -> EncodedPrompts:
        """Each prompt `count` times."""
        ids, types, pages = (
            [row for row in rows for _ in range(count)] for rows in (self.ids, self.types, self.pages)
        )
        return EncodedPrompts(ids, types, pages)  # type: ignore[arg-type]

    def followed_by(self, tokens: Sequence[Sequence[int]]) -> EncodedPrompts:
        """Each prompt with text tokens after it."""
        after = [torch.tensor(row, dtype=torch.long, device=self.ids[0].device) for row in tokens]
        return EncodedPrompts(
            [torch.cat(pair) for pair in zip(self.ids, after, strict=True)],
            [pad(types, (0, len(row))) for types, row in zip(self.types, after, strict=True)],
            self.pages,
        )

    def shared(self, model: Any) -> list[SharedPrompt]:
        """The prompts for `mmr5_train.models.shared_prefix`."""
        grids = {"image_grid_thw": self.grids}
        return shared_prompts(model, self.ids, self.types, grids, self.page_counts, features=self.levels)


def _rows(rows: Sequence[Tensor], left: Sequence[int], value: int) -> Tensor:
    return torch.stack([pad(row, (n, 0), value=value) for row, n in zip(rows, left, strict=True)])


def encode_prompts(
    model: Any,
    processor: Any,
    prompt: Prompt,
    queries: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    *,
    cache: PageCache | None = None,
    times: PartTimes | None = None,
) -> EncodedPrompts:
    """The prompts of a batch. `images[b]` are the prepared page images of `queries[b]`."""
    times, device = times or PartTimes(), input_device(model)
    with times.part("encode"):
        distinct = {id(image): image for page_images in images for image in page_images}
        with ThreadPoolExecutor() as pool:
            keys = dict(zip(distinct, pool.map(page_key, distinct.values()), strict=True))
        token_ids = prompt_token_ids(processor, prompt, queries, [len(page_images) for page_images in images])
    by_key = {keys[i]: image for i, image in distinct.items()}
    features = {key: page for key in by_key if cache is not None and (page := cache.get(key)) is not None}
    missing = {key: image for key, image in by_key.items() if key not in features}
    for key, page in zip(missing, _read_pages(model, processor, list(missing.values()), times), strict=True):
        features[key] = page
        if cache is not None:
            cache.put(key, page)
    pages = [[features[keys[id(image)]] for image in page_images] for page_images in images]
    image_token = processor.image_token_id
    ids = [
        torch.tensor(repeat_placeholders(row, image_token, [page.tokens for page in of_row]), device=device)
        for row, of_row in zip(token_ids, pages, strict=True)
    ]
    return EncodedPrompts(ids, [(row == image_token).to(torch.int) for row in ids], pages)


def page_key(image: Image.Image) -> bytes:
    """Equal for equal page images: a hash of size and pixels."""
    return blake2b(repr((image.mode, image.size)).encode() + image.tobytes(), digest_size=20).digest()


def _read_pages(model: Any, processor: Any, images: Sequence[Image.Image], times: PartTimes) -> list[PageFeatures]:
    """The features of each page, in calls of the tower of bounded size."""
    if not images:
        return []
    device, image_processor = input_device(model), processor.image_processor
    # On a GPU, only the pixels travel, one byte each; it also cuts pages much faster.
    options = {"return_tensors": "pt", **({"device": device} if device.type == "cuda" else {})}
    with times.part("encode", lambda: synchronize(device)), ThreadPoolExecutor() as pool:  # releases the GIL
        cut = list(pool.map(lambda image: image_processor(images=[image], **options), images))
    pages: list[PageFeatures] = []
    with times.part("vision", lambda: synchronize(device)):
        for batch in _batches([len(page["pixel_values"]) for page in cut], MAX_TOWER_PATCHES):
            pixels = {
                name: torch.cat([cut[i][name] for i in batch]).to(device)
                for name in ("pixel_values", "image_grid_thw")
            }
            for grid, levels in zip(pixels["image_grid_thw"].tolist(), image_features(model, pixels), strict=True):
                # A part of a larger tensor would keep all of it in memory.
                pages.append(PageFeatures(tuple(grid), tuple(level.clone() for level in levels)))
    return pages


def _batches(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive indices, with at most `limit` of size together where a batch has more than one."""
    batches: list[list[int]] = []
    total = 0
    for index, size in enumerate(sizes):
        if not batches or total + size > limit:
            batches.append([])
            total = 0
        batches[-1].append(index)
        total += size
    return batches


def synchronize(device: torch.device) -> None:
    """Waits for the work on a GPU, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
