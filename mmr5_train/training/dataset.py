"""The data set that TRL's trainers read: one prompt with its page images per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image
from torch.utils.data import get_worker_info

from mmr5_train.common.environment import drop_secrets
from mmr5_train.models.inputs import cache_small_pages, load_pages
from mmr5_train.models.pages import PageLimits, load_page, page_limits
from mmr5_train.ranking.prompt import Prompt, build_messages
from mmr5_train.ranking.records import Candidate


@dataclass(frozen=True)
class PageFile:
    """A page image that is not open yet."""

    path: Path
    limits: PageLimits

    def open(self) -> Image.Image:
        """The prepared image. Raises `InputError`, which names the file, if it can't be read."""
        return load_page(self.path, self.limits)


def prompt_dataset(
    columns: Sequence[dict[str, Any]],
    queries: Sequence[str],
    shown: Sequence[Sequence[Candidate]],
    folder: Path,
    prompt: Prompt,
    processor: Any,
    *,
    open_pages: bool = True,
) -> Dataset:
    """Adds the columns "prompt" (messages) and "images" (prepared pages) to `columns`, one dict per row.

    Row i is the prompt for `queries[i]` and the pages `shown[i]`, whose image paths are relative to `folder`.
    Images are opened when a row is read, so the corpus may be larger than memory. Small images are opened and
    cached at once. With `open_pages=False`, "images" holds a `PageFile` per page, which the reader of the row
    opens: GRPO reads the same rows many times (`training.rollout_pages`).
    """
    limits = page_limits(processor)

    def read_rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if get_worker_info() is not None:  # a data-loading process: it opens images and needs no keys
            drop_secrets()
        indices = batch.pop("index")
        batch["prompt"] = [build_messages(prompt, queries[i], len(shown[i])) for i in indices]
        if open_pages:
            batch["images"] = [load_pages(shown[i], folder, processor) for i in indices]
        else:
            batch["images"] = [[PageFile(folder / page.image, limits) for page in shown[i]] for i in indices]
        return batch

    cache_small_pages((page for pages in shown for page in pages), folder, processor)
    return Dataset.from_list([{**row, "index": i} for i, row in enumerate(columns)]).with_transform(read_rows)
