"""The backend that runs the model with vLLM's offline engine (`backend: vllm`), for large evaluations on GPUs.

It has the interface of `mmr5_train.inference.local`: `limits` and `generate`. Prompts, page images, sampling
settings and the reading of answers are the same. vLLM forms its own batches, and spreads a large model over the
GPUs of a machine, or of several machines, by its own arguments (`RankingOptions.vllm`), such as
`tensor_parallel_size`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from PIL import Image

from mmr5_train.common.cancelling import raise_if_cancelled
from mmr5_train.common.files import InputError
from mmr5_train.common.part_times import PartTimes
from mmr5_train.models.config import CheckpointOptions, ModelConfig, answer_tokens
from mmr5_train.models.inputs import prompt_token_ids, repeat_placeholders
from mmr5_train.models.lengths import context_limit
from mmr5_train.models.loading import load_processor, resolve_checkpoint
from mmr5_train.models.pages import PageLimits, one_line, page_limits
from mmr5_train.models.sampling import token_settings, vllm_exclusions
from mmr5_train.models.settings import Settings, resolve_mode, resolve_settings
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.answer_constraints import gbnf_grammar
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Mode, ModelAnswer

TEXT_TOKENS = 4096
"""Bound on the tokens of a prompt besides its pages, for the engine's context if the pages are bounded."""
SHOWN = 20  # tokens around the first difference, in an error
NOT_INSTALLED = (
    "backend vllm: vLLM is not installed in this environment; install it in an environment of its own "
    "(docs/training.md, vLLM), or use backend: transformers"
)


