"""The teacher that asks a vision model on an OpenAI-compatible server to explain each page image.

The server and its key come from the environment (`OPENAI_BASE_URL`, `OPENAI_API_KEY`), the prompts from
configs/teacher/openai.yaml. calls.py handles failed calls. Every answer is written to the store before it is used,
so an interrupted run never pays twice for the same request. An unusable answer is requested again, as
`OpenAITeacher` describes; if that does not help, its question is dropped.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_construction.teacher.batches import BatchQueue
from data_construction.teacher.calls import ChatServer, TeacherFailure
from data_construction.teacher.cost import (
    PIXELS_PER_TOKEN,
    TOKENS_PER_WORD,
    Budget,
    Estimate,
    Price,
    text_tokens,
    with_estimates,
)
from data_construction.teacher.extractive import image_names
from data_construction.teacher.pages import PageImages
from data_construction.teacher.replies import (
    DOES_NOT_HELP,
    HELPS,
    REPLY_PROBLEMS,
    PageNote,
    ReadReply,
    ReadT,
    read_line,
    read_note,
    reply_text,
)
from data_construction.teacher.store import Answer, AnswerStore, request_key
from mmr5_train.chat.dialect import Dialect
from mmr5_train.ranking.notes import format_note, join_notes
from mmr5_train.ranking.prompt import fill_template, neutralize
from mmr5_train.ranking.records import LocalId, Page, PageId, PromptedTask

POLL_SECONDS = 0.1
UNLIMITED = 10**9
BATCH_CLAIM_SECONDS = 2 * 24 * 3600.0  # a batch takes a day at most


class OpenAIConfig(BaseModel):
    """`teacher: openai` (configs/teacher/openai.yaml).

    The templates may contain {query} and {words}; the refine templates also {notes}, {relevant} and {others}.
    `verdict` follows `can_help` and `cannot_help`. It asks for the line that states the verdict, {helps} or
    {does_not_help} (replies.py).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["openai"]
    model: str | None = Field(description="name of the model on the server")
    concurrency: int = Field(gt=0, description="requests in flight at a time")
    max_cost_usd: float | None = Field(
        gt=0, description="limit on the cost of this model's answers in the store, dollars"
    )
    prices: dict[str, Price] = Field(description="dollars per million tokens, by model")
    timeout: float = Field(gt=0, description="seconds to wait for a reply")
    attempts: int = Field(gt=0, description="tries of a request after temporary errors or empty answers")
    max_wait: float = Field(gt=0, description="longest wait between two tries, seconds")
    max_tokens: int = Field(
        gt=0, description="limit of an answer, think block included; doubled when a request is repeated"
    )
    temperature: float | None = Field(ge=0, description="null: not sent, which some models require")
    detail: Literal["low", "high", "auto", "original"] | None = Field(
        description="resolution at which the model reads an image; null: not sent"
    )
    extra: dict[str, Any] = Field(description="further fields of each request, e.g. {reasoning_effort: low}")
    dialect: Dialect = Field(description="the request fields to begin with; others are learned from refusals")
    batch: bool = Field(default=False, description="send files of requests to the server's batch endpoint")
    batch_poll: float = Field(default=30, gt=0, description="seconds between two questions about a batch's state")
    batch_price: float = Field(default=0.5, ge=0, le=1, description="price of a batch, as a share of `prices`")
    max_pixels: int = Field(ge=784, description="larger page images are shrunk")
    system: str
    can_help: str
    cannot_help: str
    verdict: str
    refine: str
    refine_all: str
    refine_none: str
    again: str

    @model_validator(mode="after")
    def _templates_have_required_fields(self) -> OpenAIConfig:
        refine = dict.fromkeys(("refine", "refine_all", "refine_none"), ("{notes}",))
        explain = dict.fromkeys(("can_help", "cannot_help"), ("{query}",))
        for field, names in {**explain, "verdict": ("{helps}", "{does_not_help}"), **refine}.items():
            for name in names:
                if name not in getattr(self, field):
                    raise ValueError(f"{field} must contain {name}")
        return self

    @property
    def price(self) -> Price | None:
        """The model's row of `prices`, or that of its batches."""
        price = self.prices.get(self.model or "")
        if price is None or not self.batch:
            return price
        share = {name: getattr(price, name) * self.batch_price for name in ("input", "output")}
        return price.model_copy(update=share)

    def request_settings(self) -> dict[str, Any]:
        """The settings that change what is requested, and so invalidate stored answers."""
        others = {"name", "concurrency", "max_cost_usd", "prices", "timeout", "attempts", "max_wait", "dialect"}
        return self.model_dump(exclude={*others, "batch", "batch_poll", "batch_price"})

    def explain_text(self, query: str, helps: bool, words: int) -> str:
        return fill_template(
            f"{self.can_help if helps else self.cannot_help}\n\n{self.verdict}",
            query=neutralize(query),
            words=words,
            helps=HELPS,
            does_not_help=DOES_NOT_HELP,
        )

    def refine_text(self, query: str, notes: Sequence[str], positives: Sequence[LocalId], words: int) -> str:
        others = [i for i in range(1, len(notes) + 1) if i not in positives]
        template = self.refine_none if not positives else self.refine if others else self.refine_all
        return fill_template(
            template,
            query=neutralize(query),
            words=words,
            notes=join_notes(notes),
            relevant=image_names(positives),
            others=image_names(others),
        )

    def image_tokens(self, page: Page) -> float:
        """Approximate number of visual tokens of a page for this model."""
        pixels = min(page.width * page.height, self.max_pixels)
        return pixels / (self.price.pixels_per_token if self.price else PIXELS_PER_TOKEN)

    def estimate(
        self, prompted: Sequence[PromptedTask], pages: dict[PageId, Page], refine: bool, words: int
    ) -> Estimate:
        """Calls and tokens of these questions, if each answer has the full length and none is requested again."""
        calls = images = text = output = 0.0
        for task in prompted:
            positives, note_tokens = task.local_positives, round(words * TOKENS_PER_WORD)
            for i, shown in enumerate(task.shown, 1):
                images += self.image_tokens(pages[shown.id])
                text += text_tokens(self.system + self.explain_text(task.task.query, i in positives, words))
            calls += len(task.shown)
            output += len(task.shown) * (note_tokens + text_tokens(f"\n{DOES_NOT_HELP}"))
            if refine:
                notes = [format_note("", helps=False)] * len(task.shown)
                prompt = self.refine_text(task.task.query, notes, positives, 2 * words)
                text += text_tokens(self.system + prompt) + len(task.shown) * note_tokens
                calls += 1
                output += 2 * note_tokens
        return Estimate(int(calls), round(images), round(text), round(output))


