"""The reranker: a checkpoint or a server, and a prompt; questions with pages in, complete orders out.

    from mmr5_train import Reranker

    reranker = Reranker("outputs/demo/grpo/model")            # or a hub id, or an adapter
    for result in reranker.rank("Which page …?", ["a.png", "b.pdf#page=3"], top_k=3):
        print(result.rank, result.document, result.note)

Greedy by default, so that the same pages give the same order. Answers are held to a complete list of the pages;
what is wrong with them nevertheless is completed by the stated rule (`mmr5_train.ranking.answer`) and reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmr5_train.common.files import InputError, validation_message
from mmr5_train.inference.local import LocalBackend, load_backend
from mmr5_train.inference.remote import RemoteBackend, ServerConfig
from mmr5_train.models.loading import ModelConfig, read_settings
from mmr5_train.models.pages import PageInput, open_pages
from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.notes import split_notes
from mmr5_train.ranking.prompt import Prompt, read_prompt
from mmr5_train.ranking.records import LocalId, Mode, ModelAnswer
from mmr5_train.ranking.results import RankedResults, build_results
from mmr5_train.ranking.windows import Strategy, fuse_orders, make_plan


class RankingOptions(BaseModel):
    """How a reranker ranks; each is a keyword of `Reranker`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode | None = Field(
        default=None,
        description="reason: think block and answer; direct: the answer alone; logits: one forward pass, no text; "
        "null: reason, or direct where the checkpoint was taught no think block",
    )
    constrain: bool = Field(default=True, description="hold answers to a list of all pages")
    max_new_tokens: int = Field(default=2048, gt=0)
    window: int | None = Field(
        default=20, ge=2, description="most pages in one prompt; null: all, however many there are"
    )
    stride: int | None = Field(default=None, ge=1, description="of sliding windows; null: half a window")
    strategy: Strategy = Field(default="sliding", description="for more pages than a window: or tournament")
    samples: int = Field(default=0, ge=0, description="sampled orders that are fused; 0: one greedy order")
    temperature: float = Field(default=1.0, gt=0, description="of the samples")
    seed: int = Field(default=0, ge=0, description="of the samples")
    batch_size: int = Field(default=8, gt=0, description="prompts answered at a time")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.stride is not None and (self.window is None or self.stride >= self.window):
            raise ValueError(f"stride must be less than window ({self.window})")
        if self.mode == "logits" and self.samples:
            raise ValueError("mode logits writes nothing that could be sampled: samples must be 0")
        return self


@dataclass(frozen=True)
class Ranked:
    """An order of the indices of all pages, with the windows and completions behind it."""

    order: list[int]
    windows: list[tuple[list[int], ModelAnswer]]
    scores: tuple[float, ...] | None = None

    def answered(self) -> ModelAnswer:
        """All of it as one answer, whose local ids are the indices from 1."""
        answers = [answered for _, answered in self.windows]
        return ModelAnswer(
            completion="\n".join(answered.completion for answered in answers),
            order=tuple(LocalId(i + 1) for i in self.order),
            defects=tuple(dict.fromkeys(defect for answered in answers for defect in answered.defects)),
            tokens=sum(answered.tokens for answered in answers),
            prompt_tokens=sum(answered.prompt_tokens for answered in answers),
            visual_tokens=sum(answered.visual_tokens for answered in answers),
            scores=self.scores or (),
        )


