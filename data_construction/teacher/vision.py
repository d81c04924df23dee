"""The teacher behind an OpenAI-compatible server: a vision model sees each page and explains it.

Where the server is and with which key stand in the environment (`OPENAI_BASE_URL`, `OPENAI_API_KEY`), the
words that are sent in configs/teacher/openai.yaml. Lost connections, rate limits and server errors are tried
again after a pause; a wrong key, an unknown model or no server at all stop the run; an answer that can't be
used is asked for once more and then fails its question (`TeacherFailure`). The key is in no message.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import openai
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from data_construction.teacher.extractive import pages_named
from mmr5_train.ranking.files import InputError
from mmr5_train.ranking.notes import join_notes
from mmr5_train.ranking.prompt import THINK_CLOSE, THINK_OPEN, fill, neutral
from mmr5_train.ranking.records import LocalId, Page

PROBLEMS = {
    "empty": "was empty",
    "cut_off": "was cut off at the token limit",
    "too_long": "was too long",
    "garbage": "was not a chat completion",
}
"""What can be wrong with an answer, as manifest counts name it, and as the model is told."""


class TeacherFailure(Exception):
    """A call gave no answer that can be used: its question is dropped, the run goes on.

    `reason` is the same for all failures of a kind, `detail` is what the server said.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class OpenAIConfig(BaseModel):
    """`teacher: openai` (configs/teacher/openai.yaml).

    Templates may hold {query} and {words}; those of the second step also {notes}, {relevant} and {others}.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["openai"]
    model: str | None = Field(description="the name the server knows the model by")
    concurrency: int = Field(gt=0, description="requests on the way at once")
    timeout: float = Field(gt=0, description="seconds until a request counts as lost")
    attempts: int = Field(gt=0, description="tries of a request that a passing fault stopped")
    max_wait: float = Field(gt=0, description="longest pause between two tries, seconds")
    max_tokens: int = Field(gt=0, description="longest answer, a think block included; twice that on a second try")
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


class OpenAITeacher:
    """A `Teacher` over HTTP. Raises `InputError` where key or model are not given."""

    def __init__(self, config: OpenAIConfig) -> None:
        self.config = config
        self.concurrency = config.concurrency
        self.counts: Counter[str] = Counter()
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self._key:
            raise InputError(
                "OPENAI_API_KEY is not set: export the server's key (any word for a server that asks for none)"
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError("OPENAI_API_KEY holds characters that no key has: export it again")
        if not config.model:
            raise InputError("teacher.model is not set: give teacher.model=… or export OPENAI_MODEL")
        base_url = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError("OPENAI_BASE_URL is not a web address; expected one like http://localhost:8000/v1")
        self._server = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        self._slots = asyncio.Semaphore(config.concurrency)
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=base_url, timeout=config.timeout, max_retries=0
        )

    async def explain(self, query: str, page: Page, image: Path, helps: bool, words: int) -> str:
        """What the model says of the page picture, in at most `words` words on one line.

        Raises `TeacherFailure`, and `InputError` for an image that can't be read or a server that refuses.
        """
        template = self.config.can_help if helps else self.config.cannot_help
        asked = fill(template, query=neutral(query), words=words)
        async with self._slots:
            url = await asyncio.to_thread(image_url, image, self.config.max_pixels)
            return await self._answer(asked, [{"type": "image_url", "image_url": {"url": url}}], words)

    async def refine(self, query: str, notes: Sequence[str], positives: Sequence[LocalId], words: int) -> str:
        """The second step, without images: the notes in two sentences. Raises as `explain` does."""
        others = [i for i in range(1, len(notes) + 1) if i not in positives]
        config = self.config
        template = config.refine_none if not positives else config.refine if others else config.refine_all
        asked = fill(
            template,
            query=neutral(query),
            words=words,
            notes=join_notes(notes),
            relevant=pages_named(positives),
            others=pages_named(others),
        )
        async with self._slots:
            return await self._answer(asked, [], words)

    async def close(self) -> None:
        await self._client.close()

    async def _answer(self, asked: str, images: list[dict[str, Any]], words: int) -> str:
        """The answer's text. A useless one is counted and asked for once more, with what was wrong with it."""
        problem, text = "", asked
        for limit in (self.config.max_tokens, 2 * self.config.max_tokens):
            if problem:
                text = f"{asked}\n\n{fill(self.config.again, problem=PROBLEMS[problem], words=words)}"
            answer, problem = read_reply(await self._call(text, images, limit), words)
            if not problem:
                return answer
            self.counts[problem] += 1
        raise TeacherFailure(f"the teacher's answer {PROBLEMS[problem]}")

    async def _call(self, text: str, images: list[dict[str, Any]], limit: int) -> object:
        """The server's reply to one request, None where it is not JSON; passing faults are waited out."""
        request: dict[str, Any] = {
            "model": self.config.model,
            "messages": [
                {"role": "system", "content": self.config.system},
                {"role": "user", "content": [*images, {"type": "text", "text": text}]},
            ],
            "max_completion_tokens": limit,
        }
        if self.config.temperature is not None:
            request["temperature"] = self.config.temperature
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.config.attempts),
            wait=self._pause,
            retry=retry_if_exception(self._passes),
            before_sleep=self._count_retry,
            reraise=True,
        )

        async def send() -> object:
            return await self._client.chat.completions.create(**request)

        self.counts["requests"] += 1
        try:
            return await retrying(send)
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APITimeoutError:
            raise TeacherFailure(
                "the teacher did not answer", f"nothing within {self.config.timeout:g} s"
            ) from None
        except openai.APIConnectionError as error:
            raise InputError(
                f"{self._server}: can't be reached ({self._plain(error.__cause__ or error)}); "
                "check the network, OPENAI_BASE_URL and that the server runs"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError):
            return None

    def _passes(self, error: BaseException) -> bool:
        """Whether the same request may succeed later, and soon enough."""
        if isinstance(error, openai.APIConnectionError):
            return True
        if not isinstance(error, openai.APIStatusError) or error.code == "insufficient_quota":
            return False
        soon = (retry_after(error) or 0) <= self.config.max_wait
        return soon and (error.status_code in (408, 429) or error.status_code >= 500)

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        told = retry_after(error) if isinstance(error, openai.APIStatusError) else None
        return told if told is not None else wait_exponential_jitter(0.5, self.config.max_wait, jitter=0.5)(state)

    def _count_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        limited = isinstance(error, openai.RateLimitError)
        lost = isinstance(error, openai.APIConnectionError)
        self.counts["retried_rate_limit" if limited else "retried_lost" if lost else "retried_server_error"] += 1

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        """What a status that was not waited out means: the end of the run, or of a question."""
        status, said = error.status_code, f"{error.status_code}: {self._plain(error)}"
        if status in (401, 403):
            return InputError(f"{self._server}: refuses the key in OPENAI_API_KEY ({said}); export a valid one")
        if error.code == "insufficient_quota":
            return InputError(f"{self._server}: the quota of this key is used up ({said})")
        told = retry_after(error)
        if told is not None and told > self.config.max_wait:
            return InputError(
                f"{self._server}: asks to wait {told:.0f} s, longer than teacher.max_wait ({said}); run it later"
            )
        if status in (408, 429) or status >= 500:
            return TeacherFailure("the teacher's server failed", f"{self.config.attempts} times ({said})")
        return InputError(
            f"{self._server}: refuses the request ({said}); check teacher.model={self.config.model}, that it "
            "takes images, and that OPENAI_BASE_URL ends as the server wants it, mostly in /v1"
        )

    def _plain(self, error: BaseException) -> str:
        """An error's own words on one short line, without the key."""
        said: object = str(error) or type(error).__name__
        if isinstance(error, openai.APIStatusError):
            body = error.body
            said = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
            said = said or error.response.reason_phrase
        line = " ".join(str(said).replace(self._key, "[key]").split())
        return line if len(line) <= 300 else line[:300] + "…"


