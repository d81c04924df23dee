"""The reranker: ranks page images for a query with a checkpoint in this process, or with a model on a server.

    from mmr5_train import Reranker

    reranker = Reranker("outputs/demo/grpo/model")            # or a hub id, or an adapter
    for result in reranker.rank("Which page …?", ["a.png", "b.pdf#page=3"], top_k=3):
        print(result.rank, result.document, result.note)

Decoding is greedy by default, so the same pages always give the same order. Answers are constrained to a complete
list of the pages. `mmr5_train.ranking.answer` completes the order of a malformed answer by a fixed rule, and the
result reports the defect.

This file uses these names for the pages:

    pages      what the user passes: paths, bytes, PIL images, PDFs (`PageInput`)
    images     the prepared page images that the model sees, one per page; a PDF becomes several
    indices    positions in `images`, from 0; a window is a list of indices
    local ids  positions in one prompt, from 1; they appear only in a `ModelAnswer`
    documents  the pages as results return them (`Result.document`)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from PIL import Image
from pydantic import Field, ValidationError, model_validator

from mmr5_train.common.files import InputError, validation_message
from mmr5_train.inference.local import MAX_SCORED_PAGES, LocalBackend, load_backend
from mmr5_train.inference.remote import RemoteBackend, ServerConfig
from mmr5_train.inference.tasks import batch_seed
from mmr5_train.inference.vllm_engine import VllmBackend, load_vllm_backend
from mmr5_train.models.config import MAX_NEW_TOKENS, BackendOptions, CheckpointOptions, ModelOptions
from mmr5_train.models.pages import PageInput, open_pages
from mmr5_train.models.settings import resolve_mode, resolve_settings
from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.notes import split_notes
from mmr5_train.ranking.prompt import Prompt, read_prompt
from mmr5_train.ranking.records import LocalId, Mode, ModelAnswer
from mmr5_train.ranking.results import RankedResults, build_results
from mmr5_train.ranking.windows import Strategy, fuse_orders, make_plan


class RankingOptions(BackendOptions):
    """How a reranker ranks; each field is a keyword argument of `Reranker`."""

    mode: Mode | None = Field(
        default=None,
        description="reason: think block and answer; direct: only the answer; logits: one forward pass, no text; "
        "null: as the checkpoint was trained (reason, or direct without think blocks)",
    )
    constrain: bool = Field(default=True, description="constrain answers to a list of all pages")
    max_new_tokens: int = Field(default=MAX_NEW_TOKENS, gt=0)
    window: int | None = Field(
        default=20, ge=2, description="largest number of pages in one prompt; null: no limit"
    )
    stride: int | None = Field(default=None, ge=1, description="of sliding windows; null: half a window")
    strategy: Strategy = Field(default="sliding", description="for more pages than a window: or tournament")
    samples: int = Field(default=0, ge=0, description="sampled orders that are fused; 0: one greedy order")
    temperature: float = Field(default=1.0, gt=0, description="of the samples")
    seed: int = Field(default=0, ge=0, description="of the samples")
    batch_size: int = Field(default=8, gt=0, description="prompts per batch")

    @model_validator(mode="after")
    def _options_are_compatible(self) -> Self:
        if self.stride is not None and (self.window is None or self.stride >= self.window):
            raise ValueError(f"stride must be less than window ({self.window})")
        if self.mode == "logits" and self.samples:
            raise ValueError("mode logits generates no text to sample: samples must be 0")
        if self.mode == "logits" and self.backend == "vllm":
            raise ValueError("mode logits needs backend: transformers")
        return self


class WindowAnswer(NamedTuple):
    """One answer to one window."""

    indices: list[int]
    """The images in the prompt: local id i is `indices[i - 1]`."""
    answer: ModelAnswer


@dataclass(frozen=True)
class RankedImages:
    """The order of one query's images, and the answers that it was computed from."""

    order: list[int]
    """Indices of all images, best first."""
    windows: list[WindowAnswer]
    scores: tuple[float, ...] | None = None
    """By rank, in mode logits with a single window. Scores of different windows can't be compared."""

    def merged_answer(self) -> ModelAnswer:
        """All windows as one answer, whose local ids are the indices plus 1. Token counts are sums, or unknown."""
        answers = [window.answer for window in self.windows]
        return ModelAnswer(
            completion="\n".join(answer.completion for answer in answers),
            order=tuple(LocalId(i + 1) for i in self.order),
            defects=tuple(dict.fromkeys(defect for answer in answers for defect in answer.defects)),
            tokens=_known_sum(answer.tokens for answer in answers),
            prompt_tokens=_known_sum(answer.prompt_tokens for answer in answers),
            visual_tokens=sum(answer.visual_tokens for answer in answers),
            scores=self.scores or (),
        )


