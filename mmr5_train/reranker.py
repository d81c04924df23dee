"""The reranker: a checkpoint, its processor and a prompt; questions with pages in, complete orders out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from pydantic import ValidationError

from mmr5_train.models.inputs import encode, load_pages
from mmr5_train.models.loading import (
    SETTINGS,
    ModelConfig,
    load_model,
    load_page,
    load_processor,
    prepare_page,
    resolve_checkpoint,
    vision_token_ids,
)
from mmr5_train.ranking.answer import read_answer
from mmr5_train.ranking.files import InputError, validation_message
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Answered, PromptedTask, Record
from mmr5_train.shared_prefix import generate, share_prefixes, shared_prompts, unsupported_model


class RerankerSettings(Record):
    """reranker.json: what a checkpoint was taught to expect."""

    min_pixels: int
    max_pixels: int
    dtype: str
    think: bool
    prompt: Prompt


class Reranker:
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
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = load_processor(model, checkpoint)
        self.model = load_model(model, checkpoint).to(self.device).eval()
        self.prompt, self.think, self.max_new_tokens = prompt, think, max_new_tokens
        self.end_ids = {self.processor.tokenizer.eos_token_id, self.processor.tokenizer.pad_token_id}
        self.suppressed = vision_token_ids(self.processor)  # reads the whole vocabulary: once, not every batch

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

    def answer(
        self,
        tasks: Sequence[PromptedTask],
        folder: Path,
        *,
        batch_size: int,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Iterator[list[Answered]]:
        """The answers to each task, in order: one greedy, or `samples` sampled at `temperature`.

        Page paths are relative to `folder`. The same seed and batch size give the same samples.
        """
        for start in range(0, len(tasks), batch_size):
            batch = tasks[start : start + batch_size]
            pages = [load_pages(prompted.shown, folder, self.processor) for prompted in batch]
            torch.manual_seed(seed * 1_000_003 + start)
            queries = [prompted.task.query for prompted in batch]
            yield from self._generate(queries, pages, samples=samples, temperature=temperature)

    @torch.inference_mode()
    def _generate(
        self,
        queries: Sequence[str],
        pages: Sequence[Sequence[Image.Image]],
        *,
        samples: int = 0,
        temperature: float = 1.0,
    ) -> list[list[Answered]]:
        inputs = encode(self.processor, self.prompt, queries, pages).to(self.device)
        config = copy.deepcopy(self.model.generation_config)
        config.update(do_sample=False, max_new_tokens=self.max_new_tokens, suppress_tokens=self.suppressed)
        if samples:
            config.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
        count = max(samples, 1)
        if samples > 1 and unsupported_model(self.model) is None:
            generated = self._generate_shared(inputs, [len(row) for row in pages], samples, config)
        else:
            generated = self.model.generate(**inputs, generation_config=config, num_return_sequences=count)
            generated = generated[:, inputs["input_ids"].shape[1] :]
        completions = generated.tolist()
        answers = [self._read(ids, len(pages[row // count])) for row, ids in enumerate(completions)]
        return [answers[i : i + count] for i in range(0, len(answers), count)]

    def _generate_shared(self, inputs: Any, image_counts: list[int], samples: int, config: Any) -> torch.Tensor:
        """Several completions behind one reading of each prompt: the same ones, sooner."""
        share_prefixes(self.model)  # only now: a greedy answer keeps the attention the model was loaded with
        there = inputs["attention_mask"].bool()
        ids, types = (
            [row[mask] for row, mask in zip(inputs[key], there, strict=True)]
            for key in ("input_ids", "mm_token_type_ids")
        )
        pixels = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
        return generate(self.model, shared_prompts(self.model, ids, types, pixels, image_counts), samples, config)

    def _read(self, ids: list[int], n_pages: int) -> Answered:
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        text = self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        tokens = len(ids) if end is None else end + 1
        return read_answer(text, n_pages, cut_off=end is None, expect_think=self.think, tokens=tokens)


def load_page_or_image(page: str | Path | Image.Image, processor: Any) -> Image.Image:
    """A prepared page from a file or an open picture."""
    return prepare_page(page, processor) if isinstance(page, Image.Image) else load_page(page, processor)
