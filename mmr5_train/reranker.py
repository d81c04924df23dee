"""The reranker: a checkpoint, its processor and a prompt; questions with pages in, complete orders out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from pydantic import ValidationError

from mmr5_train.models.answering import Answerer
from mmr5_train.models.loading import (
    SETTINGS,
    ModelConfig,
    load_model,
    load_page,
    load_processor,
    prepare_page,
    resolve_checkpoint,
)
from mmr5_train.ranking.files import InputError, validation_message
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Answered, Record


class RerankerSettings(Record):
    """reranker.json: what a checkpoint was taught to expect."""

    min_pixels: int
    max_pixels: int
    dtype: str
    think: bool
    prompt: Prompt


class Reranker(Answerer):
    """Ranks page images for a question with a reasoning model.

    Greedy by default, so that the same pages give the same order.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        model: ModelConfig,
        prompt: Prompt,
        *,
        think: bool = True,
        max_new_tokens: int = 2048,
        device: str | None = None,
    ) -> None:
        processor = load_processor(model, checkpoint)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_model(model, checkpoint).to(device).eval()
        super().__init__(loaded, processor, prompt, think=think, max_new_tokens=max_new_tokens)

    @classmethod
    def load(cls, checkpoint: str | Path, **options: Any) -> Self:
        """A checkpoint that this project trained, with the prompt and page sizes it was trained on.

        `options` are those of the constructor. Raises `InputError` where the checkpoint does not say how it
        was trained; then give the constructor a `ModelConfig` and a `Prompt`.
        """
        path = Path(resolve_checkpoint(checkpoint)) / SETTINGS
        if not path.is_file():
            raise InputError(
                f"{path}: no such file, so nothing says how the model was trained; take a checkpoint that sft or "
                "grpo wrote, or give Reranker(…) the model and the prompt yourself"
            )
        try:
            settings = RerankerSettings.model_validate_json(path.read_bytes())
            limits = settings.model_dump(include={"min_pixels", "max_pixels", "dtype"})
            model = ModelConfig(path=str(checkpoint), **limits)
        except ValidationError as error:
            raise InputError(f"{path}: {validation_message(error)}; train again, or mend the file") from None
        return cls(checkpoint, model, settings.prompt, **{"think": settings.think, **options})

    def rank(self, query: str, pages: Sequence[str | Path | Image.Image]) -> Answered:
        """The order of `pages` (local ids from 1, best first), with the reasoning and any defects.

        Raises `InputError` for no pages, and for a file that is no readable page image.
        """
        if not pages:
            raise InputError("there are no pages to rank: give at least one page image")
        shown = [load_page_or_image(page, self.processor) for page in pages]
        return self._generate([query], [shown])[0][0]


def load_page_or_image(page: str | Path | Image.Image, processor: Any) -> Image.Image:
    """A prepared page from a file or an open picture."""
    return prepare_page(page, processor) if isinstance(page, Image.Image) else load_page(page, processor)
