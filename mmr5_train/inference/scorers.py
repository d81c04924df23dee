"""Rerankers that score each page by itself: cross-encoders in this process, and rerank endpoints.

They are what users would download or call instead of a list-wise reranker. `PointwiseReranker` gives them the
interface that `evaluate` uses, so that they rank the same candidates and pages as the other systems.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any, Literal, NamedTuple, Protocol

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmr5_train.chat.client import ChatClient, ChatError, api_key, base_url
from mmr5_train.chat.dialect import Dialect
from mmr5_train.common.cancelling import raise_if_cancelled
from mmr5_train.common.files import InputError
from mmr5_train.common.part_times import PartTimes
from mmr5_train.inference.ranked import RankedImages, WindowAnswer
from mmr5_train.inference.remote import run_in_thread
from mmr5_train.models.config import Dtype
from mmr5_train.models.inputs import data_url
from mmr5_train.models.pages import open_image
from mmr5_train.ranking.records import LocalId, ModelAnswer


class CrossEncoderOptions(BaseModel):
    """A cross-encoder that sentence-transformers loads; configs/crossencoder has known ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="hub id or folder")
    revision: str | None = Field(default=None, description="commit or branch on the hub")
    trust_remote_code: bool = Field(default=False, description="run code from the model's repository")
    instruction: str | None = Field(default=None, description="what makes a page relevant; null: the model's own")
    true_token: str | None = Field(
        default=None, description="token that says that a page is relevant, for a plain vision-language model"
    )
    false_token: str | None = Field(default=None, description="token that says that it is not")
    chat_template: str | None = Field(
        default=None,
        description="Jinja template that turns messages of the roles query and document into a prompt",
    )
    processor: str | None = Field(default=None, description="hub id or folder of the processor; null: as path")
    min_pixels: int | None = Field(
        default=None, gt=0, description="smallest area of a page; null: the model's own"
    )
    max_pixels: int | None = Field(default=None, gt=0, description="largest area of a page; null: the model's own")
    dtype: Dtype = "bfloat16"

    @model_validator(mode="after")
    def _tokens_come_in_pairs(self) -> CrossEncoderOptions:
        if (self.true_token is None) != (self.false_token is None):
            raise ValueError("true_token and false_token: give both or neither")
        if self.true_token is None and (self.chat_template or self.processor):
            raise ValueError("chat_template and processor belong to a model with true_token and false_token")
        return self


class EndpointOptions(BaseModel):
    """A rerank endpoint of a server: vLLM, Jina, this project's server. The key is in OPENAI_API_KEY."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="address before /rerank, e.g. http://localhost:8000/v1")
    model: str = Field(description="the model's name on the server")
    documents: Literal["data_url", "image", "content"] = Field(
        default="content",
        description="form of a page in the request: a data URL; an object with image, base64 (Jina); or an object "
        "with content parts (vLLM)",
    )
    fields: dict[str, Any] = Field(default={}, description="further fields of each request, e.g. an instruction")
    concurrency: int = Field(default=8, gt=0, description="largest number of concurrent requests")
    timeout: float = Field(default=600, gt=0, description="seconds after which a request has failed")
    attempts: int = Field(default=5, gt=0, description="attempts of a request that fails with a temporary error")
    max_wait: float = Field(default=60, gt=0, description="longest wait between two attempts, seconds")


class PageScores(NamedTuple):
    """The scores of one query's pages, higher is better, and the tokens that were read for them."""

    scores: list[float]
    prompt_tokens: int | None


class PageScorer(Protocol):
    """Scores the pages of each query."""

    def score(
        self, queries: Sequence[str], images: Sequence[Sequence[Image.Image]], cancel: Event | None
    ) -> list[PageScores]: ...


class PointwiseReranker:
    """Ranks pages by their scores; equal scores keep the order of the input."""

    mode = "scores"

    def __init__(self, scorer: PageScorer) -> None:
        self.scorer = scorer

    def open_page(self, path: Path) -> Image.Image:
        """The page image as a person sees it. The model's own processor resizes it."""
        return open_image(path)

    def rank_images(
        self,
        queries: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        times: PartTimes | None = None,
        cancel: Event | None = None,
    ) -> list[RankedImages]:
        """Ranks `images[q]` for each `queries[q]`. All seconds are of `prefill`: nothing is decoded."""
        with (times or PartTimes()).part("prefill"):
            scored = self.scorer.score(queries, images, cancel)
        return [ranked_by_score(scores, len(row)) for scores, row in zip(scored, images, strict=True)]


def ranked_by_score(scored: PageScores, n_pages: int) -> RankedImages:
    if len(scored.scores) != n_pages:
        raise InputError(f"expected scores of {n_pages} pages, found {len(scored.scores)}")
    order = sorted(range(n_pages), key=lambda index: -scored.scores[index])
    by_rank = tuple(float(scored.scores[index]) for index in order)
    answer = ModelAnswer(
        completion="",
        order=tuple(LocalId(index + 1) for index in order),
        prompt_tokens=scored.prompt_tokens,
        scores=by_rank,
    )
    return RankedImages(order, [WindowAnswer(list(range(n_pages)), answer)], by_rank)


