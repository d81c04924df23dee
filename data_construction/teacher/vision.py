"""The teacher behind an OpenAI-compatible server: a vision model sees each page and explains it.

Where the server is and with which key stand in the environment (`OPENAI_BASE_URL`, `OPENAI_API_KEY`), the
words that are sent in configs/teacher/openai.yaml. What happens to a call that fails is in calls.py. Every answer
goes into the store first and is taken from there: the same request is paid for once, whatever happens to the run.
An answer that can't be used is asked for again, as often as `OpenAITeacher` says, and then fails its question.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_construction.teacher.calls import ChatServer, TeacherFailure
from data_construction.teacher.cost import PIXELS_A_TOKEN, TOKENS_A_WORD, Budget, Estimate, Price, text_tokens
from data_construction.teacher.extractive import pages_named
from data_construction.teacher.pages import PagePictures
from data_construction.teacher.store import Answer, AnswerStore, request_key
from mmr5_train.ranking.notes import join_notes
from mmr5_train.ranking.prompt import THINK_CLOSE, THINK_OPEN, fill_template, neutralize
from mmr5_train.ranking.records import LocalId, Page, PageId, PromptedTask

PROBLEMS = {
    "empty": "was empty",
    "cut_off": "was cut off at the token limit",
    "too_long": "was too long",
    "refused": "was a refusal",
}
"""What can be wrong with an answer, as manifest counts name it, and as the model is told."""

REFUSALS = ("content_filter", "refusal")
POLL_SECONDS = 0.1


class OpenAIConfig(BaseModel):
    """`teacher: openai` (configs/teacher/openai.yaml).

    Templates may hold {query} and {words}; those of the second step also {notes}, {relevant} and {others}.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["openai"]
    model: str | None = Field(description="the name the server knows the model by")
    concurrency: int = Field(gt=0, description="requests on the way at once")
    max_cost_usd: float | None = Field(gt=0, description="dollars that this model's answers in the store may cost")
    prices: dict[str, Price] = Field(description="dollars for a million tokens, by model")
    timeout: float = Field(gt=0, description="seconds until a request counts as lost")
    attempts: int = Field(gt=0, description="tries of a request that a passing fault stopped or left empty")
    max_wait: float = Field(gt=0, description="longest pause between two tries, seconds")
    max_tokens: int = Field(gt=0, description="longest answer, a think block included; twice that if asked again")
    temperature: float | None = Field(ge=0, description="null: not sent, as some models want")
    max_pixels: int = Field(ge=784, description="larger page images are made smaller")
    system: str
    can_help: str
    cannot_help: str
    refine: str
    refine_all: str
    refine_none: str
    again: str

    @model_validator(mode="after")
    def _templates_hold_the_question(self) -> OpenAIConfig:
        explain, refine = ("can_help", "cannot_help"), ("refine", "refine_all", "refine_none")
        for field, name in {**dict.fromkeys(explain, "{query}"), **dict.fromkeys(refine, "{notes}")}.items():
            if name not in getattr(self, field):
                raise ValueError(f"{field} must hold {name}")
        return self

    @property
    def price(self) -> Price | None:
        return self.prices.get(self.model or "")

    def asked_with(self) -> dict[str, Any]:
        """The settings that decide what is asked and how: another value makes other requests."""
        others = {"name", "concurrency", "max_cost_usd", "prices", "timeout", "attempts", "max_wait"}
        return self.model_dump(exclude=others)

    def explain_text(self, query: str, helps: bool, words: int) -> str:
        return fill_template(self.can_help if helps else self.cannot_help, query=neutralize(query), words=words)

    def refine_text(self, query: str, notes: Sequence[str], positives: Sequence[LocalId], words: int) -> str:
        others = [i for i in range(1, len(notes) + 1) if i not in positives]
        template = self.refine_none if not positives else self.refine if others else self.refine_all
        return fill_template(
            template,
            query=neutralize(query),
            words=words,
            notes=join_notes(notes),
            relevant=pages_named(positives),
            others=pages_named(others),
        )

    def image_tokens(self, page: Page) -> float:
        """About how many tokens a page has as this model sees it."""
        pixels = min(page.width * page.height, self.max_pixels)
        return pixels / (self.price.pixels_per_token if self.price else PIXELS_A_TOKEN)

    def estimate(
        self, prompted: Sequence[PromptedTask], pages: dict[PageId, Page], refine: bool, words: int
    ) -> Estimate:
        """What explaining these questions will take if every answer is as long as allowed, and right at once."""
        calls = images = text = output = 0.0
        for task in prompted:
            positives, note = task.local_positives, round(words * TOKENS_A_WORD)
            for i, shown in enumerate(task.shown, 1):
                images += self.image_tokens(pages[shown.id])
                text += text_tokens(self.system + self.explain_text(task.task.query, i in positives, words))
            calls += len(task.shown)
            output += len(task.shown) * note
            if refine:
                asked = self.refine_text(task.task.query, [""] * len(task.shown), positives, 2 * words)
                text += text_tokens(self.system + asked) + len(task.shown) * note
                calls += 1
                output += 2 * note
        return Estimate(int(calls), round(images), round(text), round(output))


