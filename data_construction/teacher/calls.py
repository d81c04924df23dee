"""Calls of an OpenAI-compatible chat server: retries, and which errors drop a question or end the run.

| Reply | Reaction | Counted as |
|---|---|---|
| 429 | retry after Retry-After or with exponential backoff, at most `attempts` tries | `rate_limit` |
| 408, 5xx | the same | `server_error` |
| connection refused, reset or closed early | the same; after the last try, the run ends | `lost` |
| no reply within `timeout` | the same as 429 | `timeout` |
| not a chat completion | the same; the run ends if the server never sent a completion | `garbage` |
| refused by a content filter | drop the question | `refused` |
| wrong key, no quota, any other status | end the run at once | – |

Unless the table says that the run ends, the question is dropped after the last try (`TeacherFailure`). When the
run ends, it waits for the calls in flight, since they will be billed. No message contains the key.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from data_construction.teacher.store import Answer
from mmr5_train.common.files import InputError

REFUSAL_CODES = ("content_filter", "content_policy_violation")


class TeacherFailure(Exception):
    """A call gave no usable answer. Its question is dropped and the run continues.

    `reason` is the same for all failures of a kind; `detail` quotes the server.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class NoCompletion(Exception):
    """A reply that is not a chat completion."""


class CallSettings(Protocol):
    """The settings of a teacher's config that calls use."""

    @property
    def model(self) -> str | None: ...
    @property
    def timeout(self) -> float: ...
    @property
    def attempts(self) -> int: ...
    @property
    def max_wait(self) -> float: ...