class Reranker:
    """Ranks page images for a query with a model in this process, or on an OpenAI-compatible server."""

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        base: str | None = None,
        prompt: Prompt | str | Path | None = None,
        model: ModelOptions | None = None,
        override_checkpoint: bool = False,
        server: ServerConfig | dict[str, Any] | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """Loads the model, or connects to the server.

        Args:
            checkpoint: a folder, a hub id, or an adapter. A checkpoint of this project contains its prompt and
                page sizes. With `server`, only these are read from it, and it is optional.
            base: the base checkpoint of an adapter; by default the one in its adapter_config.json.
            prompt: an option of configs/prompt, a YAML file, or a `Prompt`. Required for a checkpoint that this
                project did not write.
            model: page sizes, dtype and attention; by default the checkpoint's own.
            override_checkpoint: use `prompt`, `model` and mode "reason" where the checkpoint says otherwise.
                Without it, a contradiction is an error.
            server: the server that runs the model. No weights are loaded then.
            device: "cuda", "cpu", …; by default a GPU if one is available.
            **options: the fields of `RankingOptions`.

        Raises `InputError` for a checkpoint, prompt or option that can't be used.
        """
        self.options = _validated(RankingOptions, options)
        backend_options = self.options.model_dump(include={"mode", "max_new_tokens", "constrain"})
        settings = CheckpointOptions(
            model=model or ModelOptions(),
            prompt=prompt if prompt is None or isinstance(prompt, Prompt) else read_prompt(prompt),
            override_checkpoint=override_checkpoint,
        )
        self.backend: LocalBackend | RemoteBackend | VllmBackend
        if server is not None:
            config = server if isinstance(server, ServerConfig) else _validated(ServerConfig, server)
            self.backend = _remote_backend(config, checkpoint, settings, backend_options)
        elif checkpoint is None:
            raise InputError("checkpoint: give a folder, a hub id, or a server")
        elif self.options.backend == "vllm":
            self.backend = load_vllm_backend(
                checkpoint,
                settings,
                base=base,
                window=self.options.window,
                arguments=self.options.vllm,
                **backend_options,
            )
        else:
            self.backend = load_backend(checkpoint, settings, base=base, device=device, **backend_options)

    @property
    def mode(self) -> Mode:
        return self.backend.mode

    def rank(self, query: str, pages: Sequence[PageInput], top_k: int | None = None) -> RankedResults:
        """Ranks `pages`: all results, or the first `top_k`, with scores, reasoning and any defects.

        A page is a path or file:// URL of an image, the bytes of an image, or a PIL image. The path of a PDF
        stands for all of its pages, "report.pdf#page=3" for the third. `Result.doc_id` counts pages from 0, each
        page of a PDF separately. Raises `InputError` for an empty list of pages, an empty query, or a page that
        can't be read.
        """
        return self.rank_many([query], [pages], top_k)[0]

    def rank_many(
        self, queries: Sequence[str], pages: Sequence[Sequence[PageInput]], top_k: int | None = None
    ) -> list[RankedResults]:
        """Ranks `pages[q]` for each `queries[q]`, as `rank` does. Prompts of all queries share batches."""
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k: expected at least 1, found {top_k}")
        if len(queries) != len(pages):
            raise InputError(f"pages: expected a list for each of {len(queries)} queries, found {len(pages)}")
        opened = open_pages(pages, self.backend.limits)
        images = [[page.image for page in opened_pages] for opened_pages in opened]
        documents = [[page.document for page in opened_pages] for opened_pages in opened]
        ranked = self.rank_images(queries, images)
        return [
            _results(*row, self.mode == "reason", top_k) for row in zip(queries, documents, ranked, strict=True)
        ]

    def rank_images(self, queries: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[RankedImages]:
        """Ranks the prepared `images[q]` for each `queries[q]`.

        Each query follows its own plan of windows (`mmr5_train.ranking.windows`). Windows of all queries that are
        ready at the same time share batches.
        """
        for query, page_images in zip(queries, images, strict=True):
            if not query.strip():
                raise InputError("query: is empty; expected a question")
            if not page_images:
                raise InputError("pages: expected at least one page to rank, found none")
        window_size = self._window_size()
        plans = [
            make_plan(len(page_images), self.options.strategy, window_size, self.options.stride)
            for page_images in images
        ]
        window_answers: list[list[WindowAnswer]] = [[] for _ in plans]
        orders: list[list[int]] = [[] for _ in plans]
        ready = {q: next(plan) for q, plan in enumerate(plans)}  # query → windows that its plan needs next
        while ready:
            prompts = [
                (queries[q], [images[q][i] for i in window]) for q, windows in ready.items() for window in windows
            ]
            generated = iter(self._generate(prompts))
            for q, windows in list(ready.items()):
                answers = [next(generated) for _ in windows]  # per window: one greedy answer, or the samples
                for window, samples in zip(windows, answers, strict=True):
                    window_answers[q] += [WindowAnswer(window, answer) for answer in samples]
                try:
                    ready[q] = plans[q].send([_fused_order(samples) for samples in answers])
                except StopIteration as finished:
                    orders[q] = finished.value
                    del ready[q]
        return [_ranked_images(*row) for row in zip(orders, window_answers, strict=True)]

    def _window_size(self) -> int | None:
        """The largest number of pages in one prompt. Mode logits needs page ids with distinct first tokens."""
        if self.backend.mode != "logits" or not isinstance(self.backend, LocalBackend):
            return self.options.window
        return min(self.options.window or MAX_SCORED_PAGES, self.backend.max_scored_pages)

    def _generate(self, prompts: Sequence[tuple[str, Sequence[Image.Image]]]) -> list[list[ModelAnswer]]:
        """The answers to each (query, images) prompt, generated in batches."""
        is_local = isinstance(self.backend, LocalBackend)
        size = self.options.batch_size if is_local else len(prompts)  # servers and vLLM form their own batches
        sampling = self.options.model_dump(include={"samples", "temperature"})
        answers = []
        for start in range(0, len(prompts), size):
            queries, images = zip(*prompts[start : start + size], strict=True)
            answers += self.backend.generate(
                queries, images, seed=batch_seed(self.options.seed, start), **sampling
            )
        return answers


class QueryReranker:
    """The interface of MM-R5's own inference class: `QueryReranker(model_path=…).rerank(query, image_list)`.

    `options` are the arguments of `Reranker`. The released checkpoint needs `prompt`.
    """

    def __init__(self, model_path: str | Path, **options: Any) -> None:
        self.reranker = Reranker(model_path, **options)

    def rerank(self, query: str, image_list: Sequence[PageInput]) -> list[int]:
        """Indices of all images, from 0, best first."""
        return self.reranker.rank(query, image_list).order


def _known_sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def _fused_order(answers: Sequence[ModelAnswer]) -> list[int]:
    """One order of a window's positions, from 0: that of a greedy answer, or the fused orders of samples."""
    return [i - 1 for i in fuse_orders([answer.order for answer in answers])]


def _ranked_images(order: list[int], windows: list[WindowAnswer]) -> RankedImages:
    scores = windows[0].answer.scores if len(windows) == 1 else ()
    return RankedImages(order, windows, scores or None)


def _results(
    query: str, documents: list[Any], ranked: RankedImages, expect_think: bool, top_k: int | None
) -> RankedResults:
    thoughts: list[str] = []
    notes: dict[int, str] = {}  # by index; if several windows have a note on a page, the last one counts
    for indices, answer in ranked.windows:
        thought = parse_answer(answer.completion, len(indices), expect_think=expect_think).think
        if thought:
            thoughts.append(thought)
            notes |= {indices[i - 1]: note for i, note in split_notes(thought).items() if 1 <= i <= len(indices)}
    return build_results(
        query,
        documents,
        ranked.order,
        scores=ranked.scores,
        notes=notes,
        reasoning="\n\n".join(thoughts),
        answers=[window.answer for window in ranked.windows],
        top_k=top_k,
    )


def _remote_backend(
    server: ServerConfig,
    checkpoint: str | Path | None,
    options: CheckpointOptions,
    backend_options: dict[str, Any],
) -> RemoteBackend:
    model, prompt, mode = options.model, options.prompt, backend_options["mode"]
    if checkpoint is not None:
        settings = resolve_settings(checkpoint, options)
        model, prompt = settings.model, settings.prompt
        mode = resolve_mode(mode, settings, checkpoint, override=options.override_checkpoint)
    if prompt is None or model.min_pixels is None or model.max_pixels is None:
        raise InputError(
            "server: the prompt and page sizes that its model was trained with are unknown; give the checkpoint "
            'as well (no weights are loaded), or prompt="default" and a model with min_pixels and max_pixels'
        )
    return RemoteBackend(
        server,
        prompt,
        **backend_options | {"mode": mode or "reason"},
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
    )


def _validated(kind: type[Any], values: dict[str, Any]) -> Any:
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(validation_message(error)) from None
