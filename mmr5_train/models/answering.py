"""A model that answers: questions with pages in, completions and complete orders out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmr5_train.models.inputs import encode, load_pages
from mmr5_train.models.loading import vision_token_ids
from mmr5_train.ranking.answer import read_answer
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Answered, PromptedTask
from mmr5_train.shared_prefix import generate, share_prefixes, shared_prompts, unsupported_model


class Answerer:
    """Asks a model that is loaded already, also one in training: `model` may be exchanged between calls."""

    def __init__(self, model: Any, processor: Any, prompt: Prompt, *, think: bool, max_new_tokens: int) -> None:
        self.model, self.processor, self.prompt = model, processor, prompt
        self.think, self.max_new_tokens = think, max_new_tokens
        self.end_ids = {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}
        self.suppressed = vision_token_ids(processor)  # reads the whole vocabulary: once, not every batch

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
            queries = [prompted.task.query for prompted in batch]
            device = self.model.device
            with torch.random.fork_rng(
                [device] if device.type == "cuda" else []
            ):  # a training goes on undisturbed
                torch.manual_seed(seed * 1_000_003 + start)
                answers = self._generate(queries, pages, samples=samples, temperature=temperature)
            yield from answers

    @torch.inference_mode()
    def _generate(
        self,
        queries: Sequence[str],
        pages: Sequence[Sequence[Image.Image]],
        *,
        samples: int = 0,
        temperature: float = 1.0,
    ) -> list[list[Answered]]:
        inputs = encode(self.processor, self.prompt, queries, pages).to(self.model.device)
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