class Reranker:
    """Ranks page images for a question with a model in this process, or behind an OpenAI-compatible server."""

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        base: str | None = None,
        prompt: Prompt | str | Path | None = None,
        model: ModelConfig | None = None,
        server: ServerConfig | dict[str, Any] | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """Loads what is needed to rank.

        Args:
            checkpoint: a folder or hub id, or an adapter. One that this project wrote says itself with which
                prompt and page sizes it was taught. With a `server` it is only asked for these, if it is given.
            base: the checkpoint under an adapter; without it, the one that the adapter names.
            prompt: of a checkpoint of other origin: an option of configs/prompt, a YAML file, or a `Prompt`.
            model: page sizes, dtype and attention, where they are not to be the checkpoint's.
            server: where the model is served; then no weights are loaded.
            device: "cuda", "cpu", …; a GPU where there is one.
            **options: the fields of `RankingOptions`.

        Raises `InputError` for a checkpoint, a prompt or an option that is no use.
        """
        self.options = _validated(RankingOptions, options)
        asked = self.options.model_dump(include={"mode", "max_new_tokens", "constrain"})
        prompt = prompt if prompt is None or isinstance(prompt, Prompt) else read_prompt(prompt)
        self.backend: LocalBackend | RemoteBackend
        if server is not None:
            where = server if isinstance(server, ServerConfig) else _validated(ServerConfig, server)
            self.backend = _behind_server(where, checkpoint, prompt, model, asked)
        elif checkpoint is None:
            raise InputError("checkpoint: give a folder, a hub id, or a server")
        else:
            self.backend = load_backend(checkpoint, base=base, prompt=prompt, model=model, device=device, **asked)

    @property
    def mode(self) -> Mode:
        return self.backend.mode

    def rank(self, query: str, pages: Sequence[PageInput], top_k: int | None = None) -> RankedResults:
        """`pages`, best first, with scores, reasoning and any defects; the first `top_k` of them, or all.

        A page is a path or file:// URL of a picture, its bytes, or a PIL image; a PDF stands for all its pages,
        and "report.pdf#page=3" for its third. `doc_id` of a result counts the pages from 0. Raises `InputError`
        for no pages, an empty query, and a page that can't be read.
        """
        return self.rank_many([query], [pages], top_k)[0]

    def rank_many(
        self, queries: Sequence[str], pages: Sequence[Sequence[PageInput]], top_k: int | None = None
    ) -> list[RankedResults]:
        """As `rank` for each of several queries, `batch_size` prompts at a time."""
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k: expected at least 1, found {top_k}")
        if len(queries) != len(pages):
            raise InputError(f"pages: expected a list for each of {len(queries)} queries, found {len(pages)}")
        opened = open_pages(pages, self.backend.prepare)
        ranked = self.order(queries, [[picture for _, picture in row] for row in opened])
        return [
            _results(query, [name for name, _ in row], found, self.backend.mode == "reason", top_k)
            for query, row, found in zip(queries, opened, ranked, strict=True)
        ]

    def order(self, queries: Sequence[str], pages: Sequence[Sequence[Image.Image]]) -> list[Ranked]:
        """The orders of prepared pages: one a query, windows of all queries in common batches."""
        for query, shown in zip(queries, pages, strict=True):
            if not query.strip():
                raise InputError("query: is empty; ask something")
            if not shown:
                raise InputError("there are no pages to rank: give at least one page image")
        options, window = self.options, self._window()
        plans = [make_plan(len(shown), options.strategy, window, options.stride) for shown in pages]
        windows: list[list[tuple[list[int], ModelAnswer]]] = [[] for _ in plans]
        orders: list[list[int]] = [[] for _ in plans]
        waiting = {row: next(plan) for row, plan in enumerate(plans)}
        while waiting:
            jobs = [(row, indices) for row, asked in waiting.items() for indices in asked]
            found = iter(self._ask([(queries[row], [pages[row][i] for i in indices]) for row, indices in jobs]))
            for row, asked in list(waiting.items()):
                answered = [next(found) for _ in asked]
                windows[row] += [(ids, answer) for ids, a in zip(asked, answered, strict=True) for answer in a]
                try:
                    waiting[row] = plans[row].send([_fused(answers) for answers in answered])
                except StopIteration as end:
                    orders[row] = end.value
                    del waiting[row]
        return [_ranked(*row) for row in zip(orders, windows, strict=True)]

    def _window(self) -> int | None:
        """The most pages that one prompt takes: scored by their ids' first tokens, these must differ."""
        if self.backend.mode != "logits" or not isinstance(self.backend, LocalBackend):
            return self.options.window
        return min(self.options.window or 100, self.backend.most_scored)

    def _ask(self, prompts: Sequence[tuple[str, Sequence[Image.Image]]]) -> list[list[ModelAnswer]]:
        in_process = isinstance(self.backend, LocalBackend)  # a server makes batches of its own
        size = self.options.batch_size if in_process else len(prompts)
        answers = []
        for start in range(0, len(prompts), size):
            queries, pages = zip(*prompts[start : start + size], strict=True)
            drawn = self.options.model_dump(include={"samples", "temperature"})
            answers += self.backend.ask(queries, pages, seed=self.options.seed * 1_000_003 + start, **drawn)
        return answers


class QueryReranker:
    """MM-R5's own inference class, as its users call it: `QueryReranker(model).rerank(query, image_paths)`."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.reranker = Reranker(model, **options)

    def rerank(self, query: str, image_list: Sequence[PageInput]) -> list[int]:
        """Indices from 0 of all images, best first."""
        return self.reranker.rank(query, image_list).order


def _fused(answers: Sequence[ModelAnswer]) -> list[int]:
    return [i - 1 for i in fuse_orders([answered.order for answered in answers])]


def _ranked(order: list[int], windows: list[tuple[list[int], ModelAnswer]]) -> Ranked:
    # Scores of different windows are shares of different wholes.
    scores = windows[0][1].scores if len(windows) == 1 else ()
    return Ranked(order, windows, scores or None)


def _results(query: str, names: list[Any], found: Ranked, think: bool, top_k: int | None) -> RankedResults:
    thoughts: list[str] = []
    notes: dict[int, str] = {}
    for indices, answered in found.windows:
        thought = parse_answer(answered.completion, len(indices), expect_think=think).think
        if thought:
            thoughts.append(thought)
            notes |= {indices[i - 1]: note for i, note in split_notes(thought).items() if 1 <= i <= len(indices)}
    return build_results(
        query,
        names,
        found.order,
        scores=found.scores,
        notes=notes,
        reasoning="\n\n".join(thoughts),
        answers=[answered for _, answered in found.windows],
        top_k=top_k,
    )


def _behind_server(
    where: ServerConfig,
    checkpoint: str | Path | None,
    prompt: Prompt | None,
    model: ModelConfig | None,
    asked: dict[str, Any],
) -> RemoteBackend:
    settings = None if checkpoint is None else read_settings(checkpoint)
    prompt = prompt or (settings.prompt if settings else None)
    sizes = model or (settings.model(where.model) if settings else None)
    if prompt is None or sizes is None:
        raise InputError(
            "server: nothing says with which prompt and page sizes the model was taught; give the checkpoint as "
            'well (no weights are loaded), or prompt="default" and model=ModelConfig(…)'
        )
    mode = asked["mode"] or (settings.mode if settings else "reason")
    told = {**asked, "mode": mode, "min_pixels": sizes.min_pixels, "max_pixels": sizes.max_pixels}
    return RemoteBackend(where, prompt, **told)


def _validated(kind: type[Any], values: dict[str, Any]) -> Any:
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(validation_message(error)) from None
