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
    documents  the pages with what results return for them (`Result.document`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any, Literal, NamedTuple

from PIL import Image
from pydantic import ValidationError

from mmr5_train.common.files import InputError, validation_message
from mmr5_train.common.part_times import PartTimes
from mmr5_train.inference.documents import PagesInput, documents_of_pages, to_documents
from mmr5_train.inference.local import LocalBackend, load_backend
from mmr5_train.inference.options import RankingOptions, window_size
from mmr5_train.inference.ranked import RankedImages, WindowAnswer, ranked_images_of, results_of
from mmr5_train.inference.remote import RemoteBackend, ServerConfig
from mmr5_train.inference.tasks import batch_seed
from mmr5_train.inference.vllm_engine import VllmBackend, load_vllm_backend
from mmr5_train.models.config import (
    SETTINGS,
    CheckpointOptions,
    ModelOptions,
)
from mmr5_train.models.loading import read_settings
from mmr5_train.models.page_features import PageCache
from mmr5_train.models.pages import PageInput, PageLimits, load_page, open_pages
from mmr5_train.models.settings import resolve_mode, resolve_settings
from mmr5_train.ranking.notes import read_verdict
from mmr5_train.ranking.prompt import Prompt, read_prompt
from mmr5_train.ranking.records import Mode, ModelAnswer
from mmr5_train.ranking.results import DocId, Document, RankedResults
from mmr5_train.ranking.windows import fuse_orders, make_plan


class _Call(NamedTuple):
    """What belongs to one call of the reranker."""

    times: PartTimes
    cancel: Event | None


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
        is_adaptive = self.options.mode == "adaptive"
        if is_adaptive:
            backend_options["mode"] = "reason"
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
            size = self.options.page_cache
            backend_options |= {
                "page_cache": PageCache(size) if size else None,
                **self.options.model_dump(include={"logits_order", "logits_max_pixels"}),
            }
            self.backend = load_backend(checkpoint, settings, base=base, device=device, **backend_options)
        self.mode: Mode | Literal["adaptive"] = "adaptive" if is_adaptive else self.backend.mode
        self.margin = self._margin(checkpoint) if is_adaptive else 0.0
        """In mode adaptive: the difference of the two best scores below which the model reasons."""

    def _margin(self, checkpoint: str | Path | None) -> float:
        if not isinstance(self.backend, LocalBackend):
            raise InputError("mode adaptive: needs the model in this process, not a server")
        if self.options.adaptive.margin is not None:
            return self.options.adaptive.margin
        recorded = read_settings(str(checkpoint))
        if recorded is None or recorded.adaptive is None or recorded.adaptive.margin is None:
            raise InputError(
                f"mode adaptive: {checkpoint} has no margin in its {SETTINGS}; choose one on held-out questions "
                "with python -m mmr5_train.calibrate, or give adaptive={margin: …}"
            )
        return recorded.adaptive.margin

    def rank(
        self,
        query: str,
        pages: PagesInput | None = None,
        top_k: int | None = None,
        *,
        docs: PagesInput | None = None,
        doc_ids: Sequence[DocId] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        cancel: Event | None = None,
    ) -> RankedResults:
        """Ranks `pages`: all results, or the first `top_k`, with scores, reasoning and any defects.

        `pages` is one page, a list or any other iterable. A page is a path or file:// URL of an image, its bytes,
        a file opened in binary mode, a PIL image, or a `Document`. A PDF, or a TIFF with several pages, stands for
        all of its pages, "report.pdf#page=3" for the third. `docs` is another name for `pages`. Results have the
        `doc_ids` and `metadata` of their pages, or else count pages from 0, each page of a PDF separately. If
        another thread sets `cancel`, the call ends within a decoding step with `RankingCancelled`. Raises
        `InputError` for an empty list of pages, an empty query, or a page that can't be read.
        """
        if (pages is None) == (docs is None):
            raise InputError("pages: give the pages to rank, as pages or as docs")
        documents = to_documents(docs if pages is None else pages, doc_ids, metadata)  # type: ignore[arg-type]
        return self.rank_many([query], [documents], top_k, cancel=cancel)[0]

    def score(self, query: str, page: PageInput | Document) -> float:
        """The model's verdict on one page by itself: 1 if its reasoning says that the page helps, else 0.

        A list-wise model compares pages, so only mode reason judges a page alone. Raises `InputError` in other
        modes, and if the reasoning states no verdict.
        """
        if self.mode != "reason":
            raise InputError(f"score: a single page has no score in mode {self.mode}; use mode reason, or rank")
        ranked = self.rank(query, [page])
        if len(ranked) > 1:
            raise InputError(f"score: expected one page, found {len(ranked)}")
        verdict = read_verdict(ranked[0].note)
        if verdict is None:
            raise InputError("score: the reasoning states no verdict on the page; use rank")
        return float(verdict)

    def rank_many(
        self,
        queries: Sequence[str],
        pages: Sequence[PagesInput],
        top_k: int | None = None,
        *,
        cancel: Event | None = None,
    ) -> list[RankedResults]:
        """Ranks `pages[q]` for each `queries[q]`, as `rank` does. Prompts of all queries share batches.

        A page that appears in several lists is opened once, and the vision tower reads it once.
        """
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise InputError(f"top_k: expected a number of pages from 1, found {top_k!r}")
        if len(queries) != len(pages):
            raise InputError(f"pages: expected a list for each of {len(queries)} queries, found {len(pages)}")
        times = PartTimes()
        for query in queries:
            if not isinstance(query, str):
                raise InputError(f"query: expected text, found {type(query).__name__}; rank_many takes several")
        rows = [to_documents(row) for row in pages]
        opened = open_pages([[document.page for document in row] for row in rows], self.backend.limits, times)
        images = [[page.image for page in opened_pages] for opened_pages in opened]
        documents = [documents_of_pages(*row) for row in zip(rows, opened, strict=True)]
        ranked = self.rank_images(queries, images, times=times, cancel=cancel)
        return [
            results_of(*row, timing=times.seconds, top_k=top_k)
            for row in zip(queries, documents, ranked, strict=True)
        ]

    @property
    def page_limits(self) -> PageLimits:
        """The sizes of a page that the model sees."""
        return self.backend.limits

    def open_page(self, path: Path) -> Image.Image:
        """The page image of a data set as the model sees it."""
        return load_page(path, self.backend.limits)

    def rank_images(
        self,
        queries: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        times: PartTimes | None = None,
        cancel: Event | None = None,
    ) -> list[RankedImages]:
        """Ranks the prepared `images[q]` for each `queries[q]`.

        Each query follows its own plan of windows (`mmr5_train.ranking.windows`). Windows of all queries that are
        ready at the same time share batches. The seconds of each part are added to `times`.
        """
        for query, page_images in zip(queries, images, strict=True):
            if not query.strip():
                raise InputError("query: is empty; expected a question")
            if not page_images:
                raise InputError("pages: expected at least one page to rank, found none")
        call = _Call(times or PartTimes(), cancel)
        if self.mode == "adaptive":
            return self._rank_adaptively(queries, images, call)
        return self.rank_in_mode(self.backend.mode, queries, images, call)

    def _rank_adaptively(
        self, queries: Sequence[str], images: Sequence[Sequence[Image.Image]], call: _Call
    ) -> list[RankedImages]:
        """Mode logits on all pages; where its margin is small, mode reason on the first ones."""
        ranked = self.rank_in_mode("logits", queries, images, call)
        unsure = [q for q, scored in enumerate(ranked) if scored.margin < self.margin]
        # In the order of the input, as the model has seen pages in training.
        first = {q: sorted(ranked[q].order[: self.options.adaptive.pages]) for q in unsure}
        reasoned = self.rank_in_mode(
            "reason", [queries[q] for q in unsure], [[images[q][i] for i in first[q]] for q in unsure], call
        )
        for q, answer in zip(unsure, reasoned, strict=True):
            windows = [WindowAnswer([first[q][i] for i in w.indices], w.answer) for w in answer.windows]
            order = [first[q][i] for i in answer.order]
            order += [i for i in ranked[q].order if i not in first[q]]
            ranked[q] = RankedImages(order, ranked[q].windows + windows)
        return ranked

    def rank_in_mode(
        self,
        mode: Mode,
        queries: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        call: _Call | None = None,
    ) -> list[RankedImages]:
        """As `rank_images`, in another mode than the reranker's."""
        call = call or _Call(PartTimes(), None)
        size = window_size(self.options, mode)
        plans = [
            make_plan(len(page_images), self.options.strategy, size, self.options.stride) for page_images in images
        ]
        window_answers: list[list[WindowAnswer]] = [[] for _ in plans]
        orders: list[list[int]] = [[] for _ in plans]
        ready = {q: next(plan) for q, plan in enumerate(plans)}  # query → windows that its plan needs next
        while ready:
            prompts = [
                (queries[q], [images[q][i] for i in window]) for q, windows in ready.items() for window in windows
            ]
            generated = iter(self._generate(mode, prompts, call))
            for q, windows in list(ready.items()):
                answers = [next(generated) for _ in windows]  # per window: one greedy answer, or the samples
                for window, samples in zip(windows, answers, strict=True):
                    window_answers[q] += [WindowAnswer(window, answer) for answer in samples]
                try:
                    ready[q] = plans[q].send([_fused_order(samples) for samples in answers])
                except StopIteration as finished:
                    orders[q] = finished.value
                    del ready[q]
        return [ranked_images_of(*row) for row in zip(orders, window_answers, strict=True)]

    def _generate(
        self, mode: Mode, prompts: Sequence[tuple[str, Sequence[Image.Image]]], call: _Call
    ) -> list[list[ModelAnswer]]:
        """The answers to each (query, images) prompt, generated in batches."""
        options: dict[str, Any] = self.options.model_dump(include={"samples", "temperature"})
        size = len(prompts)  # servers and vLLM form their own batches
        if isinstance(self.backend, LocalBackend):
            size, options["mode"] = self.options.batch_size, mode
        answers = []
        for start in range(0, len(prompts), size):
            queries, images = zip(*prompts[start : start + size], strict=True)
            answers += self.backend.generate(
                queries,
                images,
                seed=batch_seed(self.options.seed, start),
                times=call.times,
                cancel=call.cancel,
                **options,
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


def _fused_order(answers: Sequence[ModelAnswer]) -> list[int]:
    """One order of a window's positions, from 0: that of a greedy answer, or the fused orders of samples."""
    return [i - 1 for i in fuse_orders([answer.order for answer in answers])]


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
