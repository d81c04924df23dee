"""The data set that TRL's trainers read: one prompt with its page images per row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.utils.data import get_worker_info

from mmr5_train.common.environment import drop_secrets
from mmr5_train.models.inputs import cache_small_pages, load_pages
from mmr5_train.ranking.prompt import Prompt, build_messages
from mmr5_train.ranking.records import Candidate


def prompt_dataset(
    columns: Sequence[dict[str, Any]],
    queries: Sequence[str],
    shown: Sequence[Sequence[Candidate]],
    folder: Path,
    prompt: Prompt,
    processor: Any,
) -> Dataset:
    """Adds the columns "prompt" (messages) and "images" (prepared pages) to `columns`, one dict per row.

    Row i is the prompt for `queries[i]` and the pages `shown[i]`, whose image paths are relative to `folder`.
    Images are opened when a row is read, so the corpus may be larger than memory. Small images are opened and
    cached at once.
    """

    def read_rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if get_worker_info() is not None:  # a data-loading process: it opens images and needs no keys
            drop_secrets()
        indices = batch.pop("index")
        batch["prompt"] = [build_messages(prompt, queries[i], len(shown[i])) for i in indices]
        batch["images"] = [load_pages(shown[i], folder, processor) for i in indices]
        return batch

    cache_small_pages((page for pages in shown for page in pages), folder, processor)
    return Dataset.from_list([{**row, "index": i} for i, row in enumerate(columns)]).with_transform(read_rows)