def read_reply(reply: object, words: int) -> tuple[str, str]:
    """(text on one line, problem) of a chat completion; the problem is a key of `PROBLEMS`, or "".

    A think block is passed over, whether the server split it off as `reasoning_content` or left it in place.
    """
    choices = getattr(reply, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    content = getattr(message, "content", None)
    if message is None or not isinstance(content, str | None):
        return "", "garbage"
    if getattr(choice, "finish_reason", None) == "length":
        return "", "cut_off"
    text = (content or "").rpartition(THINK_CLOSE)[2]
    text = "" if text.lstrip().startswith(THINK_OPEN) else " ".join(text.split())
    if not text:
        return "", "empty"
    return text, "too_long" if len(text.split()) > words else ""


def retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds the server asks to wait (header Retry-After: seconds or a date, RFC 9110), None where it doesn't."""
    value = error.response.headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def image_url(path: Path, max_pixels: int) -> str:
    """A page image of at most `max_pixels` pixels as a JPEG data URL. Raises `InputError` naming the file."""
    try:
        with Image.open(path) as image:
            page = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such image; run the stage that writes the candidates again") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not an image that can be read ({error}); make it anew") from None
    if page.mode == "RGBA":
        page = Image.alpha_composite(Image.new("RGBA", page.size, "white"), page).convert("RGB")
    scale = (max_pixels / (page.width * page.height)) ** 0.5
    if scale < 1:
        page = page.resize((max(1, int(page.width * scale)), max(1, int(page.height * scale))))
    stream = io.BytesIO()
    page.save(stream, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