class OpenAITeacher:
    """A `Teacher` over HTTP, with a store of its answers.

    An empty answer is asked for again until it has come `attempts` times, one that was cut off or too long once
    more, a refusal not at all. The model is told what was wrong, and may use twice as many tokens.
    """

    def __init__(self, config: OpenAIConfig, server: ChatServer, store: AnswerStore) -> None:
        self.config, self.server, self.store = config, server, store
        self.concurrency = config.concurrency
        self.counts: Counter[str] = Counter()
        self.model = config.model or ""
        self.budget = Budget(self.model, config.price, config.max_cost_usd, lambda: store.spent(self.model))
        self._may_come = {"empty": config.attempts, "cut_off": 2, "too_long": 2, "refused": 1}
        self._slots = asyncio.Semaphore(config.concurrency)
        self._used: set[str] = set()
        self._paid = 0
        self._pictures = PagePictures(config.max_pixels)

    async def explain(
        self, query: str, page: Page, image: Path, helps: bool, words: int, problem: str = ""
    ) -> str:
        """What the model says of the page picture, in at most `words` words on one line.

        `problem` says what was wrong with the answer before, if this is a second try. Raises `TeacherFailure`, and
        `InputError` for an image that can't be read or a server that refuses.
        """
        asked = self.config.explain_text(query, helps, words)
        return await self._answer(self._again(asked, problem, words), words, image, self.config.image_tokens(page))

    async def refine(
        self, query: str, notes: Sequence[str], positives: Sequence[LocalId], words: int, problem: str = ""
    ) -> str:
        """The second step, without images: the notes in two sentences. As `explain` otherwise."""
        asked = self.config.refine_text(query, notes, positives, words)
        return await self._answer(self._again(asked, problem, words), words)

    async def close(self) -> None:
        await self.server.close()
        self.store.close()

    def status(self) -> str:
        """For the progress bar: what was answered and what it cost, this run's and all before it in the store."""
        spent, dollars = self.store.spent(self.model), self.budget.dollars
        parts = [
            f"{spent.answers:,} answers ({self._paid:,} now)",
            f"{spent.prompt_tokens + spent.completion_tokens:,} tokens",
            f"${dollars:,.2f}" if dollars is not None else "",
            " ".join(f"{name} {count}" for name, count in sorted(self.server.faults.items())),
        ]
        return ", ".join(part for part in parts if part)

    def _again(self, asked: str, problem: str, words: int) -> str:
        return f"{asked}\n\n{fill_template(self.config.again, problem=problem, words=words)}" if problem else asked

    async def _answer(self, asked: str, words: int, image: Path | None = None, image_tokens: float = 0) -> str:
        """The answer's text, asked for again while it can't be used. Raises as `explain` does."""
        came: Counter[str] = Counter()
        problem = ""
        while not problem or came[problem] < self._may_come[problem]:
            text = self._again(asked, PROBLEMS.get(problem, ""), words)
            limit = self.config.max_tokens * (2 if problem else 1)
            key, answer = await self._stored_or_paid(text, limit, came.total(), image, image_tokens)
            read, problem = usable(answer, words)
            if key not in self._used:  # two questions may ask the same
                self._used.add(key)
                self.counts.update(
                    answers=1, prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens
                )
                if problem:
                    self.counts[problem] += 1
            if not problem:
                return read
            came[problem] += 1
        raise TeacherFailure(f"the teacher's answer {PROBLEMS[problem]}")

    async def _stored_or_paid(
        self, text: str, limit: int, tries: int, image: Path | None, image_tokens: float
    ) -> tuple[str, Answer]:
        """The key of a request and its answer. `tries` tells an answer asked for anew from the one before."""
        config = self.config
        seen = [await self._pictures.hash(image), config.max_pixels] if image else None
        key = request_key(
            {"model": self.model, "temperature": config.temperature, "limit": limit, "system": config.system,
             "text": text, "page": seen, "tries": tries}
        )  # fmt: skip
        while True:
            if answer := self.store.get(key):
                return key, answer
            async with self._slots:
                if self.store.claim(key, config.attempts * (config.timeout + config.max_wait)):
                    try:
                        # Another process may have stored it between the two lines above.
                        answer = self.store.get(key) or await self._pay(key, text, limit, image, image_tokens)
                        return key, answer
                    except Exception:  # not when cancelled: the call may still be on its way
                        self.store.release(key)
                        raise
            await asyncio.sleep(POLL_SECONDS)

    async def _pay(self, key: str, text: str, limit: int, image: Path | None, image_tokens: float) -> Answer:
        url = await self._pictures.url(image) if image else None
        prompt_tokens = text_tokens(self.config.system + text) + image_tokens

        def keep(answer: Answer) -> Answer:
            if not answer.prompt_tokens:  # a server that doesn't count: the budget must not take that for free
                answer = Answer(answer.text, answer.finish, round(prompt_tokens), text_tokens(answer.text))
            self.store.put(key, self.model, answer)
            self._paid += 1
            return answer

        most = await self.budget.reserve(2 * prompt_tokens, limit)  # twice: it is a guess
        try:
            return await self.server.complete(self._body(text, limit, url), keep)
        finally:
            await self.budget.settle(most)

    def _body(self, text: str, limit: int, url: str | None) -> bytes:
        picture = [{"type": "image_url", "image_url": {"url": ""}}] if url else []
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": self.config.system},
                {"role": "user", "content": [*picture, {"type": "text", "text": text}]},
            ],
            "max_completion_tokens": limit,
        }
        if self.config.temperature is not None:
            request["temperature"] = self.config.temperature
        # The picture is set in afterwards, at the first empty url (in a text, quotes would have a backslash): to
        # look through a megabyte for characters to escape takes as long as all the rest of a call.
        head, mark, tail = json.dumps(request).encode().partition(b'"url": "')
        return b"".join([head, mark, url.encode() if url else b"", tail])


def usable(answer: Answer, words: int) -> tuple[str, str]:
    """(text on one line, problem) of an answer; the problem is a key of `PROBLEMS`, or "".

    A think block is passed over, whether the server split it off as `reasoning_content` or left it in place.
    """
    if answer.finish in REFUSALS:
        return "", "refused"
    if answer.finish == "length":
        return "", "cut_off"
    text = answer.text.rpartition(THINK_CLOSE)[2]
    text = "" if text.lstrip().startswith(THINK_OPEN) else " ".join(text.split())
    if not text:
        return "", "empty"
    return text, "too_long" if len(text.split()) > words else ""