class ChatServer:
    """The server at `OPENAI_BASE_URL`, used with `OPENAI_API_KEY`.

    Raises `InputError` if one of the two is unusable, or if the config names no model.
    """

    def __init__(self, config: CallSettings) -> None:
        self.config = config
        self.faults: Counter[str] = Counter()
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self._key:
            raise InputError(
                "OPENAI_API_KEY is not set: export the server's key (any word if the server needs no key)"
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError("OPENAI_API_KEY contains characters that are not printable ASCII: export it again")
        if not config.model:
            raise InputError("teacher.model is not set: give teacher.model=… or export OPENAI_MODEL")
        base_url = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError(
                "OPENAI_BASE_URL is not a web address; expected something like http://localhost:8000/v1"
            )
        self._server = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        # No timeout here: _send limits the time of a whole call.
        self._client = openai.AsyncOpenAI(api_key=self._key, base_url=base_url, timeout=None, max_retries=0)
        self._in_flight: set[asyncio.Task[Answer]] = set()
        self._got_completion = False

    async def complete(self, body: bytes, store: Callable[[Answer], Answer]) -> Answer:
        """Sends the JSON body of a chat completion request and returns the answer.

        `store` is called with the answer as soon as it arrives, and returns it, possibly completed. Raises
        `TeacherFailure` and `InputError` as the module's table says.
        """
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.config.attempts),
            wait=self._seconds_to_wait,
            retry=retry_if_exception(self._is_worth_retrying),
            reraise=True,
        )

        async def send() -> Answer:
            task = asyncio.create_task(self._send(body, store))
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)
            return await asyncio.shield(task)

        try:
            return await retrying(send)
        except (openai.APIError, TimeoutError, NoCompletion) as error:
            raise self._final_error(error) from None

    async def close(self) -> None:
        """Waits for the calls in flight, whose answers are stored, and closes the connection."""
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        await self._client.close()

    async def _send(self, body: bytes, store: Callable[[Answer], Answer]) -> Answer:
        try:
            async with asyncio.timeout(self.config.timeout):
                # Sending bytes and reading text takes half the time of the client's typed methods.
                headers = {"Content-Type": "application/json"}
                reply = await self._client.post(
                    "/chat/completions", cast_to=str, content=body, options={"headers": headers}
                )
            answer = read_reply(reply)
        except (openai.APIError, TimeoutError, NoCompletion) as error:
            if kind := fault_kind(error):
                self.faults[kind] += 1
            raise
        self._got_completion = True
        return store(answer)

    def _is_worth_retrying(self, error: BaseException) -> bool:
        """Whether the same request may succeed on a retry, within `max_wait` seconds."""
        if isinstance(error, openai.APIStatusError) and (retry_after(error) or 0) > self.config.max_wait:
            return False
        return fault_kind(error) not in (None, "refused")

    def _seconds_to_wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        seconds = retry_after(error) if isinstance(error, openai.APIStatusError) else None
        return (
            seconds
            if seconds is not None
            else wait_exponential_jitter(0.5, self.config.max_wait, jitter=0.5)(state)
        )

    def _final_error(self, error: Exception) -> Exception:
        """The exception after the last try: `InputError` ends the run, `TeacherFailure` drops the question."""
        tries = f"{self.config.attempts} times"
        if isinstance(error, openai.APIStatusError):
            return self._status_error(error)
        if isinstance(error, TimeoutError):
            return TeacherFailure(
                "the teacher did not answer", f"nothing within {self.config.timeout:g} s, {tries}"
            )
        if isinstance(error, NoCompletion):
            text = self._one_line(error)
            if self._got_completion:
                return TeacherFailure("the teacher's answer was not a chat completion", f"{tries} ({text})")
            return InputError(
                f"{self._server}: answers, but not with a chat completion ({text}); check that OPENAI_BASE_URL "
                "ends as the server expects, usually in /v1"
            )
        return InputError(
            f"{self._server}: can't be reached ({self._one_line(error.__cause__ or error)}); "
            "check the network and OPENAI_BASE_URL, and that the server is running"
        )

    def _status_error(self, error: openai.APIStatusError) -> Exception:
        status, text = error.status_code, f"{error.status_code}: {self._one_line(error)}"
        if status in (401, 403):
            return InputError(f"{self._server}: refuses the key in OPENAI_API_KEY ({text}); export a valid one")
        if error.code in REFUSAL_CODES:
            return TeacherFailure("the teacher refused to answer", text)
        if error.code == "insufficient_quota":
            return InputError(f"{self._server}: the quota of this key is used up ({text})")
        seconds = retry_after(error)
        if seconds is not None and seconds > self.config.max_wait:
            return InputError(
                f"{self._server}: asks to wait {seconds:.0f} s, longer than teacher.max_wait ({text}); try later"
            )
        if fault_kind(error):
            return TeacherFailure("the teacher's server failed", f"{self.config.attempts} times ({text})")
        return InputError(
            f"{self._server}: refuses the request ({text}); check teacher.model={self.config.model}, that the "
            "model takes images, and that OPENAI_BASE_URL ends as the server expects, usually in /v1"
        )

    def _one_line(self, error: BaseException) -> str:
        """The message of an error on one line of at most 300 characters, without the key."""
        text: object = str(error) or type(error).__name__
        if isinstance(error, openai.APIStatusError):
            body = error.body
            text = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
            text = text or error.response.reason_phrase
        line = " ".join(str(text).replace(self._key, "[key]").split())
        return line if len(line) <= 300 else line[:300] + "…"


def fault_kind(error: BaseException | None) -> str | None:
    """The "Counted as" of the module's table; None for an error that ends the run at once."""
    if isinstance(error, NoCompletion):
        return "garbage"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "lost"
    if not isinstance(error, openai.APIStatusError) or error.code == "insufficient_quota":
        return None
    if error.code in REFUSAL_CODES:
        return "refused"
    if error.status_code == 429:
        return "rate_limit"
    return "server_error" if error.status_code == 408 or error.status_code >= 500 else None


def read_reply(reply: str) -> Answer:
    """The answer in the JSON of a chat completion. Raises `NoCompletion` for any other text, or truncated JSON."""
    try:
        completion: Any = json.loads(reply)
        choice = completion["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise NoCompletion(f"found {' '.join(reply[:60].split())!r}") from None
    if not isinstance(content, str | None):
        raise NoCompletion(f"its content is {type(content).__name__}, not text")
    usage = completion.get("usage") or {}
    tokens = [
        usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
    ]
    finish = "refusal" if refusal and not content else str(choice.get("finish_reason") or "")
    return Answer(content or str(refusal or ""), finish, *(n if isinstance(n, int) else 0 for n in tokens))


def retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds to wait by the Retry-After header (seconds or a date, RFC 9110); None without a valid header."""
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