class CrossEncoderScorer:
    """Scores (query, page) pairs with a sentence-transformers `CrossEncoder`."""

    def __init__(self, options: CrossEncoderOptions, *, batch_size: int, device: str | None = None) -> None:
        self.options, self.batch_size = options, batch_size
        self.model = load_cross_encoder(options, device)
        self._tokens = 0
        self.model[0].register_forward_pre_hook(self._count_tokens)

    def _count_tokens(self, _module: Any, inputs: tuple[dict[str, Any], ...]) -> None:
        self._tokens += int(inputs[0]["attention_mask"].sum())

    def score(
        self, queries: Sequence[str], images: Sequence[Sequence[Image.Image]], cancel: Event | None
    ) -> list[PageScores]:
        scored = []
        for query, row in zip(queries, images, strict=True):
            raise_if_cancelled(cancel)
            self._tokens = 0
            scores = self.model.predict(
                [(query, image) for image in row],
                prompt=self.options.instruction,
                batch_size=self.batch_size,
                show_progress_bar=False,
            )
            scored.append(PageScores([float(score) for score in scores], self._tokens))
        return scored


def load_cross_encoder(options: CrossEncoderOptions, device: str | None) -> Any:
    """A sentence-transformers `CrossEncoder`. Raises `InputError` if it can't be loaded."""
    try:
        from sentence_transformers import CrossEncoder
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.cross_encoder.modules import LogitScore
    except ImportError:
        raise InputError(
            "crossencoder: needs sentence-transformers: in the checkout, pip install '.[crossencoder]'"
        ) from None
    hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    sizes: dict[str, Any] = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
    processor = {name: value for name, value in sizes.items() if value is not None}
    model = {"dtype": getattr(torch, options.dtype)}
    try:
        if options.true_token is None:
            return CrossEncoder(
                options.path, device=device, model_kwargs=model, processor_kwargs=processor or None, **hub
            )
        if options.chat_template is not None:
            processor["chat_template"] = options.chat_template
        transformer = Transformer(
            options.path,
            transformer_task="any-to-any",
            model_kwargs={**model, **hub},
            processor_kwargs=processor if options.processor else {**processor, **hub},
            config_kwargs=hub,
            tokenizer_name_or_path=options.processor,
        )
        true, false = (
            single_token(transformer.tokenizer, token) for token in (options.true_token, options.false_token)
        )
        return CrossEncoder(modules=[transformer, LogitScore(true, false)], device=device)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"crossencoder: {options.path} can't be loaded: {' '.join(str(error).split())}") from None


def single_token(tokenizer: Any, word: str | None) -> int:
    """The id of a word that is one token. Raises `InputError` for another word."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise InputError(f"crossencoder: {word!r} must be one token of the model, found {len(ids)}")
    return int(ids[0])


class EndpointScorer:
    """Asks a rerank endpoint for the scores of each query's pages: one request per query."""

    def __init__(self, options: EndpointOptions) -> None:
        self.options = options
        self._url, self._key = base_url(options.url, "endpoint.url"), api_key(required=False)

    def score(
        self, queries: Sequence[str], images: Sequence[Sequence[Image.Image]], cancel: Event | None
    ) -> list[PageScores]:
        options = self.options

        async def ask_all() -> list[PageScores]:
            client = ChatClient(
                self._url,
                self._key,
                timeout=options.timeout,
                attempts=options.attempts,
                max_wait=options.max_wait,
                dialect=Dialect(),
            )
            slots = asyncio.Semaphore(options.concurrency)

            async def ask(query: str, row: Sequence[Image.Image]) -> PageScores:
                async with slots:
                    return await self._ask(client, query, row)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(ask(*row)) for row in zip(queries, images, strict=True)]
            finally:
                await client.close()
            return [task.result() for task in tasks]

        return run_in_thread(ask_all(), cancel)

    async def _ask(self, client: ChatClient, query: str, images: Sequence[Image.Image]) -> PageScores:
        urls = await asyncio.to_thread(lambda: [data_url(image) for image in images])
        body = {
            **self.options.fields,
            "model": self.options.model,
            "query": query,
            "documents": [request_document(url, self.options.documents) for url in urls],
            "top_n": len(images),
        }
        try:
            text = await client.call("POST", "/rerank", json=body)
        except ChatError as error:
            raise InputError(f"{client.shown_url}/rerank: {error} (after {error.tries} attempts)") from None
        return read_scores(text, len(images), client.shown_url)


def request_document(url: str, form: str) -> Any:
    """One page in a rerank request: see `EndpointOptions.documents`."""
    if form == "data_url":
        return url
    if form == "image":
        return {"image": url.partition(",")[2]}
    return {"content": [{"type": "image_url", "image_url": {"url": url}}]}


def read_scores(text: str, n_pages: int, url: str) -> PageScores:
    """The scores in a rerank response. Raises `InputError` unless each page has one."""
    try:
        reply = json.loads(text)
        results = reply.get("results", reply.get("data"))
        by_index = {int(row["index"]): float(row["relevance_score"]) for row in results}
        scores = [by_index[index] for index in range(n_pages)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{url}/rerank: expected results with index and relevance_score for each of {n_pages} pages, found "
            f"{text[:200]!r} ({type(error).__name__}: {error})"
        ) from None
    usage = reply.get("usage") or {}
    tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
    return PageScores(scores, tokens if isinstance(tokens, int) else None)
