"""A model that answers: questions with pages in, completions and complete orders out.

`LocalBackend` asks a model in this process, `mmr5_train.inference.remote` one behind an OpenAI-compatible server.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList

from mmr5_train.common.files import InputError
from mmr5_train.inference.constrained import ListOfAllPages, Vocabulary
from mmr5_train.models.inputs import encode, load_pages
from mmr5_train.models.loading import (
    ModelConfig,
    base_of,
    default_model,
    is_adapter,
    load_merged,
    load_model,
    load_processor,
    read_settings,
    vision_token_ids,
)
from mmr5_train.models.pages import load_page, prepare_page
from mmr5_train.models.shared_prefix import generate, share_prefixes, shared_prompts, unsupported_model
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.answer_constraints import LIST_OPEN
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import LocalId, Mode, ModelAnswer, PromptedTask


class LocalBackend:
    """Asks a model that is loaded already, also one in training: `model` may be exchanged between calls.

    With `constrain` every completion ends in a list of all pages; else the model is free to fail, which is what
    an evaluation counts.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt: Prompt,
        *,
        mode: Mode = "reason",
        max_new_tokens: int,
        constrain: bool = False,
    ) -> None:
        self.model, self.processor, self.prompt = model, processor, prompt
        self.mode, self.max_new_tokens, self.constrain = mode, max_new_tokens, constrain
        self.end_ids = {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}
        self.suppressed = vision_token_ids(processor)  # reads the whole vocabulary: once, not every batch

    @property
    def think(self) -> bool:
        """Whether completions have a think block."""
        return self.mode == "reason"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.processor.tokenizer)

    @cached_property
    def identifiers(self) -> list[int]:
        """The tokens of page ids that `logits` can tell apart."""
        return identifier_ids(self.processor.tokenizer, 100)

    @property
    def most_scored(self) -> int:
        """The most pages that `logits` takes at a time."""
        return len(self.identifiers)

    def prepare(self, page: Image.Image) -> Image.Image:
        """A page as the model sees it."""
        return prepare_page(page, self.processor)

    def load(self, path: Path) -> Image.Image:
        """A page file as the model sees it."""
        return load_page(path, self.processor)

    def answer(
        self,
        tasks: Sequence[PromptedTask],
        folder: Path,
        *,
        batch_size: int,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Iterator[list[ModelAnswer]]:
        """The answers to each task, in order: one greedy, or `samples` sampled at `temperature`.

        Page paths are relative to `folder`. The same seed and batch size give the same samples.
        """
        for start in range(0, len(tasks), batch_size):
            batch = tasks[start : start + batch_size]
            pages = [load_pages(prompted.shown, folder, self.processor) for prompted in batch]
            queries = [prompted.task.query for prompted in batch]
            drawn = {"samples": samples, "temperature": temperature, "seed": seed * 1_000_003 + start}
            yield from self.ask(queries, pages, **drawn)  # type: ignore[arg-type]

    def ask(
        self,
        queries: Sequence[str],
        pages: Sequence[Sequence[Image.Image]],
        *,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[ModelAnswer]]:
        """The answers to one batch of questions, whose pages are prepared: one greedy each, or `samples` drawn."""
        if self.mode == "logits":
            if samples:
                raise InputError("mode logits: nothing is sampled; set samples=0")
            return [[answered] for answered in self._score(queries, pages)]
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a training goes on undisturbed
            torch.manual_seed(seed)
            return self._generate(queries, pages, samples, temperature)

    @torch.inference_mode()
    def _generate(
        self, queries: Sequence[str], pages: Sequence[Sequence[Image.Image]], samples: int, temperature: float
    ) -> list[list[ModelAnswer]]:
        inputs = encode(self.processor, self.prompt, queries, pages).to(self.model.device)
        config = copy.deepcopy(self.model.generation_config)
        count, width = max(samples, 1), inputs["input_ids"].shape[1]
        config.update(do_sample=False, max_new_tokens=self.max_new_tokens, suppress_tokens=self.suppressed)
        if samples:
            config.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
        held = self._constraint([len(row) for row in pages for _ in range(count)], width)
        processors = LogitsProcessorList([] if held is None else [held])
        if samples > 1 and unsupported_model(self.model) is None:
            generated = self._generate_shared(inputs, [len(row) for row in pages], samples, config, processors)
        else:
            config.update(num_return_sequences=count)
            generated = self.model.generate(**inputs, generation_config=config, logits_processor=processors)
            generated = generated[:, width:]
        prompts = self._prompt_counts(inputs)
        answers = [
            self._read(
                ids,
                len(pages[row // count]),
                held is not None and held.rows[row].cut_off,
                prompts[row // count],
            )
            for row, ids in enumerate(generated.tolist())
        ]
        return [answers[i : i + count] for i in range(0, len(answers), count)]

    def _constraint(self, counts: list[int], prompt_length: int) -> ListOfAllPages | None:
        if not self.constrain:
            return None
        limits = {"prompt_length": prompt_length, "max_new_tokens": self.max_new_tokens}
        return ListOfAllPages(self.vocabulary, counts, think=self.think, **limits)

    def _generate_shared(
        self, inputs: Any, image_counts: list[int], samples: int, config: Any, processors: LogitsProcessorList
    ) -> Tensor:
        """Several completions behind one reading of each prompt: the same ones, sooner."""
        share_prefixes(self.model)  # only now: a greedy answer keeps the attention the model was loaded with
        there = inputs["attention_mask"].bool()
        ids, types = (
            [row[mask] for row, mask in zip(inputs[key], there, strict=True)]
            for key in ("input_ids", "mm_token_type_ids")
        )
        pixels = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
        prompts = shared_prompts(self.model, ids, types, pixels, image_counts)
        return generate(self.model, prompts, samples, config, processors)

    def _prompt_counts(self, inputs: Any) -> list[dict[str, int]]:
        """How many tokens each prompt of a batch has, and how many of them are visual."""
        tokens = inputs["attention_mask"].sum(1).tolist()
        visual = (inputs["input_ids"] == self.processor.image_token_id).sum(1).tolist()
        return [{"prompt_tokens": t, "visual_tokens": v} for t, v in zip(tokens, visual, strict=True)]

    def _read(self, ids: list[int], n_pages: int, closed_early: bool, prompt: dict[str, int]) -> ModelAnswer:
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        text = self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        tokens = len(ids) if end is None else end + 1
        cut_off = end is None or closed_early
        counts = prompt | {"tokens": tokens}
        return to_model_answer(text, n_pages, counts=counts, cut_off=cut_off, expect_think=self.think)

    @torch.inference_mode()
    def _score(self, queries: Sequence[str], pages: Sequence[Sequence[Image.Image]]) -> list[ModelAnswer]:
        """One forward pass: the probability of each page's id where the list would begin (arXiv 2605.11864)."""
        inputs = encode(self.processor, self.prompt, queries, pages)
        inputs = with_list_open(inputs, self.processor.tokenizer).to(self.model.device)
        logits_BV = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        answers = []
        for row, (shown, counts) in enumerate(zip(pages, self._prompt_counts(inputs), strict=True)):
            if len(shown) > self.most_scored:
                raise InputError(
                    f"mode logits: this checkpoint's tokenizer tells {self.most_scored} pages apart by their "
                    f"first token, found {len(shown)}; rank them in windows"
                )
            scores = logits_BV[row, self.identifiers[: len(shown)]].softmax(-1).tolist()
            order = sorted(range(len(shown)), key=lambda i, scores=scores: -scores[i])  # type: ignore[misc]
            by_rank = tuple(scores[i] for i in order)
            ids_by_rank = tuple(LocalId(i + 1) for i in order)
            answers.append(ModelAnswer(completion="", order=ids_by_rank, scores=by_rank, **counts))
        return answers


def load_backend(
    checkpoint: str | Path,
    *,
    base: str | None = None,
    prompt: Prompt | None = None,
    model: ModelConfig | None = None,
    mode: Mode | None = None,
    device: str | None = None,
    max_new_tokens: int,
    constrain: bool = False,
) -> LocalBackend:
    """A checkpoint, or an adapter on its base, ready to be asked.

    What is not given is what the checkpoint says itself (`reranker.json`), or for `model` its own processor's page
    sizes. Raises `InputError` where nothing says which prompt it was taught with.
    """
    settings = read_settings(checkpoint)
    prompt = prompt or (settings.prompt if settings else None)
    if prompt is None:
        raise InputError(
            f'{checkpoint}: nothing says with which prompt it was taught; give prompt="default", or the path of '
            "the YAML file that scripts/import_prompt.py wrote"
        )
    adapter = checkpoint if base is not None or is_adapter(checkpoint) else None
    path = str(checkpoint) if adapter is None else base or base_of(adapter)
    config = model or (settings.model(path) if settings else default_model(path))
    config = config.model_copy(update={"path": path})
    loaded = load_model(config) if adapter is None else load_merged(config, adapter)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LocalBackend(
        loaded.to(device).eval(),
        load_processor(config),
        prompt,
        mode=mode or (settings.mode if settings else "reason"),
        max_new_tokens=max_new_tokens,
        constrain=constrain,
    )


def with_list_open(inputs: Any, tokenizer: Any) -> Any:
    """The inputs of left-padded prompts, each with the beginning of an answer behind it."""
    opening = torch.tensor(tokenizer(LIST_OPEN, add_special_tokens=False)["input_ids"])
    rows = len(inputs["input_ids"])
    behind = {"input_ids": opening, "attention_mask": torch.ones_like(opening)}
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        values = behind.get(key, torch.zeros_like(opening))
        inputs[key] = torch.cat([inputs[key], values.expand(rows, -1)], dim=1)
    return inputs


def identifier_ids(tokenizer: Any, n: int) -> list[int]:
    """The token that stands for each page id at the beginning of the list.

    Fewer than `n` where ids share their first token, as 1 and 10 do where digits are tokens: those before.
    """
    opening = tokenizer(LIST_OPEN, add_special_tokens=False)["input_ids"]
    answers = tokenizer([f"{LIST_OPEN}{i}" for i in range(1, n + 1)], add_special_tokens=False)["input_ids"]
    first: list[int] = []
    for ids in answers:
        if ids[: len(opening)] != opening or ids[len(opening)] in first:
            break
        first.append(ids[len(opening)])
    return first