class VllmBackend:
    """Generates answers with a `vllm.LLM`. `constrain` gives vLLM the grammar of a list of all pages."""

    def __init__(
        self,
        engine: Any,
        processor: Any,
        prompt: Prompt,
        *,
        mode: Mode = "reason",
        max_new_tokens: int | None = None,
        constrain: bool = False,
    ) -> None:
        if mode == "logits":
            raise InputError("mode logits: needs backend: transformers; with vLLM, use reason or direct")
        self.engine, self.processor, self.prompt = engine, processor, prompt
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

    def generate(
        self,
        queries: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
        times: PartTimes | None = None,
        cancel: Event | None = None,
    ) -> list[list[ModelAnswer]]:
        """The answers to one batch, as in `LocalBackend.generate`. Each query has its own seed.

        All seconds are of `decode`. vLLM can't stop a batch, so `cancel` has an effect before it only.
        Raises `InputError` if a prompt and its answer do not fit the engine's context, and if the engine read
        other tokens than the model was trained on.
        """
        ids = prompt_token_ids(self.processor, self.prompt, queries, [len(pages) for pages in images])
        expected = [self._expand(*row) for row in zip(ids, images, strict=True)]
        self._check_lengths(expected, [len(pages) for pages in images])
        prompts = [
            {"prompt_token_ids": row, "multi_modal_data": {"image": list(pages)}}
            for row, pages in zip(ids, images, strict=True)
        ]
        settings = [
            self._sampling(len(pages), samples, temperature, seed + number) for number, pages in enumerate(images)
        ]
        raise_if_cancelled(cancel)
        with (times or PartTimes()).part("decode"):
            outputs = self.engine.generate(prompts, settings, use_tqdm=False)
        answers = []
        for output, read, pages in zip(outputs, expected, images, strict=True):
            check_prompt(read, output.prompt_token_ids)
            visual = read.count(self.processor.image_token_id)
            counts = {"prompt_tokens": len(read), "visual_tokens": visual}
            answers.append([self._read(completion, len(pages), counts) for completion in output.outputs])
        return answers

    def _expand(self, ids: Sequence[int], images: Sequence[Image.Image]) -> list[int]:
        """The prompt as the model reads it: the placeholder of each page, once for each of its features."""
        counts = [image.width * image.height // self.limits.factor**2 for image in images]
        return repeat_placeholders(ids, self.processor.image_token_id, counts)

    def _limit(self, n_pages: int) -> int:
        """The limit on the tokens of an answer."""
        return self.max_new_tokens or answer_tokens(n_pages, think=self.think)

    def _check_lengths(self, prompts: Sequence[Sequence[int]], page_counts: Sequence[int]) -> None:
        limit = self.engine.llm_engine.model_config.max_model_len
        longest, answer = max(map(len, prompts)), max(map(self._limit, page_counts))
        if longest + answer > limit:
            raise InputError(
                f"backend vllm: a prompt of {longest:,} tokens and max_new_tokens {answer:,} exceed "
                f"the engine's context of {limit:,}; raise vllm.max_model_len, or lower model.max_pixels, window "
                "or max_new_tokens"
            )

    def _sampling(self, n_pages: int, samples: int, temperature: float, seed: int) -> Any:
        """vLLM's `SamplingParams`: the settings of `mmr5_train.models.sampling`."""
        from vllm import SamplingParams

        structured: dict[str, Any] = {}
        if self.constrain:
            from vllm.sampling_params import StructuredOutputsParams

            grammar = gbnf_grammar(n_pages, think=self.think)
            structured = {"structured_outputs": StructuredOutputsParams(grammar=grammar)}
        return SamplingParams(
            n=max(samples, 1),
            temperature=temperature if samples else 0.0,
            seed=seed if samples else None,
            top_p=1.0,
            top_k=-1,
            min_p=0.0,
            repetition_penalty=1.0,
            max_tokens=self._limit(n_pages),
            stop_token_ids=self.tokens["eos_token_id"],
            **vllm_exclusions(self.tokens),
            detokenize=False,
            **structured,
        )

    def _read(self, completion: Any, n_pages: int, counts: Mapping[str, int]) -> ModelAnswer:
        ids = list(completion.token_ids)
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return to_model_answer(
            text,
            n_pages,
            counts={**counts, "tokens": len(ids)},
            cut_off=completion.finish_reason == "length",
            expect_think=self.think,
        )


def check_prompt(expected: Sequence[int], found: Sequence[int]) -> None:
    """Raises `InputError`, which shows both, if vLLM read another prompt than expected."""
    if list(expected) == list(found):
        return
    pairs = zip(expected, found, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    start = max(first - SHOWN // 2, 0)
    raise InputError(
        f"vLLM reads another prompt than the model in this process: {len(found):,} tokens instead of "
        f"{len(expected):,}, different from token {first} on. "
        f"Expected: {list(expected[start : start + SHOWN])}. vLLM: {list(found[start : start + SHOWN])}. "
        "Its answers would not be those of the model; use the versions in constraints-vllm.txt, and check that a "
        "server serves the same checkpoint"
    )


def load_vllm_backend(
    checkpoint: str | Path,
    options: CheckpointOptions,
    *,
    base: str | None = None,
    mode: Mode | None = None,
    window: int | None,
    max_new_tokens: int | None = None,
    constrain: bool = False,
    arguments: Mapping[str, Any],
) -> VllmBackend:
    """Starts an engine for a checkpoint. `arguments` are those of `vllm.LLM`, which replace the ones given here.

    Raises `InputError` for an adapter, for several processes, and if the engine does not start.
    """
    if base is not None:
        raise InputError(
            "backend vllm: needs a merged checkpoint, found an adapter with base; use its model/ folder"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "backend vllm: runs in one process, found a launch of several; start it without accelerate, and give "
            "vllm={tensor_parallel_size:…} or {data_parallel_size:…} for several GPUs"
        )
    settings = resolve_settings(checkpoint, options)
    mode = resolve_mode(mode, settings, checkpoint, override=options.override_checkpoint)
    processor = load_processor(settings.model)
    engine = start_engine(settings, processor, window, max_new_tokens, arguments)
    return VllmBackend(
        engine, processor, settings.prompt, mode=mode, max_new_tokens=max_new_tokens, constrain=constrain
    )


def engine_settings(model: ModelConfig, processor: Any) -> dict[str, Any]:
    """The arguments of `vllm.LLM` with which it computes as transformers does: dtype, sampling and page sizes."""
    return {
        "dtype": model.dtype,
        "generation_config": "vllm",  # not the checkpoint's own sampling settings
        "mm_processor_kwargs": {"size": dict(processor.image_processor.size)},
    }


def start_engine(
    settings: Settings,
    processor: Any,
    window: int | None,
    max_new_tokens: int | None,
    arguments: Mapping[str, Any],
) -> Any:
    """A `vllm.LLM`, whose context is that of the largest window, or the model's."""
    try:
        from vllm import LLM
    except ImportError:
        raise InputError(NOT_INSTALLED) from None
    model, limits = settings.model, page_limits(processor)
    lengths = [] if (context := context_limit(model.path)) is None else [context.tokens]
    if window is not None:
        answer = max_new_tokens or answer_tokens(window, think=True)
        lengths.append(window * (limits.max_pixels // limits.factor**2) + TEXT_TOKENS + answer)
    own: dict[str, Any] = {
        **engine_settings(model, processor),
        "model": resolve_checkpoint(model.path),
        "max_model_len": min(lengths, default=None),
        "limit_mm_per_prompt": {"video": 0} if window is None else {"image": window, "video": 0},
    }
    try:
        return LLM(**{**own, **arguments})
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"backend vllm: the engine for {model.path} does not start ({one_line(error)}); vllm={{…}} takes the "
            "arguments of vllm.LLM"
        ) from None
