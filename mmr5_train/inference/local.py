"""The backend that runs the model in this process. `mmr5_train.inference.remote` calls a server instead.

Both backends have the same interface. `limits` gives the sizes to which page images are prepared. `generate` takes
a batch of queries with their prepared images and returns one or several `ModelAnswer` for each query.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from mmr5_train.common.cancelling import raise_if_cancelled
from mmr5_train.common.files import InputError
from mmr5_train.common.part_times import PartTimes
from mmr5_train.inference.constrained import PermutationLogitsProcessor
from mmr5_train.inference.stopping import End, StopRule
from mmr5_train.inference.vocabulary import Vocabulary
from mmr5_train.models import shared_decoding, shared_prefix
from mmr5_train.models.config import MAX_SCORED_PAGES, CheckpointOptions, LogitsOrder, answer_tokens
from mmr5_train.models.loading import is_adapter, load_merged, load_model, load_processor
from mmr5_train.models.page_features import EncodedPrompts, PageCache, encode_prompts, synchronize
from mmr5_train.models.page_places import place_by_place
from mmr5_train.models.page_scores import attention_restored, first_page_log_probs, id_branches
from mmr5_train.models.pages import PageLimits, page_limits, prepare_page
from mmr5_train.models.placement import input_device, place_model
from mmr5_train.models.sampling import generation_config, token_settings, without_own_settings
from mmr5_train.models.settings import resolve_mode, resolve_settings
from mmr5_train.models.shared_prefix import takes_image_features
from mmr5_train.models.vision_speed import align_mlps
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import LocalId, Mode, ModelAnswer


class LocalBackend:
    """Generates answers with a loaded model. `model` may be replaced between calls, as during training.

    With `constrain`, every completion has a list of all pages, and ends where that list is complete. Without it,
    completions may be malformed; an evaluation counts how many are. `max_new_tokens` limits a completion, by
    default to `answer_tokens` of its pages. `page_cache` keeps vision features between calls. `logits_max_pixels`
    is the size of pages in mode logits, by default that of the other modes. With `logits_order` place_by_place
    (`mmr5_train.models.page_places`), mode logits gives no scores.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt: Prompt,
        *,
        mode: Mode = "reason",
        max_new_tokens: int | None = None,
        constrain: bool = False,
        page_cache: PageCache | None = None,
        logits_max_pixels: int | None = None,
        logits_order: LogitsOrder = "first_place",
    ) -> None:
        self.model, self.processor, self.prompt = model, processor, prompt
        self.mode, self.max_new_tokens, self.constrain = mode, max_new_tokens, constrain
        self.page_cache, self.logits_max_pixels, self.logits_order = page_cache, logits_max_pixels, logits_order
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

    def generate(
        self,
        queries: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
        mode: Mode | None = None,
        times: PartTimes | None = None,
        cancel: Event | None = None,
    ) -> list[list[ModelAnswer]]:
        """The answers to one batch: for each query one greedy answer, or `samples` sampled answers.

        `images[b]` are the prepared page images of `queries[b]`. `mode` replaces the backend's. The seconds of
        each part are added to `times`. Raises `RankingCancelled` within a decoding step after `cancel` is set, and
        `InputError` in mode logits for samples and for more than `MAX_SCORED_PAGES` pages.
        """
        mode, times = mode or self.mode, times or PartTimes()
        if mode == "logits":
            if samples:
                raise InputError("mode logits: generates no text to sample; set samples=0")
            largest = max(map(len, images))
            if largest > MAX_SCORED_PAGES:
                raise InputError(
                    f"mode logits: scores at most {MAX_SCORED_PAGES} pages in one pass, found {largest}"
                )
            return [[answer] for answer in self._score_pages(queries, images, times, cancel)]
        device = input_device(self.model)
        # Training calls this method between its steps, so the global random state must not change.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self._generate_text(
                queries, images, samples, temperature, mode == "reason", times=times, cancel=cancel
            )

    @torch.inference_mode()
    def _generate_text(
        self,
        queries: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        samples: int,
        temperature: float,
        think: bool,
        *,
        times: PartTimes,
        cancel: Event | None,
    ) -> list[list[ModelAnswer]]:
        prompts = self._encode(queries, images, times)
        group_size = max(samples, 1)
        counts = [n for n in prompts.page_counts for _ in range(group_size)]
        limits = [self.max_new_tokens or answer_tokens(n, think=think) for n in counts]
        constraint = self._constraint(counts, limits, think, prompts.longest)
        stop = StopRule(limits, prompts.longest, constraint, cancel, times, input_device(self.model))
        stop.raise_if_cancelled()
        config = generation_config(self.tokens, temperature if samples else None, max(limits))
        processors = LogitsProcessorList([] if constraint is None else [constraint])
        with without_own_settings(self.model):
            completions = self._complete(prompts, samples, config, processors, StoppingCriteriaList([stop]))
        stop.finish()
        stop.raise_if_cancelled()
        token_counts = self._prompt_token_counts(prompts)
        answers = []
        for row, ids in enumerate(completions.tolist()):
            end = stop.end_of(row, ids, self.tokens["eos_token_id"])
            closed_early = constraint is not None and constraint.cut_off[row]
            answers.append(self._read(ids, counts[row], end, think, closed_early, token_counts[row // group_size]))
        return [answers[i : i + group_size] for i in range(0, len(answers), group_size)]

    def _read(
        self, ids: list[int], n: int, end: End, think: bool, closed_early: bool, counts: dict[str, int]
    ) -> ModelAnswer:
        """Parses a completion. `closed_early` says whether the constraint closed its think block."""
        text = self.processor.tokenizer.decode(ids[: end.text_tokens], skip_special_tokens=True) + end.missing
        cut_off = end.cut_off or closed_early
        return to_model_answer(
            text, n, counts=counts | {"tokens": end.tokens}, cut_off=cut_off, expect_think=think
        )

    def _encode(
        self, queries: Sequence[str], images: Sequence[Sequence[Image.Image]], times: PartTimes
    ) -> EncodedPrompts:
        return encode_prompts(
            self.model, self.processor, self.prompt, queries, images, cache=self.page_cache, times=times
        )

    def _constraint(
        self, page_counts: list[int], limits: list[int], think: bool, prompt_length: int
    ) -> PermutationLogitsProcessor | None:
        if not self.constrain:
            return None
        return PermutationLogitsProcessor(
            self.vocabulary, page_counts, think=think, prompt_length=prompt_length, max_new_tokens=limits
        )

    def _complete(
        self,
        prompts: EncodedPrompts,
        samples: int,
        config: Any,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
    ) -> Tensor:
        """The completions, (prompts × samples, new tokens). Samples share one prefill, with the same tokens."""
        if samples > 1 and shared_prefix.unsupported_reason(self.model) is None:
            shared = prompts.shared(self.model)
            with attention_restored(self.model):  # greedy answers must not depend on earlier samples
                shared_prefix.share_prefixes(self.model)
                return shared_decoding.generate(self.model, shared, samples, config, processors, criteria)
        inputs = prompts.repeated(max(samples, 1)).padded(self.tokens["pad_token_id"])
        sequences = self.model.generate(
            **inputs, generation_config=config, logits_processor=processors, stopping_criteria=criteria
        )
        return sequences[:, prompts.longest :]

    def _prompt_token_counts(self, prompts: EncodedPrompts) -> list[dict[str, int]]:
        """For each prompt of a batch, its tokens and how many of them are visual, as fields of `ModelAnswer`."""
        return [
            {"prompt_tokens": len(ids), "visual_tokens": sum(page.tokens for page in pages)}
            for ids, pages in zip(prompts.ids, prompts.pages, strict=True)
        ]

    @torch.inference_mode()
    def _score_pages(
        self,
        queries: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        times: PartTimes,
        cancel: Event | None,
    ) -> list[ModelAnswer]:
        """Scores all pages in one forward pass, without generating text (`mmr5_train.models.page_scores`)."""
        if self.logits_max_pixels is not None:
            limits = self.limits._replace(max_pixels=self.logits_max_pixels)
            images = [[prepare_page(image, limits) for image in page_images] for page_images in images]
        prompts = self._encode(queries, images, times)
        raise_if_cancelled(cancel)
        device = input_device(self.model)
        tokenizer, token_counts = self.processor.tokenizer, self._prompt_token_counts(prompts)
        answers = []
        if self.logits_order == "place_by_place":
            for prompt, counts in zip(prompts.split(), token_counts, strict=True):
                raise_if_cancelled(cancel)
                with times.part("decode", lambda: synchronize(device)):
                    ids = place_by_place(self.model, tokenizer, prompt)
                answers.append(ModelAnswer(completion="", order=tuple(map(LocalId, ids)), **counts))
            return answers
        with times.part("prefill", lambda: synchronize(device)):
            branches = [id_branches(tokenizer, n) for n in prompts.page_counts]
            log_probs = first_page_log_probs(self.model, prompts, branches)
        for values, counts in zip(log_probs, token_counts, strict=True):
            scores = values.softmax(-1).tolist()
            best_first = sorted(range(len(scores)), key=lambda i, scores=scores: -scores[i])  # type: ignore[misc]
            order = tuple(LocalId(i + 1) for i in best_first)
            answers.append(
                ModelAnswer(completion="", order=order, scores=tuple(scores[i] for i in best_first), **counts)
            )
        return answers


def load_backend(
    checkpoint: str | Path,
    options: CheckpointOptions | None = None,
    *,
    base: str | None = None,
    mode: Mode | None = None,
    device: str | None = None,
    max_new_tokens: int | None = None,
    constrain: bool = False,
    page_cache: PageCache | None = None,
    logits_max_pixels: int | None = None,
    logits_order: LogitsOrder = "first_place",
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
    if not takes_image_features(loaded):
        raise InputError(
            f"{checkpoint}: model type {loaded.config.model_type} takes no image features (mm_encoder_outputs) in "
            "the installed transformers, which ranking in this process needs; serve it with vLLM, and use server"
        )
    model = place_model(loaded, settings.model, device).eval()
    if input_device(model).type == "cuda" and len(set(getattr(model, "hf_device_map", {}).values())) <= 1:
        align_mlps(model)
    return LocalBackend(
        model,
        load_processor(settings.model),
        settings.prompt,
        mode=mode,
        max_new_tokens=max_new_tokens,
        constrain=constrain,
        page_cache=page_cache,
        logits_max_pixels=logits_max_pixels,
        logits_order=logits_order,
    )