class OpenAITeacher:
    """A `Teacher` over HTTP, with a store of its answers.

    After an unusable answer, the request is repeated with the problem added to the prompt and twice the token
    limit: up to `attempts` tries for empty answers, none after a refusal, two for every other problem.
    """

    def __init__(self, config: OpenAIConfig, server: ChatServer, store: AnswerStore) -> None:
        self.config, self.server, self.store = config, server, store
        self.queue: BatchQueue | None = None
        self.concurrency, self._poll_seconds = config.concurrency, POLL_SECONDS
        self._claim_seconds = config.attempts * (config.timeout + config.max_wait)
        if config.batch:  # all requests wait at the same time
            self.queue = server.batch_queue(store, config.batch_poll)
            self.concurrency, self._poll_seconds = UNLIMITED, config.batch_poll
            self._claim_seconds = BATCH_CLAIM_SECONDS
        self.counts: Counter[str] = Counter()
        self.model = config.model or ""
        self.budget = Budget(self.model, config.price, config.max_cost_usd, lambda: store.spent(self.model))
        self._max_tries = {**dict.fromkeys(REPLY_PROBLEMS, 2), "empty": config.attempts, "refused": 1}
        self._slots = asyncio.Semaphore(self.concurrency)
        self._calls = asyncio.Semaphore(config.concurrency)
        self._counted_keys: set[str] = set()
        self._paid_answers = 0
        self._images = PageImages(config.max_pixels)

    async def explain(
        self, query: str, page: Page, image: Path, helps: bool, words: int, problem: str = ""
    ) -> PageNote:
        """The model's note on the page image, of at most `words` words, and the verdict that the model states.

        `problem` describes what was wrong with the previous answer, if this is a second try. Raises
        `TeacherFailure`, and `InputError` if the image can't be read or the server refuses requests.
        """
        prompt = self._with_problem(self.config.explain_text(query, helps, words), problem, words)
        return await self._answer(prompt, words, read_note, image, self.config.image_tokens(page))

    async def refine(
        self, query: str, notes: Sequence[str], positives: Sequence[LocalId], words: int, problem: str = ""
    ) -> str:
        """Summarizes the notes in one or two sentences, without images. Otherwise like `explain`."""
        prompt = self._with_problem(self.config.refine_text(query, notes, positives, words), problem, words)
        return await self._answer(prompt, words, read_line)

    @property
    def resolved(self) -> dict[str, Any]:
        return {"dialect": self.server.dialect.model_dump(mode="json")}

    async def close(self) -> None:
        if self.queue:
            await self.queue.close()
        await self.server.close()
        self.store.close()

    def status(self) -> str:
        """For the progress bar: answers, tokens and cost of all runs with this store, and errors of this run."""
        spent, dollars = self.store.spent(self.model), self.budget.spent_dollars
        parts = [
            f"{spent.answers:,} answers ({self._paid_answers:,} in this run)",
            f"{spent.prompt_tokens + spent.completion_tokens:,} tokens",
            f"${dollars:,.2f}" if dollars is not None else "",
            " ".join(f"{name} {count}" for name, count in sorted(self.server.faults.items())),
            self.queue.status() if self.queue else "",
        ]
        return ", ".join(part for part in parts if part)

    def _with_problem(self, prompt: str, problem: str, words: int) -> str:
        """The prompt of a repeated request, or the same prompt if there is no problem."""
        if not problem:
            return prompt
        return f"{prompt}\n\n{fill_template(self.config.again, problem=problem, words=words)}"

    async def _answer(
        self, prompt: str, words: int, read: ReadReply[ReadT], image: Path | None = None, image_tokens: float = 0
    ) -> ReadT:
        """What `read` finds in a usable answer. Repeats the request. Raises as `explain`."""
        tries: Counter[str] = Counter()  # by problem
        problem = ""
        while not problem or tries[problem] < self._max_tries[problem]:
            text = self._with_problem(prompt, REPLY_PROBLEMS.get(problem, ""), words)
            max_tokens = self.config.max_tokens * (2 if problem else 1)
            key, answer = await self._stored_or_paid(text, max_tokens, tries.total(), image, image_tokens)
            reply, problem = reply_text(answer)
            result, problem = (None, problem) if problem else read(reply, words)
            if key not in self._counted_keys:  # two questions may send the same request
                self._counted_keys.add(key)
                self.counts.update(
                    answers=1,
                    prompt_tokens=answer.prompt_tokens or 0,
                    completion_tokens=answer.completion_tokens or 0,
                )
                if problem:
                    self.counts[problem] += 1
            if result is not None:
                return result
            tries[problem] += 1
        raise TeacherFailure(f"the teacher's answer {REPLY_PROBLEMS[problem]}")

    async def _stored_or_paid(
        self, text: str, max_tokens: int, tries: int, image: Path | None, image_tokens: float
    ) -> tuple[str, Answer]:
        """The key and the answer of a request: from the store, or from the server if it is not stored.

        `tries` is the number of unusable answers so far. It is part of the key, so that a repeated request is not
        answered from the store with the same unusable answer.
        """
        config = self.config
        page = [await self._images.hash(image), config.max_pixels] if image else None
        key = request_key(
            {"model": self.model, "temperature": config.temperature, "limit": max_tokens, "system": config.system,
             "text": text, "page": page, "tries": tries}
        )  # fmt: skip
        while True:
            if answer := self.store.get(key):
                return key, answer
            async with self._slots:
                if self.store.claim(key, self._claim_seconds):
                    try:
                        # Another process may have stored it after the first `get` and before the claim.
                        answer = self.store.get(key)
                        if not answer:
                            # A repeated request goes by itself, because each batch may take a day.
                            queue = None if tries else self.queue
                            answer = await self._pay(key, text, max_tokens, image, image_tokens, queue)
                        return key, answer
                    except Exception:  # not on cancellation: the call may still be in flight
                        self.store.release(key)
                        raise
            await asyncio.sleep(self._poll_seconds)

    async def _pay(
        self,
        key: str,
        text: str,
        max_tokens: int,
        image: Path | None,
        image_tokens: float,
        queue: BatchQueue | None,
    ) -> Answer:
        """The answer to a request, which is stored: from a batch if there is a queue, or else by itself."""
        prompt_tokens = text_tokens(self.config.system + text) + image_tokens
        request = self._request(text, max_tokens, bool(image))

        async def urls() -> list[str]:
            return [await self._images.url(image)] if image else []

        def store(answer: Answer) -> Answer:
            answer = with_estimates(answer, round(prompt_tokens))
            self.store.put(key, self.model, answer)
            self._paid_answers += 1
            return answer

        # The prompt tokens are an estimate: reserve twice as many.
        reserved = await self.budget.reserve(2 * prompt_tokens, max_tokens)
        try:
            if queue and (answer := await queue.answer(key, request, urls, round(prompt_tokens))):
                self._paid_answers += 1
                return answer
            async with self._calls:
                try:
                    return await self.server.complete(request, await urls(), store)
                finally:
                    if queue:
                        queue.probed()  # also after a refusal: the other requests wait for it
        finally:
            await self.budget.release(reserved)

    def _request(self, text: str, max_tokens: int, has_image: bool) -> dict[str, Any]:
        """The request without the data of its image."""
        detail = {"detail": self.config.detail} if self.config.detail else {}
        image_part = [{"type": "image_url", "image_url": {"url": "", **detail}}] if has_image else []
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": self.config.system},
                {"role": "user", "content": [*image_part, {"type": "text", "text": text}]},
            ],
            "max_tokens": max_tokens,
            **self.config.extra,
        }
        if self.config.temperature is not None:
            request["temperature"] = self.config.temperature
        return request
