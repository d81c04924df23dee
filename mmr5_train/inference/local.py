"""The backend that runs the model in this process. `mmr5_train.inference.remote` calls a server instead.

Both backends have the same interface. `limits` gives the sizes to which page images are prepared. `generate` takes
a batch of queries with their prepared images and returns one or several `ModelAnswer` for each query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList

from mmr5_train.common.files import InputError
from mmr5_train.inference.constrained import PermutationLogitsProcessor
from mmr5_train.inference.vocabulary import Vocabulary
from mmr5_train.models import shared_prefix
from mmr5_train.models.config import CheckpointOptions
from mmr5_train.models.inputs import append_list_open, encode, page_id_tokens
from mmr5_train.models.loading import is_adapter, load_merged, load_model, load_processor
from mmr5_train.models.pages import PageLimits, page_limits
from mmr5_train.models.placement import input_device, place_model
from mmr5_train.models.sampling import generation_config, token_settings, without_own_settings
from mmr5_train.models.settings import resolve_mode, resolve_settings
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import LocalId, Mode, ModelAnswer

MAX_SCORED_PAGES = 100
"""Limit on the pages of a prompt in mode logits. The tokenizer can lower it: see `max_scored_pages`."""


class LocalBackend:
    """Generates answers with a loaded model. `model` may be replaced between calls, as during training.

    With `constrain`, every completion ends in a list of all pages. Without it, completions may be malformed; an
    evaluation counts how many are.
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
        self.tokens = token_settings(processor)  # computed once: it reads the whole vocabulary

    @property
    def limits(self) -> PageLimits:
        """The sizes to which page images are prepared."""
        return page_limits(self.processor)

    @property
    def think(self) -> bool:
        """Whether completions have a think block."""
        return self.mode == "reason"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.processor.tokenizer)

    @cached_property
    def page_id_tokens(self) -> list[int]:
        """The first tokens of the page ids 1, 2, … that mode logits can distinguish."""
        return page_id_tokens(self.processor.tokenizer, MAX_SCORED_PAGES)

    @property
    def max_scored_pages(self) -> int:
        """The largest number of pages in a prompt of mode logits."""
        return len(self.page_id_tokens)

    def generate(
        self,
        queries: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[ModelAnswer]]:
        """The answers to one batch: for each query one greedy answer, or `samples` sampled answers.

        `images[b]` are the prepared page images of `queries[b]`. Raises `InputError` in mode logits for samples,
        and for more pages than `max_scored_pages`.
        """
        if self.mode == "logits":
            if samples:
                raise InputError("mode logits: generates no text to sample; set samples=0")
            return [[answer] for answer in self._score_page_ids(queries, images)]
        device = input_device(self.model)
        # Training calls this method between its steps, so the global random state must not change.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self._generate_text(queries, images, samples, temperature)

    @torch.inference_mode()
    def _generate_text(
        self, queries: Sequence[str], images: Sequence[Sequence[Image.Image]], samples: int, temperature: float
    ) -> list[list[ModelAnswer]]:
        inputs = encode(self.processor, self.prompt, queries, images).to(input_device(self.model))
        config = generation_config(self.tokens, temperature if samples else None, self.max_new_tokens)
        page_counts = [len(page_images) for page_images in images]
        group_size, prompt_length = max(samples, 1), inputs["input_ids"].shape[1]
        constraint = self._constraint([n for n in page_counts for _ in range(group_size)], prompt_length)
        processors = LogitsProcessorList([] if constraint is None else [constraint])
        with without_own_settings(self.model):
            if samples > 1 and shared_prefix.unsupported_reason(self.model) is None:
                completions = self._generate_shared(inputs, page_counts, samples, config, processors)
            else:
                config.update(num_return_sequences=group_size)
                sequences = self.model.generate(**inputs, generation_config=config, logits_processor=processors)
                completions = sequences[:, prompt_length:]
        token_counts = self._prompt_token_counts(inputs)
        answers = []
        for row, ids in enumerate(completions.tolist()):
            closed_early = constraint is not None and constraint.cut_off[row]
            prompt_index = row // group_size
            answers.append(self._read(ids, page_counts[prompt_index], closed_early, token_counts[prompt_index]))
        return [answers[i : i + group_size] for i in range(0, len(answers), group_size)]

    def _constraint(self, page_counts: list[int], prompt_length: int) -> PermutationLogitsProcessor | None:
        if not self.constrain:
            return None
        return PermutationLogitsProcessor(
            self.vocabulary,
            page_counts,
            think=self.think,
            prompt_length=prompt_length,
            max_new_tokens=self.max_new_tokens,
        )

    def _generate_shared(
        self, inputs: Any, image_counts: list[int], samples: int, config: Any, processors: LogitsProcessorList
    ) -> Tensor:
        """Samples several completions of each prompt with one prefill per prompt. The tokens do not change."""
        is_token = inputs["attention_mask"].bool()
        ids, types = (
            [row[mask] for row, mask in zip(inputs[key], is_token, strict=True)]
            for key in ("input_ids", "mm_token_type_ids")
        )
        pixels = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
        prompts = shared_prefix.shared_prompts(self.model, ids, types, pixels, image_counts)
        with attention_restored(self.model):  # greedy answers must not depend on earlier samples
            shared_prefix.share_prefixes(self.model)
            return shared_prefix.generate(self.model, prompts, samples, config, processors)

    def _prompt_token_counts(self, inputs: Any) -> list[dict[str, int]]:
        """For each prompt of a batch, its tokens and how many of them are visual, as fields of `ModelAnswer`."""
        tokens = inputs["attention_mask"].sum(1).tolist()
        visual = (inputs["input_ids"] == self.processor.image_token_id).sum(1).tolist()
        return [{"prompt_tokens": t, "visual_tokens": v} for t, v in zip(tokens, visual, strict=True)]

    def _read(self, ids: list[int], n_pages: int, closed_early: bool, token_counts: dict[str, int]) -> ModelAnswer:
        """Parses one completion. `closed_early` says whether the constraint closed its think block."""
        end = next((i for i, token in enumerate(ids) if token in self.tokens["eos_token_id"]), None)
        text = self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        counts = token_counts | {"tokens": len(ids) if end is None else end + 1}
        cut_off = end is None or closed_early
        return to_model_answer(text, n_pages, counts=counts, cut_off=cut_off, expect_think=self.think)

    @torch.inference_mode()
    def _score_page_ids(
        self, queries: Sequence[str], images: Sequence[Sequence[Image.Image]]
    ) -> list[ModelAnswer]:
        """Scores pages in one forward pass, without generating text (arXiv 2605.11864).

        A page's score is the probability that the answer's list begins with its id, among the ids of all pages.
        """
        inputs = encode(self.processor, self.prompt, queries, images)
        inputs = append_list_open(inputs, self.processor.tokenizer).to(input_device(self.model))
        logits_BN = self._logits(inputs, self.page_id_tokens)
        answers = []
        for logits_N, page_images, counts in zip(
            logits_BN, images, self._prompt_token_counts(inputs), strict=True
        ):
            n_pages = len(page_images)
            if n_pages > self.max_scored_pages:
                raise InputError(
                    f"mode logits: with this tokenizer, only the page ids up to {self.max_scored_pages} start "
                    f"with distinct tokens, found {n_pages} pages; rank them in windows"
                )
            scores = logits_N[:n_pages].softmax(-1).tolist()
            best_first = sorted(range(n_pages), key=lambda i, scores=scores: -scores[i])  # type: ignore[misc]
            order = tuple(LocalId(i + 1) for i in best_first)
            answers.append(
                ModelAnswer(completion="", order=order, scores=tuple(scores[i] for i in best_first), **counts)
            )
        return answers

    def _logits(self, inputs: Any, tokens: list[int]) -> Tensor:
        """(B, len(tokens)) the logits of `tokens` after each prompt, in float32.

        The model's own head rounds logits to the model's dtype. In bfloat16, logits near 20 have steps of 0.125,
        so pages would tie.
        """
        head = self.model.get_output_embeddings().weight
        if head.is_meta:  # the weights of a spread model that are in CPU memory
            return self.model(**inputs, logits_to_keep=1).logits[:, -1, tokens].float()
        hidden_BH = self.model.base_model(**inputs).last_hidden_state[:, -1]
        return hidden_BH.to(head.device, torch.float32) @ head[tokens].float().T


@contextmanager
def attention_restored(model: Any) -> Iterator[None]:
    """After the block, the model's text part has the attention that it had before."""
    earlier = model.config.get_text_config()._attn_implementation
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": earlier})


def load_backend(
    checkpoint: str | Path,
    options: CheckpointOptions | None = None,
    *,
    base: str | None = None,
    mode: Mode | None = None,
    device: str | None = None,
    max_new_tokens: int,
    constrain: bool = False,
) -> LocalBackend:
    """Loads a checkpoint, or an adapter merged into its base, as a backend.

    The settings are the checkpoint's own where `options` and `mode` leave them open (`resolve_settings`, which
    raises `InputError`).
    """
    options = options or CheckpointOptions()
    settings = resolve_settings(checkpoint, options, base=base)
    mode = resolve_mode(mode, settings, checkpoint, override=options.override_checkpoint)
    is_merged = base is None and not is_adapter(checkpoint)
    loaded = load_model(settings.model) if is_merged else load_merged(settings.model, checkpoint)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LocalBackend(
        place_model(loaded, settings.model, device).eval(),
        load_processor(settings.model),
        settings.prompt,
        mode=mode,
        max_new_tokens=max_new_tokens,
        constrain=constrain,
    )
