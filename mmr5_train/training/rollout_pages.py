"""Opens the pages of GRPO's rollout batches: each page once, in threads, while the model computes.

TRL's sampler repeats a rollout batch for each of its micro-steps (steps_per_generation × num_iterations), with
every prompt G times in it. If each reading of a row opened its pages, they would be decoded that often.
Here a row names its pages (`PageFile`). When the data loader reads a batch, threads start to open those pages that
are not being opened already; the trainer waits for them only when it samples. The loader reads one batch ahead, so
the pages of the next rollout batch are opened during the last optimizer step on the current one.

Threads suffice, because Pillow releases the GIL while it decodes and resizes. Worker processes would have to send
the images to the trainer, again for every micro-step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from PIL import Image
from trl import GRPOTrainer
from trl.trainer.utils import strip_images_from_messages

from mmr5_train.training.dataset import PageFile

MAX_THREADS = 8  # per process; a page takes about 0.1 s, and a rollout batch has tens of pages


class RolloutPages:
    """The pages of the rollout batch that was read last. Memory holds these, and those of rows still in use."""

    def __init__(self) -> None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
        threads = min(MAX_THREADS, max(1, (os.cpu_count() or 1) // processes))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pages")
        self._images: dict[PageFile, Future[Image.Image]] = {}

    def start(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with images that threads are opening. This is the data loader's collate function."""
        pages = dict.fromkeys(page for row in rows for page in row["images"])
        self._images = {page: self._images.get(page) or self._pool.submit(page.open) for page in pages}
        return [{**row, "images": [self._images[page] for page in row["images"]]} for row in rows]


def wait_for_pages(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `RolloutPages.start` with the prepared images.

    Raises `InputError`, which names the file, for a page that can't be read.
    """
    return [{**row, "images": [image.result() for image in row["images"]]} for row in rows]


class RolloutPagesTrainer(GRPOTrainer):
    """Reads a data set whose column "images" holds `PageFile`s. Put it before the trainer's class in the bases.

    The images stay in the process that opened them. TRL would send the prompts that it logs, with their images, to
    all ranks.
    """

    data_collator: Any  # the base class declares collators that return one dict

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator = RolloutPages().start

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return super()._generate_and_score_completions(wait_for_pages(inputs))

    def _calculate_rewards(self, inputs: Any, prompts: list[Any], *rest: Any) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, *rest)
        prompts[:] = [strip_images_from_messages(messages) for messages in prompts]  # TRL logs this list
        return rewards
